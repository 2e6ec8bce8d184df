"""What a piece of PyTorch code holds in memory, found by running it on tensors that have sizes and no values.

The code that runs is the real one: transformers' layers, peft's adapters, autograd. Every operation is seen by
`Tracer`, which adds up the storages that are alive. Nothing is allocated, so a model of any size is traced in a
fraction of a second. What kernels take for themselves inside one operation is not seen.

The tensors claim to be on a CPU, so attention takes the CPU's fused kernel, which keeps what the GPU's keeps:
queries, keys, values, output and one number per row.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_ATTENTION = "slimmoe_traced"
_ATEN = torch.ops.aten


class Tracer(TorchDispatchMode):
    """Counts the bytes that are alive; to be entered inside a `FakeTensorMode`.

    Attributes:
        live: Bytes of all storages made since the start that are still held.
        peak: Largest `live` since the last `mark`.
        marks: `(name, peak since the mark before, live then, gradients then)`, in order.
    """

    def __init__(self, known: Sequence[Tensor] = (), trained: Sequence[Tensor] = ()) -> None:
        """Start at nothing; storages of `known` tensors are not counted, gradients of `trained` ones also apart."""
        super().__init__()
        self.live = self.peak = 0
        self.marks: list[tuple[str, int, int, int]] = []
        self._trained = list(trained)
        self._sizes: dict[int, int] = {}
        for tensor in known:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def mark(self, name: str) -> None:
        """End a phase."""
        gradients = sum(tensor.grad.nbytes for tensor in self._trained if tensor.grad is not None)
        self.marks.append((name, self.peak, self.live, gradients))
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, then count its results."""
        stand_in = _STAND_INS.get(func)
        out = stand_in(func, args, kwargs or {}) if stand_in else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _grouped_mm(_func: Any, args: Any, kwargs: Any) -> Tensor:
    """Sizes as on real tensors; PyTorch's own shape rule refuses float32, which its CPU and CUDA kernels take."""
    first, second = args[:2]
    offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
    shape: tuple[int, ...]
    if first.dim() == 2 and second.dim() == 2:
        shape = (offsets.shape[0], first.shape[0], second.shape[1])
    elif first.dim() == 2:
        shape = (first.shape[0], second.shape[2])
    else:
        shape = (*first.shape[:-1], second.shape[-1])
    return first.new_empty(shape)


def _index(func: Any, args: Any, kwargs: Any) -> Tensor:
    """A boolean mask is taken to be true everywhere: how many entries it has is a value, and there are none here."""
    source, indices = args
    whole: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            whole += [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]
        else:
            whole.append(index)
    return func(source, whole, **kwargs)


_STAND_INS = {
    _ATEN._grouped_mm.default: _grouped_mm,
    _ATEN.index.Tensor: _index,
    _ATEN._local_scalar_dense.default: lambda _func, _args, _kwargs: 1,
}


def _full_rows_mask(
    batch_size: int, q_length: int, kv_length: int, local_size: int | None = None, **_: Any
) -> Tensor | None:
    """The mask of transformers' sdpa attention for rows without padding: none, unless a window is shorter than the row.

    Its own code reads values to find that out, and without values makes a whole mask.
    """
    if local_size is None or kv_length < local_size:
        return None
    return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, sdpa_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, _full_rows_mask)


def skeleton(model: PreTrainedModel, layers_path: str, layers: Sequence[nn.Module], dtype: torch.dtype) -> Any:
    """A copy of a meta-device model with only the given decoder layers, its weights in `dtype`."""
    whole = model.get_submodule(layers_path)
    short = nn.ModuleList(copy.deepcopy(list(layers)))
    copied: Any = copy.deepcopy(model, {id(whole): short})
    places = [list(whole.children()).index(layer) for layer in layers]
    # A model of several kinds of layers asks what each is by its number, and so does its cache. Where the config derives the
    # kinds (Jamba's), the numbers stay as well.
    reordered = [key for key in ("layer_types", "layers_block_type") if isinstance(vars(copied.config).get(key), list)]
    for key in reordered:
        kinds = vars(copied.config)[key]
        rest = [kind for place, kind in enumerate(kinds) if place not in places]
        vars(copied.config)[key] = [kinds[place] for place in places] + rest
    for number, layer in enumerate(short if reordered else ()):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = number
    copied.set_attn_implementation(_ATTENTION)
    return copied.to(dtype)


@contextmanager
def _marked(tracer: Tracer, layer: nn.Module) -> Iterator[list[int]]:
    """Mark `before` and `forward` around a layer; on the way back `head` before it and `layer` after it.

    Gives a list that will hold the bytes of the layer's output if that is not kept for a way back.
    """
    passing: list[int] = []

    def before(_module: nn.Module, args: Any) -> None:
        if tracer.marks:
            return  # gradient checkpointing runs the layer again on the way back
        tracer.mark("before")
        if args and args[0].requires_grad and args[0].grad_fn is not None:
            args[0].register_hook(lambda _grad: tracer.mark("layer"))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        if len(tracer.marks) > 1:
            return
        tracer.mark("forward")
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _grad: tracer.mark("head"))
        else:
            passing.append(hidden.nbytes)

    hooks = (layer.register_forward_pre_hook(before), layer.register_forward_hook(after))
    try:
        yield passing
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Phase:
    """One phase of a step.

    Attributes:
        peak: Bytes at its peak.
        activations: Bytes at its end that decoder layers hold for the way back (of a forward alone: their cache).
        gradients: Bytes of gradients at its end.
    """

    peak: int
    activations: int = 0
    gradients: int = 0


