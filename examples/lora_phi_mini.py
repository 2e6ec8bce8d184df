"""Fine-tune Phi-mini-MoE (7.6B) on chats with TRL: a LoRA adapter on attention and experts, for one A100-80GB.

    python examples/lora_phi_mini.py
    python examples/lora_phi_mini.py --model examples/teacher/model --data chats.jsonl --max-length 256 --max-steps 20

The second line tries it on a CPU, with the small model that ships here; examples/chitchat.py makes chats.jsonl.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from slimmoe_hf import lora_config
from slimmoe_hf.data import load_documents
from slimmoe_hf.tuning_data import marks_the_assistant

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="microsoft/Phi-mini-MoE-instruct")
parser.add_argument("--data", default="trl-lib/Capybara", help="chats: a column `messages`")
parser.add_argument("--output", default="phi-mini-lora")
parser.add_argument("--max-length", type=int, default=4096)
parser.add_argument("--max-steps", type=int, default=500)
args = parser.parse_args()

on_gpu = torch.cuda.is_available()
chats, held_out = (load_documents(args.data, split).select_columns("messages") for split in ("train", "test"))
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="bfloat16" if on_gpu else "float32")  # 15 GB, frozen
trainer = SFTTrainer(
    model,
    args=SFTConfig(
        output_dir=args.output,
        max_length=args.max_length, max_steps=args.max_steps, assistant_only_loss=marks_the_assistant(tokenizer),
        per_device_train_batch_size=1, gradient_accumulation_steps=16, learning_rate=1e-4, lr_scheduler_type="cosine",
        router_aux_loss_coef=0.0,  # TRL's load-balancing loss does not know PhiMoE
        bf16=on_gpu, use_cpu=not on_gpu, logging_steps=10, save_strategy="no", report_to="none",
    ),
    train_dataset=chats,
    processing_class=tokenizer,
    peft_config=lora_config(model.config, rank=16),
)  # fmt: skip
few = held_out.select(range(min(len(held_out), 64)))
before = trainer.evaluate(few)["eval_loss"]
trainer.train()
after = trainer.evaluate(few)["eval_loss"]
trainer.save_model()
print(f"held-out loss {before:.4f} -> {after:.4f}; the adapter is in {args.output}")
