"""Losses of a block of logits with their gradients written out: what `fused` runs on one block after another.

`losses` says what the formulas are and leaves the gradient to autograd; here nothing is recorded. A block fits in the
processor's cache, so its tensors may come and go. Everything is float32 (or float64) already.

Shape letters: R rows (predictions) of the block, V vocabulary, K entries kept of the teacher's distribution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimmoe_hf.losses import IGNORED, DistillationLoss

RULED_OUT = -1e30
"""The logit of a token that is ruled out: its probability is 0, and 0 times it is still 0."""


class Weights(NamedTuple):
    """Weights of the two losses in the gradient."""

    distillation: float
    crossentropy: float


class RowValues(NamedTuple):
    """Everything that is known of each row of a block; all `[R]`, in nats. See `fused.FusedLosses`."""

    divergence_R: Tensor
    cross_entropy_R: Tensor
    kl_R: Tensor
    top1_agreement_R: Tensor
    student_entropy_R: Tensor
    teacher_entropy_R: Tensor
    teacher_mass_R: Tensor


class TopK(NamedTuple):
    """The teacher's K likeliest entries and the rest, at one temperature.

    Attributes:
        log_probs_RK: Log-probabilities.
        index_RK: Their ids, all different, int64.
        log_tail_R: Log of the mass on all other ids; -inf for none.
    """

    log_probs_RK: Tensor
    index_RK: Tensor
    log_tail_R: Tensor

    def entropy(self) -> Tensor:
        """Of the K entries and the rest as one more, `[R]`."""
        log_probs = torch.cat([self.log_probs_RK, self.log_tail_R.unsqueeze(-1)], dim=-1)
        return -(log_probs.exp() * log_probs).masked_fill(log_probs == -torch.inf, 0.0).sum(-1)


class _Softmax:
    """Probabilities and log-normaliser. `exp(0) / sum` is the largest probability: no second sum is needed."""

    def __init__(self, logits_RV: Tensor) -> None:
        self.probs_RV = logits_RV.softmax(-1)
        self.max_R = logits_RV.amax(-1)
        self.log_z_R = self.max_R - self.probs_RV.amax(-1).log()

    def entropy(self, logits_RV: Tensor) -> Tensor:
        return self.log_z_R - (self.probs_RV * logits_RV).sum(-1)


class _Split:
    """The student's softmax, the teacher's K entries apart from the others: `1 - sum` is exact however little is left.

    Args:
        logits_RK: The student's logits of the K entries.
        others_RV: All its logits, those of the K entries replaced by `RULED_OUT`.
        temperature: Divides both.
    """

    def __init__(self, logits_RK: Tensor, others_RV: Tensor, temperature: float) -> None:
        self.max_R = others_RV.amax(-1)
        self._shifted_RV = others_RV - self.max_R.unsqueeze(-1)
        if temperature != 1.0:
            self._shifted_RV.div_(temperature)
        self.exp_RV = self._shifted_RV.exp()
        self.log_max_R = self.max_R / temperature
        self._log_sum_R = self.exp_RV.sum(-1).log()
        outside_R, logits_RK = self.log_max_R + self._log_sum_R, logits_RK / temperature
        self.log_z_R = torch.logaddexp(outside_R, logits_RK.logsumexp(-1))
        self.log_inside_RK = logits_RK - self.log_z_R.unsqueeze(-1)
        self.log_outside_R = outside_R - self.log_z_R

    def entropy(self) -> Tensor:
        outside_R = self.log_outside_R.exp() * (self.log_z_R - self.log_max_R)
        outside_R = outside_R - (self.exp_RV * self._shifted_RV).sum(-1) * (self.log_max_R - self.log_z_R).exp()
        return outside_R - (self.log_inside_RK.exp() * self.log_inside_RK).sum(-1)

    def forward_kl(self, teacher: TopK, add_tail: bool) -> Tensor:
        p_RK, tail_R = teacher.log_probs_RK.exp(), teacher.log_tail_R.exp()
        gap_RK = teacher.log_probs_RK - self.log_inside_RK
        value_R = (p_RK * gap_RK).masked_fill(p_RK == 0, 0.0).sum(-1)
        if add_tail:
            gap_R = teacher.log_tail_R - self.log_outside_R
            value_R = value_R + (tail_R * gap_R).masked_fill(tail_R == 0, 0.0)
        return value_R

    def forward_kl_gradient(self, teacher: TopK, add_tail: bool) -> tuple[Tensor, Tensor]:
        """By the scaled logits: what `exp_RV` is to be multiplied by, `[R]`, and the K entries' own, `[R, K]`.

        With p the teacher's and s the student's probabilities, M and S their mass on the K: `total s - p` on them and
        `s (total - (1-M) / (1-S))` off them, where total is 1 with the tail; without it `M s - p` and `M s`.
        """
        p_RK = teacher.log_probs_RK.exp()
        total_R, tail_R = p_RK.sum(-1), teacher.log_tail_R.exp()
        if add_tail:
            total_R = total_R + tail_R
        outside_R = (self.log_max_R - self.log_z_R).exp() * total_R
        if add_tail:
            outside_R = outside_R - tail_R * (-self._log_sum_R).exp()
        return outside_R, self.log_inside_RK.exp() * total_R.unsqueeze(-1) - p_RK


class _CrossEntropy:
    """The student's cross-entropy over all its ids, of which the first V are shared with the teacher."""

    def __init__(self, student_RV: Tensor, shared: int, labels_R: Tensor) -> None:
        self.valid_R = (labels_R != IGNORED).to(student_RV.dtype)
        self.label_R1 = labels_R.clamp(min=0).unsqueeze(-1)
        self._logit_R = student_RV.gather(-1, self.label_R1).squeeze(-1)
        self._others = student_RV[:, shared:].clone() if shared < student_RV.shape[-1] else None

    def values(self, log_z_R: Tensor) -> Tensor:
        """Losses, given the log-normaliser over the shared ids."""
        self._shared_log_z_R = self.log_z_R = log_z_R
        if self._others is not None:
            self.log_z_R = torch.logaddexp(log_z_R, self._others.logsumexp(-1))
        return (self.log_z_R - self._logit_R).masked_fill(self.valid_R == 0, 0.0)

    def shared_weight(self, weight: float) -> Tensor:
        """What the gradient by shared logits is as a multiple of the softmax over them, without the label. `[R]`."""
        return weight * self.valid_R * (self._shared_log_z_R - self.log_z_R).exp()

    def finish_gradient(self, gradient_RV: Tensor, shared: int, weight: float) -> None:
        """Add the label's part, and write the part of the ids that are not shared."""
        weight_R1 = (weight * self.valid_R).unsqueeze(-1)
        if self._others is not None:
            gradient_RV[:, shared:] = (self._others - self.log_z_R.unsqueeze(-1)).exp() * weight_R1
        gradient_RV.scatter_add_(-1, self.label_R1, -weight_R1)


