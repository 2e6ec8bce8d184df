"""`examples/accelerate/`: configs that accelerate itself reads, says what they say, and launches a script with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from runs import trainer_for
from tiny import save_tiny

FOLDER = Path(__file__).parent.parent / "examples" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


def test_every_config_is_known() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it_and_its_header_says_how_to_use_it(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == KINDS[name]
    assert config.num_processes == 8 and config.num_machines == 1
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"#   accelerate launch --config_file examples/accelerate/{name}.yaml my_script.py" in comments
    assert any("No GPU has run" in line for line in comments)


SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from runs import trainer_for

folder = Path(sys.argv[1])
trainer = trainer_for(
    folder / "run", teacher_model=str(folder / "teacher"), per_device_train_batch_size=4, **json.loads(sys.argv[2])
)
trainer.train()
if trainer.is_world_process_zero():
    found = [str(trainer.accelerator.distributed_type), [one for one in trainer.state.log_history if "loss" in one]]
    (folder / "logs.json").write_text(json.dumps(found))
torch.distributed.barrier()
os._exit(0)
"""
# What a CPU needs besides; FSDP2 needs more, see test_stage.
ON_A_CPU = {
    "ddp": ({}, {"ACCELERATE_USE_CPU": "true"}, "DistributedType.MULTI_CPU"),
    "deepspeed_zero3": (
        {"use_cpu": False, "ddp_backend": "gloo"}, {"DS_ACCELERATOR": "cpu"}, "DistributedType.DEEPSPEED",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_A_CPU)
def test_script_that_it_launches_takes_the_course_of_one_process(name: str, tmp_path: Path) -> None:
    """Two new processes, with all their imports."""
    if name == "deepspeed_zero3":
        pytest.importorskip("deepspeed", reason="needs `pip install deepspeed`")
    arguments, environment, kind = ON_A_CPU[name]
    save_tiny(tmp_path / "teacher", "mixtral", seed=1)
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml"),
        "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0",
        str(tmp_path / "script.py"), str(tmp_path), json.dumps(arguments),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    single = trainer_for(tmp_path / "single", teacher_model=str(tmp_path / "teacher"))
    single.train()
    found, logs = json.loads((tmp_path / "logs.json").read_text())
    assert found == kind and len(logs) == 2
    for one, other in zip(logs, single.state.log_history, strict=False):
        for key in ("loss", "grad_norm", "kl", "num_tokens"):
            assert one[key] == pytest.approx(other[key], rel=2e-5), key
