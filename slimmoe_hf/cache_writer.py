"""Write a teacher cache, text by text, from whatever makes the answers. Its form is in `cache_format`.

A cache is written in a folder of its own beside its place, in shards; each is renamed when it is whole and noted in its
process's journal, so a killed writer has lost one shard at most. The same request continues there, with any number of
processes; another one is refused. `finish` sorts the index and gives the folder its name.

Shape letters: R texts, N answers, K entries kept, M temperatures, V vocabulary, D model width.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from filelock import FileLock, Timeout
from pydantic import ValidationError
from torch import Tensor

from slimmoe_hf.atomic import flush_entry, refuse_existing, write_text
from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.cache_format import (
    HEAD,
    INDEX,
    KEY_BYTES,
    MANIFEST,
    CacheSpec,
    Manifest,
    ShardEntry,
    require_whole,
    text_key,
    unfinished,
)
from slimmoe_hf.shards import ShardWriter, read_header, read_tensor

SHARD_BYTES = 256_000_000
"""Each process holds one shard in memory, and this is what a kill costs (our choice)."""
REQUEST = "request.json"


def processes() -> PartialState:
    """This process among those of `torchrun` or `accelerate launch`; who is done first may wait long for the last."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=bool(cpu), timeout=timedelta(days=30))


def top_k_answers(
    logits_NV: Tensor, next_N: Tensor, top_k: int, temperatures: tuple[float, ...] = (1.0,)
) -> dict[str, Tensor]:
    """Answers of kind "top_k" from logits, which are read in float32.

    Args:
        logits_NV: `[N, V]`; take few enough that two of their size fit in memory.
        next_N: The next token of every position: it is always kept.
        top_k: K, at most V.
        temperatures: Those to store the tail for.

    Returns:
        `log_probs` `[N, K]` and `log_tail` `[N, M]`, float32, and `indices` `[N, K]`, int64.
    """
    outside_NV = logits_NV.to(torch.float32, copy=True)
    kept_NK, index_NK = outside_NV.topk(top_k, dim=-1, sorted=False)  # sorting it itself takes up to twice as long
    kept_NK, order_NK = kept_NK.sort(dim=-1, descending=True)
    index_NK = index_NK.gather(-1, order_NK)
    next_N1 = next_N.unsqueeze(-1)
    absent_N = (index_NK != next_N1).all(-1)
    index_NK[:, -1] = torch.where(absent_N, next_N, index_NK[:, -1])
    kept_NK[:, -1] = outside_NV.gather(-1, index_NK[:, -1:]).squeeze(-1)
    outside_NV.scatter_(-1, index_NK, -torch.inf)
    tails = {at: (outside_NV if at == 1.0 else outside_NV / at).logsumexp(-1) for at in {1.0, *temperatures}}
    log_z_N = torch.logaddexp(kept_NK.logsumexp(-1), tails[1.0])
    log_tails = [tails[at] - log_z_N / at for at in temperatures]
    return {
        "log_probs": kept_NK - log_z_N.unsqueeze(-1), "indices": index_NK, "log_tail": torch.stack(log_tails, dim=-1),
    }  # fmt: skip