def full_rows(
    student_RV: Tensor,
    teacher_RV: Tensor,
    labels_R: Tensor,
    loss: DistillationLoss,
    weights: Weights | None,
    full_kl: bool,
) -> RowValues:
    """Losses against all of the teacher's distribution: forward KL, reverse KL or generalised JSD.

    Args:
        student_RV: The student's logits, at least as many ids as the teacher's; with `weights` they are overwritten
            by the gradient of `distillation * divergence + crossentropy * cross_entropy`.
        teacher_RV: The teacher's logits; used up.
        labels_R: Ids, -100 for none.
        loss: The settings; `top_k` is not looked at.
        weights: None leaves the gradient out.
        full_kl: Whether forward KL at T = 1 is wanted where it is not the loss; NaN otherwise.

    Returns:
        The values of each row.
    """
    shared, t = teacher_RV.shape[-1], loss.temperature
    crossentropy = _CrossEntropy(student_RV, shared, labels_R)
    shared_RV = student_RV[:, :shared]
    student, teacher = _Softmax(shared_RV), _Softmax(teacher_RV)
    best_R = shared_RV.gather(-1, teacher_RV.argmax(-1, keepdim=True)).squeeze(-1)
    agreement_R = (best_R >= student.max_R).to(best_R.dtype)
    cross_entropy_R = crossentropy.values(student.log_z_R)
    entropies = student.entropy(shared_RV), teacher.entropy(teacher_RV)
    plain_probs_RV = student.probs_RV
    kl_R = torch.full_like(cross_entropy_R, torch.nan)
    if t != 1.0:
        if full_kl:
            kl_R = _expected_gap(teacher, teacher_RV - shared_RV, student)
        soft_RV = shared_RV / t
        student, teacher = _Softmax(soft_RV), _Softmax(teacher_RV.div_(t))
        gap_RV = teacher_RV.sub_(soft_RV)
    else:
        gap_RV = teacher_RV.sub_(shared_RV)
        if full_kl or loss.beta == 0.0:
            kl_R = _expected_gap(teacher, gap_RV, student)
    value_R, gradient_RV = _divergence(student, teacher, gap_RV, loss.beta, weights is not None)
    if weights is not None:
        assert gradient_RV is not None
        torch.mul(gradient_RV, weights.distillation * t, out=shared_RV)
        if weights.crossentropy:
            shared_RV.addcmul_(plain_probs_RV, crossentropy.shared_weight(weights.crossentropy).unsqueeze(-1))
        crossentropy.finish_gradient(student_RV, shared, weights.crossentropy)
    return RowValues(value_R * t**2, cross_entropy_R, kl_R, agreement_R, *entropies, torch.ones_like(kl_R))


