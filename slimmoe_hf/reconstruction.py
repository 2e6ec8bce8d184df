"""Reconstruction: the output projections of a cut model, solved anew so that what is kept stands in for what is dropped.

Our own step after any cut (least squares for merged experts is MergeMoE's, arXiv 2510.14436). Of an expert with the kept
neurons k and the dropped ones d it takes, over the tokens that the uncut model sends there, `A = sum a_k a_k^T` and
`B = sum (W_d a_d) a_k^T`, a the gate-weighted activations, and solves `R (A + mu I) = B` with `mu = ridge * tr(A) / X`;
then `W_k + R` is what the expert's output wants of `W_k`. Where little text reaches, the ridge leaves the plain slice.
Attention that loses groups and experts that are merged go the same way; gate, up, q, k and v stay as they are. The tokens
of experts that are dropped are nobody's: which of the others get them, and what should be said to them, is not solved here.

Shape letters: F' expert width kept, D model width, X kept inputs of a projection (F' neurons, or H' * C of the attention),
B rows, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimmoe_hf.blocks import Pass
from slimmoe_hf.calibration import seen_in, share_seen
from slimmoe_hf.factored import refuse_own_form
from slimmoe_hf.families import LayerView, family_of, layer_views
from slimmoe_hf.identity import model_fingerprint
from slimmoe_hf.layer_repair import LayerRepair
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.repairs import REPAIR_KINDS, Held, Repairing, Repairs
from slimmoe_hf.sweeps import Batch, Sweep

RIDGE = 0.05
"""Share of the mean square of the kept inputs that is added to each of them."""

REPAIRED = ("experts_repaired", "attention_repaired")
"""What a layer's summary says of its repair."""


