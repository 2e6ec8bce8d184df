"""`ExpertStats`: what one calibration sweep leaves behind. One file serves every criterion and every plan.

Shape letters: L layers with experts, E experts, F expert width, A layers (zeros where one has no attention), H query heads,
G key/value groups.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimmoe_hf.atomic import replacing

VERSION = 1
_HEADER = "slimmoe_stats"


class StatsMeta(BaseModel):
    """Where statistics come from.

    Attributes:
        family: The model type.
        config: The scored model's whole config, so that a plan needs no model.
        layers: Absolute indices of the L layers with experts.
        loss: What was differentiated; `none` where nothing was.
        tokens: Calibration tokens, padding excluded. sequences: How many sequences they came in.
        data_sha256: Hash of the token ids. model_sha256: Hash of the scored weights.
        fingerprint: Of a sample of them, which can be had of a checkpoint on disk without reading it whole.
        teacher_sha256: Hash of the teacher's weights; None where the model was its own teacher.
        version: Of this format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    config: dict[str, Any]
    layers: list[int]
    loss: str
    tokens: int
    sequences: int
    data_sha256: str
    model_sha256: str
    fingerprint: str | None = None
    teacher_sha256: str | None = None
    version: int = VERSION


@dataclass(frozen=True)
class ExpertStats:
    """Sums over the calibration data, float64, and the norms of the weights.

    With `a` a neuron's activation, `g = dL/da`, `w` the gate weight of its token:

    Attributes:
        tokens_LE: Routed tokens.
        probability_LE: Sum over all tokens of the router's probability of an expert (the softmax of its logits).
        gated_norm_LE: Sum over routed tokens of w times the norm of the expert's output. These two are None in files
            from before experts were scored.
        output_max_LE: Largest absolute value of an expert's output over routed tokens, before the gate weight; None in files
            from before super experts were looked for.
        router_gram_LEE: Sum over all tokens of the products of two experts' router logits; None in those files too.
        output_sum_LED: Sum over all tokens of each expert's output, routed or not; where it was asked for.
        taylor_LEF: Sum over sequences of |sum over tokens of a g|, nats. fisher_LEF: The same, squared. This and all others
            of gradients (`GRADIENT_SUMS`) are None where the sweep differentiated nothing.
        act_sq_LEF: Sum over routed tokens of a^2. gated_act_sq_LEF: Of (w a)^2. grad_sq_LEF: Of g^2.
        input_norm_LEF: Norm of a neuron's gate and up rows. down_norm_LEF: Norm of its `W_down` column.
        head_taylor_AH, head_fisher_AH: As for neurons, the mask on a head's output before `o_proj`.
        head_act_sq_AH, head_grad_sq_AH: Sums over tokens of the squared head output, and of its squared gradient.
        head_out_norm_AH: Norm of a head's columns of `o_proj`.
        group_norm_AG: Norm of all q, k, v and o weights of a group.
    """

    NEURON_SUMS: ClassVar = ("taylor_LEF", "fisher_LEF", "act_sq_LEF", "gated_act_sq_LEF", "grad_sq_LEF")
    EXPERT_SUMS: ClassVar = ("probability_LE", "gated_norm_LE")
    MAXIMA: ClassVar = ("output_max_LE",)
    HEAD_SUMS: ClassVar = ("head_taylor_AH", "head_fisher_AH", "head_act_sq_AH", "head_grad_sq_AH")
    GRADIENT_SUMS: ClassVar = (
        "taylor_LEF", "fisher_LEF", "grad_sq_LEF", "head_taylor_AH", "head_fisher_AH", "head_grad_sq_AH",
    )  # fmt: skip

    meta: StatsMeta
    tokens_LE: Tensor
    act_sq_LEF: Tensor
    gated_act_sq_LEF: Tensor
    input_norm_LEF: Tensor
    down_norm_LEF: Tensor
    head_act_sq_AH: Tensor
    head_out_norm_AH: Tensor
    group_norm_AG: Tensor
    taylor_LEF: Tensor | None = None
    fisher_LEF: Tensor | None = None
    grad_sq_LEF: Tensor | None = None
    head_taylor_AH: Tensor | None = None
    head_fisher_AH: Tensor | None = None
    head_grad_sq_AH: Tensor | None = None
    probability_LE: Tensor | None = None
    gated_norm_LE: Tensor | None = None
    output_max_LE: Tensor | None = None
    router_gram_LEE: Tensor | None = None
    output_sum_LED: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"statistics {name} are not finite: the model's weights or gradients overflow.")
            object.__setattr__(self, name, tensor.detach().cpu())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, those that an old file lacks, or a sweep without gradients, left out."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "meta"}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def attending(self) -> list[int]:
        """Absolute indices of the layers with attention: the weights of the others have no norms."""
        return torch.nonzero(self.group_norm_AG.sum(-1)).flatten().tolist()

    @property
    def sha256(self) -> str:
        """Hash of everything these statistics say."""
        digest = hashlib.sha256(self.meta.model_dump_json().encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write one `.safetensors` file: beside its place first, then renamed."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        with replacing(Path(path), overwrite=True) as beside:
            save_file(tensors, beside, metadata={_HEADER: self.meta.model_dump_json()})

    @classmethod
    def load(cls, path: str | Path) -> ExpertStats:
        """Read a file written by `save`.

        Raises:
            ValueError: No such file, not statistics, or cut short.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"{path}: no such statistics file. Make one with: slimmoe score MODEL --data DATA --output {path}"
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get(_HEADER)
                if header is None:
                    raise ValueError(f"{path}: not a statistics file of slimmoe_hf (no {_HEADER} header).")
                meta = StatsMeta.model_validate_json(header)
                return cls(meta=meta, **{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or cut short ({error}). Score again.") from error
        except (ValidationError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: statistics of another version of slimmoe_hf. Score again.") from error
