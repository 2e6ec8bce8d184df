"""Promise 3, as a table: loss and gradient norm are those of float64, whoever teaches and however the batch is cut.

Every cut sees the same eight documents in each of its two steps, of unequal length and partly masked. Packing is the kind
that keeps documents apart (`bfd`); `wrapped` makes other texts of them, so nothing is to be compared there. A student that
is its own teacher is an adapter on it; full students are taught by the other three. Routing is Mixtral's, which has no
noise; the families are cut in `test_trainer`, FSDP2 in `test_stage`, ZeRO-3 in `test_deepspeed`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from runs import cached, in_two_processes, trainer_for, unequal_rows
from tiny import tiny_model
from torch import Tensor

from slimmoe_hf.cache import TeacherCache

SOURCES = ("live", "cache of 16 tokens", "cache of hidden states", "own base")
PACKED: dict[str, Any] = {"packing": True, "packing_strategy": "bfd", "max_length": 40, "completion_only_loss": True}
CUTS: dict[str, dict[str, Any]] = {
    "1x8": {},
    "2x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "8x1": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "1x8, checkpointing": {"gradient_checkpointing": True},
    "8x1, reentrant checkpointing": {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "2x4, padding-free": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "padding_free": True, "max_length": None,
    },
    "packed": PACKED,
    "packed, a row at a time, checkpointing": {
        **PACKED, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True,
    },
}  # fmt: skip
IN_TWO: dict[str, dict[str, Any]] = {
    "2x2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "1x4, checkpointing": {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
    "packed": {**PACKED, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
}  # fmt: skip
ALL_TERMS = {"loss_top_k": 8, "router_logits_weight": 0.5, "hidden_states_weight": 0.5}
KEYS = ("loss", "grad_norm", "kl", "ce", "top1_agreement", "entropy", "num_tokens")
Course = list[dict[str, float]]


def documents(packed: bool) -> Dataset:
    """The same documents and masks, with labels or, as packing wants it, with a mask."""
    rows = unequal_rows()
    if not packed:
        return rows
    masks = [[int(label != -100) for label in row["labels"]] for row in rows]
    return Dataset.from_list([
        {"input_ids": row["input_ids"], "completion_mask": mask} for row, mask in zip(rows, masks, strict=True)
    ])  # fmt: skip


def student_of(source: str) -> Any:
    student = tiny_model("mixtral")
    if source != "own base":
        return student
    torch.manual_seed(3)
    return get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def course_of(folder: Path, source: str, cut: dict[str, Any], dtype: torch.dtype = torch.float32) -> Course:
    """What two steps of a run log."""
    caches = {"cache of 16 tokens": "top_k", "cache of hidden states": "hidden"}
    teacher = {"teacher_logits_path": str(folder / caches[source])} if source in caches else {}
    trainer = trainer_for(
        folder / "run", student=student_of(source).to(dtype), own_base=source == "own base", crossentropy_weight=0.5,
        train_dataset=documents("packing" in cut), **teacher, **cut,
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With both kinds of cache."""
    folder = tmp_path_factory.mktemp("cuts")
    cached(folder / "top_k", top_k=16)
    cached(folder / "hidden", kind="hidden")
    return folder


Answer = Callable[[Tensor, Tensor], Tensor]


def answers_of(source: str, folder: Path, student: Any, oracle: Any) -> Answer:
    """Forward KL of every prediction of one document, from its ids `[1, T]` and the student's log-probabilities `[T, V]`."""
    if source == "cache of 16 tokens":
        cache = TeacherCache.open(folder / "top_k")

        def of_entries(ids: Tensor, log_s_TV: Tensor) -> Tensor:
            kept = cache.stored_answers(ids)
            log_p_TM = (
                torch.cat([kept.log_probs_BTK[0], kept.log_tail_BT[0, :, None]], -1)[:-1].double().log_softmax(-1)
            )
            inside_TK = log_s_TV.gather(-1, kept.index_BTK[0, :-1].long())
            outside_T1 = (1 - inside_TK.exp().sum(-1, keepdim=True)).log()
            return (log_p_TM.exp() * (log_p_TM - torch.cat([inside_TK, outside_T1], -1))).sum(-1)

        return of_entries

    def of_logits(ids: Tensor, log_s_TV: Tensor) -> Tensor:
        with torch.no_grad():
            if source == "cache of hidden states":
                cache = TeacherCache.open(folder / "hidden")
                hidden_TD, (weight_VD, _) = cache.hidden_states(ids)[0][0, :-1].double(), cache.head()
                logits_TV = hidden_TD @ weight_VD.double().T
            elif source == "own base":
                with student.disable_adapter():
                    logits_TV = student(ids).logits[0, :-1]
            else:
                logits_TV = oracle(ids).logits[0, :-1]
        return F.kl_div(log_s_TV, logits_TV.log_softmax(-1), log_target=True, reduction="none").sum(-1)

    return of_logits


