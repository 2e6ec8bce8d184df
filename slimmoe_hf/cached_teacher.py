"""A teacher that is a cache on disk: nothing of it is in memory but the answers to the batch at hand.

Shape letters: B rows, T tokens per row, N predictions that count, K entries kept, U teacher width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimmoe_hf.cache import CacheCollator, TeacherCache
from slimmoe_hf.cache_answers import write_cache
from slimmoe_hf.cache_format import TOP_K
from slimmoe_hf.losses import DistillationLoss, shared_vocabulary
from slimmoe_hf.signals import Head, Teacher, TeacherStates, TeacherTopK
from slimmoe_hf.teacher import LiveTeacher
from slimmoe_hf.terms import Seen, Terms

COLUMNS = ("teacher_log_probs", "teacher_indices", "teacher_log_tail", "teacher_hidden")
"""What `CacheCollator` adds to a batch; no model takes it."""
FOLDER = "teacher-cache"
"""Where `precompute_teacher_logits` writes within `output_dir`."""
_LOOKED_AT = 64
"""Rows of a stream that are looked for in the cache before training (our choice)."""


class CachedTeacher:
    """Answers that come with the batches, from a finished cache.

    Attributes:
        cache: The cache.
        loss: What its answers are for.
        vocab_size: V, ids that it answers over.
        name: Of the model that gave the answers.
    """

    def __init__(self, cache: TeacherCache, loss: DistillationLoss) -> None:
        """Take an open cache."""
        self.cache, self.loss = cache, loss
        self.vocab_size, self.name = cache.spec.vocab_size, cache.spec.teacher
        self._head: Head | None = None

    def check(self, student_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Compare the cache with the student and the loss, without looking at the data.

        Args:
            student_size: Rows of the student's head.
            tokenizer: Of the training data.

        Raises:
            ValueError: One line that names every mismatch.
        """
        self.cache.check(
            tokenizer=tokenizer, vocab_size=student_size, temperature=self.loss.temperature, beta=self.loss.beta,
            files=False,
        )  # fmt: skip
        shared_vocabulary(student_size, self.vocab_size, len(tokenizer))
        kept = self.cache.spec.top_k
        if self.loss.top_k > kept > 0:
            raise ValueError(
                f"loss_top_k={self.loss.top_k}, and {self.cache.folder} keeps {kept} tokens: set loss_top_k={kept} or less, "
                f"or write it with --top-k {self.loss.top_k}."
            )

    def check_rows(self, datasets: Iterable[Any], files: bool) -> None:
        """Look every row up that will be trained or evaluated on; of a stream the first ones.

        Args:
            datasets: Tokenised.
            files: Whether to compare the hashes of all files too.

        Raises:
            ValueError: Rows that are not in the cache, or a damaged file.
        """
        self.cache.check(
            rows=rows_of(datasets, _LOOKED_AT), temperature=self.loss.temperature, beta=self.loss.beta, files=files
        )

    def collator(self, collator: Any) -> CacheCollator:
        """A collator that gives each batch its answers."""
        return CacheCollator(collator, self.cache, self.loss.temperature)

    def place(self, accelerator: Accelerator) -> None:
        """Load the head that cached hidden states belong to."""
        if self.cache.spec.kind == "hidden":
            weight_VU, bias_V = self.cache.head()
            moved = None if bias_V is None else bias_V.to(accelerator.device)
            self._head = Head(weight_VU.to(accelerator.device), moved)

    def identity(self) -> str:
        """The hash of its manifest, which holds those of all files."""
        return "cache " + hashlib.sha256(self.cache.manifest.model_dump_json().encode()).hexdigest()

    def fingerprint(self) -> str | None:
        """Of the model that the cache was written by."""
        return self.cache.spec.fingerprint

    def answers(self, inputs: Mapping[str, Any], counts_BT: Tensor, terms: Terms) -> tuple[Teacher, Seen]:
        """As `teacher.TeacherSource.answers`; a cache knows nothing of layers, so terms get nothing."""
        nothing = Seen([], [])
        if self._head is not None:
            return TeacherStates(inputs["teacher_hidden"][:, :-1][counts_BT], self._head), nothing
        log_probs_NK, index_NK, log_tail_N = (inputs[name][:, :-1][counts_BT] for name in COLUMNS[:3])
        return TeacherTopK(log_probs_NK, index_NK, log_tail_N, self.vocab_size, self.loss.temperature), nothing


def rows_of(datasets: Iterable[Any], at_most: int | None = None) -> Iterator[Mapping[str, Any]]:
    """The tokenised rows of some datasets, one after the other.

    Args:
        datasets: Datasets, or dictionaries of them, or None.
        at_most: How many to take of one that is a stream; None is all.
    """
    for dataset in datasets:
        if isinstance(dataset, dict):
            yield from rows_of(dataset.values(), at_most)
        elif isinstance(dataset, Dataset):
            names = [name for name in ("input_ids", "seq_lengths") if name in dataset.column_names]
            yield from dataset.select_columns(names)
        elif dataset is not None:
            yield from islice(dataset, at_most)


def precomputed(
    teacher: LiveTeacher,
    datasets: Iterable[Any],
    folder: Path,
    loss: DistillationLoss,
    *,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    batch_size: int,
    accelerator: Accelerator,
) -> CachedTeacher:
    """Put every row that will be trained or evaluated on to a teacher, and keep its answers; what is there already stays.

    Forward KL needs `cache_format.TOP_K` entries of each answer, or `loss.top_k` where that is more; every other divergence
    needs all of them, and so hidden states are kept.

    Args:
        teacher: In place. The caller lets go of it.
        datasets: Tokenised; a stream is read to its end.
        folder: Where the cache is, or is to be.
        loss: What the answers are for.
        tokenizer: Of the data.
        vocab_size: Rows of the student's head.
        batch_size: Texts at a time.
        accelerator: The student's.

    Raises:
        ValueError: A teacher that is sharded, or as `write_cache`; or the cache that is there is of another teacher, or
            of other settings.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "precompute_teacher_logits=True puts different texts to the teacher in each process, which a sharded one cannot "
            "answer. Write the cache first with slimmoe cache write, and set teacher_logits_path."
        )
    if folder.exists():
        cache = TeacherCache.open(folder)
        cache.check(fingerprint=teacher.fingerprint() if cache.spec.fingerprint else None, files=False)
        return CachedTeacher(cache, loss)
    given = [dataset for dataset in datasets if dataset is not None]
    rows: Any = given[0] if len(given) == 1 and isinstance(given[0], Dataset) else rows_of(given)
    cache = write_cache(
        teacher.model, rows, folder, tokenizer=tokenizer, kind="top_k" if loss.beta == 0.0 else "hidden",
        top_k=max(TOP_K, loss.top_k), temperatures=(loss.temperature,),
        vocab_size=min(vocab_size, teacher.vocab_size), batch_size=batch_size,
    )  # fmt: skip
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return CachedTeacher(cache, loss)
