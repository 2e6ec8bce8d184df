"""Tiny distillation runs for the tests: data of unequal length, quiet settings, child processes that may be killed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from slimmoe_hf.arguments import DistillationConfig
from slimmoe_hf.cache_answers import write_cache
from slimmoe_hf.trainer import DistillationTrainer


def unequal_rows(count: int = 8, seed: int = 0, shortest: int = 5, longest: int = 30) -> Dataset:
    """Rows of random tokens, no two of one length in a row, some of their tokens not trained on."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = shortest + (index * 7) % (longest - shortest)
        ids = torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (index % 4) + ids[index % 4 :]})
    return Dataset.from_list(rows)


def settings(folder: Path, **overrides: Any) -> DistillationConfig:
    """Two steps over eight rows, float32, nothing printed."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "gradient_checkpointing": False, "max_length": 64,
    }  # fmt: skip
    return DistillationConfig(**{"output_dir": str(folder), **defaults, **overrides})


def trainer_for(
    folder: Path, family: str = "mixtral", student: PreTrainedModel | None = None, **overrides: Any
) -> DistillationTrainer:
    """A student and a teacher with different weights; keywords of the trainer are told from settings by name.

    `own_base=True`, or a `teacher_logits_path` that is not yet to be written, leaves the teacher out.
    """
    cached = "teacher_logits_path" in overrides and not overrides.get("precompute_teacher_logits")
    alone = overrides.pop("own_base", False) or cached
    own = {name: overrides.pop(name) for name in list(overrides) if name in TRAINER_KEYWORDS}
    own.setdefault("train_dataset", unequal_rows())
    if "labels" in (
        own["train_dataset"].column_names or ()
    ):  # nothing to prepare, and preparing takes most of the time
        overrides.setdefault("dataset_kwargs", {"skip_prepare_dataset": True})
    teacher = own.pop("teacher_model", None) or (None if alone else tiny_model(family, seed=1))
    return DistillationTrainer(
        student or tiny_model(family), teacher, settings(folder, **overrides), processing_class=tiny_tokenizer(), **own
    )


def cached(folder: Path, rows: Any = None, family: str = "mixtral", **settings: Any) -> str:
    """A cache of the answers of the teacher of `trainer_for`, every token of the vocabulary kept."""
    settings = {"top_k": VOCAB_SIZE, **settings}
    teacher = tiny_model(family, seed=1)
    write_cache(teacher, unequal_rows() if rows is None else rows, folder, tokenizer=tiny_tokenizer(), **settings)
    return str(folder)


_numbers = itertools.count(os.getpid())
TRAINER_KEYWORDS = (
    "teacher_model", "train_dataset", "eval_dataset", "callbacks", "peft_config", "compute_loss_func", "data_collator"
)  # fmt: skip


def in_child(function: Callable[..., None], *arguments: Any) -> int:
    """Run in a forked process, as good as a new one for a kill and without its imports; returns the exit code."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join(120)
    assert child.exitcode is not None, "the child did not end in 120 seconds"
    return child.exitcode


def in_two_processes(function: Callable[..., None], *arguments: Any) -> list[int]:
    """Run in two forked processes that find each other over gloo, as `torchrun` would start them."""
    port = _port()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_ranked, args=(rank, port, function, arguments)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    return [child.exitcode if child.exitcode is not None else -1 for child in children]


def _port() -> int:
    """One that is free and stays so until it is used: no socket is given one below 32,768 unasked, and no other worker's."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 10_000 + worker % 4 * 5_000 + next(_numbers) % 5_000
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _ranked(rank: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    function(*arguments)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads sometimes abort an orderly shutdown, long after all that is tested
