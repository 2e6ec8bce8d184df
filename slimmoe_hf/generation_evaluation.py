"""What an encoder-decoder answers, and how right it is: greedy generation, exact match, token F1, accuracy.

Shape letters: B rows at a time, S tokens of the longest prompt among them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimmoe_hf.data import tokenize_document

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class GenerationScores(BaseModel):
    """How right answers are: means over the rows, each from 0 to 1.

    Attributes:
        exact_match: Share of the answers that are the reference, see `exact_match`.
        token_f1: SQuAD's F1, see `token_f1`.
        accuracy: Words at their places, see `accuracy`.
        rows: How many answers there are.
    """

    model_config = ConfigDict(frozen=True)

    exact_match: float
    token_f1: float
    accuracy: float
    rows: int


def exact_match(answer: str, reference: str) -> float:
    """1 where an answer is the reference, letter by letter; how much white space is between the words does not count."""
    return float(answer.split() == reference.split())


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words that an answer and its reference share, in any order, from 0 to 1 (SQuAD's script, arXiv 1606.05250).

    Both are put in small letters first, without punctuation and without the words a, an and the. Where nothing is left
    of one of them, it is 1 if nothing is left of the other either, else 0.
    """
    answered, expected = _normalised(answer), _normalised(reference)
    shared = sum((Counter(answered) & Counter(expected)).values())
    if not answered or not expected:
        return float(answered == expected)
    return 2 * shared / (len(answered) + len(expected))


def accuracy(answer: str, reference: str) -> float:
    """Share of the places, of the longer of the two, where an answer and its reference have the same word.

    With answers of one word it is the accuracy of a classification. Two empty ones agree: 1.
    """
    answered, expected = answer.split(), reference.split()
    places = max(len(answered), len(expected))
    return sum(a == b for a, b in zip(answered, expected, strict=False)) / places if places else 1.0


def score_answers(answers: Sequence[str], references: Sequence[str]) -> GenerationScores:
    """Score answers against one reference each.

    Raises:
        ValueError: There are none, or not as many of the one as of the other.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(f"{len(answers)} answers for {len(references)} references: give one answer for each.")
    pairs = list(zip(answers, references, strict=True))
    means = {score.__name__: sum(score(*pair) for pair in pairs) / len(pairs) for score in SCORES}
    return GenerationScores(**means, rows=len(pairs))


SCORES = (exact_match, token_f1, accuracy)


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """The likeliest answer token by token, by `generate()`, of an encoder-decoder in eval mode.

    Prompts are padded on the right and masked; like lengths go together. Whatever the model's generation config says of
    sampling and beams is not heeded.

    Args:
        model: An encoder-decoder; its mode is put back.
        tokenizer: Its tokenizer.
        prompts: What the encoder reads; the end-of-text token is added as in training.
        max_new_tokens: An answer is cut there.
        batch_size: B.

    Returns:
        One text for each prompt, without special tokens.

    Raises:
        ValueError: The model is no encoder-decoder.
    """
    if not model.config.is_encoder_decoder:
        raise ValueError(
            f"{model.config.model_type} is no encoder-decoder: prompts and answers are separate texts here. Score a "
            "decoder by its loss or by tasks: slimmoe eval."
        )
    ids = [tokenize_document({"text": prompt}, tokenizer) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    settings = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    answers, training = [""] * len(ids), model.training
    model.eval()
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, padding_side="right", return_tensors="pt")
        given = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        generated = model.generate(  # type: ignore[operator]
            **given, generation_config=settings
        )
        for row, text in zip(rows, tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True):
            answers[row] = text.strip()
    model.train(training)
    return answers


def evaluate_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> GenerationScores:
    """Let an encoder-decoder answer the prompts of rows, and score its answers against their completions.

    Args:
        model: An encoder-decoder, on the device where it shall run.
        tokenizer: Its tokenizer.
        rows: With `prompt` and `completion`, both text; a dataset of `load_documents`, say.
        max_new_tokens: An answer is cut there.
        batch_size: B.

    Raises:
        ValueError: The model is no encoder-decoder, or there are no rows.
    """
    pairs = [(str(row["prompt"]), str(row["completion"])) for row in rows]
    prompts = [prompt for prompt, _ in pairs]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return score_answers(answers, [completion for _, completion in pairs])


def _normalised(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
