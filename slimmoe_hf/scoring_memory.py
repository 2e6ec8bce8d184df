"""How much memory scoring and reconstruction take: of a model in memory, and of models that stream by. From configs alone.

As in `memory`, what a layer does is found by running it on tensors without values. Streaming, the part in hand has its
weights where it computes, and the next one waits in host memory as it is stored.

Shape letters: B rows, T tokens per row, V vocabulary, S routed token-expert pairs, F expert width, F' the width kept, D model
width, X kept inputs of a projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from slimmoe_hf import answers, streamed_teacher
from slimmoe_hf.cache_writer import SHARD_BYTES
from slimmoe_hf.calibration import KD_TOP_K
from slimmoe_hf.families import Shape, family_of, moe_layers, shape_of
from slimmoe_hf.losses import forward_kl
from slimmoe_hf.memory import Memory, meta_model, phases_of
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.taps import BLOCK

_COPIES = 6
"""Tensors of a chunk's logits that the loss and its gradient hold together, or a teacher's answers (measured on a CPU)."""


def scoring_memory(
    config: PreTrainedConfig,
    *,
    batch: int = 8,
    length: int = 1024,
    dtype: torch.dtype = torch.float32,
    gradients: bool = True,
) -> Memory:
    """Memory of `collect_stats` with the model as its own teacher: frozen weights, no checkpointing.

    Args:
        config: The model's.
        batch: B, rows at a time.
        length: T, tokens per row.
        dtype: Of the weights.
        gradients: A loss is differentiated; else it is `none`.

    Raises:
        ValueError: As `family_of`.
    """
    if not gradients:
        working = phases_of(config, dtype, batch, length, _pass)["forward"].peak + _listening(config, batch, length)
        parts = {
            "weights": sum(_parts(config)) * dtype.itemsize,
            "statistics": shape_of(config).layers * _sums(config, gradients=False), "working set": working,
        }  # fmt: skip
        return Memory(use="scoring", parts=parts, peak="forward")
    phases = phases_of(config, dtype, batch, length, _score)
    held = shape_of(config).layers * _taps(config, batch, length, dtype)
    recording = _recording(config, batch, length)
    name = max(("head", "top"), key=lambda each: phases[each].peak + recording * (each == "top"))
    phase = phases[name]
    parts = {
        "weights": sum(_parts(config)) * dtype.itemsize, "activations": phase.activations + held,
        "statistics": shape_of(config).layers * _sums(config),
        "logits and loss" if name == "head" else "working set":
            phase.peak - phase.activations + (recording if name == "top" else 0),
    }  # fmt: skip
    return Memory(use="scoring", parts=parts, peak=name)


def streamed_scoring_memory(
    config: PreTrainedConfig,
    *,
    batch: int,
    length: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    gradients: bool = True,
) -> Memory:
    """Memory of `stream_stats`; `host` is what is read ahead, on a CPU on top of the rest.

    Args:
        config: The model's.
        batch: B, rows at a time.
        length: T, tokens per row.
        dtype: What is computed in. stored: What the checkpoint is in.
        gradients: A loss is differentiated; else it is `none`.

    Raises:
        ValueError: As `family_of`.
    """
    if not gradients:
        forward, largest = phases_of(config, dtype, batch, length, _pass)["forward"], _parts(config)[0]
        working = _sums(config, gradients=False) + _listening(config, batch, length) + forward.peak
        moment = {"weights": largest * dtype.itemsize, "working set": working}
        return _streamed("streamed scoring", {"layer": moment}, largest * stored.itemsize)
    top = phases_of(config, dtype, batch, length, _score)["top"]
    layer = _sums(config) + _taps(config, batch, length, dtype) + _recording(config, batch, length)
    chunk = min(streamed_teacher.CHUNK_BYTES, batch * length * config.vocab_size * 4)
    largest, at_head = _parts(config)[0], _parts(config)[2]
    # Turning back, the last layer stays where it is.
    moments = {
        "layer": {"weights": largest * dtype.itemsize, "working set": layer + top.peak - top.activations},
        "head": {"weights": (largest + at_head) * dtype.itemsize, "logits and loss": _COPIES * chunk},
    }
    return _streamed("streamed scoring", moments, largest * stored.itemsize)


def streamed_answers_memory(
    config: PreTrainedConfig,
    *,
    batch: int,
    length: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    device: str | None = None,
) -> Memory:
    """Memory of a streamed teacher that writes a cache, or is asked before another model is scored; `host` as above.

    Args:
        config: Its own.
        batch: B, texts at a time.
        length: T, tokens of each.
        dtype: What is computed in. stored: What the checkpoint is in.
        device: Type of the one on which a cache is made; None is a teacher that is asked for scores.

    Raises:
        ValueError: As `family_of`.
    """
    forward = phases_of(config, dtype, batch, length, _pass)["forward"]
    size = streamed_teacher.CHUNK_BYTES if device is None else answers.CHUNK_BYTES.get(device, answers.LARGE_CHUNK)
    chunk = min(size, batch * length * config.vocab_size * 4)
    largest, at_head = _parts(config)[0], _parts(config)[2]
    moments = {
        "layer": {"weights": largest * dtype.itemsize, "working set": forward.peak},
        "head": {"weights": at_head * dtype.itemsize, "logits and answers": _COPIES * chunk},
    }
    return _streamed("streamed answers", moments, largest * stored.itemsize + (0 if device is None else SHARD_BYTES))


def reconstruction_memory(
    config: PreTrainedConfig,
    after: PreTrainedConfig,
    *,
    tokens: int,
    batch: int,
    length: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    streamed: bool,
) -> Memory:
    """Memory of `reconstruct`, or if `streamed` of `stream_reconstruct`; `host` is text between layers, and solved weights.

    Args:
        config: The model's. after: Of what the plan leaves.
        tokens: Of all batches.
        batch: B, rows at a time.
        length: T, tokens per row.
        dtype: What is computed in.
        stored: What the checkpoint is in, and what is solved.
        streamed: The model streams by: its text between layers is on the disk, and so is what is solved but of one layer.

    Raises:
        ValueError: As `family_of`.
    """
    before, kept = shape_of(config), shape_of(after)
    forward = phases_of(config, dtype, batch, length, _pass)["forward"]
    width, hidden, layers = kept.expert_width, kept.hidden_size, len(moe_layers(meta_model(config)))
    busiest = batch * length  # tokens: all of a batch may go to one expert
    adding = busiest * (3 * before.expert_width + 2 * hidden) * 4 + busiest * (width + hidden) * 8
    solving = (3 * width**2 + 3 * hidden * width) * 8
    weights = (_parts(config)[0] if streamed else sum(_parts(config))) * dtype.itemsize
    experts, attention = kept.num_experts * width * hidden, _heads(before, kept) * hidden
    # Those of a layer are put together in memory of their own.
    solved = (2 * experts + attention) if streamed else (layers + 1) * experts + before.layers * attention
    waiting = _parts(config)[0] * stored.itemsize if streamed else tokens * hidden * dtype.itemsize
    parts = {
        "weights": weights, "sums": kept.num_experts * _fit(width, hidden) + _fit(_heads(before, kept), hidden),
        "working set": max(forward.peak + adding, solving),
    }  # fmt: skip
    return Memory(use="reconstruction", parts=parts, peak="layer", host=waiting + solved * stored.itemsize)


def _heads(before: Shape, kept: Shape) -> int:
    """X of the attention; 0 where it loses nothing."""
    return kept.query_heads * kept.head_width if kept.query_heads < before.query_heads else 0


def _fit(inputs: int, outputs: int) -> int:
    """Bytes of the sums of one projection."""
    return inputs * (inputs + outputs) * 8


def _streamed(use: str, moments: dict[str, dict[str, int]], host: int) -> Memory:
    """The largest of some moments."""
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(use=use, parts=moments[peak], peak=peak, host=host)


def _parts(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Parameters of the largest decoder layer, of all the others with the rest, and of the output head."""
    model: Any = meta_model(config)
    count = {id(module): sum(weight.numel() for weight in module.parameters()) for module in model.modules()}
    layers = [count[id(layer)] for layer in model.get_submodule(family_of(config).layers)]
    return max(layers), count[id(model)] - max(layers), count[id(model.get_output_embeddings())]


