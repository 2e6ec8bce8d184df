"""What to change in a recipe so that it fits a machine: settings are tried, and those that do it are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from slimmoe_hf.machines import MACHINES, Machine
from slimmoe_hf.outlook import outlook
from slimmoe_hf.preflight import Text, outline
from slimmoe_hf.recipe import Recipe, TeacherCacheSpec
from slimmoe_hf.rundir import CACHE
from slimmoe_hf.steps import TEACHER, Shortage, Step, shortages

Change = tuple[str, Callable[[Recipe], Recipe]]


def remedies(recipe: Recipe, steps: list[Step], machine: Machine, text: Text | None, elsewhere: bool) -> list[str]:
    """One line for every step that does not fit: the fewest settings, of those that we know of, that make it fit.

    Args:
        recipe: The run.
        steps: As `outlook` gives them.
        machine: Where it would be done.
        text: As for `outlook`.
        elsewhere: As for `preflight.outline`.
    """
    return [_remedy(recipe, short, machine, text, elsewhere) for short in shortages(steps, machine)]


def _remedy(recipe: Recipe, short: Shortage, machine: Machine, text: Text | None, elsewhere: bool) -> str:
    name, asked = short.step.name, f"{short.needed / 1e9:.1f} GB of {short.what}, {short.free / 1e9:.1f} free"
    changed, said, least = recipe, [], short.needed
    for setting, change in _changes(recipe, name):
        candidate = change(changed)
        try:
            found = outline(candidate, elsewhere)
        except ValueError:
            continue  # no remedy for this recipe: a cache does not serve every loss
        changed = candidate
        said.append(setting)
        steps = outlook(changed, found, machine, text)
        step = next(each for each in steps if each.name == name)
        least = step.memory if short.what == "memory" else step.host
        if not shortages([step], machine):
            return f"{name}: {asked}. Set {' and '.join(said)}: {least / 1e9:.1f} GB"
    tried = f"; with {' and '.join(said)} it still needs {least / 1e9:.1f} GB" if said else ""
    larger = [each for each, other in MACHINES.items() if least <= (other.memory if short.what == "memory" else 0)]
    where = f"take a larger machine ({', '.join(larger)})" if larger else "take a larger machine"
    return f"{name}: {asked}{tried}: {where}, several with accelerate, or a stage between"


def _changes(recipe: Recipe, step: str) -> Iterator[Change]:
    """Settings that lower what a step needs, the cheapest first; each comes on top of those before."""
    if step == CACHE:
        yield "teacher_cache.stream: true", lambda it: _cached(it, stream=True)
        yield "teacher_cache.batch_size: 1", lambda it: _cached(it, batch_size=1)
    if step.endswith("/evaluate"):
        yield (
            "evaluation.batch_size: 1",
            lambda it: it.model_copy(update={"evaluation": it.evaluation.model_copy(update={"batch_size": 1})}),
        )
    if step == TEACHER and not recipe.streams_teacher:
        there = recipe.teacher_cache is not None
        setting = "teacher_cache.stream: true" if there else "teacher_cache: {stream: true}"
        yield setting, lambda it: _cached(it, stream=True)
    if not step.startswith("stage-"):
        return
    number = int(step.removeprefix("stage-").partition("/")[0]) - 1
    stage = recipe.stages[number]
    if step.endswith(("/score", "/plan")):
        for key, value in (("stream", True), ("batch_size", 1), ("dtype", "bfloat16")):
            if stage.calibration.model_dump()[key] != value:
                shown = str(value).lower()
                yield f"stages.{number}.calibration.{key}: {shown}", _calibrated(number, key, value)
    if step.endswith("/distil"):
        if recipe.teacher_cache is None:
            yield "teacher_cache: {stream: true}", lambda it: _cached(it, stream=True)
        where = f"stages.{number}.distillation"
        for key, value in (("per_device_train_batch_size", 1), ("gradient_checkpointing", True)):
            if stage.distillation.get(key) != value:
                yield f"{where}.{key}: {str(value).lower()}", _distilled(number, {key: value})
        if stage.training_dtype != "bfloat16" or stage.distillation.get("optim") != "adafactor":
            yield (
                f"stages.{number}.training_dtype: bfloat16 with {where}: {{optim: adafactor, bf16: false}}",
                _distilled(number, {"optim": "adafactor", "bf16": False}, training_dtype="bfloat16"),
            )


def _cached(recipe: Recipe, **settings: Any) -> Recipe:
    spec = (recipe.teacher_cache or TeacherCacheSpec()).model_copy(update=settings)
    return recipe.model_copy(update={"teacher_cache": spec, "teacher_memory": None})


def _calibrated(number: int, key: str, value: Any) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        calibration = recipe.stages[number].calibration.model_copy(update={key: value})
        return _staged(recipe, number, {"calibration": calibration})

    return change


def _distilled(number: int, settings: dict[str, Any], **more: Any) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        return _staged(recipe, number, {"distillation": recipe.stages[number].distillation | settings, **more})

    return change


def _staged(recipe: Recipe, number: int, update: dict[str, Any]) -> Recipe:
    stages = list(recipe.stages)
    stages[number] = stages[number].model_copy(update=update)
    return recipe.model_copy(update={"stages": stages})
