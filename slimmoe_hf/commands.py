"""What the commands of `slimmoe` do; `cli` parses for them and prints their errors."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
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
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

import slimmoe_hf
from slimmoe_hf import size_command
from slimmoe_hf.atomic import refuse_existing, replacing, write_text
from slimmoe_hf.calibration import CALIBRATION_LOSSES, collect_stats
from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.data import batches, dataset_hash, load_documents, take_apart, take_rows, take_tokens, tokenize
from slimmoe_hf.describe import compare_plans, describe_plan
from slimmoe_hf.evaluation import evaluate_checkpoint, held_out, opening_prompts
from slimmoe_hf.families import family_of
from slimmoe_hf.loading import (
    find_checkpoint,
    load_config,
    load_model,
    load_tokenizer,
    verify_checkpoint,
    weight_bytes,
    weights_sha256,
)
from slimmoe_hf.pipeline import distil, run_recipe, save_checkpoint
from slimmoe_hf.plan import CompressionPlan, Target, make_plan, validate_target
from slimmoe_hf.preflight import check_teacher, check_vocabulary, device, training_arguments
from slimmoe_hf.recipe import memory_bytes
from slimmoe_hf.report import samples, table
from slimmoe_hf.stats import ExpertStats

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors")


def be_quiet() -> None:
    """One voice on the terminal: ours, on stderr; answers go to stdout."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    rich.reconfigure(stderr=True, log_path=False)


