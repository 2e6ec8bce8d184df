"""Slim an MoE model, distil it from the original, and publish the result with its card and plan.

python examples/push_to_hub.py me/my-slim-model

Log in first (`hf auth login`, or HF_TOKEN). The same command continues a run that was stopped, and pushes what is new.
"""

import sys

from transformers import AutoTokenizer

from slimmoe_hf import DistillationConfig, DistillationTrainer, SlimmingCallback, Target
from slimmoe_hf.data import load_documents, take_apart
from slimmoe_hf.resumption import last_complete_checkpoint

MODEL = "examples/teacher/model"  # a Hub id will do as well
OUTPUT = "runs/push-to-hub"

if len(sys.argv) != 2 or sys.argv[1].count("/") != 1:
    sys.exit("usage: python examples/push_to_hub.py OWNER/NAME")

tokenizer = AutoTokenizer.from_pretrained(MODEL)
calibration, documents = take_apart(load_documents("sotu", "train"), tokens=32_768, tokenizer=tokenizer, seed=0)
held_out = load_documents("sotu", "validation").select(range(4))

trainer = DistillationTrainer(
    model=MODEL,
    teacher_model=MODEL,
    args=DistillationConfig(
        output_dir=OUTPUT, hub_model_id=sys.argv[1], hub_private_repo=True, max_length=256, packing=True,
        packing_strategy="wrapped", max_steps=40, per_device_train_batch_size=8, learning_rate=2e-3,
        lr_scheduler_type="cosine", gradient_checkpointing=False, logging_steps=10, eval_strategy="steps", eval_steps=20,
        save_steps=20, report_to="none",
    ),
    train_dataset=documents.select_columns(["text"]),
    eval_dataset=held_out.select_columns(["text"]),
    callbacks=[SlimmingCallback(Target(expert_width=128), calibration_dataset=calibration.select_columns(["text"]))],
)  # fmt: skip
trainer.train(resume_from_checkpoint=last_complete_checkpoint(OUTPUT))

# Weights in the form that others load and serve, tokenizer, card and plan: one commit, no pickles, no checkpoints.
commit = trainer.push_to_hub(license="apache-2.0")
print(commit.commit_url)