@functools.cache
def naive(source: str, folder: Path) -> dict[str, float]:
    """The first step in float64, document by document, from logits."""
    student = student_of(source).double().train()
    oracle = tiny_model("mixtral", seed=1).double()
    for model in (student.get_base_model() if source == "own base" else student, oracle):
        model.set_experts_implementation("eager")  # grouped products know no float64
    kl_of, tokens = answers_of(source, folder, student, oracle), 0
    kl, ce = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    for row in documents(False):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        log_s_TV = student(ids).logits[0, :-1].log_softmax(-1)
        kl = kl + kl_of(ids, log_s_TV)[labels != -100].sum()
        ce = ce + F.nll_loss(log_s_TV, labels, reduction="sum")
        tokens += int((labels != -100).sum())
    loss = (kl + 0.5 * ce) / tokens
    loss.backward()
    norms = [weight.grad.norm() for weight in student.parameters() if weight.grad is not None]
    return {"loss": loss.item(), "grad_norm": float(torch.stack(norms).norm()), "num_tokens": tokens}


@functools.cache
def whole(source: str, folder: Path) -> Course:
    return course_of(folder, source, CUTS["1x8"])


def assert_right(course: Course, source: str, folder: Path) -> None:
    """Of float64 in the first step, of the uncut batch in both."""
    assert len(course) == 2
    for key, value in naive(source, folder).items():
        assert course[0][key] == pytest.approx(value, rel=1e-5), key
    for one, other in zip(course, whole(source, folder), strict=True):
        for key in KEYS:
            assert one[key] == pytest.approx(other[key], rel=1e-5), key


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("source", SOURCES)
def test_loss_and_gradient_norm_are_those_of_float64(source: str, cut: str, folder: Path) -> None:
    assert_right(course_of(folder, source, CUTS[cut]), source, folder)


def train_all(folder: Path) -> None:
    found = {f"{source}: {cut}": course_of(folder, source, IN_TWO[cut]) for source in SOURCES for cut in IN_TWO}
    found["all terms"] = course_of(folder, "live", {**IN_TWO["2x2"], **ALL_TERMS})
    if torch.distributed.get_rank() == 0:
        (folder / "two.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def in_two(folder: Path) -> dict[str, Course]:
    """All of them in one start of two processes."""
    assert in_two_processes(train_all, folder) == [0, 0]
    found: dict[str, Course] = json.loads((folder / "two.json").read_text())
    return found


@pytest.mark.parametrize("cut", IN_TWO)
@pytest.mark.parametrize("source", SOURCES)
def test_so_they_are_in_two_processes(source: str, cut: str, folder: Path, in_two: dict[str, Course]) -> None:
    assert_right(in_two[f"{source}: {cut}"], source, folder)


def test_everything_that_two_processes_log_is_what_one_logs(folder: Path, in_two: dict[str, Course]) -> None:
    """But for expert load: it counts padding, of which differently cut batches have more or less."""
    alone = course_of(folder, "live", ALL_TERMS)
    for one, other in zip(in_two["all terms"], alone, strict=True):
        assert {*KEYS, "router_kl", "hidden_mse", "teacher_top_k_mass"} <= one.keys() == other.keys()
        for key, value in one.items():
            if not key.startswith("router_load"):
                assert value == pytest.approx(other[key], rel=1e-5), key


IN_BFLOAT16: dict[str, tuple[bool, dict[str, Any]]] = {
    "autocast": (False, {"bf16": True}), "weights": (True, {}),
}  # fmt: skip


@pytest.mark.parametrize("how", IN_BFLOAT16)
@pytest.mark.parametrize("source", SOURCES)
def test_bfloat16_is_close_to_float32(source: str, how: str, folder: Path) -> None:
    weights, arguments = IN_BFLOAT16[how]
    course = course_of(folder, source, arguments, torch.bfloat16 if weights else torch.float32)
    for one, other in zip(course, whole(source, folder), strict=True):
        assert one["num_tokens"] == other["num_tokens"]
        for key in ("loss", "kl", "ce", "entropy"):
            assert one[key] == pytest.approx(other[key], rel=0.02) and one[key] != other[key], key
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.1)
