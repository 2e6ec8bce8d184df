"""Compare ways to make a model smaller, at equal size and equal recovery: `slimmoe compare`.

What all points read is prepared once: texts cut into rows, and the original model's answers to the recovery text. Then
points are done, each in a folder that is named by a hash of everything that decides it (`compare_point`): first the
scores of every seed, then the learning rate's candidates, then methods x seeds. Points that are finished are not done
again, whatever stopped the command, and whatever else the grid asks for now.
"""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from filelock import FileLock, Timeout
from rich import get_console
from rich.console import Group

import slimmoe_hf
from slimmoe_hf.atomic import PARTIAL, write_text
from slimmoe_hf.compare_inputs import SHARED, Checked, check_grid, prepare
from slimmoe_hf.compare_point import SPEC, Point, PointResult, read_result
from slimmoe_hf.compare_pool import do_points
from slimmoe_hf.compare_results import Comparison, Mean, Row, Table, as_markdown
from slimmoe_hf.grid import Grid, Method, load_grid
from slimmoe_hf.grid_sizes import budget_of, left_config
from slimmoe_hf.lineage import public_name
from slimmoe_hf.machines import this_machine
from slimmoe_hf.outlook import EFFICIENCY
from slimmoe_hf.pace import shown_time
from slimmoe_hf.preflight import device
from slimmoe_hf.report import aligned
from slimmoe_hf.rundir import LOCK
from slimmoe_hf.sizing import parameter_counts

GRID, RESULTS, TABLE, PICTURE, POINTS = "grid.yaml", "results.json", "table.md", "comparison.png", "points"
_OURS = {GRID, RESULTS, TABLE, PICTURE, POINTS, SHARED, LOCK}


def compare(file: str | Path, output: str | Path, overwrite: bool = False, dry_run: bool = False) -> Comparison | None:
    """Do what is not done yet of a grid, and write its tables.

    Args:
        file: A grid as YAML.
        output: A folder; one that holds a comparison is continued, be it of another grid.
        overwrite: Forget the points that are done.
        dry_run: Check the grid and show what there is to do; write nothing.

    Returns:
        What was found, as in `results.json`; None after a dry run.

    Raises:
        ValueError: The grid, its model, its text or the folder will not do, or points failed; they are named, and the
            others are kept.
    """
    folder, grid = Path(output).expanduser().resolve(), load_grid(file)
    checked = check_grid(grid, str(file), weights=not dry_run)
    _refuse_foreign(folder)
    if dry_run:
        get_console().print(_outlook(grid, checked))
        return None
    with _alone(folder):
        if overwrite:
            for name in (POINTS, SHARED):
                shutil.rmtree(folder / name, ignore_errors=True)
        write_text(folder / GRID, grid.to_yaml())
        torch.set_num_threads(grid.threads)
        return _Comparison(grid, checked, folder, _command(Path(file))).run()


def _command(file: Path) -> str:
    """What to type for the same: no folder of the user's."""
    return f"slimmoe compare {file.name if file.is_absolute() or '..' in file.parts else file} --output DIR"


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file. Give --output a folder.")
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    foreign = {name for name in names if name not in _OURS and not name.startswith(PARTIAL)}
    if foreign or (names - {LOCK} and GRID not in names):
        raise ValueError(f"{folder}: holds files that are no comparison; they are left alone. Give another --output.")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second process out of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"{folder}: locked: another slimmoe compare is working there. Wait for it, or give another --output."
        ) from None
    try:
        yield
    finally:
        lock.release()


