"""What the scoring flags name, scored: a model in memory, or one that streams by."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimmoe_hf.calibration import CALIBRATION_LOSSES, collect_stats
from slimmoe_hf.command_inputs import open_checkpoint, output_path, read_documents
from slimmoe_hf.criteria import calibration_loss
from slimmoe_hf.data import batches, take_apart, take_rows, tokenize, tokenize_pairs
from slimmoe_hf.defaults import CALIBRATION_LOSS, reconstructs
from slimmoe_hf.families import family_of, refuse_encoder_decoder
from slimmoe_hf.loading import find_checkpoint, load_config, load_model
from slimmoe_hf.plan import CompressionPlan, Target, make_plan
from slimmoe_hf.preflight import check_teacher, device
from slimmoe_hf.reconstruction import reconstruct
from slimmoe_hf.sizing import DTYPES, wider_dtype
from slimmoe_hf.sources import HubSource, LocalSource, fetch_weights, open_source
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.streamed_repair import stream_reconstruct
from slimmoe_hf.streaming import stream_stats
from slimmoe_hf.walk import discard


def loss_of(args: argparse.Namespace, searched: bool = False) -> str:
    """The calibration loss for the criteria that the flags name.

    Args:
        args: As the parser has them.
        searched: Shapes within a budget are compared.

    Raises:
        ValueError: As `calibration_loss`.
    """
    return calibration_loss(args.loss, args.criterion, args.expert_criterion, searched=searched)


def scored(args: argparse.Namespace, output: Path, loss: str) -> ExpertStats:
    """The statistics of the model that the flags name.

    Args:
        args: As the parser has them.
        output: What is being made; the work of a streamed sweep lies beside it until `remove_work`.
        loss: Where the flags name none, or from `loss_of`.

    Raises:
        ValueError: A checkpoint, teacher, text or loss that will not do.
    """
    return scored_stream(args, output, loss)[1] if args.stream else scored_model(args, loss)[1]


def planned(args: argparse.Namespace, output: Path, target: Target) -> CompressionPlan:
    """The plan that the flags ask for, with what `--reconstruct` adds to it.

    Args:
        args: As the parser has them.
        output: As in `scored`.
        target: What to cut to.

    Raises:
        ValueError: As `scored`, or `make_plan`.
    """

    def decided(stats: ExpertStats) -> CompressionPlan:
        return make_plan(stats, target, args.criterion, args.seed, args.expert_criterion)

    loss = loss_of(args)
    if not reconstructs(args.reconstruct):
        return decided(scored(args, output, loss))
    if not args.stream:
        model, stats, given = scored_model(args, loss)
        config = load_config(find_checkpoint(args.model, args.revision, weights=False))
        return reconstruct(model, given, decided(stats), dtype=wider_dtype(config, args.dtype))
    path, stats, given = scored_stream(args, output, loss)
    return rebuilt(args, output, path, given, decided(stats), None if args.dtype is None else DTYPES[args.dtype])


def rebuilt(
    args: argparse.Namespace, output: Path, path: Path, given: Iterable[dict[str, Tensor]], plan: CompressionPlan,
    written: torch.dtype | None = None,
) -> CompressionPlan:  # fmt: skip
    """A plan of a model that is streamed, reconstructed on the text that was scored.

    Args:
        args: As the parser has them.
        output: As in `scored`.
        path, given: From `scored_stream`.
        plan: Of the model.
        written: As `stream_reconstruct` takes it.

    Raises:
        ValueError: As `stream_reconstruct`.
    """
    return stream_reconstruct(
        path, given, plan, work=_repairs(output), dtype=args.calibration_dtype, device=_place(args),
        written=written, overwrite=args.overwrite,
    )  # fmt: skip


def scored_model(
    args: argparse.Namespace, loss: str, expert_outputs: bool = False
) -> tuple[PreTrainedModel, ExpertStats, Iterable[dict[str, Tensor]]]:
    """The model that the flags name, in memory, its statistics, and the text that they were taken on.

    Args:
        args: As the parser has them.
        loss: As in `scored`.
        expert_outputs: As `collect_stats`.

    Raises:
        ValueError: As `scored`; or `--stream`, which leaves no model in memory.
    """
    if args.stream:
        raise ValueError("--stream: this command needs the whole model in memory. Leave it out.")
    path, folder, given = _inputs(args, loss)
    teacher = None if folder is None else load_model(folder, args.calibration_dtype, _place(args))
    model = load_model(path, args.calibration_dtype, _place(args), whole=True)
    stats = collect_stats(model, given, loss=loss, teacher=teacher, expert_outputs=expert_outputs)
    return model, stats, given


def scored_stream(
    args: argparse.Namespace, output: Path, loss: str
) -> tuple[Path, ExpertStats, Iterable[dict[str, Tensor]]]:
    """The folder of the model that the flags name, its statistics, one layer in memory at a time, and the text.

    Args:
        args: As the parser has them.
        output: As in `scored`.
        loss: As there.

    Raises:
        ValueError: As `scored`.
    """
    path, teacher, given = _inputs(args, loss)
    stats = stream_stats(
        path, given, loss, teacher, work=_work(output), dtype=args.calibration_dtype, device=_place(args),
        overwrite=args.overwrite,
    )  # fmt: skip
    return path, stats, given


def remove_work(args: argparse.Namespace, output: Path) -> None:
    """Take away what a streamed sweep kept to continue; nothing where there was none."""
    if args.stream:
        discard(_work(output))
        discard(_repairs(output))


def clear_output(args: argparse.Namespace, file: bool = False) -> Path:
    """As `output_path`; of a command that was killed when its output was whole, what it kept to continue goes first.

    Work that is younger than the output is left: it is that of another command, with `--overwrite`, which may go on.

    Args:
        args: As the parser has them.
        file: As there.

    Raises:
        ValueError: As there.
    """
    output = Path(args.output).expanduser()
    if output.exists() and not args.overwrite:
        for work in filter(Path.is_dir, (_work(output), _repairs(output))):
            with suppress(OSError):  # files go while somebody works there
                if max(each.stat().st_mtime_ns for each in (work, *work.rglob("*"))) <= output.stat().st_mtime_ns:
                    discard(work)
    return output_path(args, file)


def _work(output: Path) -> Path:
    return output.with_name(f"{output.name}.scoring")


def _repairs(output: Path) -> Path:
    return output.with_name(f"{output.name}.reconstructing")


def _place(args: argparse.Namespace) -> torch.device:
    return torch.device("cpu") if args.calibration_device == "cpu" else device()


def _inputs(args: argparse.Namespace, loss: str) -> tuple[Path, Path | None, Iterable[dict[str, Tensor]]]:
    """The checkpoint, that of the teacher where another one is asked, and batches of calibration text."""
    if loss not in CALIBRATION_LOSSES:
        raise ValueError(f"--loss {loss}: unknown; use one of {', '.join(CALIBRATION_LOSSES)}.")
    named = {"model": (args.model, args.revision)}
    if args.teacher is not None and loss == CALIBRATION_LOSS:
        named["teacher"] = (args.teacher, args.teacher_revision)
    if args.stream:  # what may be wrong with the text is known before weights are downloaded
        sources = _streamable(named)
        texts = read_documents(args)
        found = dict(zip(named, fetch_weights(*sources), strict=True))
    else:
        found = {name: find_checkpoint(*each) for name, each in named.items()}
        texts = read_documents(args)
    # Streamed weights are looked through when they are read.
    path, tokenizer = open_checkpoint(str(found["model"]), None, finite=not args.stream, encoder_decoder=True)
    teacher = found.get("teacher")
    if teacher is not None:
        check_teacher(teacher, load_config(path), tokenizer, finite=not args.stream)
    documents, _ = take_apart(texts, args.tokens, tokenizer, args.seed)
    if load_config(path).is_encoder_decoder:
        rows = take_rows(tokenize_pairs(documents, tokenizer, args.max_length), args.tokens, ("input_ids", "labels"))
    else:
        rows = take_rows(tokenize(documents, tokenizer, args.max_length, args.packing), args.tokens)
    return path, teacher, batches(rows, args.batch_size, tokenizer.pad_token_id or 0)


def _streamable(named: dict[str, tuple[str, str | None]]) -> list[LocalSource | HubSource]:
    """Checkpoints of which no weights are downloaded yet, all of families that can be streamed."""
    sources = [open_source(*each) for each in named.values()]
    for source in sources:
        config = load_config(source.folder)
        refuse_encoder_decoder(config, "--stream")
        family_of(config)
    return sources
