"""A plan applied to a checkpoint on disk, one weight at a time: memory for a few tensors, whatever the model's size.

Every weight of the slimmed checkpoint is a selection of rows or columns of one weight of the original, or where experts
are merged the sum of some of its weights; they are written in the order in which the original lies on disk. What is
written has a name of its own until all of it has been verified; an interrupted cut continues with the first shard that
is not whole.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich import get_console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedConfig

from slimmoe_hf.atomic import PARTIAL, flush, flush_entry, refuse_existing, write_text
from slimmoe_hf.cuts import Cut, list_cuts, name_shards, slimmed_config, write_index
from slimmoe_hf.disk import Part, check_tied, locate, published_shapes
from slimmoe_hf.identity import combined, sample, sampled
from slimmoe_hf.loading import files_sha256, load_config
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.shards import Buffer, ShardWriter, Stored, all_finite, read_header
from slimmoe_hf.sources import HubSource, LocalSource, open_source

SHARD_BYTES = 1_000_000_000
_AHEAD = 256 << 20  # bytes read ahead of the weight in hand
_JOURNAL, _LOCK, _DOWNLOADS = "slim.json", ".lock", "source"
_CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "LICENSE*", "NOTICE*",
)  # fmt: skip


def slim_checkpoint(
    source: str | Path,
    plan: CompressionPlan,
    destination: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    delete_source_shards: bool = False,
    other_weights: bool = False,
    duplicate: bool = False,
) -> Path:
    """Cut a checkpoint to a plan without loading it, and write one that plain transformers and serving engines load.

    The weights equal those of `apply_plan` and a save. Memory is that of a few weights. Stopped at any point, the
    same call continues; `destination` appears when everything has been written, read back and verified.

    Args:
        source: A folder, or a Hub id, whose shards are downloaded one by one.
        plan: For this model.
        destination: The new checkpoint's folder.
        dtype: Of the new weights; None keeps every weight's own (bfloat16 for FP8 sources).
        revision: A commit, tag or branch of the Hub id.
        shard_bytes: Most bytes in a file of weights, but for a single weight larger than that.
        overwrite: Replace what is at `destination`.
        delete_source_shards: Of a Hub id, keep no downloaded shard longer than it is needed.
        other_weights: Cut a model that the plan was not made for, if it has the same sizes (a fine-tuned sibling).
        duplicate: Put merged experts in the place of all their members, as `merged_forms.duplicate_merged` does.

    Returns:
        `destination`.

    Raises:
        ValueError: The checkpoint is damaged, quantised, or not the one the plan was made for; a weight is not finite;
            or there is no room. Nothing is at `destination` then.
    """
    destination = Path(os.path.abspath(Path(destination).expanduser()))  # noqa: PTH100  (resolve would follow a link)
    if destination.name == "" or destination in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{destination}: you are in it. Give the name of a new folder.")
    partial = destination.with_name(PARTIAL + destination.name)
    _refuse_occupied(destination, overwrite)
    opened = open_source(str(source), revision, partial / _DOWNLOADS if delete_source_shards else None)
    if {destination.resolve(), partial.resolve()} & {opened.folder, *opened.folder.parents}:
        raise ValueError(f"{destination}: is the model itself, or holds it. Give another place to write to.")
    config = load_config(opened.folder)
    plan.check()
    plan.refuse_unmerged() if duplicate else plan.refuse_adaptive()
    plan.check_fits(config)
    if other_weights and plan.repairs:
        raise ValueError(
            f"{opened.name}: the plan carries output projections that were solved anew for the model it was made for, and they "
            "fit no sibling (--other-weights). Make a plan for this one, or leave them out (--no-reconstruct, without_repairs)."
        )
    plan.repairs.check_same(plan.meta.repairing)
    stored = opened.stored()
    parts = locate(config, stored, opened.name)
    if isinstance(opened, LocalSource):
        check_tied(config, stored, opened.folder)
    if isinstance(opened, LocalSource) and not other_weights:
        samples = {name: sample(config, opened.folder, parts[name]) for name in sampled(config) & parts.keys()}
        _check_fingerprint(plan, samples)
    values = slimmed_config(opened.folder, config, plan, dtype, any(part.scale for part in parts.values()), duplicate)
    cuts = list_cuts(config, parts, plan, values, dtype, duplicate)
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"{partial}: locked: another slimmoe is writing there. Wait for it.") from None
    try:
        run = _Run(opened, config, plan, parts, cuts, partial, shard_bytes, dtype)
        try:
            run.write()
            if isinstance(opened, HubSource) and not other_weights:
                _check_fingerprint(plan, run.samples)
            run.finish(values)
        except BaseException:
            if not run.written:
                shutil.rmtree(partial)
            raise
        _refuse_occupied(destination, overwrite)  # somebody else may have come in the meantime
        _move(partial, destination)
    finally:
        lock.release(force=True)
    return destination


def _refuse_occupied(destination: Path, overwrite: bool) -> None:
    """Raise ValueError unless the place is free, or may be overwritten and holds a checkpoint or nothing."""
    if not overwrite:
        refuse_existing(destination)
    elif destination.is_symlink() or destination.is_file():
        raise ValueError(f"{destination}: is a file or a link, not the folder of a checkpoint. Give another --output.")
    elif destination.is_dir() and any(destination.iterdir()) and not (destination / "config.json").is_file():
        raise ValueError(
            f"{destination}: holds files that are no checkpoint; they are left alone. Give another --output."
        )


def _check_fingerprint(plan: CompressionPlan, samples: Mapping[str, str]) -> None:
    if plan.meta.fingerprint is not None and plan.meta.fingerprint != combined(samples):
        raise ValueError(
            "the plan was made for another model of the same sizes: the weights differ from those that were scored. "
            "Score this model, or say --other-weights to cut it all the same."
        )


class _Run:
    """The writing of one checkpoint, over as many calls as it takes."""

    def __init__(
        self, source: LocalSource | HubSource, config: PreTrainedConfig, plan: CompressionPlan, parts: Mapping[str, Part],
        cuts: Sequence[Cut], folder: Path, shard_bytes: int, dtype: str | torch.dtype | None,
    ) -> None:  # fmt: skip
        self.source, self.config, self.folder = source, config, folder
        self.shards = name_shards(cuts, shard_bytes)
        self.sampled = [parts[name] for name in sampled(config) & parts.keys()] if isinstance(source, HubSource) else []
        self.request = _request(source, plan, cuts, shard_bytes, dtype)
        self.written: dict[str, str] = {}
        self.samples: dict[str, str] = {}
        self._fetched: dict[str, tuple[Path, dict[str, Stored]]] = {}
        self._buffer = Buffer()  # of the one thread that reads
        self._resume()

    def _resume(self) -> None:
        """Take over what an earlier call of the same request has finished; clear away everything else."""
        journal = self.folder / _JOURNAL
        try:
            content = json.loads(journal.read_text())
        except (OSError, ValueError):
            content = {}
        if isinstance(content, dict) and content.get("request") == self.request:
            whole = {name: sha for name, sha in content["shards"].items() if (self.folder / name).is_file()}
            self.written, self.samples = whole, content["samples"]
            if whole:
                get_console().log(f"{len(whole)} of {len(self.shards)} shards are written already")
        for entry in self.folder.iterdir():
            if entry.name not in (_LOCK, _JOURNAL, _DOWNLOADS, *self.written):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def write(self) -> None:
        """Write the shards that are missing."""
        missing = {name: cuts for name, cuts in self.shards.items() if name not in self.written}
        needed = sum(cut.bytes for cuts in missing.values() for cut in cuts)
        if self.source.deletes:  # one download being read, the next one coming
            needed += 2 * max(cut.part.stored.end for cuts in self.shards.values() for cut in cuts if cut.part)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"{self.folder.parent}: the slimmed model takes {needed:,} bytes, {free:,} are free. Free some."
            )
        last_use = {part.stored.file: name for name, cuts in self.shards.items() for cut in cuts for part in cut.parts}
        number, shown = sum(map(len, missing.values())), get_console().is_terminal
        ahead = self._read_ahead([cut for cuts in missing.values() for cut in cuts])
        weights = iter(track(ahead, "Cutting", total=number, disable=not shown, transient=True))
        for name, cuts in missing.items():
            try:
                self.written[name] = self._write_shard(name, cuts, weights)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ValueError(
                    f"{self.folder.parent}: the disk is full after {len(self.written)} of {len(self.shards)} shards. "
                    "Free some room; the same command continues there."
                ) from error
            self._record()
            for file, last in last_use.items():
                if last == name:
                    self._release(file)
        for part in self.sampled:  # in files that hold nothing that stays
            if part.name not in self.samples:
                self._checked(part.stored)
                self._release(part.stored.file)
                self._record()

    def _release(self, file: str) -> None:
        self.source.release(file)
        self._fetched.pop(file, None)

    def _write_shard(self, name: str, cuts: Sequence[Cut], weights: Iterator[tuple[Cut, Tensor]]) -> str:
        writer = ShardWriter(self.folder / name, {cut.name: (cut.dtype, cut.shape) for cut in cuts})
        try:
            for expected in cuts:
                cut, weight = next(weights)
                assert cut is expected
                if not all_finite(weight):
                    why = "Fetch or make it again."
                    if cut.dtype == torch.float16:
                        why = "If they are in the model's own dtype, float16 cannot hold them: use bfloat16."
                    raise ValueError(f"{self.source.name}: {cut.name} holds values that are not finite. {why}")
                writer.add(cut.name, weight)
            return writer.close()
        except BaseException:
            writer.abandon()
            raise

    def _read_ahead(self, cuts: Sequence[Cut]) -> Iterator[tuple[Cut, Tensor]]:
        """The weights, in order, the next ones being read while one is worked on."""
        waiting: deque[tuple[Cut, Future[Tensor], int]] = deque()
        ahead = 0
        with ThreadPoolExecutor(1) as reader:
            try:
                for cut in cuts:
                    size = cut.bytes
                    while waiting and ahead + size > _AHEAD:
                        done, future, done_size = waiting.popleft()
                        yield done, future.result()
                        ahead -= done_size
                    waiting.append((cut, reader.submit(self._read, cut), size))
                    ahead += size
                while waiting:
                    done, future, _ = waiting.popleft()
                    yield done, future.result()
            finally:
                for _, future, _ in waiting:
                    future.cancel()

    def _read(self, cut: Cut) -> Tensor:
        if cut.part is None:
            return cut.read(self.folder, self._buffer)
        for part in cut.parts:
            folder = self._checked(part.stored)
            if part.scale is not None:
                self._checked(part.scale)
        return cut.placed(self._placed).read(folder, self._buffer)

    def _checked(self, stored: Stored) -> Path:
        """The folder of a tensor's file, fetched, its header compared with what was promised.

        A file that has just come is sampled for the fingerprint: experts that the plan drops are not looked at again.
        """
        if stored.file not in self._fetched:
            folder = self.source.fetch(stored.file)
            self._fetched[stored.file] = (folder, read_header(folder / stored.file))
            for part in self.sampled:
                if part.stored.file == stored.file and part.name not in self.samples:
                    self._checked(part.stored)
                    if part.scale is not None:
                        self._checked(part.scale)
                    self.samples[part.name] = sample(self.config, folder, self._placed(part))
        folder, header = self._fetched[stored.file]
        present = header.get(stored.name)
        if present is None or (present.dtype, present.shape) != (stored.dtype, stored.shape):
            raise ValueError(f"{folder / stored.file}: {stored.name} is not what was announced. Fetch it again.")
        return folder

    def _placed(self, part: Part) -> Part:
        """The part at its place in the file itself; a Hub's metadata counts from the end of the header."""
        stored = self._fetched[part.stored.file][1][part.stored.name]
        scale = self._fetched[part.scale.file][1][part.scale.name] if part.scale else None
        return dataclasses.replace(part, stored=stored, scale=scale)

    def _record(self) -> None:
        content = {"request": self.request, "shards": self.written, "samples": self.samples}
        write_text(self.folder / _JOURNAL, json.dumps(content))

    def finish(self, values: Mapping[str, Any]) -> None:
        """Everything beside the weights; then read back and verify all of it."""
        carry(self.source.folder, self.folder)
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (self.folder / "config.json").write_text(text, encoding="utf-8")
        write_index(self.folder, self.shards)
        self._verify()
        shutil.rmtree(self.folder / _DOWNLOADS, ignore_errors=True)
        flush(self.folder)

    def _verify(self) -> None:
        """Shapes against the new config's model, bytes against what was handed to the disk."""
        wanted = published_shapes(load_config(self.folder))
        found: dict[str, tuple[int, ...]] = {}
        for name, sha256 in self.written.items():
            file = self.folder / name
            if files_sha256([file]) != sha256:
                file.unlink()
                raise ValueError(f"{file}: does not read back as it was written. The same command writes it again.")
            found |= {tensor.name: tensor.shape for tensor in read_header(file).values()}
        assert found == wanted, "what was written is not what the new config asks for"


def carry(source: Path, destination: Path) -> None:
    """Copy what lies beside a checkpoint's weights and stays true of a smaller one: tokenizer, licence and their like."""
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, destination / file.name)


def _request(
    source: LocalSource | HubSource, plan: CompressionPlan, cuts: Sequence[Cut], shard_bytes: int, dtype: Any
) -> str:
    """Hash of everything that decides what is written."""
    tensors = [(cut.name, *((part.stored.file, part.stored.begin) for part in cut.parts)) for cut in cuts]
    files = sorted({part.stored.file for cut in cuts for part in cut.parts})
    states = []
    if isinstance(source, LocalSource):
        states = [[(source.folder / file).stat().st_size, (source.folder / file).stat().st_mtime_ns] for file in files]
    parts = [source.name, source.revision, plan.sha256, shard_bytes, str(dtype), tensors, states]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _move(partial: Path, destination: Path) -> None:
    if destination.is_dir():
        shutil.rmtree(destination)
    partial.replace(destination)
    for name in (_JOURNAL, _LOCK):
        (destination / name).unlink(missing_ok=True)
    flush_entry(destination.parent)
