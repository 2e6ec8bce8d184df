"""Answers of encoder-decoders and their scores: against numbers worked out by hand and against generating one by one."""

from __future__ import annotations

from typing import Any

import evaluate
import pytest
import torch
from tiny import SEQ2SEQ_NAMES, documents, tiny_model, tiny_seq2seq, tiny_tokenizer

from slimmoe_hf.generation_evaluation import evaluate_generation, generate_answers, score_answers
from slimmoe_hf.metrics import metric_path

# answer, reference, exact match, token F1, accuracy, worked out by hand
BY_HAND = [
    ("the ship of state", "the ship of state", 1, 1, 1),
    ("the  ship of state ", "the ship of state", 1, 1, 1),
    ("The ship, of state!", "the ship of state", 0, 1, 1 / 4),
    ("a ship of state", "the ship of state", 0, 1, 3 / 4),
    ("state of the ship", "the ship of state", 0, 1, 0),
    ("ship ship ship", "the ship of state", 0, 2 * 1 / (3 + 3), 1 / 4),
    ("the ship", "the ship of state", 0, 2 * 1 / (1 + 3), 2 / 4),
    ("sloop", "the ship of state", 0, 0, 0),
    ("", "the ship of state", 0, 0, 0),
    ("the", "a", 0, 1, 0),  # nothing is left of either
    ("the", "state", 0, 0, 0),
    ("", "", 1, 1, 1),
    ("1", "1", 1, 1, 1),
]


@pytest.mark.parametrize("name", ["exact_match", "token_f1", "accuracy"])
def test_metrics_are_what_was_worked_out_by_hand(name: str):
    metric = evaluate.load(metric_path(name), keep_in_memory=True)
    answers, references, *columns = map(list, zip(*BY_HAND, strict=True))
    by_name = dict(zip(("exact_match", "token_f1", "accuracy"), columns, strict=True))
    for answer, reference, value in zip(answers, references, by_name[name], strict=True):
        found = metric.compute(predictions=[answer], references=[reference])
        assert found == {name: pytest.approx(value)}, (answer, reference)
    whole = metric.compute(predictions=answers, references=references)[name]
    assert whole == pytest.approx(sum(by_name[name]) / len(BY_HAND))
    assert getattr(score_answers(answers, references), name) == whole


def test_accuracy_of_one_word_is_that_of_a_classification():
    answers, labels = ["yes", "no", "no", "yes"], ["yes", "no", "yes", "no"]
    assert score_answers(answers, labels).accuracy == 0.5


@pytest.mark.parametrize(("answers", "references"), [(["a"], ["a", "b"]), ([], [])])
def test_answers_without_references_are_said(answers: list[str], references: list[str]):
    with pytest.raises(ValueError, match=f"{len(answers)} answers for {len(references)} references"):
        score_answers(answers, references)


def unequal_rows() -> list[dict[str, str]]:
    lengths = (3, 15, 1, 12, 7, 9, 2)
    return [{"prompt": text[: 4 * n], "completion": "x"} for n, text in zip(lengths, documents()[:7], strict=True)]


def one_by_one(model: Any, prompts: list[str], new_tokens: int) -> list[str]:
    """Greedy decoding written out: no padding, no batch, no cache, no `generate()`."""
    tokenizer, answers = tiny_tokenizer(), []
    end, start = tokenizer.eos_token_id, model.config.decoder_start_token_id
    for prompt in prompts:
        source, target = torch.tensor([[*tokenizer(prompt)["input_ids"], end]]), [start]
        while len(target) <= new_tokens and (len(target) == 1 or target[-1] != end):
            with torch.no_grad():
                logits = model(input_ids=source, decoder_input_ids=torch.tensor([target]), use_cache=False).logits
            target.append(int(logits[0, -1].argmax()))
        answers.append(tokenizer.decode(target, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("family", SEQ2SEQ_NAMES)
def test_answers_in_batches_are_those_given_one_by_one(family: str):
    """Padding, the order in batches, and what the generation config says of sampling change nothing."""
    model, prompts = tiny_seq2seq(family, seed=4), [row["prompt"] for row in unequal_rows()]
    expected = one_by_one(model, prompts, new_tokens=5)
    assert len(set(expected)) > 1
    model.generation_config.update(do_sample=True, temperature=5.0, num_beams=3)
    model.train()
    for batch_size in (2, 7):
        found = generate_answers(model, tiny_tokenizer(), prompts, max_new_tokens=5, batch_size=batch_size)
        assert found == expected
    assert model.training


def test_rows_are_scored_by_their_own_answers():
    model, rows = tiny_seq2seq(), unequal_rows()
    answers = one_by_one(model, [row["prompt"] for row in rows], new_tokens=5)
    right = [{**row, "completion": answer} for row, answer in zip(rows, answers, strict=True)]
    assert evaluate_generation(model, tiny_tokenizer(), right, max_new_tokens=5, batch_size=3).exact_match == 1
    wrong = [*right[:4], *({**row, "completion": "wrong"} for row in right[4:])]
    found = evaluate_generation(model, tiny_tokenizer(), wrong, max_new_tokens=5, batch_size=3)
    assert (found.exact_match, found.rows) == (pytest.approx(4 / 7), 7)


def test_a_decoder_is_not_asked():
    with pytest.raises(ValueError, match="olmoe is no encoder-decoder"):
        evaluate_generation(tiny_model("olmoe"), tiny_tokenizer(), unequal_rows())
