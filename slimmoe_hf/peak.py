"""Peak memory of a block of code: PyTorch's own count on a GPU, anonymous resident memory on a CPU."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Peak memory of what runs inside the `with`, above its start and in all.

    On a CPU this samples, every two milliseconds, what the process has allocated (`RssAnon`), not the files that it
    has mapped; Linux only.

    Args:
        device: Where the block computes.

    Attributes:
        bytes: Above what was there at the start; None where it cannot be had.
        total: All of it.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.bytes: int | None = None
        self.total: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif _STATUS.exists():
            _trim()
            self._before, self._done = _anonymous_bytes(), threading.Event()
            self.total = self._before
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.total = torch.cuda.max_memory_allocated(self.device)
        elif self.total is not None:
            self._done.set()
            self._thread.join()
        if self.total is not None:
            self.bytes = self.total - self._before

    def _sample(self) -> None:
        while not self._done.is_set():
            self.total = max(self.total or 0, _anonymous_bytes())
            time.sleep(0.002)


def _trim() -> None:
    """Give freed memory back first, where the C library can: it would hide what the block takes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _anonymous_bytes() -> int:
    lines = _STATUS.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
