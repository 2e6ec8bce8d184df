"""How large a model is and would be: parameters, bytes, GPUs it fits, stages to a wanted size. From its config alone.

Shape letters: E experts, K of them active for a token, F expert width, n stages.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedConfig

from slimmoe_hf.describe import alignment_note
from slimmoe_hf.evaluation import count_parameters
from slimmoe_hf.families import family_of, moe_layers, set_shape, shape_of
from slimmoe_hf.limits import possible_widths
from slimmoe_hf.loading import load_config
from slimmoe_hf.memory import meta_model
from slimmoe_hf.plan import Target, validate_target

STEP = 64
"""Suggested widths are multiples of this: what most kernels ask for."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GIB = 2**30
RESERVE_BYTES, RESERVE_SHARE = GIB, 0.05
"""What a GPU keeps back: its context, and memory lost between blocks. Assumed, not measured."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class Counts(BaseModel):
    """Parameters of a model; tied tensors count once.

    Attributes:
        total: All of them.
        active: Those a token meets: K of E experts, both embeddings, everything else whole.
        active_without_lookup: Without the input embedding, which multiplies nothing; tied to the head it stays.
        active_without_embeddings: Without input embedding and head.
    """

    model_config = ConfigDict(frozen=True)

    total: int
    active: int
    active_without_lookup: int
    active_without_embeddings: int

    def bytes(self, dtype: torch.dtype) -> int:
        """Size of the weights in a dtype."""
        return self.total * dtype.itemsize


class Stage(BaseModel):
    """One suggested stage.

    Attributes:
        target: What to cut to. total, active: Parameters after it. alignment: What its width opens.
    """

    model_config = ConfigDict(frozen=True)

    target: Target
    total: int
    active: int
    alignment: str


@dataclass(frozen=True)
class Gpu:
    """A GPU by its nominal memory, in GiB."""

    name: str
    gib: float

    @property
    def usable(self) -> int:
        """Bytes that a program may count on: the nominal size less the reserve."""
        return int(self.gib * GIB * (1 - RESERVE_SHARE) - RESERVE_BYTES)


def read_config(model: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a model; of a Hub id nothing else is downloaded.

    Args:
        model: A folder with a config.json, that file itself, or a Hub id.
        revision: A commit, tag or branch of the Hub id.

    Raises:
        ValueError: There is none, or it is not one that transformers knows.
    """
    path = Path(model).expanduser()
    remedy = "Give the folder of a checkpoint, its config.json, or a Hub id."
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{model}: no config.json there. {remedy}")
    if path.is_file() and path.name != "config.json":
        raise ValueError(f"{model}: not named config.json. {remedy}")
    if path.exists():
        return load_config(path if path.is_dir() else path.parent, shared=True)
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(".json"):
        raise ValueError(f"{model}: no such folder or file. {remedy}")
    try:
        return load_config(Path(hf_hub_download(model, "config.json", revision=revision)).parent, shared=True)
    except (OSError, HTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{model}: no such folder here, and the Hub gave no config.json: {reason}") from error


def check_known(config: PreTrainedConfig) -> None:
    """Raise ValueError unless the family is one of `FAMILIES`, and its config sound."""
    shape_of(config)


def parameter_counts(config: PreTrainedConfig) -> Counts:
    """Count a model's parameters exactly, without its weights.

    Raises:
        ValueError: As `check_known`.
    """
    check_known(config)
    model = meta_model(config)
    total, active = count_parameters(model)
    lookup, head = model.get_input_embeddings(), model.get_output_embeddings()
    read = {id(parameter): parameter.numel() for parameter in lookup.parameters()}
    multiplied = {id(parameter): parameter.numel() for parameter in head.parameters()} if head is not None else {}
    return Counts(
        total=total,
        active=active,
        active_without_lookup=active - sum(size for key, size in read.items() if key not in multiplied),
        active_without_embeddings=active - sum((read | multiplied).values()),
    )


def own_dtype(config: PreTrainedConfig) -> torch.dtype:
    """What a checkpoint of this config is stored in; float32 where the config does not say."""
    dtype = config.dtype or torch.float32
    return DTYPES.get(str(dtype).removeprefix("torch."), torch.float32)


def wider_dtype(config: PreTrainedConfig, other: str | None) -> torch.dtype:
    """What loses nothing of what a checkpoint of this config is stored in, nor of what is asked for.

    Args:
        config: The checkpoint's.
        other: What its weights are to be written in; None is its own.
    """
    own = own_dtype(config)
    return own if other is None else torch.promote_types(own, DTYPES[other])


def slimmed_config(config: PreTrainedConfig, target: Target) -> PreTrainedConfig:
    """A copy of a config after a cut.

    Raises:
        ValueError: As `validate_target`.
    """
    after, slimmed = validate_target(config, target), copy.deepcopy(config)
    set_shape(slimmed, after)
    return slimmed


def parse_gpu(text: str) -> Gpu:
    """A GPU from its memory as written, `80GB` or `80`: GiB, as its name means them.

    Raises:
        ValueError: Anything else, or nothing left after the reserve.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?", text.strip(), re.IGNORECASE)
    gpu = Gpu(text.strip(), float(found.group(1))) if found else None
    if gpu is None or gpu.usable <= 0:
        raise ValueError(f"--gpu {text}: not a GPU's memory. Write it as 24GB, 48GB or 80GB.")
    return gpu


def parse_size(text: str, name: str = "--target") -> tuple[Decimal, Decimal]:
    """A number of parameters as written (`7.6B`, `3.8e9`, `7600M`): its value, and one unit of its last digit.

    Args:
        text: As written.
        name: What to call it in errors.

    Raises:
        ValueError: Not a positive number.
    """
    found = re.fullmatch(r"([\d.]+(?:e\+?\d+)?)\s*([KMBT]?)", text.strip(), re.IGNORECASE)
    try:
        number = Decimal(found.group(1)) if found else Decimal(0)
    except InvalidOperation:
        number = Decimal(0)
    if found is None or number <= 0:
        raise ValueError(f"{name} {text}: not a number of parameters. Write it as 7.6B, 3.8e9 or 7600M.")
    unit, exponent = _UNITS[found.group(2).upper()], number.as_tuple().exponent
    assert isinstance(exponent, int)
    return number * unit, Decimal(10) ** exponent * unit


def suggest_stages(config: PreTrainedConfig, size: str, stages: int = 1, kv_groups: int | None = None) -> list[Stage]:
    """Widths that lead to a wanted size: the last one the widest that meets it, those before in geometric steps.

    The size is met at the precision it is written with: 7.648 billion parameters are 7.6B. Widths are multiples of 64;
    stage k of n has `F * (F' / F) ** (k / n)`, rounded, as SlimMoE's two (arXiv 2506.18349).

    Args:
        config: The model's.
        size: The number of parameters wanted.
        stages: n.
        kv_groups: Key/value groups after the last stage; None keeps them.

    Raises:
        ValueError: As `validate_target` and `parse_size`; a size outside what widths from 64 can reach; more stages
            than there are widths.
    """
    if stages < 1:
        raise ValueError(f"--stages {stages}: give 1 or more.")
    if family_of(config).no_width:
        raise ValueError(
            f"--target suggests widths for {config.model_type}: {family_of(config).no_width}. Leave it out."
        )
    value, unit = parse_size(size)
    shape, most = shape_of(config), value + unit / 2
    last = config if kv_groups is None else slimmed_config(config, Target(kv_groups=kv_groups))
    counts = parameter_counts(last)
    per_step = neuron_parameters(last) // shape.expert_width * STEP
    possible = [width for width in possible_widths(config, STEP) if width % STEP == 0]
    fixed = counts.total - neuron_parameters(last)
    least = possible[0] if possible else STEP
    largest, smallest = parameter_counts(config).total, fixed + per_step * (least // STEP)
    if value - unit / 2 > largest:
        raise ValueError(f"--target {size} is more than the model's {largest:,} parameters. Ask for fewer.")
    fitting = [width for width in possible if fixed + per_step * (width // STEP) < most]
    if not fitting:
        raise ValueError(
            f"--target {size} is less than the {smallest:,} parameters that width {least} leaves. Ask for more, or cut "
            "key/value groups too (--kv-groups)."
        )
    width = fitting[-1]
    wanted = [shape.expert_width * (width / shape.expert_width) ** (k / stages) for k in range(1, stages)]
    widths = [*(_nearest(possible, each) for each in wanted), width]
    if any(later >= earlier for earlier, later in zip([shape.expert_width, *widths], widths, strict=False)):
        if stages == 1 and width == shape.expert_width and kv_groups is not None:
            return [_stage(config, Target(kv_groups=kv_groups), width)]
        raise ValueError(
            f"--target {size} in {stages} stages: widths {widths} from {shape.expert_width} do not shrink at every "
            "stage. Ask for fewer stages, or a smaller target."
        )
    targets = [Target(expert_width=each) for each in widths[:-1]]
    targets.append(Target(expert_width=width, kv_groups=kv_groups))
    return [_stage(config, target, target.expert_width or width) for target in targets]


def _nearest(widths: Sequence[int], wanted: float) -> int:
    return min(widths, key=lambda width: abs(width - wanted))


def _stage(config: PreTrainedConfig, target: Target, width: int) -> Stage:
    counts = parameter_counts(slimmed_config(config, target))
    return Stage(target=target, total=counts.total, active=counts.active, alignment=alignment_note(width))


def expert_parameters(config: PreTrainedConfig) -> int:
    """Parameters of all experts."""
    return sum(
        parameter.numel() for _, module, _ in moe_layers(meta_model(config)) for parameter in module.parameters()
    )


def neuron_parameters(config: PreTrainedConfig) -> int:
    """Those of them that belong to a neuron, so that they grow with the width: all but the biases of outputs."""
    layout, layers = family_of(config).layout, moe_layers(meta_model(config))
    held = [each for _, module, _ in layers for each in module.named_parameters()]
    return sum(parameter.numel() for name, parameter in held if name != layout.down_bias)
