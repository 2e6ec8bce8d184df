"""What `slimmoe eval` does."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich import get_console
from rich.console import Console
from rich.table import Table

from slimmoe_hf.atomic import replacing, write_text
from slimmoe_hf.command_inputs import open_checkpoint, output_path, print_json, read_documents, require
from slimmoe_hf.evaluation import NEW_TOKENS, PROMPT, Measurement, evaluate_checkpoint, held_out, opening_prompts
from slimmoe_hf.harness import TaskResult, TaskSet, load_tasks
from slimmoe_hf.hub import complete_folder
from slimmoe_hf.lineage import public_name
from slimmoe_hf.loading import find_checkpoint, load_config, load_model, weights_sha256
from slimmoe_hf.preflight import check_teacher, device, dtype_name
from slimmoe_hf.recipe import Recipe, parse_recipe
from slimmoe_hf.report import ModelReport, Report, aligned, readme, speed, task_rows
from slimmoe_hf.rundir import LOCK, RECIPE, REPORT, STEPS
from slimmoe_hf.stored_recipe import read_stored

MODEL = "model"


@dataclass(frozen=True)
class _Subject:
    """What is evaluated.

    Attributes:
        path: Folder of the checkpoint. teacher: Folder of the model that it is compared with.
        run: The finished run that it is the result of; task results are added to its report.
        original: Whether the teacher is the very one of the run.
    """

    path: Path
    teacher: Path | None
    run: Path | None
    original: bool = False


def evaluate(args: argparse.Namespace) -> None:
    """A checkpoint and text, tasks or both in, numbers out."""
    require(args, "model")
    if args.data is None and not args.tasks:
        raise ValueError("eval needs --data, --tasks or both (see slimmoe eval --help)")
    for name in ("task_path", "num_fewshot", "limit"):
        if getattr(args, name) is not None and not args.tasks:
            raise ValueError(f"--{name.replace('_', '-')} says how --tasks are run: name some.")
    if args.max_length < 2 or args.batch_size < 1:
        raise ValueError(
            f"--max-length {args.max_length} --batch-size {args.batch_size}: give at least 2 tokens and 1 row."
        )
    output = output_path(args, file=True) if args.output is not None else None
    subject = _subject(args)
    tasks = None
    if args.tasks:
        own = Path(args.task_path) if args.task_path is not None else None
        tasks = load_tasks(args.tasks, own, args.num_fewshot, args.limit)
    values: dict[str, Any] = {"model": args.model}
    found = None
    if args.data is not None:
        found, text = _measured(args, subject)
        values |= {**text, **found.model_dump(), "perplexity": found.perplexity}
    results: dict[str, list[TaskResult]] = {}
    if tasks is not None:
        results = _put(tasks, subject, args.batch_size)
        values["tasks"] = [result.model_dump() for result in results["model"]]
        values["teacher_tasks"] = [result.model_dump() for result in results.get("teacher", [])]
        _add_to_report(subject, results)
    if output is not None:
        with replacing(output, args.overwrite) as partial:
            partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print_json(values)
    else:
        _show(values, found, results)


def _subject(args: argparse.Namespace) -> _Subject:
    """The checkpoint, the run it belongs to, and the teacher: the one that is given, else the run's, if it is here."""
    run = _finished_run(Path(args.model).expanduser())
    path, tokenizer = open_checkpoint(str(run / MODEL) if run is not None else args.model, args.revision, shared=True)
    teacher = find_checkpoint(args.teacher, args.teacher_revision) if args.teacher is not None else None
    original = False
    if run is not None:
        models = Report.load(run / REPORT).models
        if weights_sha256(path) != models[-1].weights_sha256:
            raise ValueError(f"{path}: not the weights that {run / REPORT} is about. Name that folder to evaluate it.")
        if teacher is None and args.tasks:
            teacher = _teacher_of(run, models[0])
        original = teacher is not None and weights_sha256(teacher) == models[0].weights_sha256
    if teacher is not None:
        check_teacher(teacher, load_config(path, shared=True), tokenizer)
    return _Subject(path, teacher, run, original)


def _teacher_of(run: Path, teacher: ModelReport) -> Path | None:
    """The folder of a run's original model, as the report or the recipe knows it; of one that was streamed, none."""
    if teacher.streamed:  # tasks hold a model whole, which the run took care not to
        get_console().log("the teacher was streamed: only the model is given the tasks; --teacher names it")
        return None
    recipe = _recipe(run)
    for place in (run / teacher.path, Path(recipe.teacher or recipe.model)):
        if place.is_dir():
            return place
    get_console().log(
        f"the run's teacher is not here ({teacher.path}): only the model is given the tasks. --teacher names it."
    )
    return None


def _recipe(run: Path) -> Recipe:
    return parse_recipe(read_stored(run / RECIPE), str(run / RECIPE))


