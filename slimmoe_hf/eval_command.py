"""What `slimmoe eval` does."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from slimmoe_hf.command_inputs import open_checkpoint, print_json, read_documents, require
from slimmoe_hf.evaluation import evaluate_checkpoint, held_out, opening_prompts
from slimmoe_hf.families import family_of
from slimmoe_hf.loading import find_checkpoint, load_config, load_model
from slimmoe_hf.preflight import check_teacher, device


def evaluate(args: argparse.Namespace) -> None:
    """A checkpoint and text in, numbers out."""
    require(args, "model", "data")
    path, tokenizer = open_checkpoint(args.model, args.revision)
    family_of(load_config(path))
    teacher = None
    if args.teacher is not None:
        folder = find_checkpoint(args.teacher, args.teacher_revision)
        check_teacher(folder, load_config(path), tokenizer)
        teacher = load_model(folder, device=device())
    documents = read_documents(args)
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
        print_json(values)
        return
    rows = Table(box=None, show_header=False)
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if isinstance(value, float) else value
        if value is not None and name != "samples":
            rows.add_row(name, str(shown))
    Console().print(rows)
    Console().print(*found.samples, sep="\n", highlight=False, markup=False, soft_wrap=True)
