"""What scoring and reconstruction take beside a plain forward pass over the same tokens; `criteria.py` asks for it.

Everything is done in one process of its own, taking turns: processor seconds, which other work on the machine hardly
lengthens, and the peak of anonymous memory above the weights, freed memory given back at once (Linux).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimmoe_hf import Target, collect_stats, make_plan
from slimmoe_hf.loading import load_model
from slimmoe_hf.peak import PeakMemory
from slimmoe_hf.reconstruction import reconstruct

ROUNDS = 3
# Freed memory goes back at once, and oneDNN keeps no work buffers between matrix products.
CALM = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
}  # fmt: skip


def cost_of(model: Path, width: int, batches: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Medians over `ROUNDS`, measured in another process.

    Args:
        model: Its folder.
        width: What experts are cut to, for reconstruction.
        batches: Rows of equal length.
    """
    rows = json.dumps([batch["input_ids"].tolist() for batch in batches])
    command = [sys.executable, __file__, str(model), str(width)]
    done = subprocess.run(
        command, check=True, env={**os.environ, **CALM}, input=rows, text=True, stdout=subprocess.PIPE
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: Path, width: int, rows: list[list[list[int]]]) -> dict[str, Any]:
    """Seconds and bytes by what was done."""
    model = load_model(folder, whole=True)
    batches = [{"input_ids": torch.tensor(ids), "attention_mask": torch.ones_like(torch.tensor(ids))} for ids in rows]
    plan = make_plan(collect_stats(model, batches[:1], "lm", progress=False), Target(expert_width=width), "taylor")

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch, use_cache=False)

    work: dict[str, Callable[[], Any]] = {
        "forward pass": forward,
        "scoring, none": lambda: collect_stats(model, batches, "none", progress=False),
        "scoring, kd_topk": lambda: collect_stats(model, batches, "kd_topk", progress=False),
        "reconstruction": lambda: reconstruct(model, batches, plan, progress=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    peaks: dict[str, list[int]] = {name: [] for name in work}
    for number in range(ROUNDS + 1):
        for name, do in work.items():
            with PeakMemory("cpu") as peak:
                started = time.process_time()
                do()
                spent = time.process_time() - started
            if number:  # the first round warms up
                seconds[name].append(spent)
                peaks[name].append(peak.bytes or 0)
    return {
        "tokens": sum(batch["input_ids"].numel() for batch in batches), "batch": len(rows[0]), "width": width,
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "peak_bytes": {name: statistics.median(values) for name, values in peaks.items()},
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]), json.load(sys.stdin))))
