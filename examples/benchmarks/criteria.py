"""How much does each criterion lose right after the cut? One sweep per seed scores for all of them.

    python examples/benchmarks/criteria.py --json examples/benchmarks/results/criteria.json

A seed chooses the calibration documents (and the neurons of `random`). Losses are mean nats per predicted token of the
test split, cut only, no training.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from slimmoe_hf import CRITERIA, Target, apply_plan, collect_stats, make_plan
from slimmoe_hf.data import batches, load_documents, take_apart, tokenize
from slimmoe_hf.evaluation import held_out, measure_loss
from slimmoe_hf.families import shape_of
from slimmoe_hf.loading import load_model, load_tokenizer


def measure(args: argparse.Namespace) -> dict:
    tokenizer, teacher = load_tokenizer(args.model), load_model(args.model)
    test = held_out(load_documents("sotu", "test"), tokenizer, args.max_length, args.test_tokens)
    width = shape_of(teacher.config).expert_width
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "teacher_loss": measure_loss(teacher, test.rows_NT).loss,
        "test_tokens": test.tokens,
        "calibration_tokens": args.tokens,
        "expert_width": width,
        "rows": [],
    }
    for seed in args.seeds:
        documents, _ = take_apart(load_documents("sotu", "train"), args.tokens, tokenizer, seed)
        rows = tokenize(documents, tokenizer, args.max_length).select(range(args.tokens // args.max_length))
        for loss in args.losses:
            started = time.perf_counter()
            stats = collect_stats(teacher, batches(rows, 16), loss)
            seconds = time.perf_counter() - started
            for criterion in args.criteria:
                if criterion in ("magnitude", "random", "activation", "energy") and loss != args.losses[0]:
                    continue  # they do not use the gradient
                for kept in args.widths:
                    plan = make_plan(stats, Target(expert_width=kept), criterion, seed)
                    slimmed = apply_plan(copy.deepcopy(teacher), plan)
                    nats = measure_loss(slimmed, test.rows_NT).loss
                    row = {"criterion": criterion, "loss": loss, "width": kept, "seed": seed, "test_loss": nats}
                    result["rows"].append({**row, "scoring_seconds": round(seconds, 1)})
    return result


def show(result: dict) -> None:
    widths = sorted({row["width"] for row in result["rows"]}, reverse=True)
    title = f"test nats/token right after the cut; teacher {result['teacher_loss']:.3f} (mean and range over seeds)"
    table = Table("criterion", "calibration loss", *(f"{result['expert_width']} -> {w}" for w in widths), title=title)
    for criterion, loss in dict.fromkeys((row["criterion"], row["loss"]) for row in result["rows"]):
        cells = []
        for width in widths:
            found = [
                r["test_loss"]
                for r in result["rows"]
                if (r["criterion"], r["loss"], r["width"]) == (criterion, loss, width)
            ]
            cells.append(f"{statistics.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})")
        table.add_row(criterion, loss, *cells)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/teacher/model"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 96, 48])
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--losses", nargs="+", default=["kd_topk", "lm"], choices=["kd_topk", "lm"])
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    parser.add_argument("--test-tokens", type=int, default=None, help="default: the whole test split")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = measure(args)
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
