"""Train a stage in processes that `accelerate launch` starts, and wait for them; what each of them does is in `stage`.

The parent has checked the recipe and read the text. What it found goes over in a folder of the stage: the rows as a
saved dataset with their hashes, and where everything lies. It gets the log history back, and of a failure the cause.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from datasets import Dataset, load_from_disk
from pydantic import BaseModel, ConfigDict
from rich import get_console

from slimmoe_hf.atomic import write_text
from slimmoe_hf.data import dataset_hash
from slimmoe_hf.recipe import Recipe
from slimmoe_hf.yaml_files import read_yaml

FOLDER, HISTORY, LOG = "launched", "history.json", "log.txt"
_HANDOVER, _FAILURE = "handover.json", "failure-{}.txt"
_KINDS = ("NO", "MULTI_GPU", "FSDP")


class Handover(BaseModel):
    """What the processes of a stage are told beyond the recipe.

    Attributes:
        tokenizer: Folder that it is loaded from. teacher: Folder of the original model.
        dtype: What the model is saved in.
        processes: How many there are, over all.
        rows: SHA-256 of each dataset, as `dataset_hash` counts it.
    """

    model_config = ConfigDict(frozen=True)

    tokenizer: Path
    teacher: Path
    dtype: str
    processes: int
    rows: dict[str, str]

    def write(self, folder: Path, rows: dict[str, Dataset]) -> None:
        """Leave everything in a folder of its own; what was there is gone."""
        shutil.rmtree(folder, ignore_errors=True)
        for name, dataset in rows.items():
            dataset.save_to_disk(folder / name)
        write_text(folder / _HANDOVER, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> tuple[Handover, dict[str, Dataset]]:
        """What the parent left.

        Raises:
            ValueError: Nothing, or rows that are not those that it checked.
        """
        if not (folder / _HANDOVER).is_file():
            raise ValueError(f"{folder}: missing. Stages are started by `slimmoe run`, on a recipe with `accelerate:`.")
        found = cls.model_validate_json((folder / _HANDOVER).read_text())
        rows = {name: load_from_disk(folder / name) for name in found.rows}
        for name, dataset in rows.items():
            if dataset_hash(dataset) != found.rows[name]:
                raise ValueError(f"{folder / name}: not the rows that were checked. Give the same command again.")
        return found, rows


def processes_of(recipe: Recipe) -> int:
    """In how many processes the stages of a recipe train.

    Args:
        recipe: Without `accelerate`, they train in this one.

    Raises:
        ValueError: The config that it names is none, or one that a stage cannot be trained with.
    """
    if recipe.accelerate is None:
        return 1
    values, where = read_yaml(Path(recipe.accelerate)), f"{recipe.accelerate} (accelerate)"
    if not isinstance(values, dict) or "distributed_type" not in values:
        raise ValueError(
            f"{where}: no config of accelerate: it has no distributed_type. `accelerate config` writes one."
        )
    number, kind = values.get("num_processes"), str(values["distributed_type"])
    if not isinstance(values.get("fsdp_config") or {}, dict):
        raise ValueError(f"{where}: fsdp_config should be keys and values, found {values['fsdp_config']!r:.60}.")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{where}: num_processes is {number!r}. Write how many processes are to train, 1 or more.")
    if values.get("num_machines", 1) != 1:
        raise ValueError(f"{where}: num_machines is {values['num_machines']!r}; a run is on one machine. Write 1.")
    if kind == "MULTI_CPU":
        raise ValueError(
            f"{where}: accelerate starts one process only for distributed_type MULTI_CPU. Write MULTI_GPU with "
            "use_cpu: true."
        )
    if kind not in _KINDS:
        raise ValueError(f"{where}: distributed_type {kind} is not supported. Use one of {', '.join(_KINDS)}.")
    if kind == "FSDP" and str((values.get("fsdp_config") or {}).get("fsdp_version", 1)) != "2":
        raise ValueError(f"{where}: only FSDP2 shards the teacher too. Write fsdp_version: 2 into fsdp_config.")
    if kind == "FSDP" and recipe.teacher_memory is not None:
        raise ValueError(f"{where}: FSDP shards the teacher, so teacher_memory has no place. Leave one of them out.")
    if kind == "FSDP" and any(stage.distillation.get("optim") == "adafactor" for stage in recipe.stages):
        raise ValueError(
            f"{where}: adafactor cannot step on FSDP2's shards. Leave optim out: AdamW's states are shared too."
        )
    return number


def launch(config: str | Path, run: Path, number: int) -> None:
    """Start the processes of a stage and wait until all of them have ended.

    Args:
        config: Of `accelerate`.
        run: The run's folder, where the stage's handover lies.
        number: The stage, counted from 1.

    Raises:
        ChildProcessError: One of them failed; the message has the cause and names the log.
    """
    label = f"stage-{number}"
    folder = run / label / FOLDER
    for file in folder.glob(_FAILURE.format("*")):
        file.unlink()
    values: dict[str, Any] = read_yaml(Path(config))
    port = [] if values.get("main_process_port") else ["--main_process_port", "0"]  # 0 is any free one
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *port,
        "-m", "slimmoe_hf.stage", str(run), str(number),
    ]  # fmt: skip
    # accelerate's launcher of several processes does not pass `use_cpu` on
    cpu = {"ACCELERATE_USE_CPU": "true"} if values.get("use_cpu") else {}
    get_console().log(f"{label}: {values['num_processes']} processes, by accelerate launch")
    # The processes read their stdin: it ends when this process does, however that ends.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        encoding="utf-8", errors="replace", env={**os.environ, **cpu},
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            with (folder / LOG).open("w", encoding="utf-8") as log:
                _relay(process.stdout, log, label)
        finally:
            process.stdin.close()
    if process.returncode:
        raise ChildProcessError(
            f"{label}: {_cause(folder)} All they said is in {folder / LOG}; the same command continues."
        )


def report_failure(folder: Path, process: int, cause: str) -> None:
    """Leave for the parent why a process stopped.

    Args:
        folder: Of the handover.
        process: Its number.
        cause: One line.
    """
    (folder / _FAILURE.format(process)).write_text(cause, encoding="utf-8")


def _relay(output: IO[str], log: IO[str], label: str) -> None:
    """Everything into the log; what the first process says of the stage on the terminal too."""
    for line in output:
        log.write(line)
        log.flush()
        if line.startswith(label):
            get_console().log(line.rstrip(), markup=False, highlight=False)


def _cause(folder: Path) -> str:
    """Why the processes stopped: the others often fail of the first one's absence, so theirs is not told."""
    log = (folder / LOG).read_text(encoding="utf-8")
    killed = re.search(r"rank\s*: (\d+) [^\n]*\n\s*exitcode\s*: -9\b", log)  # in the report of torchrun
    if killed:
        return f"process {killed[1]} was ended by SIGKILL, as the system does for want of memory."
    files = sorted(folder.glob(_FAILURE.format("*")), key=lambda file: file.stat().st_mtime_ns)
    told = [(file.stem.rpartition("-")[2], file.read_text(encoding="utf-8").rstrip(".")) for file in files]
    for number, text in sorted(told, key=lambda one: "on another process" in one[1]):  # as the trainer says of a loss
        return f"process {number} stopped: {text}."
    telling = [line.strip() for line in log.splitlines() if re.match(r"[\w.]*Error\b", line.strip())]
    return f"the processes stopped: {telling[-1].rstrip('.') if telling else 'without a word'}."


def is_sharded(recipe: Recipe) -> bool:
    """Whether the stages' processes share student, optimizer and teacher (FSDP) rather than each hold their own."""
    return recipe.accelerate is not None and str(read_yaml(Path(recipe.accelerate))["distributed_type"]) == "FSDP"
