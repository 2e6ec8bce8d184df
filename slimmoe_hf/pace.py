"""How long a walk through a model's layers will take, told while its first layer is in hand.

Reading is timed on that layer, computing on its second batch (or its only one). Nothing is assumed but that the other
layers are like it. What the output head computes is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import get_console

from slimmoe_hf.blocks import Blocks

_BACK = 2.0  # a layer on the way back is computed once more, and differentiated by its inputs, not by its weights


def shown_time(seconds: float) -> str:
    """A time for people: seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s" if seconds else ""
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Pace:
    """Listens to one walk, and tells once on the way forth and once on the way back what is to be expected.

    Attributes:
        told: What it said.
    """

    def __init__(
        self, what: str, blocks: Blocks, forth: Sequence[int], back: Sequence[int], tokens: int, passes: int | None = 1
    ) -> None:
        """Nothing is known yet.

        Args:
            what: Is being done, for people.
            blocks: The model, which times its reading.
            forth, back: Parts that are to be passed.
            tokens: In one pass, padding included.
            passes: Like this one there will be; None is not known.
        """
        self._what, self._blocks, self._forth, self._back = what, blocks, forth, back
        self._tokens, self._passes = tokens, passes
        self._heard: set[str] = set()
        self.told: list[str] = []

    def saw(self, kind: str, batches: int, number: int, tokens: int, seconds: float) -> None:
        """A batch has gone through a decoder layer.

        Args:
            kind: `inputs` on the way forth, `gradients` on the way back.
            batches: That there are. number: Of this one.
            tokens: It has, padding included.
            seconds: It took.
        """
        if kind in self._heard or number != min(1, batches - 1):
            return
        self._heard.add(kind)
        each = self._tokens * seconds / tokens
        back = sum(self._layer(part, each * (_BACK if kind == "inputs" else 1)) for part in self._back)
        forth = sum(self._layer(part, each) for part in self._forth) if kind == "inputs" else 0
        self._tell(forth + back, kind, tokens / seconds)

    def _layer(self, part: int, computing: float) -> float:
        """Seconds for a part; the next one is read meanwhile."""
        size, blocks = self._blocks.bytes(part), self._blocks
        return size * blocks.seconds_placing + max(size * blocks.seconds_reading, computing if part >= 0 else 0.0)

    def _tell(self, seconds: float, kind: str, speed: float) -> None:
        passes = "" if self._passes == 1 else " a pass"
        if self._passes is not None and self._passes > 1:
            passes += f", {shown_time(self._passes * seconds)} for {self._passes}"
        reading = 1e-9 / max(self._blocks.seconds_reading, 1e-15)
        twice = "; the way back counted as twice the way forth" if kind == "inputs" and self._back else ""
        way = " for the way back" if kind == "gradients" else ""
        self.told.append(
            f"{self._what}: about {shown_time(seconds)}{passes}{way}, at the pace of the first layer: {reading:.2f} GB/s "
            f"read, {speed:,.0f} tokens/s a layer, both measured on it{twice}; the output head not counted"
        )
        get_console().log(self.told[-1])
