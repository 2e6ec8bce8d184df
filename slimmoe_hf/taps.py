"""Taps inside a running model: they see every expert's activations and every head's output, with their gradients.

Shape letters: E experts, F expert width, D model width, N tokens, K experts per token, S routed token-expert pairs,
Q sequences in a batch, A layers with attention, H query heads, C head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from slimmoe_hf.families import ExpertLayout, LayerView, Shape, expert_size, family_of, shape_of
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.sweeps import Sweep, Tokens

_IMPLEMENTATION = "slimmoe_scoring"
BLOCK = 1 << 22
"""Activations that are multiplied at a time: more would be held several times over, for every token of a batch."""


def accumulator(device: torch.device, *shape: int) -> Tensor:
    """Zeros to sum into, in float64 where the device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(shape, dtype=dtype, device=device)


def _taken(names: Sequence[str], sweep: Tokens) -> list[str]:
    """Of some sums those that a sweep takes."""
    return [name for name in names if sweep.gradients or name not in ExpertStats.GRADIENT_SUMS]


def _sum_rows(values: Tensor, lengths: Tensor, how: str = "sum") -> Tensor:
    """Sum consecutive runs of rows: `[S, F]`, run lengths `[B]` -> `[B, F]`; deterministic on every device."""
    return torch.segment_reduce(values, how, lengths=lengths, axis=0, unsafe=True, initial=0)


