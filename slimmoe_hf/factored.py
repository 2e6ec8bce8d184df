"""Experts as low rank plus structured sparse: `W = L R + S` (MC-SMoE, arXiv 2310.01334; LoSparse, arXiv 2306.11222).

The stock experts modules are replaced by modules of our own, whose parameters are L, R and S. A parametrization that
rebuilds W for the stock code was the other way; it would hold a dense copy of every expert through the backward pass,
rebuild it once per expert in transformers' eager loop, and save under names that stock classes take for missing. Here
`L (R x) + S x` is computed: gradients reach the three by ordinary autograd, gradient checkpointing runs the layer again
as ever, no dense weight exists, and where few rows of S are left only those are multiplied. Whatever
`config._experts_implementation` says, these experts compute so.

Shape letters: E experts, O output rows and I inputs of one matrix, r rank, P rows of S that are kept, D model width,
F expert width, N tokens, K experts per token, S routed token-expert pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimmoe_hf.families import ExpertLayout, family_of, moe_layers
from slimmoe_hf.shared_checkpoint import SharedModel
from slimmoe_hf.shared_experts import SharedExperts, point

PACKED = ("rows", "index")
"""What a saved S consists of: its rows that are not zero, and where they belong."""


class FactoredWeight(nn.Module):
    """`W = L R + S`, of one matrix or of one per expert, trainable in all three; every row of S may come and go.

    It stands where a linear layer stood (one matrix), or in `FactoredExperts` (one per expert).

    Attributes:
        left: L, `[O, r]` or `[E, O, r]`. right: R, `[r, I]` or `[E, r, I]`. sparse: S, `[O, I]` or `[E, O, I]`.
    """

    weight: None = None
    """Switch asks its linear layer's weight for a dtype to cast to; there is none, and inputs are cast here."""

    def __init__(self, left: Tensor, right: Tensor, sparse: Tensor) -> None:
        """Take the three as they are."""
        super().__init__()
        self.left, self.right, self.sparse = nn.Parameter(left), nn.Parameter(right), nn.Parameter(sparse)

    @classmethod
    def of(cls, weight: Tensor, rank: int) -> FactoredWeight:
        """Factor a matrix, or one per expert: singular values split as square roots, S the residual (paper).

        The sum is W again, to the rounding of its dtype.

        Args:
            weight: `[O, I]` or `[E, O, I]`.
            rank: r.
        """
        shape, dtype = weight.shape, weight.dtype
        left = torch.empty(*shape[:-1], rank, dtype=dtype, device=weight.device)
        right = torch.empty(*shape[:-2], rank, shape[-1], dtype=dtype, device=weight.device)
        sparse = torch.empty_like(weight.detach())
        matrices = [t.reshape(-1, *t.shape[-2:]) for t in (weight.detach(), left, right, sparse)]
        for whole, left_Or, right_rI, sparse_OI in zip(*matrices, strict=True):
            u, values, v = torch.linalg.svd(whole.float(), full_matrices=False)
            roots = values[:rank].sqrt()
            left_Or.copy_(u[:, :rank] * roots)
            right_rI.copy_(roots[:, None] * v[:rank])
            sparse_OI.copy_(whole.float() - left_Or.float() @ right_rI.float())
        return cls(left, right, sparse).requires_grad_(weight.requires_grad)

    def forward(self, x_SI: Tensor, ends_E: Tensor | None = None) -> Tensor:
        """`L (R x) + S x`. Returns `[S, O]`.

        Args:
            x_SI: Inputs; sorted by expert where there are several.
            ends_E: Where each expert's inputs end; None for one matrix.
        """
        return _low_rank(self, x_SI, ends_E) + _product(x_SI, self.sparse, ends_E)

    def row_scores(self) -> Tensor:
        """Importance of every row of S now: the mean of `|s ds|` along it (paper). Returns `[O]` or `[E, O]`, float32."""
        if self.sparse.grad is None:  # an expert of Switch that no token was sent to
            return torch.zeros(self.sparse.shape[:-1], device=self.sparse.device)
        return (self.sparse.detach().float() * self.sparse.grad.float()).abs().mean(-1)

    def dense(self) -> Tensor:
        """W, in the dtype of S."""
        return (self.left.float() @ self.right.float() + self.sparse.float()).to(self.sparse.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take S packed as well, as it lies on disk: a plain `Trainer` resumes so."""
        rows, index = (state_dict.pop(prefix + name, None) for name in PACKED)
        if rows is not None and index is not None:
            state_dict[prefix + "sparse"] = unpack(rows, index, self.sparse.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class PackedWeight(nn.Module):
    """`W = L R + S` with the kept rows of S alone: as small in memory as on disk. No other row can come back.

    Attributes:
        left, right: As in `FactoredWeight`.
        rows: `[P, I]`, by expert, then by row.
        index: `[P]`, int32, where they belong: `expert * O + row`.
    """

    weight: None = None
    index: Tensor

    def __init__(self, left: Tensor, right: Tensor, rows: Tensor, index: Tensor) -> None:
        """Take the four as they are."""
        super().__init__()
        self.left, self.right, self.rows = nn.Parameter(left), nn.Parameter(right), nn.Parameter(rows)
        self.register_buffer("index", index)

    def forward(self, x_SI: Tensor, ends_E: Tensor | None = None) -> Tensor:
        """As `FactoredWeight.forward`; of S only the kept rows are multiplied."""
        out_SO = _low_rank(self, x_SI, ends_E)
        width = self.left.shape[-2]
        if ends_E is None:
            return out_SO.index_add(-1, self.index, F.linear(x_SI.to(self.rows.dtype), self.rows).to(out_SO.dtype))
        kept_E = torch.bincount(self.index // width, minlength=len(ends_E)).tolist()
        parts, begin, row = [], 0, 0
        for kept, end in zip(kept_E, ends_E.tolist(), strict=True):
            part = out_SO[begin:end]
            if kept and end > begin:
                product = F.linear(x_SI[begin:end].to(self.rows.dtype), self.rows[row : row + kept])
                part = part.index_add(1, self.index[row : row + kept] % width, product.to(part.dtype))
            parts.append(part)
            begin, row = end, row + kept
        return torch.cat(parts)

    def dense(self) -> Tensor:
        """W, in the dtype of S."""
        shape = (*self.left.shape[:-1], self.right.shape[-1])
        low_rank = self.left.float() @ self.right.float()
        return (low_rank + unpack(self.rows, self.index, shape).float()).to(self.rows.dtype)


Weight = FactoredWeight | PackedWeight


def _product(x_SI: Tensor, weight: Tensor, ends_E: Tensor | None) -> Tensor:
    """Inputs times a matrix, or each expert's inputs times its own."""
    if ends_E is None:
        return F.linear(x_SI.to(weight.dtype), weight)
    return F.grouped_mm(x_SI.to(weight.dtype), weight.transpose(-2, -1), offs=ends_E)


def _low_rank(weight: Weight, x_SI: Tensor, ends_E: Tensor | None) -> Tensor:
    return _product(_product(x_SI, weight.right, ends_E), weight.left, ends_E)


def pack(sparse: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of S that are not all zero, and where they belong.

    Args:
        sparse: `[O, I]` or `[E, O, I]`.

    Returns:
        `rows`, `[P, I]`, and `index`, `[P]` int32 into the flattened rows.
    """
    flat = sparse.detach().reshape(-1, sparse.shape[-1])
    index = (flat != 0).any(-1).nonzero().squeeze(-1)
    return flat[index].contiguous(), index.to(torch.int32)


def unpack(rows: Tensor, index: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """S again, of `shape`, from what `pack` gave."""
    flat = rows.new_zeros(math.prod(shape[:-1]), shape[-1])
    return flat.index_copy(0, index.long(), rows).view(shape)


class FactoredExperts(nn.Module):
    """The fused experts of one decoder layer, factored; called as transformers calls the stock ones.

    Attributes:
        stock: The class it stands for.
        gate_up_proj: Of `[E, 2F, D]`, one factoring for gate and up together (our choice: it is one matrix in memory).
        down_proj: Of `[E, D, F]`.
        groups: The expert that each row of the router points to, where experts are shared; otherwise None.
    """

    groups: Tensor | None

    def __init__(
        self, stock: type[nn.Module], act_fn: Callable[[Tensor], Tensor], gate_up: Weight, down: Weight,
        groups: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take the factored matrices as they are."""
        super().__init__()
        self.stock, self.act_fn = stock, act_fn
        self.gate_up_proj, self.down_proj = gate_up, down
        self.register_buffer("groups", groups, persistent=False)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.gate_up_proj.left.shape[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Outputs of the chosen experts, weighted and summed per token.

        Args:
            hidden_states: `[N, D]`.
            top_k_index: The experts chosen, `[N, K]`. top_k_weights: Their weights, `[N, K]`.
        """
        tokens, k = top_k_index.shape
        if self.groups is not None:
            top_k_index = self.groups[top_k_index]
        expert_S, order_S = torch.sort(top_k_index.flatten(), stable=True)
        ends_E = torch.bincount(expert_S, minlength=self.num_experts).cumsum(0).to(torch.int32)
        gate_SF, up_SF = self.gate_up_proj(hidden_states[order_S // k], ends_E).chunk(2, dim=-1)
        out_SD = self.down_proj(self.act_fn(gate_SF) * up_SF, ends_E) * top_k_weights.flatten()[order_S, None]
        unsorted = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        return out_SD[unsorted].view(tokens, k, -1).sum(1).to(hidden_states.dtype)


def expert_modules(model: PreTrainedModel) -> dict[str, Any]:
    """Path -> experts module of every layer that has experts, in order."""
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(experts)]: experts for _, experts, _ in moe_layers(model)}


def factorable(model: PreTrainedModel) -> dict[str, Any]:
    """As `expert_modules`, without the first sparse encoder layer of Switch, which the paper leaves alone."""
    found = expert_modules(model)
    family = family_of(model.config)
    if family.encoder_decoder:
        first = next((name for name in found if name.startswith(f"{family.stacks[0].layers}.")), None)
        found = {name: module for name, module in found.items() if name != first}
    return found


def expert_matrices(model: PreTrainedModel, modules: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Path -> matrix of the experts: a parameter, or its factored form. Experts that are one and the same come once.

    Args:
        model: Fused family or Switch.
        modules: Of these experts modules only; all by default.
    """
    found: dict[str, Any] = {}
    for name, experts in (expert_modules(model) if modules is None else modules).items():
        layout = _layout(model.config)
        matrices = (layout.gate_up, layout.down)
        if layout.unit is None:
            found |= {f"{name}.{matrix}": getattr(experts, matrix) for matrix in matrices}
            continue
        for expert, module in experts.named_children():  # an expert that others point to is a child once
            for matrix in matrices:
                linear = getattr(module, matrix)
                found[f"{name}.{expert}.{matrix}"] = linear.weight if isinstance(linear, nn.Linear) else linear
    return found


def _layout(config: PreTrainedConfig) -> ExpertLayout:
    layout = family_of(config).layout
    if layout.unit is not None:
        return layout
    if not layout.plain:
        raise ValueError(
            f"the experts of a {config.model_type} cannot be factored: they are not down(act(gate) * up) as FactoredExperts "
            "computes it. Narrow, drop or merge them."
        )
    assert (layout.gate_up, layout.down) == ("gate_up_proj", "down_proj")
    return layout


def install(model: PreTrainedModel, weights: Mapping[str, Weight]) -> None:
    """Put factored matrices into a model, in place.

    Args:
        model: With stock experts there.
        weights: By path, as `expert_matrices` names them; both matrices of every expert.
    """
    for path, weight in weights.items():
        parent, _, name = path.rpartition(".")
        module: Any = model.get_submodule(parent)
        if _layout(model.config).unit is not None:
            setattr(module, name, weight)
        elif name == "gate_up_proj":
            shared = isinstance(module, SharedExperts)
            stock, groups = (module.stock, module.groups) if shared else (type(module), None)
            factored = FactoredExperts(stock, module.act_fn, weight, weights[f"{parent}.down_proj"], groups)
            model.set_submodule(parent, factored.train(module.training))


def factored_weights(model: nn.Module) -> dict[str, Weight]:
    """Path -> every factored matrix of a model; one that is shared comes once."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, (FactoredWeight, PackedWeight))
    }


def refuse_own_form(model: nn.Module) -> None:
    """Raise ValueError if a model's experts are factored or shared: what scores, cuts or merges looks for stock ones."""
    refuse_factored(model)
    if isinstance(model, SharedModel):
        raise ValueError(
            "the experts of this model are merged and shared, so they can be neither scored nor cut nor merged again. Slim "
            "first and merge then, or call slimmoe_hf.merged_forms.unshare(model)."
        )


def refuse_factored(model: nn.Module) -> None:
    """Raise ValueError if a model's experts are factored."""
    if factored_weights(model):
        raise ValueError(
            "the experts of this model are factored, so they can be neither scored nor cut nor merged. Slim or merge first and "
            "factor then, or call slimmoe_hf.factorization.densify(model)."
        )


def uninstall(model: PreTrainedModel) -> None:
    """Put stock experts with dense weights back, in place: the reverse of `install`."""
    fused = {name: module for name, module in model.named_modules() if isinstance(module, FactoredExperts)}
    for path, experts in fused.items():
        with torch.device("meta"):
            stock: Any = experts.stock(model.config)
        stock.gate_up_proj, stock.down_proj = _parameter(experts.gate_up_proj), _parameter(experts.down_proj)
        if experts.groups is not None:
            point(stock, experts.groups.tolist(), _layout(model.config))
        model.set_submodule(path, stock.train(experts.training))
    linears: dict[int, nn.Linear] = {}
    for path, weight in list(model.named_modules(remove_duplicate=False)):  # one that is shared stays so
        if isinstance(weight, (FactoredWeight, PackedWeight)):
            model.set_submodule(path, linears.setdefault(id(weight), _linear(weight)))


def _linear(weight: Weight) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.right.shape[-1], weight.left.shape[-2], bias=False)
    linear.weight = _parameter(weight)
    return linear.train(weight.training)


def _parameter(weight: Weight) -> nn.Parameter:
    return nn.Parameter(weight.dense().detach(), requires_grad=weight.left.requires_grad)
