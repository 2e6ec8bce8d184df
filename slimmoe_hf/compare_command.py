"""What `slimmoe compare` does."""

from __future__ import annotations

import argparse

from rich.console import Console

from slimmoe_hf.command_inputs import print_json, require, say
from slimmoe_hf.compare_results import notes, shown
from slimmoe_hf.comparison import compare as compare_grid

_WIDTH = 100  # characters that a table takes; a terminal with fewer wraps its lines


def compare(args: argparse.Namespace) -> None:
    """A grid in, its tables out; the same command continues.

    Args:
        args: As the parser has them.

    Raises:
        ValueError: As `comparison.compare`.
    """
    require(args, "grid", "output")
    found = compare_grid(args.grid, args.output, args.overwrite, args.dry_run)
    if found is None:
        return
    if args.json:
        print_json(found.model_dump(mode="json"))
        return
    console = Console(width=max(Console().width, _WIDTH))
    console.print(shown(found))
    console.print(*notes(found), sep="\n", highlight=False, markup=False, soft_wrap=True)
    say(f"{args.output}: results.json, table.md and comparison.png")
