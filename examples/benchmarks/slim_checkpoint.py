"""Cutting a checkpoint on disk, beside plain file copies and beside load-slice-save: wall time and memory.

    python examples/benchmarks/slim_checkpoint.py --json examples/benchmarks/results/slim_checkpoint.json

Synthetic checkpoints of PhiMoE layers at full width (D=4096, F=6400; 16 experts, 8 in the small one), bfloat16, in
files of at most 4.9 GB as Microsoft publishes them, are cut to F=960. Each way runs in a process of its own, on a cold
file cache, and ends when its output is on the disk:

- `ours`: `slim_checkpoint`, with all its verification;
- `copies`: read every byte of the source in order, then write as many bytes as the slimmed model has;
- `load`: `from_pretrained`, `apply_plan`, `save_pretrained`.

Memory is the peak of the process's anonymous memory over what it was before the work (Linux).
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PhimoeConfig

from slimmoe_hf import CompressionPlan, Target, apply_plan, slim_checkpoint
from slimmoe_hf.disk import expected_shapes
from slimmoe_hf.families import shape_of
from slimmoe_hf.plan import PlanMeta, validate_target
from slimmoe_hf.shards import ShardWriter

SHARD = 4_900_000_000
SIZES = {"small": (1, 8), "large": (3, 16)}  # layers and experts


def config_of(layers: int, experts: int) -> PhimoeConfig:
    return PhimoeConfig(
        num_hidden_layers=layers, num_local_experts=experts, attention_bias=True, lm_head_bias=True, dtype="bfloat16"
    )


def write_source(folder: Path, config: PhimoeConfig) -> None:
    """Random weights, one tensor at a time, in real shards."""
    folder.mkdir()
    config.architectures = ["PhimoeForCausalLM"]
    config.save_pretrained(folder)
    groups: list[dict] = [{}]
    for name, shape in sorted(expected_shapes(config).items()):
        size = sum(torch.Size(each).numel() * 2 for _, each in groups[-1].values())
        if groups[-1] and size + torch.Size(shape).numel() * 2 > SHARD:
            groups.append({})
        groups[-1][name] = (torch.bfloat16, shape)
    block = (torch.randn(1 << 24) * 0.02).bfloat16()
    weight_map = {}
    for number, tensors in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        writer = ShardWriter(folder / file, tensors)
        for name, (_, shape) in tensors.items():
            count = torch.Size(shape).numel()
            writer.add(name, block.repeat(-(-count // len(block)))[:count].view(*shape))
            weight_map[name] = file
        writer.close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def random_plan(config: PhimoeConfig, width: int) -> CompressionPlan:
    """Which neurons stay is of no matter here, as long as they lie scattered."""
    generator = torch.Generator().manual_seed(0)
    before, target = shape_of(config), Target(expert_width=width)
    order = torch.rand(before.layers, before.num_experts, before.expert_width, generator=generator).argsort(-1)
    meta = PlanMeta(
        family="phimoe", before=before, after=validate_target(config, target), target=target, criterion="random", seed=0,
        loss="lm", model_sha256="", data_sha256="", stats_sha256="", layers=[],
    )  # fmt: skip
    return CompressionPlan(meta, dict(enumerate(order[..., :width].sort(-1).values)), {})


def ours(source: Path, plan: CompressionPlan, output: Path, written: int) -> None:
    slim_checkpoint(source, plan, output)


def copies(source: Path, plan: CompressionPlan, output: Path, written: int) -> None:
    buffer = bytearray(1 << 26)  # the fastest of 256 kB to 64 MB here
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    with output.open("wb", buffering=0) as stream:
        for start in range(0, written, len(buffer)):
            stream.write(memoryview(buffer)[: written - start])
        os.fsync(stream.fileno())


def load(source: Path, plan: CompressionPlan, output: Path, written: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    apply_plan(model, plan).save_pretrained(output, max_shard_size="1GB")
    for file in output.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


WAYS: dict[str, Callable] = {"ours": ours, "copies": copies, "load": load}


def anonymous() -> int:
    """This process's anonymous memory, bytes."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def child(way: str, source: Path, plan_folder: Path, output: Path, written: int, answer) -> None:
    torch.set_num_threads(1)
    plan, before, most, done = CompressionPlan.load(plan_folder), anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    WAYS[way](source, plan, output, written)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    answer.put((seconds, most[0] - before))


def forget(folder: Path) -> None:
    """Have the file cache drop a folder's files."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(way: str, source: Path, plan_folder: Path, work: Path, written: int) -> tuple[float, int]:
    output = work / "output"
    forget(source)
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=child, args=(way, source, plan_folder, output, written, answer))
    process.start()
    found = answer.get()
    process.join()
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    return found


def measure(args: argparse.Namespace) -> dict:
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, torch {torch.__version__}",
        "expert_width": args.width,
        "rows": [],
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        for size, (layers, experts) in SIZES.items():
            config = config_of(layers, experts)
            write_source(work / size, config)
            random_plan(config, args.width).save(work / f"{size}-plan")
            slim_checkpoint(work / size, CompressionPlan.load(work / f"{size}-plan"), work / "once")
            written = sum(file.stat().st_size for file in (work / "once").glob("*.safetensors"))
            shutil.rmtree(work / "once")
            read = sum(file.stat().st_size for file in (work / size).glob("*.safetensors"))
            largest = max(torch.Size(shape).numel() * 2 for shape in expected_shapes(config).values())
            runs: dict[str, list] = {way: [] for way in WAYS}
            for _ in range(args.repeats):
                for way in WAYS:
                    runs[way].append(run(way, work / size, work / f"{size}-plan", work, written))
            for way, found in runs.items():
                row = {
                    "size": size,
                    "way": way,
                    "source_bytes": read,
                    "output_bytes": written,
                    "largest_tensor": largest,
                }
                row |= {"seconds": statistics.median(s for s, _ in found), "all_seconds": [s for s, _ in found]}
                result["rows"].append(row | {"peak_anonymous_bytes": max(m for _, m in found)})
            shutil.rmtree(work / size)
    return result


def show(result: dict) -> None:
    table = Table("source", "output", "way", "seconds", "ours / this", "peak memory", "beyond the largest tensor")
    for row in result["rows"]:
        mine = next(r["seconds"] for r in result["rows"] if r["size"] == row["size"] and r["way"] == "ours")
        beyond = row["peak_anonymous_bytes"] - row["largest_tensor"]
        table.add_row(
            f"{row['source_bytes'] / 1e9:.2f} GB", f"{row['output_bytes'] / 1e9:.2f} GB", row["way"],
            f"{row['seconds']:.1f}", f"{mine / row['seconds']:.2f}", f"{row['peak_anonymous_bytes'] / 1e9:.2f} GB",
            f"{beyond / 1e9:.2f} GB",
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=960, help="expert width to cut to")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where 15 GB are free (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    result = measure(args)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
