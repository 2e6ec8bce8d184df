"""Terms on routers and layers: their values, whom they reach, and what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from runs import trainer_for, unequal_rows
from tiny import FAMILY_NAMES, tiny_model

from slimmoe_hf.families import moe_layers


def first_log(folder: Path, *arguments: Any, **overrides: Any) -> dict[str, float]:
    trainer = trainer_for(folder, *arguments, **{"max_steps": 1, "learning_rate": 0.0, **overrides})
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_terms_equal_a_direct_computation_on_every_document(
    family: str, tmp_path: Path, routing_without_noise: None
) -> None:
    student, teacher, rows = tiny_model(family), tiny_model(family, seed=1), unequal_rows()
    sums, tokens = {"router_kl": 0.0, "hidden_mse": 0.0}, 0
    for row in rows:
        ids, counts = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != -100
        found = []
        for model in (student, teacher):
            routed, layers = [], []
            hooks = [
                r.register_forward_hook(lambda _m, _i, o, k=routed: k.append(o[0])) for _, _, r in moe_layers(model)
            ]
            hooks += [
                layer.register_forward_hook(lambda _m, _i, o, k=layers: k.append(o)) for layer in model.model.layers
            ]
            with torch.no_grad():
                model(ids)
            for hook in hooks:
                hook.remove()
            found.append((torch.stack([r.view(1, len(ids[0]), -1)[0] for r in routed]), torch.cat(layers)))
        (s, x), (t, y) = ((r[:, :-1][:, counts].double(), h[:, :-1][:, counts].double()) for r, h in found)
        kl = t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))
        sums["router_kl"] += float(kl.sum(-1).mean(0).sum())
        sums["hidden_mse"] += float(((x - y).square().mean(-1) / y.square().mean(-1)).mean(0).sum())
        tokens += int(counts.sum())
    plain = first_log(tmp_path, family, student=copy.deepcopy(student), teacher_model=copy.deepcopy(teacher))
    log = first_log(
        tmp_path, family, student=student, teacher_model=teacher, router_logits_weight=0.5, hidden_states_weight=0.25,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    for name, value in sums.items():
        assert log[name] == pytest.approx(value / tokens, rel=1e-4), name
        assert name not in plain
    expected = plain["kl"] + 0.5 * log["router_kl"] + 0.25 * log["hidden_mse"]
    assert log["loss"] == pytest.approx(expected, rel=1e-4)


def test_router_term_reaches_the_router_and_brings_it_closer(tmp_path: Path) -> None:
    """Without any other loss the routers alone decide, and their divergence falls."""
    trainer = trainer_for(
        tmp_path, "phimoe", distillation_weight=1e-6, router_logits_weight=1.0, max_steps=20, learning_rate=1e-2,
        gradient_checkpointing=True,
    )  # fmt: skip
    trainer.train()
    logged = [entry["router_kl"] for entry in trainer.state.log_history if "router_kl" in entry]
    assert logged[-1] < 0.5 * logged[0]


def test_adapter_hears_the_terms_from_its_own_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    log = first_log(
        tmp_path, "mixtral", teacher_model=None, own_base=True, peft_config=adapter, router_logits_weight=1.0,
        hidden_states_weight=1.0,
    )  # fmt: skip
    assert log["router_kl"] > 1e-4 and log["hidden_mse"] > 1e-4


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"router_logits_weight": -1.0}, "router_logits_weight=-1.0 is not a number of at least 0"),
    "cache": (
        {"router_logits_weight": 1.0, "teacher_logits_path": "cache"}, "a teacher cache holds the teacher's answers only",
    ),
    "precomputed": (
        {"hidden_states_weight": 1.0, "precompute_teacher_logits": True}, "a teacher cache holds the teacher's answers only",
    ),
    "reentrant": (
        {"router_logits_weight": 1.0, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "no gradient under reentrant gradient checkpointing",
    ),
    "experts": (
        {"router_logits_weight": 1.0, "student": lambda: tiny_model("mixtral", num_local_experts=3)},
        "student and teacher differ in num_experts 3 and 4",
    ),
    "width": (
        {"hidden_states_weight": 1.0, "student": lambda: tiny_model("mixtral", hidden_size=64)},
        "student and teacher differ in hidden_size 64 and 32",
    ),
    "layers": (
        {"hidden_states_weight": 1.0, "student": lambda: tiny_model("mixtral", num_hidden_layers=1)},
        "student and teacher differ in num_hidden_layers 1 and 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    arguments, message = REFUSALS[case]
    made = {name: value() if callable(value) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message) as error:
        trainer_for(tmp_path, **made)
    assert "\n" not in str(error.value)
