"""What the trainers with a teacher are given: read before anything is loaded, and refused before anything is computed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
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

from slimmoe_hf.arguments import DistillationConfig, Seq2SeqDistillationConfig, as_dict
from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.cached_teacher import CachedTeacher
from slimmoe_hf.losses import DistillationLoss
from slimmoe_hf.teacher import LiveTeacher

logger = logging.getLogger(__name__)
Settings = DistillationConfig | Seq2SeqDistillationConfig


def student_config(model: str | Path | PreTrainedModel | PeftModel, args: Settings) -> PreTrainedConfig:
    """The student's config, read from where the student will be loaded."""
    if isinstance(model, str | Path):
        revision = as_dict(args.model_init_kwargs).get("revision")
        return AutoConfig.from_pretrained(str(model), revision=revision, trust_remote_code=args.trust_remote_code)
    return model.config


def student_tokenizer(model: str | Path | PreTrainedModel | PeftModel, args: Settings) -> PreTrainedTokenizerBase:
    """The tokenizer beside the student."""
    source, revision = model, None
    if isinstance(source, str | Path):
        revision = as_dict(args.model_init_kwargs).get("revision")
    else:
        source = source.config._name_or_path
    return AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=args.trust_remote_code)


def refuse_unsupported(config: PreTrainedConfig, processing_class: Any, peft_configs: list[PeftConfig]) -> None:
    """Raise ValueError for students that are no plain language models, or that put tokens of their own before the text."""
    if config.is_encoder_decoder:
        raise ValueError(
            f"model_type={config.model_type!r} is an encoder-decoder: distil it with Seq2SeqDistillationTrainer."
        )
    _refuse_other_than_text(config, processing_class, peft_configs)


def refuse_unsupported_seq2seq(
    config: PreTrainedConfig, processing_class: PreTrainedTokenizerBase, peft_configs: list[PeftConfig]
) -> None:
    """Raise ValueError for students that are no encoder-decoders of text, or whose padding would stand before the text."""
    if not config.is_encoder_decoder:
        raise ValueError(f"model_type={config.model_type!r} is no encoder-decoder: distil it with DistillationTrainer.")
    _refuse_other_than_text(config, processing_class, peft_configs)
    if processing_class.padding_side != "right":
        raise ValueError(
            "padding_side='left' puts padding between the decoder's start and its text, so that a text's loss would depend on "
            "the batch it is in. Set tokenizer.padding_side = 'right'."
        )


def _refuse_other_than_text(config: PreTrainedConfig, processing_class: Any, peft_configs: list[PeftConfig]) -> None:
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


def refuse_untokenised(name: str, dataset: Any) -> None:
    """Raise ValueError for rows that lack what an encoder-decoder is trained on, as far as their columns are known.

    Args:
        name: Of the argument.
        dataset: A dataset, a dictionary of them, or None.
    """
    for each in dataset.values() if isinstance(dataset, dict) else [dataset]:
        columns = (each.column_names if isinstance(each, Dataset | IterableDataset) else None) or ()
        missing = [column for column in ("input_ids", "labels") if columns and column not in columns]
        if missing:
            raise ValueError(
                f"{name} has the columns {', '.join(columns)}, and lacks {' and '.join(missing)}. Tokenise it first: "
                "tokenizer(source, text_target=target)."
            )


def refuse_decoder_only_teacher(teacher: str | Path | PreTrainedModel | None, args: Settings) -> None:
    """Raise ValueError for a teacher that is no encoder-decoder, read before it is loaded."""
    if teacher is None:
        return
    config: Any = teacher.config if isinstance(teacher, PreTrainedModel) else None
    if config is None:
        revision = as_dict(args.teacher_model_init_kwargs).get("revision")
        config = AutoConfig.from_pretrained(str(teacher), revision=revision, trust_remote_code=args.trust_remote_code)
    if not config.is_encoder_decoder:
        raise ValueError(
            f"the teacher is a {config.model_type}, and an encoder-decoder learns from an encoder-decoder. Give one as "
            "teacher_model."
        )


def open_teacher(
    model: str | Path | PreTrainedModel | PeftModel,
    teacher_model: str | Path | PreTrainedModel | None,
    args: Settings,
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
    return LiveTeacher.load(
        teacher_model, args.device, as_dict(args.teacher_model_init_kwargs), args.trust_remote_code,
        encoder_decoder=isinstance(args, Seq2SeqDistillationConfig),
    )  # fmt: skip


def silence_input_jitter(model: PreTrainedModel | PeftModel) -> None:
    """PhiMoE multiplies its inputs by noise twice in training; the teacher it is to match has none."""
    noisy = [module for module in model.modules() if vars(module).get("input_jitter_noise")]
    for module in noisy:
        vars(module)["input_jitter_noise"] = 0.0
    if noisy:
        model.config.input_jitter_noise = 0.0
        logger.info("input_jitter_noise of the student is set to 0: it is no part of what is distilled.")


def _refuse_shared_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Freezing the teacher would freeze the student, and a cut student would be a cut teacher."""
    if {id(parameter) for parameter in student.parameters()} & {id(parameter) for parameter in teacher.parameters()}:
        raise ValueError(
            "teacher_model shares its weights with model. Give the teacher by name, or a copy.deepcopy of the model."
        )
