"""Losses on logits, one value per token. Nothing here averages over tokens: only the trainer divides.

All of it runs in float32 whatever comes in (float64 stays float64), and teachers are constants: no gradient flows
into `teacher_logits_NV`.

Shape letters: N tokens (predictions), V vocabulary, K entries kept of the teacher's distribution, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a position that is not trained on."""


def forward_kl(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    add_tail: bool = True,
) -> Tensor:
    """KL(teacher || student) of the next-token distributions, in nats; not multiplied by T^2.

    With `top_k` the sum runs over the teacher's K likeliest entries. Let M and S be the teacher's and the student's
    mass on them. With the tail, everything else is one more entry: `+ (1-M) (log(1-M) - log(1-S))`, a lower bound of
    the full KL with the same optimum. Without it the sum is plainly truncated, not renormalised: it may be negative,
    and at student == teacher its gradient by the logits is `-(1-M) p_i` on the K entries and `M p_i` off them
    (SlimMoE's calibration loss, arXiv 2506.18349, with K = 8).

    Args:
        student_logits_NV: `[N, V]`.
        teacher_logits_NV: `[N, V]`.
        temperature: Divides both logits.
        top_k: K; 0 is the full vocabulary.
        add_tail: Whether the rest of the vocabulary counts as one entry.

    Returns:
        `[N]`.
    """
    student_NV, teacher_NV = _log_softmax(student_logits_NV, teacher_logits_NV, temperature)
    if top_k == 0 or top_k >= teacher_NV.shape[-1]:
        return _gap(teacher_NV, student_NV).sum(-1)
    index_NK = teacher_NV.topk(top_k, dim=-1).indices
    kl_N = _gap(teacher_NV.gather(-1, index_NK), student_NV.gather(-1, index_NK)).sum(-1)
    if add_tail:
        kl_N = kl_N + _gap(_log_mass_outside(teacher_NV, index_NK), _log_mass_outside(student_NV, index_NK))
    return kl_N


def kept_kl(student_logits_NV: Tensor, log_probs_NK: Tensor, index_NK: Tensor) -> Tensor:
    """`forward_kl` without a tail, of a teacher of whom only the likeliest entries were kept.

    Args:
        student_logits_NV: `[N, V]`.
        log_probs_NK: The teacher's log-probabilities of K ids, `[N, K]`.
        index_NK: Which ids.

    Returns:
        `[N]`, nats.
    """
    student_NV = _at_least_float32(student_logits_NV).log_softmax(-1)
    return _gap(log_probs_NK, student_NV.gather(-1, index_NK)).sum(-1)


def reverse_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) in nats, over the full vocabulary; not multiplied by T^2. Returns `[N]`."""
    student_NV, teacher_NV = _log_softmax(student_logits_NV, teacher_logits_NV, temperature)
    return _gap(student_NV, teacher_NV).sum(-1)


def generalized_jsd(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, beta: float, temperature: float = 1.0
) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1), in nats; not multiplied by T^2.

    Args:
        student_logits_NV: `[N, V]`.
        teacher_logits_NV: `[N, V]`.
        beta: Weight of the teacher in the mixture, strictly between 0 and 1, as in TRL's `GKDTrainer`. The limits are
            zero; `distillation_divergence` takes 0 as forward KL and 1 as reverse KL, as TRL does.
        temperature: Divides both logits.

    Returns:
        `beta KL(teacher || mixture) + (1 - beta) KL(student || mixture)`, `[N]`.
    """
    student_NV, teacher_NV = _log_softmax(student_logits_NV, teacher_logits_NV, temperature)
    weights = student_NV.new_tensor([1 - beta, beta]).log()
    mixture_NV = torch.logaddexp(student_NV + weights[0], teacher_NV + weights[1])
    return beta * _gap(teacher_NV, mixture_NV).sum(-1) + (1 - beta) * _gap(student_NV, mixture_NV).sum(-1)


