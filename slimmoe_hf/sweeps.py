"""What a sweep over text tells the taps of the batch in hand.

Shape letters: N tokens, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]


class Tokens:
    """What the taps need to know of the tokens in hand that one stack of layers is given."""

    sequence_N: Tensor
    valid_N: Tensor
    sequences: int
    listening = False  # until a batch is known, forward passes leave no trace

    def __init__(self, gradients: bool = True) -> None:
        """Nothing is known yet; activations are summed on the way back, or without `gradients` as they pass."""
        self.gradients = gradients

    def start(self, mask: Tensor, position_ids: Tensor | None = None) -> None:
        """Take up a batch whose tokens count where `mask` says so, both `[rows, T]`."""
        starts = torch.zeros_like(mask, dtype=torch.long)
        starts[:, 0] = 1
        if position_ids is not None:  # a packed row counts its documents apart
            starts = torch.maximum(starts, (position_ids.expand_as(mask) == 0).long())
        self.sequence_N = starts.flatten().cumsum(0) - 1
        self.valid_N = mask.flatten().bool()
        self.sequences = int(self.sequence_N[-1]) + 1
        self.listening = True


class Sweep:
    """What the taps need to know of the batch in hand.

    Attributes:
        stacks: Of the tokens that each stack of layers is given: a decoder's, or an encoder's and its decoder's.
    """

    def __init__(self, encoder_decoder: bool = False, gradients: bool = True) -> None:
        """Nothing is known yet.

        Args:
            encoder_decoder: The model has two stacks.
            gradients: A backward pass follows, and sums are taken in it. Else every forward pass is summed that is listened to.
        """
        self.stacks = [Tokens(gradients) for _ in range(1 + encoder_decoder)]

    def start(self, batch: Batch) -> None:
        """Take up a batch.

        Raises:
            ValueError: An encoder-decoder's batch has no labels.
        """
        ids = batch["input_ids"]
        mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
        self.stacks[0].start(mask, batch.get("position_ids"))
        for decoder in self.stacks[1:]:
            if "labels" not in batch:
                raise ValueError(
                    "a batch has no labels, and the decoder of an encoder-decoder is scored on them. Add them."
                )
            decoder.start(batch["labels"] != -100)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Forward passes within the block leave no trace: a teacher may be the very model that is scored."""
        for stack in self.stacks:
            stack.listening = False
        try:
            yield
        finally:
            for stack in self.stacks:
                stack.listening = True
