"""The loss inside the student's forward: the same as from its logits, whatever the model, the head and the way of training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from runs import trainer_for, unequal_rows
from tiny import FAMILY_NAMES, tiny_model
from torch import Tensor, nn

from slimmoe_hf.student_forward import cannot_be_fused
from slimmoe_hf.trainer import DistillationTrainer

KEYS = ("loss", "grad_norm", "kl", "ce", "top1_agreement", "entropy")


def gradients_and_log(
    trainer: DistillationTrainer, by_logits: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Of the first step; `by_logits` takes the path that makes all of the student's logits."""
    if by_logits:
        trainer._needs_logits = "the test says so"
    found: dict[str, Tensor] = {}
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda w, name=name: found.update({name: w.grad.clone()}))
    torch.manual_seed(0)
    trainer.train()
    return found, next(entry for entry in trainer.state.log_history if "loss" in entry)


def assert_same(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    (ours, our_log), (theirs, their_log) = one, other
    assert ours.keys() == theirs.keys() and len(ours) > 3
    for name, gradient in ours.items():
        difference = (gradient.float() - theirs[name].float()).norm()
        assert difference <= tolerance * theirs[name].float().norm() + 1e-9, name
    for key in KEYS:
        assert our_log[key] == pytest.approx(their_log[key], rel=tolerance), key


LOSSES: dict[str, dict[str, Any]] = {
    "forward KL": {},
    "forward KL and cross-entropy": {"crossentropy_weight": 0.5, "temperature": 2.0},
    "top-8 and tail": {"loss_top_k": 8},
    "reverse KL": {"beta": 1.0},
    "JSD": {"beta": 0.5, "crossentropy_weight": 0.25},
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_fused_loss_and_gradient_are_those_of_the_logits(family: str, loss: str, tmp_path: Path) -> None:
    runs = [
        gradients_and_log(trainer_for(tmp_path, family, max_steps=1, learning_rate=0.0, **LOSSES[loss]), by_logits)
        for by_logits in (False, True)
    ]
    assert_same(*runs)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradient_checkpointing_changes_nothing(family: str, tmp_path: Path) -> None:
    arguments = {
        "max_steps": 1, "learning_rate": 0.0, "crossentropy_weight": 0.5, "router_logits_weight": 0.5,
        "hidden_states_weight": 0.5,
    }  # fmt: skip
    kept, again = (
        gradients_and_log(trainer_for(tmp_path, family, gradient_checkpointing=checkpointing, **arguments))
        for checkpointing in (False, True)
    )
    assert_same(kept, again)
    for key in ("router_kl", "hidden_mse"):
        assert kept[1][key] == pytest.approx(again[1][key], rel=1e-5)


ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {
        "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}  # fmt: skip


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_lora_students_are_taught_the_same_by_logits(adapter: str, tmp_path: Path) -> None:
    runs = []
    for by_logits in (False, True):
        torch.manual_seed(1)
        config = LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[adapter])
        trainer = trainer_for(tmp_path, "mixtral", peft_config=config, max_steps=1, learning_rate=0.0)
        assert bool(trainer._needs_logits) == (adapter == "trained head")
        runs.append(gradients_and_log(trainer, by_logits))
    assert_same(*runs)


def test_bfloat16_agrees_within_its_rounding(tmp_path: Path) -> None:
    runs = [
        gradients_and_log(trainer_for(tmp_path, "mixtral", max_steps=1, learning_rate=0.0, bf16=True), by_logits)
        for by_logits in (False, True)
    ]
    assert_same(*runs, tolerance=0.02)


def test_no_logits_of_the_whole_batch_are_made(tmp_path: Path) -> None:
    sizes: list[int] = []
    trainer = trainer_for(tmp_path, max_steps=1, eval_dataset=unequal_rows(4))
    for model in (trainer.model, trainer.teacher.model):
        model.lm_head.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[1]))
    trainer.train()
    trainer.evaluate()
    assert set(sizes) == {1}  # the teacher's last token, which its forward cannot leave out


@pytest.mark.slow  # compiles
def test_compiled_student_learns_the_same(tmp_path: Path) -> None:
    plain, compiled = (
        gradients_and_log(trainer_for(tmp_path, max_steps=1, learning_rate=0.0, **arguments))
        for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "eager"})
    )
    assert_same(compiled, plain)


def test_copy_of_a_trained_student_computes_with_its_own_weights(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "first")
    trainer.train()
    student = trainer.accelerator.unwrap_model(trainer.model)
    twin, ids = copy.deepcopy(student), torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert not twin(ids).logits.any()
    assert student(ids).logits.any()


def test_copy_of_a_trained_student_teaches_the_next(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "first")
    trainer.train()
    student = trainer.accelerator.unwrap_model(trainer.model)
    second = trainer_for(tmp_path / "second", student=student, teacher_model=copy.deepcopy(student))
    second.train()
    assert second.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert second.state.log_history[1]["loss"] == pytest.approx(0.0, abs=1e-6)


def test_prediction_gives_the_logits_and_the_loss_of_evaluation(tmp_path: Path) -> None:
    rows = unequal_rows(3)
    trainer = trainer_for(tmp_path, eval_dataset=rows)
    measured = trainer.evaluate()
    (batch,) = trainer.get_eval_dataloader()
    loss, logits, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    assert logits.shape == (*labels.shape, trainer.model.config.vocab_size)
    assert float(loss) == pytest.approx(measured["eval_loss"], rel=1e-5)


def test_logits_that_are_more_than_the_head_are_made_by_the_model(tmp_path: Path) -> None:
    class Doubled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    student = tiny_model("mixtral")
    assert cannot_be_fused(student) == ""
    head = copy.deepcopy(student.lm_head)
    student.lm_head = Doubled(head.in_features, head.out_features, bias=False)
    student.lm_head.weight = head.weight
    assert cannot_be_fused(student) == "its logits are more than its head"
    teacher = copy.deepcopy(student)
    trainer = trainer_for(tmp_path, student=student, teacher_model=teacher, max_steps=1, learning_rate=0.0)
    assert gradients_and_log(trainer)[1]["kl"] == pytest.approx(0.0, abs=1e-5)
