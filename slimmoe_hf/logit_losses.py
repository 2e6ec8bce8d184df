"""The distillation loss from logits that are all there: where a model's head cannot be fused, or its logits are wanted.

What `fused` gives, with the gradient left to autograd.

Shape letters: N tokens (predictions), V vocabulary, K entries of a cached teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimmoe_hf.fused import FusedLosses
from slimmoe_hf.losses import DistillationLoss, cross_entropy
from slimmoe_hf.row_losses import TopK
from slimmoe_hf.signals import Head, Teacher, TeacherLogits, TeacherTopK, check_signals


def apply_head(head: Head, hidden: Tensor) -> Tensor:
    """Logits `[..., V]` of hidden states `[..., D]`, at least float32."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ head.weight_VD.to(dtype).t()
        if head.bias_V is not None:
            logits = logits + head.bias_V
        logits = logits * head.scale
        return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def losses_of_logits(
    student_NV: Tensor,
    teacher: Teacher,
    labels_N: Tensor,
    loss: DistillationLoss,
    weights: tuple[float, float],
    weight_N: Tensor,
) -> FusedLosses:
    """The loss of N predictions, as `fused.fused_distillation_loss` gives it.

    Args:
        student_NV: The student's logits.
        teacher: The teacher's answers to the same predictions.
        labels_N: Ids.
        loss: The divergence.
        weights: Of divergence and cross-entropy.
        weight_N: `[N]` or a scalar: what a token's loss counts in the sum.

    Raises:
        ValueError: As `signals.check_signals`.
    """
    check_signals(len(student_NV), student_NV.shape[-1], teacher, labels_N, loss)
    if isinstance(teacher, TeacherTopK):
        values = _cached(student_NV, teacher, labels_N, loss)
    else:
        values = _live(student_NV, _logits(teacher).detach().to(student_NV.device), labels_N, loss)
    divergence_N, cross_entropy_N, *others = values
    distillation, crossentropy = weights
    loss_N = distillation * divergence_N
    if crossentropy:
        loss_N = loss_N + crossentropy * cross_entropy_N
    detached = (value_N.detach() for value_N in (divergence_N, cross_entropy_N, *others))
    return FusedLosses((loss_N * weight_N).sum(), *detached)


def _logits(teacher: Teacher) -> Tensor:
    if isinstance(teacher, TeacherLogits):
        return teacher.logits_NV
    assert not isinstance(teacher, TeacherTopK)
    return apply_head(teacher.head, teacher.hidden_NU)


def _live(student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, loss: DistillationLoss) -> tuple[Tensor, ...]:
    losses = loss(student_NV, teacher_NV, labels_N)
    shared = min(student_NV.shape[-1], teacher_NV.shape[-1])
    with torch.no_grad():
        logs = [logits_NV[:, :shared].float().log_softmax(-1) for logits_NV in (student_NV, teacher_NV)]
        entropies = [-(log_NV.exp() * log_NV).masked_fill(log_NV == -torch.inf, 0.0).sum(-1) for log_NV in logs]
        mass_N = torch.ones_like(losses.kl_N)
        if 0 < loss.top_k < shared:
            mass_N = logs[1].topk(loss.top_k, dim=-1).values.exp().sum(-1)
    return losses.divergence_N, losses.cross_entropy_N, losses.kl_N, losses.top1_agreement_N, *entropies, mass_N


def _cached(student_NV: Tensor, teacher: TeacherTopK, labels_N: Tensor, loss: DistillationLoss) -> tuple[Tensor, ...]:
    plain, soft = teacher.entries(slice(None), loss.top_k)
    shared_NV = student_NV[:, : teacher.vocab_size].float()
    divergence_N = _forward_kl(shared_NV, soft, loss.temperature, loss.add_tail) * loss.temperature**2
    with torch.no_grad():
        log_NV = shared_NV.log_softmax(-1)
        entropy_N = -(log_NV.exp() * log_NV).masked_fill(log_NV == -torch.inf, 0.0).sum(-1)
        kl_N = _forward_kl(shared_NV, plain, 1.0, add_tail=True)
        first_N1 = plain.log_probs_RK.argmax(-1, keepdim=True)
        agreement_N = (plain.index_RK.gather(-1, first_N1).squeeze(-1) == shared_NV.argmax(-1)).float()
        mass_N = plain.log_probs_RK.exp().sum(-1)
    return divergence_N, cross_entropy(student_NV, labels_N), kl_N, agreement_N, entropy_N, plain.entropy(), mass_N


def _forward_kl(student_NV: Tensor, entries: TopK, temperature: float, add_tail: bool) -> Tensor:
    log_NV = (student_NV / temperature).log_softmax(-1)
    p_NK = entries.log_probs_RK.exp()
    gap_NK = p_NK * (entries.log_probs_RK - log_NV.gather(-1, entries.index_RK))
    kl_N = gap_NK.masked_fill(p_NK == 0, 0.0).sum(-1)
    if not add_tail or entries.index_RK.shape[-1] >= log_NV.shape[-1]:
        return kl_N
    tail_N = entries.log_tail_R.exp()
    outside_N = log_NV.scatter(-1, entries.index_RK, -torch.inf).logsumexp(-1)
    return kl_N + (tail_N * (entries.log_tail_R - outside_N)).masked_fill(tail_N == 0, 0.0)
