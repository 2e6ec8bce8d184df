"""The output head and the distillation loss in one: hidden states in, loss out, never all `[N, V]` logits at once.

Rows are taken in chunks. A chunk's logits are made, turned into losses and then, in place, into their gradient, which
is multiplied back into hidden states and head at once: nothing is kept or computed again for the backward pass, which
only scales what is there. So the weight of every token must be known in the forward pass; the caller gives it.

The values are those of `losses.DistillationLoss` on the logits.

Shape letters: N tokens (predictions), D student width, U teacher width, V vocabulary, K entries of a cached teacher,
R rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimmoe_hf.losses import DistillationLoss
from slimmoe_hf.row_losses import RULED_OUT, RowValues, Weights, full_rows, live_top_k_rows, top_k_rows
from slimmoe_hf.signals import (
    Head,
    Teacher,
    TeacherLogits,
    TeacherStates,
    TeacherTopK,
    check_signals,
    teacher_vocabulary,
)


class FusedLosses(NamedTuple):
    """The loss of a batch of predictions and, without gradient, what it is made of; `[N]`, in nats.

    Attributes:
        loss: `sum over N of weight * (distillation_weight * divergence + crossentropy_weight * cross_entropy)`; carries
            the gradient.
        divergence_N: The divergence as configured, times T^2.
        cross_entropy_N: 0 where the label is -100.
        kl_N: Forward KL at T = 1 over the full vocabulary; of a `TeacherTopK`, over its entries and the rest as one,
            which is a lower bound; NaN where `full_kl=False` spared it.
        top1_agreement_N: 1 where both put the same token first.
        student_entropy_N: Of the student at T = 1, over the ids that both have.
        teacher_entropy_N: Of the teacher likewise; of a `TeacherTopK` a lower bound, the rest counting as one entry.
        teacher_mass_N: The teacher's mass on its K entries; 1 where all count.
    """

    loss: Tensor
    divergence_N: Tensor
    cross_entropy_N: Tensor
    kl_N: Tensor
    top1_agreement_N: Tensor
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    teacher_mass_N: Tensor


@torch.compiler.disable  # it takes its own gradient
def fused_distillation_loss(
    hidden_ND: Tensor,
    head: Head,
    teacher: Teacher,
    labels_N: Tensor,
    loss: DistillationLoss,
    *,
    distillation_weight: float = 1.0,
    crossentropy_weight: float = 0.0,
    weight_N: Tensor | float = 1.0,
    full_kl: bool = True,
    rows: int | None = None,
    block: int | None = None,
) -> FusedLosses:
    """The loss of N predictions from the student's hidden states; gradients are taken here, not in `backward`.

    Float32 throughout (float64 stays), also where inputs are bfloat16: there a GPU multiplies in bfloat16 and adds up
    in float32, a CPU multiplies a float32 copy of the head. The gradient of the head adds up in float32 over all
    chunks. Ids that only one of the two vocabularies has, which pad it, are left out of the divergence.

    `backward` can be called once. Under `torch.no_grad`, and for a frozen head or frozen hidden states, the work for
    the gradient that nobody wants is not done. N = 0 gives 0 with a graph.

    Args:
        hidden_ND: `[N, D]`, what the student's head would be given.
        head: The student's head.
        teacher: The teacher's answer to the same predictions.
        labels_N: Ids, -100 for no cross-entropy.
        loss: The divergence.
        distillation_weight: Of the divergence.
        crossentropy_weight: Of the cross-entropy.
        weight_N: `[N]` or one number: what a token's loss counts in the sum, such as one over the number of predictions
            of the whole optimizer step.
        full_kl: Whether `kl_N` is wanted where it is not the loss; it costs a few per cent of the time.
        rows: R; None chooses it from the shapes, see `chunk_rows`.
        block: How many of them are turned into gradients at once; None likewise, see `block_rows`.

    Raises:
        ValueError: A loss that the teacher's answer does not suffice for, or shapes that do not fit.
    """
    check_signals(len(hidden_ND), len(head.weight_VD), teacher, labels_N, loss)
    shared = min(head.weight_VD.shape[0], teacher_vocabulary(teacher))
    parameters = (hidden_ND, head.weight_VD, head.bias_V)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in parameters]
    weight_N = torch.as_tensor(weight_N, dtype=_accumulator(hidden_ND), device=hidden_ND.device)
    vocabulary, device = head.weight_VD.shape[0], hidden_ND.device
    rows = rows or chunk_rows(len(hidden_ND), vocabulary, device)
    block = block or block_rows(rows, vocabulary, device)
    job = _Job(
        teacher, labels_N, replace(loss, top_k=0 if loss.top_k >= shared else loss.top_k),
        Weights(distillation_weight, crossentropy_weight), weight_N.detach().expand(len(hidden_ND)), full_kl,
        head.scale, head.softcap, shared, rows, block, tuple(wanted),
    )  # fmt: skip
    return FusedLosses(*_FusedHead.apply(*parameters, job))


def chunk_rows(tokens: int, vocabulary: int, device: torch.device) -> int:
    """R: how many rows' logits are held at once, in float32 and once more for the teacher.

    A matrix product wants many rows, memory few. Never fewer than 256: measured on a CPU with 32k and 128k ids, 128
    rows took 1.05 to 1.11 times as long, 64 took 1.19 to 1.28 times, and 512 no less. A CPU takes what 32 MiB hold, a
    GPU what 256 MiB do: there every chunk reads and writes the gradient of the head once (reckoned, not measured).

    Args:
        tokens: N.
        vocabulary: V of the student.
        device: Where the student's head is.
    """
    size = (32 if device.type == "cpu" else 256) * 2**20
    return max(1, min(tokens, max(256, size // (4 * vocabulary))))


def block_rows(rows: int, vocabulary: int, device: torch.device) -> int:
    """How many rows of a chunk are turned from logits into gradients at once.

    What is computed on the way takes four times their size. On a CPU they are what 2 MiB hold, its cache; on a GPU what
    64 MiB do (reckoned, not measured).

    Args:
        rows: R.
        vocabulary: V of the student.
        device: Where the student's head is.
    """
    size = (2 if device.type == "cpu" else 64) * 2**20
    return min(rows, max(1, size // (4 * vocabulary)))


@dataclass(frozen=True)
class _Job:
    """All that the loss depends on besides the tensors that may get a gradient."""

    teacher: Teacher
    labels_N: Tensor
    loss: DistillationLoss
    weights: Weights
    weight_N: Tensor
    full_kl: bool
    scale: float
    softcap: float | None
    shared: int
    rows: int
    block: int
    wanted: tuple[bool, ...]


class _FusedHead(torch.autograd.Function):
    """`(hidden, weight, bias, job) -> (loss, values...)`; the gradients wait in the context."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        values, gradients = _run(hidden_ND, Head(weight_VD, bias_V, job.scale, job.softcap), job)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*values)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor if tensor is None else tensor.dtype for tensor in (hidden_ND, weight_VD, bias_V)]
        loss_N = job.weights.distillation * values.divergence_R + job.weights.crossentropy * values.cross_entropy_R
        return (loss_N * job.weight_N).sum(), *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None
        # In place, for the head's gradient may be large: autograd itself then refuses a second backward.
        gradients = [None if gradient is None else gradient.mul_(grad_loss) for gradient in ctx.saved_tensors]
        return *(g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)), None


