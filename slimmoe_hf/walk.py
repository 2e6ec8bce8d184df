"""Text walks through a model that does not fit in memory: all of it through one layer, then all of it through the next.

What passes between two layers lies in a folder: a file for the inputs of each layer, which has its name when it is
whole. So the files say how far a walk has come, and a killed one goes on with the layer that it was at.

Shape letters: B rows, T tokens of a row, D model width.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from slimmoe_hf.atomic import PARTIAL, flush_entry, write_text
from slimmoe_hf.blocks import EMBEDDINGS, REST, Blocks
from slimmoe_hf.identity import combined
from slimmoe_hf.loading import files_sha256, weight_files
from slimmoe_hf.pace import Pace

Batch = Mapping[str, Tensor]
_REQUEST, _SPENT, _LOCK = "request.json", "spent", ".lock"


def model_state(path: Path) -> list[Any]:
    """Which model the checkpoint in a folder is, its weights not read, as JSON has it."""
    weights = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weight_files(path)]
    return [*weights, files_sha256([path / "config.json"])]


class WalkFolder:
    """The folder of an unfinished walk, this process's alone while it is open."""

    def __init__(self, folder: Path, request: Mapping[str, Any], overwrite: bool = False) -> None:
        """Begin, or continue what was begun with the same request.

        Args:
            folder: Where what passes between layers is kept.
            request: What decides the result, as JSON has it.
            overwrite: Begin anew where another request's work is there.

        Raises:
            ValueError: What is there is of another request, or another process is at work on it.
        """
        self.path = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / _LOCK, blocking=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(f"{folder}: another process is at work there. Wait for it, or end it.") from None
        strange = [
            entry.name for entry in folder.iterdir() if entry.name.removeprefix(PARTIAL) not in (_REQUEST, _LOCK)
        ]
        if strange and not _is_ours(folder):
            self._lock.release()
            raise ValueError(f"{folder}: holds files that slimmoe did not write ({strange[0]}). Give another --output.")
        asked = json.loads(json.dumps(request))
        file = folder / _REQUEST
        begun = json.loads(file.read_text()) if file.exists() else None
        if begun == asked:
            return
        if begun is not None and not overwrite:
            differing = sorted(key for key in begun | asked if begun.get(key) != asked.get(key))
            self._lock.release()
            raise ValueError(
                f"{folder}: holds unfinished work of another request ({', '.join(differing)} differ). Give that one's "
                "arguments to continue it, --overwrite to start over, or another --output."
            )
        _empty(folder)
        write_text(file, json.dumps(asked))
        (folder / _SPENT).unlink(missing_ok=True)

    def __enter__(self) -> WalkFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.release()


