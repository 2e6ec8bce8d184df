"""The README's first command, for real: the shipped teacher, real text, killed in the middle and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _run(output: Path, kill_at: Path | None = None) -> str:
    """On one thread, for CI has another test on the other core."""
    command = [sys.executable, "-c", "import sys; from slimmoe_hf.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, "run", "examples/quickstart.yaml", "--output", str(output)], cwd=ROOT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while kill_at is not None and not kill_at.exists() and process.poll() is None:
        time.sleep(0.1)
    if kill_at is not None:
        process.send_signal(signal.SIGKILL)
    printed = process.communicate()[0]
    assert process.returncode == (-signal.SIGKILL if kill_at is not None else 0), printed
    return printed


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quickstart_recovers_what_the_cut_lost(tmp_path):
    run = tmp_path / "run"
    _run(run, kill_at=run / "stage-1" / "checkpoints" / "checkpoint-50" / "complete.json")
    printed = _run(run)
    assert "stage-1/score: reused" in printed and "continues from checkpoint-" in printed
    models = json.loads((run / "report.json").read_text())["models"]
    losses = {model["name"]: model["loss"] for model in models}
    assert losses["stage-2 distilled"] <= losses["teacher"] + 0.35, losses  # the bound this project set itself
    for stage in (1, 2):
        assert losses[f"stage-{stage} distilled"] < losses[f"stage-{stage} slimmed"] - 0.3, losses
    assert len({model["teacher_sha256"] for model in models}) == 1
    assert models[3]["scored_sha256"] == models[2]["weights_sha256"], "stage 2 scored the student that stage 1 left"
    assert models[-1]["total_parameters"] < models[0]["total_parameters"] / 2.9
