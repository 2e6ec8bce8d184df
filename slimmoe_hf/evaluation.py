"""Measure a checkpoint as it lies on disk: held-out loss, agreement, expert load, speed, memory, size, samples.

Anyone can recompute the loss with plain transformers: tokenise every document of the split, end each with the
end-of-text token, concatenate, cut into rows of T tokens (the rest is dropped), and take the mean cross-entropy over
the T - 1 predicted tokens of every row.

Shape letters: N rows, T tokens per row, V vocabulary, L layers with experts, E experts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import BaseModel, ConfigDict
from rich import get_console
from rich.progress import track
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimmoe_hf.data import document_text, take_tokens, tokenize, tokenize_document
from slimmoe_hf.families import DECODERS, moe_layers, refuse_encoder_decoder, shape_of
from slimmoe_hf.loading import load_config, load_model, weight_bytes, weights_sha256
from slimmoe_hf.routing import RouterLoad, load_shares
from slimmoe_hf.shared_experts import experts_held
from slimmoe_hf.throughput import measure_speed, synchronise

PROMPT, NEW_TOKENS = 256, 32
"""How long a prompt is read and how much is decoded after it, one row at a time, to measure speed (our choice)."""


@dataclass(frozen=True)
class HeldOut:
    """Text that models are measured on.

    Attributes:
        rows_NT: Token ids, cut as the module says.
        documents: How many documents the rows come from.
        stream_tokens: Their tokens, each end-of-text token counted, the dropped rest too.
        stream_bytes: Their UTF-8 bytes (of chats: as the template renders them).
    """

    rows_NT: Tensor
    documents: int
    stream_tokens: int
    stream_bytes: int

    @property
    def tokens(self) -> int:
        """Predicted tokens: T - 1 in every row."""
        return self.rows_NT.shape[0] * (self.rows_NT.shape[1] - 1)

    def bits_per_byte(self, loss: float) -> float:
        """`loss / ln 2 * stream_tokens / stream_bytes`: nats per token as bits per byte of the text itself."""
        return loss / math.log(2) * self.stream_tokens / self.stream_bytes


@dataclass(frozen=True)
class Sweep:
    """What one pass over held-out rows finds.

    Attributes:
        loss: Mean nats per predicted token.
        tokens_per_second: Median over the batches of a forward pass; None where one layer at a time was in memory.
        agreement: Share of positions where the teacher's likeliest token is the model's too; None without a teacher.
        router_layers: Which decoder layers have experts.
        router_load: Tokens that each expert was given, `[L, E]`, as multiples of an even load; empty for families that
            are not in `FAMILIES`.
    """

    loss: float
    tokens_per_second: float | None
    agreement: float | None
    router_layers: list[int]
    router_load: list[list[float]]


class Measurement(BaseModel):
    """What `evaluate_checkpoint` finds.

    Attributes:
        total_parameters: All weights. active_parameters: Those a token meets: K of E experts, everything else whole.
        bytes: Size of the weight files. weights_sha256: Hash of their contents.
        loss: Mean nats per predicted token. bits_per_byte: See `HeldOut.bits_per_byte`.
        tokens_per_second, router_layers, router_load: See `Sweep`.
        agreement: Share of positions where the teacher's likeliest token is the model's too; None without a teacher.
        prefill_tokens_per_second, decode_tokens_per_second: One row: a held-out prompt of at most `PROMPT` tokens, and
            `NEW_TOKENS` after it. peak_memory: Bytes that this takes, weights included. See `Speed`.
        samples: Greedy continuations.
        streamed: One decoder layer at a time was in memory, so there is no speed and no sample.
    """

    model_config = ConfigDict(frozen=True)

    total_parameters: int
    active_parameters: int
    bytes: int
    loss: float
    bits_per_byte: float
    tokens_per_second: float | None
    agreement: float | None = None
    weights_sha256: str
    samples: list[str] = []
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    peak_memory: int | None = None
    router_layers: list[int] = []
    router_load: list[list[float]] = []
    streamed: bool = False

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, per token: models with different tokenizers cannot be compared by it."""
        return math.exp(self.loss)


def held_out(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, tokens: int | None = None
) -> HeldOut:
    """Cut held-out documents into rows.

    Args:
        documents: One split, as `load_documents` gives it.
        tokenizer: The model's.
        max_length: T, tokens per row.
        tokens: Read documents, in order, until they have this many tokens; None reads all.

    Raises:
        ValueError: There are fewer tokens than one row needs.
    """
    if tokens is not None:
        documents = take_tokens(documents, tokens, tokenizer)
    rows = tokenize(documents, tokenizer, max_length)
    return HeldOut(
        rows_NT=torch.tensor(rows["input_ids"][:]),
        documents=len(documents),
        stream_tokens=sum(len(tokenize_document(row, tokenizer)) for row in documents),
        stream_bytes=sum(len(document_text(row, tokenizer).encode()) for row in documents),
    )


