"""What `slimmoe merge` does: score a model, average its experts into fewer, write the checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from slimmoe_hf.atomic import replacing
from slimmoe_hf.checkpoint import carry, slim_checkpoint
from slimmoe_hf.command_inputs import output_path, refuse_source, require, say, size_of
from slimmoe_hf.defaults import NO_LOSS, reconstructs
from slimmoe_hf.describe import describe_plan
from slimmoe_hf.families import family_of, shape_of
from slimmoe_hf.loading import find_checkpoint, load_config, load_model
from slimmoe_hf.merged_forms import share_merged
from slimmoe_hf.merging import GROUPINGS, SIMILARITIES, Counts, plan_merge
from slimmoe_hf.plan import CompressionPlan, Target, validate_target
from slimmoe_hf.preflight import dtype_name
from slimmoe_hf.reconstruction import reconstruct
from slimmoe_hf.scoring import scored_model
from slimmoe_hf.sizing import own_dtype

_NEXT = {
    "uniform": "verified; next: slimmoe distill --model {output} --teacher {model} ...",
    "duplicate": "every merged expert in the place of all its members, verified",
    "indirect": "shared; import slimmoe_hf and from_pretrained loads it, slimmoe export {output} --form duplicate makes a "
    "stock one",
}
"""What is said of each form."""


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
    path = find_checkpoint(args.model, args.revision)
    refuse_source(path, output)
    config = load_config(path)
    form = args.form or ("indirect" if family_of(config).encoder_decoder and not args.uniform else "uniform")
    counts: Counts = "uniform" if args.uniform or form == "uniform" else "adaptive"
    most = shape_of(config).num_experts
    if counts == "uniform":
        validate_target(config, Target(num_experts=args.num_experts))
    if not 1 <= args.num_experts < most:
        raise ValueError(
            f"--num-experts {args.num_experts}: the model has {most} a layer. Ask for fewer, and at least 1."
        )
    model, stats, given = scored_model(args, args.loss or NO_LOSS, expert_outputs=args.similarity == "outputs")
    plan = plan_merge(
        model, stats, args.num_experts, counts=counts, similarity=args.similarity, grouping=args.grouping,
        reference=args.reference, seed=args.seed,
    )  # fmt: skip
    if reconstructs(args.reconstruct):
        plan = reconstruct(model, given, plan, dtype=own_dtype(config))
    del model
    if form == "indirect":
        _write_indirect(path, plan, output, args.overwrite)
    else:
        slim_checkpoint(
            args.model, plan, output, revision=args.revision, shard_bytes=size, overwrite=args.overwrite,
            duplicate=form == "duplicate",
        )  # fmt: skip
        plan.save(output / "plan")
    Console().print(describe_plan(plan), highlight=False, soft_wrap=True)
    mean = " on average" if plan.adaptive else ""
    say(f"{output}: {plan.meta.target}{mean}, {_NEXT[form].format(output=output, model=args.model)}")


def _write_indirect(source: Path, plan: CompressionPlan, output: Path, overwrite: bool) -> None:
    """The model in its own dtype, whatever it was scored in, its experts merged and shared."""
    model = share_merged(load_model(source, dtype_name(load_config(source)), whole=True), plan)
    with replacing(output, overwrite) as partial:
        model.save_pretrained(partial)
        carry(source, partial)
        plan.save(partial / "plan")
