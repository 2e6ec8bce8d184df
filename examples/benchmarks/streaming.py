"""Scores with gradients, and a teacher's cache, from a checkpoint larger than memory: one decoder layer at a time.

    python examples/benchmarks/streaming.py --json examples/benchmarks/results/streaming.json

A random bfloat16 PhiMoE of 32 layers, 6.2 GB (D=1024, F=1920, 16 experts, 32,064 tokens), is scored and used as a
teacher in float32 by a child process that may have 2.5 GB of anonymous memory, interpreter included. There is no limit
that the kernel sets: RssAnon is sampled every few milliseconds, and who has more is killed. Its first 8 layers, and its
first 4, are checkpoints of their own (links to the same files):

- `load`: `from_pretrained` of all 32 layers, in bfloat16;
- `score`, `cache`: streamed, of 8 and of 32 layers: the peak should not depend on it;
- `score whole`, `cache whole`: 4 layers in memory, without a limit, beside the same streamed.

Every child starts on a cold file cache. Seconds are from the checkpoint to the statistics or the finished cache,
imports left out; bytes read are all that the process read in that time (Linux), hidden states among them; parts read are
embeddings, layers and heads, with their bytes.

    python examples/benchmarks/streaming.py --gpu --folder DIR --json examples/benchmarks/results/streaming_gpu.json

is the same on a GPU: a random bfloat16 PhiMoE of 16 full-width layers of Phi-3.5-MoE, 42 GB (in DIR, which needs 60 GB free),
is scored and used as a teacher by a process that may have 12 GB of the GPU, with groups of several sizes: tokens/s beside
what reading the checkpoint alone would take, and what computing the layers alone would.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PhimoeConfig

from slimmoe_hf import collect_stats
from slimmoe_hf.blocks import Blocks
from slimmoe_hf.cache_answers import write_cache
from slimmoe_hf.data import batches
from slimmoe_hf.disk import expected_shapes
from slimmoe_hf.loading import load_model, load_tokenizer
from slimmoe_hf.shards import INDEX, ShardWriter
from slimmoe_hf.streaming import stream_stats

LIMIT = 2_500_000_000
LAYERS, FEWER, BOTH_FIT = 32, 8, 4
LENGTH, BATCH = 256, 2
TOKENIZER = Path(__file__).parent.parent / "teacher" / "model"
REST = "model-rest.safetensors"
GPU_LIMIT, GPU_LAYERS, GPU_LENGTH, GPU_BATCH = 12_000_000_000, 16, 2048, 8
GPU_GROUPS = (16_384, 65_536, 262_144)
FULL = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
"""Of Phi-3.5-MoE, whose experts are 6400 wide."""


def config_of(layers: int, width: int, **changed: int) -> PhimoeConfig:
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, **changed}
    return PhimoeConfig(
        **sizes, intermediate_size=width, num_hidden_layers=layers,
        num_local_experts=16, attention_bias=True, lm_head_bias=True, dtype="bfloat16", max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, architectures=["PhimoeForCausalLM"],
    )  # fmt: skip


def file_of(name: str) -> str:
    """A file for every layer, so that fewer layers are fewer files."""
    parts = name.split(".")
    return f"model-layer-{int(parts[2]):03}.safetensors" if parts[1] == "layers" else REST


def write_model(folder: Path, config: PhimoeConfig) -> None:
    """Random weights, one tensor at a time."""
    folder.mkdir()
    config.save_pretrained(folder)
    block = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in sorted(expected_shapes(config).items()):
        files.setdefault(file_of(name), {})[name] = shape
    start = 0
    for file, tensors in files.items():
        writer = ShardWriter(folder / file, {name: (torch.bfloat16, shape) for name, shape in tensors.items()})
        for name, shape in tensors.items():
            count = torch.Size(shape).numel()
            start = (start + 1_000_003) % (len(block) // 2)
            values = block[start:].repeat(-(-count // (len(block) - start)))[:count].view(*shape)
            writer.add(name, torch.ones_like(values) if "norm" in name and name.endswith("weight") else values)
        writer.close()
    write_index(folder, config)


def write_index(folder: Path, config: PhimoeConfig) -> None:
    weight_map = {name: file_of(name) for name in expected_shapes(config)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def first_layers(model: Path, folder: Path, config: PhimoeConfig) -> None:
    """The first layers of a model, as links to its files."""
    folder.mkdir()
    config.save_pretrained(folder)
    for file in {file_of(name) for name in expected_shapes(config)}:
        os.link(model / file, folder / file)
    write_index(folder, config)


def rows_of(tokens: int, length: int = LENGTH) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 4000, (tokens // length, length), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids})


def load(model: Path, work: Path, tokens: int) -> None:
    load_model(model, "bfloat16")


def score(model: Path, work: Path, tokens: int) -> None:
    stats = stream_stats(model, batches(rows_of(tokens), BATCH), work=work / "scoring", progress=False)
    stats.save(work / "stats.safetensors")


def score_whole(model: Path, work: Path, tokens: int) -> None:
    stats = collect_stats(load_model(model), batches(rows_of(tokens), BATCH), progress=False)
    stats.save(work / "stats.safetensors")


def cache(model: Path, work: Path, tokens: int, stream: bool = True) -> None:
    write_cache(
        model, rows_of(tokens), work / "cache", tokenizer=load_tokenizer(TOKENIZER), batch_size=BATCH, dtype="float32",
        device=torch.device("cpu"), stream=stream, stream_memory=1_000_000_000 if stream else None,
        shard_bytes=64_000_000,
    )  # fmt: skip


def cache_whole(model: Path, work: Path, tokens: int) -> None:
    cache(model, work, tokens, stream=False)


READ = Blocks.read
WAYS: dict[str, Callable[[Path, Path, int], None]] = {
    "load": load, "score": score, "cache": cache, "score whole": score_whole, "cache whole": cache_whole,
}  # fmt: skip


def proc(process: str, file: str, key: str) -> int:
    """A number from a process's files in /proc."""
    with Path(f"/proc/{process}/{file}").open() as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))


