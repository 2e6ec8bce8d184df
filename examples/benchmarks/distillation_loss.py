"""What does a distillation loss over hidden states cost, forward and backward, beside the plain way and its peers?

    OMP_NUM_THREADS=2 python examples/benchmarks/distillation_loss.py \
        --json examples/benchmarks/results/distillation_loss.json

Every method gets the same student and teacher hidden states and heads, and gives the gradient of both the student's
hidden states and its head. Time is the median of several runs, the methods taking turns, each in a process of its own;
beside the time on the clock there is that of the processor, which other work on the machine hardly lengthens.
Memory is the peak above what lies there at the start, less the gradient of the head: on a CPU anonymous memory
(sampled every 2 ms) with freed memory given back at once, on a GPU `torch.cuda.max_memory_allocated`. Both are given
as multiples of the plain way, `F.kl_div` on two `[N, V]` log-softmaxes. Loss and gradient norm are there to see that
all compute the same thing; a cached teacher's are those of its 64 likeliest tokens, kept in float16, and the rest.

On a GPU, the size to ask for is `--device cuda --dtype bfloat16 --sizes 8192x131072x4096`.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slimmoe_hf.fused import fused_distillation_loss
from slimmoe_hf.losses import DistillationLoss
from slimmoe_hf.peak import PeakMemory
from slimmoe_hf.signals import Head, TeacherStates, TeacherTopK

NAIVE = "naive full KL"
CHECKPOINTED_ROWS = 256
# Logits that a method holds at its peak, as multiples of N x V float32: it is left out where they would not fit.
LARGE = {NAIVE: 8, "TRL GKD, beta 0": 10, "TRL GKD, beta 0.5": 18, "TRL chunked divergence": 12}
# Freed memory goes back at once, and oneDNN keeps no work buffers between matrix products.
CALM = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
}  # fmt: skip


class Task:
    """Hidden states and heads of N tokens; the student is a blurred teacher, as one in training is."""

    def __init__(self, tokens: int, vocabulary: int, width: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        self.teacher_hidden, self.teacher_head = normal(tokens, width), normal(vocabulary, width) * 3 / width**0.5
        self.hidden = (self.teacher_hidden + 0.3 * normal(tokens, width)).to(dtype).requires_grad_()
        self.head = self.teacher_head.to(dtype, copy=True).requires_grad_()
        self.teacher_hidden, self.teacher_head = self.teacher_hidden.to(dtype), self.teacher_head.to(dtype)
        self.labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)

    def cached(self, top_k: int = 64) -> TeacherTopK:
        """The teacher's answers as a cache has them."""
        found = []
        for hidden in self.teacher_hidden.split(64):
            log_probs = (hidden @ self.teacher_head.T).float().log_softmax(-1)
            kept, index = log_probs.topk(top_k)
            outside = log_probs.exp().scatter_(-1, index, 0.0).sum(-1).log()
            found.append((kept.half(), index.int(), outside.half()))
        kept, index, outside = (torch.cat(parts) for parts in zip(*found, strict=True))
        return TeacherTopK(kept, index, outside, len(self.teacher_head))


def logits(task: Task) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        teacher = task.teacher_hidden @ task.teacher_head.T
    return task.hidden @ task.head.T, teacher


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.float().log_softmax(-1), teacher.float().log_softmax(-1), reduction="sum", log_target=True)


def naive(task: Task) -> Callable[[], Tensor]:
    return lambda: plain_kl(*logits(task))


def trl_gkd(task: Task, beta: float) -> Callable[[], Tensor]:
    from trl.experimental.gkd import GKDTrainer

    def loss() -> Tensor:
        student, teacher = logits(task)
        return GKDTrainer.generalized_jsd_loss(student.float(), teacher.float(), beta=beta, reduction="sum")

    return loss


def trl_chunked(task: Task) -> Callable[[], Tensor]:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    teacher_hidden, mask = task.teacher_hidden[None], torch.ones_like(task.labels)[None]
    return lambda: _chunked_divergence_loss(
        task.hidden[None], teacher_hidden, task.head, task.teacher_head, mask, beta=0.0, num_items_in_batch=1
    )[0]


def checkpointed(task: Task) -> Callable[[], Tensor]:
    def chunk(hidden: Tensor, head: Tensor, teacher_hidden: Tensor) -> Tensor:
        return plain_kl(hidden @ head.T, teacher_hidden @ task.teacher_head.T)

    def loss() -> Tensor:
        pairs = zip(task.hidden.split(CHECKPOINTED_ROWS), task.teacher_hidden.split(CHECKPOINTED_ROWS), strict=True)
        parts = [checkpoint(chunk, hidden, task.head, teacher, use_reentrant=False) for hidden, teacher in pairs]
        return torch.stack(parts).sum()

    return loss


def ours(task: Task, beta: float = 0.0, cached: bool = False, crossentropy: float = 0.0) -> Callable[[], Tensor]:
    answers = task.cached() if cached else TeacherStates(task.teacher_hidden, Head(task.teacher_head))
    settings = DistillationLoss(beta=beta)
    return lambda: (
        fused_distillation_loss(
            task.hidden, Head(task.head), answers, task.labels, settings, crossentropy_weight=crossentropy
        ).loss
    )


def liger_jsd(task: Task) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
    # Its mean over tokens times their number.
    return lambda: len(task.labels) * fused(task.hidden, task.head, task.teacher_hidden, task.teacher_head, task.labels)


