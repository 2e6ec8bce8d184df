"""What DistillationTrainer and DistillationConfig accept, and what they refuse in one line before any work."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PromptTuningConfig
from runs import settings, trainer_for, unequal_rows
from tiny import VOCAB_SIZE, save_tiny, tiny_model, tiny_tokenizer
from transformers import HfArgumentParser, TrainingArguments

from slimmoe_hf.arguments import DistillationConfig
from slimmoe_hf.trainer import DistillationTrainer


def other_tokenizer() -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    return tokenizer


def teacher_with_other_tokenizer(folder: Path) -> str:
    save_tiny(folder, "mixtral", seed=1)
    other_tokenizer().save_pretrained(folder)
    return str(folder)


def shared_weights(folder: Path) -> dict[str, Any]:
    model = tiny_model("mixtral")
    return {"student": model, "teacher_model": model}


REFUSALS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "small vocabulary": (
        lambda folder: {"teacher_model": tiny_model("mixtral", vocab_size=256)},
        "student has 320 ids, the teacher 256, and the tokenizer emits 320",
    ),
    "other tokenizer": (
        lambda folder: {"teacher_model": teacher_with_other_tokenizer(folder / "teacher")}, "2 share an id and differ"
    ),
    "shared weights": (shared_weights, "teacher_model shares its weights with model"),
    "loss function": (lambda folder: {"compute_loss_func": print}, "compute_loss_func would replace"),
    "prompt learning": (
        lambda folder: {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
        "PromptTuningConfig puts virtual tokens",
    ),
    "dft": (lambda folder: {"loss_type": "dft"}, "loss_type='dft' has no meaning here"),
    "label smoothing": (lambda folder: {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
    "liger": (lambda folder: {"use_liger_kernel": True}, "use_liger_kernel=True replaces"),
    "local averages": (
        lambda folder: {"average_tokens_across_devices": False}, "average_tokens_across_devices=False weighs"
    ),
    "beta": (lambda folder: {"beta": 1.5}, r"beta=1.5 is outside \[0, 1\]"),
    "temperature": (lambda folder: {"temperature": 0.0}, "temperature=0.0 is not a positive number"),
    "negative top-k": (lambda folder: {"loss_top_k": -1}, "loss_top_k=-1 is negative"),
    "top-k of reverse KL": (lambda folder: {"loss_top_k": 8, "beta": 1.0}, "loss_top_k=8 with beta=1.0"),
    "negative weight": (lambda folder: {"crossentropy_weight": -1.0}, "crossentropy_weight=-1.0 is neither"),
    "three weights": (lambda folder: {"distillation_weight": [1, 2, 3]}, r"distillation_weight=\[1, 2, 3\] is neither"),
    "nothing to learn": (lambda folder: {"distillation_weight": [1.0, 0.0]}, "both 0 at the end of training"),
    "negative router loss": (lambda folder: {"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1 is negative"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    arguments, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message) as error:
        trainer_for(tmp_path, **arguments(tmp_path))
    assert "\n" not in str(error.value)


def test_refused_teacher_leaves_the_student_trainable(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(ValueError, match="shares its weights"):
        trainer_for(tmp_path, student=model, teacher_model=model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(TypeError, match="TrainingArguments; DistillationTrainer takes a DistillationConfig"):
        DistillationTrainer(model, "nowhere", TrainingArguments(str(tmp_path)), train_dataset=unequal_rows())


def test_added_tokens_may_be_renamed_between_student_and_teacher(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher", "mixtral", seed=1)
    renamed = copy.deepcopy(tiny_tokenizer())
    text = renamed.backend_tokenizer.to_str().replace("<|end|>", "<|im_end|>")
    renamed._tokenizer = type(renamed.backend_tokenizer).from_str(text)
    renamed.save_pretrained(tmp_path / "teacher")
    assert trainer_for(tmp_path, teacher_model=str(tmp_path / "teacher")).teacher.vocab_size == VOCAB_SIZE


def test_config_reads_schedules_from_a_command_line_and_from_json(tmp_path: Path) -> None:
    parser = HfArgumentParser(DistillationConfig)
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--distillation_weight", "1.0", "0.75"]
    (config,) = parser.parse_args_into_dataclasses(line)
    assert config.weights_at(0.5) == (0.875, 0.0)
    assert settings(tmp_path, crossentropy_weight="[0, 1]").weights_at(0.25) == (1.0, 0.25)
    assert DistillationConfig(**{**config.to_dict(), "bf16": False}).weights_at(1.0) == (0.75, 0.0)
