"""A teacher's answers to texts, from a checkpoint of which one decoder layer at a time is in memory.

Texts go through a layer in groups, as many at a time as the memory for their hidden states allows: every group reads
the checkpoint once. A finished group is in the cache; a killed one goes on with the layer that it was at.

Shape letters: B texts at a time, T tokens of the longest, D model width.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import torch
from rich import get_console
from torch import Tensor

from slimmoe_hf.answers import Answered, Answers, Texts, pad_texts
from slimmoe_hf.atomic import write_text
from slimmoe_hf.blocks import HEAD, Blocks
from slimmoe_hf.cache_format import CacheSpec, Kind, text_key
from slimmoe_hf.cache_writer import CacheWriter, processes
from slimmoe_hf.free_memory import free_memory
from slimmoe_hf.loading import weight_bytes, weights_sha256
from slimmoe_hf.pace import Pace
from slimmoe_hf.walk import Walk, model_state

GROUP_SHARE = 0.5
"""Of free memory, and of the free disk, that the hidden states of a group may take where nobody says."""
_GROUP, _HASH = "tokens-in-a-group", "weights.json"


def known_sha256(path: Path, work: Path) -> str:
    """`loading.weights_sha256` of a checkpoint, which a killed call has left in its folder: nothing is read for it then."""
    if (work / _HASH).exists():
        noted = json.loads((work / _HASH).read_text())
        if noted["model"] == model_state(path):
            return str(noted["sha256"])
    return weights_sha256(path)


class StreamedAnswers:
    """A teacher that is larger than memory.

    Attributes:
        config, dtype: The teacher's. width: Of its hidden states.
        tokens: In a group, padding included, unless one batch alone has more.
    """

    def __init__(
        self, path: Path, kind: Kind, dtype: str, device: torch.device, work: Path, memory: int | None
    ) -> None:
        """Look through the checkpoint.

        Args:
            path: Its folder.
            kind: Of the answers.
            dtype: What is computed in.
            device: What is computed on.
            work: A folder for what passes between layers.
            memory: Bytes that this may take; None is what was taken before in `work`, or else half of what is free of
                memory, and of the disk.

        Raises:
            ValueError: As `blocks.Blocks` and `answers.Answers`.
        """
        self.blocks = Blocks(path, dtype, device)
        self.config, self.dtype, self._path, self._work = self.blocks.config, self.blocks.dtype, path, work
        self.width = self.blocks.hidden_size
        self._passes: int | None = None
        probe = torch.ones(1, 4, self.width, dtype=self.dtype, device=device)
        for _head in self.blocks.visit([HEAD]):
            self._at_head = Answers(self.blocks.model, kind, {"inputs_embeds": probe})
        self.tokens = self._taken_before() if memory is None else group_tokens(memory, self.width, self.dtype)

    def _taken_before(self) -> int:
        """The size of groups of a killed call, which the next one must share to go on where it was."""
        file = self._work / _GROUP
        if file.exists():
            return int(file.read_text())
        place = next(folder for folder in self._work.absolute().parents if folder.is_dir())
        free = min(free_memory(), psutil.disk_usage(str(place)).free) // processes().num_processes
        return group_tokens(int(free * GROUP_SHARE), self.width, self.dtype)

    @property
    def fingerprint(self) -> str | None:
        """`identity.model_fingerprint` of the teacher."""
        return self.blocks.fingerprint()

    def head_tensors(self, spec: CacheSpec) -> dict[str, Tensor]:
        """Weight and bias of the output head, for the ids that are answered over."""
        return {name: value[: spec.vocab_size].to(self.dtype) for name, value in self.blocks.read(HEAD).items()}

    def announce(self, tokens: int | None) -> None:
        """Say what there is to read for so many tokens; None is not known."""
        one, hashed = sum(map(self.blocks.bytes, self.blocks.parts)), weight_bytes(self._path)
        line = f"up to {self.tokens:,} tokens in one pass over {one / 1e9:,.2f} GB of weights"
        if tokens:
            self._passes = -(-tokens // max(1, self.tokens))
            total = self._passes * one + hashed
            line += f": {self._passes} for {tokens:,} tokens, {total / 1e9:,.2f} GB to read with the files' hash"
            line += f" ({total / tokens:,.0f} bytes a token)"
        get_console().log(line)

    def each(self, batches: Iterable[Texts], spec: CacheSpec, writer: CacheWriter) -> Iterator[Answered]:
        """Every batch of texts with its answers, or with None if the cache holds them all.

        The caller adds what it is given before it asks for more.
        """
        fresh = True
        self._work.mkdir(parents=True, exist_ok=True)
        if any(self._work.iterdir()) and not any((self._work / name).exists() for name in (_GROUP, _HASH)):
            raise ValueError(f"{self._work}: holds files that slimmoe did not write. Give another --output.")
        noted = {"model": model_state(self._path), "sha256": spec.weights_sha256}
        write_text(self._work / _HASH, json.dumps(noted))
        write_text(self._work / _GROUP, str(self.tokens))
        for group in _groups(batches, self.tokens):
            if all(writer.holds(ids) for texts in group for ids in texts):
                yield from ((texts, None) for texts in group)
                continue
            for number, hidden_BTD in self._walk(group, spec, fresh):
                texts = group[number]
                held = all(writer.holds(ids) for ids in texts)
                yield texts, None if held else self._at_head(texts, spec, hidden_BTD)
            writer.flush()
            fresh = False
        for place in filter(Path.is_dir, self._work.iterdir()):  # first: the notes say whose folder it is
            shutil.rmtree(place)
        shutil.rmtree(self._work, ignore_errors=True)

    def _walk(self, group: list[Texts], spec: CacheSpec, fresh: bool) -> Iterator[tuple[int, Tensor]]:
        """The last layer's outputs of each batch of a group, `[B, T, D]`, with the head in hand."""
        walk = Walk(self.blocks, [pad_texts(texts) for texts in group], self._place(group, spec))
        walk.require_room(2, "a smaller --stream-memory")
        order = [*walk.forward_order(), HEAD]
        if fresh:
            walk.pace = Pace("the teacher's answers", self.blocks, order, [], walk.tokens, self._passes)
        for part in self.blocks.visit(order, fresh=order if fresh else ()):
            if part != HEAD:
                walk.forward(part)
                continue
            for number in range(len(group)):
                yield number, walk.read("inputs", walk.layers, number)

    def _place(self, group: list[Texts], spec: CacheSpec) -> Path:
        """Where the hidden states of a group lie; those of any other one are taken away."""
        digest = hashlib.sha256(
            f"{spec.weights_sha256} {spec.config_sha256} {self.dtype} {self.blocks.device.type}".encode()
        )
        for texts in group:
            digest.update(b"".join(map(text_key, texts)) + b"|")
        place = self._work / digest.hexdigest()[:16]
        if self._work.is_dir():
            for other in self._work.iterdir():
                if other.is_dir() and other != place:
                    shutil.rmtree(other)
        place.mkdir(parents=True, exist_ok=True)
        return place


def group_tokens(memory: int, width: int, dtype: torch.dtype) -> int:
    """Tokens in a group: a layer's inputs and its outputs are there at the same time.

    Args:
        memory: Bytes that they may take.
        width: D.
        dtype: What is computed in.
    """
    return memory // (2 * width * dtype.itemsize)


def _groups(batches: Iterable[Texts], tokens: int) -> Iterator[list[Texts]]:
    """Batches, as many together as have so many tokens with their padding; at least one.

    The same batches give the same groups, whatever is answered already.
    """
    group: list[Texts] = []
    taken = 0
    for texts in batches:
        size = len(texts) * max(map(len, texts))
        if group and taken + size > tokens:
            yield group
            group, taken = [], 0
        group.append(texts)
        taken += size
    if group:
        yield group
