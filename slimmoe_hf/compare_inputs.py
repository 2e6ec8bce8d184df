"""What a comparison reads: its grid held against the model's config, and the texts and answers that all points share.

Shape letters: N rows, T tokens per row.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from slimmoe_hf.arguments import DistillationConfig
from slimmoe_hf.atomic import replacing, write_text
from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.cache_answers import write_cache
from slimmoe_hf.cache_format import vocabulary_sha256
from slimmoe_hf.compare_point import TEXT
from slimmoe_hf.data import dataset_hash, load_splits, take_apart, tokenize
from slimmoe_hf.evaluation import held_out, measure_loss
from slimmoe_hf.families import refuse_encoder_decoder
from slimmoe_hf.grid import Grid
from slimmoe_hf.grid_sizes import Size, check_sizes
from slimmoe_hf.loading import (
    find_checkpoint,
    load_config,
    load_model,
    load_tokenizer,
    verify_checkpoint,
    weights_sha256,
)
from slimmoe_hf.preflight import check_cache, check_vocabulary, device, training_arguments, training_tokens
from slimmoe_hf.rundir import CACHE

SHARED, _TEACHER = "shared", "teacher.json"


@dataclass(frozen=True)
class Checked:
    """A grid that its model can be put through.

    Attributes:
        model: Folder of the original model; it may lack the weights yet. config, tokenizer: Its own.
        sizes: Of every method, by the numbers of table and method.
        arguments: Of recovery, with the first learning rate.
        recovery_tokens: That every method trains on.
    """

    model: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    sizes: dict[tuple[int, int], Size]
    arguments: DistillationConfig
    recovery_tokens: int


@dataclass(frozen=True)
class Shared:
    """What all points read.

    Attributes:
        folder: Where it lies; its name is a hash of it.
        model: Folder of the original model. model_sha256: Of its weights.
        loss: Of the original model on the test rows. test_tokens: Predicted ones. test_sha256: Of the rows.
    """

    folder: Path
    model: Path
    model_sha256: str
    loss: float
    test_tokens: int
    test_sha256: str


def check_grid(grid: Grid, where: str, weights: bool) -> Checked:
    """Hold a grid against its model's config, without reading weights or text.

    Args:
        grid: From `load_grid`.
        where: Its file, for errors.
        weights: Fetch the weights too, where the model is on the Hub.

    Raises:
        ValueError: One line that says what is wrong, where, and the remedy.
    """
    model = find_checkpoint(grid.model, grid.revision, weights)
    config, tokenizer = load_config(model), load_tokenizer(model)
    check_vocabulary(config, tokenizer, model)
    refuse_encoder_decoder(config, "slimmoe compare")
    sizes = check_sizes(grid, config, where)
    given = {**grid.recovery, "learning_rate": grid.learning_rates[0]}
    arguments = training_arguments(given, Path("unused"), grid.data.max_length, 0, f"{where}: recovery")
    check_cache(grid.teacher_cache, arguments, f"{where}: recovery")
    for table, number, method in grid.rows():
        if method.stages > arguments.max_steps:
            raise ValueError(
                f"{where}: tables.{table}.methods.{number} ({method.name}): {method.stages} stages of {arguments.max_steps} "
                "steps in all. Raise recovery.max_steps, or lower stages."
            )
    return Checked(model, config, tokenizer, sizes, arguments, training_tokens(arguments, 0))


def prepare(grid: Grid, checked: Checked, output: Path) -> Shared:
    """Cut the texts, ask the original model about the recovery text, and measure it. What is there already stays.

    Args:
        grid: From `load_grid`. checked: From `check_grid`, with weights.
        output: The comparison's folder.

    Raises:
        ValueError: A damaged model, or too little text; the line says of which part.
    """
    model, tokenizer = checked.model, checked.tokenizer
    verify_checkpoint(model)
    texts = _texts(grid, checked)
    hashes = {name: dataset_hash(rows) for name, rows in texts.items()}
    kept = {"temperature": checked.arguments.temperature, **grid.teacher_cache.model_dump(exclude={"batch_size"})}
    model_sha256 = weights_sha256(model)
    told = {**hashes, "model": model_sha256, "tokenizer": vocabulary_sha256(tokenizer), "cache": kept}
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    folder = output / SHARED / key
    if not (folder / TEXT).exists():
        with replacing(folder / TEXT) as partial:
            for name, rows in texts.items():
                rows.save_to_disk(partial / name)
    _ask(grid, checked, folder / CACHE, texts["train"])
    rows = texts["test"].with_format("torch")["input_ids"][:]
    if not (folder / _TEACHER).exists():
        loss = measure_loss(load_model(model, device=device()), rows, grid.batch_size).loss
        write_text(folder / _TEACHER, json.dumps({"loss": loss}) + "\n")
    loss = float(json.loads((folder / _TEACHER).read_text())["loss"])
    return Shared(folder, model, model_sha256, loss, rows.shape[0] * (rows.shape[1] - 1), hashes["test"])


def _texts(grid: Grid, checked: Checked) -> dict[str, Dataset]:
    """Recovery rows, the documents that calibration samples are drawn from, and held-out rows."""
    data, tokenizer = grid.data, checked.tokenizer
    splits = load_splits(data.source, data.revision)
    wanted = data.tokens or checked.recovery_tokens
    try:
        recovery, rest = take_apart(splits["train"], wanted, tokenizer, 0)
    except ValueError:
        raise ValueError(
            f"{data.source}: recovery takes {wanted:,} tokens, and the training text has no more, so nothing is left for "
            "calibration. Set data.tokens to fewer: recovery goes over them more than once."
        ) from None
    name = "train"
    try:
        found = {"train": tokenize(recovery, tokenizer, data.max_length, data.packing), "calibration": rest}
        take_apart(rest, grid.calibration.tokens, tokenizer, 0)
        for name, tokens in (("validation", data.validation_tokens), ("test", grid.test_tokens)):
            rows_NT = held_out(splits[name], tokenizer, data.max_length, tokens).rows_NT
            found[name] = Dataset.from_dict({"input_ids": rows_NT.tolist()})
    except ValueError as error:
        raise ValueError(f"{data.source} ({name}): {error}") from error
    return found


def _ask(grid: Grid, checked: Checked, folder: Path, rows: Dataset) -> None:
    """The original model's answers to the recovery rows; a killed call continues."""
    if folder.exists():
        try:
            TeacherCache.open(folder).verify()
        except ValueError:
            shutil.rmtree(folder)
        else:
            return
    asked = grid.teacher_cache
    write_cache(
        checked.model, rows, folder, tokenizer=checked.tokenizer, kind=asked.kind, top_k=asked.top_k,
        temperatures=[checked.arguments.temperature], batch_size=asked.batch_size,
        dtype="float32" if device().type == "cpu" else None, device=device(),
    )  # fmt: skip
