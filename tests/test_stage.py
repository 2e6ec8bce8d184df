"""Stages in several processes: launched, sharded or not, they end as one process does, and survive what one survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from datasets import Dataset
from recipes import tiny_recipe, write_recipe
from runs import in_child, in_two_processes, trainer_for, unequal_rows
from safetensors.torch import load_file
from tiny import save_tiny, slow_but, tiny_model
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from slimmoe_hf import launch, student_training
from slimmoe_hf.data import dataset_hash
from slimmoe_hf.launch import Handover, processes_of, report_failure
from slimmoe_hf.pipeline import run_recipe
from slimmoe_hf.recipe import Recipe, parse_recipe
from slimmoe_hf.teacher import LiveTeacher

EXAMPLE = Path(__file__).parent.parent / "examples" / "accelerate" / "fsdp2.yaml"
ON_TWO_CPUS = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_machines": 1, "num_processes": 2}
SHARDED = {
    **yaml.safe_load(EXAMPLE.read_text()), "use_cpu": True, "num_processes": 2, "mixed_precision": "no",
}  # fmt: skip


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(values))
    return folder / "accelerate.yaml"


def one_stage(home: Path, folder: Path, accelerate: Path | None = None, **distillation: Any) -> Path:
    """A recipe of one stage; the same eight rows a step in one process or in two. Mixtral's routing has no noise."""
    values = tiny_recipe(home, "mixtral")
    values["stages"] = values["stages"][:1]
    rows = 8 if accelerate is None else 4
    values["stages"][0]["distillation"] |= {"per_device_train_batch_size": rows, "logging_steps": 1, **distillation}
    if accelerate is not None:
        values["accelerate"] = str(accelerate)
    return write_recipe(folder, {**values, "output": str(folder / "run")})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its model, its text, and an uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("stage")
    run_recipe(one_stage(folder, folder))
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "stage-1" / "model" / "model.safetensors")


def history(run: Path) -> list[dict[str, float]]:
    steps = json.loads((run / "steps.json").read_text())["steps"]
    return [entry for entry in steps["stage-1/distil"]["result"]["history"] if "loss" in entry]


def assert_ends_alike(run: Path, single: Path) -> None:
    """Sums are taken in another order, so the last digits differ; training moves weights by 1e-3 and more."""
    ours, theirs, before = weights(run), weights(single), load_file(single / "stage-1/slimmed/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert max(float((theirs[name] - before[name]).abs().max()) for name in theirs) > 1e-3
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-6, msg=name)
    for one, other in zip(history(run), history(single), strict=True):
        for key in ("loss", "grad_norm", "kl", "num_tokens"):
            assert one[key] == pytest.approx(other[key], rel=2e-5), key


