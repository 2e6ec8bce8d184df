"""A student trained, as `slimmoe run` and `slimmoe distill` do it: loaded, taught, put together again, saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from rich import get_console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed

from slimmoe_hf.arguments import DistillationConfig
from slimmoe_hf.free_memory import memory_bytes
from slimmoe_hf.loading import load_model
from slimmoe_hf.progress import TrainingProgress
from slimmoe_hf.resumption import last_complete_checkpoint
from slimmoe_hf.seq2seq import Seq2SeqDistillationTrainer
from slimmoe_hf.serving import add_biases, write_serving_config
from slimmoe_hf.teacher import offloaded
from slimmoe_hf.trainer import DistillationTrainer
from slimmoe_hf.weight_dtypes import cast


def distil(
    student: Path,
    teacher: Path | None,
    arguments: DistillationConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
    label: str,
    dtype: str = "float32",
    teacher_memory: str | None = None,
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Train a student (mixed where the arguments say so), from its last complete checkpoint if it has one.

    Every process of a distributed run calls this.

    Args:
        student: Folder of its starting weights.
        teacher: Folder of the original model; None where the arguments name a cache of its answers.
        arguments: Their `output_dir` holds the checkpoints.
        tokenizer: Of both.
        train: Tokenised rows. validation: Likewise; looked at as `eval_strategy` says.
        label: What progress is shown under.
        dtype: What the student's weights are held in.
        teacher_memory: As in a recipe.

    Returns:
        `(model, log history)`; the model is whole in the first process, in others it may be a share.
    """
    if teacher is not None:
        loading = offloaded(memory_bytes(teacher_memory), arguments.device) if teacher_memory is not None else {}
        if arguments.device.type == "cpu":
            loading["dtype"] = dtype  # elsewhere the checkpoint's own
        arguments.teacher_model_init_kwargs = loading or None
    model = load_model(student, dtype)
    trainer = teach(model, teacher, arguments, tokenizer, train, validation, label)
    return _gathered(trainer, student, dtype), trainer.state.log_history


def teach(
    model: PreTrainedModel,
    teacher: Path | None,
    arguments: DistillationConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
    label: str,
    callbacks: Sequence[TrainerCallback] = (),
) -> DistillationTrainer:
    """Train a student that is in memory, in place; everything but the model is as in `distil`.

    Args:
        model: The student.
        callbacks: Of the trainer, beside the progress.

    Returns:
        The trainer, whose model is the trained one, or in a distributed run a share of it.
    """
    set_seed(arguments.seed)
    use_cache = model.config.use_cache
    progress = TrainingProgress(label)
    trainer = DistillationTrainer(
        model=model,
        teacher_model=None if teacher is None else str(teacher),
        args=arguments,
        train_dataset=train,
        eval_dataset=validation if arguments.eval_strategy != "no" else None,
        processing_class=tokenizer,
        callbacks=[progress, *callbacks],
    )
    train_on(trainer, progress)
    model.config.use_cache = use_cache  # the trainer turns it off, and it would be published so
    return trainer


def train_on(trainer: DistillationTrainer | Seq2SeqDistillationTrainer, progress: TrainingProgress) -> None:
    """Train, from the last complete checkpoint if there is one.

    Args:
        trainer: Its `output_dir` holds the checkpoints.
        progress: Among its callbacks.
    """
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_complete_checkpoint(str(trainer.args.output_dir))
    if checkpoint is not None and trainer.is_world_process_zero():
        get_console().log(f"{progress.label}: continues from {checkpoint.name}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.stop()


def _gathered(trainer: DistillationTrainer, student: Path, dtype: str) -> PreTrainedModel:
    """The trained model; one that is spread over processes in one piece, in the first of them."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model)
        if trainer.is_world_process_zero():
            model = load_model(student, dtype)
            model.load_state_dict(weights, assign=True)
            model.tie_weights()
    return model


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str) -> None:
    """Save what plain transformers and serving engines load, tokenizer included; shards of at most 1 GB.

    Args:
        model: It is cast to `dtype` as `weight_dtypes.cast` says, and given the form of `slimmoe_hf.serving`, in place.
        tokenizer: Its tokenizer.
        folder: Where to.
        dtype: `float32`, `bfloat16` or `float16`.
    """
    add_biases(model)
    cast(model, getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="1GB")
    write_serving_config(folder)
    tokenizer.save_pretrained(folder)
