"""The teacher cache: a teacher's answers to texts, on disk, found again by the tokens of the text alone.

A *text* is what the teacher reads at one time: a row, or one document of a row that packs several. Of its T tokens,
answer t (0 to T - 2) is the distribution of token t + 1. All positions are kept, whatever is masked in training, and
texts are found by a hash of their ids: neither masks nor order, packing, batch size or the number of processes matter.

A cache is a folder of safetensors and JSON:

    manifest.json                  `Manifest`: what the cache was made of, and the hash of every file
    answers-RRR-NNNNN.safetensors  shard N of process R: `keys [R, 16]`, `lengths [R]` of its texts, and their answers,
                                   one after the other: `log_probs [N, K]`, `indices [N, K]`, `log_tail [N, M]`
                                   of kind "top_k", `hidden [N, D]` of kind "hidden"
    index.safetensors              `keys [R, 16]`, sorted; `shard`, `first` (answer), `length` (of the text), all `[R]`
    head.safetensors               of kind "hidden": `weight [V, D]` and `bias [V]` of the teacher's output head

Log-probabilities are float16: between 8 and 16 nats it is .004 off at most, bfloat16 .03. Where K entries are kept,
they are the likeliest, but the last gives way to the text's own next token if that is not among them. The mass outside
is stored as its logarithm, from the other entries themselves: no difference that cancels. For every temperature T that
the cache is to serve it is `log(sum outside p^(1/T))`: with the kept entries, which need only a division, that is the
distribution at T. Two bytes more per answer and temperature; no other temperature can be had of a cache.

Shape letters: R texts, N answers, K entries kept, M temperatures, V vocabulary, D model width, B rows and T tokens of a
batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Kind = Literal["top_k", "hidden"]
KINDS: tuple[Kind, ...] = ("top_k", "hidden")
MANIFEST, INDEX, HEAD = "manifest.json", "index.safetensors", "head.safetensors"
VERSION: Literal[1] = 1
TOP_K = 64
KEY_BYTES = 16
_SHORT_INDEX = 1 << 16


class CacheSpec(BaseModel):
    """What a cache holds answers of, and in which form. One of another spec is another cache.

    Attributes:
        teacher: As it was named. revision: Commit of one on the Hub.
        weights_sha256, config_sha256: Hashes of its weight files and its config.json; None where the teacher was given as
            a model.
        fingerprint: `identity.model_fingerprint` of its weights; None where it cannot be taken.
        tokenizer_sha256: `vocabulary_sha256`.
        vocab_size: V, ids that the answers are over.
        kind: "top_k", or "hidden": the teacher's last hidden states, from which its head makes every logit.
        top_k: K; 0 for hidden states.
        temperatures: Those that can be trained at; 1.0 is the first. Hidden states serve every temperature.
        hidden_size: D; 0 for kind "top_k".
        stored: Dtype of log-probabilities or hidden states. computed: Of the teacher's weights.
        data: Where the texts come from, for people: data, split, max_length, packing, ...
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str
    revision: str | None = None
    weights_sha256: str | None = None
    config_sha256: str | None = None
    fingerprint: str | None = None
    tokenizer_sha256: str
    vocab_size: int = Field(gt=1)
    kind: Kind = "top_k"
    top_k: int = TOP_K
    temperatures: tuple[float, ...] = (1.0,)
    hidden_size: int = 0
    stored: Literal["float16", "bfloat16"] = "float16"
    computed: str = "float32"
    data: dict[str, Any] = {}

    def columns(self) -> dict[str, tuple[torch.dtype, int]]:
        """The tensors that hold the answers: name -> dtype and numbers per answer."""
        stored = {"float16": torch.float16, "bfloat16": torch.bfloat16}[self.stored]
        if self.kind == "hidden":
            return {"hidden": (stored, self.hidden_size)}
        index = torch.uint16 if self.vocab_size <= _SHORT_INDEX else torch.int32
        tails = len(self.temperatures)
        return {"log_probs": (stored, self.top_k), "indices": (index, self.top_k), "log_tail": (torch.float16, tails)}

    @property
    def bytes_per_answer(self) -> int:
        """Bytes of one answer; a text adds 20 in its shard and 28 in the index."""
        return sum(dtype.itemsize * width for dtype, width in self.columns().values())


