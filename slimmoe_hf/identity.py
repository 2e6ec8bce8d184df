"""Which weights are these? Hashes that do not depend on dtype or layout: of a whole model, and of a cheap sample of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimmoe_hf.disk import Part, read_part
from slimmoe_hf.families import ExpertLayout, family_of, layer_views, shape_of
from slimmoe_hf.sharding import whole


@torch.no_grad()
def model_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's weights, the same in every dtype that holds them exactly, and in whatever order they are read."""
    return combined({name: tensor_sha256(tensor) for name, tensor in model.state_dict().items()})


@torch.no_grad()
def tensor_sha256(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of a weight's shape and of its values as float32, after rounding them to `dtype`."""
    digest = hashlib.sha256(f"{list(tensor.shape)}".encode())
    for part in tensor if tensor.dim() > 2 else [tensor]:
        values: Any = part.detach().to(dtype or part.dtype).float().cpu().contiguous().numpy()
        digest.update(values)
    return digest.hexdigest()


def model_fingerprint(model: PreTrainedModel) -> str:
    """Which weights a model has, from a sample of them: routers, and a row of every expert and every attention.

    Rounded to bfloat16, so that the dtype in which a model was loaded does not matter.

    Args:
        model: On real devices; of one that ZeRO-3 took apart a weight at a time is gathered, by all processes together.
    """
    family, width = family_of(model.config), shape_of(model.config).expert_width
    samples = {}
    for view in layer_views(model):
        prefix = view.paths.disk
        if view.attention is not None:
            query = family.projections[0]
            row = whole(view.attention.get_parameter(f"{query}.weight"))[:1]
            samples[family.rooted(f"{view.paths.attention}.{query}.weight")] = row
        if view.experts is None or view.router is None:
            continue
        samples[f"{prefix}.{family.disk.router}"] = whole(view.router.get_parameter(family.router_weight))
        for expert, (up, down) in enumerate(_pairs(family.layout, view.experts)):
            rows = up if family.disk.gate is None else up[width:]
            if family.disk.gate is not None:
                samples[f"{prefix}.{family.disk.gate.format(expert)}"] = up[:1]
            samples[f"{prefix}.{family.disk.up.format(expert)}"] = rows[:1]
            samples[f"{prefix}.{family.disk.down.format(expert)}"] = down[:1]
    return combined({name: sample_digest(sample) for name, sample in samples.items()})


def _pairs(layout: ExpertLayout, experts: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Input and output projection of every expert, gathered where they are in parts."""
    up, down = layout.weights(experts).values()
    if isinstance(up, Tensor) and isinstance(down, Tensor):
        up, down = whole(up), whole(down)
    return ((whole(into), whole(out)) for into, out in zip(up, down, strict=True))


def row_fingerprint(model: nn.Module) -> str:
    """Which weights any model has, from the first row of each; not to be compared with `model_fingerprint`.

    Args:
        model: On real devices.
    """
    return combined({name: sample_digest(weight[:1]) for name, weight in model.named_parameters() if weight.dim()})


def sampled(config: PreTrainedConfig) -> frozenset[str]:
    """Published names of the weights that `model_fingerprint` looks at; a dense layer lacks some of them."""
    family = family_of(config)
    experts = range(shape_of(config).num_experts)
    names = []
    for paths in family.paths(config):
        prefix = paths.disk
        names += [family.rooted(f"{paths.attention}.{query}.weight") for query in family.projections[:1]]
        names.append(f"{prefix}.{family.disk.router}")
        for kind in (family.disk.gate, family.disk.up, family.disk.down):
            names += [f"{prefix}.{kind.format(expert)}" for expert in experts] if kind is not None else []
    return frozenset(names)


def sample(config: PreTrainedConfig, folder: Path, part: Part) -> str:
    """The digest of one weight's sample, read from disk."""
    if part.name.endswith(family_of(config).disk.router):
        return sample_digest(read_part(folder, part))
    return sample_digest(read_part(folder, part, rows=None if part.scale else 1)[:1])


@torch.no_grad()
def sample_digest(values: Tensor) -> str:
    """Digest of some weights, rounded to bfloat16."""
    rounded = values.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16)
    return hashlib.sha256(f"{list(rounded.shape)}".encode() + rounded.numpy().tobytes()).hexdigest()[:16]


def combined(digests: Mapping[str, str]) -> str:
    """One fingerprint of the samples of all weights, by published name."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()
