"""Benchmark tasks of lm-evaluation-harness on a checkpoint: GLUE, SuperGLUE, MMLU, ARC, ..., and tasks of your own.

The harness does the prompting and scoring; what it scores is a model that `load_model` has checked weight by weight. It
is an extra, `pip install 'slimmoe_hf[eval]'`, and imported only when a task is asked for.

A task of your own is a YAML file in the harness's format, in the folder given as `task_path`. It may read a local file
(`dataset_path: json`), whose relative path is looked up in that folder first, then in the current one. Such a file can
name Python functions beside it, which are then run: use only those that you trust.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from rich import get_console
from transformers import set_seed

from slimmoe_hf.families import refuse_encoder_decoder
from slimmoe_hf.loading import load_config, load_model, load_tokenizer

SPELLINGS = {
    "arc": "ai2_arc",  # arc_easy and arc_challenge
    "super_glue": "super-glue-lm-eval-v1",
    "superglue": "super-glue-lm-eval-v1",
}
"""What benchmarks are commonly called, where the harness has another name. Case and hyphens do not matter: GLUE, MMLU,
HellaSwag and ARC-Challenge are found as they are."""

_LOCAL = ("json", "csv", "parquet", "arrow", "text", "pandas", "webdataset")  # loaders of files, not ids of datasets
_LOUD = ("lm_eval", "huggingface_hub", "datasets", "evaluate")  # loggers that warn of what the answer says
_BOOTSTRAP = 1000  # resamples for standard errors that have no formula (our choice; the harness's 100,000 take minutes)


class TaskResult(BaseModel):
    """One number that a task gave.

    Attributes:
        task: The harness's name of the task or group. group: The group that it was run as a part of.
        metric: Such as `acc`; with the answer filter, where the task has several: `exact_match,strict-match`.
        value: As the harness reports it: accuracies are shares, not percentages. stderr: Its standard error.
        num_fewshot: Examples in the prompt. limit: Only the first so many questions of every task, or None for all.
        samples: Questions that were asked.
        higher_is_better: Which way is up.
        dataset: Id of a dataset on the Hub; None for local files and groups. dataset_revision: Its commit, if known.
        version: The task's, in the harness. harness: Which harness.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    metric: str
    value: float
    stderr: float | None = None
    num_fewshot: int = 0
    limit: int | None = None
    higher_is_better: bool | None = None
    dataset: str | None = None
    dataset_revision: str | None = None
    version: str = ""
    group: str | None = None
    samples: int | None = None
    harness: str = ""

    def same_question(self, other: TaskResult) -> bool:
        """Whether the other is a result of the same task, metric and settings."""
        mine = (self.task, self.metric, self.num_fewshot, self.limit)
        return mine == (other.task, other.metric, other.num_fewshot, other.limit)