def env(args: argparse.Namespace) -> None:
    """Versions, threads, memory and devices."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "slimmoe_hf": slimmoe_hf.__version__,
        **{name: version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "memory_free_gb": round(psutil.virtual_memory().available / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }
    if args.json:
        _print_json(found)
        return
    rows = Table(box=None, show_header=False)
    for name, value in found.items():
        rows.add_row(name, ", ".join(value) or "none" if isinstance(value, list) else str(value))
    Console().print(rows)


def score(args: argparse.Namespace) -> None:
    """A model and text in, statistics out."""
    _require(args, "model", "data", "output")
    output = _output(args)
    stats = _scored(args)
    stats.save(output)
    rich.print(
        f"{output}: {stats.meta.tokens:,} tokens scored; next: slimmoe plan {output} --expert-width N --output plan"
    )


def _scored(args: argparse.Namespace) -> ExpertStats:
    if args.loss not in CALIBRATION_LOSSES:
        raise ValueError(f"--loss {args.loss}: unknown; use one of {', '.join(CALIBRATION_LOSSES)}.")
    where = torch.device("cpu") if args.calibration_device == "cpu" else device()
    model, tokenizer = _checkpoint(args.model, args.revision)
    teacher = None
    if args.teacher is not None and args.loss == "kd_topk":
        folder = find_checkpoint(args.teacher, args.teacher_revision)
        check_teacher(folder, load_config(model), tokenizer)
        teacher = load_model(folder, args.calibration_dtype, where)
    documents, _ = take_apart(_documents(args), args.tokens, tokenizer, args.seed)
    rows = take_rows(tokenize(documents, tokenizer, args.max_length, args.packing), args.tokens)
    return collect_stats(
        load_model(model, args.calibration_dtype, where, whole=True),
        batches(rows, args.batch_size, tokenizer.pad_token_id or 0),
        loss=args.loss,
        teacher=teacher,
    )


def plan(args: argparse.Namespace) -> None:
    """Statistics and a target in, a plan out; or plans shown."""
    if args.inputs[:1] == ["show"]:
        _show(args.inputs[1:], args.json)
        return
    if len(args.inputs) != 1:
        raise ValueError("plan takes one statistics file, or show and one or two plans (see slimmoe plan --help)")
    _require(args, "output")
    output = _output(args)
    stats = ExpertStats.load(args.inputs[0])
    target = Target(expert_width=args.expert_width, kv_groups=args.kv_groups)
    made = make_plan(stats, target, args.criterion, args.seed)
    made.save(output)
    Console().print(describe_plan(made), highlight=False, soft_wrap=True)


def _show(folders: list[str], as_json: bool) -> None:
    if len(folders) not in (1, 2):
        raise ValueError("plan show takes one plan, or two to compare (see slimmoe plan --help)")
    plans = [CompressionPlan.load(folder) for folder in folders]
    if as_json:
        shown = [{"sha256": each.sha256, **each.meta.model_dump(mode="json")} for each in plans]
        _print_json(shown[0] if len(shown) == 1 else shown)
        return
    text = describe_plan(plans[0]) if len(plans) == 1 else compare_plans(*plans)
    Console().print(text, highlight=False, soft_wrap=True)


def slim(args: argparse.Namespace) -> None:
    """A checkpoint and a plan (or text and a size) in, a smaller checkpoint out."""
    _require(args, "model", "output")
    output, size = _output(args), _shard_bytes(args.shard_size)
    if args.dtype is not None and args.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {args.dtype}: unknown; use float32, bfloat16 or float16.")
    target = Target(expert_width=args.expert_width, kv_groups=args.kv_groups)
    if args.plan is not None:
        if args.data is not None or target != Target():
            raise ValueError("slim takes a plan, or --data and a size, not both: a plan is a decision made already.")
        chosen = CompressionPlan.load(args.plan)
    elif args.data is None:
        raise ValueError("slim needs --plan, or --data and --expert-width or --kv-groups (see slimmoe slim --help)")
    else:
        validate_target(load_config(find_checkpoint(args.model, args.revision)), target)
        chosen = make_plan(_scored(args), target, args.criterion, args.seed)
    slim_checkpoint(
        args.model, chosen, output, dtype=args.dtype, revision=args.revision, shard_bytes=size, overwrite=args.overwrite,
        delete_source_shards=args.delete_source_shards, other_weights=args.other_weights,
    )  # fmt: skip
    rich.print(f"{output}: {chosen.meta.target}, {weight_bytes(output):,} bytes of weights, verified")


def _shard_bytes(text: str) -> int:
    try:
        return memory_bytes(text)
    except ValueError:
        raise ValueError(f"--shard-size {text}: not a size. Write it as 500MB or 1GB.") from None


def distill(args: argparse.Namespace) -> None:
    """A student, its teacher and text in, a better student out. The same command continues a stopped run."""
    _require(args, "model", "teacher", "data", "output")
    output = _output(args)
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    arguments = training_arguments(args.training, checkpoints, args.max_length, args.seed, "training arguments")
    student, tokenizer = _checkpoint(args.model, args.revision)
    teacher = find_checkpoint(args.teacher, args.teacher_revision)
    config = load_config(student)
    check_teacher(teacher, config, tokenizer)
    documents = _documents(args)
    if args.tokens is not None:
        documents = take_tokens(documents.shuffle(seed=args.seed), args.tokens, tokenizer)
    train = tokenize(documents, tokenizer, args.max_length, args.packing)
    validation = None
    if arguments.eval_strategy != "no":
        held = load_documents(args.data, "validation", args.data_revision)
        validation = tokenize(held, tokenizer, args.max_length, args.packing)
    _same_request(checkpoints, {
        "student": weights_sha256(student), "teacher": weights_sha256(teacher), "data": dataset_hash(train),
        "max_length": args.max_length, "seed": args.seed, "arguments": args.training,
    }, args.overwrite)  # fmt: skip
    model, _ = distil(student, teacher, arguments, tokenizer, train, validation, "distill")
    with replacing(output, args.overwrite) as partial:
        save_checkpoint(model, tokenizer, partial, str(config.dtype or torch.float32).removeprefix("torch."))
    shutil.rmtree(checkpoints)
    rich.print(f"{output}: done; measure it with: slimmoe eval {output} --data {args.data}")


def _same_request(checkpoints: Path, request: dict[str, Any], overwrite: bool) -> None:
    """Continue only what was begun with the same arguments, models and text."""
    file = checkpoints / "request.json"
    text = json.dumps(request, indent=2, sort_keys=True, default=str) + "\n"
    if checkpoints.exists() and not overwrite:
        if file.is_file() and file.read_text() == text:
            return
        raise ValueError(
            f"{checkpoints}: holds checkpoints of another request. Give that one's arguments to continue it, --overwrite "
            "to start over, or another --output."
        )
    shutil.rmtree(checkpoints, ignore_errors=True)
    write_text(file, text)


def run(args: argparse.Namespace) -> None:
    """A recipe in, a finished folder out."""
    recipe = args.recipe or args.config
    if recipe is None:
        raise ValueError("give the recipe to run, e.g. slimmoe run examples/quickstart.yaml")
    report = run_recipe(recipe, args.output, args.overwrite, args.dry_run, args.machine)
    if report is not None:
        console = Console()
        console.print(table(report))
        console.print(*samples(report), sep="\n", highlight=False, markup=False, soft_wrap=True)


def evaluate(args: argparse.Namespace) -> None:
    """A checkpoint and text in, numbers out."""
    _require(args, "model", "data")
    path, tokenizer = _checkpoint(args.model, args.revision)
    family_of(load_config(path))
    teacher = None
    if args.teacher is not None:
        folder = find_checkpoint(args.teacher, args.teacher_revision)
        check_teacher(folder, load_config(path), tokenizer)
        teacher = load_model(folder, device=device())
    documents = _documents(args)
    data = held_out(documents, tokenizer, args.max_length, args.tokens)
    found = evaluate_checkpoint(
        path, data, tokenizer, batch_size=args.batch_size, teacher=teacher, device=device(),
        prompts=opening_prompts(documents, tokenizer),
    )  # fmt: skip
    values = {
        "model": args.model, "data": args.data, "split": args.split, "max_length": args.max_length,
        "tokens": data.tokens, **found.model_dump(),
    }  # fmt: skip
    if args.json:
        _print_json(values)
        return
    rows = Table(box=None, show_header=False)
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if isinstance(value, float) else value
        if value is not None and name != "samples":
            rows.add_row(name, str(shown))
    Console().print(rows)
    Console().print(*found.samples, sep="\n", highlight=False, markup=False, soft_wrap=True)


def _require(args: argparse.Namespace, *names: str) -> None:
    missing = [name for name in names if getattr(args, name) is None]
    if missing:
        raise ValueError(f"{args.command} needs {', '.join(missing)} (see slimmoe {args.command} --help)")


def _output(args: argparse.Namespace) -> Path:
    """The place to write to, refused before any work if something is there."""
    path = Path(args.output).expanduser()
    if not args.overwrite:
        refuse_existing(path)
    return path


def _checkpoint(model: str, revision: str | None) -> tuple[Path, PreTrainedTokenizerBase]:
    """A checkpoint that has been looked through, and its tokenizer."""
    path = find_checkpoint(model, revision)
    family_of(load_config(path))
    verify_checkpoint(path)
    tokenizer = load_tokenizer(path)
    check_vocabulary(load_config(path), tokenizer, path)
    return path, tokenizer


def _documents(args: argparse.Namespace) -> Dataset:
    return load_documents(args.data, args.split, args.data_revision)


def _print_json(values: Any) -> None:
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "env": env, "size": size_command.size, "score": score, "plan": plan, "slim": slim, "distill": distill, "run": run,
    "eval": evaluate,
}  # fmt: skip
