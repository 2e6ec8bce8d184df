"""Prefill and decode speed: what is timed is what generation does, and the numbers fit together. No clock is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import FAMILY_NAMES, tiny_batch, tiny_model
from transformers import GenerationConfig

from slimmoe_hf import throughput
from slimmoe_hf.throughput import generate_greedily, measure_speed

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_is_timed_writes_what_generate_writes(family: str):
    model, prompt = tiny_model(family), tiny_batch(rows=3, length=10)["input_ids"]
    tokens, prefill, decode = generate_greedily(model, prompt, 6)
    settings = GenerationConfig(max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=1)
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    assert torch.equal(tokens, expected[:, 10:])
    assert prefill > 0 and decode > 0


def test_the_end_of_text_token_ends_nothing():
    model, prompt = tiny_model("mixtral"), tiny_batch(rows=1, length=8)["input_ids"]
    first = generate_greedily(model, prompt, 0)[0]
    model.config.eos_token_id = model.generation_config.eos_token_id = int(first)
    assert generate_greedily(model, prompt, 5)[0].shape == (1, 6)


def test_speeds_are_tokens_of_all_rows_over_the_median_time(monkeypatch: pytest.MonkeyPatch):
    """Prefills of 1, 4 and 2 s, decodes of 8, 2 and 4 s; three rows, 10 prompt tokens and 5 new ones each."""
    times = iter([(9.0, 9.0), (1.0, 8.0), (4.0, 2.0), (2.0, 4.0)])
    asked = []

    def timed(_model: object, ids_NT: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, float, float]:
        asked.append((tuple(ids_NT.shape), new_tokens))
        return ids_NT, *next(times)

    monkeypatch.setattr(throughput, "generate_greedily", timed)
    model = tiny_model("olmoe")
    speed = measure_speed(model, tiny_batch(rows=3, length=10)["input_ids"], new_tokens=5)
    assert asked[1:] == [((3, 10), 5)] * 3 and asked[0][0] == (3, 10), "one short warm-up, three repeats"
    assert speed.prefill_tokens_per_second == 3 * 10 / 2 and speed.decode_tokens_per_second == 3 * 5 / 4
    assert (speed.batch, speed.prompt, speed.new_tokens) == (3, 10, 5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a process is read from /proc")
def test_peak_memory_is_the_weights_and_what_runs_above_them():
    model = tiny_model("mixtral", hidden_size=256, intermediate_size=512)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    found = measure_speed(model, tiny_batch(rows=32, length=250)["input_ids"], new_tokens=2, repeats=1)
    # At least the keys and values: 2 layers, 2 groups of 64, 252 positions of 32 rows, float32.
    cache = 2 * 2 * 2 * 64 * 252 * 32 * 4
    assert found.peak_memory is not None and found.peak_memory > weights + cache
    assert found.peak_memory < weights + 40 * cache, "not the whole process"


@pytest.mark.slow  # eight processes, each of which imports torch
def test_the_inference_benchmark_runs_and_says_what_it_compared(tmp_path: Path):
    argv = ["--hidden-size", "64", "--experts", "4", "--expert-width", "128", "--layers", "1", "--vocab", "128"]
    speed = ["--batches", "1", "2", "--prompt", "8", "--new-tokens", "2", "--repeats", "1", "--rounds", "1"]
    script = ROOT / "examples" / "benchmarks" / "inference.py"
    subprocess.run(
        [sys.executable, script, *argv, *speed, "--json", tmp_path / "r.json"], check=True, capture_output=True
    )
    result = json.loads((tmp_path / "r.json").read_text())
    models = result["models"]
    assert list(models) == ["full", "slimmed", "expert-dropped", "dense"]
    assert models["slimmed"]["total_parameters"] < models["full"]["total_parameters"]
    assert abs(models["expert-dropped"]["total_parameters"] / models["slimmed"]["total_parameters"] - 1) < 0.01
    assert abs(models["dense"]["active_parameters"] / models["slimmed"]["active_parameters"] - 1) < 0.015  # 8 neurons
    assert {(row["model"], row["batch"]) for row in result["rows"]} == {(name, n) for name in models for n in (1, 2)}
    assert all(row["prefill"] > 0 and row["decode"] > 0 and row["peak_memory"] > 0 for row in result["rows"])