def child(way: str, model: Path, work: Path, tokens: int, answer) -> None:
    torch.set_num_threads(1)
    parts = count_parts()
    started, read = time.perf_counter(), proc("self", "io", "rchar")
    WAYS[way](model, work, tokens)
    answer.send((time.perf_counter() - started, proc("self", "io", "rchar") - read, parts))


def count_parts() -> list[int]:
    """The bytes of every part of a model that is read from now on."""
    found: list[int] = []

    def counted(self: Blocks, part: int, *args, **kwargs) -> dict[str, torch.Tensor]:
        found.append(self.bytes(part))
        return READ(self, part, *args, **kwargs)

    Blocks.read = counted
    return found


def forget(folder: Path) -> None:
    """Have the file cache drop a folder's files."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(way: str, model: Path, layers: int, folder: Path, tokens: int, limit: int | None) -> dict:
    """One way in a process of its own, which is killed when it has more anonymous memory than `limit`."""
    work = folder / "work"
    work.mkdir()
    forget(model)
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(way, model, work, tokens, send))
    process.start()
    most = 0
    while process.is_alive() and not receive.poll(0.01):
        try:
            most = max(most, proc(str(process.pid), "status", "RssAnon") * 1024)
        except (FileNotFoundError, StopIteration, ProcessLookupError):
            break
        if limit is not None and most > limit:
            os.kill(process.pid, signal.SIGKILL)
    process.join()
    row = {"way": way, "layers": layers, "tokens": tokens, "peak_anonymous_bytes": most, "limit": limit}
    row["source_bytes"] = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if process.exitcode == -signal.SIGKILL:
        row["outcome"] = "killed at the limit"
    else:
        assert process.exitcode == 0, f"{way}: exit code {process.exitcode}"
        seconds, read, parts = receive.recv()
        row |= {"outcome": "done", "seconds": seconds, "tokens_per_second": tokens / seconds}
        if way in ("score", "cache"):  # transformers maps files, which the kernel does not count here
            row |= {"read_bytes": read, "read_bytes_per_token": read / tokens}
            row |= {"parts_read": len(parts), "parts_read_bytes": sum(parts)}
    shutil.rmtree(work)
    return row


def on_gpu(args: argparse.Namespace) -> dict:
    """The experiment on a GPU, in this process; the cap is PyTorch's own."""
    place, total = torch.device("cuda"), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, GPU_LIMIT / total))
    config, rows = config_of(args.gpu_layers, args.gpu_width, **FULL), []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        model, work = Path(name) / "model", Path(name) / "work"
        write_model(model, config)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        reading, computing = read_alone(model), compute_alone(model, place)
        for way in ("score", "cache"):
            for group in args.groups:
                forget(model)
                torch.cuda.reset_peak_memory_stats()
                parts, started = count_parts(), time.perf_counter()
                gpu_way(way, model, work, group, place)
                seconds = time.perf_counter() - started
                # Scores go over the layers forth and back: they compute each twice, and its gradient once.
                passes = sum(parts) / size
                rows.append({
                    "way": way, "layers": args.gpu_layers, "tokens": group, "source_bytes": size, "outcome": "done",
                    "seconds": seconds, "tokens_per_second": group / seconds, "parts_read": len(parts),
                    "parts_read_bytes": sum(parts), "limit": GPU_LIMIT,
                    "peak_gpu_bytes": torch.cuda.max_memory_reserved(),
                    "tokens_per_second_reading_alone": group / (passes * reading),
                    "tokens_per_second_computing_forward_alone": computing,
                })  # fmt: skip
                Console(width=120).print(rows[-1])
                shutil.rmtree(work, ignore_errors=True)
    return {"command": command(), "machine": f"{torch.cuda.get_device_name(0)}, {machine()}", "rows": rows}