def _finished_run(folder: Path) -> Path | None:
    """The folder, if it is a finished run's."""
    if (folder / REPORT).is_file() and (folder / MODEL).is_dir():
        return folder
    if (folder / RECIPE).is_file() and (folder / STEPS).is_file():
        raise ValueError(f"{folder}: a run that is not finished. slimmoe run {folder / RECIPE} continues it.")
    return None


def _dtype(path: Path) -> str:
    """float32 on a CPU, which is slow in less; elsewhere what the checkpoint is stored in."""
    return "float32" if device().type == "cpu" else dtype_name(load_config(path, shared=True))


def _measured(args: argparse.Namespace, subject: _Subject) -> tuple[Measurement, dict[str, Any]]:
    """The measurement on text, and what text that was."""
    documents, (_, tokenizer) = read_documents(args), open_checkpoint(str(subject.path), None, shared=True)
    data = held_out(documents, tokenizer, args.max_length, args.tokens)
    teacher = None
    if args.teacher is not None and subject.teacher is not None:
        teacher = load_model(subject.teacher, _dtype(subject.teacher), device())
    found = evaluate_checkpoint(
        subject.path, data, tokenizer, batch_size=args.batch_size, teacher=teacher, device=device(),
        dtype=_dtype(subject.path), prompts=opening_prompts(documents, tokenizer),
    )  # fmt: skip
    return found, {"data": args.data, "split": args.split, "max_length": args.max_length, "tokens": data.tokens}


def _put(tasks: TaskSet, subject: _Subject, batch_size: int) -> dict[str, list[TaskResult]]:
    """Results of the model and, where there is one, of its teacher."""
    paths = {"model": subject.path, "teacher": subject.teacher}
    return {
        name: tasks.run(path, batch_size, device(), _dtype(path)) for name, path in paths.items() if path is not None
    }


def _add_to_report(subject: _Subject, results: dict[str, list[TaskResult]]) -> None:
    """Add task results to the report of the run, and to what is published with its model."""
    if subject.run is None:
        return
    with FileLock(subject.run / LOCK):  # two evaluations may end at the same time
        report = Report.load(subject.run / REPORT)
        found = {report.models[-1].name: results["model"]}
        if subject.original:
            found[report.models[0].name] = results["teacher"]
        report = report.with_tasks(found)
        write_text(subject.run / REPORT, report.model_dump_json(indent=2) + "\n")
        write_text(subject.run / "README.md", readme(report, public_name(_recipe(subject.run).model)))
        complete_folder(subject.run)
    get_console().log(f"{subject.run / REPORT}: {sum(map(len, found.values()))} task results added")


def _show(values: dict[str, Any], found: Measurement | None, results: dict[str, list[TaskResult]]) -> None:
    """The numbers for people."""
    console = Console()
    if found is not None:
        rows = Table(box=None, show_header=False)
        for name, text in _described(values, found):
            rows.add_row(name, text)
        console.print(rows, highlight=False)
        console.print(*found.samples, sep="\n", highlight=False, markup=False, soft_wrap=True)
    if found is not None and results:
        console.print()
    if rows_of_tasks := task_rows(results):
        console.print(aligned(rows_of_tasks, f"tasks of {values['model']}", left=2), highlight=False)


def _described(values: dict[str, Any], found: Measurement) -> list[tuple[str, str]]:
    """What was measured on text, line by line."""
    prompt = min(PROMPT, values["max_length"])
    rows = [
        ("model", values["model"]),
        ("parameters", f"{found.total_parameters:,}, {found.active_parameters:,} of them active"),
        ("file", f"{found.bytes / 1e6:,.1f} MB, sha256 {found.weights_sha256[:12]}..."),
        ("text", f"{values['data']}, {values['split']}: {values['tokens']:,} tokens in rows of {values['max_length']}"),
        ("loss", f"{found.loss:.4f} nats per token"),
        ("perplexity", f"{found.perplexity:,.2f}"),
        ("bits per byte", f"{found.bits_per_byte:.4f}"),
    ]
    if found.agreement is not None:
        rows.append(("agreement", f"{found.agreement:.4f} of the teacher's likeliest tokens are the model's"))
    rows.append(("forward", f"{speed(found)} tokens/s"))
    if found.prefill_tokens_per_second is not None and found.decode_tokens_per_second is not None:
        rows.append(("prefill", f"{found.prefill_tokens_per_second:,.0f} tokens/s of one prompt of {prompt}"))
        rows.append(("decode", f"{found.decode_tokens_per_second:,.0f} tokens/s, {NEW_TOKENS} tokens after it"))
    if found.peak_memory is not None:
        rows.append(("peak memory", f"{found.peak_memory / 1e6:,.1f} MB for both, weights included"))
    for name, choose in (("least used", min), ("most used", max)):
        load, layer, expert = choose(
            (load, layer, expert)
            for layer, loads in zip(found.router_layers, found.router_load, strict=True)
            for expert, load in enumerate(loads)
        )
        rows.append((name, f"expert {expert} of layer {layer}: {load:.2f} of an even load"))
    return rows
