"""What `slimmoe plot` does."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from slimmoe_hf.atomic import refuse_existing
from slimmoe_hf.command_inputs import print_json


def plot(args: argparse.Namespace) -> None:
    """Folders of finished runs in, pictures out."""
    from slimmoe_hf.plots import draw, read  # matplotlib takes long to import

    runs = [Path(run).expanduser() for run in args.runs]
    if not runs:
        raise ValueError("plot needs the folder of a finished run (see slimmoe plot --help)")
    if args.json:
        print_json({name: picture.model_dump(mode="json") for name, picture in read(runs).items()})
        return
    if args.output is None and len(runs) > 1:
        raise ValueError("plot needs --output where there are several runs (see slimmoe plot --help)")
    output = Path(args.output).expanduser() if args.output is not None else runs[0] / "plots"
    if not args.overwrite:
        refuse_existing(output)
    for plot in draw(runs, output, args.overwrite):
        Console().print(f"{plot.png}: {plot.caption}", markup=False, highlight=False, soft_wrap=True)
