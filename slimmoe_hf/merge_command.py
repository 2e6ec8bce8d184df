"""What `slimmoe merge` does: score a model, average its experts into fewer, write the checkpoint."""

from __future__ import annotations

import argparse

import rich
from rich.console import Console

from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.command_inputs import output_path, require, size_of
from slimmoe_hf.describe import describe_plan
from slimmoe_hf.families import shape_of
from slimmoe_hf.loading import find_checkpoint, load_config
from slimmoe_hf.merging import GROUPINGS, SIMILARITIES, plan_merge
from slimmoe_hf.plan import Target, validate_target
from slimmoe_hf.scoring import scored_model


def merge(args: argparse.Namespace) -> None:
    """A checkpoint, text and a number of experts in, a checkpoint with so many merged experts out.

    Args:
        args: As the parser has them.

    Raises:
        ValueError: A number of experts that the model cannot take, an unknown name, or as `slim_checkpoint`.
    """
    require(args, "model", "data", "num_experts", "output")
    output, size = output_path(args), size_of(args, "shard_size")
    for flag, given, known in (("similarity", args.similarity, SIMILARITIES), ("grouping", args.grouping, GROUPINGS)):
        if given not in known:
            raise ValueError(f"--{flag} {given}: unknown; use one of {', '.join(known)}.")
    config = load_config(find_checkpoint(args.model, args.revision))
    if validate_target(config, Target(num_experts=args.num_experts)).num_experts == shape_of(config).num_experts:
        raise ValueError(f"--num-experts {args.num_experts}: the model has no more. Ask for fewer.")
    model, stats = scored_model(args, expert_outputs=args.similarity == "outputs")
    plan = plan_merge(
        model, stats, args.num_experts, similarity=args.similarity, grouping=args.grouping, reference=args.reference
    )
    del model
    slim_checkpoint(
        args.model, plan, output, revision=args.revision, shard_bytes=size, overwrite=args.overwrite,
    )  # fmt: skip
    plan.save(output / "plan")
    Console().print(describe_plan(plan), highlight=False, soft_wrap=True)
    rich.print(
        f"{output}: {plan.meta.target}, verified; next: slimmoe distill --model {output} --teacher {args.model} ..."
    )
