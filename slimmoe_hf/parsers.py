"""The flags of every command of `slimmoe`. Nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from slimmoe_hf.parser_parts import add_command, add_config, add_data, add_output, add_reconstruct, add_teacher
from slimmoe_hf.parsers_cut import add_merge, add_plan, add_score, add_slim
from slimmoe_hf.parsers_export import add_export

MACHINES = "A100-80GB, H100-80GB, A6000-48GB, 4090-24GB"

_DISTILLING = ("beta", "temperature", "loss_top_k", "distillation_weight", "crossentropy_weight")

# The training arguments that are flags of `distill`; every other one may stand in its --config.
TRAINING = {
    "max_steps": (int, "optimizer steps"),
    "num_train_epochs": (float, "passes over the data, where --max-steps is not given"),
    "learning_rate": (float, "peak learning rate"),
    "lr_scheduler_type": (str, "linear, cosine, constant, ..."),
    "warmup_steps": (float, "steps, or a share of all"),
    "per_device_train_batch_size": (int, "rows at a time"),
    "gradient_accumulation_steps": (int, "batches per optimizer step"),
    "save_steps": (int, "steps between checkpoints"),
    "beta": (float, "0 forward KL, 1 reverse KL, between them generalised JSD"),
    "temperature": (float, "of the distillation loss"),
    "loss_top_k": (int, "the teacher's likeliest tokens only; 0 is all"),
    "distillation_weight": (float, "weight of the divergence"),
    "crossentropy_weight": (float, "weight of the cross-entropy with the text"),
}
# Of `finetune`; every other argument of TRL's SFTConfig may stand in its --config.
FINETUNING = {
    **{name: value for name, value in TRAINING.items() if name not in _DISTILLING},
    "optim": (str, "adamw_torch_fused, adafactor, adamw_8bit, paged_adamw_8bit, ..."),
}


class _Parser(argparse.ArgumentParser):
    """Errors are raised, so that they end up in the one place that prints them."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; every command's epilog is an example."""
    parser = _Parser(prog="slimmoe", description="Slim Mixture-of-Experts language models and distil them back.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for add in (
        _add_env, _add_size, add_score, add_plan, add_slim, _add_distill, _add_run, _add_eval, _add_plot, _add_finetune,
        _add_push, _add_cache, add_merge, _add_compare, add_export,
    ):  # fmt: skip
        add(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_env(commands: Any) -> None:
    parser = add_command(commands, "env", "Show versions, threads, memory and devices.", "slimmoe env --json")
    parser.add_argument("--families", action="store_true", help="show what can be cut of which model family")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_size(commands: Any) -> None:
    parser = add_command(
        commands, "size", "Count a model and say what memory it takes, from its config.json alone.",
        "slimmoe size microsoft/Phi-3.5-MoE-instruct --target 7.6B --stages 2 --gpu 80GB 24GB",
    )  # fmt: skip
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder, a config.json or a Hub id")
    parser.add_argument("--revision", metavar="REV", help="commit of a model on the Hub")
    parser.add_argument("--expert-width", type=int, metavar="N", help="size the model cut to N neurons per expert")
    parser.add_argument("--kv-groups", type=int, metavar="N", help="and to N key/value groups per attention layer")
    parser.add_argument("--num-experts", type=int, metavar="N", help="and with N experts per layer")
    parser.add_argument("--target", metavar="SIZE", help="find the width for so many parameters: 7.6B, 3.8e9, 7600M")
    parser.add_argument("--stages", type=int, default=1, metavar="N", help="with --target: in N stages (default: 1)")
    gpus = ["80GB", "48GB", "24GB"]
    parser.add_argument("--gpu", nargs="+", default=gpus, metavar="GB", help=f"which GPUs (default: {' '.join(gpus)})")
    parser.add_argument("--length", type=int, default=4096, metavar="T", help="tokens per row (default: 4096)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="rows at a time (default: 1)")
    parser.add_argument("--dtype", metavar="DTYPE", help="of inference and frozen weights (default: the model's own)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_config(parser)


def _add_distill(commands: Any) -> None:
    parser = add_command(
        commands, "distill", "Train a slimmed model to speak as its teacher does.",
        "slimmoe distill --model slimmed --teacher examples/teacher/model --data sotu --max-length 256 \\\n"
        "      --max-steps 300 --learning-rate 1e-3 --output distilled",
    )  # fmt: skip
    parser.add_argument("--model", metavar="MODEL", help="the student: a folder or a Hub id")
    parser.add_argument("--revision", metavar="REV", help="commit of a student on the Hub")
    add_teacher(parser, "the original model")
    parser.add_argument("--teacher-cache", metavar="DIR", help="its answers, from slimmoe cache write, instead of it")
    add_data(parser, "train", None, "train on at most so many tokens of text")
    _add_training(parser, TRAINING, "DistillationConfig")
    add_output(parser, "DIR")
    add_config(parser)


def _add_training(parser: argparse.ArgumentParser, arguments: dict[str, tuple[Any, str]], config: str) -> None:
    """The main training arguments; they have no defaults here, their config class has."""
    group = parser.add_argument_group("training", f"any other argument of {config} goes into --config")
    for name, (kind, help) in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=help)


def _add_run(commands: Any) -> None:
    parser = add_command(
        commands, "run", "Run a recipe: score, slim, distil and measure, stage by stage. The same command continues.",
        "slimmoe run examples/quickstart.yaml --output my-run",
    )  # fmt: skip
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file; see examples/quickstart.yaml")
    parser.add_argument("--config", metavar="YAML", help="the same as RECIPE")
    add_output(parser, "DIR")
    add_reconstruct(parser, "as the recipe says")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the plan of work, write nothing")
    parser.add_argument("--machine", metavar="NAME", help=f"with --dry-run, plan for another machine: {MACHINES}")


def _add_compare(commands: Any) -> None:
    parser = add_command(
        commands, "compare",
        "Compare ways to make a model smaller, at equal size and equal recovery. The same command continues.",
        "slimmoe compare examples/compare.yaml --output my-comparison",
    )  # fmt: skip
    parser.add_argument("grid", nargs="?", metavar="GRID", help="a YAML file; see examples/compare.yaml")
    add_output(parser, "DIR")
    parser.add_argument("--dry-run", action="store_true", help="check the grid, list its points, write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_eval(commands: Any) -> None:
    parser = add_command(
        commands, "eval", "Measure a checkpoint: held-out loss, agreement with a teacher, speed, memory, benchmark tasks.",
        "slimmoe eval my-run/model --data sotu --max-length 256 --teacher examples/teacher/model --json\n"
        "  slimmoe eval my-run --tasks arc_easy mmlu\n"
        "  slimmoe eval examples/teacher/model --tasks sotu_ending sotu_text --task-path examples/tasks",
    )  # fmt: skip
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder or a Hub id; of a finished run, its model")
    parser.add_argument("--revision", metavar="REV", help="commit of a model on the Hub")
    add_teacher(
        parser,
        "compare with this model: agreement on text, and the same tasks (default: none; of a run, tasks: its own)",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (default: 8)")
    add_data(parser, "test", None, "read documents up to so many tokens")
    group = parser.add_argument_group(
        "tasks",
        "of lm-evaluation-harness (pip install 'slimmoe_hf[eval]'). Of a finished run, its teacher is given the same ones,\n"
        "where it is here, and the results are added to its report and to what is published with its model.",
    )  # fmt: skip
    group.add_argument("--tasks", nargs="+", metavar="TASK", help="glue, super_glue, mmlu, arc_challenge, ...")
    group.add_argument(
        "--task-path", metavar="DIR", help="where task YAML files of your own are; functions that they name are run"
    )
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's own)")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N questions of every task")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_output(parser, "FILE")
    add_config(parser)


def _add_plot(commands: Any) -> None:
    parser = add_command(
        commands, "plot", "Draw what a run cut and how it recovered: PNG, and the data as JSON.",
        "slimmoe plot my-run\n  slimmoe plot run-a run-b run-c --output plots    # quality against size too",
    )  # fmt: skip
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of finished runs")
    add_output(parser, "DIR")
    parser.add_argument("--json", action="store_true", help="print the data instead of drawing it")


def _add_finetune(commands: Any) -> None:
    parser = add_command(
        commands, "finetune", "Fine-tune a model on chats, prompts with completions, or text, by LoRA or in full.",
        "slimmoe finetune microsoft/Phi-mini-MoE-instruct --data chats.jsonl --lora --output tuned",
    )  # fmt: skip
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder or a Hub id")
    parser.add_argument("--revision", metavar="REV", help="commit of a model on the Hub")
    group = parser.add_argument_group("what to train", "all weights, or with --lora an adapter")
    group.add_argument("--lora", action="store_true", help="train a LoRA adapter on attention and experts")
    group.add_argument("--rank", type=int, metavar="R", help="of the adapter (default: 16)")
    group.add_argument("--alpha", type=int, metavar="A", help="its scale (default: twice the rank)")
    group.add_argument("--router", action="store_true", help="adapt the routers too")
    group.add_argument("--no-experts", action="store_true", help="adapt the attention only")
    group.add_argument("--merge", action="store_true", help="write whole weights instead of the adapter")
    group.add_argument(
        "--dtype", metavar="DTYPE",
        help="hold weights in float32 or bfloat16 (default: float32; with --lora on a GPU as they are)",
    )  # fmt: skip
    add_data(parser, "train", None, "train on at most so many tokens of text")
    _add_training(parser, FINETUNING, "TRL's SFTConfig")
    add_output(parser, "DIR")
    add_config(parser)


def _add_push(commands: Any) -> None:
    parser = add_command(
        commands, "push", "Publish a finished run, or the folder of a model, on the Hub, with its card.",
        "slimmoe push my-run me/my-slim-model --private",
    )  # fmt: skip
    parser.add_argument("folder", nargs="?", metavar="DIR", help="a run's folder, or a model's")
    parser.add_argument("repo", nargs="?", metavar="REPO", help="owner/name on the Hub")
    parser.add_argument("--private", action="store_true", help="only you and your organisation can see it")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the original model (default: the run's own)")
    parser.add_argument("--license", metavar="ID", help="such as apache-2.0 (default: the original model's)")
    parser.add_argument("--branch", metavar="NAME", help="where to commit (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="say what would be pushed, and push nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace what the repository holds")


def _add_cache(commands: Any) -> None:
    parser = add_command(
        commands, "cache", "Write what a teacher answers to a text to disk, to distil without it; or look into a cache.",
        "slimmoe cache write examples/teacher/model --data sotu --max-length 256 --output answers\n"
        "  slimmoe cache write examples/teacher/model --data sotu --split train+validation ...    # distill evaluates too\n"
        "  slimmoe cache inspect answers --verify\n"
        "  torchrun --nproc-per-node 8 $(which slimmoe) cache write ...    # one teacher on each GPU",
    )  # fmt: skip
    parser.add_argument("inputs", nargs="*", metavar="write MODEL | inspect DIR", help="a folder or a Hub id; a cache")
    parser.add_argument("--revision", metavar="REV", help="commit of a model on the Hub")
    group = parser.add_argument_group("what to keep")
    group.add_argument("--kind", default="top_k", choices=("top_k", "hidden"), help="hidden: the last hidden states")
    group.add_argument("--top-k", type=int, default=64, metavar="K", help="the likeliest tokens (default: 64)")
    group.add_argument(
        "--temperature", type=float, nargs="+", default=[1.0], metavar="T", help="to train at (default: 1.0)"
    )
    group.add_argument("--vocab-size", type=int, metavar="N", help="the first N ids only, for a student with fewer")
    group.add_argument("--shard-size", default="256MB", metavar="SIZE", help="most bytes in a file (default: 256MB)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts at a time (default: 8)")
    parser.add_argument(
        "--dtype", metavar="DTYPE", help="float32, bfloat16 or float16 (default: float32 on a CPU, else as it is)"
    )
    group = parser.add_argument_group("a teacher larger than memory")
    group.add_argument("--stream", action="store_true", help="hold one decoder layer in memory at a time")
    group.add_argument(
        "--stream-memory", metavar="SIZE", help="of what passes between layers together (default: half of what is free)"
    )
    add_data(parser, "train", None, "answer at most so many tokens of text, those that distill takes")
    parser.add_argument("--verify", action="store_true", help="with inspect: compare the hashes of all files")
    parser.add_argument("--json", action="store_true", help="with inspect: print JSON")
    add_output(parser, "DIR")
    add_config(parser)
