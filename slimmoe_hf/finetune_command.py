"""What `slimmoe finetune` does."""

from __future__ import annotations

import argparse

from rich.console import Console

from slimmoe_hf.command_inputs import output_path, require, say
from slimmoe_hf.finetune import finetune as run
from slimmoe_hf.finetune_report import shown
from slimmoe_hf.finetune_settings import Adapter


def finetune(args: argparse.Namespace) -> None:
    """A model and text in, an adapter or a better model out. The same command continues a stopped run."""
    require(args, "model", "data", "output")
    output = output_path(args)
    report = run(
        args.model, args.data, output, revision=args.revision, data_revision=args.data_revision, split=args.split,
        adapter=_adapter(args), merge=args.merge, dtype=args.dtype, max_length=args.max_length, packing=args.packing,
        tokens=args.tokens, seed=args.seed, overwrite=args.overwrite, training=args.training,
    )  # fmt: skip
    for part in shown(report):
        Console().print(part, highlight=False, soft_wrap=isinstance(part, str))
    what = "an adapter for PEFT" if args.lora and not args.merge else "whole weights"
    say(f"{output}: {what}, and finetune.json")


def _adapter(args: argparse.Namespace) -> Adapter | None:
    given = {"rank": args.rank, "alpha": args.alpha, "router": args.router or None, "merge": args.merge or None}
    given = {
        name: value for name, value in {**given, "no-experts": args.no_experts or None}.items() if value is not None
    }
    if not args.lora:
        if given:
            raise ValueError(f"--{next(iter(given))} is about an adapter: give --lora too, or leave it out.")
        return None
    return Adapter(
        rank=16 if args.rank is None else args.rank, alpha=args.alpha, experts=not args.no_experts, router=args.router
    )
