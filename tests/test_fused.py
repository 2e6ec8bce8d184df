"""The fused loss over hidden states equals the loss on logits, whose own reference is in test_losses, in every form."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILY_NAMES, tiny_batch, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from slimmoe_hf import fused
from slimmoe_hf.cache_writer import top_k_answers
from slimmoe_hf.fused import FusedLosses, chunk_rows, fused_distillation_loss
from slimmoe_hf.losses import DistillationLoss, TokenLosses
from slimmoe_hf.signals import Head, Teacher, TeacherLogits, TeacherStates, TeacherTopK

N, D, U, V = 11, 6, 5, 29
WEIGHTS = {"distillation_weight": 1.3, "crossentropy_weight": 0.7}
SETTINGS = [
    *(DistillationLoss(0.0, t, k, tail) for t in (1.0, 2.5) for k, tail in ((0, True), (4, True), (4, False))),
    *(DistillationLoss(beta, t) for beta in (0.1, 0.5, 1.0) for t in (1.0, 0.7)),
]
HEADS = {"plain": {}, "bias": {"bias": True}, "all": {"bias": True, "scale": 0.5, "softcap": 3.0}}


class Case:
    """Hidden states, heads, labels and token weights of N predictions, all random."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, teacher_ids: int = V, bias: bool = False, tokens: int = N,
        scale: float = 1.0, softcap: float | None = None,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(3)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = normal(tokens, D).requires_grad_(), normal(V, D).requires_grad_()
        self.bias = normal(V).requires_grad_() if bias else None
        self.head = Head(self.weight, self.bias, scale, softcap)
        own_bias = normal(teacher_ids) if bias else None
        self.states = TeacherStates(normal(tokens, U), Head(normal(teacher_ids, U), own_bias, scale, softcap))
        self.labels = torch.randint(V, (tokens,), generator=generator)
        self.labels[::4] = -100
        self.token_weights = torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.1

    @property
    def trained(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]

    def teacher_logits(self) -> Tensor:
        return plain_logits(self.states.hidden_NU, self.states.head)

    def cached(self, loss: DistillationLoss, extra: int = 3) -> TeacherTopK:
        """As a cache has it: a few entries more than are asked for, the tail at the temperature of the loss."""
        logits = self.teacher_logits()
        log_probs = logits.log_softmax(-1)
        kept, index = log_probs.topk(min(loss.top_k + extra if loss.top_k else V, log_probs.shape[-1]))
        outside = log_probs.scatter(-1, index, -torch.inf) / loss.temperature
        return TeacherTopK(kept, index, outside.logsumexp(-1), logits.shape[-1], loss.temperature)

    def fused(self, loss: DistillationLoss, teacher: Teacher | None = None, **settings: Any) -> FusedLosses:
        settings = {**WEIGHTS, "weight_N": self.token_weights, **settings}
        return fused_distillation_loss(self.hidden, self.head, teacher or self.states, self.labels, loss, **settings)

    def reference(self, loss: DistillationLoss) -> tuple[Tensor, TokenLosses, list[Tensor]]:
        """Loss, values and gradients from float64 logits."""
        student = plain_logits(self.hidden, self.head)
        losses = loss(student, self.teacher_logits(), self.labels)
        loss_N = WEIGHTS["distillation_weight"] * losses.divergence_N
        total = ((loss_N + WEIGHTS["crossentropy_weight"] * losses.cross_entropy_N) * self.token_weights).sum()
        return total, losses, list(torch.autograd.grad(total, self.trained))


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden.double() @ head.weight_VD.double().T
    logits = (logits if head.bias_V is None else logits + head.bias_V.double()) * head.scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def assert_close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest number, for a gradient's small entries are differences of large ones."""
    limit = tolerance * max(float(expected.detach().abs().max()), 1e-3)
    torch.testing.assert_close(ours.detach().double(), expected.detach().double(), rtol=0, atol=limit)


def assert_equals_reference(case: Case, losses: FusedLosses, loss: DistillationLoss, tolerance: float) -> None:
    total, values, gradients = case.reference(loss)
    assert_close(losses.loss, total, tolerance)
    assert_close(losses.divergence_N, values.divergence_N, tolerance)
    assert_close(losses.cross_entropy_N, values.cross_entropy_N, tolerance)
    assert torch.equal(losses.top1_agreement_N.double(), values.top1_agreement_N.double())
    for ours, expected in zip(torch.autograd.grad(losses.loss, case.trained), gradients, strict=True):
        assert_close(ours, expected, tolerance)


