"""Where the teacher's signal comes from. Today: a live model, asked batch by batch.

Shape letters: B rows, T tokens per row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slimmoe_hf.losses import shared_vocabulary


class LiveTeacher:
    """A frozen model in eval mode, so that its routing is the deterministic one.

    Attributes:
        model: The teacher, frozen.
        tokenizer: Its own tokenizer where one is saved beside it, else None.
        vocab_size: V, rows of its head.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Freeze `model` and switch it to eval mode; it is changed in place, and stays on its device until `to`."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.vocab_size = int(model.config.get_text_config().vocab_size)

    @classmethod
    def load(
        cls,
        source: str | Path | PreTrainedModel,
        device: torch.device,
        init_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> LiveTeacher:
        """Take a model as it is, or load one.

        Args:
            source: A model, a folder or a Hub id.
            device: Where it will run. On a CPU a teacher loaded by name computes in float32, elsewhere in the dtype of
                its checkpoint; `init_kwargs` may name another.
            init_kwargs: For `from_pretrained`.
            trust_remote_code: Whether code that comes with the checkpoint may run.

        Raises:
            OSError: There is no such model.
        """
        kwargs = {"trust_remote_code": trust_remote_code, **(init_kwargs or {})}
        if isinstance(source, PreTrainedModel):
            return cls(source, _saved_tokenizer(source.config._name_or_path, kwargs))
        kwargs.setdefault("dtype", torch.float32 if device.type == "cpu" else "auto")
        model = AutoModelForCausalLM.from_pretrained(str(source), **kwargs)
        return cls(model, _saved_tokenizer(str(source), kwargs))

    def check_vocabulary(self, student_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Compare the teacher's vocabulary with the student's.

        Args:
            student_size: Rows of the student's head.
            tokenizer: The tokenizer of the training data.

        Raises:
            ValueError: A token of the data has no logit in one of the two, or the tokenizers give an id to different
                tokens. Added tokens may differ: padding rows are often renamed.
        """
        shared_vocabulary(student_size, self.vocab_size, len(tokenizer))
        if self.tokenizer is None:
            return
        ours, theirs = (_base_vocabulary(one) for one in (tokenizer, self.tokenizer))
        differing = sum(theirs.get(index, token) != token for index, token in ours.items())
        if differing or len(ours) != len(theirs):
            raise ValueError(
                f"student and teacher do not share a vocabulary: of the {len(ours)} tokens of the student's tokenizer "
                f"and the {len(theirs)} of the teacher's, {differing} share an id and differ. "
                "Distil from a teacher with the same tokenizer."
            )

    def to(self, device: torch.device) -> None:
        """Move the teacher; every process holds a whole one."""
        self.model.to(device)

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """Logits of one batch.

        Args:
            inputs: What the student's forward takes, without labels.

        Returns:
            `[B, T, V]`.
        """
        return self.model(**inputs, use_cache=False).logits


def _saved_tokenizer(source: str, kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model, or None: a teacher needs none, it only makes the check sharper."""
    if not source:
        return None
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=kwargs.get("revision"), trust_remote_code=kwargs["trust_remote_code"]
        )
    except (OSError, ValueError):
        return None


def _base_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added = tokenizer.get_added_vocab()
    return {index: token for token, index in tokenizer.get_vocab().items() if token not in added}