METHODS = {
    NAIVE: naive,
    "TRL GKD, beta 0": partial(trl_gkd, beta=0.0),
    "TRL GKD, beta 0.5": partial(trl_gkd, beta=0.5),
    "TRL chunked divergence": trl_chunked,
    "checkpointed chunks": checkpointed,
    "Liger fused JSD": liger_jsd,
    "ours, full KL": ours,
    "ours, full KL + cross-entropy": partial(ours, crossentropy=1.0),
    "ours, JSD": partial(ours, beta=0.5),
    "ours, cached top-64 + tail": partial(ours, cached=True),
}


def serve(method: str, size: str, device: str, dtype: str) -> None:
    """Measure one method as often as a line on standard input asks for it."""
    tokens, vocabulary, width = map(int, size.split("x"))

    def run(task: Task, loss: Callable[[], Tensor]) -> tuple[float, float]:
        value = loss()
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        norm = float(task.head.grad.float().norm())
        task.hidden.grad = task.head.grad = None
        return value.item(), norm

    small = Task(64, 512, 64, device, getattr(torch, dtype))  # libraries that load at first use are no part of it
    run(small, METHODS[method](small))
    task = Task(tokens, vocabulary, width, device, getattr(torch, dtype))
    loss = METHODS[method](task)
    for line in sys.stdin:
        start, processor = time.perf_counter(), time.process_time()
        if line.strip() == "memory":
            with PeakMemory(device) as peak:
                value, norm = run(task, loss)
            memory = peak.bytes - task.head.numel() * task.head.element_size()
            print(json.dumps({"memory": memory, "loss": value, "grad_norm": norm}), flush=True)
        else:
            run(task, loss)
            taken = [time.perf_counter() - start, time.process_time() - processor]
            print(json.dumps(taken), flush=True)


class Child:
    """A method in a process of its own."""

    def __init__(self, method: str, size: str, args: argparse.Namespace, calm: bool) -> None:
        command = [sys.executable, __file__, "--serve", method, size, "--device", args.device, "--dtype", args.dtype]
        environment = {**os.environ, **(CALM if calm else {}), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ask(self, what: str) -> Any:
        print(what, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(self.process.stderr.read()[-3000:])
        return json.loads(answer)

    def end(self) -> None:
        self.process.communicate()


def too_large(method: str, size: str, args: argparse.Namespace) -> bool:
    tokens, vocabulary, _ = map(int, size.split("x"))
    needed, available = 4 * tokens * vocabulary * LARGE.get(method, 0), psutil.virtual_memory().available
    if args.device == "cuda" or needed < 0.9 * available:
        return False
    print(
        f"{size}, {method}: left out, {needed / 2**30:.0f} of {available / 2**30:.0f} GiB", file=sys.stderr, flush=True
    )
    return True


def beside_others(row: dict, size: str, rows: list[dict], args: argparse.Namespace) -> bool:
    """Whether a method can take its turns: the processes of all methods hold their inputs at the same time."""
    tokens, vocabulary, width = map(int, size.split("x"))
    inputs = 4 * width * (3 * vocabulary + 3 * tokens) + 500 * 2**20
    fits = args.device == "cuda" or row["memory"] + len(rows) * inputs < psutil.virtual_memory().available
    if not fits:
        print(f"{size}, {row['method']}: not timed, too large beside the others", file=sys.stderr, flush=True)
    return fits


def measure(size: str, args: argparse.Namespace) -> list[dict]:
    rows = []
    for method in args.methods:
        if too_large(method, size, args):
            continue
        child = Child(method, size, args, calm=True)
        rows.append({"size": size, "method": method, **child.ask("memory")})
        child.end()
        print(f"{size}, {method}: {rows[-1]['memory'] / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    timed = [row for row in rows if beside_others(row, size, rows, args)]
    children = [Child(row["method"], size, args, calm=False) for row in timed]
    taken: list[list[list[float]]] = [[] for _ in timed]
    for turn in range(args.repeats + 1):
        for row, child, times in zip(timed, children, taken, strict=True):
            answer = child.ask("time")
            if turn:  # the first is a warm-up
                times.append(answer)
                print(f"{size}, {row['method']}: {answer[0]:.3f} s", file=sys.stderr, flush=True)
    for child in children:
        child.end()
    for row, times in zip(timed, taken, strict=True):
        seconds, processor = zip(*times, strict=True)
        row |= {"seconds": median(seconds), "processor_seconds": median(processor), "all_seconds": seconds}
    base = next((row for row in rows if row["method"] == NAIVE), None)
    for row in rows if base else []:
        for key in ("memory", "seconds", "processor_seconds"):
            if key in row:
                row[f"{key}_ratio"] = row[key] / base[key]
    return rows


def show(result: dict) -> None:
    table = Table(
        "tokens x vocabulary x width", "method", "memory", "x naive", "time", "x naive", "processor", "gradient norm"
    )
    for row in result["rows"]:
        table.add_row(
            row["size"], row["method"], f"{row['memory'] / 2**20:,.0f} MiB", f"{row.get('memory_ratio', 1):.3f}",
            f"{row['seconds']:.3f} s" if "seconds" in row else "-", f"{row.get('seconds_ratio', math.nan):.2f}",
            f"{row.get('processor_seconds_ratio', math.nan):.2f}", f"{row['grad_norm']:.6g}",
        )  # fmt: skip
    Console(width=150).print(table)


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"CPU, {names[0] if names else platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4096x32768x512", "2048x131072x512"], metavar="NxVxD")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--serve", nargs=2, metavar=("METHOD", "SIZE"), help="measure one method in this process")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve, args.device, args.dtype)
        return
    if args.device == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        args.methods = [method for method in args.methods if method != "Liger fused JSD"]
    result = {
        "command": " ".join(["python", *sys.argv]), "machine": machine(args.device), "dtype": args.dtype,
        "rows": [row for size in args.sizes for row in measure(size, args)],
    }  # fmt: skip
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