class ExpertSums:
    """Running sums of one layer's experts."""

    def __init__(self, shape: Shape, layout: ExpertLayout, device: torch.device, sweep: Tokens) -> None:
        width, number = shape.expert_width, shape.num_experts
        self.sweep, self.layout = sweep, layout
        self.number = number
        self.tokens = accumulator(device, number)
        self.neuron = {name: accumulator(device, number, width) for name in _taken(ExpertStats.NEURON_SUMS, sweep)}
        self.expert = {name: accumulator(device, number) for name in ExpertStats.EXPERT_SUMS}
        self.largest = accumulator(device, number)
        self.gram = accumulator(device, number, number)
        self.outputs: Tensor | None = None

    @torch.no_grad()
    def record_outputs(self, out_SD: Tensor, token_S: Tensor, expert_S: Tensor, gate_S: Tensor) -> None:
        """Add one forward pass's expert outputs, not yet weighted; pairs are sorted by expert."""
        if not self.sweep.listening:
            return
        valid_S, routed_E = self.sweep.valid_N[token_S], torch.bincount(expert_S, minlength=self.number)
        norm_S = out_SD.float().norm(dim=-1) * gate_S.float() * valid_S
        self.expert["gated_norm_LE"] += _sum_rows(norm_S, routed_E)
        most_S = torch.linalg.vector_norm(out_SD, torch.inf, dim=-1).float() * valid_S
        self.largest = torch.maximum(self.largest, _sum_rows(most_S, routed_E, "max"))

    @torch.no_grad()
    def record_router(self, logits_NE: Tensor) -> None:
        """Add what the layer's router said in one forward pass."""
        if not self.sweep.listening:
            return
        logits_NE = logits_NE[self.sweep.valid_N].float()
        self.expert["probability_LE"] += logits_NE.softmax(-1).sum(0)
        self.gram += logits_NE.T @ logits_NE

    @torch.no_grad()
    def record_all_outputs(
        self, act: Callable[[int, Tensor], Tensor], down: Sequence[Tensor], bias_ED: Tensor | None, hidden_ND: Tensor
    ) -> None:
        """Add what every expert makes of every token, where that is wanted.

        Args:
            act: The activations `[N, F]` of an expert, by its number and its inputs.
            down: The output projection of every expert, `[D, F]`. bias_ED: Its bias, if any.
            hidden_ND: The inputs.
        """
        if self.outputs is not None and self.sweep.listening:
            hidden_ND = hidden_ND[self.sweep.valid_N]
            for expert, out in enumerate(down):
                self.outputs[expert] += act(expert, hidden_ND).float().sum(0) @ out.float().T
            if bias_ED is not None:
                self.outputs += len(hidden_ND) * bias_ED.float()

    @torch.no_grad()
    def record(self, act_SF: Tensor, grad_SF: Tensor | None, token_S: Tensor, expert_S: Tensor, gate_S: Tensor) -> None:
        """Add one backward pass, or a forward pass that none follows; pairs are sorted by expert, then by token."""
        sweep = self.sweep
        kept_S = sweep.valid_N[token_S]
        whole = bool(kept_S.all())
        gate_S1 = gate_S[kept_S].float().unsqueeze(-1)
        token_S, expert_S = token_S[kept_S], expert_S[kept_S]
        routed_E = torch.bincount(expert_S, minlength=self.number)
        bucket_S = expert_S * sweep.sequences + sweep.sequence_N[token_S]
        lengths = torch.bincount(bucket_S, minlength=self.number * sweep.sequences)
        step = max(BLOCK // max(len(act_SF), 1), 1)
        for first in range(0, act_SF.shape[-1], step):
            block = slice(first, first + step)
            act, grad = (
                None if x is None else (x[:, block] if whole else x[kept_S, block]).float() for x in (act_SF, grad_SF)
            )
            assert act is not None
            self._record_neurons(act, grad, gate_S1, routed_E, lengths, block)
        self.tokens += routed_E

    def _record_neurons(
        self, act: Tensor, grad: Tensor | None, gate_S1: Tensor, routed_E: Tensor, lengths: Tensor, block: slice
    ) -> None:
        """Add some neurons' part; `lengths` are those of every expert's sequences."""
        sums = {
            "act_sq_LEF": _sum_rows(act.square(), routed_E),
            "gated_act_sq_LEF": _sum_rows((act * gate_S1).square_(), routed_E),
        }
        if grad is not None:
            per_sequence = _sum_rows(act * grad, lengths).view(self.number, self.sweep.sequences, -1)
            sums["taylor_LEF"] = per_sequence.abs().sum(1, dtype=torch.float64)
            sums["fisher_LEF"] = per_sequence.square().sum(1, dtype=torch.float64)
            sums["grad_sq_LEF"] = _sum_rows(grad.square(), routed_E)
        for name, value in sums.items():
            self.neuron[name][:, block] += value


class HeadSums:
    """Running sums of one layer's query heads, seen at the input of `o_proj`."""

    def __init__(self, heads: int, device: torch.device, sweep: Tokens) -> None:
        self.sweep = sweep
        self.heads = heads
        self.head = {name: accumulator(device, heads) for name in _taken(ExpertStats.HEAD_SUMS, sweep)}

    @torch.no_grad()
    def record(self, value: Tensor, grad: Tensor | None) -> None:
        """Add one backward pass, or a forward pass that none follows; both tensors are `[rows, T, H * C]`."""
        shape = (-1, self.heads, value.shape[-1] // self.heads)
        valid = self.sweep.valid_N[:, None, None]
        value = value.reshape(shape).float() * valid
        self.head["head_act_sq_AH"] += value.square().sum((0, 2))
        if grad is None:
            return
        grad = grad.reshape(shape).float() * valid
        lengths = torch.bincount(self.sweep.sequence_N, minlength=self.sweep.sequences)
        per_sequence = _sum_rows((value * grad).sum(-1), lengths)
        self.head["head_taylor_AH"] += per_sequence.abs().sum(0)
        self.head["head_fisher_AH"] += per_sequence.square().sum(0)
        self.head["head_grad_sq_AH"] += grad.square().sum((0, 2))


class _ExpertTap(torch.autograd.Function):
    """The identity; on the way back it hands activation and gradient to the sums of its layer."""

    @staticmethod
    def forward(
        ctx: Any, act_SF: Tensor, sums: ExpertSums, token_S: Tensor, expert_S: Tensor, gate_S: Tensor
    ) -> Tensor:
        ctx.save_for_backward(act_SF, token_S, expert_S, gate_S.detach())
        ctx.sums = sums
        return act_SF.view_as(act_SF)

    @staticmethod
    def backward(ctx: Any, grad_SF: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        act_SF, token_S, expert_S, gate_S = ctx.saved_tensors
        ctx.sums.record(act_SF, grad_SF, token_S, expert_S, gate_S)
        return grad_SF, None, None, None, None


class _HeadTap(torch.autograd.Function):
    """The identity; on the way back it hands the heads' outputs and gradients to the sums of their layer."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, sums: HeadSums) -> Tensor:
        ctx.save_for_backward(value)
        ctx.sums = sums
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.sums.record(ctx.saved_tensors[0], grad)
        return grad, None


def _tap_experts(act_SF: Tensor, sums: ExpertSums, token_S: Tensor, expert_S: Tensor, gate_S: Tensor) -> Tensor:
    """The activations as they are; they are summed here, or on the way back."""
    if sums.sweep.gradients:
        tapped: Tensor = _ExpertTap.apply(act_SF, sums, token_S, expert_S, gate_S)
        return tapped
    if sums.sweep.listening:
        sums.record(act_SF, None, token_S, expert_S, gate_S)
    return act_SF


def _tap_heads(value: Tensor, sums: HeadSums) -> Tensor:
    """The heads' outputs as they are; they are summed here, or on the way back."""
    if sums.sweep.gradients:
        tapped: Tensor = _HeadTap.apply(value, sums)
        return tapped
    if sums.sweep.listening:
        sums.record(value, None)
    return value


_SUMS: WeakKeyDictionary[nn.Module, ExpertSums] = WeakKeyDictionary()


def _scoring_experts(experts: Any, hidden_ND: Tensor, index_NK: Tensor, gate_NK: Tensor) -> Tensor:
    """The experts' forward with a tap on the activations, in the form transformers' experts interface asks for."""
    tokens, k = index_NK.shape
    expert_S, order_S = torch.sort(index_NK.flatten(), stable=True)
    token_S, gate_S = order_S // k, gate_NK.flatten()[order_S]
    ends_E = torch.bincount(expert_S, minlength=experts.num_experts).cumsum(0).to(torch.int32)
    sums = _SUMS[experts]
    layout = sums.layout
    into, down = (
        getattr(experts, name) for name in (layout.gate_up, layout.down)
    )  # an adapter may stand in their place
    if not layout.transposed:  # grouped products take [E, D, 2F] and [E, F, D]
        into, down = into.transpose(-2, -1), down.transpose(-2, -1)
    into_bias, down_bias = (
        getattr(experts, name) if name else None for name in (layout.gate_up_bias, layout.down_bias)
    )
    gate = experts._apply_gate if layout.gated else experts.act_fn
    inputs = F.grouped_mm(hidden_ND[token_S], into, offs=ends_E)
    inputs = inputs if into_bias is None else inputs + into_bias[expert_S]
    act_SF = _tap_experts(gate(inputs), sums, token_S, expert_S, gate_S)
    out_SD = F.grouped_mm(act_SF, down, offs=ends_E)
    out_SD = out_SD if down_bias is None else out_SD + down_bias[expert_S]
    sums.record_outputs(out_SD, token_S, expert_S, gate_S)

    def act(expert: int, all_ND: Tensor) -> Tensor:
        each = all_ND @ into[expert]
        result: Tensor = gate(each if into_bias is None else each + into_bias[expert])
        return result

    sums.record_all_outputs(act, down.transpose(-2, -1), down_bias, hidden_ND)
    out_SD = out_SD * gate_S.unsqueeze(-1)
    unsorted = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    return out_SD[unsorted].view(tokens, k, -1).sum(1).to(hidden_ND.dtype)


ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _scoring_experts)


def _scoring_units(layout: ExpertLayout, experts: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The forward of a list of plain units with a tap on the activations, in the form in which Switch calls it."""
    units, sums = layout.units(experts), _SUMS[experts]
    into, out = ([getattr(unit, name) for unit in units] for name in (layout.gate_up, layout.down))

    def forward(hidden_ND: Tensor, chosen_N1E: Tensor, gate_N1: Tensor) -> Tensor:
        expert_S, token_S = chosen_N1E.squeeze(1).T.nonzero(as_tuple=True)  # tokens beyond the capacity chose none
        gate_S, sizes = gate_N1.squeeze(-1)[token_S], torch.bincount(expert_S, minlength=len(units)).tolist()
        inputs = hidden_ND[token_S].split(sizes)
        acts = [unit.act(linear(x)) for unit, linear, x in zip(units, into, inputs, strict=True)]
        act_SF = _tap_experts(torch.cat(acts), sums, token_S, expert_S, gate_S)
        parts = zip(out, act_SF.split(sizes), strict=True)
        out_SD = torch.cat([linear(act.to(linear.weight.dtype)) for linear, act in parts])
        sums.record_outputs(out_SD, token_S, expert_S, gate_S)
        sums.record_all_outputs(
            lambda expert, all_ND: units[expert].act(into[expert](all_ND)), [linear.weight for linear in out], None,
            hidden_ND,
        )  # fmt: skip
        weighted_SD = (out_SD * gate_S.unsqueeze(-1)).to(hidden_ND.dtype)
        return torch.zeros_like(hidden_ND).index_add(0, token_S, weighted_SD)

    return forward


class LayerSums:
    """Running sums of one layer."""

    def __init__(
        self,
        view: LayerView,
        config: PreTrainedConfig,
        device: torch.device,
        tokens: Tokens,
        expert_outputs: bool = False,
    ) -> None:
        shape = shape_of(config)
        self.heads = HeadSums(shape.query_heads, device, tokens)
        self.experts: ExpertSums | None = None
        if view.experts is not None:
            self.experts = ExpertSums(shape, family_of(config).layout, device, tokens)
            if expert_outputs:
                self.experts.outputs = accumulator(device, shape.num_experts, expert_size(config))

    def tensors(self) -> dict[str, Tensor]:
        """By their names in `ExpertStats`, without the layer axis."""
        if self.experts is None:
            return dict(self.heads.head)
        experts = self.experts
        found = {**self.heads.head, **experts.neuron, **experts.expert, "router_gram_LEE": experts.gram}
        found["output_max_LE"] = experts.largest
        if experts.outputs is not None:
            found["output_sum_LED"] = experts.outputs
        return {**found, "tokens_LE": experts.tokens}


@contextmanager
def tapped(
    model: PreTrainedModel, views: Sequence[LayerView], sweep: Sweep, expert_outputs: bool = False
) -> Iterator[list[LayerSums]]:
    """Run the experts of some layers through taps, listen to their routers, tap the input of each output projection."""
    family, found = family_of(model.config), []
    with ExitStack() as stack:
        for view in views:
            device = _device(view, model)
            sums = LayerSums(view, model.config, device, sweep.stacks[view.paths.stack], expert_outputs)
            if view.attention is not None:
                hook = view.attention.get_submodule(family.projections[-1]).register_forward_pre_hook(
                    lambda _module, args, heads=sums.heads: (_tap_heads(args[0], heads), *args[1:])
                )
                stack.callback(hook.remove)
            if view.experts is not None and sums.experts is not None:
                _SUMS[view.experts] = sums.experts
                stack.callback(_SUMS.pop, view.experts)
                if family.layout.unit is not None:
                    vars(view.experts)["forward"] = _scoring_units(family.layout, view.experts)
                    stack.callback(vars(view.experts).pop, "forward")
            if view.router is not None and sums.experts is not None:
                listen = view.router.register_forward_hook(
                    lambda _module, _args, output, layer=sums.experts: layer.record_router(_logits(output))
                )
                stack.callback(listen.remove)
            found.append(sums)
        if family.layout.unit is None:
            before = model.config._experts_implementation
            model.set_experts_implementation(_IMPLEMENTATION)
            stack.callback(model.set_experts_implementation, before)
        yield found


def _device(view: LayerView, model: PreTrainedModel) -> torch.device:
    """Where a layer's tapped weights are; of a layer without any, where others of the model are."""
    tapped = next((module for module in (view.attention, view.experts) if module is not None), model)
    return next(weight.device for weight in tapped.parameters() if tapped is not model or not weight.is_meta)


def _logits(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """`[N, E]` of what a router, or its classifier alone, has answered."""
    return (output if isinstance(output, Tensor) else output[0]).flatten(0, -2)
