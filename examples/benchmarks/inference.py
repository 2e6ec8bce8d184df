"""What does a narrower expert buy at inference, beside dropping experts, and beside a dense model?

    python examples/benchmarks/inference.py --json examples/benchmarks/results/inference.json
    python examples/benchmarks/inference.py --model-config microsoft/Phi-3.5-MoE-instruct --device cuda

Four models: `full`; `slimmed`, every expert narrowed to --keep of its neurons; `expert-dropped`, as many experts left
out as gives the same TOTAL parameters; and `dense`, one feed-forward network in place of router and experts, as wide as
gives the slimmed model's ACTIVE parameters (a Llama). Speeds are those of `slimmoe_hf.throughput`: tokens per second of
all rows together, in the experts implementation that transformers chooses by itself, which no serving engine uses.

The weights are random. The time of a matrix product does not depend on them, but the routing does: a random router
spreads tokens about evenly, a trained one less so, and a batch that meets fewer experts reads fewer weights.

Without --model-config the layers have Phi-3.5-MoE's widths (4096, 16 experts of 6400, two a token), but there are few
of them, and few words. Every model is built and timed in a process of its own; all four take turns, --rounds times, so
that a machine that drifts drifts for all, and the numbers are medians over the rounds.

Published: 1.47x (narrowed) against 1.41x (dropped) the full model's speed at 50% of Qwen1.5-MoE's expert parameters.
That is theirs, on a GPU and another model: compare the order, not the size.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from slimmoe_hf import Target
from slimmoe_hf.disk import meta_model
from slimmoe_hf.evaluation import count_parameters
from slimmoe_hf.families import shape_of
from slimmoe_hf.sizing import slimmed_config
from slimmoe_hf.throughput import measure_speed

MODELS = ("full", "slimmed", "expert-dropped", "dense")
ANCHOR = {"model": "Qwen1.5-MoE", "kept": 0.5, "narrowed": 1.47, "expert-dropped": 1.41, "measured": "elsewhere"}


def full_config(args: argparse.Namespace) -> PreTrainedConfig:
    """The full model's config; its dtype is the one to compute in."""
    if args.model_config is not None:
        config = AutoConfig.from_pretrained(args.model_config)
        config.num_hidden_layers = args.layers or config.num_hidden_layers
    else:
        config = AutoConfig.for_model(
            "phimoe", hidden_size=args.hidden_size, num_attention_heads=args.hidden_size // args.head_width,
            num_key_value_heads=max(args.hidden_size // args.head_width // 4, 1), intermediate_size=args.expert_width,
            num_local_experts=args.experts, num_hidden_layers=args.layers or 1, vocab_size=args.vocab,
            attention_bias=True, lm_head_bias=True, max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
    config.dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    return config


def configs(args: argparse.Namespace) -> dict[str, PreTrainedConfig]:
    """The four models by name."""
    full = full_config(args)
    shape = shape_of(full)
    slimmed = slimmed_config(full, Target(expert_width=round(shape.expert_width * args.keep / 8) * 8))
    dropped = slimmed_config(full, Target(num_experts=round(shape.num_experts * args.keep)))
    return dict(zip(MODELS, (full, slimmed, dropped, dense_config(slimmed)), strict=True))


def dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A Llama of the same attention, embeddings and depth, with as many parameters as a token meets in `config`."""
    shape = shape_of(config)
    dense = LlamaConfig(
        hidden_size=shape.hidden_size, num_hidden_layers=shape.layers, num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_groups, head_dim=shape.head_width, vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=config.tie_word_embeddings,
        attention_bias="attention_bias" in config.to_dict() and config.attention_bias, intermediate_size=8,
    )  # fmt: skip
    dense.dtype = config.dtype
    active, least = count_parameters(meta_model(config))[1], total_parameters(dense)
    dense.intermediate_size = 8 + round((active - least) / (3 * shape.hidden_size * shape.layers) / 8) * 8
    return dense


def total_parameters(config: PreTrainedConfig) -> int:
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def describe(config: PreTrainedConfig) -> dict:
    """Counts and widths of a model, for the record."""
    if config.model_type == "llama":
        total = total_parameters(config)
        return {"total_parameters": total, "active_parameters": total, "width": config.intermediate_size}
    total, active = count_parameters(meta_model(config))
    shape = shape_of(config)
    sizes = {"experts": shape.num_experts, "expert_width": shape.expert_width, "top_k": shape.top_k}
    return {"total_parameters": total, "active_parameters": active, **sizes}


def run(name: str, args: argparse.Namespace) -> list[dict]:
    """Build one model and time it at every batch size, in this process."""
    config = configs(args)[name]
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
    rows = []
    for batch in args.batches:
        prompt = torch.randint(0, config.vocab_size, (batch, args.prompt))
        speed = measure_speed(model, prompt, args.new_tokens, args.repeats)
        rows.append({
            "model": name, "batch": batch, "prefill": speed.prefill_tokens_per_second,
            "decode": speed.decode_tokens_per_second, "peak_memory": speed.peak_memory,
        })  # fmt: skip
    return rows


def measure(args: argparse.Namespace) -> dict:
    found: list[dict] = []
    started = time.perf_counter()
    for number in range(args.rounds):
        for name in MODELS:
            child = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--row", name], capture_output=True, text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(args.threads), "MALLOC_MMAP_THRESHOLD_": "65536"},
            )  # fmt: skip
            if child.returncode:
                raise RuntimeError(f"{name}:\n{child.stderr[-3000:]}")
            found += json.loads(child.stdout.splitlines()[-1])
            sys.stderr.write(f"round {number + 1}, {name}: {time.perf_counter() - started:.0f} s\n")
    rows = []
    for name in MODELS:
        for batch in args.batches:
            mine = [row for row in found if (row["model"], row["batch"]) == (name, batch)]
            row = {key: statistics.median(r[key] for r in mine) for key in ("prefill", "decode", "peak_memory")}
            each = {f"{key}_of_rounds": [round(r[key], 2) for r in mine] for key in ("prefill", "decode")}
            rows.append({"model": name, "batch": batch, **row, **each})
    for row in rows:
        full = next(other for other in rows if other["model"] == "full" and other["batch"] == row["batch"])
        row |= {f"{key}_ratio": row[key] / full[key] for key in ("prefill", "decode", "peak_memory")}
    machine = (
        torch.cuda.get_device_name(0) if args.device == "cuda" else f"{platform.machine()}, {args.threads} thread(s)"
    )
    all_configs = configs(args)
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{machine}, torch {torch.__version__}", "dtype": str(all_configs["full"].dtype).removeprefix("torch."),
        "prompt": args.prompt, "new_tokens": args.new_tokens, "kept": args.keep, "layers": shape_of(all_configs["full"]).layers,
        "hidden_size": all_configs["full"].hidden_size, "published": ANCHOR, "seconds": round(time.perf_counter() - started),
        "models": {name: describe(config) for name, config in all_configs.items()}, "rows": rows,
    }  # fmt: skip


def show(result: dict) -> None:
    console = Console(width=130)
    table = Table("model", "parameters", "active", "batch", "prefill tok/s", "decode tok/s", "memory GB")
    for row in result["rows"]:
        counts = result["models"][row["model"]]
        memory = f"{row['peak_memory'] / 1e9:.2f} ({row['peak_memory_ratio']:.2f}x)"
        table.add_row(
            row["model"], f"{counts['total_parameters'] / 1e6:,.0f}M", f"{counts['active_parameters'] / 1e6:,.0f}M",
            str(row["batch"]), f"{row['prefill']:,.1f} ({row['prefill_ratio']:.2f}x)",
            f"{row['decode']:,.2f} ({row['decode_ratio']:.2f}x)", memory,
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{result['layers']} layer(s) of width {result['hidden_size']}, {result['dtype']}, on {result['machine']}; "
        f"prompts of {result['prompt']} tokens, {result['new_tokens']} after them; ratios to the full model. "
        "Random weights, so routing is about even."
    )
    console.print(
        f"Published by others: {ANCHOR['narrowed']}x narrowed, {ANCHOR['expert-dropped']}x dropped, at "
        f"{ANCHOR['kept']:.0%} of {ANCHOR['model']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-config", help="a folder, a config.json or a Hub id: its exact shape")
    parser.add_argument("--layers", type=int, help="default: all of --model-config, else 1")
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--head-width", type=int, default=None, help="default: 128, or what makes four heads")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--expert-width", type=int, default=6400)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the experts' parameters (default: 0.5)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64, help="tokens per row (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=8, help="decoded after it (default: 8)")
    parser.add_argument("--repeats", type=int, default=1, help="in every process")
    parser.add_argument("--rounds", type=int, default=3, help="processes per model")
    parser.add_argument("--dtype", help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--row", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.head_width = args.head_width or min(128, args.hidden_size // 4)
    if args.row:
        sys.stdout.write(json.dumps(run(args.row, args)) + "\n")
        return
    result = measure(args)
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
