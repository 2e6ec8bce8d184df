"""The folder that a finished run publishes: weights, card, recipe, plans, report and pictures, and nothing private.

`complete_folder` writes it, `upload` brings it to the Hub.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from slimmoe_hf.atomic import replacing
from slimmoe_hf.card import MARK, check_card, images_of, may_be_written
from slimmoe_hf.engine_report import assess, engine_section
from slimmoe_hf.harness import TaskResult
from slimmoe_hf.lineage import CARD, Base, find_base, licence_files, public_name
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.recipe import Recipe, parse_recipe
from slimmoe_hf.reconstruction import without_repairs
from slimmoe_hf.report import Report
from slimmoe_hf.run_card import RunFacts, run_card
from slimmoe_hf.rundir import RECIPE, REPORT, STEPS
from slimmoe_hf.stored_recipe import read_stored
from slimmoe_hf.upload import publishable

MODEL = "model"
_RESULTS, _IMAGES = ".eval_results", "images"


def complete_folder(
    run: Path,
    repo: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    branch: str | None = None,
) -> None:
    """Write everything beside the weights into `RUN/model`; again, it writes the same. Files of other names stay there.

    README.md (the model card; one that a person wrote is left alone), `recipe.yaml` and `report.json` without local
    paths, `plans/stage-N`, the pictures in `images/`, the original model's licence and notice (unless the folder has
    its own), and `.eval_results` where there are results of tasks.

    Args:
        run: The folder of a finished run.
        repo: The Hub id that the card is to name.
        base_model: Hub id of what was slimmed; None is as the run names it.
        license: As the Hub writes it, `apache-2.0`; None is the original model's own.
        branch: Where it is published, if not on main.

    Raises:
        ValueError: The run is not finished or damaged, or what is named is no Hub id or licence.
    """
    with tempfile.TemporaryDirectory(prefix="slimmoe-") as temporary:
        extras, model = Path(temporary), run / MODEL
        ours = _of_before(model)
        write_extras(run, extras, repo, base_model, license, branch)
        files = sorted((file for file in extras.rglob("*") if file.is_file()), key=lambda file: file.name == CARD)
        for file in files:  # the card last: what it shows is there then
            with replacing(model / file.relative_to(extras), overwrite=True) as partial:
                shutil.copyfile(file, partial)
        for name in ours - {file.relative_to(extras).as_posix() for file in files}:
            (model / name).unlink(missing_ok=True)


def _of_before(model: Path) -> set[str]:
    """Names of the pictures and results in a folder that are ours: of them, another time may bring fewer."""
    text = (model / CARD).read_text(encoding="utf-8") if (model / CARD).is_file() else ""
    pictures = {image for image in images_of(text) if image.startswith(f"{_IMAGES}/")} if MARK in text else set()
    tasks = Report.load(model / REPORT).models[-1].tasks if (model / REPORT).is_file() else []
    return pictures | {f"{_RESULTS}/{_result_name(task)}" for task in tasks}


def write_extras(
    run: Path,
    folder: Path,
    repo: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    branch: str | None = None,
    quiet: bool = False,
) -> None:
    """As `complete_folder`, into a folder of its own; the run is only read. `quiet` asks nobody, and says nothing."""
    report, recipe = Report.load(run / REPORT), parse_recipe(read_stored(run / RECIPE), str(run / RECIPE))
    model = run / MODEL
    files = publishable(model)  # refuses a folder without its weights
    base, source = find_base(recipe.model, recipe.revision, base_model, license, quiet)
    another = recipe.teacher not in (None, recipe.model)
    recipe = public_recipe(recipe, base)
    report = public_report(report, run, recipe)
    plans = []
    for number in range(1, len(recipe.stages) + 1):
        plan = public_plan(CompressionPlan.load(run / f"stage-{number}" / "plan"))
        without_repairs(plan).save(folder / "plans" / f"stage-{number}")
        plans.append(plan)
    pictures = _draw(run, folder)
    (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / REPORT).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    _write_results(report.models[-1].tasks, folder / _RESULTS)
    for file in licence_files(source):
        if not (model / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    if not may_be_written(model / CARD):
        return
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    engines = engine_section(assess(model))
    text = run_card(RunFacts(
        repo, base, license, recipe.teacher if another else None, recipe, report, plans, _histories(run, len(plans)),
        pictures, config, chat=(model / "chat_template.jinja").exists(), branch=branch, engines=engines,
    ))  # fmt: skip
    written = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    check_card(text, files.keys() | written)
    (folder / CARD).write_text(text, encoding="utf-8")


def public_recipe(recipe: Recipe, base: Base) -> Recipe:
    """A recipe that names no place on somebody's machine, and no secret.

    Args:
        recipe: As the run stored it.
        base: What `recipe.model` is to be called.
    """
    named, task_path = base.hub_id or public_name(recipe.model), recipe.evaluation.task_path
    stages = [
        stage.model_copy(update={"distillation": _public_settings(stage.distillation)}) for stage in recipe.stages
    ]
    return recipe.model_copy(update={
        "model": named,
        "teacher": named if recipe.teacher == recipe.model else recipe.teacher and public_name(recipe.teacher),
        "data": recipe.data.model_copy(update={"source": public_name(recipe.data.source)}),
        "stages": stages,
        "evaluation": recipe.evaluation.model_copy(update={"task_path": task_path and public_name(task_path)}),
        "accelerate": recipe.accelerate and Path(recipe.accelerate).name,
        "output": None,
    })  # fmt: skip


def _public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments without tokens, and without folders."""
    kept = {name: value for name, value in settings.items() if not (name.endswith("_token") and isinstance(value, str))}
    return {name: _public_value(value) for name, value in kept.items()}