@dataclass(frozen=True)
class TaskSet:
    """Tasks with their datasets, ready to be put to any number of models. `load_tasks` makes one.

    Attributes:
        roots: The harness's tasks and groups. manager: What loaded them.
        num_fewshot, limit: As `load_tasks` was told.
    """

    roots: list[Any]
    manager: Any
    num_fewshot: int | None
    limit: int | None

    def run(
        self,
        model_path: Path,
        batch_size: int = 8,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        progress: bool = True,
    ) -> list[TaskResult]:
        """Put the tasks to a model; no chat template, no code from the Hub.

        Args:
            model_path: Folder of a checkpoint.
            batch_size: Rows at a time.
            device: Where to run.
            dtype: What to compute in, whatever the weights are stored in.
            progress: Show the harness's progress bars, on a terminal.

        Returns:
            Every group followed by its members, in the order asked for.

        Raises:
            ValueError: The harness cannot run a task.
        """
        refuse_encoder_decoder(load_config(model_path, shared=True), "a task of the harness")
        model, tokenizer = load_model(model_path, dtype, device), load_tokenizer(model_path)
        with _quiet(progress and get_console().is_terminal):
            from lm_eval import evaluate
            from lm_eval.models.huggingface import HFLM

            tasks = self._seeded()
            try:
                found = evaluate(
                    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                    tasks, limit=self.limit, bootstrap_iters=_BOOTSTRAP, log_samples=False,
                )  # fmt: skip
            except Exception as error:  # a task may be anybody's YAML and code
                raise ValueError(f"tasks: the harness stopped: {_reason(error)}") from error
        assert found is not None  # None only in processes other than the first
        datasets = {task.task_name: _dataset(task) for task in _leaves(self.roots)}
        order = dict.fromkeys(_order(self.roots))
        return [result for name, group in order for result in self._results(name, group, found, datasets)]

    def _seeded(self) -> Any:
        """The tasks as the harness takes them: prompts and seeds as its `simple_evaluate` sets them.

        That function itself also asks the Hub for the model, `git` for the current folder and the machine for all
        that is installed.
        """
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        _seed()
        tasks = self.manager.load(list(self.roots))
        for task in tasks["tasks"].values():
            own = task.config.num_fewshot
            if own is None or (own != 0 and self.num_fewshot is not None):
                task.set_config("num_fewshot", self.num_fewshot or 0)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        return tasks

    def _results(
        self, name: str, group: str | None, found: Any, datasets: dict[str, tuple[str | None, str | None]]
    ) -> list[TaskResult]:
        """The numbers of one task or group; a group that its makers do not aggregate has none."""
        values = found["results"].get(name, {})
        dataset, revision = datasets.get(name, (None, None))
        results = []
        for key, value in values.items():
            metric, comma, answer_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                get_console().log(f"task {name}: {metric} is {value}, which is no result; left out", markup=False)
                continue
            stderr = values.get(f"{metric}_stderr,{answer_filter}")
            results.append(
                TaskResult(
                    task=name,
                    metric=metric if answer_filter == "none" else key,
                    value=value,
                    stderr=stderr if isinstance(stderr, int | float) else None,
                    num_fewshot=int(found["n-shot"].get(name) or 0),
                    limit=self.limit,
                    higher_is_better=found["higher_is_better"].get(name, {}).get(metric),
                    dataset=dataset,
                    dataset_revision=revision,
                    version=str(found["versions"].get(name, "")),
                    group=group,
                    samples=values.get("sample_len"),
                    harness=f"lm_eval {version('lm_eval')}",
                )
            )
        return results


def run_tasks(
    model_path: Path,
    tasks: Sequence[str],
    task_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    progress: bool = True,
) -> list[TaskResult]:
    """Put tasks to a model: `load_tasks`, then `TaskSet.run`, which say what the arguments are."""
    return load_tasks(tasks, task_path, num_fewshot, limit).run(model_path, batch_size, device, dtype, progress)


def load_tasks(
    names: Sequence[str], task_path: Path | None = None, num_fewshot: int | None = None, limit: int | None = None
) -> TaskSet:
    """Find tasks by name and load their datasets, before any model is loaded.

    Args:
        names: Tasks, groups and tags of the harness, in its spelling or the common one (`SPELLINGS`), or of `task_path`.
        task_path: Folder of task YAML files of your own. They win over the harness's of the same name, and where all
            tasks come from there, no network is needed.
        num_fewshot: Examples in the prompt; None is the task's own number. Tasks that insist on none keep it.
        limit: Only the first so many questions of every task.

    Raises:
        ValueError: The harness is not installed, there is no such task, or its dataset cannot be had.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot={num_fewshot} should be 0 or more.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} should be 1 or more.")
    if task_path is not None:
        task_path = task_path.expanduser().resolve()
        if not task_path.is_dir():
            raise ValueError(f"{task_path}: no such folder of task YAML files.")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError("tasks need lm-evaluation-harness: pip install 'slimmoe_hf[eval]'") from None
    with _quiet(shown=False):
        _seed()
        manager = _manager(names, task_path)
        known = [_known(name, manager, task_path) for name in dict.fromkeys(names)]
        roots = [root for name in dict.fromkeys(known) for root in _load(manager, name, task_path)]
    for task in _leaves(roots):
        if task.config.unsafe_code:
            raise ValueError(f"task {task.task_name}: runs code that the model writes; such tasks are not run here.")
    return TaskSet(roots, manager, num_fewshot, limit)


def _seed() -> None:
    """As the harness does before it loads tasks, some of which shuffle their answers."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    set_seed(DEFAULT_OTHER_SEED)
    random.seed(DEFAULT_RANDOM_SEED)


