"""What a fine-tuning run reads: its splits, looked through before a model is loaded, and which tokens the loss is on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from slimmoe_hf.data import SPLITS, load_documents, load_splits, split_by_hash, take_tokens

LossOn = Literal["assistant", "completion", "everything"]
HELD_OUT_TOKENS = 131_072
"""Most tokens of the validation and of the test split that are measured: enough for three digits of a mean."""
_FORMATS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "text": ("text",)}


@dataclass(frozen=True)
class TuningData:
    """The documents of a run, no document in two splits, with no more columns than training reads.

    Attributes:
        train: What is trained on. validation: What a choice may look at. test: What is reported.
        column: `messages`, `prompt` (with `completion`) or `text`.
        loss_on: Which tokens count: those of the assistant, of the completion, or all.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    column: str
    loss_on: LossOn


def read_tuning_data(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "train",
    revision: str | None = None,
    tokens: int | None = None,
    seed: int = 0,
    everything: bool = False,
) -> TuningData:
    """Read and check the documents of a fine-tuning run.

    Args:
        spec: A data spec, as everywhere.
        tokenizer: The model's; chats need its chat template.
        split: What to train on. One that is neither `train` nor held out is divided in three by content.
        revision: A commit of a Hub dataset.
        tokens: Train on documents up to so many tokens, in an order given by `seed`; None is all.
        seed: See `tokens`.
        everything: Put the loss on every token of a chat or prompt.

    Raises:
        ValueError: No such data, no chat template, or chats that cannot be trained on: one line.
    """
    splits = _splits(spec, split, revision)
    column = next(name for name in _FORMATS if name in splits["train"].column_names)
    loss_on: LossOn = "completion" if column == "prompt" else "everything"
    if column == "messages" or not isinstance(splits["train"][0][column], str):
        _check_template(tokenizer, spec)
    if column == "messages":
        loss_on = "assistant" if marks_the_assistant(tokenizer) else "everything"
        for name, documents in splits.items():
            _check_chats(documents, f"{spec} ({name})", loss_on == "assistant" and not everything)
    kept = [*_FORMATS[column], "tools", "chat_template_kwargs"]
    splits = {name: rows.select_columns([c for c in kept if c in rows.column_names]) for name, rows in splits.items()}
    if tokens is not None:
        splits["train"] = take_tokens(splits["train"].shuffle(seed=seed), tokens, tokenizer)
    for name in ("validation", "test"):
        splits[name] = take_tokens(splits[name], HELD_OUT_TOKENS, tokenizer)
    return TuningData(**splits, column=column, loss_on="everything" if everything else loss_on)


def _splits(spec: str, split: str, revision: str | None) -> dict[str, Dataset]:
    if split == "train":
        return load_splits(spec, revision)
    if split in SPLITS:
        raise ValueError(f"--split {split}: that is held-out text, which measures and never trains. Leave it at train.")
    whole = load_documents(spec, split, revision)
    splits = {name: split_by_hash(whole, name) for name in SPLITS}
    for name, documents in splits.items():
        if len(documents) == 0:
            raise ValueError(f"{spec}: {len(whole)} documents leave none for {name}. Bring more.")
    return splits


def use_chat_template(tokenizer: PreTrainedTokenizerBase, file: str | Path) -> None:
    """Give a tokenizer the chat template in a file; it is saved with the model then.

    Raises:
        ValueError: There is no such file, or it is no Jinja template.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"chat_template_path={file}: no such file. Give a Jinja template of your own.")
    text = path.read_text(encoding="utf-8")
    tokenizer.chat_template = text


def marks_the_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template, or TRL's version of it for training, says which tokens are the assistant's."""
    if has_generation_markers(tokenizer.chat_template):
        return True
    try:
        return get_training_chat_template(tokenizer) is not None
    except ValueError:
        return False  # TRL knows no version of it


def _check_template(tokenizer: PreTrainedTokenizerBase, spec: str) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{spec}: holds chats, and the model's tokenizer has no chat template to write them with. Start from the chat "
            "model, or name a Jinja template: `chat_template_path: FILE` in a --config file."
        )
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]
    try:
        tokenizer.apply_chat_template(chat, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template cannot be used: {' '.join(str(error).split())}") from error


def _check_chats(documents: Dataset, where: str, assistant: bool) -> None:
    """Raise ValueError at the first row that is no chat, or has nothing to learn from."""
    for number, row in enumerate(documents):
        fault = _fault(row["messages"], assistant)
        if fault:
            raise ValueError(f"{where}: row {number + 1}: {fault}")


def _fault(messages: Any, assistant: bool) -> str:
    if not isinstance(messages, list) or not messages:
        return "messages should be a list of turns, each with role and content."
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return "every turn of messages should have a role (system, user or assistant) and content."
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            return f"the content of a {turn['role']} turn should be text, found {type(turn.get('content')).__name__}."
    if assistant and all(turn["role"] != "assistant" for turn in messages):
        return "the chat has no turn of the assistant, so there is nothing to learn from it. Leave it out."
    return ""
