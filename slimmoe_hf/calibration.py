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
from transformers import PreTrainedModel

from slimmoe_hf.families import family_of, layer_views, moe_layers, shape_of
from slimmoe_hf.identity import model_fingerprint, model_sha256
from slimmoe_hf.losses import cross_entropy, forward_kl
from slimmoe_hf.stats import ExpertStats, StatsMeta
from slimmoe_hf.taps import Batch, ExpertSums, HeadSums, Sweep, tapped

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
    return forward_kl(logits_NV, teacher_logits_NV, top_k=8, add_tail=False)


CALIBRATION_LOSSES: dict[str, TokenLoss] = {"lm": lm_loss, "kd_topk": kd_topk_loss}


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no weight gradients, gradients through the embeddings' output; all put back afterwards."""
    training = model.training
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
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
    loss: str | TokenLoss = "kd_topk",
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
            is not predicted), `position_ids` (a 0 starts a new document).
        loss: What is differentiated: `kd_topk` (the paper's), `lm` (cross-entropy), or a function of
            `(logits_NV, teacher_logits_NV, labels_N)` giving one value per token.
        teacher: The model to be faithful to. Default: the model itself, which is the paper's first stage.
        progress: Show a progress bar with the time left.
        expert_outputs: Run every expert on every token too, for merging by what experts say; it takes E/K times as long.

    Returns:
        Sums over the data; divide by the tokens in `meta` for means.

    Raises:
        ValueError: Unknown family or loss, no data, or a loss that is not finite (named by batch).
    """
    if isinstance(loss, str) and loss not in CALIBRATION_LOSSES:
        raise ValueError(
            f"calibration loss {loss!r} is unknown; use one of {', '.join(CALIBRATION_LOSSES)} or a function."
        )
    token_loss = CALIBRATION_LOSSES[loss] if isinstance(loss, str) else loss
    family_of(model.config)
    sweep, digest, counts = Sweep(), hashlib.sha256(), {"tokens": 0, "sequences": 0}
    total = len(dataloader) if isinstance(dataloader, Sized) else None
    with _frozen(model), tapped(model, sweep, expert_outputs) as (expert_sums, head_sums):
        for number, given in enumerate(track(dataloader, "Scoring", total=total, disable=not progress)):
            batch = {name: value.to(model.device) for name, value in given.items()}
            sweep.start(batch)
            _backward(model, teacher, token_loss, batch, number)
            counts["tokens"] += int(sweep.valid_N.sum())
            counts["sequences"] += sweep.sequences
            _hash_rows(digest, batch["input_ids"], sweep.valid_N)
    tensors = _stack(expert_sums, head_sums)
    digests = _reduce(tensors, counts, digest.hexdigest())
    if counts["tokens"] == 0:
        raise ValueError("the calibration data has no tokens. Give at least one sequence.")
    meta = StatsMeta(
        family=model.config.model_type,
        config=_config(model),
        layers=[index for index, _, _ in moe_layers(model)],
        loss=loss if isinstance(loss, str) else loss.__name__,
        data_sha256=digests,
        model_sha256=model_sha256(model),
        fingerprint=model_fingerprint(model),
        teacher_sha256=model_sha256(teacher) if teacher is not None else None,
        **counts,
    )
    return ExpertStats(meta=meta, **tensors, **_weight_norms(model))


def _backward(
    model: PreTrainedModel, teacher: PreTrainedModel | None, loss: TokenLoss, batch: Batch, number: int
) -> None:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels_N = next_tokens(batch).flatten()
    predicted = labels_N != -100
    with torch.enable_grad():
        logits_NV = model(**inputs, use_cache=False).logits.flatten(0, 1)[predicted]
        if teacher is None:
            teacher_NV = logits_NV.detach()
        else:
            with torch.no_grad():
                on_device = {name: value.to(teacher.device) for name, value in inputs.items()}
                teacher_NV = teacher(**on_device, use_cache=False).logits.flatten(0, 1).to(model.device)[predicted]
            vocabulary = min(logits_NV.shape[-1], teacher_NV.shape[-1])
            logits_NV, teacher_NV = logits_NV[:, :vocabulary], teacher_NV[:, :vocabulary]
        value = loss(logits_NV, teacher_NV, labels_N[predicted]).sum()
    if not bool(torch.isfinite(value)):
        raise ValueError(
            f"the calibration loss of batch {number} is {value.item()}: the model's weights or logits are not finite "
            "in this dtype. Load it in float32, and check the checkpoint."
        )
    value.backward()  # type: ignore[no-untyped-call]


def _hash_rows(digest: Any, ids: Tensor, valid_N: Tensor) -> None:
    """Add the tokens of each row, padding left out: the hash does not depend on the batch size."""
    for row, valid in zip(ids.cpu(), valid_N.view_as(ids).cpu(), strict=True):
        digest.update(row[valid].long().numpy().tobytes() + b"|")


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """The config as JSON has it, without the path it was loaded from: what statistics say must not depend on a place."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    return config


def _stack(expert_sums: list[ExpertSums], head_sums: list[HeadSums]) -> dict[str, Tensor]:
    tensors = {name: torch.stack([s.neuron[name] for s in expert_sums]) for name in ExpertStats.NEURON_SUMS}
    tensors |= {name: torch.stack([s.expert[name] for s in expert_sums]) for name in ExpertStats.EXPERT_SUMS}
    tensors |= {name: torch.stack([s.head[name] for s in head_sums]) for name in ExpertStats.HEAD_SUMS}
    tensors["router_gram_LEE"] = torch.stack([s.gram for s in expert_sums])
    outputs = [s.outputs for s in expert_sums if s.outputs is not None]
    tensors |= {"output_sum_LED": torch.stack(outputs)} if outputs else {}
    tensors["tokens_LE"] = torch.stack([s.tokens for s in expert_sums])
    return tensors


def _reduce(tensors: dict[str, Tensor], counts: dict[str, int], digest: str) -> str:
    """Add up over processes, in place; the data's hash becomes the hash of all shares in rank order."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return digest
    for tensor in tensors.values():
        distributed.all_reduce(tensor)
    shares: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, (digest, dict(counts)))
    for key in counts:
        counts[key] = sum(share[1][key] for share in shares)
    return hashlib.sha256("".join(share[0] for share in shares).encode()).hexdigest()


@torch.no_grad()
def _weight_norms(model: PreTrainedModel) -> dict[str, Tensor]:
    """Euclidean norms of each neuron's weights and of each group's heads."""
    shape, layout = shape_of(model.config), family_of(model.config).layout
    neuron, head_out, group = [], [], []
    for _, experts, _router in moe_layers(model):
        up, down = getattr(experts, layout.gate_up), getattr(experts, layout.down)
        index = torch.arange(shape.expert_width, device=up.device).unsqueeze(-1)
        rows = layout.input_index(index, shape.expert_width)
        squares = torch.stack([e.float().square().sum(1 - layout.input_axis)[rows].sum(-1) for e in up])
        norms = torch.stack([e.float().square().sum(1 - layout.down_axis) for e in down])
        neuron.append((squares.sqrt(), norms.sqrt()))
    for view in layer_views(model):
        attention: Any = view.attention
        out = attention.o_proj.weight.float().square().sum(0).view(shape.query_heads, -1).sum(-1)
        parts = [
            projection.weight.float().square().sum(1).view(shape.kv_groups, -1).sum(-1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        group.append((sum(parts) + out.view(shape.kv_groups, -1).sum(-1)).sqrt())
        head_out.append(out.sqrt())
    return {
        "input_norm_LEF": torch.stack([n[0] for n in neuron]).double(),
        "down_norm_LEF": torch.stack([n[1] for n in neuron]).double(),
        "head_out_norm_AH": torch.stack(head_out).double(),
        "group_norm_AG": torch.stack(group).double(),
    }
