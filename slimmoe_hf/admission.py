"""What `DistillationTrainer` is given: read before anything is loaded, and refused before anything is computed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from slimmoe_hf.arguments import DistillationConfig
from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.cached_teacher import CachedTeacher
from slimmoe_hf.losses import DistillationLoss
from slimmoe_hf.teacher import LiveTeacher

logger = logging.getLogger(__name__)


def student_config(model: str | Path | PreTrainedModel | PeftModel, args: DistillationConfig) -> PreTrainedConfig:
    """The student's config, read from where the student will be loaded."""
    if isinstance(model, str | Path):
        revision = _dict(args.model_init_kwargs).get("revision")
        return AutoConfig.from_pretrained(str(model), revision=revision, trust_remote_code=args.trust_remote_code)
    return model.config


def student_tokenizer(
    model: str | Path | PreTrainedModel | PeftModel, args: DistillationConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer beside the student."""
    source, revision = model, None
    if isinstance(source, str | Path):
        revision = _dict(args.model_init_kwargs).get("revision")
    else:
        source = source.config._name_or_path
    return AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=args.trust_remote_code)


def refuse_unsupported(config: PreTrainedConfig, processing_class: Any, peft_configs: list[PeftConfig]) -> None:
    """Raise ValueError for students that are no plain language models, or that put tokens of their own before the text."""
    if config.get_text_config() is not config or isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"model_type={config.model_type!r} is not a plain language model: distilling vision and audio models is not "
            "supported. Give the text model on its own."
        )
    for peft_config in peft_configs:
        if peft_config.is_prompt_learning:
            raise ValueError(
                f"{type(peft_config).__name__} puts virtual tokens before the student's text, where the teacher has "
                "none to compare with. Use LoRA, or train all weights."
            )


def open_teacher(
    model: str | Path | PreTrainedModel | PeftModel,
    teacher_model: str | Path | PreTrainedModel | None,
    args: DistillationConfig,
    loss: DistillationLoss,
    adapted: bool,
) -> LiveTeacher | CachedTeacher | None:
    """The teacher that the arguments name.

    Args:
        model: The student.
        teacher_model: The teacher.
        args: May name a cache.
        loss: What its answers are for.
        adapted: Whether the student is, or will be, a PEFT model.

    Returns:
        None for the student's own base, which is there when the student is.

    Raises:
        ValueError: None is named, or two are; or the cache cannot be opened.
    """
    path = args.teacher_logits_path
    if args.precompute_teacher_logits and teacher_model is None:
        raise ValueError("precompute_teacher_logits=True needs teacher_model: someone has to give the answers.")
    if path is not None and not args.precompute_teacher_logits:
        if teacher_model is not None:
            raise ValueError(
                "teacher_model and teacher_logits_path both say who teaches. Leave teacher_model out to train from the "
                "cache, or set precompute_teacher_logits=True to write it."
            )
        return CachedTeacher(TeacherCache.open(path), loss)
    if teacher_model is None:
        if not adapted:
            raise ValueError(
                "there is no teacher: give teacher_model, or teacher_logits_path for a cache of its answers. A student with "
                "peft_config may do without: its base is its teacher then."
            )
        return None
    if isinstance(model, nn.Module) and isinstance(teacher_model, nn.Module):
        _refuse_shared_weights(model, teacher_model)
    return LiveTeacher.load(teacher_model, args.device, _dict(args.teacher_model_init_kwargs), args.trust_remote_code)


def silence_input_jitter(model: PreTrainedModel | PeftModel) -> None:
    """PhiMoE multiplies its inputs by noise twice in training; the teacher it is to match has none."""
    noisy = [module for module in model.modules() if vars(module).get("input_jitter_noise")]
    for module in noisy:
        vars(module)["input_jitter_noise"] = 0.0
    if noisy:
        model.config.input_jitter_noise = 0.0
        logger.info("input_jitter_noise of the student is set to 0: it is no part of what is distilled.")


def _dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    assert not isinstance(value, str), "TrainingArguments parses JSON text"
    return dict(value or {})


def _refuse_shared_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Freezing the teacher would freeze the student, and a cut student would be a cut teacher."""
    if {id(parameter) for parameter in student.parameters()} & {id(parameter) for parameter in teacher.parameters()}:
        raise ValueError(
            "teacher_model shares its weights with model. Give the teacher by name, or a copy.deepcopy of the model."
        )
