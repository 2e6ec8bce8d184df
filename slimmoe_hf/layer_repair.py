"""What least squares makes of the output projections of one layer, from what passes the layer of the uncut model.

Shape letters: E' experts kept, F expert width, D model width, N tokens, K experts per token, S tokens of one expert, X kept
inputs of a projection (F' neurons, or H' * C of the attention).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimmoe_hf.blends import Blend
from slimmoe_hf.calibration import add_up
from slimmoe_hf.families import ExpertLayout, LayerView, expert_size, family_of
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.shards import all_finite
from slimmoe_hf.sweeps import Sweep
from slimmoe_hf.taps import accumulator


class Fit:
    """Least squares for one projection: running sums, and their solution."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.gram_XX, self.cross_DX = accumulator(device, inputs, inputs), accumulator(device, outputs, inputs)
        self.lost = accumulator(device)

    def add(self, kept_SX: Tensor, missing_SD: Tensor) -> None:
        """Add some tokens: the inputs that are kept, and what the output lacks without the others."""
        kept_SX, missing_SD = kept_SX.to(self.gram_XX.dtype), missing_SD.to(self.gram_XX.dtype)
        self.gram_XX += kept_SX.T @ kept_SX
        self.cross_DX += missing_SD.T @ kept_SX
        self.lost += missing_SD.square().sum()

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.gram_XX, self.cross_DX, self.lost

    def solve(self, ridge: float, where: str) -> tuple[Tensor, float]:
        """What to add to the kept columns, `[D, X]`, float64, and how much of `lost` it takes away.

        Raises:
            ValueError: The sums are not finite, or the ridge is too small for them.
        """
        exact = self.gram_XX.dtype == torch.float64
        gram_XX, cross_DX = (sums if exact else sums.cpu().double() for sums in (self.gram_XX, self.cross_DX))
        if not bool(gram_XX.isfinite().all() and cross_DX.isfinite().all()):
            raise ValueError(f"{where}: its activations are not finite. Load the model in float32, and check it.")
        mean_square = float(gram_XX.trace()) / len(gram_XX)
        if mean_square == 0:  # no token came here
            return torch.zeros_like(cross_DX), 0.0
        damped_XX = gram_XX + ridge * mean_square * torch.eye(len(gram_XX), dtype=torch.float64, device=gram_XX.device)
        factor_XX, failed = torch.linalg.cholesky_ex(damped_XX)
        if bool(failed):
            raise ValueError(f"{where}: ridge={ridge} is too small for its activations. Take a larger one.")
        added_DX = torch.cholesky_solve(cross_DX.T, factor_XX).T
        return added_DX, float(2 * (added_DX * cross_DX).sum() - (added_DX @ gram_XX * added_DX).sum())


class CutExperts(Protocol):
    """What a plan makes of the experts of one layer."""

    def split(self, expert: int, hidden_SD: Tensor) -> tuple[int, Tensor, Tensor] | None:
        """Of tokens that are sent to `expert`: where they go, the inputs kept there and what the output lacks; or nothing."""

    def plain(self, number: int) -> Tensor:
        """The output projection of a kept expert before it is repaired, `[D, F']`."""


class _Weights:
    """The experts of a layer, one at a time, however they are laid out."""

    def __init__(self, experts: Any, layout: ExpertLayout) -> None:
        self.experts, self.layout = experts, layout
        self.own: dict[str, Sequence[Tensor]] = {
            **dict(experts.named_parameters(recurse=False)),
            **layout.weights(experts),
        }
        if layout.unit is not None:
            self._act = layout.units(experts)[0].act
        else:
            self._act = experts._apply_gate if layout.gated else experts.act_fn
        first = self.own[layout.down][0]
        self.device, self.dtype, self.width = first.device, first.dtype, first.shape[layout.down_axis]

    def activations(self, of: Mapping[str, Sequence[Tensor]], expert: int, hidden_SD: Tensor) -> Tensor:
        """`[S, F]`, before the gate weights, with the weights in `of`."""
        into, bias = of[self.layout.gate_up][expert], self.layout.gate_up_bias
        found = hidden_SD @ (into if self.layout.transposed else into.T)
        act: Tensor = self._act(found if bias is None else found + of[bias][expert])
        return act.float()

    def down_DF(self, of: Mapping[str, Sequence[Tensor]], expert: int) -> Tensor:
        down = of[self.layout.down][expert]
        return (down.T if self.layout.transposed else down).float()

    def outputs(self, of: Mapping[str, Sequence[Tensor]], expert: int, act_SF: Tensor) -> Tensor:
        """`[S, D]`, of activations."""
        out_SD, bias = act_SF @ self.down_DF(of, expert).T, self.layout.down_bias
        return out_SD if bias is None else out_SD + of[bias][expert].float()


