"""One process of a stage that is trained in several: `accelerate launch -m slimmoe_hf.stage RUN NUMBER`.

`launch` starts it. It trains as the pipeline does in its own process, with the same functions; the first process saves
the stage's model and leaves the log history.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import traceback
from pathlib import Path

import rich
import torch

from slimmoe_hf.atomic import replacing, write_text
from slimmoe_hf.commands import be_quiet
from slimmoe_hf.launch import FOLDER, HISTORY, Handover, report_failure
from slimmoe_hf.loading import load_tokenizer
from slimmoe_hf.preflight import stage_arguments
from slimmoe_hf.recipe import parse_recipe
from slimmoe_hf.rundir import RECIPE
from slimmoe_hf.student_training import distil, save_checkpoint
from slimmoe_hf.yaml_files import read_yaml


def train(run: Path, number: int) -> None:
    """Train a stage from its last complete checkpoint and save its model.

    Args:
        run: The run's folder.
        number: The stage, counted from 1.

    Raises:
        ValueError: No parent prepared it, or there are more or fewer processes than it asked for.
    """
    recipe = parse_recipe(read_yaml(run / RECIPE), str(run / RECIPE))
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    stage, folder = recipe.stages[number - 1], run / f"stage-{number}"
    told, rows = Handover.read(folder / FOLDER)
    arguments = stage_arguments(recipe, number - 1, run)
    if arguments.world_size != told.processes:
        raise ValueError(
            f"{recipe.accelerate}: asks for {told.processes} processes, and accelerate started {arguments.world_size}. "
            "Make its num_processes what this machine can run."
        )
    tokenizer = load_tokenizer(told.tokenizer)
    teacher = None if recipe.teacher_cache else told.teacher
    model, history = distil(
        folder / "slimmed", teacher, arguments, tokenizer, rows["train"], rows["validation"], folder.name,
        stage.training_dtype, recipe.teacher_memory,
    )  # fmt: skip
    if arguments.process_index == 0:
        with replacing(folder / "model", overwrite=True) as partial:
            save_checkpoint(model, tokenizer, partial, told.dtype)
        write_text(folder / FOLDER / HISTORY, json.dumps(history))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while the first still saves: its absence would pass for a failure


def main(arguments: list[str]) -> int:
    """Train; what goes wrong becomes one line for the parent.

    Args:
        arguments: Of the process: the run's folder and the stage's number.

    Returns:
        The exit code.
    """
    run, number = Path(arguments[0]), int(arguments[1])
    be_quiet()
    rich.reconfigure(stderr=True, width=200, log_time=False, log_path=False)
    _leave_with_parent()
    try:
        train(run, number)
    except Exception as error:
        kind = "" if isinstance(error, ValueError | OSError | ArithmeticError) else f"{type(error).__name__}: "
        cause = f"{kind}{' '.join(str(error).split())}"
        traceback.print_exc()
        report_failure(run / f"stage-{number}" / FOLDER, int(os.environ.get("RANK", "0")), cause)
        return 2
    return 0


def _leave_with_parent() -> None:
    """End with the parent, even a killed one: training on, this process would write where its successor writes."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=lambda: os._exit(3) if not os.read(0, 1) else None, daemon=True).start()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an orderly shutdown of gloo sometimes aborts, long after the work is done
