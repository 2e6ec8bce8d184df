"""Terms of the loss on what is inside the models: what routers say, and what layers make of a token.

PhiMoE's router hears nothing from tokens that it is sure of: its gradient comes from sampling between experts that are
close. A term on its logits reaches it from every token.

Shape letters: B rows, T tokens per row, N predictions that count, E experts, D model width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from slimmoe_hf.families import DECODERS, family_of, moe_layers, shape_of


@dataclass(frozen=True)
class Seen:
    """What a model's routers and layers gave in one forward pass.

    Attributes:
        router_logits: One `[B * T, E]`, later `[N, E]`, per layer with experts.
        hidden_states: One `[B, T, D]`, later `[N, D]`, per layer.
    """

    router_logits: list[Tensor]
    hidden_states: list[Tensor]

    def at(self, counts_BT: Tensor) -> Seen:
        """Of the predictions that count only; `counts_BT` as `at_predictions` takes it."""

        def pick(tensor: Tensor) -> Tensor:
            return at_predictions(tensor.reshape(len(counts_BT), -1, tensor.shape[-1]), counts_BT)

        return Seen([pick(one) for one in self.router_logits], [pick(one) for one in self.hidden_states])


@dataclass(frozen=True)
class Terms:
    """Which terms a loss has, and how they are weighted; one of weight 0 costs nothing.

    Attributes:
        router_weight: Of `router_kl`.
        hidden_weight: Of `hidden_mse`.
    """

    router_weight: float = 0.0
    hidden_weight: float = 0.0

    def __bool__(self) -> bool:
        return self.router_weight > 0 or self.hidden_weight > 0

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[Seen]:
        """Collect what the terms need from every forward pass within the block.

        The tensors carry their graph, under non-reentrant gradient checkpointing too: hooks only keep them, so that
        computing a layer again does the same operations.
        """
        seen, modules = Seen([], []), dict(model.named_modules())
        with ExitStack() as stack:
            if self.router_weight > 0:
                for _, _, router in moe_layers(model):
                    stack.callback(router.register_forward_hook(_keep(seen.router_logits)).remove)
            if self.hidden_weight > 0:
                path = family_of(model.config).layers
                for number in range(model.config.num_hidden_layers):
                    stack.callback(modules[f"{path}.{number}"].register_forward_hook(_keep(seen.hidden_states)).remove)
            yield seen

    def values(self, student: Seen, teacher: Seen) -> Iterator[tuple[str, float, Tensor]]:
        """Name, weight and value `[N]` of every term.

        Args:
            student: With its graph.
            teacher: Without.
        """
        if self.router_weight > 0:
            yield "router_kl", self.router_weight, router_kl(student.router_logits, teacher.router_logits)
        if self.hidden_weight > 0:
            yield "hidden_mse", self.hidden_weight, hidden_mse(student.hidden_states, teacher.hidden_states)

    def check(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
        """Whether two models can be compared so.

        Raises:
            ValueError: They cannot; the line says by which numbers.
        """
        for name, weight in (
            ("router_logits_weight", self.router_weight),
            ("hidden_states_weight", self.hidden_weight),
        ):
            if weight <= 0:
                continue
            for config in (student, teacher):
                if config.model_type not in DECODERS:
                    raise ValueError(
                        f"{name}={weight} needs to know where the layers of a {config.model_type} are; it works with "
                        f"{', '.join(DECODERS)}. Set it to 0."
                    )
            ours, theirs = (_comparable(name, config) for config in (student, teacher))
            if ours != theirs:
                differing = [f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]
                raise ValueError(
                    f"{name}={weight} compares layer by layer, and student and teacher differ in {', '.join(differing)}. "
                    "Set it to 0."
                )


def at_predictions(values: Tensor, counts_BT: Tensor) -> Tensor:
    """`[N, ...]` of `[B, T, ...]`: the values at the positions whose prediction counts.

    Args:
        values: One per position.
        counts_BT: Which predictions count: `[B, T]`, or `[B, T - 1]` where the last position predicts nothing.
    """
    return values[:, : counts_BT.shape[1]][counts_BT.to(values.device)]


def router_kl(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """KL(teacher || student) of the distributions over experts that router logits are, in nats, mean over layers.

    Args:
        student: One `[N, E]` per layer with experts.
        teacher: Likewise; constants.

    Returns:
        `[N]`, float32.
    """
    assert len(student) == len(teacher) > 0, (len(student), len(teacher))
    total_N = torch.zeros(len(student[0]), device=student[0].device)
    for ours_NE, theirs_NE in zip(student, teacher, strict=True):
        log_p_NE = theirs_NE.detach().to(ours_NE.device).float().log_softmax(-1)
        gap_NE = log_p_NE.exp() * (log_p_NE - ours_NE.float().log_softmax(-1))
        total_N = total_N + gap_NE.sum(-1).to(total_N.device)
    return total_N / len(student)


def hidden_mse(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean squared error of layer outputs as a share of the teacher's mean square, token by token, mean over layers.

    Args:
        student: One `[N, D]` per layer.
        teacher: Likewise; constants.

    Returns:
        `[N]`, float32: 1 is as far off as zeros would be.
    """
    assert len(student) == len(teacher) > 0, (len(student), len(teacher))
    total_N = torch.zeros(len(student[0]), device=student[0].device)
    for ours_ND, theirs_ND in zip(student, teacher, strict=True):
        target_ND = theirs_ND.detach().to(ours_ND.device).float()
        size_N = target_ND.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
        total_N = total_N + ((ours_ND.float() - target_ND).square().mean(-1) / size_N).to(total_N.device)
    return total_N / len(student)


def _keep(into: list[Tensor]) -> Any:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        into.append(output[0] if isinstance(output, tuple) else output)

    return hook


def _comparable(name: str, config: PreTrainedConfig) -> dict[str, int]:
    shape = shape_of(config)
    own = {"num_experts": shape.num_experts} if name == "router_logits_weight" else {"hidden_size": shape.hidden_size}
    return {"num_hidden_layers": shape.layers, **own}
