"""The folder of a run: whose it is, who is working in it, and which steps it has finished."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich import get_console

from slimmoe_hf.atomic import PARTIAL, write_text
from slimmoe_hf.loading import files_sha256
from slimmoe_hf.recipe import parse_any_recipe
from slimmoe_hf.schema import Document
from slimmoe_hf.stored_recipe import changed_defaults, read_stored

RECIPE, STEPS, REPORT, LOCK = "recipe.yaml", "steps.json", "report.json", ".lock"
CACHE = "teacher-cache"
_VERSION = 1
State = Literal["new", "unfinished", "finished"]
Result = dict[str, Any]


class RunFolder:
    """An output folder in this process's hands.

    Attributes:
        path: The folder.
        state: `new` (nothing there), `unfinished` or `finished` (a run of the same recipe).
    """

    def __init__(self, path: Path, state: State, lock: FileLock) -> None:
        self.path = path
        self.state = state
        self._lock = lock
        self._steps: dict[str, dict[str, Any]] = {}
        self._inputs: dict[str, str] = {}
        self._threads = 0

    def begin(self, recipe: Document, inputs: dict[str, str], threads: int) -> None:
        """Create the folder, or continue in it.

        Args:
            recipe: Stored as `recipe.yaml`.
            inputs: Names and hashes of what the run reads: it only continues on the same.
            threads: CPU threads where they decide the last digits of the weights, 0 where a GPU computes.

        Raises:
            ValueError: The model, the data or the number of threads has changed since the run began.
        """
        if self.state == "unfinished":
            content = self._load()
            self._steps = content["steps"]
            changed = [name for name in inputs if content["inputs"].get(name) != inputs[name]]
            if changed:
                raise ValueError(
                    f"{self.path}: the {changed[0]} changed since this run began. Bring back what it was, give another "
                    "--output, or --overwrite to start over."
                )
            if 0 < content["threads"] != threads > 0:
                raise ValueError(
                    f"{self.path}: this run began on {content['threads']} CPU threads and would continue on {threads}, with "
                    f"other weights. Set OMP_NUM_THREADS={content['threads']}, or --overwrite to start over."
                )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            _acquire(self._lock, self.path)
            folder_state(self.path, recipe, overwrite=True)
            for entry in self.path.iterdir():
                if entry.name != LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._inputs, self._threads = inputs, threads
        self._save()
        write_text(self.path / RECIPE, recipe.to_yaml())

    def step(self, name: str, outputs: Sequence[str], work: Callable[[], Result]) -> Result:
        """Do a step once; a step that is recorded, with its outputs intact, gives its recorded result.

        Args:
            name: Unique in the run.
            outputs: Files and folders that `work` leaves, relative to the run's folder.
            work: Does it, and returns what to remember, as JSON.
        """
        record = self._steps.get(name)
        if record is not None and record["outputs"] == self._hashes(outputs):
            get_console().log(f"{name}: reused (done in {record['seconds']:.0f} s by an earlier call)")
            return dict(record["result"])
        names = list(self._steps)
        later = names[names.index(name) :] if name in names else []
        self._steps = {key: value for key, value in self._steps.items() if key not in later}
        started = time.perf_counter()
        get_console().log(f"{name} ...")
        result = work()
        seconds = round(time.perf_counter() - started, 3)
        self._steps[name] = {"seconds": seconds, "outputs": self._hashes(outputs), "result": result}
        self._save()
        get_console().log(f"{name}: done in {seconds:.0f} s")
        return result

    def seconds(self) -> float:
        """Time that the finished steps took, over all calls."""
        return float(sum(record["seconds"] for record in self._steps.values()))

    def _hashes(self, outputs: Sequence[str]) -> dict[str, str]:
        """Hashes of all files of some outputs; a missing output has none, so it never equals a record."""
        found = {}
        for output in outputs:
            path = self.path / output
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    found[str(file.relative_to(self.path))] = files_sha256([file])
        return found

    def _load(self) -> dict[str, Any]:
        try:
            content = json.loads((self.path / STEPS).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path / STEPS}: damaged ({error}). Start over with --overwrite.") from None
        if not isinstance(content, dict) or content.get("version") != _VERSION:
            raise ValueError(f"{self.path / STEPS}: written by another version. Start over with --overwrite.")
        return content

    def _save(self) -> None:
        content = {"version": _VERSION, "inputs": self._inputs, "threads": self._threads, "steps": self._steps}
        write_text(self.path / STEPS, json.dumps(content, indent=2) + "\n")


@contextmanager
def claim(path: Path, recipe: Document, overwrite: bool = False) -> Iterator[RunFolder]:
    """Take an output folder for one process; nothing is written before `RunFolder.begin`.

    Args:
        path: The folder.
        recipe: What is to be run.
        overwrite: Start over in a folder that holds a run, of whatever recipe.

    Raises:
        ValueError: Another process works there, it holds another recipe's run, or something that is no run at all.
    """
    state = folder_state(path, recipe, overwrite)
    lock = FileLock(path / LOCK)
    try:
        if path.is_dir() and (path / RECIPE).exists():
            _acquire(lock, path)
            state = folder_state(path, recipe, overwrite)
        yield RunFolder(path, state, lock)
    finally:
        lock.release()


def folder_state(path: Path, recipe: Document, overwrite: bool = False) -> State:
    """Which of the four kinds of output folder this is; the fourth, anything else, is an error.

    Raises:
        ValueError: It is a file, holds another recipe's run, or something that is no run at all.
    """
    if not path.exists():
        return "new"
    if not path.is_dir():
        raise ValueError(f"{path}: is a file. Give --output a folder.")
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(PARTIAL)}
    if names <= {LOCK, STEPS}:
        return "new"
    if not {RECIPE, STEPS} <= names:
        raise ValueError(f"{path}: holds files that are no run of slimmoe; they are left alone. Give another --output.")
    if overwrite:
        return "new"
    theirs = parse_any_recipe(read_stored(path / RECIPE), str(path / RECIPE))
    if differences := recipe.differences(theirs):
        shown = ", ".join(differences[:3]) + (f" and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise ValueError(
            f"{path}: holds a run of another recipe (it differs in {shown}). Give another --output, or --overwrite "
            f"to start over{changed_defaults(differences, theirs)}."
        )
    return "finished" if REPORT in names else "unfinished"


def _acquire(lock: FileLock, path: Path) -> None:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"{path}: locked: another slimmoe run is working there. Wait for it, or give another --output."
        ) from None