@pytest.mark.parametrize("loss", SETTINGS, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("rows", [1, 4, None])
def test_live_teacher_equals_the_loss_on_logits(
    loss: DistillationLoss, head: str, dtype: torch.dtype, tolerance: float, rows: int | None
) -> None:
    case = Case(dtype, **HEADS[head])
    losses = case.fused(loss, rows=rows)
    assert_equals_reference(case, losses, loss, tolerance)
    assert_close(losses.kl_N, case.reference(loss)[1].kl_N, tolerance)


@pytest.mark.parametrize("loss", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_given_logits_equal_the_teacher_that_makes_them(loss: DistillationLoss, dtype: torch.dtype) -> None:
    case = Case(dtype, **HEADS["all"])
    logits = case.teacher_logits().to(dtype)
    before = logits.clone()
    assert_equals_reference(case, case.fused(loss, TeacherLogits(logits), rows=4), loss, 1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("loss", [loss for loss in SETTINGS if loss.beta == 0.0], ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [1, 4, None])
def test_cached_top_k_equals_the_live_teacher(loss: DistillationLoss, head: str, rows: int | None) -> None:
    """Also where the cache has more entries than are asked for, and where it has them all (`top_k=0`)."""
    case = Case(**HEADS[head])
    assert_equals_reference(case, case.fused(loss, case.cached(loss), rows=rows), loss, 1e-5)


@pytest.mark.parametrize("teacher_ids", [V - 6, V + 6], ids=["student padded", "teacher padded"])
@pytest.mark.parametrize("loss", SETTINGS, ids=str)
def test_padded_vocabularies_are_compared_on_shared_ids_and_the_student_answers_for_its_own(
    loss: DistillationLoss, teacher_ids: int
) -> None:
    case = Case(teacher_ids=teacher_ids, **HEADS["all"])
    assert_equals_reference(case, case.fused(loss, rows=4), loss, 1e-12)
    if loss.beta == 0.0 and teacher_ids < V:
        assert_equals_reference(case, case.fused(loss, case.cached(loss), rows=4), loss, 1e-5)


@pytest.mark.parametrize("loss", SETTINGS, ids=str)
def test_gradients_equal_finite_differences(loss: DistillationLoss) -> None:
    case = Case(**HEADS["all"], tokens=3)

    def value(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return Again.apply(hidden, weight, bias, lambda *trained: run(case, loss, *trained))

    assert torch.autograd.gradcheck(value, case.trained, fast_mode=True)


def run(case: Case, loss: DistillationLoss, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    head = Head(weight, bias, case.head.scale, case.head.softcap)
    settings = {**WEIGHTS, "weight_N": case.token_weights, "rows": 2}
    return fused_distillation_loss(hidden, head, case.states, case.labels, loss, **settings).loss


class Again(torch.autograd.Function):
    """Computes anew in every backward: gradcheck asks for several, of which the fused loss grants one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, function: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.function = function
        return function(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            return *torch.autograd.grad(ctx.function(*tensors), tensors, grad), None


@pytest.mark.parametrize("loss", SETTINGS, ids=str)
def test_bfloat16_inputs_are_computed_and_added_up_in_float32(loss: DistillationLoss) -> None:
    """The gradient of the head, out of as many chunks as tokens, is off by its own last rounding only (2^-9)."""
    case = Case(torch.bfloat16, **HEADS["bias"])
    losses = case.fused(loss, rows=1)
    total, _, gradients = case.reference(loss)
    assert losses.loss.dtype == torch.float32
    assert_close(losses.loss, total, 1e-5)
    for ours, expected in zip(torch.autograd.grad(losses.loss, case.trained), gradients, strict=True):
        assert ours.dtype == torch.bfloat16
        limit = 2.0**-8 * expected.abs() + 1e-5 * expected.abs().max()
        assert ((ours.double() - expected.double()).abs() <= limit).all()


@pytest.mark.parametrize("cached", [False, True])
def test_autocast_changes_nothing_on_a_cpu(cached: bool) -> None:
    case, loss = Case(torch.float32, **HEADS["all"]), DistillationLoss()
    teacher = case.cached(loss) if cached else None
    with torch.autocast("cpu", torch.bfloat16):
        losses = case.fused(loss, teacher)
    assert_equals_reference(case, losses, loss, 1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_reported_values_are_what_they_are_called(cached: bool) -> None:
    """Entropies of the student and of the teacher, and the teacher's mass on what is compared."""
    case, loss = Case(**HEADS["all"]), DistillationLoss(top_k=4)
    losses = case.fused(loss, case.cached(loss, extra=0) if cached else None)
    p = case.teacher_logits().softmax(-1)
    s = plain_logits(case.hidden, case.head).softmax(-1)
    kept = p.topk(4).values
    merged = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1) if cached else p
    tolerance = 1e-5 if cached else 1e-12
    assert_close(losses.student_entropy_N, -(s * s.log()).sum(-1), tolerance)
    assert_close(losses.teacher_entropy_N, -(merged * merged.log()).sum(-1), tolerance)
    assert_close(losses.teacher_mass_N, kept.sum(-1), tolerance)
    assert not any(value.requires_grad for value in losses[1:])


@pytest.mark.parametrize("loss", [DistillationLoss(beta=0.5), DistillationLoss(temperature=2.0)], ids=str)
def test_sparing_the_reported_kl_changes_no_loss(loss: DistillationLoss) -> None:
    case = Case()
    whole, spared = case.fused(loss), case.fused(loss, full_kl=False)
    assert torch.equal(whole.loss, spared.loss)
    assert whole.kl_N.isfinite().all()
    if loss.temperature != 1.0:
        assert spared.kl_N.isnan().all()


class Watch(TorchDispatchMode):
    """Counts matrix products, and the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("loss", SETTINGS, ids=str)
def test_no_tensor_is_larger_than_a_chunk_of_logits(loss: DistillationLoss) -> None:
    case = Case(**HEADS["all"], tokens=200)
    for teacher in (None, *([case.cached(loss)] if loss.beta == 0.0 and loss.top_k else ())):
        with Watch() as watch:
            case.fused(loss, teacher, rows=50).loss.backward()
        assert watch.largest == 50 * V


@pytest.mark.parametrize(
    ("trained", "products"), [(("hidden", "weight"), 4), (("hidden",), 3), (("weight",), 3), ((), 2)], ids=str
)
def test_gradients_that_nobody_wants_are_not_computed(trained: tuple[str, ...], products: int) -> None:
    case = Case()
    case.hidden.requires_grad_("hidden" in trained)
    case.weight.requires_grad_("weight" in trained)
    expected = case.fused(DistillationLoss()).loss.detach()
    with Watch() as watch:
        losses = case.fused(DistillationLoss(), rows=N)
    assert watch.products == products
    assert torch.equal(losses.loss.detach(), expected)
    assert losses.loss.requires_grad == bool(trained)
    if trained:
        losses.loss.backward()
        assert (case.hidden.grad is not None, case.weight.grad is not None) == (
            "hidden" in trained,
            "weight" in trained,
        )


def test_without_grad_mode_nothing_is_recorded() -> None:
    case = Case()
    with torch.no_grad(), Watch() as watch:
        losses = case.fused(DistillationLoss(), rows=N)
    assert watch.products == 2
    assert not losses.loss.requires_grad


def test_a_scaled_loss_scales_the_gradient_and_a_second_backward_is_refused() -> None:
    """A loss scaler, or a caller that divides once more."""
    case = Case(**HEADS["bias"])
    expected = case.reference(DistillationLoss())[2]
    loss = case.fused(DistillationLoss()).loss * 1024.0
    for ours, reference in zip(torch.autograd.grad(loss, case.trained, retain_graph=True), expected, strict=True):
        assert_close(ours, reference * 1024.0, 1e-12)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, case.trained)


# What others got wrong.


def test_micro_batches_of_unequal_length_add_up_to_the_whole_batch() -> None:
    """Weights of one over all predictions; a mean over each micro-batch's own would not add up."""
    case = Case()
    sizes = (1, 7, 3)

    def gradient(cut: tuple[int, ...], weight: Callable[[int], float]) -> Tensor:
        parts = zip(case.hidden.split(cut), case.states.hidden_NU.split(cut), case.labels.split(cut), cut, strict=True)
        losses = [
            fused_distillation_loss(
                hidden, case.head, TeacherStates(teacher, case.states.head), labels, DistillationLoss(),
                weight_N=weight(size), **WEIGHTS,
            ).loss
            for hidden, teacher, labels, size in parts
        ]  # fmt: skip
        return torch.autograd.grad(torch.stack(losses).sum(), case.weight)[0]

    whole = gradient((N,), lambda _: 1 / N)
    assert_close(gradient(sizes, lambda _: 1 / N), whole, 1e-12)
    local_means = gradient(sizes, lambda size: 1 / size)
    assert (local_means - whole).abs().max() > whole.abs().max()


def test_two_processes_whose_gradients_are_averaged_get_that_of_one() -> None:
    """The mean over processes halves a sum that is already divided by the global count: the weight makes it good."""
    case, halves = Case(), (slice(0, 4), slice(4, N))
    losses = [
        fused_distillation_loss(
            case.hidden[half], case.head, TeacherStates(case.states.hidden_NU[half], case.states.head),
            case.labels[half], DistillationLoss(), weight_N=2 / N,
        ).loss
        for half in halves
    ]  # fmt: skip
    mean = sum(torch.autograd.grad(loss, case.weight)[0] for loss in losses) / 2
    whole = case.fused(DistillationLoss(), weight_N=1 / N, distillation_weight=1.0, crossentropy_weight=0.0).loss
    assert_close(mean, torch.autograd.grad(whole, case.weight)[0], 1e-12)


@pytest.mark.parametrize("cached", [False, True])
def test_no_valid_token_keeps_the_graph(cached: bool) -> None:
    """Zero, not NaN, and gradients of zero everywhere: a process without predictions still takes part."""
    case = Case(**HEADS["bias"], tokens=0)
    teacher = TeacherTopK(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int), torch.zeros(0), V) if cached else None
    losses = case.fused(DistillationLoss(), teacher)
    losses.loss.backward()
    assert losses.loss.item() == 0.0
    assert all(not tensor.grad.any() for tensor in case.trained)
    assert case.hidden.grad.shape == (0, D)


def test_a_token_of_weight_zero_teaches_nothing() -> None:
    case = Case()
    case.token_weights[2:5] = 0.0
    assert_equals_reference(case, case.fused(DistillationLoss(), rows=4), DistillationLoss(), 1e-12)
    (gradient,) = torch.autograd.grad(case.fused(DistillationLoss()).loss, case.hidden)
    assert not gradient[2:5].any()


def student_at_the_teacher(top_k: int, dtype: torch.dtype) -> tuple[Case, TeacherTopK]:
    """A student with the teacher's own weights, and the teacher's answers as a cache has them in `dtype`."""
    case = Case()
    case.states = TeacherStates(case.hidden.detach(), Head(case.weight.detach()))
    answers = top_k_answers(case.teacher_logits(), case.labels.clamp(min=0), top_k)
    parts = (answers["log_probs"].to(dtype), answers["indices"], answers["log_tail"][:, 0].to(dtype))
    return case, TeacherTopK(*parts, V)


def test_the_tail_keeps_the_optimum_at_the_teacher_and_without_it_the_head_is_inflated() -> None:
    case, cached = student_at_the_teacher(4, torch.float32)
    plain = {"distillation_weight": 1.0, "crossentropy_weight": 0.0, "weight_N": 1.0}
    with_tail, without = (
        torch.autograd.grad(case.fused(DistillationLoss(top_k=4, add_tail=tail), cached, **plain).loss, case.hidden)[0]
        for tail in (True, False)
    )
    assert with_tail.abs().max() < 1e-6
    lower = case.hidden.detach() - 0.1 * without
    kept = (lower @ case.weight.detach().T).softmax(-1).gather(-1, cached.index_NK.long()).sum(-1)
    assert (kept > cached.log_probs_NK.exp().sum(-1) + 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_answers_stay_a_distribution(dtype: torch.dtype) -> None:
    """Entries and tail are scaled to sum to 1: no divergence is negative, as rounded masses alone would make it."""
    case, cached = student_at_the_teacher(20, dtype)
    total = cached.log_probs_NK.double().exp().sum(-1) + cached.log_tail_N.double().exp()
    assert (total - 1).abs().max() > 1e-5
    assert (case.fused(DistillationLoss(), cached).divergence_N >= -1e-7).all()


def test_float16_keeps_log_probabilities_better_than_bfloat16() -> None:
    """By the factor of its three more bits of mantissa, 8."""
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        case, cached = student_at_the_teacher(V, dtype)
        exact = student_at_the_teacher(V, torch.float64)[1]
        case.hidden = (case.hidden.detach() * 0.5).requires_grad_()
        ours, expected = (case.fused(DistillationLoss(), teacher).divergence_N for teacher in (cached, exact))
        errors[dtype] = float((ours - expected).abs().max())
    assert errors[torch.float16] < 0.002
    assert errors[torch.bfloat16] > 4 * errors[torch.float16]


@pytest.mark.parametrize("in_the_top", [True, False])
def test_a_kept_label_is_one_entry_of_the_teacher_and_the_label_of_the_cross_entropy(in_the_top: bool) -> None:
    """The writer puts the next token in the last place where it is none of the likeliest."""
    case, loss = Case(), DistillationLoss()
    logits = case.teacher_logits()
    case.labels = logits.argmax(-1) if in_the_top else logits.argmin(-1)
    answers = top_k_answers(logits, case.labels, 4)
    cached = TeacherTopK(answers["log_probs"], answers["indices"], answers["log_tail"][:, 0], V)
    losses = case.fused(loss, cached, rows=4)
    p, log_s = logits.softmax(-1), plain_logits(case.hidden, case.head).log_softmax(-1)
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(-1, answers["indices"], True)
    inside = (p * (p.log() - log_s)).masked_fill(~chosen, 0).sum(-1)
    rest_p, rest_s = (probs.masked_fill(chosen, 0).sum(-1) for probs in (p, log_s.exp()))
    expected = inside + rest_p * (rest_p / rest_s).log()
    label_loss = -log_s.gather(-1, case.labels[:, None]).squeeze(-1)
    assert_close(losses.divergence_N, expected, 1e-5)
    assert_close(losses.cross_entropy_N, label_loss, 1e-12)
    total = ((WEIGHTS["distillation_weight"] * expected + 0.7 * label_loss) * case.token_weights).sum()
    for ours, reference in zip(
        *(torch.autograd.grad(each, case.trained) for each in (losses.loss, total)), strict=True
    ):
        assert_close(ours, reference, 1e-5)


REFUSED = {
    "beta=0.5 weighs by the student, so it needs the teacher's probability of every token": DistillationLoss(0.5),
    "beta=1.0 weighs by the student": DistillationLoss(1.0),
    "temperature=2.0, but this teacher cache serves 1.0: what it left out cannot be tempered": DistillationLoss(0, 2.0),
    "top_k=9, but this teacher cache has 8 tokens": DistillationLoss(top_k=9),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_top_k_cache_cannot_answer_is_refused(message: str) -> None:
    case = Case()
    with pytest.raises(ValueError, match=re.escape(message)):
        case.fused(REFUSED[message], case.cached(DistillationLoss(top_k=8), extra=0))


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = Case()
    with pytest.raises(ValueError, match=f"{N} hidden states, {N} labels, {N - 1} answers of the teacher"):
        case.fused(DistillationLoss(), TeacherStates(case.states.hidden_NU[1:], case.states.head))
    with pytest.raises(ValueError, match=f"answers over {V + 6} ids and the student has {V}"):
        case.fused(DistillationLoss(), Case(teacher_ids=V + 6).cached(DistillationLoss(top_k=4)))
    with pytest.raises(ValueError, match=r"top_k=4 with beta=0\.5"):
        case.fused(DistillationLoss(0.5, top_k=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", SETTINGS, ids=str)
@pytest.mark.parametrize("gap", [50.0, 1e4])
def test_extreme_logits_stay_finite(dtype: torch.dtype, loss: DistillationLoss, gap: float) -> None:
    """A teacher, a student, or both, whose whole mass sits on one token; as a cache too."""
    flat, peak = torch.zeros(1, V, dtype=dtype), torch.zeros(1, V, dtype=dtype)
    peak[0, 2] = gap
    label = torch.tensor([5])
    for student, teacher in ((flat, peak), (peak, flat), (peak, peak), (peak, -peak)):
        answers = top_k_answers(teacher, label, max(loss.top_k, 2), (loss.temperature,))
        cached = TeacherTopK(answers["log_probs"], answers["indices"], answers["log_tail"][:, 0], V, loss.temperature)
        for signal in (TeacherLogits(teacher), *([cached] if loss.beta == 0.0 else ())):
            bias = student[0].clone().requires_grad_()
            head = Head(torch.zeros(V, 1, dtype=dtype), bias)
            losses = fused_distillation_loss(torch.ones(1, 1, dtype=dtype), head, signal, label, loss, **WEIGHTS)
            losses.loss.backward()
            assert losses.loss.isfinite()
            assert bias.grad.isfinite().all()


@pytest.mark.parametrize("loss", [loss for loss in SETTINGS if loss.beta == 0.0], ids=str)
def test_tokens_that_the_teacher_rules_out_cost_nothing(loss: DistillationLoss) -> None:
    case = Case()
    logits = case.teacher_logits()
    logits[:, 3:] = -torch.inf
    expected = loss(plain_logits(case.hidden, case.head), logits, case.labels).divergence_N
    losses = case.fused(loss, TeacherLogits(logits))
    assert_close(losses.divergence_N, expected, 1e-12)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(losses.loss, case.trained))


# The head of a model.


@pytest.mark.parametrize("family", [*FAMILY_NAMES, "gemma2", "cohere", "granitemoe"])
def test_the_head_of_a_model_makes_its_logits(family: str) -> None:
    if family in FAMILY_NAMES:
        model = tiny_model(family)
    else:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
            intermediate_size=32, vocab_size=320, pad_token_id=0, bos_token_id=0, eos_token_id=0,
            **({"logits_scaling": 3.0} if family == "granitemoe" else {}),
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).eval()
        model.get_output_embeddings().weight.data.mul_(20 / model.get_output_embeddings().weight.std())
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, given, _out: seen.append(given[0]))
    with torch.no_grad():
        logits = model(input_ids=tiny_batch(1, 8)["input_ids"]).logits[0]
    hook.remove()
    head = Head.of(model)
    torch.testing.assert_close(plain_logits(seen[0][0], head).float(), logits, rtol=1e-5, atol=1e-4)
    given = fused_distillation_loss(
        seen[0][0], head, TeacherLogits(logits), torch.zeros(8, dtype=torch.long), DistillationLoss()
    )
    assert given.kl_N.abs().max() < 1e-5


def test_an_adapter_on_the_head_is_refused_and_elsewhere_is_none_of_its_business() -> None:
    model = tiny_model("phimoe")
    beside = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).get_base_model()
    assert Head.of(beside).weight_VD is model.get_output_embeddings().weight
    adapted = get_peft_model(tiny_model("phimoe"), LoraConfig(target_modules=["lm_head"])).get_base_model()
    with pytest.raises(ValueError, match=r"only a plain nn\.Linear can be fused with the loss"):
        Head.of(adapted)


def test_a_frozen_head_lets_the_gradient_through() -> None:
    """As under LoRA: the hidden states learn, the head does not."""
    case = Case()
    expected = case.reference(DistillationLoss())[2][0]
    case.weight.requires_grad_(False)
    case.fused(DistillationLoss()).loss.backward()
    assert_close(case.hidden.grad, expected, 1e-12)
    assert case.weight.grad is None


# Sizes.


def test_chunks_grow_with_memory_and_never_beyond_the_tokens() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert chunk_rows(4096, 32_768, cpu) == 256  # 32 MiB
    assert chunk_rows(2048, 131_072, cpu) == 256  # 128 MiB: the least
    assert chunk_rows(100, 32_768, cpu) == 100
    assert chunk_rows(0, 32_768, cpu) == 1
    assert chunk_rows(8192, 131_072, gpu) == 512  # 256 MiB


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_blocks_of_a_chunk_do_not_show(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, loss = Case(**HEADS["all"]), DistillationLoss(beta=0.5)
    monkeypatch.setattr(fused, "block_rows", lambda *_: rows)
    assert_equals_reference(case, case.fused(loss, rows=7), loss, 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", SETTINGS, ids=str)
def test_bfloat16_on_a_gpu_is_added_up_in_float32(loss: DistillationLoss) -> None:
    """Products of bfloat16 are exact in float32; the gradient by the logits is rounded to bfloat16 once (2^-9)."""
    case = Case(torch.bfloat16, **HEADS["bias"], tokens=64)
    total, _, gradients = case.reference(loss)
    head, teacher = Head(case.weight.cuda(), case.bias.cuda()), case.states.head
    states = TeacherStates(case.states.hidden_NU.cuda(), Head(teacher.weight_VD.cuda(), teacher.bias_V.cuda()))
    settings = {**WEIGHTS, "weight_N": case.token_weights.cuda(), "rows": 16}
    losses = fused_distillation_loss(case.hidden.cuda(), head, states, case.labels.cuda(), loss, **settings)
    assert math.isclose(losses.loss.item(), total.item(), rel_tol=1e-4)
    for ours, expected in zip(torch.autograd.grad(losses.loss, case.trained), gradients, strict=True):
        assert_close(ours.cpu(), expected, 2e-2)
