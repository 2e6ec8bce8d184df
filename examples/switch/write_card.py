"""Measure the Switch teacher as it lies on disk and write its card.

python examples/switch/write_card.py --data switch-task --model examples/switch/teacher --work teacher-run
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from make_task import baselines
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

from slimmoe_hf.data import load_documents
from slimmoe_hf.factored_size import count_factored
from slimmoe_hf.generation_evaluation import GenerationScores, evaluate_generation, generate_answers
from slimmoe_hf.loading import weight_bytes
from slimmoe_hf.losses import IGNORED
from slimmoe_hf.routing import load_shares

RANK = 8
"""Of the factored experts, for the count: the paper's 32 of 768 would be 4 of 96."""

TEXT = """
# A small Switch Transformer to compress

An encoder-decoder of {total:,} parameters, {expert_share:.0%} of them experts: {experts} of width {width} in each of the
{layers} layers, one of them per token. It says which word an abbreviation stands for, knows nothing but US presidential
messages, and is not for use: it is small enough to be merged, factored and distilled in minutes on a laptop.

## How it was made

```bash
python examples/switch/make_task.py --output switch-task
python examples/switch/train_teacher.py --data switch-task --output examples/switch/teacher
```

{steps:,} steps of {batch} rows ({epochs:.2f} passes over {rows:,} rows) in {minutes:.0f} minutes on {threads} thread of
{machine}. Trained in float32, saved in bfloat16: {megabytes:.1f} MB of weights.

## Measured

What it generates, token by token, the likeliest first, on the bfloat16 checkpoint as reloaded, in float32:

| split | | rows | exact match | token F1 | accuracy |
|---|---|---|---|---|---|
{scores}

`copy` answers with the abbreviation, `majority` with the commonest answer of the training rows, `dictionary` with the word that
the abbreviation stood for most often in all of them, whatever is beside it. The answers are single words: exact match and
accuracy are the same, and F1 differs where an article was asked for or given, which SQuAD's does not count.

Some of the test rows:

| prompt | answer | right |
|---|---|---|
{examples}

Share of the test tokens (the decoder's given the right answers, padding left out) that each expert gets; even would be
{even:.1%}:

| layer | least used | most used | experts with under a tenth of an even share |
|---|---|---|---|
{loads}

With a quarter of the experts left on average in every sparse layer but the encoder's first, and those factored at rank {rank}
with a tenth of S: {factored:,} parameters, {left:.1%} of them.
"""


@torch.inference_mode()
def expert_shares(model: Any, tokenizer: Any, rows: Dataset) -> Tensor:
    """Share of the tokens that each expert of each sparse layer gets, encoder first. Returns `[L, E]`."""
    features = [
        {"input_ids": tokenizer(row["prompt"])["input_ids"], "labels": tokenizer(row["completion"])["input_ids"]}
        for row in rows
    ]
    collate, counts_LE = DataCollatorForSeq2Seq(tokenizer), torch.zeros(())
    for begin in range(0, len(features), 200):
        batch = collate(features[begin : begin + 200])
        outputs = model(**batch, output_router_logits=True)
        found = [
            torch.bincount(logits.argmax(-1)[mask], minlength=logits.shape[-1])
            for layers, mask in (
                (outputs.encoder_router_logits, batch["attention_mask"] == 1),
                (outputs.decoder_router_logits, batch["labels"] != IGNORED),
            )
            for logits in layers
        ]
        counts_LE = counts_LE + torch.stack(found)
    return load_shares(counts_LE) / counts_LE.shape[1]


def score_line(split: str, name: str, scores: GenerationScores) -> str:
    return f"| {split} | {name} | {scores.rows:,} | {scores.exact_match:.1%} | {scores.token_f1:.1%} | {scores.accuracy:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="switch-task", help="where make_task.py left the rows")
    parser.add_argument("--model", type=Path, default=Path("examples/switch/teacher"))
    parser.add_argument(
        "--work", type=Path, default=Path("teacher-run"), help="where train_teacher.py left training.json"
    )
    parser.add_argument("--machine", default="an unnamed machine", help="in words, for the card")
    args = parser.parse_args()

    training = json.loads((args.work / "training.json").read_text())
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    splits = {split: load_documents(args.data, split) for split in ("train", "validation", "test")}
    lines, measured = [], {}
    for split in ("validation", "test"):
        rows = splits[split].to_list()
        measured[split] = {
            "teacher": evaluate_generation(model, tokenizer, rows),
            **baselines(splits["train"].to_list(), rows),
        }
        lines += [score_line(split, name, scores) for name, scores in measured[split].items()]
    shown = splits["test"].select(range(8))
    answers = generate_answers(model, tokenizer, shown["prompt"][:])
    share_LE, config = expert_shares(model, tokenizer, splits["test"]), model.config
    counted = count_factored(config, config.num_experts / 4, rank=RANK)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    even, size = 1 / config.num_experts, weight_bytes(args.model)
    text = TEXT.format(
        total=counted.original, expert_share=experts / counted.original, experts=config.num_experts, width=config.d_ff,
        layers=config.num_layers + config.num_decoder_layers, steps=training["history"][-1]["step"],
        batch=training["batch"], epochs=training["history"][-1]["epoch"], rows=training["rows"],
        minutes=training["seconds"] / 60, threads=training["threads"], machine=args.machine, megabytes=size / 1e6,
        scores="\n".join(lines),
        examples="\n".join(
            f"| {row['prompt']} | {answer} | {row['completion']} |" for row, answer in zip(shown, answers, strict=True)
        ),
        even=even, rank=RANK, factored=counted.factored, left=counted.factored / counted.original,
        loads="\n".join(
            f"| {'encoder' if at < config.num_layers else 'decoder'} {at % config.num_layers} | {row.min():.1%} | "
            f"{row.max():.1%} | {int((row < even / 10).sum())} |" for at, row in enumerate(share_LE)
        ),
    )  # fmt: skip
    data_card = ModelCardData(
        language="en", license="apache-2.0", library_name="transformers", pipeline_tag="text-generation",
        tags=["moe", "switch_transformers", "slimmoe"], model_name=f"switch-sotu-{counted.original / 1e6:.0f}m",
    )  # fmt: skip
    ModelCard(f"---\n{data_card.to_yaml()}\n---\n{text}").save(args.model / "README.md")
    scores = {split: {name: found.model_dump() for name, found in of.items()} for split, of in measured.items()}
    stored = {"scores": scores, "expert_share": share_LE.tolist(), "bytes": size, **training}
    (args.model / "training.json").write_text(json.dumps(stored, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
