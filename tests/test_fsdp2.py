"""FSDP2 over two processes on the CPU: every teacher and every kind of student gives what one process gives.

That the live teacher is in shares, with each family, and that a run resumes exactly: `test_stage`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from runs import cached, in_two_processes, trainer_for, unequal_rows
from test_stage import allow_fsdp
from tiny import save_tiny, tiny_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from slimmoe_hf import student_forward
from slimmoe_hf.signals import Head
from slimmoe_hf.teacher import LiveTeacher

KEYS = ("loss", "grad_norm", "kl", "ce", "top1_agreement", "entropy", "num_tokens")
# What is taught how; "student" and the folder of a cache are filled in where the run is.
CASES: dict[str, dict[str, Any]] = {
    "live": {"teacher_model": "teacher", "crossentropy_weight": 0.5},
    "live, checkpointing, terms": {
        "teacher_model": "teacher", "gradient_checkpointing": True, "router_logits_weight": 0.5,
        "hidden_states_weight": 0.5,
    },
    "live, tied embeddings": {"teacher_model": "teacher", "student": "tied"},
    "cache of 16 tokens": {"teacher_logits_path": "top_k"},
    "cache of hidden states": {"teacher_logits_path": "hidden"},
    "adapter": {"teacher_model": "teacher", "student": "adapter"},
    "adapter, own base": {"student": "adapter", "own_base": True},
    "adapter, own base, checkpointing": {"student": "adapter", "own_base": True, "gradient_checkpointing": True},
}  # fmt: skip


def trainer_of(folder: Path, case: str, **more: Any) -> Any:
    arguments = {**CASES[case], **more}
    for name in ("teacher_model", "teacher_logits_path"):
        if name in arguments:
            arguments[name] = str(folder / arguments[name])
    if arguments.get("student") == "tied":
        arguments["student"] = tiny_model("mixtral", tie_word_embeddings=True)
    if arguments.get("student") == "adapter":
        arguments["student"] = PeftModel.from_pretrained(tiny_model("mixtral"), folder / "adapter", is_trainable=True)
    return trainer_for(folder / "run", **arguments)


def logs_of(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    save_tiny(folder / "teacher", "mixtral", seed=1)
    cached(folder / "top_k", top_k=16)
    cached(folder / "hidden", kind="hidden")
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny_model("mixtral"), adapter).save_pretrained(folder / "adapter")
    return folder


def train_all(folder: Path) -> None:
    allow_fsdp()
    sharded_heads: list[bool] = []
    true_of = Head.of.__func__

    def watched(cls: type[Head], model: Any) -> Head:
        sharded_heads.append(isinstance(model.get_output_embeddings().weight, DTensor))
        return true_of(cls, model)

    class StudentsHead(Head):
        of = classmethod(watched)

    if os.environ["RANK"] == "1":
        LiveTeacher.identity = lambda self: "not known here"
    found = {}
    for case in CASES:
        trainer = trainer_of(folder, case, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        found[case] = {"identity": trainer._teacher_identity}
        student_forward.Head, sharded_heads[:] = StudentsHead, []
        trainer.train()
        student_forward.Head = Head
        assert all(isinstance(weight, DTensor) for weight in trainer.model.parameters())
        found[case] |= {"sharded heads": sharded_heads[:], "logs": logs_of(trainer)}
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def in_two(folder: Path) -> list[dict[str, Any]]:
    """All of them in one start of two processes."""
    assert in_two_processes(train_all, folder) == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_that_share_all_take_the_course_of_one(
    case: str, folder: Path, in_two: list[dict[str, Any]]
) -> None:
    single = trainer_of(folder, case)
    single.train()
    for found in in_two:
        assert len(found[case]["logs"]) == 2
        for one, other in zip(found[case]["logs"], logs_of(single), strict=True):
            for key in KEYS:
                assert one[key] == pytest.approx(other[key], rel=1e-5), key


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("adapter")])
def test_the_students_head_is_whole_where_the_loss_is(case: str, in_two: list[dict[str, Any]]) -> None:
    """FSDP2 gathers it with the last norm, and its gradient comes back as a share. That of an adapter's base is frozen."""
    for found in in_two:
        assert found[case]["sharded heads"] == [False] * 4  # two steps of two micro-batches


def test_teacher_is_told_from_others_by_what_the_first_process_loaded(
    folder: Path, in_two: list[dict[str, Any]]
) -> None:
    """Under `fsdp_cpu_ram_efficient_loading` nothing is promised of the weights of the other one before they are shared."""
    expected = trainer_of(folder, "live").teacher_fingerprint
    assert [found["live"]["identity"] for found in in_two] == [expected, expected]


def train_adapter_until(folder: Path, run: str, steps: int, resume: bool) -> None:
    class StopAfter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    allow_fsdp()
    trainer = trainer_of(
        folder, "adapter, own base", output_dir=str(folder / run), train_dataset=unequal_rows(12), max_steps=6,
        per_device_train_batch_size=2, save_strategy="steps", save_steps=2, callbacks=[StopAfter()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    whole = trainer.accelerator.get_state_dict(trainer.model)
    if torch.distributed.get_rank() == 0:
        torch.save({name: weight for name, weight in whole.items() if "lora" in name}, folder / run / "adapter.pt")


@pytest.mark.slow
def test_adapter_on_its_own_base_resumes_exactly(folder: Path) -> None:
    for run, steps, resume in (("whole", 6, False), ("cut", 3, False), ("cut", 6, True)):
        assert in_two_processes(train_adapter_until, folder, run, steps, resume) == [0, 0]
    whole, resumed = (torch.load(folder / run / "adapter.pt") for run in ("whole", "cut"))
    assert len(whole) == 8 and all(torch.equal(whole[name], resumed[name]) for name in whole)


def resume_with_another_teacher(folder: Path) -> None:
    allow_fsdp()
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "output_dir": str(folder / "taught")}
    trainer_of(folder, "live", **arguments).train()
    other = trainer_of(folder, "live", **{**arguments, "teacher_model": "other"})
    with pytest.raises(ValueError, match=r"teacher was \w{12}\.\.\. and is \w{12}\.\.\."):
        other.train(resume_from_checkpoint=True)


def test_another_teacher_is_refused_by_every_process(folder: Path) -> None:
    save_tiny(folder / "other", "mixtral", seed=2)
    assert in_two_processes(resume_with_another_teacher, folder) == [0, 0]
    assert (folder / "taught" / "checkpoint-1").is_dir()


def train_with_a_head_of_its_own(folder: Path) -> None:
    allow_fsdp()
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "MixtralDecoderLayer,Linear"
    trainer = trainer_of(folder, "live", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train()
    assert isinstance(trainer.model.lm_head, FSDPModule)
    (folder / f"head-{torch.distributed.get_rank()}.json").write_text(json.dumps(logs_of(trainer)))


def test_gradient_of_a_head_that_is_a_unit_of_its_own_is_of_all_processes(folder: Path) -> None:
    """No hook gathers it where it is not called: we do, and have to bring the processes' gradients together."""
    single = trainer_of(folder, "live")
    single.train()
    assert in_two_processes(train_with_a_head_of_its_own, folder) == [0, 0]
    for rank in range(2):
        logs = json.loads((folder / f"head-{rank}.json").read_text())
        for one, other in zip(logs, logs_of(single), strict=True):
            for key in KEYS:
                assert one[key] == pytest.approx(other[key], rel=1e-5), key
