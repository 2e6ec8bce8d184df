"""One sweep over real text gives every statistic that any criterion needs (`ExpertStats`).

For a neuron with activation `a = act(W_gate x) * (W_up x)` a mask `m = 1` on `a` has the gradient `dL/dm = a * dL/da`,
summed over the tokens that were routed to its expert. It equals `sum_d W_down[d, f] * grad(W_down)[d, f]`, but needs
no weight gradient, so the model stays frozen and the extra memory is one layer's activations at a time.

Shape letters: L layers with experts, E experts, F expert width, N tokens, S routed token-expert pairs, Q sequences in
a batch, A layers with attention (all), H query heads, G key/value groups, C head width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from slimmoe_hf.defaults import CALIBRATION_LOSS, NO_LOSS
from slimmoe_hf.factored import refuse_own_form
from slimmoe_hf.families import LayerView, family_of, layer_views, moe_layers, shape_of
from slimmoe_hf.identity import model_fingerprint, model_sha256
from slimmoe_hf.losses import cross_entropy, forward_kl
from slimmoe_hf.stats import ExpertStats, StatsMeta
from slimmoe_hf.sweeps import Batch, Sweep
from slimmoe_hf.taps import tapped

KD_TOP_K = 8
"""Entries of the teacher's distribution that `kd_topk` looks at (SlimMoE, arXiv 2506.18349)."""
TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(logits_NV, teacher_logits_NV, labels_N) -> loss_N`, one value per predicted token."""


def lm_loss(logits_NV: Tensor, teacher_logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy with the text itself. Returns `[N]`, nats."""
    return cross_entropy(logits_NV, labels_N)


def kd_topk_loss(logits_NV: Tensor, teacher_logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """KL on the teacher's eight likeliest tokens, neither renormalised nor with a tail (SlimMoE, arXiv 2506.18349).

    Either of the two would make the gradient exactly zero in the first stage, where student and teacher are equal.
    Returns `[N]`, nats.
    """
    return forward_kl(logits_NV, teacher_logits_NV, top_k=KD_TOP_K, add_tail=False)


CALIBRATION_LOSSES: dict[str, TokenLoss | None] = {"lm": lm_loss, "kd_topk": kd_topk_loss, NO_LOSS: None}


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no weight gradients, gradients through the embeddings' output; all put back afterwards."""
    training = model.training
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    sides = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model]
    hooks = [
        side.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
        for side in sides
    ]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)


def next_tokens(batch: Batch) -> Tensor:
    """What each position should predict, `[rows, T]`; -100 where there is nothing to predict or it is masked."""
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    if "position_ids" in batch:
        labels = labels.masked_fill(batch["position_ids"].expand_as(labels) == 0, -100)
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def collect_stats(
    model: PreTrainedModel,
    dataloader: Iterable[Batch],
    loss: str | TokenLoss = CALIBRATION_LOSS,
    teacher: PreTrainedModel | None = None,
    *,
    progress: bool = True,
    expert_outputs: bool = False,
) -> ExpertStats:
    """Sweep a model once over calibration text and keep, per neuron and head, every statistic the criteria need.

    The model is run in eval mode and as it is: nothing of it changes, and weights need no gradient. Give it in
    float32 (top-8 gradients are small where the teacher is sure). Each sequence counts by itself, so the result does
    not depend on the batch size. In several processes each gives its own share of the batches, and all get the sum.

    Args:
        model: The model to be slimmed, of a known family.
        dataloader: Batches as the model takes them: `input_ids`, and where needed `attention_mask`, `labels` (-100
            is not predicted), `position_ids` (a 0 starts a new document). An encoder-decoder needs `labels`; its decoder's
            positions with a label of -100 count as padding.
        loss: What is differentiated: `kd_topk` (the paper's), `lm` (cross-entropy), or a function of
            `(logits_NV, teacher_logits_NV, labels_N)` giving one value per token. `none` is one forward pass and no more: it
            asks no teacher, and leaves out the sums that only `criteria.OF_GRADIENTS` and a search for a budget look at.
        teacher: The model to be faithful to. Default: the model itself, which is the paper's first stage.
        progress: Show a progress bar with the time left.
        expert_outputs: Run every expert on every token too, for merging by what experts say; it takes E/K times as long.

    Returns:
        Sums over the data; divide by the tokens in `meta` for means.

    Raises:
        ValueError: Unknown family or loss, no data, a teacher with `none`, or a loss that is not finite (named by batch).
    """
    token_loss = loss_named(loss)
    family_of(model.config)
    refuse_own_form(model)
    if token_loss is None and teacher is not None:
        raise ValueError(f"calibration loss {NO_LOSS!r} compares with no teacher. Leave teacher out, or take kd_topk.")
    sweep = Sweep(family_of(model.config).encoder_decoder, gradients=token_loss is not None)
    seen, views = Seen(), layer_views(model)
    total = len(dataloader) if isinstance(dataloader, Sized) else None
    with _frozen(model), tapped(model, views, sweep, expert_outputs) as sums:
        for number, given in enumerate(track(dataloader, "Scoring", total=total, disable=not progress)):
            batch = {name: value.to(model.device) for name, value in given.items()}
            sweep.start(batch)
            if token_loss is None:
                _forward(model, batch)
            else:
                _backward(model, teacher, token_loss, batch, number, sweep)
            seen.add(batch, sweep)
    tensors = stack_layers([each.tensors() for each in sums])
    add_up(tensor for name, tensor in tensors.items() if name not in ExpertStats.MAXIMA)
    _largest(tensor for name, tensor in tensors.items() if name in ExpertStats.MAXIMA)
    data_sha256 = share_seen(seen)
    seen.require_tokens()
    meta = StatsMeta(
        family=model.config.model_type,
        config=stored_config(model.config),
        layers=[index for index, _, _ in moe_layers(model)],
        loss=loss if isinstance(loss, str) else loss.__name__,
        data_sha256=data_sha256,
        model_sha256=model_sha256(model),
        fingerprint=model_fingerprint(model),
        teacher_sha256=model_sha256(teacher) if teacher is not None else None,
        tokens=seen.tokens,
        sequences=seen.sequences,
    )
    norms = stack_layers([layer_norms(model.config, view) for view in views])
    return ExpertStats(meta=meta, **tensors, **norms)


def loss_named(loss: str | TokenLoss) -> TokenLoss | None:
    """The calibration loss of a name, None of `none`; a function is one already. Raises ValueError for an unknown name."""
    if not isinstance(loss, str):
        return loss
    if loss not in CALIBRATION_LOSSES:
        raise ValueError(
            f"calibration loss {loss!r} is unknown; use one of {', '.join(CALIBRATION_LOSSES)} or a function."
        )
    return CALIBRATION_LOSSES[loss]


class Seen:
    """What text a sweep has seen.

    Attributes:
        tokens: Padding excluded, of an encoder-decoder those of both sides. sequences: How many they came in.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.tokens = self.sequences = 0
        self._digest = hashlib.sha256()

    def add(self, batch: Batch, sweep: Sweep) -> None:
        """Count a batch that `sweep` was started with."""
        self.sequences += sweep.stacks[0].sequences
        read = [batch[name] for name in ("input_ids", "labels")[: len(sweep.stacks)]]
        valid = [stack.valid_N.view_as(ids) for ids, stack in zip(read, sweep.stacks, strict=True)]
        self.tokens += sum(int(each.sum()) for each in valid)
        for number in range(len(read[0])):
            for ids, each in zip(read, valid, strict=True):
                self._digest.update(ids[number][each[number]].cpu().long().numpy().tobytes() + b"|")

    @property
    def sha256(self) -> str:
        """Of the tokens of all rows, padding left out: it does not depend on the batch size."""
        return self._digest.hexdigest()

    def require_tokens(self) -> None:
        """Raise ValueError if there were none."""
        if self.tokens == 0:
            raise ValueError("the calibration data has no tokens. Give at least one sequence.")


def seen_in(batches: Iterable[Batch], encoder_decoder: bool = False) -> Seen:
    """What text some batches hold, padding left out."""
    seen, sweep = Seen(), Sweep(encoder_decoder)
    for batch in batches:
        sweep.start(batch)
        seen.add(batch, sweep)
    return seen


def _inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """What the model is given: of an encoder-decoder, position t the labels before t."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        whole: Any = model
        inputs["decoder_input_ids"] = whole.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return inputs


@torch.no_grad()
def _forward(model: PreTrainedModel, batch: Batch) -> None:
    """Through the layers alone, where the model has its output head apart from them."""
    model.base_model(**_inputs(model, batch), use_cache=False)


def _backward(
    model: PreTrainedModel, teacher: PreTrainedModel | None, loss: TokenLoss, batch: Batch, number: int, sweep: Sweep
) -> None:
    inputs = _inputs(model, batch)
    labels_N = (batch["labels"] if model.config.is_encoder_decoder else next_tokens(batch)).flatten()
    predicted = labels_N != -100
    with torch.enable_grad():
        logits_NV = model(**inputs, use_cache=False).logits.flatten(0, 1)[predicted]
        if teacher is None:
            teacher_NV = logits_NV.detach()
        else:
            with torch.no_grad(), sweep.deaf():
                on_device = {name: value.to(teacher.device) for name, value in inputs.items()}
                teacher_NV = teacher(**on_device, use_cache=False).logits.flatten(0, 1).to(model.device)[predicted]
            vocabulary = min(logits_NV.shape[-1], teacher_NV.shape[-1])
            logits_NV, teacher_NV = logits_NV[:, :vocabulary], teacher_NV[:, :vocabulary]
        value = loss(logits_NV, teacher_NV, labels_N[predicted]).sum()
    require_finite(value, number)
    value.backward()  # type: ignore[no-untyped-call]


def require_finite(value: Tensor, number: int) -> None:
    """Raise ValueError if the calibration loss of batch `number` is not a number."""
    if not bool(torch.isfinite(value)):
        raise ValueError(
            f"the calibration loss of batch {number} is {value.item()}: the model's weights or logits are not finite "
            "in this dtype. Load it in float32, and check the checkpoint."
        )


def stored_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The config as JSON has it, without the path it was loaded from: what statistics say must not depend on a place."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)
    return values


def stack_layers(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of all layers, by name, with an axis for the layers that have them."""
    names = dict.fromkeys(name for layer in layers for name in layer)
    return {name: torch.stack([layer[name] for layer in layers if name in layer]) for name in names}


def several_processes() -> bool:
    """Whether this is one of several processes that share a sweep."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def add_up(tensors: Iterable[Tensor]) -> None:
    """Make sums over processes of the sums of each, in place."""
    if several_processes():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def _largest(tensors: Iterable[Tensor]) -> None:
    """Make maxima over processes of the maxima of each, in place."""
    if several_processes():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)


def share_seen(seen: Seen) -> str:
    """Add up what all processes have seen, in place; the data's hash, of all shares in rank order where there are several."""
    if not several_processes():
        return seen.sha256
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, (seen.sha256, seen.tokens, seen.sequences))
    seen.tokens, seen.sequences = (sum(share[place] for share in shares) for place in (1, 2))
    return hashlib.sha256("".join(share[0] for share in shares).encode()).hexdigest()


@torch.no_grad()
def layer_norms(config: PreTrainedConfig, view: LayerView) -> dict[str, Tensor]:
    """Euclidean norms of the weights of a layer's neurons and groups, by their names in `ExpertStats`."""
    shape, family, found = shape_of(config), family_of(config), {}
    layout = family.layout
    if view.experts is not None:
        up, down = layout.weights(view.experts).values()
        index = torch.arange(shape.expert_width, device=up[0].device).unsqueeze(-1)
        rows = layout.input_index(index, shape.expert_width)
        squares = torch.stack([e.float().square().sum(1 - layout.input_axis)[rows].sum(-1) for e in up])
        norms = torch.stack([e.float().square().sum(1 - layout.down_axis) for e in down])
        found = {"input_norm_LEF": squares.sqrt().double(), "down_norm_LEF": norms.sqrt().double()}
    if view.attention is None:
        none = torch.zeros(shape.query_heads, dtype=torch.float64)
        return {**found, "head_out_norm_AH": none, "group_norm_AG": none[: shape.kv_groups].clone()}
    *into, last = (view.attention.get_parameter(f"{name}.weight").float() for name in family.projections)
    out = last.square().sum(0).view(shape.query_heads, -1).sum(-1)
    parts = [weight.square().sum(1).view(shape.kv_groups, -1).sum(-1) for weight in into]
    group = (sum(parts) + out.view(shape.kv_groups, -1).sum(-1)).sqrt()
    return {**found, "head_out_norm_AH": out.sqrt().double(), "group_norm_AG": group.double()}
