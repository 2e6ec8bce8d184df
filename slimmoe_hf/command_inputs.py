"""What commands share: their required flags, the place they write to, the checkpoint and the text they read."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from slimmoe_hf.atomic import refuse_existing, write_text
from slimmoe_hf.data import load_documents, take_tokens, tokenize
from slimmoe_hf.families import family_of, refuse_encoder_decoder
from slimmoe_hf.free_memory import memory_bytes
from slimmoe_hf.loading import find_checkpoint, load_config, load_tokenizer, verify_checkpoint
from slimmoe_hf.plan import Target
from slimmoe_hf.preflight import check_vocabulary

_OURS = ("config.json", "adapter_config.json", "plan.json", "manifest.json")
"""One of them is in every folder that a command writes."""


def require(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError if a command lacks an argument that it cannot do without."""
    missing = [name for name in names if getattr(args, name) is None]
    if missing:
        raise ValueError(f"{args.command} needs {', '.join(missing)} (see slimmoe {args.command} --help)")


def output_path(args: argparse.Namespace, file: bool = False) -> Path:
    """The place to write to, refused before any work if something is there that may not be replaced.

    Args:
        args: With `output` and `overwrite`.
        file: What is to be written is a file; otherwise a folder.

    Raises:
        ValueError: Something is there; with `--overwrite`, something that none of our commands wrote.
    """
    path = Path(args.output).expanduser()
    if not args.overwrite:
        refuse_existing(path)
    elif path.is_symlink():
        raise ValueError(f"{path}: a link, which --overwrite does not follow. Give --output the place itself.")
    elif file and path.is_dir():
        raise ValueError(f"{path}: is a folder. Give --output a file.")
    elif not file and path.is_file():
        raise ValueError(f"{path}: is a file. Give --output a folder.")
    elif path.is_dir() and any(path.iterdir()) and not any((path / name).is_file() for name in _OURS):
        raise ValueError(f"{path}: holds files that slimmoe did not write; they are left alone. Give another --output.")
    return path


def open_checkpoint(
    model: str, revision: str | None, finite: bool = True, encoder_decoder: bool = False, shared: bool = False
) -> tuple[Path, PreTrainedTokenizerBase]:
    """A checkpoint that has been looked through, and its tokenizer.

    Args:
        model: A folder or a Hub id.
        revision: A commit of the Hub id.
        finite: Look at its values too.
        encoder_decoder: Whether what is asked can be done with one.
        shared: Whether it can be done with experts that are merged and shared.

    Raises:
        ValueError: It cannot, or the checkpoint is damaged or of an unknown family.
    """
    path = find_checkpoint(model, revision)
    config = load_config(path, shared)
    family_of(config)
    if not encoder_decoder:
        refuse_encoder_decoder(config, "this")
    verify_checkpoint(path, finite, shared)
    tokenizer = load_tokenizer(path)
    check_vocabulary(config, tokenizer, path)
    return path, tokenizer


def read_documents(args: argparse.Namespace) -> Dataset:
    """The documents that `--data`, `--split` and `--data-revision` name."""
    return load_documents(args.data, args.split, args.data_revision)


def training_rows(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The tokenised rows that a training with these data flags sees."""
    documents = read_documents(args)
    if args.tokens is not None:
        documents = take_tokens(documents.shuffle(seed=args.seed), args.tokens, tokenizer)
    return tokenize(documents, tokenizer, args.max_length, args.packing)


def size_of(args: argparse.Namespace, name: str) -> int:
    """A flag such as `--shard-size` as a number of bytes."""
    text = vars(args)[name]
    try:
        return memory_bytes(text)
    except ValueError:
        raise ValueError(f"--{name.replace('_', '-')} {text}: not a size. Write it as 500MB or 1GB.") from None


def target_of(args: argparse.Namespace) -> Target:
    """The sizes that `--expert-width`, `--kv-groups` and `--num-experts` ask for."""
    return Target(**{name: getattr(args, name) for name in Target.model_fields})


def same_request(checkpoints: Path, request: dict[str, Any], overwrite: bool) -> None:
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


def refuse_source(source: Path, output: Path) -> None:
    """Raise ValueError if what is to be written would replace what is read."""
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{output}: is the model itself, or holds it. Give another place to write to.")


def say(text: str) -> None:
    """A command's last word, on as many lines as it has: what it tells to run next can be copied."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(values: Any) -> None:
    """An answer for scripts, on stdout."""
    sys.stdout.write(json.dumps(values, indent=2) + "\n")
