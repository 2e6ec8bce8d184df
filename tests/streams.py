"""What the tests of streamed models share: text, a count of what is read, a stop in the middle, the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_batch

from slimmoe_hf import cli
from slimmoe_hf.blocks import Blocks
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.walk import Walk


def text() -> list[dict[str, torch.Tensor]]:
    """Two batches, of unequal length, one padded."""
    first, second = tiny_batch(rows=3), tiny_batch(rows=2, length=17, seed=1)
    second["attention_mask"][1, 9:] = 0
    return [first, second]


def packed() -> list[dict[str, torch.Tensor]]:
    """A row of two documents."""
    ids = tiny_batch(rows=2)["input_ids"].reshape(1, -1)
    return [{"input_ids": ids, "position_ids": torch.arange(24).repeat(2).unsqueeze(0)}]


def worst(one: ExpertStats, other: ExpertStats) -> float:
    """The largest relative difference, norm-wise per expert, of any statistic."""
    found = []
    assert one.tensors().keys() == other.tensors().keys()
    for name, tensor in one.tensors().items():
        pair = [each.flatten(0, -2) for each in (tensor, other.tensors()[name])]
        assert pair[0].shape == pair[1].shape, name
        found.append(((pair[0] - pair[1]).norm(dim=-1) / pair[1].norm(dim=-1).clamp(min=1e-30)).max().item())
    return max(found)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts of models that are read from now on, in order."""
    parts: list[int] = []
    real = Blocks.read

    def counted(self: Blocks, part: int, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        parts.append(part)
        return real(self, part, *args, **kwargs)

    monkeypatch.setattr(Blocks, "read", counted)
    return parts


def stopping(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Stop in the middle of the so-manyeth file of hidden states or gradients."""
    real, done = Walk.write, [0]

    def write(self: Walk, kind: str, layer: int, make: Callable[[int], torch.Tensor]) -> None:
        done[0] += 1

        def made(number: int) -> torch.Tensor:
            if done[0] == writes and number == 1:
                raise KeyboardInterrupt
            return make(number)

        real(self, kind, layer, made)

    monkeypatch.setattr(Walk, "write", write)


def one_error(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """The one line that a command ends with; give it the fixture `as_loud_as_before`."""
    capsys.readouterr()
    assert cli.main(list(argv)) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def scoring(origin: Path, *more: str) -> list[str]:
    """A command that scores the model in a folder on the text there."""
    data = ["--data", str(origin / "text.jsonl"), "--max-length", "64", "--tokens", "1024"]
    return ["score", str(origin / "model"), *data, *more]