def discard(folder: Path) -> None:
    """Take the folder of a walk away, if it is one."""
    if _is_ours(folder):
        _empty(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    return any((folder / name).exists() for name in (_REQUEST, _SPENT))


def _empty(folder: Path) -> None:
    """Leave nothing of a walk; killed on the way, what is left is continued by no request, and known for ours."""
    if (folder / _REQUEST).exists():
        (folder / _REQUEST).replace(folder / _SPENT)
    for entry in folder.iterdir():
        if entry.name not in (_LOCK, _SPENT):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


class Walk:
    """Batches on their way through a model's layers, forth and, where gradients are wanted, back.

    Attributes:
        blocks: The model. batches: As it takes them, in host memory.
        layers: How many decoder layers it has.
        tokens: Of all batches, padding included.
        pace: Is told how fast it goes; None where nobody wants to know.
    """

    def __init__(self, blocks: Blocks, batches: Sequence[Batch], folder: Path) -> None:
        """Take up the walk where its folder says it is.

        Args:
            blocks: The model.
            batches: All batches; each has `input_ids`.
            folder: Holds nothing but this walk's files.
        """
        self.blocks, self.batches, self._folder = blocks, batches, folder
        self.layers = len(blocks.views)
        self.tokens = sum(batch["input_ids"].numel() for batch in batches)
        self.pace: Pace | None = None
        self._shapes = [(*batch["input_ids"].shape, blocks.hidden_size) for batch in batches]
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def bytes(self) -> int:
        """Size of what passes between two layers."""
        return sum(torch.Size(shape).numel() for shape in self._shapes) * self.blocks.dtype.itemsize

    def file(self, kind: str, number: int) -> Path:
        """Where something of a layer is kept: its `inputs`, the `gradients` of its inputs, ..."""
        return self._folder / f"{kind}-{number:04d}"

    def have(self, kind: str) -> list[int]:
        """The layers for which something is kept."""
        return sorted(int(file.name[len(kind) + 1 :]) for file in self._folder.glob(f"{kind}-*"))

    def require_room(self, files: int, remedy: str, beside: int = 0) -> None:
        """Raise ValueError if the disk cannot hold so many files of what passes between layers, and so many bytes `beside`.

        `remedy` is to be given.
        """
        begun = sum(file.stat().st_size for file in self._folder.iterdir())
        free, needed = psutil.disk_usage(str(self._folder)).free + begun, files * self.bytes + beside
        if needed > free:
            raise ValueError(
                f"{self._folder}: the inputs of {files} layers{' and what is found' if beside else ''} take "
                f"{needed / 1e9:,.1f} GB and the disk has "
                f"{free / 1e9:,.1f} GB free. Give {remedy}, or an --output on a larger disk."
            )

    def note_hashes(self, part: int) -> None:
        """Keep the hashes of the part in hand, which has just been read for the first time."""
        write_text(self.file("hashes", part + 2), json.dumps(self.blocks.digests[part]))

    def weights_sha256(self) -> str:
        """`identity.model_sha256` of the model, once all its parts have been noted, by whatever process."""
        found = dict(self.blocks.digests[REST])
        for part in self.blocks.parts:
            found |= json.loads(self.file("hashes", part + 2).read_text())
        return combined(found)

    def forward_order(self) -> list[int]:
        """The parts that are still to be passed on the way to the head."""
        done = self.have("inputs")
        return list(range(done[-1], self.layers)) if done else [EMBEDDINGS, *range(self.layers)]

    @torch.no_grad()
    def forward(self, part: int, keep: bool = False) -> None:
        """Pass all batches through the part in hand.

        Args:
            part: A layer's number, or `EMBEDDINGS`.
            keep: Its inputs too, for the way back.
        """
        if part == EMBEDDINGS:
            self.write("inputs", 0, lambda number: self.blocks.embed(self.batches[number]["input_ids"]))
            return

        def passed(number: int) -> Tensor:
            return self.blocks.forward(part, self.read("inputs", part, number), self.on_device(number))

        self.write("inputs", part + 1, passed)
        if not keep:
            self.file("inputs", part).unlink()

    def on_device(self, number: int) -> dict[str, Tensor]:
        """A batch where the model computes."""
        return {name: value.to(self.blocks.device) for name, value in self.batches[number].items()}

    def read(self, kind: str, layer: int, number: int) -> Tensor:
        """What is kept of a layer and a batch, `[B, T, D]`, on the model's device."""
        sizes = [torch.Size(shape).numel() * self.blocks.dtype.itemsize for shape in self._shapes]
        memory = torch.empty(sizes[number], dtype=torch.uint8)
        view: Any = memory.numpy()
        with self.file(kind, layer).open("rb", buffering=0) as stream:
            stream.seek(sum(sizes[:number]))
            done = 0
            while done < len(view):
                got = stream.readinto(memoryview(view)[done:])
                assert got, f"{self.file(kind, layer)} is shorter than it was written"
                done += got
        return memory.view(self.blocks.dtype).view(self._shapes[number]).to(self.blocks.device)

    def write(self, kind: str, layer: int, make: Callable[[int], Tensor]) -> None:
        """Keep something of a layer for every batch; the file has its name when all of it has reached the disk."""
        final = self.file(kind, layer)
        partial = final.with_name(PARTIAL + final.name)
        with partial.open("wb", buffering=0) as stream:
            for number, shape in enumerate(self._shapes):
                started = time.perf_counter()
                made = make(number)
                assert made.shape == torch.Size(shape) and made.dtype == self.blocks.dtype, (made.shape, made.dtype)
                content: Any = made.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                left = memoryview(content)
                while left:
                    left = left[stream.write(left) :]
                if self.pace is not None and (layer < self.layers if kind == "gradients" else layer > 0):
                    size = torch.Size(shape[:-1]).numel()
                    self.pace.saw(kind, len(self._shapes), number, size, time.perf_counter() - started)
            os.fsync(stream.fileno())
        partial.replace(final)
        flush_entry(self._folder)
