"""Everything a recipe can be refused for, before the first second of compute and before the first byte is written."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from slimmoe_hf.arguments import DistillationConfig
from slimmoe_hf.budget import Limits, StageTarget
from slimmoe_hf.data import dataset_hash, load_splits, take_apart, take_tokens, tokenize
from slimmoe_hf.disk import meta_model
from slimmoe_hf.evaluation import HeldOut, count_parameters, held_out, opening_prompts
from slimmoe_hf.families import family_of, refuse_encoder_decoder
from slimmoe_hf.launch import processes_of
from slimmoe_hf.loading import (
    files_sha256,
    find_checkpoint,
    load_config,
    load_tokenizer,
    verify_checkpoint,
    weights_sha256,
)
from slimmoe_hf.recipe import Recipe, Stage, TeacherCacheSpec
from slimmoe_hf.rundir import CACHE
from slimmoe_hf.sizing import own_dtype, parameter_counts, slimmed_config
from slimmoe_hf.sources import arrived, fetch_weights, has_weights, open_source
from slimmoe_hf.stage_search import most_after, supposed
from slimmoe_hf.teacher import LiveTeacher
from slimmoe_hf.terms import Terms


@dataclass(frozen=True)
class Outline:
    """What is known of a run without its weights and its text.

    Attributes:
        model: Folder of what is slimmed. teacher: Folder of what it learns from. They may lack the weights yet.
        tokenizer: The model's.
        config, teacher_config: Of the two. after: The configs after every stage.
        arguments: Training arguments of every stage.
        dtype: What checkpoints are saved in.
        download: Bytes of weights that are still to be fetched from the Hub.
    """

    model: Path
    teacher: Path
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    teacher_config: PreTrainedConfig
    after: list[PreTrainedConfig]
    arguments: list[DistillationConfig]
    dtype: str
    download: int


@dataclass(frozen=True)
class Text:
    """The text of a run; none of it is in two places.

    Attributes:
        calibration: Rows set aside from training, enough for every stage.
        train, validation: Rows of the other two splits.
        test: The rows that every model is measured on.
        prompts: What samples continue.
    """

    calibration: Dataset
    train: Dataset
    validation: Dataset
    test: HeldOut
    prompts: list[str]


@dataclass(frozen=True)
class Inputs(Text):
    """What a run reads, checked.

    Attributes:
        model: Folder of what is slimmed. teacher: Folder of what it learns from.
        tokenizer: The model's.
        dtype: What checkpoints are saved in.
        hashes: Names and hashes of all this.
    """

    model: Path
    teacher: Path
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    hashes: dict[str, str]


def outline(recipe: Recipe, elsewhere: bool = False) -> Outline:
    """Check what a recipe asks for against the configs of its models; of a Hub id, no weights are downloaded.

    Args:
        recipe: From `load_recipe`.
        elsewhere: It is to run on another machine, so what this one can compute in does not count.

    Raises:
        ValueError: One line that says what is wrong, where, and the remedy.
    """
    processes_of(recipe)  # refuses an accelerate config that a stage cannot be trained with
    model = find_checkpoint(recipe.model, recipe.revision, weights=False)
    teacher = find_checkpoint(recipe.teacher, recipe.teacher_revision, weights=False) if recipe.teacher else model
    config, teacher_config = load_config(model), load_config(teacher)
    after = check_targets(config, [stage.target for stage in recipe.stages])
    asked = recipe if not elsewhere else _without(recipe, "bf16", "fp16")
    arguments = [stage_arguments(asked, number) for number in range(len(recipe.stages))]
    for number, (made, said) in enumerate(zip(after, arguments, strict=True)):
        try:
            Terms(said.router_logits_weight, said.hidden_states_weight).check(made, teacher_config)
        except ValueError as error:
            raise ValueError(f"stages.{number}.distillation: {error}") from error
    tokenizer = load_tokenizer(model)
    check_vocabulary(config, tokenizer, model)
    dtype = recipe.dtype or dtype_name(config)
    remote = {model: (recipe.model, config), **({teacher: (recipe.teacher, teacher_config)} if recipe.teacher else {})}
    download = sum(
        max(0, count_parameters(meta_model(each))[0] * getattr(torch, dtype_name(each)).itemsize - arrived(folder))
        for folder, (name, each) in remote.items()
        if is_remote(name) and not has_weights(folder)
    )
    return Outline(model, teacher, tokenizer, config, teacher_config, after, arguments, dtype, download)


def dtype_name(config: PreTrainedConfig) -> str:
    """What a checkpoint of this config is stored in; float32 where the config does not say."""
    return str(own_dtype(config)).removeprefix("torch.")


def is_remote(name: str) -> bool:
    """Whether a model or dataset is on the Hub rather than here."""
    return name != "sotu" and not Path(name).expanduser().exists()


def free_disk(output: Path) -> int:
    """Bytes that a run may write, those that it has written already among them."""
    place = next(folder for folder in (output, *output.parents) if folder.is_dir())
    mine = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return shutil.disk_usage(place).free + mine


def check(recipe: Recipe, found: Outline, text: Text) -> Inputs:
    """Check the weights of a recipe's models. Writes nothing but the Hub's cache.

    Args:
        recipe: From `load_recipe`.
        found: From `outline`.
        text: From `read_text`.

    Raises:
        ValueError: One line that says what is wrong, where, and the remedy.
    """
    named = [(recipe.model, found.model), (recipe.teacher or recipe.model, found.teacher)]
    # A snapshot's folder has the name of its commit: what was looked at is what is fetched.
    model, teacher = fetch_weights(*(open_source(name, at.name if is_remote(name) else None) for name, at in named))
    if model != teacher:
        verify_checkpoint(model)
    check_teacher(teacher, found.config, found.tokenizer)
    hashes = {
        "model": weights_sha256(model),
        "teacher": weights_sha256(teacher),
        **{f"{name} data": dataset_hash(vars(text)[name]) for name in ("validation", "calibration", "train")},
        "test data": dataset_hash([{"input_ids": text.test.rows_NT.flatten()}]),
        **({"accelerate config": files_sha256([Path(recipe.accelerate)])} if recipe.accelerate else {}),
    }
    return Inputs(
        **vars(text), model=model, teacher=teacher, tokenizer=found.tokenizer, dtype=found.dtype, hashes=hashes
    )


def check_targets(config: PreTrainedConfig, targets: list[StageTarget]) -> list[PreTrainedConfig]:
    """The configs after every stage, each target held against the model that the stage before leaves.

    Of a budget it is `stage_search.supposed`, and so are those of later stages, which can only be budgets too. One of
    those may be met already by what is found: then its stage cuts nothing.

    Raises:
        ValueError: A dense or unknown model, a target that its stage's model cannot take, or a budget that it surely meets.
    """
    family_of(config)
    refuse_encoder_decoder(config, "a recipe without `task: seq2seq`")
    configs, most = [], _most(config)
    for number, target in enumerate(targets):
        try:
            if number and targets[number - 1].searched and not target.searched:
                raise ValueError(
                    "nobody knows yet whether these sizes fit the shape that a budget finds. Give this stage a budget too, or "
                    "sizes to the one before"
                )
            if target.searched:
                most = most_after(most, target, known=number == 0 or not targets[number - 1].searched)
                config = supposed(config, target)
            else:
                config = slimmed_config(config, target.sizes)
                most = _most(config)
        except ValueError as error:
            before = f" (after stage {number})" if number else ""
            raise ValueError(f"stages.{number}.target: {str(error).rstrip()}{before}") from error
        configs.append(config)
    return configs


def _most(config: PreTrainedConfig) -> Limits:
    counts = parameter_counts(config)
    return Limits(counts.total, counts.active)


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raise ValueError if a tokenizer emits ids that the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{path}: its tokenizer has {len(tokenizer)} tokens, the model embeddings for {config.vocab_size}. "
            "Bring the tokenizer that the model was trained with."
        )


def check_teacher(
    teacher: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, finite: bool = True
) -> None:
    """Check a teacher's files, that no weight is missing, and that it speaks of the same tokens as the student.

    Args:
        teacher: Its folder.
        config: The student's.
        tokenizer: Of the text.
        finite: Look through its values too.

    Raises:
        ValueError: It does not.
    """
    verify_checkpoint(teacher, finite)
    live = LiveTeacher(meta_model(load_config(teacher)), load_tokenizer(teacher))
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
    check_values(DistillationConfig, given, where)
    try:
        return DistillationConfig(
            output_dir=str(folder), seed=seed, max_length=max_length, packing=False,
            dataset_kwargs={"skip_prepare_dataset": True}, **given,
        )  # fmt: skip
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error


def check_values(config: type[TrainingArguments], given: dict[str, Any], where: str) -> None:
    """Raise ValueError for values of training arguments that transformers would stumble over later, or never."""
    for field in dataclasses.fields(config):
        if isinstance(field.default, int | float) and isinstance(given.get(field.name), str):
            raise ValueError(f"{where}: {field.name}={given[field.name]!r} is not a number (or true, or false).")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if given.get(name, 1) < 1:
            raise ValueError(f"{where}: {name}={given[name]!r} should be 1 or more.")
    if given.get("learning_rate", 0.0) < 0:
        raise ValueError(f"{where}: learning_rate={given['learning_rate']!r} should not be negative.")


def stage_arguments(recipe: Recipe, number: int, run: Path = Path("unused")) -> DistillationConfig:
    """The training arguments of a stage, counted from 0, of a run in a folder.

    Raises:
        ValueError: Transformers, TRL or we refuse a value, or the recipe's teacher cache would not serve the loss.
    """
    where, given = f"stages.{number}.distillation", dict(recipe.stages[number].distillation)
    if recipe.teacher_cache is not None:
        given["teacher_logits_path"] = str(run / CACHE)
    folder = run / f"stage-{number + 1}" / "checkpoints"
    arguments = training_arguments(given, folder, recipe.data.max_length, recipe.seed, where)
    if recipe.teacher_cache is not None:
        check_cache(recipe.teacher_cache, arguments, where)
    return arguments


def check_cache(asked: TeacherCacheSpec, arguments: DistillationConfig, where: str) -> None:
    """Raise ValueError if a teacher cache would not serve the loss of a training run; `where` is its place in the file."""
    if asked.kind != "top_k":
        return
    if arguments.beta > 0:
        raise ValueError(
            f"{where}: beta={arguments.beta:g} looks at every token, and teacher_cache keeps {asked.top_k}. Set "
            "teacher_cache.kind: hidden, or beta: 0."
        )
    if arguments.loss_top_k > asked.top_k:
        raise ValueError(
            f"{where}: loss_top_k={arguments.loss_top_k}, and teacher_cache.top_k is {asked.top_k}. Raise it."
        )


def device() -> torch.device:
    """Where models run: the first GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _without(recipe: Recipe, *names: str) -> Recipe:
    """A recipe whose stages leave some training arguments unsaid."""
    stages = [
        stage.model_copy(
            update={"distillation": {key: value for key, value in stage.distillation.items() if key not in names}}
        )
        for stage in recipe.stages
    ]
    return recipe.model_copy(update={"stages": stages})