class _Comparison:
    """The points of one grid in one folder."""

    def __init__(self, grid: Grid, checked: Checked, folder: Path, command: str) -> None:
        self.grid, self.checked, self.folder, self.command = grid, checked, folder, command

    def run(self) -> Comparison:
        """Everything that is not done yet, then the tables."""
        grid = self.grid
        self.shared = prepare(grid, self.checked, self.folder)
        methods = [method for _, _, method in grid.rows()]
        first = grid.tables[0].methods[0]
        asked = [self._point(first, grid.seeds[0], rate, "validation") for rate in grid.learning_rates]
        final = [self._point(method, seed, 1.0, "test") for method in methods for seed in grid.seeds]
        scores = {point.scores.key: point.scores for point in (*asked, *final) if _needs_scores(point)}
        self._do([(f"scores, seed {point.seed}", point) for point in scores.values()])
        tried: list[float] = []
        if len(grid.learning_rates) > 1:
            self._do([(f"{first.name}, learning rate {p.recovery['learning_rate']:g}", p) for p in asked])
            tried = [math.inf if (after := self._result(p).after) is None else after for p in asked]
            if min(tried) == math.inf:
                raise ValueError("recovery diverges at every one of learning_rates. Give lower ones.")
        rate = grid.learning_rates[tried.index(min(tried)) if tried else 0]
        self._do([
            (f"{method.name}, seed {seed}", self._point(method, seed, rate, "test"))
            for seed in grid.seeds
            for method in methods
        ])  # fmt: skip
        losses = {f"{r:g}": loss for r, loss in zip(grid.learning_rates, tried, strict=False) if loss < math.inf}
        found = self._found(rate, losses)
        write_text(self.folder / RESULTS, found.model_dump_json(indent=2) + "\n")
        write_text(self.folder / TABLE, as_markdown(found))
        (self.folder / PICTURE).write_bytes(_drawn(found))
        return found

    def _point(self, method: Method, seed: int, rate: float, split: str) -> Point:
        grid = self.grid
        scored = method.needs_scores or method.stages > 1
        versions = {"slimmoe_hf": slimmoe_hf.__version__, "torch": torch.__version__}
        return Point.model_validate({
            "shared": self.shared.folder.name, "method": method.model_copy(update={"name": "-"}), "seed": seed,
            "split": split, "calibration": grid.sweep if scored else None,
            "recovery": {**grid.recovery, "learning_rate": rate}, "max_length": grid.data.max_length,
            "packing": grid.data.packing, "batch_size": grid.batch_size,
            "threads": grid.threads if device().type == "cpu" else 0,
            "versions": {**versions, "transformers": transformers.__version__},
        })  # fmt: skip

    def _place(self, point: Point) -> Path:
        return self.folder / POINTS / point.key

    def _result(self, point: Point) -> PointResult:
        result = read_result(self._place(point), point)
        assert result is not None, point.key
        return result

    def _do(self, points: Sequence[tuple[str, Point]]) -> None:
        """Do the points that are not finished; two names may be one point.

        Raises:
            ValueError: Some failed; the line names them.
        """
        names = {self._place(point): name for name, point in reversed(points)}
        todo = {self._place(p): p for _, p in points if read_result(self._place(p), p) is None}
        console, started, ended = get_console(), time.perf_counter(), 0
        if done := len(names) - len(todo):
            console.log(f"{done} of {len(names)} points are done already ({points[0][0]}, ...)", markup=False)
        for folder, point in todo.items():
            shutil.rmtree(folder, ignore_errors=True)
            write_text(folder / SPEC, point.model_dump_json(indent=2) + "\n")
        failed: list[str] = []

        def told(folder: Path, fault: str | None) -> None:
            nonlocal ended
            ended += 1
            left = shown_time((time.perf_counter() - started) / ended * (len(todo) - ended))
            if fault is not None:
                failed.append(f"{names[folder]}: {fault.rstrip('.')}")
            outcome = "done" if fault is None else f"failed: {fault}"
            console.log(
                f"{names[folder]}: {outcome} ({ended} of {len(todo)}{f', {left} left' if left else ''})", markup=False
            )

        do_points(list(todo), self.shared.folder, self.checked.model, self.grid.processes, self.grid.threads, told)
        if failed:
            raise ValueError(
                f"{len(failed)} of {len(names)} points failed; the others are kept, and the same command tries these again: "
                f"{'; '.join(failed)}. What they said is in {self.shared.folder}."
            )

    def _found(self, rate: float, tried: dict[str, float]) -> Comparison:
        grid, shared, config = self.grid, self.shared, self.checked.config
        whole = parameter_counts(config)
        tables = []
        for number, budget in enumerate(grid.tables):
            rows = [self._row(number, row, method, rate) for row, method in enumerate(budget.methods)]
            wanted = budget_of(config, budget)
            tables.append(Table(equal=budget.equal, expert_share=budget.expert_share, parameters=wanted, rows=rows))
        model, text = public_name(grid.model), public_name(grid.data.source)
        asked = grid.model_copy(update={"model": model, "data": grid.data.model_copy(update={"source": text})})
        return Comparison(
            model=model, data=text, model_sha256=shared.model_sha256,
            test_sha256=shared.test_sha256, total_parameters=whole.total, active_parameters=whole.active,
            loss=shared.loss, test_tokens=shared.test_tokens, calibration_tokens=grid.calibration.tokens,
            recovery_tokens=self.checked.recovery_tokens, learning_rates=tried, learning_rate=rate,
            tuned_on=grid.tables[0].methods[0].name, seeds=grid.seeds, grid=asked.model_dump(mode="json"),
            command=self.command, machine=_machine(grid), version=slimmoe_hf.__version__, tables=tables,
        )  # fmt: skip

    def _row(self, table: int, number: int, method: Method, rate: float) -> Row:
        points = [self._point(method, seed, rate, "test") for seed in self.grid.seeds]
        results = [self._result(point) for point in points]
        return Row(
            method=method.name, settings=method.model_dump(mode="json", exclude={"name"}, exclude_defaults=True),
            shape=self.checked.sizes[table, number].shape, total_parameters=results[0].total_parameters,
            active_parameters=results[0].active_parameters, before=Mean.of([_number(r.before) for r in results]),
            after=Mean.of([_number(r.after) for r in results]),
            seconds=round(sum(r.seconds for r in results) / len(results), 1), points=[p.key for p in points],
        )  # fmt: skip


