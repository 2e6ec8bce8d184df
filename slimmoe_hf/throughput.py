"""How fast a model reads a prompt (prefill) and writes what follows (decode), and the memory that this takes.

Shape letters: N rows, T tokens per row.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimmoe_hf.peak import PeakMemory

_WARM_UP = 2  # decoded tokens before any is timed: first calls compile, allocate and load


@dataclass(frozen=True)
class Speed:
    """What `measure_speed` finds.

    Attributes:
        batch: Rows at a time, N. prompt: Tokens of each, T. new_tokens: Tokens decoded after it.
        prefill_tokens_per_second: Prompt tokens, of all rows together, median over the repeats.
        decode_tokens_per_second: New tokens, of all rows together, median over the repeats.
        peak_memory: Bytes on the model's device: its weights there, and what prefill and decode take above them (the
            cache among it). None where `PeakMemory` cannot tell.
    """

    batch: int
    prompt: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory: int | None


@torch.inference_mode()
def measure_speed(model: PreTrainedModel, prompt_NT: Tensor, new_tokens: int = 32, repeats: int = 3) -> Speed:
    """Time prefill and greedy decoding with a key/value cache.

    The loop is the model's own work and nothing else: what `generate` adds around it is left out, no end-of-text token
    ends it, and on a GPU the host waits only where the clock is read.

    Args:
        model: In eval mode.
        prompt_NT: Token ids, no padding. Real text loads the experts as real text does.
        new_tokens: Tokens to decode after the prompt; the first comes with the prefill, as it does for users, and is
            not counted as decoded.
        repeats: Times both are measured, after a short warm-up.
    """
    ids_NT = prompt_NT.to(model.device)
    weights = sum(tensor.nbytes for tensor in model.parameters() if tensor.device == model.device)
    generate_greedily(model, ids_NT, _WARM_UP)
    with PeakMemory(model.device) as peak:
        timed = [generate_greedily(model, ids_NT, new_tokens)[1:] for _ in range(repeats)]
    prefills, decodes = zip(*timed, strict=True)
    return Speed(
        batch=ids_NT.shape[0],
        prompt=ids_NT.shape[1],
        new_tokens=new_tokens,
        prefill_tokens_per_second=ids_NT.numel() / statistics.median(prefills),
        decode_tokens_per_second=ids_NT.shape[0] * new_tokens / statistics.median(decodes),
        peak_memory=None if peak.bytes is None else weights + peak.bytes,
    )


@torch.inference_mode()
def generate_greedily(model: PreTrainedModel, ids_NT: Tensor, new_tokens: int) -> tuple[Tensor, float, float]:
    """Decode the likeliest tokens after a prompt, with a cache, whatever they are.

    Args:
        model: In eval mode.
        ids_NT: The prompt, on the model's device.
        new_tokens: Tokens to decode after the first, which the prefill gives.

    Returns:
        `(tokens, prefill, decode)`: `[N, 1 + new_tokens]` ids, and the seconds of the two phases.
    """
    synchronise(model.device)
    started = time.perf_counter()
    output = model(input_ids=ids_NT, use_cache=True, logits_to_keep=1)
    tokens = [output.logits[:, -1:].argmax(-1)]
    synchronise(model.device)
    filled = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
        tokens.append(output.logits[:, -1:].argmax(-1))
    synchronise(model.device)
    return torch.cat(tokens, dim=1), filled - started, time.perf_counter() - filled


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
