"""Fine-tune Phi-tiny-MoE (3.8B) on chats with TRL, routers too, and merge: whole weights, for one A6000-48GB.

    python examples/lora_phi_tiny.py
    python examples/lora_phi_tiny.py --model examples/teacher/model --data chats.jsonl --max-length 256 --max-steps 20

The second line tries it on a CPU, with the small model that ships here; examples/chitchat.py makes chats.jsonl.
Serving engines load merged weights; an adapter on fused experts they load unreliably.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from slimmoe_hf import lora_config
from slimmoe_hf.data import load_documents
from slimmoe_hf.pipeline import save_checkpoint
from slimmoe_hf.tuning_data import marks_the_assistant

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="microsoft/Phi-tiny-MoE-instruct")
parser.add_argument("--data", default="trl-lib/Capybara", help="chats: a column `messages`")
parser.add_argument("--output", default="phi-tiny-tuned")
parser.add_argument("--max-length", type=int, default=4096)
parser.add_argument("--max-steps", type=int, default=500)
args = parser.parse_args()

on_gpu = torch.cuda.is_available()
config, tokenizer = AutoConfig.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(args.model, dtype="bfloat16" if on_gpu else "float32"),  # 7.5 GB of frozen weights
    args=SFTConfig(
        output_dir=f"{args.output}.checkpoints",
        max_length=args.max_length, max_steps=args.max_steps, packing=True,
        assistant_only_loss=marks_the_assistant(tokenizer),
        per_device_train_batch_size=1, gradient_accumulation_steps=8, learning_rate=1e-4, lr_scheduler_type="cosine",
        router_aux_loss_coef=0.0,  # TRL's load-balancing loss does not know PhiMoE
        bf16=on_gpu, use_cpu=not on_gpu, logging_steps=10, save_steps=100, report_to="none",
    ),
    train_dataset=load_documents(args.data, "train").select_columns("messages"),
    processing_class=tokenizer,
    peft_config=lora_config(config, rank=32, router=True),
)  # fmt: skip
trainer.train()
merged = trainer.model.merge_and_unload(safe_merge=True)
merged.config = config  # the trainer's says how to train
save_checkpoint(merged, tokenizer, Path(args.output), "bfloat16")
print(f"whole weights are in {args.output}; load it with AutoModelForCausalLM")