@torch.inference_mode()
def measure_loss(
    model: PreTrainedModel,
    rows_NT: Tensor,
    batch_size: int = 8,
    teacher: PreTrainedModel | None = None,
    progress: bool = True,
) -> Sweep:
    """Sweep a model over held-out rows.

    Args:
        model: In eval mode.
        rows_NT: Token ids.
        batch_size: Rows at a time; the loss does not depend on it.
        teacher: Compare the likeliest tokens with this model's.
        progress: Show a progress bar.

    Raises:
        ValueError: The loss is not finite.
    """
    nats, agreed, speeds = 0.0, 0, []
    load = RouterLoad(model) if model.config.model_type in DECODERS else None
    batches = rows_NT.split(batch_size)
    shown = progress and get_console().is_terminal
    for batch_NT in track(batches, "Evaluating", disable=not shown, transient=True):
        ids_NT = batch_NT.to(model.device)
        with load.counting() if load is not None else nullcontext():
            synchronise(model.device)
            started = time.perf_counter()
            logits_NTV = model(input_ids=ids_NT, use_cache=False).logits
            synchronise(model.device)
        speeds.append(ids_NT.numel() / (time.perf_counter() - started))
        for logits_TV, ids_T in zip(logits_NTV, ids_NT, strict=True):  # row by row: no second tensor of N x T x V
            nats += F.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="sum").item()
        if teacher is not None:
            teacher_NT = teacher(input_ids=batch_NT.to(teacher.device), use_cache=False).logits.argmax(-1)
            agreed += int((logits_NTV.argmax(-1) == teacher_NT.to(model.device))[:, :-1].sum())
    predicted = rows_NT.shape[0] * (rows_NT.shape[1] - 1)
    if not math.isfinite(nats):
        raise ValueError("the held-out loss is not finite: the weights or their products overflow in this dtype.")
    return Sweep(
        loss=nats / predicted,
        tokens_per_second=statistics.median(speeds),
        agreement=agreed / predicted if teacher is not None else None,
        router_layers=load.layers if load is not None else [],
        router_load=rounded_load(load.counts()) if load is not None else [],
    )


def rounded_load(counts_LE: Tensor) -> list[list[float]]:
    """Expert load as reports have it: multiples of an even load, to four places."""
    return [[round(share, 4) for share in row] for row in load_shares(counts_LE).tolist()]


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """`(total, active)` parameters; a model on the meta device will do.

    Active are all but the experts that a token's router leaves out: both embeddings, attention, routers and K of the
    E experts of each layer (of shared ones, no more than are held). Tied embeddings are one tensor and count once.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    idle, top_k = 0, shape_of(model.config).top_k
    for layer, module, _ in moe_layers(model):
        held = experts_held(model.config, layer)
        idle += sum(parameter.numel() for parameter in module.parameters()) * max(held - top_k, 0) // held
    return total, total - idle


@torch.inference_mode()
def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 32
) -> list[str]:
    """Greedy continuations, prompt included, each on one line."""
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )  # fmt: skip
    lines = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        output: Any = model.generate(**inputs, generation_config=settings)  # type: ignore[operator]
        lines.append(" ".join(str(tokenizer.decode(output[0], skip_special_tokens=True)).split()))
    return lines


def opening_prompts(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, number: int = 2, words: int = 12
) -> list[str]:
    """The first words of the first documents: prompts in the data's own voice."""
    texts = [document_text(documents[index], tokenizer) for index in range(min(number, len(documents)))]
    return [" ".join(text.split()[:words]) for text in texts]


def evaluate_checkpoint(
    path: Path,
    data: HeldOut,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    teacher: PreTrainedModel | None = None,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 32,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    progress: bool = True,
) -> Measurement:
    """Load a checkpoint from disk with plain transformers and measure it.

    Args:
        path: Its folder.
        data: What to measure it on.
        tokenizer: For the samples.
        batch_size: Rows at a time.
        teacher: Report the agreement with this model.
        prompts: What the samples continue.
        max_new_tokens: Length of each sample.
        device: Where to run.
        dtype: What to compute in, whatever the weights are stored in.
        progress: Show a progress bar.
    """
    refuse_encoder_decoder(load_config(path, shared=True), "evaluation on text")
    model = load_model(path, dtype=dtype, device=device)
    swept = measure_loss(model, data.rows_NT, batch_size, teacher, progress)
    speed = measure_speed(model, data.rows_NT[:1, :PROMPT], NEW_TOKENS)
    return measurement_of(
        path,
        model,
        data,
        swept,
        samples=generate_text(model, tokenizer, prompts, max_new_tokens),
        prefill_tokens_per_second=speed.prefill_tokens_per_second,
        decode_tokens_per_second=speed.decode_tokens_per_second,
        peak_memory=speed.peak_memory,
    )


def measurement_of(path: Path, model: PreTrainedModel, data: HeldOut, swept: Sweep, **more: Any) -> Measurement:
    """A sweep with what else is known of the checkpoint.

    Args:
        path: Its folder.
        model: Of its sizes; its weights are not looked at.
        data: What was swept.
        swept: What was found.
        more: Other fields.
    """
    total, active = count_parameters(model)
    return Measurement(
        total_parameters=total,
        active_parameters=active,
        bytes=weight_bytes(path),
        bits_per_byte=data.bits_per_byte(swept.loss),
        weights_sha256=weights_sha256(path),
        **vars(swept),
        **more,
    )
