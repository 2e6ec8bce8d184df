"""The tables of `criteria.py`, from its JSON: means and ranges over the seeds, gains seed by seed with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from slimmoe_hf.compare_results import Mean
from slimmoe_hf.report import markdown

PAPER = ("taylor", "kd_topk")
"""The paper's criterion and calibration loss: what plain narrowing goes by."""
TARGET_NATS = 0.4
Plan = tuple[dict[str, Any], tuple[str, str], bool]
"""What is cut to, criterion and loss, and whether it is reconstructed."""


class Found:
    """The points of one teacher, to be asked for.

    Args:
        content: Of the JSON.
        teacher: Its name.
    """

    def __init__(self, content: dict[str, Any], teacher: str) -> None:
        self.teacher = content["teachers"][teacher]
        self.default_text = {"sequences": content["settings"]["calibration_sequences"], "domain": "mixed"}
        self.points = [point for point in content["points"] if point["teacher"] == teacher]
        self.costs = [cost for cost in content["costs"] if cost["teacher"] == teacher]
        self.looks = sorted({point["steps"] for point in self.points})

    def at(self, cut: dict[str, Any], way: tuple[str, str], reconstructed: bool, **others: Any) -> list[dict[str, Any]]:
        """The points of a plan, one a seed."""
        wanted = {
            "experts": cut["experts"], "width": cut["width"], "criterion": way[0], "loss": way[1],
            "reconstructed": reconstructed, "steps": 0, **self.default_text, **others,
        }  # fmt: skip
        found = [point for point in self.points if all(point[name] == value for name, value in wanted.items())]
        return sorted(found, key=lambda point: point["seed"])

    def cell(
        self,
        cut: dict[str, Any],
        way: tuple[str, str],
        reconstructed: bool,
        seeds: Collection[int] | None = None,
        **others: Any,
    ) -> str:
        """Test loss: the mean over the seeds, or some of them, and their range."""
        points = self.at(cut, way, reconstructed, **others)
        found = [point["test_loss"] for point in points if seeds is None or point["seed"] in seeds]
        spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
        return f"{statistics.fmean(found):.3f}{spread}" if found else "-"

    def gain(self, plan: Plan, over: Plan, **others: Any) -> Mean | None:
        """By how much a plan is better than another, seed by seed."""
        ours, theirs = (
            {point["seed"]: point["test_loss"] for point in self.at(*each, **others)} for each in (plan, over)
        )
        found = [theirs[seed] - ours[seed] for seed in sorted(ours.keys() & theirs.keys())]
        return Mean.of(found) if found else None

    def cuts(
        self, size: str, kinds: Sequence[str] = ("width", "drop", "mix"), equal: str = "total"
    ) -> list[dict[str, Any]]:
        """What is cut to at a size."""
        return [cut for cut in self.teacher[f"equal_{equal}"] if cut["size"] == size and cut["kind"] in kinds]

    def ways(self, cuts: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
        """Criteria and losses that some cuts were made by."""
        sizes = {(cut["experts"], cut["width"]) for cut in cuts}
        found = (p for p in self.points if (p["experts"], p["width"]) in sizes and p["steps"] == 0)
        return list(dict.fromkeys((point["criterion"], point["loss"]) for point in found))

    def best(self, size: str = "1/4", kinds: Sequence[str] = ("width", "mix")) -> Plan | None:
        """The plan with the lowest mean validation loss, of criteria that every such cut was made by with all seeds."""
        cuts = self.cuts(size, kinds)
        plans = [(cut, way, again) for way in self.ways(cuts) for cut in cuts for again in (False, True)]
        seeds = max((len(self.at(*plan)) for plan in plans), default=0)
        partly = {way for cut, way, again in plans if not again and len(self.at(cut, way, False)) < seeds}
        whole = [plan for plan in plans if plan[1] not in partly and seeds and len(self.at(*plan)) == seeds]
        return min(whole, key=self._validation, default=None)

    def _validation(self, plan: Plan) -> float:
        return statistics.fmean(point["validation_loss"] for point in self.at(*plan))


def words(way: tuple[str, str]) -> str:
    """`taylor (lm)`."""
    return way[0] if way[1] == "-" else f"{way[0]} ({way[1]})"


def left(cut: dict[str, Any]) -> str:
    """`6x128`."""
    return f"{cut['experts']}x{cut['width']}"


def as_markdown(content: dict[str, Any]) -> str:
    """Everything that there is."""
    settings = content["settings"]
    parts = ["# What a cut loses"]
    for name in content["teachers"]:
        found = Found(content, name)
        parts += [_heading(name, found.teacher), *(part for part in _tables(found) if part)]
    recovery, sequences = settings["recovery"], settings["calibration_sequences"]
    parts.append(
        "Test loss in nats per predicted token, mean and range over the seeds; gains are means of the differences seed by seed, "
        "with 95% confidence intervals (Student's t). `+ R` is with reconstruction. Calibration, where nothing else is said: "
        f"{sequences} sequences of {settings['max_length']} tokens. Chosen on the validation split: what is called chosen, and "
        f"the criterion of dropping. Recovery: {recovery['max_steps']} steps of {recovery['per_device_train_batch_size']} "
        f"sequences, one {recovery['lr_scheduler_type']} schedule from {settings['learning_rate']:g}, looked at on the way."
    )
    parts.append(f"`{content['command']}` on {content['machine']}.")
    return "\n\n".join(parts) + "\n"


def _heading(name: str, teacher: dict[str, Any]) -> str:
    return (
        f"## {name}\n\n{teacher['experts']} experts of width {teacher['width']} in each layer, top-{teacher['top_k']}; "
        f"{teacher['total_parameters']:,} parameters, {teacher['active_parameters']:,} active; test loss "
        f"{teacher['test_loss']:.3f} ({teacher['test_tokens']:,} tokens)"
    )


def _tables(found: Found) -> Iterator[str]:
    yield _criteria(found)
    yield _shapes(found)
    yield _active(found)
    yield _drops(found)
    yield _recovery(found)
    yield _texts(found, "Calibration text from elsewhere", "domain")
    yield _texts(found, "Calibration sequences", "sequences")
    yield _costs(found)
    yield _verdict(found)


def _table(title: str, rows: list[tuple[str, ...]], columns: int = 1) -> str:
    return f"**{title}**\n\n{markdown(rows, left=columns)}" if len(rows) > 1 else ""


def _criteria(found: Found) -> str:
    cuts = found.cuts("1/4", ("width", "mix"))
    headings = [f"{left(cut)}{more}" for cut in cuts for more in ("", " + R")]
    rows = [("criterion", *headings)]
    for way in found.ways(found.cuts("1/4", ("width",))):
        rows.append((words(way), *(found.cell(cut, way, again) for cut in cuts for again in (False, True))))
    return _table("Criteria, a quarter of the experts' parameters left, right after the cut", rows)


def _shapes(found: Found) -> str:
    chosen = found.best()
    if chosen is None:
        return ""
    ways = list(dict.fromkeys([PAPER, chosen[1]]))
    headings = (f"{words(way)}{more}" for way in ways for more in ("", " + R", ", R gains"))
    rows = [("size", "left", "parameters", "active", *headings)]
    for size in ("1/2", "1/4", "1/8"):
        for cut in found.cuts(size, ("width", "mix")):
            cells = []
            for way in ways:
                gain = found.gain((cut, way, True), (cut, way, False))
                cells += [*(found.cell(cut, way, again) for again in (False, True)), str(gain or "-")]
            rows.append((size, left(cut), *_size(found, cut), *cells))
        drop = found.best(size, ("drop",))
        if drop is not None:
            cells = [f"{found.cell(*drop)} by {words(drop[1])}", *["-"] * (3 * len(ways) - 1)]
            rows.append((size, left(drop[0]), *_size(found, drop[0]), *cells))
    return _table("Equal total parameters, right after the cut", rows, 2)


def _size(found: Found, cut: dict[str, Any]) -> tuple[str, str]:
    sizes = (p for p in found.points if (p["experts"], p["width"]) == (cut["experts"], cut["width"]))
    point = next(sizes, None)
    return (f"{point['total_parameters']:,}", f"{point['active_parameters']:,}") if point is not None else ("-", "-")


def _active(found: Found) -> str:
    chosen = found.best()
    if chosen is None:
        return ""
    rows = [("size", "left", "parameters", "active", words(chosen[1]), f"{words(chosen[1])} + R")]
    for size in ("1/2", "1/4", "1/8"):
        for cut in found.cuts(size, equal="active"):
            cells = (found.cell(cut, chosen[1], again) for again in (False, True))
            rows.append((size, left(cut), *_size(found, cut), *cells))
    return _table("Equal active parameters, right after the cut", rows, 2)


def _drops(found: Found) -> str:
    cuts = [cut for size in ("1/2", "1/4", "1/8") for cut in found.cuts(size, ("drop",))]
    rows = [("experts by", *(f"{cut['size']}: {left(cut)}" for cut in cuts))]
    rows += [(words(way), *(found.cell(cut, way, False) for cut in cuts)) for way in found.ways(cuts[:1])]
    return _table("Whole experts dropped, right after the cut", rows)


def recovered(found: Found) -> list[Plan]:
    """The plans that were recovered."""
    last = [point for point in found.points if point["steps"]]
    keys = dict.fromkeys(
        (p["experts"], p["width"], p["criterion"], p["loss"], p["reconstructed"], p["total_parameters"]) for p in last
    )
    return [({"experts": e, "width": f}, (criterion, loss), again) for e, f, criterion, loss, again, _ in keys]


def _recovery(found: Found) -> str:
    rows = [("plan", "parameters", "active", "seeds", *(f"{steps} steps" for steps in found.looks))]
    for cut, way, again in recovered(found):
        seeds = [point["seed"] for point in found.at(cut, way, again, steps=found.looks[-1])]
        cells = (found.cell(cut, way, again, seeds, steps=steps) for steps in found.looks)
        plan = f"{left(cut)}, {words(way)}{' + R' if again else ''}"
        rows.append((plan, *_size(found, cut), str(len(seeds)), *cells))
    return _table("Recovery at a quarter", rows)


def _texts(found: Found, title: str, axis: str) -> str:
    others = [point for point in found.points if not point["steps"] and point[axis] != found.default_text[axis]]
    plans = list(dict.fromkeys((p["experts"], p["width"], p["criterion"], p["loss"]) for p in others))
    values = [found.default_text[axis], *dict.fromkeys(point[axis] for point in others)]
    headings = (f"{e}x{f}, {words((c, loss))}{more}" for e, f, c, loss in plans for more in ("", " + R"))
    rows = [(axis, *headings)]
    for value in sorted(values) if axis == "sequences" else values:
        cells = (
            found.cell({"experts": e, "width": f}, (c, loss), again, **{axis: value})
            for e, f, c, loss in plans
            for again in (False, True)
        )
        rows.append((str(value), *cells))
    return _table(title, rows) if others else ""


def _costs(found: Found) -> str:
    parts = []
    for cost in found.costs:
        rows = [("", "processor seconds", "of a forward pass", "peak memory above the weights", "of a forward pass")]
        seconds, peaks = cost["seconds"], cost["peak_bytes"]
        first = next(iter(seconds))
        for name in seconds:
            time, memory = f"{seconds[name]:.1f}", f"{peaks[name] / 1e6:.0f} MB"
            rows.append(
                (name, time, f"{seconds[name] / seconds[first]:.1f}", memory, f"{peaks[name] / peaks[first]:.2f}")
            )
        parts.append(
            _table(f"Cost: {cost['tokens']:,} tokens, {cost['batch']} rows at a time, width {cost['width']}", rows)
        )
    return "\n\n".join(parts)


def _verdict(found: Found) -> str:
    """The chosen plan beside plain narrowing by the paper's criterion: the target is said before, not after."""
    chosen, width = found.best(), found.cuts("1/4", ("width",))
    if chosen is None or not width:
        return ""
    lines = [f"Chosen at a quarter: {left(chosen[0])}, {words(chosen[1])}{', reconstructed' if chosen[2] else ''}."]
    last = found.looks[-1]
    for steps in found.looks:
        mean = found.gain(chosen, (width[0], PAPER, False), steps=steps)
        if mean is not None:
            wanted = TARGET_NATS if steps == 0 else 0.0
            verdict = (
                f" (target {wanted:g}: {'met' if mean.mean >= wanted else 'failed'})" if steps in (0, last) else ""
            )
            lines.append(
                f"Better than the paper's plain narrowing after {steps} steps: {mean} nats, {len(mean.values)} seed(s){verdict}."
            )
    return "\n".join(lines)