def _run(hidden_ND: Tensor, head: Head, job: _Job) -> tuple[RowValues, tuple[Tensor | None, ...]]:
    """All chunks: the values of each token, and the gradients of hidden states, weight and bias."""
    tokens, exact = len(hidden_ND), _accumulator(hidden_ND)
    student, teacher = _Projection(head, hidden_ND, len(head.weight_VD), job.rows), None
    if isinstance(job.teacher, TeacherStates):
        teacher = _Projection(job.teacher.head, job.teacher.hidden_NU, job.shared, job.rows)
    values = RowValues(*(hidden_ND.new_zeros(tokens, dtype=exact) for _ in RowValues._fields))
    grad_hidden, grad_weight, grad_bias = (
        hidden_ND.new_zeros(tensor.shape, dtype=exact) if wanted and tensor is not None else None
        for tensor, wanted in zip((hidden_ND, head.weight_VD, head.bias_V), job.wanted, strict=True)
    )
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for start in range(0, tokens, job.rows):
            stop = min(start + job.rows, tokens)
            logits_RV = student.logits(start, stop)
            teacher_RV = None if teacher is None else teacher.logits(start, stop)
            for first in range(0, stop - start, job.block):
                part = slice(first, min(first + job.block, stop - start))
                where = slice(start + part.start, start + part.stop)
                answers_RV = None if teacher_RV is None else teacher_RV[part]
                for target, value in zip(values, _block(job, where, logits_RV[part], answers_RV), strict=True):
                    target[where] = value
            gradient_RV = logits_RV.to(student.dtype)
            if grad_hidden is not None:
                _multiply(gradient_RV, student.weight_VD, grad_hidden[start:stop])
            if grad_weight is not None:
                _multiply(gradient_RV.t(), student.rows(start, stop), grad_weight, add=True)
            if grad_bias is not None:
                grad_bias += logits_RV.sum(0)
    return values, (grad_hidden, grad_weight, grad_bias)