def says(command: list[str], environment: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    return done.returncode, done.stderr


def slimmoe(recipe: Path) -> list[str]:
    code = "import sys; from slimmoe_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, "run", str(recipe)]


@pytest.mark.slow
def test_a_launched_stage_ends_as_one_in_a_single_process(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_recipe(one_stage(home, tmp_path, write_config(tmp_path, ON_TWO_CPUS)))
    assert_ends_alike(tmp_path / "run", home / "run")
    for part in ("", "stage-1", "stage-1/model", "model"):
        ours, theirs = ({path.name for path in (run / "run" / part).iterdir()} for run in (tmp_path, home))
        assert ours == theirs
    assert (tmp_path / "run/stage-1/checkpoints/checkpoint-6/rng_state_1.pth").exists()
    said = capsys.readouterr().out
    assert said.count("stage-1 step 6 of 6") == 1 and "Warning" not in said


PATCH = """
import os, pathlib, signal
if "RANK" in os.environ and "--config_file" not in __import__("sys").argv:
{body}
"""


def patched(folder: Path, body: str) -> dict[str, str]:
    """An environment in which every launched process runs some code first; nothing else reaches into them."""
    folder.mkdir()
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    (folder / "sitecustomize.py").write_text(PATCH.format(body=lines))
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


FAILING = """
if os.environ["RANK"] == "1" and pathlib.Path({flag!r}).exists():
    from slimmoe_hf.trainer import DistillationTrainer
    true = DistillationTrainer.training_step
    def training_step(self, *arguments):
        if self.state.global_step == 3:
            {action}
        return true(self, *arguments)
    DistillationTrainer.training_step = training_step
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "cause", "continued"),
    [
        ('raise ValueError("no room\\nfor it")', "process 1 stopped: no room for it", True),
        ("os.kill(os.getpid(), signal.SIGKILL)", "process 1 was ended by SIGKILL", False),
    ],
)
def test_a_process_that_fails_is_one_line_and_the_same_command_continues(
    home: Path, tmp_path: Path, action: str, cause: str, continued: bool
):
    flag = tmp_path / "flag"
    flag.touch()
    environment = patched(tmp_path / "patch", FAILING.format(flag=str(flag), action=action))
    recipe = one_stage(home, tmp_path, write_config(tmp_path, ON_TWO_CPUS))
    code, said = says(slimmoe(recipe), environment)
    assert code == 2, said
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert error.startswith("error: stage-1: ") and cause in error and "launched/log.txt" in error
    assert not (tmp_path / "run/stage-1/model").exists()
    if not continued:
        return  # as when the parent was killed, below: four processes that import everything
    assert list((tmp_path / "run/stage-1/launched").glob("failure-*.txt")), "and it does not spoil the next start"
    flag.unlink()
    code, said = says(slimmoe(recipe), environment)
    assert code == 0 and "continues from checkpoint-2" in said, said
    assert_ends_alike(tmp_path / "run", home / "run")


@pytest.mark.slow
def test_processes_end_with_a_killed_parent_and_the_same_command_continues(home: Path, tmp_path: Path):
    config = write_config(tmp_path, ON_TWO_CPUS)
    (tmp_path / "whole").mkdir()
    run_recipe(one_stage(home, tmp_path / "whole", config, max_steps=100))
    recipe = one_stage(home, tmp_path, config, max_steps=100)
    parent = subprocess.Popen(slimmoe(recipe), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "run/stage-1/checkpoints"
    until(lambda: list(checkpoints.glob("checkpoint-*/complete.json")), 120)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 3  # the launcher and two processes
    parent.kill()
    parent.wait()
    until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), 30)
    assert not (tmp_path / "run/stage-1/model").exists()
    code, said = says(slimmoe(recipe))
    assert code == 0 and "continues from checkpoint-" in said, said
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole" / "run")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def until(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


# FSDP2 on the CPU: torch and accelerate shard there too, over gloo. But `AcceleratorState` turns FSDP on only where
# there are several accelerators (accelerate/state.py leaves MULTI_CPU out of its list), so the tests do it for it.
ALLOW_FSDP = """
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
true_init = AcceleratorState.__init__
def init(self, *arguments, **kwargs):
    true_init(self, *arguments, **kwargs)
    self.distributed_type = DistributedType.FSDP
    if kwargs.get("fsdp_plugin") is not None:
        self.fsdp_plugin = kwargs["fsdp_plugin"]
        if self._mixed_precision != "no":
            self.fsdp_plugin.set_mixed_precision(self._mixed_precision)
AcceleratorState.__init__ = init
"""


def allow_fsdp() -> None:
    """In a forked process: FSDP2 as the example has it, on the CPU."""
    exec(ALLOW_FSDP, {})
    for name, value in SHARDED["fsdp_config"].items():
        os.environ[name.upper()] = str(value)
    os.environ["ACCELERATE_USE_FSDP"] = "true"


@pytest.fixture
def routing_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """PhiMoE samples its routing in training."""
    from transformers.models.phimoe import modeling_phimoe

    true = modeling_phimoe.sparsemixer
    monkeypatch.setattr(
        modeling_phimoe, "sparsemixer", lambda scores, jitter_eps, training, top_k: true(scores, jitter_eps, False)
    )


def train_sharded(folder: Path, family: str) -> None:
    allow_fsdp()
    trainer = trainer_for(folder, family, teacher_model=str(folder / "teacher"), per_device_train_batch_size=4)
    shares = [weight for weight in trainer.teacher.model.parameters() if isinstance(weight, DTensor)]
    assert len(shares) == len(list(trainer.teacher.model.parameters()))
    sizes = [sum(weight.to_local().numel() for weight in shares), sum(weight.numel() for weight in shares)]
    trainer.train()
    sizes.append(sum(weight.to_local().numel() for weight in trainer.teacher.model.model.layers.parameters()))
    sizes.append(sum(weight.numel() for weight in trainer.teacher.model.model.layers.parameters()))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps([sizes, logs]))


@pytest.mark.parametrize("family", slow_but("phimoe", "qwen3_moe"))
def test_fsdp2_gives_the_loss_and_gradient_of_one_process_and_shards_the_teacher(
    family: str, tmp_path: Path, routing_without_noise: None
):
    teacher = save_tiny(tmp_path / "teacher", family, seed=1)
    single = trainer_for(tmp_path / "single", family, teacher_model=str(teacher))
    single.train()
    assert in_two_processes(train_sharded, tmp_path, family) == [0, 0]
    for rank in range(2):
        (mine, whole, layers_after, layers), logs = json.loads((tmp_path / f"{rank}.json").read_text())
        assert whole == single.teacher.model.num_parameters()
        assert mine == pytest.approx(whole / 2, rel=0.01)
        assert layers_after == pytest.approx(layers / 2, rel=0.01)  # gathered for a forward, and given back
    for one, other in zip(logs, single.state.log_history, strict=False):
        for key in ("loss", "grad_norm", "kl", "ce", "num_tokens"):
            assert one[key] == pytest.approx(other[key], rel=2e-5), key


def train_sharded_and_mixed(folder: Path) -> None:
    allow_fsdp()
    student = tiny_model("mixtral").to(torch.bfloat16)
    trainer = trainer_for(folder, student=student, per_device_train_batch_size=4, bf16=True)
    trainer.train()
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}  # shares of it, that is
    if torch.distributed.get_rank() == 0:
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))


def test_fsdp2_with_mixed_precision_trains_a_bfloat16_student_in_float32(tmp_path: Path):
    single = trainer_for(tmp_path / "single", student=tiny_model("mixtral"), bf16=True)
    single.train()
    assert in_two_processes(train_sharded_and_mixed, tmp_path) == [0, 0]
    logs = json.loads((tmp_path / "logs.json").read_text())
    for one, other in zip(logs, single.state.log_history, strict=True):
        for key in ("kl", "grad_norm") if "kl" in one else ():
            assert one[key] == pytest.approx(other[key], rel=0.02), key


def refused(folder: Path, arguments: dict[str, Any]) -> None:
    allow_fsdp()
    with pytest.raises(ValueError, match="leaves the teacher of every process but the first empty"):
        trainer_for(folder, **arguments)


def test_a_teacher_that_fsdp2_cannot_fill_in_every_process_is_refused(tmp_path: Path):
    source = save_tiny(tmp_path / "teacher", "mixtral", seed=1)
    kwargs = {"device_map": {"model": "cpu", "lm_head": "disk"}, "offload_folder": str(tmp_path / "weights")}
    arguments = {"teacher_model": str(source), "teacher_model_init_kwargs": kwargs}
    assert in_two_processes(refused, tmp_path / "run", arguments) == [0, 0]


def test_a_teacher_that_fsdp1_leaves_empty_is_refused():
    """FSDP1 itself asks for a GPU; what is looked at of its accelerator is only this."""
    plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP, is_fsdp2=False, device="cpu",
        state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None),
    )  # fmt: skip
    teacher = LiveTeacher(tiny_model("mixtral"))
    with pytest.raises(ValueError, match="leaves the teacher of every process but the first empty"):
        teacher.place(accelerator)
    plugin.cpu_ram_efficient_loading = False
    teacher.place(accelerator)


def train_sharded_until(folder: Path, steps: int, resume: bool, states: str) -> None:
    class StopAfter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    allow_fsdp()
    os.environ["FSDP_STATE_DICT_TYPE"] = states
    trainer = trainer_for(
        folder, train_dataset=unequal_rows(12), per_device_train_batch_size=2, max_steps=6, save_strategy="steps",
        save_steps=2, lr_scheduler_type="cosine", callbacks=[StopAfter()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    whole = trainer.accelerator.get_state_dict(trainer.model)
    if torch.distributed.get_rank() == 0:
        torch.save(whole, folder / "weights.pt")


@pytest.mark.slow
@pytest.mark.parametrize("states", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp2_resumes_exactly(states: str, tmp_path: Path):
    assert in_two_processes(train_sharded_until, tmp_path / "whole", 6, False, states) == [0, 0]
    assert in_two_processes(train_sharded_until, tmp_path / "cut", 3, False, states) == [0, 0]
    assert in_two_processes(train_sharded_until, tmp_path / "cut", 6, True, states) == [0, 0]
    whole, resumed = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "cut"))
    start = tiny_model("mixtral").state_dict()
    assert whole.keys() == resumed.keys() == start.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert any(not torch.equal(whole[name], start[name]) for name in whole if "experts" in name)


@pytest.mark.slow
def test_a_stage_launched_under_fsdp2_ends_as_one_in_a_single_process(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in patched(tmp_path / "patch", ALLOW_FSDP).items():
        monkeypatch.setenv(name, value)
    run_recipe(one_stage(home, tmp_path, write_config(tmp_path, SHARDED)))
    assert_ends_alike(tmp_path / "run", home / "run")
    checkpoint = tmp_path / "run/stage-1/checkpoints/checkpoint-6"
    assert (checkpoint / "pytorch_model_fsdp.bin").exists() and (checkpoint / "optimizer.bin").exists()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "run/stage-1/model" / name).read_text() == (home / "run/stage-1/model" / name).read_text()


BFLOAT16 = {"optim": "adafactor", "learning_rate": 1e-2}


def bfloat16_recipe(home: Path, folder: Path) -> Path:
    recipe = yaml.safe_load(one_stage(home, folder, **BFLOAT16).read_text())
    recipe["stages"][0]["training_dtype"] = "bfloat16"
    return write_recipe(folder, {**recipe, "teacher_memory": "1GB"})


def run_and_die(recipe: Path) -> None:
    true = student_training.TrainingProgress.on_step_end

    def dying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        true(self, args, state, control, **kwargs)
        if state.global_step == 5:
            assert {weight.dtype for weight in kwargs["model"].parameters()} == {torch.bfloat16}
            os.kill(os.getpid(), signal.SIGKILL)

    student_training.TrainingProgress.on_step_end = dying  # type: ignore[method-assign]
    run_recipe(recipe)


@pytest.mark.slow
def test_a_stage_in_bfloat16_resumes_exactly(home: Path, tmp_path: Path):
    """On a CPU `teacher_memory` is taken and has no effect."""
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    killed, whole = (bfloat16_recipe(home, tmp_path / name) for name in ("killed", "whole"))
    assert in_child(run_and_die, killed) == -signal.SIGKILL
    for recipe in (killed, whole):
        run_recipe(recipe)
    ours, theirs, full = (weights(tmp_path / name) for name in ("killed/run", "whole/run", home / "run"))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert not all(torch.equal(theirs[name], full[name]) for name in theirs)


def test_launched_rows_are_those_that_were_checked(tmp_path: Path):
    rows = {"train": unequal_rows(6), "validation": unequal_rows(2, seed=1)}
    told = Handover(
        tokenizer=tmp_path, teacher=tmp_path, dtype="float32", processes=2,
        rows={name: dataset_hash(dataset) for name, dataset in rows.items()},
    )  # fmt: skip
    told.write(tmp_path / "launched", rows)
    again, found = Handover.read(tmp_path / "launched")
    assert again == told
    for name, dataset in rows.items():
        assert found[name].to_list() == dataset.to_list() and found[name].features == dataset.features
    told.write(tmp_path / "launched", {**rows, "train": Dataset.from_list(rows["train"].to_list()[:5])})
    with pytest.raises(ValueError, match="launched/train: not the rows that were checked"):
        Handover.read(tmp_path / "launched")


def recipe_with(config: Path) -> Recipe:
    values = {"model": "m", "data": {"source": "sotu"}, "stages": [{"target": {}}], "accelerate": str(config)}
    return parse_recipe(values, "r")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_processes": None}, "num_processes is None. Write how many"),
        ({"num_processes": -1}, "num_processes is -1"),
        ({"num_machines": 2}, "num_machines is 2; a run is on one machine"),
        ({"distributed_type": "MULTI_CPU"}, "starts one process only for distributed_type MULTI_CPU"),
        ({"distributed_type": "DEEPSPEED"}, "distributed_type DEEPSPEED is not supported"),
        ({"distributed_type": "FSDP"}, "only FSDP2 shards the teacher too. Write fsdp_version: 2"),
    ],
)
def test_what_a_stage_cannot_be_launched_with_is_one_line(tmp_path: Path, values: dict[str, Any], message: str):
    config = write_config(tmp_path, {**ON_TWO_CPUS, **values})
    with pytest.raises(ValueError) as caught:
        processes_of(recipe_with(config))
    assert message in str(caught.value) and str(config) in str(caught.value) and "\n" not in str(caught.value)


def test_the_example_asks_for_eight_processes_that_share_every_model():
    recipe = recipe_with(EXAMPLE)
    assert processes_of(recipe) == 8
    with pytest.raises(ValueError, match="FSDP shards the teacher, so teacher_memory has no place"):
        processes_of(recipe.model_copy(update={"teacher_memory": "12GB"}))
    stage = recipe.stages[0].model_copy(update={"distillation": {"optim": "adafactor"}})
    with pytest.raises(ValueError, match="adafactor cannot step on FSDP2's shards"):
        processes_of(recipe.model_copy(update={"stages": [stage]}))
    assert processes_of(recipe.model_copy(update={"accelerate": None})) == 1


def test_the_cause_is_what_the_first_process_to_fail_left(tmp_path: Path):
    (tmp_path / "log.txt").write_text("")
    for number, cause in ((3, "the disk is full"), (0, "connection closed by peer")):
        report_failure(tmp_path, number, cause)
        os.utime(tmp_path / f"failure-{number}.txt", ns=(0, 10 - number))
    assert launch._cause(tmp_path) == "process 3 stopped: the disk is full."
    report_failure(tmp_path, 3, "step 3: the loss is not finite on another process, which names the batch.")
    report_failure(tmp_path, 1, "step 3, process 1: the loss is nan.")
    assert launch._cause(tmp_path).startswith("process 0 stopped")
    (tmp_path / "failure-0.txt").unlink()
    assert launch._cause(tmp_path) == "process 1 stopped: step 3, process 1: the loss is nan."
    for file in tmp_path.glob("failure-*"):
        file.unlink()
    killed = "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 7)  (SIGKILL)\n"
    left = "  rank      : 0 (local_rank: 0)\n  exitcode  : 2 (pid: 6)\n"
    for log in (f"{killed}Root Cause\n{left}", f"{left}Root Cause\n{killed}"):  # torchrun may see either first
        (tmp_path / "log.txt").write_text(log)
        report_failure(tmp_path, 0, "connection closed by peer")
        assert launch._cause(tmp_path).startswith("process 1 was ended by SIGKILL")
    (tmp_path / "failure-0.txt").unlink()
    (tmp_path / "log.txt").write_text("stage-1 step 1\ntorch.OutOfMemoryError: CUDA out of memory.\n[rank1] bye\n")
    assert launch._cause(tmp_path) == "the processes stopped: torch.OutOfMemoryError: CUDA out of memory."
