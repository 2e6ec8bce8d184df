"""Points spread over processes: each takes one after the other, and one that dies costs only the point that it was at.

What the processes do is in `compare_worker`.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from slimmoe_hf.compare_point import FAILURE

DONE, FAILED = "done", "failed"
"""What a worker answers."""


class _Worker:
    """One process that does points, started when the first one comes."""

    def __init__(self, command: Sequence[str], log: Path, threads: int) -> None:
        self.command, self.log, self.threads = command, log, threads
        self.process: subprocess.Popen[str] | None = None

    def do(self, folder: Path) -> str | None:
        """Do a point. Returns why it failed, in one line."""
        (folder / FAILURE).unlink(missing_ok=True)
        if self.process is None or self.process.poll() is not None:
            self.process = self._start()
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            answer = process.stdout.readline().strip()
        except (BrokenPipeError, ValueError):
            answer = ""
        if answer == DONE:
            return None
        if answer == FAILED:
            return (folder / FAILURE).read_text(encoding="utf-8")
        code = process.wait()
        kind = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"its process {kind}{', as the system does for want of memory' if code == -9 else ''}"

    def _start(self) -> subprocess.Popen[str]:
        threads = {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
                env={**os.environ, **threads},
            )  # fmt: skip

    def stop(self, kill: bool) -> None:
        """End it: at once, or when it has nothing more to do."""
        if self.process is not None:
            assert self.process.stdin is not None
            if kill:
                self.process.kill()
            self.process.stdin.close()
            self.process.wait()


def do_points(
    folders: Sequence[Path],
    shared: Path,
    model: Path,
    processes: int,
    threads: int,
    told: Callable[[Path, str | None], None],
) -> None:
    """Do points in processes of their own, in order, so many at once.

    Args:
        folders: Of the points, each with its `point.json`.
        shared: What all read. model: Folder of the original model.
        processes: At once. threads: CPU threads of each.
        told: Called when a point is done, with its folder and, where it failed, the reason.
    """
    command = [sys.executable, "-m", "slimmoe_hf.compare_worker", str(shared), str(model)]
    logs = [shared / f"worker-{number}.log" for number in range(min(processes, len(folders)))]
    workers = [_Worker(command, log, threads) for log in logs]
    idle: queue.Queue[_Worker] = queue.Queue()
    for worker in workers:
        idle.put(worker)

    def do(folder: Path) -> str | None:
        worker = idle.get()
        try:
            return worker.do(folder)
        finally:
            idle.put(worker)

    pool, futures = ThreadPoolExecutor(max(len(workers), 1)), dict[Future[str | None], Path]()
    try:
        futures = {pool.submit(do, folder): folder for folder in folders}
        for future in as_completed(futures):
            told(futures[future], future.result())
    finally:
        unfinished = any(not future.done() for future in futures)
        pool.shutdown(wait=False, cancel_futures=True)  # before their workers go: no thread may start another
        for worker in workers:
            worker.stop(kill=unfinished)
        pool.shutdown()
