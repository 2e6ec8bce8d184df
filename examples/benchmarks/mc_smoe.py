"""How much of what merging and factoring lose does recovery bring back, and are groups by routing better than random ones?

    python examples/switch/make_task.py --output switch-task
    python examples/benchmarks/mc_smoe.py --json examples/switch/results/mc_smoe.json

Every run is an ordinary `slimmoe run` in a folder of its own under --work: interrupted, the same command goes on; two
commands with different --seeds may run beside each other, and a last one with all seeds collects what is finished.
What is "unrecovered" is the same run with a learning rate of 0: as small a file, and nothing was trained.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from slimmoe_hf import run_recipe
from slimmoe_hf.recipe import load_any_recipe
from slimmoe_hf.report import ModelReport
from slimmoe_hf.seq2seq_recipe import Seq2SeqRecipe

UNRECOVERED = {"learning_rate": 0.0, "max_steps": 20, "save_strategy": "no"}
SCORES = ("loss", "exact_match", "token_f1", "accuracy")


def changed(recipe: Seq2SeqRecipe, seed: int, groups: str, recovered: bool, threads: int) -> Seq2SeqRecipe:
    """The recipe with another seed, other groups, and perhaps nothing that trains."""
    stages = []
    for stage in recipe.stages:
        merge = stage.merge.model_copy(update={"similarity": groups}) if stage.merge is not None else None
        settings = stage.distillation if recovered else {**stage.distillation, **UNRECOVERED, "warmup_steps": 0}
        stages.append(stage.model_copy(update={"merge": merge, "distillation": settings}))
    return recipe.model_copy(update={"stages": stages, "seed": seed, "threads": threads})


def scores(model: ModelReport) -> dict[str, float]:
    """What a model is compared by."""
    assert model.generation is not None
    return {"loss": model.loss, **model.generation.model_dump(include=set(SCORES))}


def closed(full: dict[str, float], before: dict[str, float], after: dict[str, float]) -> dict[str, float | None]:
    """The share of the gap between unrecovered and full that recovery closes, of every score; None where there is no gap."""
    gaps = {name: full[name] - before[name] for name in SCORES}
    return {name: (after[name] - before[name]) / gap if gap else None for name, gap in gaps.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything that is not finished yet."""
    recipe = load_any_recipe(args.recipe)
    assert isinstance(recipe, Seq2SeqRecipe)
    rows, ranks = [], {}
    for seed in args.seeds:
        for groups in args.groups:
            found = {}
            for recovered in (False, True):
                folder = args.work / f"{groups}-{seed}{'' if recovered else '-unrecovered'}"
                report = run_recipe(changed(recipe, seed, groups, recovered, args.threads), folder)
                assert report is not None
                found[recovered] = report
            teacher, before, after = found[True].models[0], found[False].models[-1], found[True].models[-1]
            rows.append({
                "groups": groups, "seed": seed, "closed": closed(scores(teacher), scores(before), scores(after)),
                "bytes": after.bytes / teacher.bytes, "parameters": after.total_parameters / teacher.total_parameters,
                "seconds": round(found[True].seconds),
                "models": {
                    **{model.name: {"bytes": model.bytes, "parameters": model.total_parameters, **scores(model)}
                       for model in found[True].models},
                    "unrecovered": {"bytes": before.bytes, "parameters": before.total_parameters, **scores(before)},
                },
            })  # fmt: skip
            ranks[f"{groups}-{seed}"] = [change.model_dump() for change in found[True].stable_ranks]
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{os.cpu_count()}-core {platform.machine()}, CPU, {args.threads} thread(s) a run, torch {torch.__version__}",
        "recipe": recipe.model_dump(mode="json", include={"stages", "evaluation"}),
        "rows": rows,
        "stable_ranks": ranks,
    }


def show(result: dict[str, Any]) -> None:
    """Every model of the line and what was closed, mean and range over the seeds."""
    for groups in dict.fromkeys(row["groups"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["groups"] == groups]
        table = Table("model", "bytes", *SCORES, title=f"{groups}: {len(mine)} seeds, mean (range)")
        for name in mine[0]["models"]:
            found = [row["models"][name] for row in mine]
            table.add_row(
                name, f"{statistics.mean(each['bytes'] for each in found):,.0f}", *(spread(found, s) for s in SCORES)
            )
        table.add_row("gap closed", "", *(spread([row["closed"] for row in mine], score) for score in SCORES))
        Console(width=150).print(table)


def spread(found: list[dict[str, Any]], score: str) -> str:
    values = [each[score] for each in found if each[score] is not None]
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("examples/mc-smoe-switch.yaml"))
    parser.add_argument("--groups", nargs="+", default=["router_logits", "random"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("mc-smoe-measured"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = measure(args)
    show(result)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