def distillation_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    top_k: int = 0,
    add_tail: bool = True,
) -> Tensor:
    """The divergence that is trained on, times T^2: the one place of that factor.

    Gradients of a softened divergence shrink like 1/T^2; the factor keeps the meaning of its weight (Hinton et al.,
    arXiv 1503.02531, section 2).

    Args:
        student_logits_NV: `[N, V]`.
        teacher_logits_NV: `[N, V]`.
        beta: 0 forward KL, 1 reverse KL, between them the generalised Jensen-Shannon divergence.
        temperature: T.
        top_k: Entries kept of the teacher's distribution; 0 is all of them. Forward KL only.
        add_tail: Whether the rest counts as one entry.

    Returns:
        `[N]`.

    Raises:
        ValueError: `top_k` with another divergence than forward KL.
    """
    if top_k and beta != 0.0:
        raise ValueError(
            f"top_k={top_k} with beta={beta}: only forward KL can be cut to the teacher's likeliest tokens, the others "
            "weigh by the student. Set beta=0.0, or top_k=0."
        )
    if beta == 0.0:
        divergence_N = forward_kl(student_logits_NV, teacher_logits_NV, temperature, top_k, add_tail)
    elif beta == 1.0:
        divergence_N = reverse_kl(student_logits_NV, teacher_logits_NV, temperature)
    else:
        divergence_N = generalized_jsd(student_logits_NV, teacher_logits_NV, beta, temperature)
    return divergence_N * temperature**2


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Negative log-likelihood of the labels in nats; 0 where the label is -100. Returns `[N]`."""
    return F.cross_entropy(_at_least_float32(logits_NV), labels_N, reduction="none", ignore_index=IGNORED)


def top1_agreement(student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
    """1 where student and teacher put the same token first, else 0. Returns `[N]`, float32."""
    return (student_logits_NV.argmax(-1) == teacher_logits_NV.argmax(-1)).float()


class TokenLosses(NamedTuple):
    """What a batch of predictions is worth, token by token; all `[N]`, in nats.

    Attributes:
        divergence_N: The divergence as configured, times T^2; carries the gradient.
        cross_entropy_N: Carries the gradient too.
        kl_N: Forward KL over the full vocabulary at T = 1, whatever the settings, so that runs compare. No gradient.
        top1_agreement_N: 1 where both put the same token first. No gradient.
    """

    divergence_N: Tensor
    cross_entropy_N: Tensor
    kl_N: Tensor
    top1_agreement_N: Tensor


@dataclass(frozen=True)
class DistillationLoss:
    """The loss with its settings: `(student_logits_NV, teacher_logits_NV, labels_N) -> TokenLosses`.

    Vocabularies padded to different sizes are compared on the ids they share; the cross-entropy is the student's own,
    over all its ids.

    Attributes:
        beta: 0 forward KL, 1 reverse KL, between them generalised JSD.
        temperature: T, for the divergence only.
        top_k: Entries kept of the teacher's distribution; 0 is all.
        add_tail: Whether the rest counts as one entry.
    """

    beta: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    add_tail: bool = True

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, labels_N: Tensor) -> TokenLosses:
        """Evaluate the loss of N valid predictions; N may be 0, which keeps the graph."""
        shared = min(student_logits_NV.shape[-1], teacher_logits_NV.shape[-1])
        student_NV, teacher_NV = student_logits_NV[:, :shared], teacher_logits_NV[:, :shared]
        divergence_N = distillation_divergence(
            student_NV,
            teacher_NV,
            beta=self.beta,
            temperature=self.temperature,
            top_k=self.top_k,
            add_tail=self.add_tail,
        )
        with torch.no_grad():
            is_plain_kl = self.beta == 0.0 and self.temperature == 1.0 and self.top_k == 0
            kl_N = divergence_N.detach() if is_plain_kl else forward_kl(student_NV, teacher_NV)
            agreement_N = top1_agreement(student_NV, teacher_NV)
        return TokenLosses(divergence_N, cross_entropy(student_logits_NV, labels_N), kl_N, agreement_N)


def shared_vocabulary(student_size: int, teacher_size: int, tokenizer_size: int) -> int:
    """How many ids student and teacher share, where both pad the same tokenizer's vocabulary to sizes of their own.

    Args:
        student_size: Rows of the student's head.
        teacher_size: Rows of the teacher's head.
        tokenizer_size: Ids the tokenizer can emit, added tokens included.

    Returns:
        The smaller of both sizes: logits beyond it are cut before the divergence.

    Raises:
        ValueError: A real token has no logit in one of them.
    """
    shared = min(student_size, teacher_size)
    if tokenizer_size > shared:
        raise ValueError(
            f"student and teacher do not share a vocabulary: the student has {student_size} ids, the teacher "
            f"{teacher_size}, and the tokenizer emits {tokenizer_size}. Distil from a teacher with the same tokenizer."
        )
    return shared


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, valid_mask: Tensor | None = None) -> Tensor:
    """Load-balancing loss of Switch Transformer (arXiv 2101.03961, eq. 4-6), each layer on its own, mean over layers.

    Perfectly balanced routing gives `top_k`, the scale of transformers' `load_balancing_loss_func`. That one adds up
    all layers before it multiplies, so that one layer's overload hides another's; this one does not (our choice).

    Args:
        router_logits: One `[tokens, E]` per MoE layer, as `output_router_logits=True` returns them.
        top_k: Experts per token.
        valid_mask: `[tokens]` (any shape that flattens to it), 0 for padding. None counts every token.

    Returns:
        A scalar; 0 where no token is valid.
    """
    device = router_logits[0].device
    valid_N1 = torch.ones(router_logits[0].shape[0], 1, device=device)
    if valid_mask is not None:
        valid_N1 = valid_mask.reshape(-1, 1).to(device=device, dtype=torch.float32)
    tokens = valid_N1.sum().clamp(min=1)
    losses = []
    for logits_NE in router_logits:
        logits_NE = _at_least_float32(logits_NE).to(device)
        chosen_NE = torch.zeros_like(logits_NE).scatter(-1, logits_NE.topk(top_k, dim=-1).indices, 1.0)
        load_E = (chosen_NE * valid_N1).sum(0) / tokens
        probability_E = (logits_NE.softmax(-1) * valid_N1).sum(0) / tokens
        losses.append(logits_NE.shape[-1] * (load_E * probability_E).sum())
    return torch.stack(losses).mean()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_softmax(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student_NV = (_at_least_float32(student_logits_NV) / temperature).log_softmax(-1)
    teacher_NV = (_at_least_float32(teacher_logits_NV.detach()) / temperature).log_softmax(-1)
    return student_NV, teacher_NV


def _gap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`p (log p - log q)` with `0 log 0 = 0`: a masked logit of -inf is no NaN."""
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill(p == 0, 0.0)


def _log_mass_outside(log_probs_NV: Tensor, index_NK: Tensor) -> Tensor:
    """`log(1 - sum of the indexed probabilities)`, from the others themselves: exact where the difference cancels."""
    return log_probs_NV.scatter(-1, index_NK, -torch.inf).logsumexp(-1)