Run = Callable[[Any, Tensor, Any], None]
"""`(model, ids_BT, companion)`: one step; the companion is a second model (a teacher), or None."""


def trace(
    model: PreTrainedModel,
    layers_path: str,
    run: Run,
    *,
    dtype: torch.dtype,
    batch: int,
    length: int,
    adapt: Callable[[Any], Any] | None = None,
    companion: Callable[[], Any] | None = None,
) -> dict[str, Phase]:
    """Run one step with one decoder layer of each kind, and say what it takes with all of them.

    Args:
        model: On the meta device, with all its layers; not changed.
        layers_path: Of the decoder layers inside it.
        run: The step.
        dtype: Of the weights.
        batch: B, rows.
        length: T, tokens per row.
        adapt: Puts an adapter around a skeleton.
        companion: Makes the second model, on the meta device.

    Returns:
        By name: `forward` and `head`; after a step with a backward also `top`, `bottom`, `embedding`, and `optimizer`
        (nothing but the gradients).
    """
    kinds = layer_kinds(model, layers_path)
    runs = [
        _run_one(skeleton(model, layers_path, layers[:1], dtype), layers_path, run, batch, length, adapt, companion)
        for layers in kinds
    ]
    numbers = [len(layers) for layers in kinds]
    saved = sum(number * one.saved for number, one in zip(numbers, runs, strict=True))
    gradients = sum(number * one.layer_gradients for number, one in zip(numbers, runs, strict=True))
    found: dict[str, Phase] = {}
    for one in runs:
        for name, phase in one.phases(saved, gradients).items():
            if name not in found or phase.peak > found[name].peak:
                found[name] = phase
    return found


@dataclass(frozen=True)
class _One:
    """What a step with a single decoder layer took.

    Attributes:
        marks: Peak, bytes then and gradients then, by phase; see `_marked`.
        saved: Bytes that the layer holds for the way back (of a forward alone: in its cache).
        layer_gradients: Bytes of its gradients.
        passing: Bytes of its output where that is not kept: from the second layer on it is there beside the embedding.
    """

    marks: dict[str, tuple[int, int, int]]
    saved: int
    layer_gradients: int
    passing: int

    def phases(self, saved: int, gradients: int) -> dict[str, Phase]:
        """The phases of the whole model, whose layers together hold `saved` and have `gradients`."""
        more, grown = saved - self.saved, gradients - self.layer_gradients
        found = {
            name: Phase(self.marks[name][0] + more + self.passing, saved, self.marks[name][2])
            for name in ("forward", "head")
        }
        if "end" not in self.marks:
            return found
        layer, (end, _, in_all) = self.marks.get("layer", self.marks["end"]), self.marks["end"]
        return found | {
            "top": Phase(layer[0] + more, more, layer[2]),
            "bottom": Phase(layer[0] + grown, 0, layer[2] + grown),
            "embedding": Phase(end + grown, 0, in_all + grown),
            "optimizer": Phase(in_all + grown, 0, in_all + grown),
        }


def _run_one(
    model: Any,
    layers_path: str,
    run: Run,
    batch: int,
    length: int,
    adapt: Callable[[Any], Any] | None,
    companion: Callable[[], Any] | None,
) -> _One:
    base, other = model, companion() if companion else None
    if adapt is not None:
        model = adapt(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        settle(model, base)
        known = [*model.parameters(), *model.buffers()]
        if other is not None:
            settle(other, other)
            known += [*other.parameters(), *other.buffers()]
        tracer = Tracer(known, list(model.parameters()))
        layer = base.get_submodule(layers_path)[0]
        ids_BT = torch.zeros(batch, length, dtype=torch.long)
        with tracer, _marked(tracer, layer) as passing:
            run(model, ids_BT, other)
            tracer.mark("end")
        gradients = sum(parameter.grad.nbytes for parameter in layer.parameters() if parameter.grad is not None)
    marks = {name: (peak, live, in_all) for name, peak, live, in_all in tracer.marks}
    if "head" not in marks:  # no backward: what follows the layer is the head
        marks["head"] = marks.pop("end")
    saved = marks["forward"][1] - marks["before"][1] - sum(passing)
    return _One(marks, saved, gradients, sum(passing))


def layer_kinds(model: PreTrainedModel, layers_path: str) -> list[list[nn.Module]]:
    """A model's decoder layers, those with equal weights together."""
    kinds: dict[str, list[nn.Module]] = {}
    for layer in model.get_submodule(layers_path).children():
        shapes = str([(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()])
        kinds.setdefault(shapes, []).append(layer)
    return list(kinds.values())


def settle(model: Any, base: Any) -> None:
    """Give a skeleton (`base`, inside `model`) weights that have sizes and no values, inside a `FakeTensorMode`."""
    model.to_empty(device="cpu")
    base.tie_weights()


def trace_optimizer(
    make: Callable[[nn.Parameter], torch.optim.Optimizer], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes of the state that an optimizer keeps of one tensor, and of what its second step needs besides."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensor = nn.Parameter(torch.empty(shape, dtype=dtype))
        tensor.grad = torch.empty_like(tensor)
        optimizer = make(tensor)
        tracer = Tracer([tensor, tensor.grad])
        with tracer:
            optimizer.step()
            tracer.mark("first")
            optimizer.step()
            tracer.mark("second")
    state, peak = tracer.marks[0][2], tracer.marks[1][1]
    return state, peak - state
