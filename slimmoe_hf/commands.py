"""What the commands of `slimmoe` do; `cli` parses for them and prints their errors."""

from __future__ import annotations

import argparse
import platform
import shutil
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import psutil
import rich
import torch
import transformers
from rich.console import Console
from rich.table import Table

import slimmoe_hf
from slimmoe_hf import (
    cache_command,
    compare_command,
    eval_command,
    export_command,
    finetune_command,
    merge_command,
    plot_command,
    push_command,
    search_command,
    size_command,
)
from slimmoe_hf.atomic import replacing
from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.cache_format import MANIFEST
from slimmoe_hf.cached_teacher import CachedTeacher
from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.command_inputs import (
    open_checkpoint,
    output_path,
    print_json,
    require,
    same_request,
    say,
    size_of,
    target_of,
    training_rows,
)
from slimmoe_hf.criteria import check_criteria
from slimmoe_hf.data import dataset_hash, load_documents, tokenize
from slimmoe_hf.defaults import CALIBRATION_LOSS
from slimmoe_hf.describe import compare_plans, describe_plan, super_notes
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.family_table import COLUMNS, supported
from slimmoe_hf.free_memory import free_memory
from slimmoe_hf.loading import (
    files_sha256,
    find_checkpoint,
    load_config,
    weight_bytes,
    weights_sha256,
)
from slimmoe_hf.pipeline import run_recipe
from slimmoe_hf.plan import CompressionPlan, Target, make_plan, validate_target
from slimmoe_hf.preflight import check_teacher, training_arguments
from slimmoe_hf.recipe import load_any_recipe, reconstructing
from slimmoe_hf.reconstruction import without_repairs
from slimmoe_hf.report import samples, table
from slimmoe_hf.scoring import clear_output, planned, remove_work, scored
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.student_training import distil, save_checkpoint

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors")


