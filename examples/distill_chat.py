"""Distil a slimmed chat model on chats: the student learns the teacher's distributions where the assistant speaks.

    slimmoe slim MODEL --data chats.jsonl --expert-width N --output slimmed
    python examples/distill_chat.py --model slimmed --teacher MODEL --data chats.jsonl

MODEL may be examples/teacher/model, on a CPU; examples/chitchat.py makes chats.jsonl (`pip install chitchat-dataset`).
"""

import argparse

import torch
from transformers import AutoModelForCausalLM

from slimmoe_hf import DistillationConfig, DistillationTrainer
from slimmoe_hf.data import load_splits

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="the student, slimmed")
parser.add_argument("--teacher", required=True, help="the chat model that it was cut from")
parser.add_argument("--data", required=True, help="chats: a column `messages`")
parser.add_argument("--output", default="distilled-chat")
parser.add_argument("--max-length", type=int, default=256)
parser.add_argument("--max-steps", type=int, default=200)
args = parser.parse_args()

dtype = "bfloat16" if torch.cuda.is_available() else "float32"
chats = {name: split.select_columns("messages") for name, split in load_splits(args.data).items()}
trainer = DistillationTrainer(
    model=AutoModelForCausalLM.from_pretrained(args.model, dtype="float32"),
    teacher_model=args.teacher,
    args=DistillationConfig(
        output_dir=f"{args.output}.checkpoints", max_length=args.max_length, packing=True, eval_packing=False,
        assistant_only_loss=True,  # the chat template says which tokens are the assistant's
        loss_top_k=64, crossentropy_weight=0.1, max_steps=args.max_steps, learning_rate=5e-4, lr_scheduler_type="cosine",
        per_device_train_batch_size=4, logging_steps=20, save_steps=100, report_to="none",
        teacher_model_init_kwargs={"dtype": dtype},
    ),
    train_dataset=chats["train"],
    eval_dataset=chats["validation"],
)  # fmt: skip
before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
trainer.save_model(args.output)
for name in ("eval_kl", "eval_ce", "eval_top1_agreement"):
    print(f"{name}: {before[name]:.4f} -> {after[name]:.4f}")
print(f"{args.output}: load it with AutoModelForCausalLM")
