"""After the same recovery, how do scored neurons compare with random ones? The quickstart's recipe, criterion by criterion.

    python examples/benchmarks/recovery.py --json examples/benchmarks/results/recovery.json

Every run is an ordinary `slimmoe run` in a folder of its own under --work: interrupted, the same command goes on; two
commands with different --seeds may run beside each other, and a last one with all seeds collects what is finished.
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from slimmoe_hf import run_recipe
from slimmoe_hf.recipe import load_recipe, reconstructing


def measure(args: argparse.Namespace) -> dict:
    recipe = reconstructing(load_recipe(args.recipe), False)  # which neurons are kept is the question, nothing else
    rows = []
    for seed in args.seeds:
        for criterion in args.criteria:
            stages = [stage.model_copy(update={"criterion": criterion}) for stage in recipe.stages]
            changed = recipe.model_copy(update={"stages": stages, "seed": seed, "threads": args.threads})
            report = run_recipe(changed, args.work / f"{criterion}-{seed}")
            rows += [
                {"criterion": criterion, "seed": seed, "model": model.name, "test_loss": model.loss}
                for model in report.models
            ]
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {args.threads} thread(s) a run, torch {torch.__version__}",
        "recipe": recipe.model_dump(mode="json", include={"stages", "data", "evaluation"}),
        "rows": rows,
    }


def show(result: dict) -> None:
    names = list(dict.fromkeys(row["model"] for row in result["rows"]))
    table = Table("criterion", *names, title="test nats/token, mean (range) over seeds")
    for criterion in dict.fromkeys(row["criterion"] for row in result["rows"]):
        cells = []
        for name in names:
            found = [r["test_loss"] for r in result["rows"] if (r["criterion"], r["model"]) == (criterion, name)]
            cells.append(f"{statistics.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})")
        table.add_row(criterion, *cells)
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("examples/quickstart.yaml"))
    parser.add_argument("--criteria", nargs="+", default=["taylor", "random"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = measure(args)
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