class ShardEntry(BaseModel):
    """One finished shard.

    Attributes:
        file: Its name. sha256: Hash of it. bytes: Its size.
        texts, answers: How many it holds.
        tail_mass: Sum over the answers of the probability outside the kept entries.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(pattern=r"^answers-\d+-\d+\.safetensors$")
    sha256: str
    bytes: int
    texts: int
    answers: int
    tail_mass: float


class Manifest(BaseModel):
    """What `manifest.json` says.

    Attributes:
        spec: What the answers are.
        texts, answers: How many; the texts have `texts + answers` tokens.
        shards: The files of answers. index_sha256, head_sha256: Hashes of the two other files.
        mean_tail_mass: Mean probability outside the kept entries, at temperature 1.
        version: Of this format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: CacheSpec
    texts: int
    answers: int
    mean_tail_mass: float
    shards: list[ShardEntry]
    index_sha256: str
    head_sha256: str | None = None
    version: Literal[1] = VERSION


def normalised(log_probs_NK: Tensor, log_tail_N: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Stored answers as a distribution over the kept entries and the rest: float32, and its mass is 1.

    Args:
        log_probs_NK: `[..., K]` at T = 1.
        log_tail_N: `[...]`, `log(sum outside p^(1/T))`.
        temperature: T.

    Returns:
        Log-probabilities `[..., K]` and the tail's `[...]`, at T. Rounding to float16 costs them no mass.
    """
    entries = torch.cat([log_probs_NK.float() / temperature, log_tail_N.float().unsqueeze(-1)], dim=-1)
    entries = entries.log_softmax(-1)
    return entries[..., :-1], entries[..., -1]


def bytes_per_answer(
    vocab_size: int, top_k: int = TOP_K, kind: Kind = "top_k", hidden_size: int = 0, temperatures: int = 1
) -> int:
    """Bytes of one answer over so many ids, before there is a cache.

    Args:
        vocab_size: V.
        top_k: K, of kind "top_k"; all V where there are fewer.
        kind: As in `CacheSpec`.
        hidden_size: D, of kind "hidden".
        temperatures: How many it serves, 1.0 among them.
    """
    spec = CacheSpec(
        teacher="", tokenizer_sha256="", vocab_size=vocab_size, kind=kind, top_k=min(top_k, vocab_size),
        hidden_size=hidden_size, temperatures=(1.0,) * temperatures,
    )  # fmt: skip
    return spec.bytes_per_answer


def unfinished(folder: Path) -> Path:
    """Where a cache is while it is being written."""
    return folder.absolute().with_name(f"{folder.absolute().name}.unfinished")


def text_key(ids: Any) -> bytes:
    """What a text is found by: half of the SHA-256 of its ids as little-endian int32."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).digest()[:KEY_BYTES]


def texts_of(row: Mapping[str, Any]) -> list[np.ndarray[Any, Any]]:
    """The texts of a tokenised row, as the teacher reads them: its documents where `seq_lengths` says so, else all of it.

    Those of one token are left out: there is nothing to answer.
    """
    ids = np.asarray(row["input_ids"], dtype="<i4")
    lengths = row.get("seq_lengths")
    texts = [ids] if lengths is None else np.split(ids, np.cumsum(lengths)[:-1])
    return [text for text in texts if len(text) > 1]


def base_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> token, without added tokens: padding rows are often renamed."""
    added = tokenizer.get_added_vocab()
    return {index: token for token, index in tokenizer.get_vocab().items() if token not in added}


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Which ids mean which tokens."""
    return hashlib.sha256(json.dumps(sorted(base_vocabulary(tokenizer).items())).encode()).hexdigest()


def require_whole(file: Path, size: int) -> None:
    """Raise ValueError if a file of a cache is missing, or has another size than the manifest says."""
    if not file.is_file():
        raise ValueError(f"{file}: missing. Write the cache again.")
    if file.stat().st_size != size:
        raise ValueError(f"{file}: has {file.stat().st_size} bytes, not {size}. Write the cache again.")