class _Narrowed:
    """Experts that lose neurons; some of them may go altogether."""

    def __init__(self, weights: _Weights, kept_EF: Tensor, stay: Sequence[int]) -> None:
        self.weights, self.kept_EF, self.stay = weights, kept_EF.to(weights.device), stay
        self.numbers = {expert: number for number, expert in enumerate(stay)}

    def split(self, expert: int, hidden_SD: Tensor) -> tuple[int, Tensor, Tensor] | None:
        if expert not in self.numbers:
            return None
        number, weights = self.numbers[expert], self.weights
        kept, dropped = _both(self.kept_EF[number], weights.width)
        act_SF = weights.activations(weights.own, expert, hidden_SD)
        return number, act_SF[:, kept], act_SF[:, dropped] @ weights.down_DF(weights.own, expert)[:, dropped].T

    def plain(self, number: int) -> Tensor:
        return self.weights.down_DF(self.weights.own, self.stay[number])[:, self.kept_EF[number]]


class _Merged:
    """Experts that are averages of some; each is to say what its members say to their own tokens."""

    def __init__(self, weights: _Weights, blend: Blend) -> None:
        self.weights, self.owners = weights, blend.owner.tolist()
        averaged = weights.layout.averaged(weights.experts, blend.order)
        self.merged = {name: list(blend.each(own, order_EF, axis)) for name, own, axis, order_EF in averaged}

    def split(self, expert: int, hidden_SD: Tensor) -> tuple[int, Tensor, Tensor] | None:
        number, weights = self.owners[expert], self.weights
        act_SF = weights.activations(self.merged, number, hidden_SD)
        own_SD = weights.outputs(weights.own, expert, weights.activations(weights.own, expert, hidden_SD))
        return number, act_SF, own_SD - weights.outputs(self.merged, number, act_SF)

    def plain(self, number: int) -> Tensor:
        return self.weights.down_DF(self.merged, number)


