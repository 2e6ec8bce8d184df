"""Read a teacher cache: open it, check it before training, look batches up. Its form is in `cache_format`.

Shape letters: B rows, T tokens per row, K entries kept, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimmoe_hf.cache_format import (
    HEAD,
    INDEX,
    KEY_BYTES,
    MANIFEST,
    CacheSpec,
    Manifest,
    normalised,
    require_whole,
    text_key,
    texts_of,
    unfinished,
    vocabulary_sha256,
)
from slimmoe_hf.loading import files_sha256
from slimmoe_hf.losses import IGNORED
from slimmoe_hf.shards import Stored, read_header, read_tensor


class TopK(NamedTuple):
    """Answers of kind "top_k" to a batch; where there is none (last token of a text, padding) all mass is in the tail.

    Attributes:
        log_probs_BTK: Of the kept entries, the likeliest first (but for a next token that is none of them: last).
        index_BTK: Which ids they are.
        log_tail_BT: Logarithm of the mass outside them.
        known_BT: Where there is an answer.
    """

    log_probs_BTK: Tensor
    index_BTK: Tensor
    log_tail_BT: Tensor
    known_BT: Tensor


class TeacherCache:
    """A finished cache, open for reading. Any number of processes may read it; answers are read when asked for.

    Attributes:
        folder: Where it is.
        manifest: What it is.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Take a manifest that has been checked; `open` does."""
        self.folder, self.manifest = folder, manifest
        self._headers: dict[str, dict[str, Stored]] = {}
        index = read_header(folder / INDEX)

        def column(name: str, dtype: str) -> np.ndarray[Any, Any]:
            return np.memmap(folder / INDEX, dtype=dtype, mode="r", offset=index[name].begin, shape=(manifest.texts,))

        self._keys = column("keys", f"S{KEY_BYTES}")
        self._shard, self._first, self._length = (column(name, "<i4") for name in ("shard", "first", "length"))

    @classmethod
    def open(cls, folder: str | Path) -> TeacherCache:
        """Open a cache after checking that every file is there, in its full size; `check` looks at the contents.

        Raises:
            ValueError: No cache, an unfinished one, or one with a file that is missing or cut short.
        """
        folder = Path(folder)
        try:
            manifest = Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            begun = f"; it was begun in {unfinished(folder)}" if unfinished(folder).is_dir() else ""
            raise ValueError(f"{folder}: no teacher cache there{begun}. Write it with slimmoe cache write.") from None
        except (ValidationError, UnicodeDecodeError):
            raise ValueError(
                f"{folder / MANIFEST}: damaged, or of another version of slimmoe_hf. Write the cache again."
            ) from None
        for shard in manifest.shards:
            require_whole(folder / shard.file, shard.bytes)
        for name in (INDEX, *([HEAD] if manifest.head_sha256 else [])):
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name}: missing. Write the cache again.")
        return cls(folder, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherCache.open, (self.folder,)

    @property
    def spec(self) -> CacheSpec:
        """What the answers are."""
        return self.manifest.spec

    def verify(self) -> None:
        """Read every file and compare its hash with the manifest's.

        Raises:
            ValueError: One that differs.
        """
        expected = {shard.file: shard.sha256 for shard in self.manifest.shards} | {INDEX: self.manifest.index_sha256}
        if self.manifest.head_sha256:
            expected[HEAD] = self.manifest.head_sha256
        for name, sha256 in expected.items():
            if files_sha256([self.folder / name]) != sha256:
                raise ValueError(f"{self.folder / name}: its hash is not the one in {MANIFEST}. Write the cache again.")

    def check(
        self,
        *,
        rows: Iterable[Mapping[str, Any]] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        weights_sha256: str | None = None,
        fingerprint: str | None = None,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        beta: float = 0.0,
        files: bool = True,
    ) -> None:
        """Compare the cache with what it is to teach, before a second of training; None leaves a comparison out.

        Args:
            rows: The tokenised rows of training, as `texts_of` takes them; of a stream, its beginning.
            tokenizer: Of the training data.
            weights_sha256, fingerprint: Of the teacher that is meant, by its files or as a model.
            vocab_size: Rows of the student's head.
            temperature, beta: Of the loss.
            files: Whether to `verify` too, which reads them all.

        Raises:
            ValueError: One line that names every mismatch.
        """
        wrong = list(self._other_settings(vocab_size, temperature, beta))
        spec = self.spec
        if tokenizer is not None and vocabulary_sha256(tokenizer) != spec.tokenizer_sha256:
            wrong.append("it was made with another tokenizer, whose ids mean other tokens")
        for name, ours, theirs in (
            ("weights", weights_sha256, spec.weights_sha256),
            ("sampled weights", fingerprint, spec.fingerprint),
        ):
            if ours is not None and theirs is not None and ours != theirs:
                wrong.append(
                    f"it holds answers of another teacher, {spec.teacher} ({name} {theirs[:8]}, not {ours[:8]})"
                )
        wrong += self._missing(rows)
        if wrong:
            raise ValueError(f"{self.folder} does not fit this training: {'; '.join(wrong)}.")
        if files:
            self.verify()

    def _other_settings(self, vocab_size: int | None, temperature: float, beta: float) -> Iterator[str]:
        spec = self.spec
        if vocab_size is not None and vocab_size < spec.vocab_size:
            yield (
                f"its answers are over {spec.vocab_size} ids and the student has {vocab_size}: write it with "
                f"--vocab-size {vocab_size}"
            )
        if spec.kind == "hidden":
            return
        if temperature not in spec.temperatures:
            served = ", ".join(map(str, spec.temperatures))
            yield f"it serves temperature {served}, not {temperature}: write it with --temperature {temperature}"
        if beta != 0.0:
            yield (
                f"beta={beta} weighs tokens by the student, and only {spec.top_k} of the teacher's are in it: use beta=0.0, "
                "or write it with --kind hidden"
            )

    def _missing(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        count, missing, first = 0, 0, ""
        for number, row in enumerate(rows):
            texts = texts_of(row)
            absent = np.flatnonzero(self._find([text_key(ids) for ids in texts]) < 0)
            count, missing = count + len(texts), missing + len(absent)
            if len(absent) and not first:
                first = f"the first is in row {number} and has {len(texts[absent[0]])} tokens"
        if not missing:
            return []
        made = ", ".join(f"{name}={value}" for name, value in self.spec.data.items()) or "rows given in Python"
        return [
            f"{missing:,} of {count:,} texts are not in it ({first}); other data, another max_length, packing or seed? "
            f"It was made of {made}"
        ]

    def answers(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        temperature: float = 1.0,
    ) -> TopK:
        """The answers to a batch, ready for a loss: float32, of total mass 1, on the device of `input_ids`.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 for padding; None is all ones.
            position_ids: `[B, T]`, where a row packs several documents: each begins at 0.
            temperature: One that the cache serves.

        Raises:
            ValueError: A text that is not in the cache, or a cache of kind "hidden".
        """
        found = self.stored_answers(input_ids, attention_mask, position_ids, temperature)
        log_probs_BTK, log_tail_BT = normalised(found.log_probs_BTK, found.log_tail_BT, temperature)
        moved = (log_probs_BTK, found.index_BTK.long(), log_tail_BT, found.known_BT)
        return TopK(*(tensor.to(input_ids.device) for tensor in moved))

    def stored_answers(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        temperature: float = 1.0,
    ) -> TopK:
        """As `answers`, but as they are on disk: float16 and int32, at T = 1, in host memory.

        `normalised` makes those of `answers` of them, wherever they have been moved to.
        """
        if self.spec.kind != "top_k":
            raise ValueError(f"{self.folder}: holds hidden states, no top-k answers. Ask hidden_states.")
        if temperature not in self.spec.temperatures:
            raise ValueError(f"{self.folder}: {next(self._other_settings(None, temperature, 0.0))}.")
        size, top_k = tuple(input_ids.shape), self.spec.top_k
        found = TopK(
            torch.full((*size, top_k), -torch.inf, dtype=torch.float16),
            torch.arange(top_k, dtype=torch.int32).repeat(*size, 1),
            torch.zeros(size, dtype=torch.float16),
            torch.zeros(size, dtype=torch.bool),
        )
        tail = self.spec.temperatures.index(temperature)

        def put(row: int, where: slice, read: Callable[[str], Tensor]) -> None:
            found.log_probs_BTK[row, where] = read("log_probs")
            found.index_BTK[row, where] = read("indices").to(torch.int32)
            found.log_tail_BT[row, where] = read("log_tail")[:, tail]
            found.known_BT[row, where] = True

        self._each(input_ids, attention_mask, position_ids, put)
        return found

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The teacher's last hidden states for a batch, `[B, T, D]`, and where they are known, `[B, T]` (zero elsewhere).

        In their stored dtype, in host memory. Arguments as `answers`.

        Raises:
            ValueError: A text that is not in the cache, or a cache of kind "top_k".
        """
        if self.spec.kind != "hidden":
            raise ValueError(f"{self.folder}: holds top-k answers, no hidden states. Write it with --kind hidden.")
        dtype, width = self.spec.columns()["hidden"]
        hidden_BTD = torch.zeros(*input_ids.shape, width, dtype=dtype)
        known_BT = torch.zeros(input_ids.shape, dtype=torch.bool)

        def put(row: int, where: slice, read: Callable[[str], Tensor]) -> None:
            hidden_BTD[row, where] = read("hidden")
            known_BT[row, where] = True

        self._each(input_ids, attention_mask, position_ids, put)
        return hidden_BTD, known_BT

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The teacher's output head, for kind "hidden": weight `[V, D]`, and bias `[V]` if it has one."""
        stored = read_header(self.folder / HEAD)
        read = {name: read_tensor(self.folder, tensor) for name, tensor in stored.items()}
        return read["weight"], read.get("bias")

    def _each(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        put: Callable[[int, slice, Callable[[str], Tensor]], None],
    ) -> None:
        """Find the texts of a batch, and call `put(row, answered positions, read)`, where `read` takes a tensor's name."""
        ids_BT = input_ids.cpu().numpy()
        spans = list(_spans(ids_BT.shape, attention_mask, position_ids))
        places = self._find([text_key(ids_BT[row, begin:end]) for row, begin, end in spans])
        for (row, begin, end), place in zip(spans, places.tolist(), strict=True):
            if place < 0:
                raise ValueError(
                    f"{self.folder}: holds no answers to {end - begin} tokens of row {row} of this batch, which begin "
                    f"{ids_BT[row, begin : begin + 8].tolist()}. It was made of other data, or cut otherwise."
                )
            file, first = self.manifest.shards[self._shard[place]].file, int(self._first[place])
            if file not in self._headers:
                self._headers[file] = read_header(self.folder / file)
            header, count = self._headers[file], end - begin - 1

            def read(name: str, header: Any = header, first: int = first, count: int = count) -> Tensor:
                width = header[name].shape[1]
                return read_tensor(self.folder, header[name], first * width, (count, width))

            put(row, slice(begin, end - 1), read)

    def _find(self, keys: Sequence[bytes]) -> np.ndarray[Any, Any]:
        """Where keys are in the index; -1 for those that are not."""
        wanted = np.array(keys, dtype=f"S{KEY_BYTES}")
        places = np.searchsorted(self._keys, wanted)
        there = self._keys[np.minimum(places, self.manifest.texts - 1)] == wanted
        return np.where(there, places, -1)


