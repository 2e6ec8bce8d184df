"""The losses equal a float64 reference written from the formulas, in value and in gradient, for every setting."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from slimmoe_hf.losses import (
    DistillationLoss,
    cross_entropy,
    distillation_divergence,
    forward_kl,
    load_balancing_loss,
    shared_vocabulary,
    top1_agreement,
)

N, V = 7, 13


def logits(seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(N, V, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def softmax(row: list[Tensor]) -> list[Tensor]:
    total = sum(value.exp() for value in row)
    return [value.exp() / total for value in row]


def naive_divergence(student: Tensor, teacher: Tensor, beta: float, t: float, top_k: int, add_tail: bool) -> Tensor:
    """Sums over probabilities, one token and one entry at a time."""
    values = []
    for student_row, teacher_row in zip(student, teacher, strict=True):
        s, p = softmax([x / t for x in student_row]), softmax([x / t for x in teacher_row])
        kept = sorted(range(V), key=lambda i: -float(p[i]))[: top_k or V]
        if beta == 0.0:
            value = sum(p[i] * (p[i] / s[i]).log() for i in kept)
            if top_k and add_tail:
                rest_p, rest_s = 1 - sum(p[i] for i in kept), 1 - sum(s[i] for i in kept)
                value = value + rest_p * (rest_p / rest_s).log()
        elif beta == 1.0:
            value = sum(s[i] * (s[i] / p[i]).log() for i in range(V))
        else:
            m = [beta * p[i] + (1 - beta) * s[i] for i in range(V)]
            value = sum(beta * p[i] * (p[i] / m[i]).log() + (1 - beta) * s[i] * (s[i] / m[i]).log() for i in range(V))
        values.append(t * t * value)
    return torch.stack(values)


SETTINGS = [
    *((0.0, t, k, tail) for t in (1.0, 2.5) for k, tail in ((0, True), (1, True), (4, True), (4, False), (8, False))),
    *((beta, t, 0, True) for beta in (0.1, 0.5, 0.9, 1.0) for t in (1.0, 0.7)),
]


@pytest.mark.parametrize(("beta", "temperature", "top_k", "add_tail"), SETTINGS)
@pytest.mark.parametrize("masked", [(), (0, 3, 6), tuple(range(N))], ids=["all", "some", "none"])
def test_divergence_and_gradient_equal_the_reference(
    beta: float, temperature: float, top_k: int, add_tail: bool, masked: tuple[int, ...]
) -> None:
    student, teacher = logits()
    counts = torch.tensor([index not in masked for index in range(N)])
    weights = torch.linspace(0.5, 1.5, N, dtype=torch.float64)[counts]
    ours = distillation_divergence(
        student[counts], teacher[counts], beta=beta, temperature=temperature, top_k=top_k, add_tail=add_tail
    )
    (gradient,) = torch.autograd.grad((ours * weights).sum(), student)
    if len(masked) == N:
        assert ours.shape == (0,)
        assert torch.equal(gradient, torch.zeros_like(gradient))  # a graph with nothing to say, not no graph
        return
    reference = naive_divergence(student[counts], teacher[counts], beta, temperature, top_k, add_tail)
    (expected,) = torch.autograd.grad((reference * weights).sum(), student)
    torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("beta", "temperature", "top_k", "add_tail"), SETTINGS[::3])
def test_low_precision_logits_are_computed_in_float32(
    dtype: torch.dtype, beta: float, temperature: float, top_k: int, add_tail: bool
) -> None:
    student, teacher = logits(dtype=dtype)
    ours = distillation_divergence(student, teacher, beta=beta, temperature=temperature, top_k=top_k, add_tail=add_tail)
    reference = naive_divergence(student.double(), teacher.double(), beta, temperature, top_k, add_tail)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), reference, rtol=2e-5, atol=2e-6)


def test_calibration_gradient_at_the_teacher_is_the_formula_of_the_paper() -> None:
    """-(1-M) p_i on the eight likeliest, M p_i off them (method.md, section 1)."""
    student, _ = logits()
    forward_kl(student, student.detach(), top_k=8, add_tail=False).sum().backward()
    p = student.detach().softmax(-1)
    inside = torch.zeros_like(p).scatter(-1, p.topk(8, dim=-1).indices, 1.0)
    mass = (p * inside).sum(-1, keepdim=True)
    torch.testing.assert_close(student.grad, torch.where(inside.bool(), -(1 - mass) * p, mass * p))


def test_tail_or_full_vocabulary_have_no_gradient_at_the_teacher() -> None:
    for top_k in (0, 8):
        student, _ = logits()
        forward_kl(student, student.detach(), top_k=top_k).sum().backward()
        assert student.grad.abs().max() < 1e-15


def test_tail_is_a_lower_bound_of_the_full_divergence() -> None:
    student, teacher = logits()
    assert (forward_kl(student, teacher, top_k=4) <= forward_kl(student, teacher)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("beta", "top_k"), [(0.0, 0), (0.0, 4), (0.5, 0), (1.0, 0)])
@pytest.mark.parametrize("gap", [50.0, 1e4])
def test_extreme_logits_stay_finite(dtype: torch.dtype, beta: float, top_k: int, gap: float) -> None:
    """M or S -> 1: a teacher (then a student, then both) whose whole mass sits on one token."""
    flat, peak = torch.zeros(1, V, dtype=dtype), torch.zeros(1, V, dtype=dtype)
    peak[0, 2] = gap
    for student, teacher in ((flat, peak), (peak, flat), (peak, peak), (peak, -peak)):
        student = student.clone().requires_grad_()
        value = distillation_divergence(student, teacher, beta=beta, top_k=top_k)
        value.sum().backward()
        assert value.isfinite().all()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [0, 4])
def test_tokens_that_the_teacher_rules_out_cost_nothing(top_k: int) -> None:
    student, teacher = logits()
    teacher[:, 5:] = -torch.inf
    value = forward_kl(student, teacher, top_k=top_k)
    value.sum().backward()
    inside = naive_divergence(student.detach(), teacher.clamp(min=-700), 0.0, 1.0, top_k, True)
    torch.testing.assert_close(value.detach(), inside)
    assert student.grad.isfinite().all()


def test_top_k_of_another_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k=4 with beta=0.5"):
        distillation_divergence(*logits(), beta=0.5, top_k=4)


def test_teacher_gets_no_gradient() -> None:
    student, teacher = logits()
    teacher.requires_grad_()
    forward_kl(student, teacher).sum().backward()
    assert teacher.grad is None


def test_cross_entropy_equals_the_reference_and_is_zero_where_masked() -> None:
    student, _ = logits()
    labels = torch.tensor([3, -100, 0, 12, -100, 5, 1])
    expected = [0.0] * N
    for index in labels.ge(0).nonzero().flatten().tolist():
        expected[index] = -math.log(softmax(list(student.detach()[index]))[labels[index]])
    torch.testing.assert_close(cross_entropy(student, labels).tolist(), expected)


@pytest.mark.parametrize("loss", [DistillationLoss(), DistillationLoss(beta=0.5), DistillationLoss(temperature=3.0)])
def test_reported_kl_does_not_depend_on_the_settings(loss: DistillationLoss) -> None:
    student, teacher = logits()
    losses = loss(student, teacher, torch.zeros(N, dtype=torch.long))
    torch.testing.assert_close(losses.kl_N, naive_divergence(student, teacher, 0.0, 1.0, 0, True).detach())
    assert not losses.kl_N.requires_grad


def test_padded_vocabularies_are_compared_on_shared_ids_and_the_student_answers_for_its_own() -> None:
    student, teacher = logits()
    labels = torch.arange(N)
    losses = DistillationLoss()(student, teacher[:, :10], labels)
    torch.testing.assert_close(losses.kl_N, forward_kl(student[:, :10], teacher[:, :10]).detach())
    torch.testing.assert_close(losses.cross_entropy_N, cross_entropy(student, labels))


def test_top1_agreement_counts_equal_first_choices() -> None:
    student, teacher = torch.eye(3), torch.tensor([[2.0, 0, 0], [2.0, 0, 0], [0, 0, 2.0]])
    assert top1_agreement(student, teacher).tolist() == [1.0, 0.0, 1.0]


def test_shared_vocabulary_cuts_padding_and_refuses_missing_tokens() -> None:
    assert shared_vocabulary(320, 384, 300) == 320
    with pytest.raises(ValueError, match=r"student has 320 ids, the teacher 256, and the tokenizer emits 300"):
        shared_vocabulary(320, 256, 300)


def router_logits(layers: int, experts: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(10, experts, generator=generator, dtype=torch.float64) for _ in range(layers)]


def test_load_balancing_loss_equals_the_equations_of_switch() -> None:
    """alpha-free eq. 4: E * sum_i f_i P_i, f from top-2 choices, the two padded tokens left out."""
    layers, mask = router_logits(3), torch.tensor([1] * 8 + [0] * 2)
    expected = []
    for layer in layers:
        rows = [softmax(list(row)) for row in layer[:8]]
        chosen = [sorted(range(6), key=lambda i: -float(row[i]))[:2] for row in rows]
        f = [sum(i in pair for pair in chosen) / 8 for i in range(6)]
        probability = [float(sum(row[i] for row in rows)) / 8 for i in range(6)]
        expected.append(6 * sum(a * b for a, b in zip(f, probability, strict=True)))
    assert float(load_balancing_loss(layers, 2, mask)) == pytest.approx(sum(expected) / 3, rel=1e-12)


def test_load_balancing_loss_of_one_layer_equals_transformers() -> None:
    (layer,) = (one.float().requires_grad_() for one in router_logits(1))
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    ours, theirs = load_balancing_loss([layer], 2, mask), load_balancing_loss_func((layer,), 6, 2, mask)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, layer)[0] for loss in (ours, theirs)))


def test_load_balancing_loss_is_top_k_when_balanced_and_zero_without_tokens() -> None:
    balanced = torch.eye(4).repeat(2, 1) * 1e-3
    assert float(load_balancing_loss([balanced, balanced], 1)) == pytest.approx(1.0, rel=1e-3)
    assert float(load_balancing_loss([balanced], 1, torch.zeros(8))) == 0.0
    assert not math.isnan(float(load_balancing_loss([balanced], 1, torch.zeros(2, 4))))
