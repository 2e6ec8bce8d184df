"""Slim an MoE model inside a plain Trainer: one callback, and training goes on with the smaller model.

python examples/slim_with_trainer.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from slimmoe_hf import SlimmingCallback, Target
from slimmoe_hf.data import load_documents, take_apart, tokenize

MODEL = "examples/teacher/model"

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
calibration, documents = take_apart(load_documents("sotu", "train"), tokens=65_536, tokenizer=tokenizer, seed=0)
held_out = load_documents("sotu", "validation").select(range(4))

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="runs/slim-with-trainer", max_steps=60, per_device_train_batch_size=16, learning_rate=1e-3,
        lr_scheduler_type="cosine", logging_steps=20, eval_strategy="steps", eval_steps=30, eval_on_start=True,
        save_steps=30, report_to="none",
    ),
    train_dataset=tokenize(documents, tokenizer, max_length=256),
    eval_dataset=tokenize(held_out, tokenizer, max_length=256),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    callbacks=[SlimmingCallback(Target(expert_width=128), calibration_dataset=calibration, max_length=256)],
)  # fmt: skip
trainer.train()
trainer.save_model("runs/slim-with-trainer/model")
print(
    f"{trainer.model.num_parameters():,} parameters in runs/slim-with-trainer/model; load it with AutoModelForCausalLM"
)
