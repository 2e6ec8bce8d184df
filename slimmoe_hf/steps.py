"""The steps of a run, what each takes, and whether a machine has room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from slimmoe_hf.machines import Machine
from slimmoe_hf.pace import shown_time
from slimmoe_hf.rundir import CACHE

TEACHER = "teacher/evaluate"
_CALIBRATED = ("/score", "/plan")  # steps that a recipe's `calibration` decides the size of
_LESS_PASSING = {CACHE: "teacher_cache.stream_memory", TEACHER: "evaluation.tokens"}
_GENEROUS = 0.85  # a run is refused only when this share of the estimate does not fit


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        name: Which. what: It does.
        memory: Bytes on the device. host: Bytes of the computer's memory (on a CPU, `memory` is that).
        disk: Bytes that it leaves. seconds: How long it may take.
        key: The setting of the recipe that its memory hangs on.
        passing: Bytes of the disk that it takes and gives back.
    """

    name: str
    what: str
    memory: int
    host: int
    disk: int
    seconds: float
    key: str = ""
    passing: int = 0


@dataclass(frozen=True)
class Shortage:
    """A step that will not fit.

    Attributes:
        step: Which. what: Is short. needed, free: Bytes.
    """

    step: Step
    what: str
    needed: int
    free: int


def shortages(steps: Sequence[Step], machine: Machine) -> list[Shortage]:
    """The steps whose memory a machine has not; an estimate that is a little over is given the benefit of the doubt."""
    return [
        Shortage(step, what, needed, free)
        for step in steps
        for what, needed, free in (("memory", step.memory, machine.memory), ("host memory", step.host, machine.host))
        if free is not None and needed * _GENEROUS > free
    ]


def check_room(steps: Sequence[Step], machine: Machine, disk_free: int | None) -> None:
    """Refuse a run that will not fit.

    Raises:
        ValueError: What is short, by how much, in which step, and which setting to lower.
    """
    for short in shortages(steps, machine):
        step = short.step
        remedy = f"Lower {step.key}." if step.key else "Use a larger machine."
        if step.name.endswith(_CALIBRATED) and step.passing:
            remedy = f"Lower {step.key}.batch_size."
        elif step.name.endswith(_CALIBRATED) and short.what == "memory" and machine.host is not None:
            remedy = f"Set {step.key}.device to cpu, or its dtype to bfloat16; or its stream to true."
        raise ValueError(
            f"{step.name} needs about {short.needed / 1e9:.1f} GB of {short.what}, {short.free / 1e9:.1f} GB are free on "
            f"{machine.name}. {remedy}"
        )
    written = needed = 0
    lower = "save_total_limit"
    for step in steps:
        if written + step.disk + step.passing > needed:
            needed = written + step.disk + step.passing
            lower = _LESS_PASSING.get(step.name, "calibration.tokens") if step.passing else "save_total_limit"
        written += step.disk
    if disk_free is not None and needed * _GENEROUS > disk_free:
        raise ValueError(
            f"the run writes about {needed / 1e9:.1f} GB, {disk_free / 1e9:.1f} GB are free on the disk. Free some, or lower "
            f"{lower}."
        )


def shown_steps(steps: Sequence[Step], machine: Machine) -> Table:
    """The steps as a table."""
    table = Table(
        "step", "what", "memory", "on disk", "time", title=f"Plan of work, on {machine.name}", title_justify="left"
    )
    for column in (2, 3, 4):
        table.columns[column].justify = "right"
    for step in steps:
        memory = _size(step.memory) + (f" + {_size(step.host)} host" if step.host and machine.host is not None else "")
        table.add_row(
            step.name, step.what, memory if step.memory or step.host else "", _size(step.disk), shown_time(step.seconds)
        )
    most, host = max(step.memory for step in steps), max(step.host for step in steps)
    peak = _size(most) + (f" + {_size(host)} host" if host and machine.host is not None else "")
    table.add_section()
    table.add_row("in all", "", peak, _size(sum(s.disk for s in steps)), shown_time(sum(s.seconds for s in steps)))
    return table


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e8 else f"{size / 1e6:.0f} MB" if size else ""