def teacher_dtype(stage: Stage, on_cpu: bool, own: str) -> str:
    """What a stage's teacher computes in: on a CPU the student's `training_dtype`, elsewhere its checkpoint's."""
    return stage.training_dtype if on_cpu else own


def training_tokens(arguments: DistillationConfig, rows: int, processes: int = 1) -> int:
    """Tokens that a training run sees, each as often as it is seen, on a dataset of so many rows."""
    assert arguments.max_length is not None
    if arguments.max_steps > 0:
        rows_a_step = arguments.train_batch_size * arguments.gradient_accumulation_steps
        return arguments.max_steps * rows_a_step * arguments.max_length * processes
    return int(arguments.num_train_epochs * rows) * arguments.max_length


def read_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Read, split and tokenise the text of a recipe.

    Raises:
        ValueError: There is none, or not enough of it; the line says of which part.
    """
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
    if prompts is None:
        prompts = opening_prompts(splits[evaluation.split], tokenizer)
    return Text(**rows, test=test, prompts=prompts)


def _some(documents: Dataset, tokens: int | None, tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    """Documents in an order given by the seed, up to so many tokens; all of them, in their own order, without a limit."""
    if tokens is None:
        return documents
    order = np.random.default_rng(seed).permutation(len(documents))
    return take_tokens(documents.select(order), tokens, tokenizer)
