"""DeepSpeed's ZeRO-3 over two processes on the CPU: student and teacher in parts, the same course as one process takes.

`ddp_backend="gloo"` is what lets accelerate start DeepSpeed without an accelerator.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.training_args
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from runs import cached, in_two_processes, trainer_for, unequal_rows
from tiny import FAMILY_NAMES, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, TrainerCallback

pytest.importorskip("deepspeed", reason="needs `pip install deepspeed`")
pytestmark = pytest.mark.slow  # every process starts an engine, and the first one compiles DeepSpeed's exchange

EXAMPLE = Path(__file__).parent.parent / "examples" / "accelerate" / "deepspeed_zero3.yaml"
KEYS = ("loss", "grad_norm", "kl", "ce", "top1_agreement", "entropy", "num_tokens")


def use_zero3(folder: Path, loaded_in_parts: bool = False) -> dict[str, Any]:
    """In a forked process: ZeRO-3 as the example has it, but for weights that are too small to be worth parting."""
    ours = yaml.safe_load(EXAMPLE.read_text())["deepspeed_config"]
    settings = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": ours["gradient_accumulation_steps"],
        "gradient_clipping": ours["gradient_clipping"], "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": ours["zero_stage"], "stage3_gather_16bit_weights_on_model_save": ours["zero3_save_16bit_model"],
            "stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0,
        },
    }  # fmt: skip
    path = folder / f"zero3-{os.environ['RANK']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(loaded_in_parts).lower(),
    }  # fmt: skip
    return {"use_cpu": False, "ddp_backend": "gloo"}


def parts(model: torch.nn.Module) -> list[int]:
    """Numbers held here, numbers there are, numbers that are whole here."""
    weights = [vars(weight) | {"here": weight.numel()} for weight in model.parameters()]
    return [
        sum(weight["ds_tensor"].numel() for weight in weights), sum(weight["ds_numel"] for weight in weights),
        sum(weight["here"] for weight in weights),
    ]  # fmt: skip


def logs_of(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def train(folder: Path, arguments: dict[str, Any], loaded_in_parts: bool = False) -> None:
    trainer = trainer_for(folder, **use_zero3(folder, loaded_in_parts), **arguments)
    trainer.train()
    trainer.save_model(str(folder / "model"))
    shares = [parts(trainer.model), parts(trainer.teacher.model) if "own_base" not in arguments else None]
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps([shares, logs_of(trainer)]))


def assert_same_course(folder: Path, expected: list[dict[str, float]], tolerance: float = 2e-5) -> list[Any]:
    read = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    for _, logs in read:
        assert len(logs) == len(expected) == 2
        for one, other in zip(logs, expected, strict=True):
            for key in KEYS:
                assert one[key] == pytest.approx(other[key], rel=tolerance), key
    return [shares for shares, _ in read]


WAYS: dict[str, dict[str, Any]] = {
    "1 x 4": {"per_device_train_batch_size": 4},
    "2 x 2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "4 x 1, checkpointing": {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_zero3_gives_the_loss_and_gradient_of_one_process_and_parts_the_teacher(
    family: str, way: str, tmp_path: Path, routing_without_noise: None
) -> None:
    common = {"family": family, "crossentropy_weight": 0.5, "router_logits_weight": 0.5, "hidden_states_weight": 0.5}
    single = trainer_for(tmp_path / "single", **common)
    single.train()
    assert in_two_processes(train, tmp_path, {**common, **WAYS[way]}) == [0, 0]
    for shares in assert_same_course(tmp_path, logs_of(single)):
        for mine, whole, gathered in shares:
            assert whole == single.model.num_parameters()
            assert mine == pytest.approx(whole / 2, rel=0.01)
            assert gathered == 0  # for a forward, and given back
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, weight in single.model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, rtol=1e-3, atol=1e-5, msg=name)


def test_models_that_are_loaded_in_parts_teach_and_learn_the_same(tmp_path: Path) -> None:
    """`zero3_init_flag`: no process ever holds a whole model; the teacher is still told from others by its weights."""
    student, teacher = (str(save_tiny(tmp_path / name, "mixtral", seed=seed)) for seed, name in enumerate("st"))
    common = {"student": student, "teacher_model": teacher}
    single = trainer_for(tmp_path / "single", **common)
    single.train()
    assert in_two_processes(train_and_tell_the_teacher, tmp_path, {**common, **WAYS["2 x 2"]}) == [0, 0]
    assert_same_course(tmp_path, logs_of(single))
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == single.teacher_fingerprint
    assert json.loads((tmp_path / "0.json").read_text())[1][0]["router_load_max"] > 1


def train_and_tell_the_teacher(folder: Path, arguments: dict[str, Any]) -> None:
    trainer = trainer_for(folder, **use_zero3(folder, loaded_in_parts=True), **arguments)
    (folder / f"{torch.distributed.get_rank()}.txt").write_text(str(trainer.teacher_fingerprint))
    trainer.train()
    shares = [parts(trainer.model), parts(trainer.teacher.model)]
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps([shares, logs_of(trainer)]))


@pytest.mark.parametrize("way", ["2 x 2", "4 x 1, checkpointing"])
@pytest.mark.parametrize("teacher", ["another model", "its own base"])
def test_adapters_are_taught_the_same_in_parts(teacher: str, way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny_model("mixtral"), adapter).save_pretrained(tmp_path / "adapter")
    arguments = {"own_base": True} if teacher == "its own base" else {}
    single = trainer_for(tmp_path / "single", student=adapted(tmp_path), **arguments)
    single.train()
    assert in_two_processes(train_adapted, tmp_path, {**arguments, **WAYS[way]}) == [0, 0]
    assert_same_course(tmp_path, logs_of(single))
    assert logs_of(single)[0]["kl"] > 1e-3


def adapted(folder: Path) -> Any:
    return PeftModel.from_pretrained(tiny_model("mixtral"), folder / "adapter", is_trainable=True)


def train_adapted(folder: Path, arguments: dict[str, Any]) -> None:
    trainer = trainer_for(folder, student=adapted(folder), **use_zero3(folder), **arguments)
    trainer.train()
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps([[], logs_of(trainer)]))


def refused(folder: Path) -> None:
    torch.manual_seed(0)
    student = get_peft_model(tiny_model("mixtral"), LoraConfig(r=4, target_modules=["q_proj"]))
    arguments = {"gradient_checkpointing": True, "hidden_states_weight": 1.0}
    with pytest.raises(ValueError, match=r"hidden_states_weight=1.0 gets no gradient .* which adapters under ZeRO-3"):
        trainer_for(folder, student=student, **use_zero3(folder), **arguments)


def test_terms_that_would_get_no_gradient_are_refused(tmp_path: Path) -> None:
    """TRL makes checkpointing reentrant for adapters under ZeRO-3."""
    assert in_two_processes(refused, tmp_path) == [0, 0]


RUN = {
    "family": "phimoe", "per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 2,
    "lr_scheduler_type": "cosine",
}  # fmt: skip


def train_until(folder: Path, steps: int, resume: bool) -> None:
    class StopAfter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    trainer = trainer_for(
        folder, train_dataset=unequal_rows(12), callbacks=[StopAfter()], **use_zero3(folder), **RUN
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "model"))


def test_zero3_resumes_exactly_and_its_checkpoints_are_refused_elsewhere(tmp_path: Path) -> None:
    assert in_two_processes(train_until, tmp_path / "whole", 6, False) == [0, 0]
    assert in_two_processes(train_until, tmp_path / "cut", 3, False) == [0, 0]
    assert in_two_processes(train_until, tmp_path / "cut", 6, True) == [0, 0]
    whole, resumed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "cut")
    )
    start = tiny_model("phimoe").state_dict()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert any(not torch.equal(whole[name], start[name]) for name in whole if "experts" in name)
    with pytest.raises(ValueError, match="it was written under DeepSpeed, and this run is not under DeepSpeed"):
        trainer_for(tmp_path / "cut", train_dataset=unequal_rows(12), **RUN).train(resume_from_checkpoint=True)


def resume_what_was_written_without(folder: Path) -> None:
    trainer = trainer_for(folder, **use_zero3(folder), **RUN)
    with pytest.raises(ValueError, match="it was written without DeepSpeed, and this run is under DeepSpeed"):
        trainer.train(resume_from_checkpoint=True)


def test_checkpoint_of_one_process_is_refused_under_zero3(tmp_path: Path) -> None:
    trainer_for(tmp_path, **{**RUN, "max_steps": 2}).train()
    assert in_two_processes(resume_what_was_written_without, tmp_path) == [0, 0]


def train_from_a_cache(folder: Path, arguments: dict[str, Any]) -> None:
    trainer = trainer_for(folder, **use_zero3(folder), **arguments)
    trainer.train()
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps([[], logs_of(trainer)]))


@pytest.mark.parametrize("kind", ["top_k", "hidden"])
def test_cached_answers_teach_the_same_in_parts(kind: str, tmp_path: Path) -> None:
    arguments = {"teacher_logits_path": cached(tmp_path / "cache", kind=kind)}
    single = trainer_for(tmp_path / "single", **arguments)
    single.train()
    assert in_two_processes(train_from_a_cache, tmp_path, {**arguments, **WAYS["2 x 2"]}) == [0, 0]
    assert_same_course(tmp_path, logs_of(single))


def train_in_bfloat16(folder: Path) -> None:
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # it asks for a GPU or `use_cpu`
    train(folder, {**WAYS["2 x 2"], "bf16": True})


def test_bfloat16_under_zero3_agrees_within_its_rounding(tmp_path: Path) -> None:
    single = trainer_for(tmp_path / "single")
    single.train()
    assert in_two_processes(train_in_bfloat16, tmp_path) == [0, 0]
    logs = json.loads((tmp_path / "0.json").read_text())[1]
    for one, other in zip(logs, logs_of(single), strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=0.02) and one["kl"] != other["kl"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)


def train_on_a_nan(folder: Path) -> None:
    trainer = trainer_for(folder, **use_zero3(folder), per_device_train_batch_size=4, max_steps=4)
    rank, answers, before = torch.distributed.get_rank(), trainer.teacher.answers, {}

    def poisoned(*arguments: Any) -> Any:
        answer, seen = answers(*arguments)
        if trainer.state.global_step == 1:
            before.update(
                {name: vars(weight)["ds_tensor"].clone() for name, weight in trainer.model.named_parameters()}
            )
            answer = answer._replace(hidden_NU=answer.hidden_NU * (torch.nan if rank == 1 else 1.0))
        return answer, seen

    trainer.teacher.answers = poisoned
    with pytest.raises(
        FloatingPointError, match="step 2: the loss is not finite on another" if rank == 0 else "is nan"
    ):
        trainer.train()
    assert len(before) > 10
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(vars(weight)["ds_tensor"], before[name]), name


def test_loss_that_is_not_finite_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    """DeepSpeed steps within the backward pass, before we can stop it; it passes over such a step itself."""
    assert in_two_processes(train_on_a_nan, tmp_path) == [0, 0]
