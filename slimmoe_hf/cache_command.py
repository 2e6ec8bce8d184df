"""What `slimmoe cache` does: write a teacher cache, or look into one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.cache_answers import write_cache
from slimmoe_hf.cache_writer import processes
from slimmoe_hf.command_inputs import output_path, print_json, require, say, size_of, training_rows
from slimmoe_hf.data import load_documents, tokenize
from slimmoe_hf.families import family_of, refuse_encoder_decoder
from slimmoe_hf.loading import load_config, load_tokenizer, verify_checkpoint
from slimmoe_hf.preflight import check_vocabulary
from slimmoe_hf.sources import fetch_weights, open_source

_DATA = ("data", "data_revision", "split", "max_length", "packing", "tokens", "seed")


def cache(args: argparse.Namespace) -> None:
    """A teacher and text in, its answers out; or what a cache holds."""
    what, *rest = args.inputs or [""]
    if what not in ("write", "inspect") or len(rest) != 1:
        raise ValueError(
            "cache takes write and a MODEL, or inspect and the folder of a cache (see slimmoe cache --help)"
        )
    if what == "write":
        _write(args, rest[0])
    else:
        _inspect(args, Path(rest[0]).expanduser())


def _write(args: argparse.Namespace, teacher: str) -> None:
    require(args, "data", "output")
    output, size = output_path(args), size_of(args, "shard_size")
    if args.stream_memory is not None and not args.stream:
        raise ValueError("--stream-memory says how much passes from layer to layer together: it goes with --stream.")
    if args.dtype is not None and args.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {args.dtype}: unknown; use float32, bfloat16 or float16.")
    source = open_source(teacher, args.revision)
    config, tokenizer = load_config(source.folder), load_tokenizer(source.folder)
    if args.stream:
        refuse_encoder_decoder(config, "a teacher cache")
        family_of(config)
    check_vocabulary(config, tokenizer, source.folder)
    rows = _rows(args, tokenizer)
    for path in fetch_weights(source):
        verify_checkpoint(path, finite=not args.stream)  # streamed weights are looked through when they are read
    done = write_cache(
        teacher, rows, output, tokenizer=tokenizer, revision=source.revision or args.revision, kind=args.kind,
        top_k=args.top_k, temperatures=args.temperature, vocab_size=args.vocab_size, batch_size=args.batch_size,
        dtype=args.dtype, shard_bytes=size, data={name: vars(args)[name] for name in _DATA}, overwrite=args.overwrite,
        stream=args.stream, stream_memory=None if args.stream_memory is None else size_of(args, "stream_memory"),
    )  # fmt: skip
    if processes().is_main_process:
        manifest = done.manifest
        say(
            f"{output}: answers to {manifest.texts + manifest.answers:,} tokens in {manifest.texts:,} texts, "
            f"{_size(done):,} bytes; look into it with: slimmoe cache inspect {output}"
        )


def _rows(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows that `distill` trains on, and those of further splits, whole, as it evaluates on them: `train+validation`."""
    first, *others = args.split.split("+")
    rows = [training_rows(argparse.Namespace(**vars(args) | {"split": first}), tokenizer)]
    for split in others:
        documents = load_documents(args.data, split, args.data_revision)
        rows.append(tokenize(documents, tokenizer, args.max_length, args.packing))
    return concatenate_datasets(rows)


def _inspect(args: argparse.Namespace, folder: Path) -> None:
    found = TeacherCache.open(folder)
    if args.verify:
        found.verify()
    manifest = found.manifest
    tokens = manifest.texts + manifest.answers
    values: dict[str, Any] = {
        **manifest.spec.model_dump(mode="json"),
        "texts": manifest.texts,
        "tokens": tokens,
        "answers": manifest.answers,
        "mean_tail_mass": manifest.mean_tail_mass,
        "shards": len(manifest.shards),
        "bytes": _size(found),
        "bytes_per_answer": manifest.spec.bytes_per_answer,
        "bytes_per_token": _size(found) / tokens,
        "hashes_verified": args.verify,
    }
    if args.json:
        print_json(values)
        return
    rows = Table(box=None, show_header=False)
    rows.add_column()
    rows.add_column(overflow="fold")
    data = {f"data: {name}": value for name, value in values.pop("data").items()}
    for name, value in {**values, **data}.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        shown = f"{value:.4g}" if isinstance(value, float) else shown
        if value not in (None, []):
            rows.add_row(name, ", ".join(map(str, value)) if isinstance(value, list) else str(shown))
    Console().print(rows)


def _size(found: TeacherCache) -> int:
    return sum(file.stat().st_size for file in found.folder.iterdir())