def _public_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _public_value(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_public_value(inner) for inner in value]
    if isinstance(value, str) and (value.startswith(("/", "~", ".")) or (os.sep in value and Path(value).exists())):
        return public_name(value)
    return value


def public_report(report: Report, run: Path, recipe: Recipe) -> Report:
    """A report whose paths are relative to the published folder, or names.

    Args:
        report: As the run wrote it.
        run: The run's folder.
        recipe: From `public_recipe`: what the models and the data are called.
    """
    models = []
    for model in report.models:
        path = Path(model.path)
        if path.is_absolute():
            path = Path(os.path.relpath(path, run.resolve()))
        where = "." if model is report.models[-1] else path.as_posix()
        if model.step == "teacher":
            where = recipe.teacher or recipe.model
        models.append(model.model_copy(update={"path": where}))
    evaluation = report.evaluation.model_copy(update={"data": recipe.data.source})
    return report.model_copy(update={"models": models, "evaluation": evaluation})


def public_plan(plan: CompressionPlan) -> CompressionPlan:
    """The same decision, its request without local paths."""
    request = _public_settings(plan.meta.request) if plan.meta.request is not None else None
    return plan.with_request(request)


def _draw(run: Path, folder: Path) -> list[tuple[str, str]]:
    """Draw the run; path and caption of every picture. The data behind them is in the report and the plans."""
    from slimmoe_hf.plots import draw  # matplotlib takes long to import, and most commands draw nothing

    with tempfile.TemporaryDirectory(prefix="slimmoe-") as temporary:
        named = Path(temporary) / "this run"  # what the pictures call it: strangers do not know the folder's name
        named.mkdir()
        for entry in run.resolve().iterdir():
            (named / entry.name).symlink_to(entry)
        plots = draw([named], folder / _IMAGES)
    for plot in plots:
        plot.json.unlink()
    return [(plot.png.relative_to(folder).as_posix(), plot.caption) for plot in plots]


def _histories(run: Path, stages: int) -> list[list[dict[str, Any]]]:
    """The trainer's log of every stage, as the run recorded it."""
    steps = json.loads((run / STEPS).read_text(encoding="utf-8"))["steps"]
    return [
        steps.get(f"stage-{number}/distil", {}).get("result", {}).get("history", []) for number in range(1, stages + 1)
    ]


def _write_results(tasks: list[TaskResult], folder: Path) -> None:
    """One file per number, as the Hub reads them; its leaderboards take those of datasets that are benchmarks there.

    A task of which only some questions were asked is not that benchmark, and is left out.
    """
    for task in tasks:
        if task.dataset is None or task.limit is not None:
            continue
        entry = EvalResultEntry(
            dataset_id=task.dataset, task_id=task.task, value=task.value, dataset_revision=task.dataset_revision,
            notes=f"{task.metric}, {task.num_fewshot}-shot, {task.harness or 'lm-evaluation-harness'}",
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _result_name(task)).write_text(
            yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8"
        )


def _result_name(task: TaskResult) -> str:
    name = f"{task.task}-{task.metric}-{task.num_fewshot}-shot"
    return name.replace("/", "-").replace(",", "-") + ".yaml"