def _expected_gap(teacher: _Softmax, gap_RV: Tensor, student: _Softmax) -> Tensor:
    """Forward KL from the teacher's logits minus the student's: small where they agree, and so are its roundings."""
    return (teacher.probs_RV * gap_RV).sum(-1) + (student.log_z_R - teacher.log_z_R)


def _divergence(
    student: _Softmax, teacher: _Softmax, gap_RV: Tensor, beta: float, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Value `[R]` and gradient by the student's logits `[R, V]`; `gap_RV` is used up."""
    s_RV, p_RV = student.probs_RV, teacher.probs_RV
    if beta == 0.0:
        return _expected_gap(teacher, gap_RV, student), s_RV - p_RV if wants_gradient else None
    if beta == 1.0:
        log_ratio_RV = gap_RV.add_((student.log_z_R - teacher.log_z_R).unsqueeze(-1)).neg_()
        value_R = own_R = (s_RV * log_ratio_RV).sum(-1)
    else:
        # Where a probability underflows it adds nothing: the log of the smallest number keeps 0 * log(0) at 0.
        tiny = torch.finfo(s_RV.dtype).tiny
        mixture_RV = torch.lerp(s_RV, p_RV, beta).clamp_(min=tiny)
        teacher_R = (p_RV * (p_RV / mixture_RV).clamp_(min=tiny).log_()).sum(-1)
        log_ratio_RV = torch.div(s_RV, mixture_RV, out=mixture_RV).clamp_(min=tiny).log_()
        own_R = (s_RV * log_ratio_RV).sum(-1)
        value_R = beta * teacher_R + (1 - beta) * own_R
    if not wants_gradient:
        return value_R, None
    scale = 1.0 if beta == 1.0 else 1 - beta
    return value_R, log_ratio_RV.sub_(own_R.unsqueeze(-1)).mul_(s_RV).mul_(scale)


def top_k_rows(
    student_RV: Tensor,
    plain: TopK,
    soft: TopK,
    shared: int,
    labels_R: Tensor,
    loss: DistillationLoss,
    weights: Weights | None,
) -> RowValues:
    """Forward KL against the teacher's K likeliest entries and, with `loss.add_tail`, one more for the rest.

    `kl_R` is the one with the tail at T = 1, a lower bound of the full one; `teacher_entropy_R` bounds likewise.

    Args:
        student_RV: The student's logits; with `weights` overwritten by the gradient, otherwise used up.
        plain: The teacher's entries at T = 1.
        soft: The same entries at the temperature of `loss`.
        shared: V, ids that both have.
        labels_R: Ids, -100 for none.
        loss: The settings; forward KL.
        weights: None leaves the gradient out.

    Returns:
        The values of each row.
    """
    crossentropy = _CrossEntropy(student_RV, shared, labels_R)
    shared_RV, t = student_RV[:, :shared], loss.temperature
    logits_RK = shared_RV.gather(-1, plain.index_RK)
    shared_RV.scatter_(-1, plain.index_RK, RULED_OUT)
    student = _Split(logits_RK, shared_RV, 1.0)
    warm = student if t == 1.0 else _Split(logits_RK, shared_RV, t)
    cross_entropy_R = crossentropy.values(student.log_z_R)
    value_R = warm.forward_kl(soft, loss.add_tail)
    kl_R = value_R if t == 1.0 and loss.add_tail else student.forward_kl(plain, add_tail=True)
    best_RK = plain.log_probs_RK == plain.log_probs_RK.amax(-1, keepdim=True)
    best_R = logits_RK.masked_fill(~best_RK, RULED_OUT).amax(-1)
    agreement_R = (best_R >= torch.maximum(student.max_R, logits_RK.amax(-1))).to(best_R.dtype)
    if weights is not None:
        scale = weights.distillation * t
        outside_R, inside_RK = warm.forward_kl_gradient(soft, loss.add_tail)
        own_R = crossentropy.shared_weight(weights.crossentropy)
        inside_RK = inside_RK.mul_(scale).addcmul_(student.log_inside_RK.exp(), own_R.unsqueeze(-1))
        own_R = own_R * (student.log_max_R - student.log_z_R).exp()
        if warm is student:
            torch.mul(warm.exp_RV, (outside_R * scale + own_R).unsqueeze(-1), out=shared_RV)
        else:
            torch.mul(warm.exp_RV, (outside_R * scale).unsqueeze(-1), out=shared_RV)
            shared_RV.addcmul_(student.exp_RV, own_R.unsqueeze(-1))
        shared_RV.scatter_add_(-1, plain.index_RK, inside_RK)
        crossentropy.finish_gradient(student_RV, shared, weights.crossentropy)
    mass_R = plain.log_probs_RK.exp().sum(-1)
    values = student.entropy(), plain.entropy(), mass_R
    return RowValues(value_R * t**2, cross_entropy_R, kl_R, agreement_R, *values)


def live_top_k_rows(
    student_RV: Tensor,
    teacher_RV: Tensor,
    labels_R: Tensor,
    loss: DistillationLoss,
    weights: Weights | None,
    full_kl: bool,
) -> RowValues:
    """`top_k_rows` where the teacher's logits are at hand: its entropy is exact, and with `full_kl` so is `kl_R`.

    Args and returns: as `full_rows`.
    """
    shared_RV = student_RV[:, : teacher_RV.shape[-1]]
    teacher = _Softmax(teacher_RV)
    exact = {"teacher_entropy_R": teacher.entropy(teacher_RV)}
    if full_kl:
        exact["kl_R"] = _expected_gap(teacher, teacher_RV - shared_RV, _Softmax(shared_RV))
    logits_RK, index_RK = teacher_RV.topk(loss.top_k, dim=-1)
    teacher_RV.scatter_(-1, index_RK, RULED_OUT)
    plain, soft = (
        TopK(split.log_inside_RK, index_RK, split.log_outside_R)
        for split in (_Split(logits_RK, teacher_RV, t) for t in (1.0, loss.temperature))
    )
    rows = top_k_rows(student_RV, plain, soft, teacher_RV.shape[-1], labels_R, loss, weights)
    return rows._replace(**exact)
