"""What a recipe for an encoder-decoder can be refused for, and what it reads; what its steps take is in `seq2seq_outlook`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from slimmoe_hf.arguments import Seq2SeqDistillationConfig
from slimmoe_hf.data import SPLITS, dataset_hash, load_documents, tokenize_pairs
from slimmoe_hf.factored_size import FactoredCount, count_factored
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.loading import find_checkpoint, load_config, load_tokenizer, verify_checkpoint, weights_sha256
from slimmoe_hf.preflight import check_values, check_vocabulary, dtype_name
from slimmoe_hf.seq2seq_recipe import Seq2SeqRecipe

_CHUNK = 2048  # pairs tokenised at a time


@dataclass(frozen=True)
class PairOutline:
    """What is known of a run without its weights and its text.

    Attributes:
        model: Folder of what is made small. teacher: Folder of what it learns from. They may lack the weights yet.
        tokenizer: The model's.
        config, teacher_config: Of the two.
        arguments: Training arguments of every stage.
        counts: Parameters at first, merged and factored.
        dtype: What checkpoints are saved in.
    """

    model: Path
    teacher: Path
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    teacher_config: PreTrainedConfig
    arguments: list[Seq2SeqDistillationConfig]
    counts: FactoredCount
    dtype: str


@dataclass(frozen=True)
class PairText:
    """The pairs of a run; none of them is in two places.

    Attributes:
        calibration, train, validation, test: Tokenised: `input_ids` of the prompt, `labels` of the completion.
        test_pairs: The text of `test`.
        left_out: How many pairs were longer than the recipe allows, over all.
    """

    calibration: Dataset
    train: Dataset
    validation: Dataset
    test: Dataset
    test_pairs: Dataset
    left_out: int


def outline_pairs(recipe: Seq2SeqRecipe, elsewhere: bool = False) -> PairOutline:
    """Check what a recipe asks for against the configs of its models; of a Hub id, no weights are downloaded.

    Args:
        recipe: With absolute paths.
        elsewhere: It is to run on another machine, so what this one can compute in does not count.

    Raises:
        ValueError: One line that says what is wrong, where, and the remedy.
    """
    model = find_checkpoint(recipe.model, recipe.revision, weights=False)
    teacher = find_checkpoint(recipe.teacher, recipe.teacher_revision, weights=False) if recipe.teacher else model
    config, teacher_config = load_config(model), load_config(teacher)
    known = [name for name, family in FAMILIES.items() if family.encoder_decoder]
    if config.model_type not in known:
        raise ValueError(
            f"model: {recipe.model} is a {config.model_type}, and task: seq2seq merges and factors {', '.join(known)} only. "
            "The recipe of a decoder has no task."
        )
    counts = _counted(recipe, config)
    arguments = [pair_arguments(recipe, number, elsewhere=elsewhere) for number in range(len(recipe.stages))]
    tokenizer = load_tokenizer(model)
    check_vocabulary(config, tokenizer, model)
    if teacher_config.vocab_size != config.vocab_size or not teacher_config.is_encoder_decoder:
        raise ValueError(
            f"teacher: {recipe.teacher} is a {teacher_config.model_type} with {teacher_config.vocab_size} embeddings, the model "
            f"a {config.model_type} with {config.vocab_size}. Give an encoder-decoder with the model's tokenizer."
        )
    dtype = recipe.dtype or dtype_name(config)
    return PairOutline(model, teacher, tokenizer, config, teacher_config, arguments, counts, dtype)


def _counted(recipe: Seq2SeqRecipe, config: PreTrainedConfig) -> FactoredCount:
    merge = next((stage.merge for stage in recipe.stages if stage.merge is not None), None)
    factor = next((stage.factor for stage in recipe.stages if stage.factor is not None), None)
    if merge is not None and not merge.num_experts < config.num_experts:
        raise ValueError(
            f"stages.0.merge.num_experts={merge.num_experts}: the model has {config.num_experts}. Ask for fewer."
        )
    smaller = min(config.d_model, config.d_ff)
    if factor is not None and factor.rank >= smaller:
        raise ValueError(
            f"stages.{len(recipe.stages) - 1}.factor.rank={factor.rank}: give a multiple of 8 below {smaller}, the smaller side "
            "of an expert's matrices."
        )
    kept = merge.num_experts if merge is not None else config.num_experts
    counts = (
        count_factored(config, kept) if factor is None else count_factored(config, kept, factor.rank, factor.density)
    )
    if merge is None or merge.counts == "adaptive":
        return counts
    gone = (config.num_experts - kept) * 2 * config.d_model * config.d_ff  # of the first sparse encoder layer too
    return counts.model_copy(update={"merged": counts.merged - gone, "factored": counts.factored - gone})


def pair_arguments(
    recipe: Seq2SeqRecipe, number: int, run: Path = Path("unused"), elsewhere: bool = False
) -> Seq2SeqDistillationConfig:
    """The training arguments of a stage, counted from 0, of a run in a folder.

    Raises:
        ValueError: Transformers or we refuse a value.
    """
    where, given = f"stages.{number}.distillation", dict(recipe.stages[number].distillation)
    if elsewhere:
        given = {name: value for name, value in given.items() if name not in ("bf16", "fp16")}
    given = {"report_to": "none", "disable_tqdm": True, "save_total_limit": 2, "router_aux_loss_coef": 0.0, **given}
    check_values(Seq2SeqDistillationConfig, given, where)
    folder = run / f"stage-{number + 1}" / "checkpoints"
    try:
        arguments = Seq2SeqDistillationConfig(output_dir=str(folder), seed=recipe.seed, **given)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    factor = recipe.stages[number].factor
    if factor is not None and arguments.max_steps > 0:
        steps = arguments.max_steps
        first, last = (round(n * steps) if n < 1 else int(n) for n in (factor.initial_steps, factor.final_steps))
        if first + last >= steps:
            raise ValueError(
                f"stages.{number}.factor: initial_steps={first} and final_steps={last} leave nothing of {steps} steps for "
                "taking rows out. Train longer, or give fewer."
            )
    return arguments


def read_pairs(recipe: Seq2SeqRecipe, tokenizer: PreTrainedTokenizerBase) -> PairText:
    """Read, split and tokenise the pairs of a recipe, as many as it asks for.

    Raises:
        ValueError: There are none, or not enough of them; the line says of which part.
    """
    data, evaluation = recipe.data, recipe.evaluation
    splits = {split: load_documents(data.source, split, data.revision) for split in SPLITS}
    try:
        for documents in splits.values():
            tokenize_pairs(documents.select([0]), tokenizer)
    except ValueError as error:
        raise ValueError(f"{data.source}: {error}") from error
    picks, held = {}, set[tuple[str, str]]()
    for name in reversed(SPLITS):  # a pair of test is in no other split, one of validation not in train
        picks[name] = _Pick(recipe, tokenizer, splits[name], held, in_order=name == evaluation.split)
        if name != "train":
            held |= set(zip(splits[name]["prompt"], splits[name]["completion"], strict=True))
    wanted = sum(stage.calibration.tokens for stage in recipe.stages if stage.merge is not None)
    calibration = picks["train"].take(wanted)
    if wanted > (found := _tokens_of(calibration)):
        raise ValueError(
            f"{data.source}: calibration asks for {wanted} tokens, which is all the training data there is ({found}). Ask for "
            "fewer, or bring more data."
        )
    parts = {"calibration": calibration, "train": picks["train"].take(data.tokens)}
    measured = picks[evaluation.split]
    parts["test"] = measured.take(evaluation.tokens)
    pairs = measured.taken()
    parts["validation"] = picks["validation"].take(data.validation_tokens)
    unused = {"calibration": wanted == 0, "validation": evaluation.split == "validation"}
    for name, part in parts.items():
        if len(part) == 0 and not unused.get(name, False):
            raise ValueError(
                f"{data.source} ({name}): no pair is left that has at most {data.max_source_length} and {data.max_target_length} "
                "tokens. Bring more, or raise data.max_source_length or data.max_target_length."
            )
    left_out = sum(pick.left_out for pick in picks.values())
    return PairText(**parts, test_pairs=pairs, left_out=left_out)


class _Pick:
    """The pairs of one split, given away from the front, none of them twice."""

    def __init__(
        self,
        recipe: Seq2SeqRecipe,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Dataset,
        held: set[tuple[str, str]],
        in_order: bool,
    ) -> None:
        self.pairs, self.tokenizer = pairs, tokenizer
        self.limits = {"prompt": recipe.data.max_source_length, "completion": recipe.data.max_target_length}
        shuffled = np.random.default_rng(recipe.seed).permutation(len(pairs))
        self.order: list[int] = list(range(len(pairs))) if in_order else shuffled.tolist()
        self.given = set(held)
        self.last: list[int] = []
        self.left_out = 0

    def take(self, tokens: int | None) -> Dataset:
        """The next pairs that have so many tokens together, tokenised; None takes all that are left."""
        rows: list[dict[str, list[int]]] = []
        before, self.last, place, counted = frozenset(self.given), [], 0, 0
        while place < len(self.order) and (tokens is None or counted < tokens):
            chunk = self.order[place : place + _CHUNK]
            texts = self.pairs.select(chunk)
            made = tokenize_pairs(texts, self.tokenizer)
            columns = (texts["prompt"], texts["completion"], made)
            for index, prompt, completion, row in zip(chunk, *columns, strict=True):
                if tokens is not None and counted >= tokens:
                    break
                place += 1
                if len(row["input_ids"]) > self.limits["prompt"] or len(row["labels"]) > self.limits["completion"]:
                    self.left_out += 1
                elif (prompt, completion) not in before:  # no copy of what an earlier part has
                    self.given.add((prompt, completion))
                    rows.append(row)
                    self.last.append(index)
                    counted += len(row["input_ids"]) + len(row["labels"])
        self.order = self.order[place:]
        return Dataset.from_list(rows)

    def taken(self) -> Dataset:
        """The text of what was taken last."""
        return self.pairs.select(self.last)


def _tokens_of(rows: Dataset) -> int:
    return sum(map(len, rows["input_ids"])) + sum(map(len, rows["labels"])) if len(rows) else 0


def input_hashes(recipe: Seq2SeqRecipe, text: PairText) -> dict[str, str]:
    """Names and hashes of all that a run reads, once its weights are seen to be whole.

    Raises:
        ValueError: A weight is missing.
    """
    model = find_checkpoint(recipe.model, recipe.revision)
    teacher = find_checkpoint(recipe.teacher, recipe.teacher_revision) if recipe.teacher else model
    for path in {model, teacher}:
        verify_checkpoint(path)
    labels = {name: [{"input_ids": row} for row in vars(text)[name]["labels"]] for name in ("train", "test")}
    return {
        "model": weights_sha256(model),
        "teacher": weights_sha256(teacher),
        **{f"{name} data": dataset_hash(vars(text)[name]) for name in ("calibration", "train", "validation", "test")},
        **{f"{name} completions": dataset_hash(rows) for name, rows in labels.items()},
    }