class CacheCollator:
    """A collator that gives every batch the teacher's answers too, in the workers of the DataLoader where it has some.

    Batches gain `teacher_log_probs` `[B, T, K]`, `teacher_indices` `[B, T, K]` and `teacher_log_tail` `[B, T]` as
    `TeacherCache.stored_answers` gives them, or `teacher_hidden` `[B, T, D]`.
    """

    def __init__(self, collator: Callable[..., dict[str, Any]], cache: TeacherCache, temperature: float = 1.0) -> None:
        """Wrap `collator`, whose batches have `input_ids`, `labels`, and `attention_mask` or `position_ids`."""
        self.collator, self.cache, self.temperature = collator, cache, temperature

    def __call__(self, examples: Any, *arguments: Any) -> dict[str, Any]:
        """Collate, and look the batch up.

        Raises:
            ValueError: As `TeacherCache.answers`; or a token is to be trained on to which there is no answer.
        """
        batch = self.collator(examples, *arguments)
        where = {name: batch.get(name) for name in ("attention_mask", "position_ids")}
        if self.cache.spec.kind == "hidden":
            hidden_BTD, known_BT = self.cache.hidden_states(batch["input_ids"], **where)
            found = {"teacher_hidden": hidden_BTD}
        else:
            answers = self.cache.stored_answers(batch["input_ids"], **where, temperature=self.temperature)
            known_BT = answers.known_BT
            found = {
                "teacher_log_probs": answers.log_probs_BTK,
                "teacher_indices": answers.index_BTK,
                "teacher_log_tail": answers.log_tail_BT,
            }
        unanswered = (batch["labels"][:, 1:] != IGNORED) & ~known_BT[:, :-1]
        if bool(unanswered.any()):
            row, position = unanswered.nonzero()[0].tolist()
            raise ValueError(
                f"row {row} of a batch trains on token {position + 1}, with which a text begins: the teacher has no answer "
                "to it. Label the first token of every document -100."
            )
        return {**batch, **found}


def _spans(
    size: tuple[int, ...], attention_mask: Tensor | None, position_ids: Tensor | None
) -> Iterator[tuple[int, int, int]]:
    """Row, begin and end of every text of two tokens or more in a batch."""
    rows, length = size
    real_BT = np.ones(size, dtype=bool) if attention_mask is None else attention_mask.bool().cpu().numpy()
    starts_BT = np.zeros(size, dtype=bool) if position_ids is None else (position_ids == 0).expand(size).cpu().numpy()
    for row in range(rows):
        edges = [0, *(place for place in np.flatnonzero(starts_BT[row]).tolist() if place), length]
        for begin, end in pairwise(edges):
            real = np.flatnonzero(real_BT[row, begin:end])
            if len(real) > 1:
                yield row, begin + int(real[0]), begin + int(real[-1]) + 1