def reconstruct(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    plan: CompressionPlan,
    ridge: float = RIDGE,
    *,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> CompressionPlan:
    """Solve the output projections of what a plan keeps anew, on what the uncut model does with some text.

    All text goes through one layer before the next one is looked at, so the sums are one layer's: `(F' + D) * F'` float64
    values of every expert that stays; beside them the inputs of one layer (tokens x D) are in host memory. The model is
    run in eval mode and nothing of it changes. The result does not depend on how the text is cut into batches. In several
    processes each gives its own share of the batches, and all get the same plan.

    Args:
        model: The model that the plan is for, uncut, whole in memory.
        batches: As for `collect_stats`; the text that was scored will do.
        plan: From `make_plan` or `plan_merge`.
        ridge: Of the least squares, as a share of the mean square of the kept inputs; more keeps nearer to the slices.
        dtype: What the repaired weights are rounded to; the checkpoint's, where the model was loaded in another. None is the
            model's own.
        progress: Show a progress bar.

    Returns:
        The plan with `repairs`, for `apply_plan` and `slim_checkpoint`. A plan that
        only drops experts cuts no projection, and comes back as it is.

    Raises:
        ValueError: The plan is for another model, no data, a ridge that is not positive, or activations that are not
            finite.

    Example:
        ```python
        plan = reconstruct(model, batches, make_plan(stats, Target(expert_width=96)))
        student = apply_plan(model, plan)
        ```
    """
    refuse_own_form(model)
    fingerprint = model_fingerprint(model)
    check_repairable(plan, model.config, fingerprint, ridge)
    if not cuts_outputs(plan):
        return plan
    given, whole = [dict(batch) for batch in batches], family_of(model.config).encoder_decoder
    sweep, seen = Sweep(whole), seen_in(given, whole)
    data_sha256 = share_seen(seen)
    seen.require_tokens()
    found, dtypes = {}, {} if dtype is None else dict.fromkeys(REPAIR_KINDS, dtype)
    with _in_eval(model):
        text = (_Anew if whole else _Through)(model, given, sweep)
        for view in track(layer_views(model), "Reconstructing", disable=not progress):
            layer = LayerRepair(model, view, plan, sweep)
            with layer.listening() as wanted:
                text.pass_by(view, wanted)
            found[view.index] = layer.solve(ridge, dtypes)
    down, out = (Held({layer: each[kind] for layer, each in found.items() if kind in each}) for kind in REPAIR_KINDS)
    repairs = Repairs(down, out)
    repairing = Repairing(ridge=ridge, tokens=seen.tokens, data_sha256=data_sha256, sha256=repairs.sha256)
    return with_repairs(plan, repairs, found, repairing, fingerprint)


def check_repairable(plan: CompressionPlan, config: PreTrainedConfig, fingerprint: str | None, ridge: float) -> None:
    """Raise ValueError for a plan that is not sound or not for this model, or a ridge that is not positive.

    Args:
        plan: What is cut.
        config: The model's.
        fingerprint: Of its weights.
        ridge: As `reconstruct` takes it.
    """
    plan.check()
    plan.check_fits(config)
    if plan.meta.fingerprint not in (None, fingerprint):
        raise ValueError("the plan was made for other weights than the model's. Score this model.")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge={ridge} is not a positive number. The default is {RIDGE}.")


def cuts_outputs(plan: CompressionPlan) -> bool:
    """Whether a plan cuts or averages any output projection, so that there is something to repair."""
    return bool(plan.neurons or plan.groups or plan.blends)


def repair_values(plan: CompressionPlan) -> int:
    """How many values `reconstruct` finds for a plan."""
    after = plan.meta.after
    blended = {layer: blend.number for layer, blend in plan.blends.items()}
    experts = sum((dict.fromkeys(plan.neurons, after.num_experts) | blended).values())
    attention = len(plan.groups) * after.query_heads * after.head_width
    return after.hidden_size * (experts * after.expert_width + attention)


def with_repairs(
    plan: CompressionPlan,
    repairs: Repairs,
    found: Mapping[int, Mapping[str, Tensor]],
    repairing: Repairing,
    fingerprint: str | None,
) -> CompressionPlan:
    """A plan with its repairs.

    Args:
        plan: What is cut.
        repairs: The weights that `LayerRepair.solve` found.
        found: Of each layer, of what else it found `REPAIRED`.
        repairing: How.
        fingerprint: Of the weights that they stand for.
    """
    layers = [
        each.model_copy(update={name: float(found[each.index][name]) for name in REPAIRED if name in found[each.index]})
        for each in plan.meta.layers
    ]
    meta = plan.meta.model_copy(update={"repairing": repairing, "layers": layers, "fingerprint": fingerprint})
    repaired = dataclasses.replace(plan, meta=meta, repairs=repairs)
    repaired.check()
    return repaired


def without_repairs(plan: CompressionPlan) -> CompressionPlan:
    """The same choice with plain slices, for where the repaired weights are at hand already: they are as large as those."""
    layers = [each.model_copy(update=dict.fromkeys(REPAIRED)) for each in plan.meta.layers]
    meta = plan.meta.model_copy(update={"repairing": None, "layers": layers})
    return dataclasses.replace(plan, meta=meta, repairs=Repairs())


@contextmanager
def _in_eval(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class _Through:
    """Text on its way through a decoder-only model, all of it through one layer before the next."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], sweep: Sweep) -> None:
        self.model, self.batches, self.sweep = model, batches, sweep
        self.hidden = list[Tensor]()
        with _passing(model, None) as slots:  # what the first layer is given: some models scale their embeddings
            slots[0].register_forward_pre_hook(lambda _module, args: self.hidden.append(args[0].cpu()))
            for batch in batches:
                given = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
                model.base_model(**given, use_cache=False)

    def pass_by(self, view: LayerView, _wanted: bool) -> None:
        """Have a layer hear all text."""
        with _alone(self.model, view.index) as block:
            for number, batch in enumerate(self.batches):
                placed = {name: value.to(self.model.device) for name, value in batch.items()}
                self.sweep.start(placed)
                self.hidden[number] = block(self.hidden[number].to(self.model.device), placed).cpu()


class _Anew:
    """Text that passes a whole model for each layer that is cut: an encoder-decoder's blocks need what the first one makes."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], sweep: Sweep) -> None:
        self.model, self.batches, self.sweep = model, batches, sweep

    def pass_by(self, _view: LayerView, wanted: bool) -> None:
        """Have a layer hear all text, if it is cut."""
        for batch in self.batches if wanted else ():
            placed = {name: value.to(self.model.device) for name, value in batch.items()}
            self.sweep.start(placed)
            self.model(**placed, use_cache=False)


@contextmanager
def _passing(model: PreTrainedModel, but: int | None) -> Iterator[nn.ModuleList]:
    """Have all decoder layers, but the one of that number, pass on what they are given."""
    slots: Any = model.get_submodule(family_of(model.config).layers)
    layers = list(slots)
    try:
        for number, layer in enumerate(layers):
            if number != but:
                slots[number] = Pass(layer)
        yield slots
    finally:
        for number, layer in enumerate(layers):
            slots[number] = layer


@contextmanager
def _alone(model: PreTrainedModel, number: int) -> Iterator[Any]:
    """Have the model run one decoder layer only: `(hidden_BTD, batch) -> hidden_BTD`, masks and positions its own."""
    seen = list[Tensor]()

    def block(hidden_BTD: Tensor, batch: Batch) -> Tensor:
        given = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
        seen.append(hidden_BTD)
        model.base_model(inputs_embeds=hidden_BTD, use_cache=False, **given)
        return seen.pop()

    with _passing(model, number) as slots, ExitStack() as stack:
        # Not what the model made of its embeddings on their way here, but what the layer before gave.
        stack.callback(slots[number].register_forward_pre_hook(lambda _module, args: (seen.pop(), *args[1:])).remove)
        stack.callback(slots[number].register_forward_hook(lambda _module, _args, output: seen.append(output)).remove)
        yield block
