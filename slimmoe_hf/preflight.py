"""Everything a recipe can be refused for, before the first second of compute and before the first byte is written."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimmoe_hf.arguments import DistillationConfig
from slimmoe_hf.data import dataset_hash, load_splits, take_apart, take_tokens, tokenize
from slimmoe_hf.evaluation import HeldOut, count_parameters, held_out, opening_prompts
from slimmoe_hf.families import family_of, set_shape
from slimmoe_hf.loading import (
    find_checkpoint,
    load_config,
    load_model,
    load_tokenizer,
    verify_checkpoint,
    weights_sha256,
)
from slimmoe_hf.plan import Target, validate_target
from slimmoe_hf.recipe import Recipe
from slimmoe_hf.teacher import LiveTeacher

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked.

    Attributes:
        model: Folder of what is slimmed. teacher: Folder of what it learns from.
        tokenizer: The model's.
        dtype: What checkpoints are saved in.
        calibration: Rows set aside from training, enough for every stage.
        train, validation: Rows of the other two splits.
        test: The rows that every model is measured on.
        prompts: What samples continue.
        sizes: `(total, active)` parameters of the teacher, then of every stage.
        needs: Bytes of `disk` and `memory` that the run takes, at least.
        hashes: Names and hashes of all this.
    """

    model: Path
    teacher: Path
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    calibration: Dataset
    train: Dataset
    validation: Dataset
    test: HeldOut
    prompts: list[str]
    sizes: list[tuple[int, int]]
    needs: dict[str, int]
    hashes: dict[str, str]


def check(recipe: Recipe, output: Path) -> Inputs:
    """Check a recipe against its models, its data and the machine. Writes nothing.

    Args:
        recipe: From `load_recipe`.
        output: Where the run will write.

    Raises:
        ValueError: One line that says what is wrong, where, and the remedy.
    """
    model = find_checkpoint(recipe.model, recipe.revision)
    teacher = find_checkpoint(recipe.teacher, recipe.teacher_revision) if recipe.teacher else model
    config = load_config(model)
    configs = [load_config(teacher), *check_targets(config, [stage.target for stage in recipe.stages])]
    arguments = [stage_arguments(recipe, number) for number in range(len(recipe.stages))]
    tokenizer = load_tokenizer(model)
    check_vocabulary(config, tokenizer, model)
    if model != teacher:
        verify_checkpoint(model)
        load_model(model)  # raises where a weight is missing
    check_teacher(teacher, config, tokenizer)
    dtype = recipe.dtype or str(config.dtype or torch.float32).removeprefix("torch.")
    sizes = [count_parameters(_meta_model(each)) for each in configs]
    needs = _check_room(output, sizes, dtype, arguments, recipe.data.max_length * config.vocab_size)
    rows, test, prompts = _read_data(recipe, tokenizer)
    hashes = {
        "model": weights_sha256(model),
        "teacher": weights_sha256(teacher),
        **{f"{name} data": dataset_hash(each) for name, each in rows.items()},
        "test data": dataset_hash([{"input_ids": test.rows_NT.flatten()}]),
    }
    return Inputs(
        model, teacher, tokenizer, dtype, **rows, test=test, prompts=prompts, sizes=sizes, needs=needs, hashes=hashes
    )


def check_targets(config: PreTrainedConfig, targets: list[Target]) -> list[PreTrainedConfig]:
    """The configs after every stage, each target held against the model that the stage before leaves.

    Raises:
        ValueError: A dense or unknown model, or a target that its stage's model cannot take.
    """
    family_of(config)
    configs = []
    for number, target in enumerate(targets):
        try:
            config = _slimmed_config(config, target)
        except ValueError as error:
            before = f" (after stage {number})" if number else ""
            raise ValueError(f"stages.{number}.target: {str(error).rstrip()}{before}") from error
        configs.append(config)
    return configs


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raise ValueError if a tokenizer emits ids that the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{path}: its tokenizer has {len(tokenizer)} tokens, the model embeddings for {config.vocab_size}. "
            "Bring the tokenizer that the model was trained with."
        )