def _block(job: _Job, where: slice, student_RV: Tensor, teacher_RV: Tensor | None) -> RowValues:
    """One block: its values; where gradients are wanted, `student_RV` becomes the one by the head's plain product."""
    weights, labels_R = job.weights if any(job.wanted) else None, job.labels_N[where]
    slope_RV = None
    if weights is not None and job.softcap is not None:
        slope_RV = (student_RV / job.softcap).square_().neg_().add_(1)
    if isinstance(job.teacher, TeacherTopK):
        plain, soft = job.teacher.entries(where, job.loss.top_k)
        values = top_k_rows(student_RV, plain, soft, job.shared, labels_R, job.loss, weights)
    else:
        if isinstance(job.teacher, TeacherLogits):
            given_RV = job.teacher.logits_NV[where, : job.shared].detach()
            teacher_RV = given_RV.to(student_RV.dtype, copy=True).clamp_(min=RULED_OUT)
        assert teacher_RV is not None
        rows = live_top_k_rows if job.loss.top_k else full_rows
        values = rows(student_RV, teacher_RV, labels_R, job.loss, weights, job.full_kl)
    if weights is not None:
        student_RV.mul_((job.weight_N[where] * job.scale).unsqueeze(-1))
        if slope_RV is not None:
            student_RV.mul_(slope_RV)
    return values


class _Projection:
    """Hidden states times a head, chunk by chunk, into one buffer."""

    def __init__(self, head: Head, hidden_ND: Tensor, vocabulary: int, rows: int) -> None:
        exact = _accumulator(hidden_ND)
        self.dtype = torch.bfloat16 if hidden_ND.is_cuda and _computes_in(hidden_ND) == torch.bfloat16 else exact
        self.weight_VD = head.weight_VD.detach()[:vocabulary].to(self.dtype)
        self._bias_V = head.bias_V
        if head.bias_V is not None:
            self._bias_V = head.bias_V.detach()[:vocabulary].to(exact).clamp(min=RULED_OUT)
        self._head, self._hidden_ND = head, hidden_ND.detach()
        self._buffer_RV = hidden_ND.new_empty(min(rows, len(hidden_ND)), vocabulary, dtype=exact)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._hidden_ND[start:stop].to(self.dtype)

    def logits(self, start: int, stop: int) -> Tensor:
        """Of some rows, `[R, V]`; the next call overwrites them."""
        logits_RV = self._buffer_RV[: stop - start]
        _multiply(self.rows(start, stop), self.weight_VD.t(), logits_RV)
        if self._bias_V is not None:
            logits_RV.add_(self._bias_V)
        if self._head.scale != 1.0:
            logits_RV.mul_(self._head.scale)
        if self._head.softcap is not None:
            logits_RV.div_(self._head.softcap).tanh_().mul_(self._head.softcap)
        return logits_RV


def _multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """`out = left @ right`, or `out +=`; bfloat16 factors (on a GPU) are added up and left in float32."""
    if left.dtype == out.dtype:
        out.addmm_(left, right) if add else torch.mm(left, right, out=out)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _computes_in(tensor: Tensor) -> torch.dtype:
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