def be_quiet() -> None:
    """One voice on the terminal: ours, on stderr; answers go to stdout."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    rich.reconfigure(stderr=True, log_path=False)


def env(args: argparse.Namespace) -> None:
    """Versions, threads, memory and devices; or what can be done with each family."""
    if args.families:
        _show_families(args.json)
        return
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "slimmoe_hf": slimmoe_hf.__version__,
        **{name: version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "memory_free_gb": round(free_memory() / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }
    if args.json:
        print_json(found)
        return
    rows = Table(box=None, show_header=False)
    for name, value in found.items():
        rows.add_row(name, ", ".join(value) or "none" if isinstance(value, list) else str(value))
    Console().print(rows)


def _show_families(as_json: bool) -> None:
    """A row for each family; limits and reasons once, below."""
    found = supported()
    if as_json:
        print_json({name: {key: each._asdict() for key, each in row.items()} for name, row in found.items()})
        return
    rows, notes = Table("model type", *COLUMNS, box=None), dict[str, int]()
    for name, row in found.items():
        marks = [f" ({notes.setdefault(each.why, len(notes) + 1)})" if each.why else "" for each in row.values()]
        rows.add_row(name, *(f"{each.word}{mark}" for each, mark in zip(row.values(), marks, strict=True)))
    console = Console()
    console.print(rows)
    for why, number in notes.items():
        console.print(f"({number}) {why}", highlight=False, soft_wrap=True)


def score(args: argparse.Namespace) -> None:
    """A model and text in, statistics out."""
    require(args, "model", "data", "output")
    output = clear_output(args, file=True)
    stats = scored(args, output, args.loss or CALIBRATION_LOSS)  # a later plan may look at gradients
    stats.save(output)
    remove_work(args, output)
    size = "--num-experts E" if FAMILIES[stats.meta.family].no_width else "--expert-width N"
    say(f"{output}: {stats.meta.tokens:,} tokens scored; next: slimmoe plan {output} {size} --output plan")


def plan(args: argparse.Namespace) -> None:
    """Statistics and a target in, a plan out; or plans shown."""
    if args.inputs[:1] == ["show"]:
        _show(args.inputs[1:], args.json)
        return
    if args.budget is not None or args.active_budget is not None:
        search_command.search(args)
        return
    if len(args.inputs) != 1:
        raise ValueError("plan takes one statistics file, or show and one or two plans (see slimmoe plan --help)")
    if args.reconstruct is not None or args.data is not None:
        raise ValueError("plan takes --data and --reconstruct with --budget only. slim takes them with any size.")
    require(args, "output")
    output = output_path(args)
    stats = ExpertStats.load(args.inputs[0])
    target = target_of(args)
    made = make_plan(stats, target, args.criterion, args.seed, args.expert_criterion)
    made.save(output)
    Console().print(describe_plan(made), highlight=False, soft_wrap=True)


def _show(folders: list[str], as_json: bool) -> None:
    if len(folders) not in (1, 2):
        raise ValueError("plan show takes one plan, or two to compare (see slimmoe plan --help)")
    plans = [CompressionPlan.load(folder) for folder in folders]
    if as_json:
        shown = [{"sha256": each.sha256, **each.meta.model_dump(mode="json")} for each in plans]
        print_json(shown[0] if len(shown) == 1 else shown)
        return
    text = describe_plan(plans[0]) if len(plans) == 1 else compare_plans(*plans)
    Console().print(text, highlight=False, soft_wrap=True)


def slim(args: argparse.Namespace) -> None:
    """A checkpoint and a plan (or text and a size) in, a smaller checkpoint out."""
    require(args, "model", "output")
    output, size = clear_output(args), size_of(args, "shard_size")
    if args.dtype is not None and args.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {args.dtype}: unknown; use float32, bfloat16 or float16.")
    target = target_of(args)
    if args.plan is not None:
        if args.data is not None or target != Target():
            raise ValueError("slim takes a plan, or --data and a size, not both: a plan is a decision made already.")
        if args.reconstruct:
            raise ValueError("--reconstruct goes with --data and a size: a plan is a decision made already.")
        chosen = CompressionPlan.load(args.plan)
        if args.reconstruct is False:
            chosen = without_repairs(chosen)
    elif args.data is None:
        raise ValueError("slim needs --plan, or --data and a size, such as --expert-width (see slimmoe slim --help)")
    elif args.other_weights:
        raise ValueError(
            "--other-weights goes with --plan: of --data the plan is made for this very model. Leave it out."
        )
    else:
        validate_target(load_config(find_checkpoint(args.model, args.revision, weights=False)), target)
        check_criteria(args.criterion, args.expert_criterion, **target.asks)
        chosen = planned(args, output, target)
    slim_checkpoint(
        args.model, chosen, output, dtype=args.dtype, revision=args.revision, shard_bytes=size, overwrite=args.overwrite,
        delete_source_shards=args.delete_source_shards, other_weights=args.other_weights,
    )  # fmt: skip
    if args.plan is None:
        remove_work(args, output)
    done = f"{output}: {chosen.meta.target}, {weight_bytes(output):,} bytes of weights, verified"
    say("\n".join([done, *super_notes(chosen)]))


def distill(args: argparse.Namespace) -> None:
    """A student, its teacher and text in, a better student out. The same command continues a stopped run."""
    require(args, "model", "data", "output")
    if (args.teacher is None) == (args.teacher_cache is None):
        raise ValueError("distill takes --teacher, or --teacher-cache with its answers (see slimmoe distill --help)")
    output = output_path(args)
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    given = args.training | ({"teacher_logits_path": args.teacher_cache} if args.teacher_cache is not None else {})
    arguments = training_arguments(given, checkpoints, args.max_length, args.seed, "training arguments")
    student, tokenizer = open_checkpoint(args.model, args.revision, shared=True)
    config, teacher = load_config(student, shared=True), None
    if args.teacher is not None:
        teacher = find_checkpoint(args.teacher, args.teacher_revision)
        check_teacher(teacher, config, tokenizer)
    train = training_rows(args, tokenizer)
    validation = None
    if arguments.eval_strategy != "no":
        held = load_documents(args.data, "validation", args.data_revision)
        validation = tokenize(held, tokenizer, args.max_length, args.packing)
    if args.teacher_cache is not None:
        cached = CachedTeacher(TeacherCache.open(args.teacher_cache), arguments.divergence())
        cached.check(config.vocab_size, tokenizer)
        cached.check_rows([train], files=False)
        try:
            cached.check_rows([validation], files=False)
        except ValueError as error:
            when = arguments.to_dict()["eval_strategy"]
            raise ValueError(
                f"{str(error).rstrip('.')}; eval_strategy={when} evaluates on the validation split: write the cache with "
                "--split train+validation, or leave eval_strategy out."
            ) from None
    same_request(checkpoints, {
        "student": weights_sha256(student), "data": dataset_hash(train),
        "teacher": weights_sha256(teacher) if teacher else files_sha256([Path(args.teacher_cache) / MANIFEST]),
        "max_length": args.max_length, "seed": args.seed, "arguments": args.training,
    }, args.overwrite)  # fmt: skip
    model, _ = distil(student, teacher, arguments, tokenizer, train, validation, "distill")
    with replacing(output, args.overwrite) as partial:
        save_checkpoint(model, tokenizer, partial, str(config.dtype or torch.float32).removeprefix("torch."))
    shutil.rmtree(checkpoints)
    say(f"{output}: done; measure it with: slimmoe eval {output} --data {args.data}")


def run(args: argparse.Namespace) -> None:
    """A recipe in, a finished folder out."""
    recipe = args.recipe or args.config
    if recipe is None:
        raise ValueError("give the recipe to run, e.g. slimmoe run examples/quickstart.yaml")
    if args.reconstruct is not None:
        recipe = reconstructing(load_any_recipe(recipe), args.reconstruct)
    report = run_recipe(recipe, args.output, args.overwrite, args.dry_run, args.machine)
    if report is not None:
        console = Console()
        console.print(table(report))
        console.print(*samples(report), sep="\n", highlight=False, markup=False, soft_wrap=True)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "env": env, "size": size_command.size, "score": score, "plan": plan, "slim": slim, "distill": distill, "run": run,
    "eval": eval_command.evaluate, "plot": plot_command.plot, "finetune": finetune_command.finetune, "push": push_command.push,
    "cache": cache_command.cache, "merge": merge_command.merge, "compare": compare_command.compare,
    "export": export_command.export,
}  # fmt: skip