class CacheWriter:
    """Takes texts with their answers, in any order, and makes a cache of them; one per process.

    Example:
        ```python
        with CacheWriter(Path("cache"), spec) as writer:
            for ids, logits in ...:
                if not writer.holds(ids):
                    writer.add(ids, top_k_answers(logits[:-1], ids[1:], spec.top_k, spec.temperatures))
            cache = writer.finish()
        ```
    """

    def __init__(self, folder: Path, spec: CacheSpec, shard_bytes: int = SHARD_BYTES, overwrite: bool = False) -> None:
        """Begin a cache, or continue one; under `torchrun` or `accelerate launch` every process must.

        Args:
            folder: Its final place.
            spec: What it holds.
            shard_bytes: Most bytes of answers in a file.
            overwrite: Replace a finished cache at `folder` in the end; begin anew where an unfinished one is of another
                request, or damaged.

        Raises:
            ValueError: Something is at `folder`, an unfinished cache there is of another request, or another writer is
                at work on it.
        """
        self._state = processes()
        self.folder, self.spec, self._overwrite = folder, spec, overwrite
        self._place, self._rank = unfinished(folder), self._state.process_index
        if not overwrite:
            refuse_existing(folder)
            _refuse_other(self._place, spec)
        self._place.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._place / f"process-{self._rank:03d}.lock", blocking=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(f"{self._place}: another process is writing there. Wait for it, or end it.") from None
        if self._state.is_main_process:
            try:
                if overwrite:
                    _refuse_other(self._place, spec)
                _clear(self._place)
            except ValueError:
                if not overwrite:
                    raise
                for file in set(self._place.iterdir()) - set(self._place.glob("*.lock")):
                    file.unlink()
            if not (self._place / REQUEST).exists():
                write_text(self._place / REQUEST, spec.model_dump_json(indent=2) + "\n")
        self._state.wait_for_everyone()
        self._journal = self._place / f"journal-{self._rank:03d}.jsonl"
        self.shards = _read_journal(self._journal)
        self._held = _keys_in(self._place)
        self._state.wait_for_everyone()  # all have seen the same shards before any adds one
        self._capacity = shard_bytes // spec.bytes_per_answer
        self._buffers: dict[str, Tensor] = {}
        self._keys: list[bytes] = []
        self._lengths: list[int] = []
        self._answers, self._tail_mass = 0, 0.0

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._lock.release()

    def holds(self, ids: Any) -> bool:
        """Whether a text is in the cache already, or in the shard at hand."""
        return text_key(ids) in self._held

    def add(self, ids: Any, answers: Mapping[str, Tensor]) -> None:
        """Add a text; one that the cache holds is passed over.

        Args:
            ids: Its T token ids.
            answers: By the names of `CacheSpec.columns`, `[T - 1, ...]` each, as `top_k_answers` makes them.

        Raises:
            ValueError: An answer is not a number, overflows, or the text alone exceeds a shard.
        """
        key, count = text_key(ids), len(ids) - 1
        if key in self._held:
            return
        if count > self._capacity:
            size = count * self.spec.bytes_per_answer
            raise ValueError(
                f"the answers to a text of {len(ids):,} tokens take {size:,} bytes, more than a shard may have. Give a "
                "larger --shard-size, or a smaller --max-length."
            )
        if self._answers + count > self._capacity:
            self.flush()
        for name, (dtype, width) in self.spec.columns().items():
            given = answers[name]
            assert tuple(given.shape) == (count, width), (name, given.shape, count, width)
            rounded = given.detach().cpu().to(dtype)
            # -inf is a probability of zero; NaN and +inf are a broken model, or hidden states beyond float16.
            if dtype.is_floating_point and not bool((rounded < torch.inf).all()):
                raise ValueError(
                    f"the teacher's answers to a text that begins {list(map(int, ids[:8]))} are not finite ({name}). "
                    "Compute in another dtype, or look at its weights."
                )
            if name not in self._buffers:
                self._buffers[name] = torch.empty(self._capacity, width, dtype=dtype)
            self._buffers[name][self._answers : self._answers + count] = rounded
        if "log_tail" in answers:
            self._tail_mass += float(answers["log_tail"][:, 0].detach().double().exp().sum())
        self._held.add(key)
        self._keys.append(key)
        self._lengths.append(len(ids))
        self._answers += count

    def flush(self) -> None:
        """Finish the shard at hand."""
        if not self._keys:
            return
        name = f"answers-{self._rank:03d}-{len(self.shards):05d}.safetensors"
        texts = {
            "keys": torch.frombuffer(bytearray(b"".join(self._keys)), dtype=torch.uint8).view(-1, KEY_BYTES),
            "lengths": torch.tensor(self._lengths, dtype=torch.int32),
        }
        tensors = {**texts, **{name: buffer[: self._answers] for name, buffer in self._buffers.items()}}
        sha256 = _write(self._place / name, tensors)
        entry = ShardEntry(
            file=name, sha256=sha256, bytes=(self._place / name).stat().st_size, texts=len(self._keys),
            answers=self._answers, tail_mass=self._tail_mass,
        )  # fmt: skip
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(entry.model_dump_json() + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.shards.append(entry)
        self._keys, self._lengths, self._answers, self._tail_mass = [], [], 0, 0.0

    def finish(self, head: Mapping[str, Tensor] | None = None) -> TeacherCache:
        """Finish the cache, once every process is here; the first one sorts the index and names the folder.

        Args:
            head: For kind "hidden": `weight` and `bias` of the teacher's output head.

        Raises:
            ValueError: There is no text in it.
        """
        self.flush()
        self._state.wait_for_everyone()
        entries = [entry for file in _journals(self._place) for entry in _read_journal(file)]
        self._state.wait_for_everyone()  # the journals are about to go
        if not entries:
            raise ValueError("the data has no text of two tokens or more. Bring more text.")
        if self._state.is_main_process:
            index = _write(self._place / INDEX, _index(self._place, entries))
            answers = sum(entry.answers for entry in entries)
            manifest = Manifest(
                spec=self.spec, texts=sum(entry.texts for entry in entries), answers=answers, shards=entries,
                mean_tail_mass=sum(entry.tail_mass for entry in entries) / answers, index_sha256=index,
                head_sha256=_write(self._place / HEAD, head) if head else None,
            )  # fmt: skip
            write_text(self._place / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
            self._lock.release()
            for spare in (self._place / REQUEST, *_journals(self._place), *self._place.glob("process-*.lock")):
                spare.unlink()
            if self._overwrite and self.folder.is_dir():
                shutil.rmtree(self.folder)
            self._place.replace(self.folder)
            flush_entry(self.folder.parent)
        self._state.wait_for_everyone()
        return TeacherCache.open(self.folder)


def _refuse_other(place: Path, spec: CacheSpec) -> None:
    """Continue only the cache of the same spec; a commit that changed neither weights nor config is no other teacher."""
    file = place / REQUEST
    if not file.exists():
        return
    try:
        begun = CacheSpec.model_validate_json(file.read_text(encoding="utf-8")).model_dump(mode="json")
    except ValidationError:
        raise ValueError(f"{file}: damaged. --overwrite starts the cache over.") from None
    asked = spec.model_dump(mode="json")
    hashes = [(each["weights_sha256"], each["config_sha256"]) for each in (begun, asked)]
    if hashes[0] == hashes[1] and None not in hashes[0]:
        begun["revision"] = asked["revision"]  # offline there is none
    begun, asked = ({**each, **each.pop("data")} for each in (begun, asked))
    differing = [
        f"{name} was {begun.get(name)}, now it is {asked.get(name)}"
        for name in (begun | asked)
        if begun.get(name) != asked.get(name)
    ]
    if differing:
        raise ValueError(
            f"{place}: holds an unfinished cache of another request: {'; '.join(differing)}. Give that one's arguments to "
            "continue it, --overwrite to start over, or another --output."
        )


def _clear(place: Path) -> None:
    """Take away what a kill has left: half of a shard, a shard that is in no journal, half of a journal's line."""
    known: set[str] = set()
    for journal in _journals(place):
        entries = _read_journal(journal)
        for entry in entries:
            require_whole(place / entry.file, entry.bytes)
        write_text(journal, "".join(entry.model_dump_json() + "\n" for entry in entries))
        known |= {entry.file for entry in entries}
    for file in place.glob("answers-*"):
        if file.name not in known:
            file.unlink()


def _journals(place: Path) -> list[Path]:
    return sorted(place.glob("journal-*.jsonl"))


def _read_journal(file: Path) -> list[ShardEntry]:
    """The entries of a journal; a last line that a kill has cut off is none."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [ShardEntry.model_validate_json(line) for line in lines[:-1]]


def _keys_in(place: Path) -> set[bytes]:
    """Keys of all texts in finished shards, whichever process wrote them."""
    found: set[bytes] = set()
    for journal in _journals(place):
        for entry in _read_journal(journal):
            packed = read_tensor(place, read_header(place / entry.file)["keys"]).numpy().tobytes()
            found.update(packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES))
    return found


def _index(place: Path, entries: list[ShardEntry]) -> dict[str, Tensor]:
    """The index of all shards, sorted by key."""
    columns: dict[str, list[np.ndarray[Any, Any]]] = {"keys": [], "shard": [], "first": [], "length": []}
    for number, entry in enumerate(entries):
        header = read_header(place / entry.file)
        keys, lengths = (read_tensor(place, header[name]).numpy() for name in ("keys", "lengths"))
        columns["keys"].append(keys)
        columns["shard"].append(np.full(len(lengths), number, dtype=np.int32))
        columns["first"].append((np.cumsum(lengths - 1) - (lengths - 1)).astype(np.int32))
        columns["length"].append(lengths)
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    order = np.argsort(whole["keys"].view(f"S{KEY_BYTES}")[:, 0], kind="stable")
    return {name: torch.from_numpy(column[order]) for name, column in whole.items()}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file; returns its hash."""
    writer = ShardWriter(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    try:
        for name, tensor in tensors.items():
            writer.add(name, tensor.detach().cpu())
    except BaseException:
        writer.abandon()
        raise
    sha256 = writer.close()
    flush_entry(path.parent)
    return sha256