def check_teacher(teacher: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check a teacher's files, that it loads whole, and that it speaks of the same tokens as the student.

    Raises:
        ValueError: It does not.
    """
    verify_checkpoint(teacher)
    live = LiveTeacher(load_model(teacher), load_tokenizer(teacher))
    try:
        live.check_vocabulary(config.vocab_size, tokenizer)
    except ValueError as error:
        raise ValueError(f"{teacher}: {error}") from error


def training_arguments(
    given: dict[str, Any], folder: Path, max_length: int, seed: int, where: str
) -> DistillationConfig:
    """The arguments of a training run on rows that are tokenised already.

    Args:
        given: Arguments of `DistillationConfig` that the user set.
        folder: Where its checkpoints go.
        max_length: T, tokens per row.
        seed: Of everything random.
        where: The place in the recipe, for errors.

    Raises:
        ValueError: Transformers, TRL or we refuse a value.
    """
    given = {"report_to": "none", "disable_tqdm": True, "save_total_limit": 2, **given}
    for field in dataclasses.fields(DistillationConfig):
        if isinstance(field.default, int | float) and isinstance(given.get(field.name), str):
            raise ValueError(f"{where}: {field.name}={given[field.name]!r} is not a number (or true, or false).")
    try:
        return DistillationConfig(
            output_dir=str(folder), seed=seed, max_length=max_length, packing=False,
            dataset_kwargs={"skip_prepare_dataset": True}, **given,
        )  # fmt: skip
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error


def stage_arguments(recipe: Recipe, number: int, folder: Path = Path("unused")) -> DistillationConfig:
    """The training arguments of a stage, counted from 0."""
    where = f"stages.{number}.distillation"
    return training_arguments(recipe.stages[number].distillation, folder, recipe.data.max_length, recipe.seed, where)


def device() -> torch.device:
    """Where models run: the first GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plan_of_work(recipe: Recipe, inputs: Inputs) -> str:
    """What the run is going to do, a line a stage, and what it needs."""
    total, active = inputs.sizes[0]
    lines = ["Plan of work", f"  teacher: {total:,} parameters, {active:,} active"]
    for number, (stage, (total, active)) in enumerate(zip(recipe.stages, inputs.sizes[1:], strict=True), 1):
        tokens = training_tokens(stage_arguments(recipe, number - 1), len(inputs.train))
        lines += [
            f"  stage {number}: {stage.target}: {total:,} parameters, {active:,} active",
            f"           score {stage.calibration.tokens:,} tokens ({stage.criterion}, {stage.calibration.loss}), "
            f"distil on {tokens:,}",
        ]
    needs = ", ".join(f"{needed / 1e9:.2f} GB of {what}" for what, needed in inputs.needs.items())
    lines.append(
        f"  every model measured on {inputs.test.tokens:,} tokens ({recipe.data.source}, {recipe.evaluation.split})"
    )
    lines.append(f"  at least {needs}; {torch.get_num_threads()} threads on {device()}")
    return "\n".join(lines)


def training_tokens(arguments: DistillationConfig, rows: int) -> int:
    """Tokens that a training run sees, each as often as it is seen, on a dataset of so many rows."""
    assert arguments.max_length is not None
    if arguments.max_steps > 0:
        rows_a_step = arguments.train_batch_size * arguments.gradient_accumulation_steps
        return arguments.max_steps * rows_a_step * arguments.max_length
    return int(arguments.num_train_epochs * rows) * arguments.max_length


def _read_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Dataset], HeldOut, list[str]]:
    """`calibration`, `train` and `validation` rows, what is measured on, and the prompts; no text is in two of them."""
    data, evaluation = recipe.data, recipe.evaluation
    splits = load_splits(data.source, data.revision)
    wanted = max(stage.calibration.tokens for stage in recipe.stages)
    documents = {"validation": _some(splits["validation"], data.validation_tokens, tokenizer, recipe.seed)}
    name = "calibration"
    try:
        documents["calibration"], rest = take_apart(splits["train"], wanted, tokenizer, recipe.seed)
        documents["train"] = _some(rest, data.tokens, tokenizer, recipe.seed)
        rows = {}
        for name, texts in documents.items():
            rows[name] = tokenize(texts, tokenizer, data.max_length, data.packing)
        name = evaluation.split
        length = evaluation.max_length or data.max_length
        test = held_out(splits[evaluation.split], tokenizer, length, evaluation.tokens)
    except ValueError as error:
        raise ValueError(f"{data.source} ({name}): {error}") from error
    prompts = evaluation.prompts
    return rows, test, opening_prompts(splits[evaluation.split], tokenizer) if prompts is None else prompts


def _some(documents: Dataset, tokens: int | None, tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    """Documents in an order given by the seed, up to so many tokens; all of them, in their own order, without a limit."""
    if tokens is None:
        return documents
    order = np.random.default_rng(seed).permutation(len(documents))
    return take_tokens(documents.select(order), tokens, tokenizer)


def _slimmed_config(config: PreTrainedConfig, target: Target) -> PreTrainedConfig:
    after, slimmed = validate_target(config, target), copy.deepcopy(config)
    set_shape(slimmed, after)
    return slimmed


def _meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _check_room(
    output: Path, sizes: list[tuple[int, int]], dtype: str, stages: list[DistillationConfig], row_logits: int
) -> dict[str, int]:
    """Bytes that a run needs; refuse what cannot fit. Both are lower bounds, so a refusal is never a false alarm."""
    (teacher, _), students = sizes[0], [total for total, _ in sizes[1:]]
    disk, memory = students[-1] * _BYTES[dtype], 0
    for arguments, student in zip(stages, students, strict=True):
        checkpoints = (arguments.save_total_limit or 1) if arguments.save_strategy != "no" else 0
        disk += 2 * student * _BYTES[dtype] + checkpoints * student * 12  # weights and two moments in float32
        memory = max(memory, student * 16 + teacher * 4 + 2 * arguments.train_batch_size * row_logits * 4)
    place = next(folder for folder in (output, *output.parents) if folder.is_dir())
    mine = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())  # of a run that continues
    free = {"disk": shutil.disk_usage(place).free + mine, "memory": _free_memory()}
    remedies = {"disk": "Free some, or lower save_total_limit.", "memory": "Lower per_device_train_batch_size."}
    needs = {"disk": disk, "memory": memory}
    for what, needed in needs.items():
        if needed > free[what]:
            found = f"at least {needed / 1e9:.1f} GB of {what}, {free[what] / 1e9:.1f} GB are free"
            raise ValueError(f"{output}: the run needs {found}. {remedies[what]}")
    return needs


def _free_memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