def _sums(config: PreTrainedConfig, gradients: bool = True) -> int:
    """Bytes of a layer's statistics while they are taken."""
    shape = shape_of(config)
    sums = [name for name in ExpertStats.NEURON_SUMS if gradients or name not in ExpertStats.GRADIENT_SUMS]
    return shape.num_experts * (shape.expert_width * len(sums) + 4 + shape.num_experts) * 8


def _taps(config: PreTrainedConfig, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of a layer's neuron activations and head outputs, which frozen weights alone would not ask for."""
    shape = shape_of(config)
    pairs = batch * length * shape.top_k
    return (pairs * shape.expert_width + batch * length * shape.query_heads * shape.head_width) * dtype.itemsize


def _recording(config: PreTrainedConfig, batch: int, length: int) -> int:
    """Bytes while a tap records: activation and gradient, and of a block their product and one of its squares, in float32."""
    shape = shape_of(config)
    activations = batch * length * shape.top_k * shape.expert_width
    return 2 * (activations + min(activations, BLOCK)) * 4


def _listening(config: PreTrainedConfig, batch: int, length: int) -> int:
    """Bytes while a tap sums activations as they pass: of a block they are copied, weighted and squared, in float32."""
    shape = shape_of(config)
    return 3 * min(batch * length * shape.top_k * shape.expert_width, BLOCK) * 4


def _score(model: Any, ids: Tensor, _other: Any) -> None:
    """What `collect_stats` does with a batch, without the taps."""
    model.eval().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    logits_NV = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    forward_kl(logits_NV, logits_NV.detach(), top_k=KD_TOP_K, add_tail=False).sum().backward()


def _pass(model: Any, ids: Tensor, _other: Any) -> None:
    """A forward pass for what comes out of the last layer."""
    with torch.no_grad():
        model.eval()(input_ids=ids, use_cache=False, logits_to_keep=1)
