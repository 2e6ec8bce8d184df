"""Ask a teacher about tokenised rows, and write its answers into a teacher cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from rich import get_console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimmoe_hf.answers import Answers
from slimmoe_hf.atomic import refuse_existing
from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.cache_format import KINDS, TOP_K, CacheSpec, Kind, text_key, texts_of, unfinished, vocabulary_sha256
from slimmoe_hf.cache_writer import SHARD_BYTES, CacheWriter, processes
from slimmoe_hf.families import refuse_encoder_decoder
from slimmoe_hf.loading import files_sha256, load_config, load_model, weights_sha256
from slimmoe_hf.sources import fetch_weights, open_source
from slimmoe_hf.streamed_answers import StreamedAnswers, known_sha256

_AHEAD = 16
"""Batches that are read ahead and sorted by length, so that little is padded (our choice)."""


def write_cache(
    teacher: str | Path | PreTrainedModel,
    rows: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    revision: str | None = None,
    kind: Kind = "top_k",
    top_k: int = TOP_K,
    temperatures: Sequence[float] = (1.0,),
    vocab_size: int | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
    device: torch.device | None = None,
    shard_bytes: int = SHARD_BYTES,
    data: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    stream: bool = False,
    stream_memory: int | None = None,
) -> TeacherCache:
    """Write a teacher's answers to every text of some rows; killed, the same call continues.

    Under `torchrun` or `accelerate launch` every process calls it, with the same arguments and rows. Each holds the
    whole teacher, reads all rows, and answers the texts that their keys deal to it.

    Args:
        teacher: A folder, a Hub id, or a model; it runs in eval mode.
        rows: Tokenised: `input_ids`, and `seq_lengths` where a row packs several documents. A stream may be read once.
        folder: Where the cache is to be.
        tokenizer: Of the rows.
        revision: Commit of a teacher on the Hub.
        kind: "top_k", or "hidden" for the teacher's last hidden states.
        top_k: K, entries kept of kind "top_k"; all V where there are fewer.
        temperatures: That the cache is to serve beside 1.0.
        vocab_size: Answer over the first so many ids only, where the student pads its vocabulary to fewer.
        batch_size: Texts at a time.
        dtype: To load the teacher in; None is float32 on a CPU, elsewhere the checkpoint's own.
        device: Where it runs; None is this process's GPU, or the CPU. A model that was given stays where it is.
        shard_bytes: Most bytes in a file; each process holds one in memory.
        data: Where the rows come from, for the manifest; it must not change between a kill and the next start.
        overwrite: Replace what is at `folder`; an unfinished cache of the same request is continued all the same.
        stream: One decoder layer of the teacher at a time is in memory, for one that is larger; see `streamed_answers`.
        stream_memory: Bytes of hidden states that pass from layer to layer together; None is half of what is free.

    Returns:
        The finished cache.

    Raises:
        ValueError: A setting out of range, a checkpoint that does not load, no room on the disk, or as `CacheWriter`.
    """
    if kind not in KINDS or top_k < 2 or batch_size < 1 or not all(at > 0 for at in temperatures):
        raise ValueError(
            f"kind={kind!r}, top_k={top_k}, batch_size={batch_size}, temperatures={list(temperatures)}: kind is one of "
            f"{', '.join(KINDS)}, top_k at least 2 (the likeliest and the next token), the others positive."
        )
    state, folder = processes(), Path(folder)
    if not overwrite:
        refuse_existing(folder)
    was_training = isinstance(teacher, PreTrainedModel) and teacher.training
    if isinstance(teacher, PreTrainedModel):
        assert not stream, "a model that is given is in memory"
        name, sha256, config = str(teacher.config._name_or_path or "a model given in Python"), None, None
        asked: Answers | StreamedAnswers = Answers(teacher.eval(), kind)
    else:
        source, name = open_source(str(teacher), revision), str(teacher)
        with state.local_main_process_first():
            [path] = fetch_weights(source)
        revision = source.revision or revision
        work = folder.with_name(f"{folder.name}.stream-{state.process_index:03d}") if stream else None
        own = None if not state.is_main_process else weights_sha256(path) if work is None else known_sha256(path, work)
        sha256, config = broadcast_object_list([own])[0], files_sha256([path / "config.json"])
        asked = _loaded(path, kind, dtype, device or state.device, work, stream_memory)
    spec = _spec(asked, kind, top_k, temperatures, vocab_size).model_copy(update={
        "teacher": name, "revision": revision, "weights_sha256": sha256, "config_sha256": config, "data": dict(data or {}),
        "tokenizer_sha256": vocabulary_sha256(tokenizer),
    })  # fmt: skip
    total = _count(rows)
    _require_room(folder, spec, total)
    if state.is_main_process:
        asked.announce(total)
    try:
        with CacheWriter(folder, spec, shard_bytes, overwrite) as writer, _Meter(spec, total, state) as meter:
            mine = _dealt(state.process_index, state.num_processes)
            for texts, found in asked.each(_batches(rows, batch_size, mine), spec, writer):
                if found is None:
                    meter.passed(texts)
                    continue
                for ids, answers in zip(texts, found, strict=True):
                    writer.add(ids, answers)
                meter.answered(texts)
            return writer.finish(asked.head_tensors(spec) if kind == "hidden" else None)
    finally:
        if isinstance(teacher, PreTrainedModel):
            teacher.train(was_training)


def _loaded(
    path: Path, kind: Kind, dtype: str | None, place: torch.device, work: Path | None, memory: int | None
) -> Answers | StreamedAnswers:
    """A teacher from a checkpoint; with a folder to work in, one layer of it at a time."""
    refuse_encoder_decoder(load_config(path), "a teacher cache")
    if work is None:
        return Answers(load_model(path, _dtype(path, dtype, place), place), kind)
    return StreamedAnswers(path, kind, _dtype(path, dtype, place), place, work, memory)


def _spec(
    asked: Answers | StreamedAnswers, kind: Kind, top_k: int, temperatures: Sequence[float], vocab_size: int | None
) -> CacheSpec:
    """What the answers will be, but for whose they are and to what."""
    size = asked.config.get_text_config().vocab_size
    size = min(vocab_size or size, size)
    hidden = kind == "hidden"
    return CacheSpec(
        teacher="", tokenizer_sha256="", fingerprint=asked.fingerprint, vocab_size=size, kind=kind,
        top_k=0 if hidden else min(top_k, size), temperatures=() if hidden else tuple(dict.fromkeys((1.0, *temperatures))),
        hidden_size=asked.width if hidden else 0,
        stored="bfloat16" if hidden and asked.dtype == torch.bfloat16 else "float16",
        computed=str(asked.dtype).removeprefix("torch."),
    )  # fmt: skip


class _Meter:
    """Tells how the work goes: what it will take, then tokens per second, with a bar on a terminal."""

    def __init__(self, spec: CacheSpec, total: int | None, state: PartialState) -> None:
        self._spec, self._total, self._loud = spec, total, state.is_main_process
        self._processes = state.num_processes
        self._passed = self._answered = 0
        self._start = self._told = time.perf_counter()
        self._bar: Progress | None = None

    def __enter__(self) -> _Meter:
        if not self._loud:
            return self
        size = "" if self._total is None else f", at most {self._total * self._spec.bytes_per_answer / 1e9:,.2f} GB"
        known = "a stream" if self._total is None else f"{self._total:,} tokens"
        get_console().log(f"{self._spec.teacher} answers {known}: {self._spec.bytes_per_answer} bytes a token{size}")
        if get_console().is_terminal and self._total is not None:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, transient=True)
            self._bar.start()
            self._bar.add_task("teacher cache", total=self._total)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._loud and not any(error):
            get_console().log(f"{self._answered:,} tokens answered{self._speed()}")

    def answered(self, texts: list[np.ndarray[Any, Any]]) -> None:
        """Count a batch."""
        self._answered += sum(map(len, texts))
        self.passed(texts)

    def passed(self, texts: list[np.ndarray[Any, Any]]) -> None:
        """Count a batch that was there already."""
        self._passed += sum(map(len, texts)) * self._processes
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._passed, description=f"teacher cache{self._speed()}")
        elif self._loud and now - self._told > 60:
            self._told = now
            share = "" if self._total is None else f" of {self._total:,}"
            get_console().log(f"about {self._passed:,}{share} tokens{self._speed()}")

    def _speed(self) -> str:
        if not self._answered:
            return ""
        each = "" if self._processes == 1 else f" in each of {self._processes} processes"
        return f", {self._answered / (time.perf_counter() - self._start):,.0f} tokens/s{each}"


def _dtype(path: Path, asked: str | None, device: torch.device) -> str:
    """What a teacher is computed in."""
    own = str(load_config(path).dtype or "float32").removeprefix("torch.")
    return asked or ("float32" if device.type == "cpu" else own)


def _count(rows: Iterable[Mapping[str, Any]]) -> int | None:
    """Tokens of a dataset; None of a stream, which may be read once only."""
    if isinstance(rows, Dataset):
        parts = rows.select_columns("input_ids").with_format("arrow").iter(1000)
        return sum(pc.sum(pc.list_value_length(part["input_ids"])).as_py() or 0 for part in parts)
    return sum(len(row["input_ids"]) for row in rows) if isinstance(rows, list) else None


def _require_room(folder: Path, spec: CacheSpec, total: int | None) -> None:
    """Refuse a cache that the disk cannot hold."""
    parent = next(place for place in folder.absolute().parents if place.is_dir())
    begun = sum(file.stat().st_size for file in unfinished(folder).glob("answers-*"))
    free, needed = psutil.disk_usage(str(parent)).free + begun, (total or 0) * spec.bytes_per_answer
    if needed > free:
        raise ValueError(
            f"{folder}: the cache takes up to {needed / 1e9:,.1f} GB and the disk has {free / 1e9:,.1f} GB free. Give fewer "
            "--tokens, a smaller --top-k, or another --output."
        )


def _dealt(number: int, processes: int) -> Callable[[bytes], bool]:
    """Which keys are this process's; equal texts are always the same one's, so none is answered twice."""
    return lambda key: int.from_bytes(key[:8], "little") % processes == number


def _batches(
    rows: Iterable[Mapping[str, Any]], batch_size: int, mine: Callable[[bytes], bool]
) -> Iterator[list[np.ndarray[Any, Any]]]:
    """The different texts of this process, some batches of them at a time in the order of length.

    The same rows give the same batches, whatever is answered already: so a continued cache has the same bytes.
    """
    seen: set[bytes] = set()
    ahead: list[np.ndarray[Any, Any]] = []

    def sorted_batches() -> Iterator[list[np.ndarray[Any, Any]]]:
        ahead.sort(key=len, reverse=True)
        for start in range(0, len(ahead), batch_size):
            yield ahead[start : start + batch_size]
        ahead.clear()

    for row in rows:
        for ids in texts_of(row):
            key = text_key(ids)
            if key not in seen and mine(key):
                seen.add(key)
                ahead.append(ids)
        if len(ahead) >= _AHEAD * batch_size:
            yield from sorted_batches()
    yield from sorted_batches()