def _needs_scores(point: Point) -> bool:
    return point.method is not None and point.method.needs_scores


def _number(value: float | None) -> float:
    assert value is not None
    return value


def _counted(number: int, what: str, many: str = "s") -> str:
    return f"{number} {what}{many if number > 1 else ''}"


def _machine(grid: Grid) -> str:
    """Where points ran, in words, without a name of the machine."""
    place = device()
    kind = torch.cuda.get_device_name(place) if place.type == "cuda" else f"{platform.machine()} CPU"
    each = f"{_counted(grid.processes, 'process', 'es')} of {_counted(grid.threads, 'thread')}"
    return f"{kind}, {each}, torch {torch.__version__}"


def _outlook(grid: Grid, checked: Checked) -> Group:
    """All points with their sizes and the time that they may take: arithmetic, as that of `slimmoe_hf.outlook`."""
    before = torch.get_num_threads()
    torch.set_num_threads(grid.threads)
    machine = this_machine()
    torch.set_num_threads(before)
    seconds, tables = {}, []
    for number, budget in enumerate(grid.tables):
        rows: list[tuple[str, ...]] = [("method", "left", "parameters", "active", "time each")]
        for row, method in enumerate(budget.methods):
            size, key = checked.sizes[number, row], method.model_copy(update={"name": "-"}).model_dump_json()
            seconds[key] = _operations(grid, checked, method) / (machine.flops * EFFICIENCY)
            rows.append(
                (method.name, size.shape, f"{size.total:,}", f"{size.active:,}", shown_time(seconds[key]))
            )  # fmt: skip
        tables.append(aligned(rows, f"{budget.title}: {budget_of(checked.config, budget):,}", left=2))
    seeds = _counted(len(grid.seeds), "seed")
    points, total = len(grid.seeds) * len(seconds), len(grid.seeds) * sum(seconds.values())
    if len(grid.learning_rates) > 1:
        seeds = _counted(len(grid.seeds), "seed")
    points, total = (
        points + len(grid.learning_rates),
        total + len(grid.learning_rates) * next(iter(seconds.values())),
    )
    where = f"{grid.processes} of them at once, each on {machine.name}"
    return Group(*tables, f"{points} points ({seeds}), about {shown_time(total / grid.processes)}: {where}")


def _operations(grid: Grid, checked: Checked, method: Method) -> float:
    """Floating-point operations of a point, without those of the scores that all methods share."""
    counts = parameter_counts(left_config(checked.config, method))
    whole = parameter_counts(checked.config).active_without_lookup
    active = counts.active_without_lookup
    measured = 2 * (grid.test_tokens or 0)
    swept = grid.calibration.tokens if method.stages > 1 else 0
    return float(6 * active * checked.recovery_tokens + 2 * active * measured + 6 * whole * swept)


def _drawn(found: Comparison) -> bytes:
    from slimmoe_hf.plots import png  # matplotlib takes long to import
    from slimmoe_hf.plots.comparison import picture_of

    return png(picture_of(found))
