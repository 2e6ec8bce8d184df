"""Encoder-decoders as they lie on disk, stock, merged or factored: loaded whole, counted, measured.

Shape letters: B rows, S tokens per row of the encoder, T of the decoder, V vocabulary.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimmoe_hf.data import batches
from slimmoe_hf.factored import expert_modules
from slimmoe_hf.factored_checkpoint import load_factored
from slimmoe_hf.generation_evaluation import GenerationScores, evaluate_generation, generate_answers
from slimmoe_hf.loading import FACTORED, load_model, weight_bytes, weights_sha256
from slimmoe_hf.throughput import synchronise


class PairMeasurement(BaseModel):
    """What `evaluate_pairs` finds.

    Attributes:
        total_parameters: All weights; of factored experts what is kept. active_parameters: Those a token meets: of every
            layer's experts one, on average.
        bytes: Size of the weight files. weights_sha256: Hash of their contents.
        loss: Mean nats per predicted token of the completions.
        bits_per_byte: The same of the completions' text.
        tokens_per_second: Median over the batches of a forward pass, prompts and completions.
        generation: How right its answers are. samples: Its first answers.
    """

    model_config = ConfigDict(frozen=True)

    total_parameters: int
    active_parameters: int
    bytes: int
    weights_sha256: str
    loss: float
    bits_per_byte: float
    tokens_per_second: float
    generation: GenerationScores
    samples: list[str]


def load_seq2seq(
    path: Path, *, regrow: bool = False, dtype: str = "float32", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a checkpoint of an encoder-decoder in whatever form it was saved, in eval mode, with every weight from its files.

    Args:
        path: Its folder.
        regrow: Hold every S of factored experts whole, to be trained.
        dtype: Of the loaded weights.
        device: Where it computes.

    Raises:
        ValueError: A weight is missing, left over or of another shape; or the folder holds another kind of model.
    """
    if FACTORED not in json.loads((path / "config.json").read_text(encoding="utf-8")):
        return load_model(path, dtype, device, whole=True)
    factored: Any = load_factored(path, regrow=regrow, dtype=dtype)
    placed: PreTrainedModel = factored.to(device)
    return placed


def freeze_routers(model: PreTrainedModel) -> None:
    """Have all parameters train but the routers' (M-SMoE; rows of merged experts would drift from what they point to)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".router." not in name)


def count_pairs_model(model: PreTrainedModel) -> tuple[int, int]:
    """`(total, active)` parameters of a Switch Transformer in any form; experts that are one and the same count once.

    Active are all but the experts that a token does not meet: of every layer's different experts one, on average.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0.0
    for experts in expert_modules(model).values():
        distinct = len({id(next(expert.parameters())) for expert in experts.children()})
        size = sum(parameter.numel() for parameter in experts.parameters())
        idle += size * (distinct - 1) / distinct
    return total, total - round(idle)


@torch.inference_mode()
def measure_pairs(
    model: PreTrainedModel, rows: Dataset, batch_size: int, pad_token_id: int = 0
) -> tuple[float, int, float]:
    """Sweep a model over tokenised pairs.

    Args:
        model: In eval mode.
        rows: With `input_ids` and `labels`.
        batch_size: B; the loss does not depend on it.
        pad_token_id: What fills `input_ids`.

    Returns:
        Mean nats per label, the number of labels, and tokens per second (median over the batches).

    Raises:
        ValueError: The loss is not finite.
    """
    nats, labels, speeds = 0.0, 0, []
    whole: Any = model
    for batch in batches(rows, batch_size, pad_token_id):
        given = {name: value.to(model.device) for name, value in batch.items()}
        targets_BT = given.pop("labels")
        given["decoder_input_ids"] = whole.prepare_decoder_input_ids_from_labels(labels=targets_BT)
        synchronise(model.device)
        started = time.perf_counter()
        logits_BTV = whole(**given, use_cache=False).logits
        synchronise(model.device)
        speeds.append((given["input_ids"].numel() + targets_BT.numel()) / (time.perf_counter() - started))
        nats += F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum").item()
        labels += int((targets_BT != -100).sum())
    if not math.isfinite(nats):
        raise ValueError("the held-out loss is not finite: the weights or their products overflow in this dtype.")
    return nats / labels, labels, statistics.median(speeds)


def evaluate_pairs(
    path: Path,
    rows: Dataset,
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
    device: str | torch.device = "cpu",
    samples: int = 2,
) -> PairMeasurement:
    """Load a checkpoint from disk and measure it, in float32.

    Args:
        path: Its folder.
        rows: Tokenised pairs.
        pairs: The same as text.
        tokenizer: Its tokenizer.
        batch_size: Pairs at a time.
        max_new_tokens: An answer is cut there.
        device: Where to run.
        samples: How many answers are kept.
    """
    model = load_seq2seq(path, device=device)
    loss, labels, speed = measure_pairs(model, rows, batch_size, tokenizer.pad_token_id or 0)
    size = sum(len(text.encode()) for text in pairs["completion"])
    total, active = count_pairs_model(model)
    asked = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return PairMeasurement(
        total_parameters=total,
        active_parameters=active,
        bytes=weight_bytes(path),
        weights_sha256=weights_sha256(path),
        loss=loss,
        bits_per_byte=loss / math.log(2) * labels / max(size, 1),
        tokens_per_second=speed,
        generation=evaluate_generation(model, tokenizer, pairs, **asked),
        samples=generate_answers(model, tokenizer, pairs["prompt"][:samples], **asked),
    )