def _both(kept_X: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Indices that are kept, and those that are not."""
    stays = torch.zeros(size, dtype=torch.bool, device=kept_X.device)
    stays[kept_X] = True
    return kept_X, (~stays).nonzero().flatten()


class LayerRepair:
    """Listens to one layer of the uncut model, then solves what a plan leaves of it."""

    def __init__(self, model: PreTrainedModel, view: LayerView, plan: CompressionPlan, sweep: Sweep) -> None:
        """Make room for the sums.

        Args:
            model: Uncut; of this layer the weights must be there.
            view: The layer.
            plan: What is cut.
            sweep: Knows the batch in hand.
        """
        self.view, layer, family = view, view.index, family_of(model.config)
        self.tokens, self.layout = sweep.stacks[view.paths.stack], family.layout
        self.experts: CutExperts | None = None
        self.fits: list[Fit] = []
        self.attention: Fit | None = None
        if layer in plan.neurons or layer in plan.blends:
            weights = _Weights(view.experts, family.layout)
            self.dtype = weights.dtype
            stay = plan.experts.get(layer, torch.arange(plan.meta.before.num_experts)).tolist()
            self.experts = (
                _Merged(weights, plan.blends[layer])
                if layer in plan.blends
                else _Narrowed(weights, plan.neurons[layer], stay)
            )
            number = plan.blends[layer].number if layer in plan.blends else len(stay)
            sizes = plan.meta.after.expert_width, expert_size(model.config)
            self.fits = [Fit(*sizes, weights.device) for _ in range(number)]
        if layer in plan.groups and view.attention is not None:
            out: Any = view.attention.get_submodule(family.projections[-1])
            queries, _ = plan.attention_rows(layer)
            self.projection, device = out, out.weight.device
            self.queries, self.attention = queries.to(device), Fit(len(queries), plan.meta.before.hidden_size, device)

    @contextmanager
    def listening(self) -> Iterator[bool]:
        """Add up what passes the layer within the block; whether anything of it is to be solved."""
        with ExitStack() as stack:
            if self.experts is not None and self.view.experts is not None:
                stack.callback(self.view.experts.register_forward_pre_hook(self._hear_experts).remove)
            if self.attention is not None:
                stack.callback(self.projection.register_forward_pre_hook(self._hear_attention).remove)
            yield self.experts is not None or self.attention is not None

    @torch.no_grad()
    def _hear_experts(self, _module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden_ND, index_NK, gate_NK = args
        assert self.experts is not None
        if self.layout.unit is not None:  # units are told `[N, 1, E]`, of zeros where a token is beyond the capacity
            index_NK = torch.where(index_NK.any(-1), index_NK.argmax(-1), -1)
        index_NK = index_NK.masked_fill(~self.tokens.valid_N.unsqueeze(-1), -1)
        order_S = index_NK.flatten().argsort(stable=True)
        expert_S = index_NK.flatten()[order_S]
        token_S, gate_S = order_S // index_NK.shape[-1], gate_NK.flatten()[order_S].float()
        experts, counts = expert_S.unique_consecutive(return_counts=True)
        sizes = counts.tolist()
        for expert, tokens, gates in zip(experts.tolist(), token_S.split(sizes), gate_S.split(sizes), strict=True):
            found = self.experts.split(expert, hidden_ND[tokens]) if expert >= 0 else None
            if found is not None:
                number, kept_SX, missing_SD = found
                self.fits[number].add(kept_SX * gates.unsqueeze(-1), missing_SD * gates.unsqueeze(-1))

    @torch.no_grad()
    def _hear_attention(self, projection: Any, args: tuple[Tensor, ...]) -> None:
        assert self.attention is not None
        input_NX = args[0].flatten(0, -2)[self.tokens.valid_N].float()
        kept, dropped = _both(self.queries, input_NX.shape[-1])
        self.attention.add(input_NX[:, kept], input_NX[:, dropped] @ projection.weight[:, dropped].float().T)

    @torch.no_grad()
    def solve(self, ridge: float, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """The layer's part of a plan's repairs, and of its summary the shares that they take away of the error.

        In several processes all of them must call it.

        Args:
            ridge: Of the least squares.
            dtypes: What the float64 solution of each of `REPAIR_KINDS` is rounded to; the model's own where it is not named.

        Raises:
            ValueError: As `Fit.solve`; or a solution is not finite in that dtype.
        """
        add_up(sums for fit in [*self.fits, *filter(None, [self.attention])] for sums in fit.sums)
        where, found = f"layer {self.view.index}", dict[str, Tensor]()
        if self.experts is not None:
            weights, taken = [], 0.0
            for number, fit in enumerate(self.fits):
                added_DX, removed = fit.solve(ridge, f"{where}, expert {number} of those kept")
                dtype = dtypes.get("down_proj", self.dtype)
                weights.append(_rounded(self.experts.plain(number), added_DX, dtype, where))
                taken += removed
            found["down_proj"] = torch.stack(weights)
            found["experts_repaired"] = _share(taken, sum(float(fit.lost) for fit in self.fits))
        if self.attention is not None:
            added_DX, taken = self.attention.solve(ridge, f"{where}, attention")
            plain_DX = self.projection.weight[:, self.queries]
            found["o_proj"] = _rounded(plain_DX, added_DX, dtypes.get("o_proj", plain_DX.dtype), where)
            found["attention_repaired"] = _share(taken, float(self.attention.lost))
        return found


def _rounded(plain_DX: Tensor, added_DX: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    solved_DX = (plain_DX.cpu().double() + added_DX.cpu()).to(dtype)
    if not all_finite(solved_DX):
        raise ValueError(f"{where}: what is solved is not finite in {str(dtype).removeprefix('torch.')}. Use bfloat16.")
    return solved_DX


def _share(taken: float, lost: float) -> Tensor:
    return torch.tensor(taken / lost if lost > 0 else 0.0, dtype=torch.float64)