def gpu_way(way: str, model: Path, work: Path, tokens: int, place: torch.device) -> None:
    rows = rows_of(tokens, GPU_LENGTH)
    if way == "score":
        stream_stats(
            model, batches(rows, GPU_BATCH), work=work / "scoring", dtype="bfloat16", device=place, progress=False
        ).save(work / "stats.safetensors")
        return
    write_cache(
        model, rows, work / "cache", tokenizer=load_tokenizer(TOKENIZER), batch_size=GPU_BATCH, dtype="bfloat16",
        device=place, stream=True, stream_memory=tokens * 2 * FULL["hidden_size"] * 2,
    )  # fmt: skip


def read_alone(model: Path) -> float:
    """Seconds to read all files once, cold."""
    forget(model)
    memory, started = bytearray(1 << 26), time.perf_counter()
    for file in model.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(memory):
                pass
    return time.perf_counter() - started


def compute_alone(model: Path, place: torch.device) -> float:
    """Tokens/s of all decoder layers, forward: one of them, whose weights are there, times their number."""
    blocks = Blocks(model, torch.bfloat16, place)
    hidden_BTD = torch.randn(GPU_BATCH, GPU_LENGTH, blocks.hidden_size, dtype=torch.bfloat16, device=place)
    with torch.no_grad():
        for part in blocks.visit([0]):
            blocks.forward(part, hidden_BTD, {})
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(5):
                blocks.forward(part, hidden_BTD, {})
            torch.cuda.synchronize()
    return 5 * hidden_BTD[..., 0].numel() / (time.perf_counter() - started) / len(blocks.views)


def machine() -> str:
    """In words."""
    busy = ", beside other work" if os.getloadavg()[0] > 0.5 else ""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}{busy}"


def command() -> str:
    """What was called, as one would call it here: paths of the reader's own are left out or made relative."""
    words = ["python", "examples/benchmarks/streaming.py"]
    for word in sys.argv[1:]:
        if words[-1] == "--folder":
            words[-1:] = []
        elif not word.startswith("--folder="):
            words.append(os.path.relpath(word) if Path(word).is_absolute() else word)
    return " ".join(words)


def measure(args: argparse.Namespace) -> dict:
    described = f"{machine()}, 1 thread"
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        whole = folder / f"layers-{LAYERS}"
        write_model(whole, config_of(LAYERS, args.width))
        for layers in (FEWER, BOTH_FIT):
            first_layers(whole, folder / f"layers-{layers}", config_of(layers, args.width))
        asked: list[tuple[str, int, int | None]] = [("load", LAYERS, LIMIT)]
        asked += [(way, layers, LIMIT) for way in ("score", "cache") for layers in (FEWER, LAYERS)]
        asked += [(way, BOTH_FIT, None) for way in ("score", "score whole", "cache", "cache whole")]
        for way, layers, limit in asked:
            rows.append(run(way, folder / f"layers-{layers}", layers, folder, args.tokens, limit))
            show(rows[-1:])
    return {
        "command": command(),
        "machine": described,
        "rows": rows,
        "ratio_to_in_memory": {way: ratio(rows, way) for way in ("score", "cache")},
    }


def ratio(rows: list[dict], way: str) -> float:
    """Tokens/s streamed, as a multiple of those in memory."""
    speed = {row["way"]: row["tokens_per_second"] for row in rows if row["layers"] == BOTH_FIT}
    return speed[way] / speed[f"{way} whole"]


def show(rows: list[dict]) -> None:
    table = Table("way", "layers", "checkpoint", "outcome", "peak memory", "tokens/s", "read per token")
    for row in rows:
        done = row["outcome"] == "done"
        table.add_row(
            row["way"], str(row["layers"]), f"{row['source_bytes'] / 1e9:.2f} GB", row["outcome"],
            f"{row['peak_anonymous_bytes'] / 1e9:.2f} GB", f"{row['tokens_per_second']:,.1f}" if done else "",
            f"{row['read_bytes_per_token'] / 1e6:.2f} MB" if "read_bytes" in row else "",
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="to score and to answer")
    parser.add_argument("--width", type=int, default=1920, help="of an expert")
    parser.add_argument("--folder", type=Path, help="where 8 GB are free (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--gpu", action="store_true", help="the experiment on a GPU instead")
    parser.add_argument("--gpu-layers", type=int, default=GPU_LAYERS, help="with --gpu")
    parser.add_argument("--gpu-width", type=int, default=6400, help="of an expert, with --gpu")
    parser.add_argument("--groups", type=int, nargs="+", default=GPU_GROUPS, help="tokens in a group, with --gpu")
    args = parser.parse_args()
    if args.gpu:
        if not torch.cuda.is_available():
            parser.error("--gpu: there is none here")
        result = on_gpu(args)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
        return
    result = measure(args)
    show(result["rows"])
    Console().print({way: round(value, 2) for way, value in result["ratio_to_in_memory"].items()})
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