def _manager(names: Sequence[str], task_path: Path | None) -> Any:
    """The index of tasks; the harness's own, 14,000 of them, is read only if something is not in `task_path`."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=task_path, include_defaults=False)
    if not all(_is_whole(name, manager.task_index) for name in names):
        for name, entry in _built_in().items():
            manager.task_index.setdefault(name, entry)
    return manager


def _is_whole(name: str, index: Mapping[str, Any]) -> bool:
    """Whether a task is there, and of a group every member."""
    if name not in index:
        return False
    config = index[name].cfg or {}
    members = config["task"] if "group" in config else []
    return all(isinstance(member, str) and _is_whole(member, index) for member in members)


@functools.cache
def _built_in() -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


def _known(name: str, manager: Any, task_path: Path | None) -> str:
    """The harness's spelling of a name."""
    plain = name.lower().replace("-", "_")
    for spelling in (name, name.lower(), SPELLINGS.get(plain, plain)):
        if spelling in manager.task_index:
            return spelling
    near = difflib.get_close_matches(plain, [*manager.task_index, *SPELLINGS], n=3, cutoff=0.6)
    if near:
        raise ValueError(f"{name}: no such task; did you mean {', '.join(near)}?")
    own = ""
    if task_path is not None:
        entries = [entry for entry in manager.task_index.values() if entry.yaml_path is not None]
        names = sorted(entry.name for entry in entries if task_path in entry.yaml_path.parents)
        own = f" {task_path} has {', '.join(names[:8]) or 'no readable task YAML'}."
    raise ValueError(f"{name}: no such task.{own}")


def _load(manager: Any, name: str, task_path: Path | None) -> list[Any]:
    """A task, a group, or the tasks of a tag, with their datasets."""
    before = Path.cwd()
    places = [before] if task_path is None else [task_path, before]
    for place in places:
        os.chdir(place)  # `datasets` looks a relative file up in the current folder, and nowhere else
        try:
            loaded = manager.load([name])
            break
        except Exception as error:  # the Hub, `datasets`, or anybody's YAML and code
            if isinstance(error, FileNotFoundError) and place != places[-1]:
                continue
            what = "its data cannot be had" if isinstance(error, OSError) else "cannot be loaded"
            raise ValueError(f"task {name}: {what}: {_reason(error)}") from error
        finally:
            os.chdir(before)
    groups, tasks = loaded["groups"], loaded["tasks"]
    return [groups[name]] if name in groups else list(tasks.values())


def _leaves(roots: Sequence[Any]) -> list[Any]:
    """All tasks, those of groups too."""
    from lm_eval.api.group import Group

    return [task for root in roots for task in (root.get_all_tasks() if isinstance(root, Group) else [root])]


def _order(roots: Sequence[Any], group: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Names of tasks and groups with the group around them: a group, then its members."""
    from lm_eval.api.group import Group

    for root in roots:
        if isinstance(root, Group):
            yield root.name, group
            yield from _order(list(root), root.name)
        else:
            yield root.task_name, group


def _dataset(task: Any) -> tuple[str | None, str | None]:
    """Hub id and commit of a task's dataset; a commit that the task does not name is read off what was downloaded."""
    name = task.config.dataset_path
    if name is None or name in _LOCAL or Path(name).exists():
        return None, None
    revision = (task.config.dataset_kwargs or {}).get("revision")
    splits = task.dataset.values() if isinstance(task.dataset, dict) else []
    files = [file for split in splits for file in split.info.download_checksums or ()]
    commits = [found[1] for file in files if (found := re.search(r"@([0-9a-f]{40})/", str(file)))]
    return name, revision or next(iter(commits), None)


def _reason(error: Exception) -> str:
    """The first line of an error, with its kind where the line alone says little (`KeyError: 'choices'`)."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line if isinstance(error, OSError | ValueError) and line else f"{type(error).__name__}: {line}"


@contextmanager
def _quiet(shown: bool) -> Iterator[None]:
    """Keep the harness off stdout, which is for answers, and off stderr unless its progress bars are to be shown."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _LOUD)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            if not shown:
                stack.enter_context(redirect_stderr(nowhere))
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
