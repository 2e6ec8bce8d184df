"""What a teacher that is larger than memory says of calibration text: its likeliest tokens, a decoder layer at a time.

The loss `kd_topk` looks at no more of a teacher, so this is all that is kept: 64 bytes for every predicted token.

Shape letters: N predicted tokens of a batch, V vocabulary, K entries kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimmoe_hf.atomic import replacing
from slimmoe_hf.blocks import HEAD, Blocks
from slimmoe_hf.calibration import KD_TOP_K, next_tokens
from slimmoe_hf.losses import kept_kl
from slimmoe_hf.pace import Pace
from slimmoe_hf.sweeps import Batch
from slimmoe_hf.walk import Walk

CHUNK_BYTES = 1 << 26
"""Of float32 logits at a time; a loss holds several tensors of that size."""
_SHA256 = "weights_sha256"


def predicted(batch: Batch, vocab_size: int) -> list[Tensor]:
    """Flat positions of a batch that predict a token, as many together as logits are made of at a time."""
    places_N = (next_tokens(batch).flatten() != -100).nonzero().squeeze(-1)
    return list(places_N.split(max(1, CHUNK_BYTES // (4 * vocab_size))))


@dataclass(frozen=True)
class Kept:
    """A teacher's likeliest tokens at every predicted place.

    Attributes:
        weights_sha256: `identity.model_sha256` of the teacher.
        log_probs: `[N, K]` of every batch, over the ids that student and teacher share. index: Which ids, `[N, K]`.
        vocabulary: How many ids they share.
    """

    weights_sha256: str
    log_probs: list[Tensor]
    index: list[Tensor]
    vocabulary: int

    def loss(self, logits_NV: Tensor, number: int, first: int) -> Tensor:
        """`kd_topk` of some predictions of batch `number`, the first of which is its `first`. Returns `[N]`, nats."""
        some, place = slice(first, first + len(logits_NV)), logits_NV.device
        log_probs_NK, index_NK = self.log_probs[number][some].to(place), self.index[number][some].to(place)
        return kept_kl(logits_NV[:, : self.vocabulary], log_probs_NK, index_NK.long())


def ask_teacher(
    path: Path,
    batches: Sequence[Batch],
    vocab_size: int,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = True,
) -> Kept:
    """Pass all batches through a teacher of which one layer is in memory; killed, the same call continues.

    Args:
        path: Folder of its checkpoint.
        batches: As for `calibration.collect_stats`, in host memory.
        vocab_size: Of the student.
        folder: For this alone. What the teacher said stays there, what passes between its layers does not.
        dtype: What is computed in.
        device: What is computed on.
        progress: Show a progress bar.

    Raises:
        ValueError: As `blocks.Blocks`; weights that are not finite, or no room on the disk.
    """
    answers, layers = folder / "answers", folder / "layers"
    if not answers.exists():
        blocks = Blocks(path, dtype, device)
        walk, vocabulary = Walk(blocks, batches, layers), min(vocab_size, blocks.config.vocab_size)
        walk.require_room(2, "fewer --tokens")
        order = [*walk.forward_order(), HEAD]
        walk.pace = Pace("the teacher's answers", blocks, order, [], walk.tokens)
        found: dict[str, Tensor] = {}
        visits = blocks.visit(order, fresh=order, hashed=True)
        for part in track(visits, "Asking the teacher", total=len(order), disable=not progress):
            walk.note_hashes(part)
            if part != HEAD:
                walk.forward(part)
                continue
            for number in range(len(batches)):
                found |= {f"{name}-{number}": kept for name, kept in _likeliest(walk, number, vocabulary).items()}
        with replacing(answers, overwrite=True) as partial:
            save_file(found, partial, metadata={_SHA256: walk.weights_sha256(), "vocabulary": str(vocabulary)})
    shutil.rmtree(layers, ignore_errors=True)
    with safe_open(answers, framework="pt") as file:
        said, count = file.metadata(), range(len(batches))
        log_probs, index = (
            [file.get_tensor(f"{name}-{number}") for number in count] for name in ("log_probs", "index")
        )
    return Kept(said[_SHA256], log_probs, index, int(said["vocabulary"]))


@torch.no_grad()
def _likeliest(walk: Walk, number: int, vocabulary: int) -> dict[str, Tensor]:
    """The kept entries of a batch, with the teacher's head in hand."""
    hidden_ND = walk.read("inputs", walk.layers, number).flatten(0, 1)
    none = torch.empty(0, KD_TOP_K)
    log_probs, index = [none], [none.int()]
    for places_N in predicted(walk.batches[number], walk.blocks.config.vocab_size):
        log_probs_NV = (
            walk.blocks.logits(hidden_ND[places_N.to(hidden_ND.device)])[:, :vocabulary].float().log_softmax(-1)
        )
        kept = log_probs_NV.topk(min(KD_TOP_K, vocabulary), dim=-1)
        log_probs.append(kept.values.cpu())
        index.append(kept.indices.cpu().int())
    return {"log_probs": torch.cat(log_probs), "index": torch.cat(index)}
