"""DistillationTrainer: what a gradient may depend on, what is reported, what stops a run, what is refused."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from runs import in_two_processes, settings, trainer_for, unequal_rows
from tiny import FAMILY_NAMES, documents, save_tiny, slow_but, tiny_model, tiny_tokenizer
from transformers import AutoConfig, PreTrainedModel, TrainerCallback

from slimmoe_hf.losses import load_balancing_loss
from slimmoe_hf.trainer import DistillationTrainer


def train_logs(folder: Path, **arguments: Any) -> list[dict[str, float]]:
    trainer = trainer_for(folder, **arguments)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def save_train_logs(folder: Path, arguments: dict[str, Any]) -> None:
    logs = train_logs(folder, **arguments)
    if torch.distributed.get_rank() == 0:
        (folder / "logs.json").write_text(json.dumps(logs))


CUTS = {"1x8": (8, 1), "2x4": (4, 2), "8x1": (1, 8), "3+3+2": (3, 3)}


@functools.cache
def reference_logs(family: str, folder: Path) -> list[dict[str, float]]:
    return train_logs(folder, family=family, crossentropy_weight=0.5)


def assert_same_course(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "kl", "ce", "top1_agreement", "num_tokens"):
            assert one[key] == pytest.approx(other[key], rel=2e-5), key


@pytest.mark.parametrize("cut", ["2x4", "8x1", "3+3+2"])
@pytest.mark.parametrize("family", slow_but("phimoe", "qwen3_moe"))
def test_loss_and_gradient_norm_do_not_depend_on_accumulation(
    family: str, cut: str, tmp_path: Path, wholes: Path, routing_without_noise: None
) -> None:
    rows, accumulation = CUTS[cut]
    logs = train_logs(
        tmp_path, family=family, crossentropy_weight=0.5,
        per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    assert_same_course(logs, reference_logs(family, wholes))


@pytest.mark.parametrize("family", slow_but("phimoe", "qwen3_moe"))
def test_loss_and_gradient_norm_do_not_depend_on_processes(
    family: str, tmp_path: Path, wholes: Path, routing_without_noise: None
) -> None:
    arguments = {
        "family": family, "crossentropy_weight": 0.5, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "ddp_find_unused_parameters": True,
    }  # fmt: skip
    assert in_two_processes(save_train_logs, tmp_path, arguments) == [0, 0]
    assert_same_course(json.loads((tmp_path / "logs.json").read_text()), reference_logs(family, wholes))


def test_gradient_equals_a_direct_computation(tmp_path: Path) -> None:
    """The norm that the Trainer logs, against a loss written out here in float64."""
    student, teacher, rows = tiny_model("mixtral"), tiny_model("mixtral", seed=1), unequal_rows()
    reference, oracle = (copy.deepcopy(model).double() for model in (student, teacher))
    for model in (reference, oracle):
        model.set_experts_implementation("eager")  # grouped products know no float64
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        s, t = reference(ids).logits[0, :-1].log_softmax(-1), oracle(ids).logits[0, :-1].log_softmax(-1)
        counts = labels[1:] != -100
        total = total + F.kl_div(s, t, log_target=True, reduction="none").sum(-1)[counts].sum()
        tokens += int(counts.sum())
    (total / tokens).backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
    log = train_logs(
        tmp_path, student=student, teacher_model=teacher, train_dataset=rows, per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )[0]  # fmt: skip
    assert log["loss"] == pytest.approx(total.item() / tokens, rel=1e-5)
    assert log["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert log["num_tokens"] == tokens


def test_micro_batch_without_a_valid_token_changes_nothing(tmp_path: Path) -> None:
    rows = unequal_rows(4)
    silent = Dataset.from_list([{"input_ids": [7, 8, 9, 10], "labels": [7, -100, -100, -100]}] * 4)
    mixed = Dataset.from_list([*rows, *silent])
    with_silent = train_logs(
        tmp_path, train_dataset=mixed, per_device_train_batch_size=1, gradient_accumulation_steps=8,
    )  # fmt: skip
    without = train_logs(tmp_path, train_dataset=rows)
    for key in ("loss", "grad_norm", "num_tokens"):
        assert with_silent[0][key] == pytest.approx(without[0][key], rel=2e-5)
    only_silent = train_logs(tmp_path, train_dataset=silent)
    assert only_silent[0]["loss"] == only_silent[0]["grad_norm"] == 0.0


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_router_loss_is_added_as_a_mean_over_micro_batches(
    family: str, tmp_path: Path, routing_without_noise: None
) -> None:
    arguments = {"family": family, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    plain = train_logs(tmp_path, **arguments)[0]
    routed = train_logs(tmp_path, **arguments, router_aux_loss_coef=0.5)[0]
    assert "aux_loss" not in plain
    assert routed["aux_loss"] >= 2.0  # top-2 routing is balanced at 2
    assert routed["loss"] == pytest.approx(plain["loss"] + 0.5 * routed["aux_loss"], rel=1e-5)
    assert routed["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)


def test_router_loss_leaves_padding_out(tmp_path: Path) -> None:
    student, rows = tiny_model("mixtral"), unequal_rows(8)
    logged = train_logs(
        tmp_path, student=copy.deepcopy(student), train_dataset=rows, router_aux_loss_coef=0.1, max_steps=1
    )[0]
    routed = [student(torch.tensor([row["input_ids"]]), output_router_logits=True).router_logits for row in rows]
    layers = [torch.cat(layer) for layer in zip(*routed, strict=True)]
    assert logged["aux_loss"] == pytest.approx(float(load_balancing_loss(layers, 2)), rel=1e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_training_leaves_no_trace_of_itself_in_the_config(family: str, tmp_path: Path) -> None:
    before = tiny_model(family).config.to_dict()
    trainer = trainer_for(tmp_path, family, router_aux_loss_coef=0.1, gradient_checkpointing=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    after = AutoConfig.from_pretrained(tmp_path / "model").to_dict()
    for key in ("use_cache", "output_router_logits", "router_aux_loss_coef"):
        assert after[key] == before[key]
    for key in ("output_router_logits", "router_aux_loss_coef"):
        assert trainer.model.config.to_dict()[key] == before[key]  # for whoever saves the model without the trainer


def direct_metrics(student: PreTrainedModel, teacher: PreTrainedModel, rows: Dataset) -> dict[str, float]:
    sums = dict.fromkeys(("kl", "ce", "top1_agreement", "num_tokens"), 0.0)
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            s, t = (model.eval()(ids).logits[0, :-1].double() for model in (student, teacher))
        counts = labels != -100
        kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        sums["kl"] += float(kl[counts].sum())
        sums["ce"] += float(F.cross_entropy(s[counts], labels[counts], reduction="sum"))
        sums["top1_agreement"] += float((s.argmax(-1) == t.argmax(-1))[counts].sum())
        sums["num_tokens"] += int(counts.sum())
    tokens = sums.pop("num_tokens")
    return {**{f"eval_{name}": value / tokens for name, value in sums.items()}, "eval_num_tokens": tokens}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_evaluation_does_not_depend_on_its_batch_size_and_equals_a_direct_computation(
    family: str, tmp_path: Path
) -> None:
    rows, teacher = unequal_rows(7, seed=5), tiny_model(family, seed=1)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.lm_head.weight += 0.1 * tiny_model(family, seed=2).lm_head.weight
    expected = direct_metrics(student, teacher, rows)
    assert 0.1 < expected["eval_top1_agreement"] < 1.0
    expected["eval_loss"] = 0.5 * expected["eval_kl"] + 0.25 * expected["eval_ce"]
    for batch_size in (1, 3, 8):
        trainer = trainer_for(
            tmp_path, student=student, teacher_model=teacher, per_device_eval_batch_size=batch_size,
            distillation_weight=[1.0, 0.5], crossentropy_weight=[0.0, 0.25], eval_dataset=rows,
        )  # fmt: skip
        measured = trainer.evaluate()
        for key, value in expected.items():
            assert measured[key] == pytest.approx(value, rel=1e-5), key


def save_evaluation(folder: Path, rows: Dataset) -> None:
    trainer = trainer_for(folder, per_device_eval_batch_size=2, eval_dataset=rows)
    metrics = trainer.evaluate()
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(metrics))


def test_evaluation_in_two_processes_counts_every_row_once(tmp_path: Path) -> None:
    """Five rows over 2 x 2 are filled up with three repeated ones, which must not count."""
    rows = unequal_rows(5, seed=5)
    expected = direct_metrics(tiny_model("mixtral"), tiny_model("mixtral", seed=1), rows)
    assert in_two_processes(save_evaluation, tmp_path, rows) == [0, 0]
    for rank in range(2):
        measured = json.loads((tmp_path / f"{rank}.json").read_text())
        for key, value in expected.items():
            assert measured[key] == pytest.approx(value, rel=1e-5), key


def test_training_logs_are_means_over_tokens_since_the_last_log(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, per_device_train_batch_size=1, max_steps=8, logging_steps=8, learning_rate=0.0)
    trainer.train()
    expected = direct_metrics(tiny_model("mixtral"), tiny_model("mixtral", seed=1), unequal_rows())
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    for key in ("kl", "ce", "top1_agreement", "num_tokens"):
        assert log[key] == pytest.approx(expected[f"eval_{key}"], rel=1e-5), key


def test_weights_follow_their_schedule_from_the_first_step_to_the_last(tmp_path: Path) -> None:
    logs = train_logs(
        tmp_path, distillation_weight=[1.0, 0.0], crossentropy_weight=[0.0, 1.0], max_steps=5, learning_rate=0.0
    )
    for step, log in enumerate(logs):
        assert log["loss"] == pytest.approx((1 - step / 4) * log["kl"] + step / 4 * log["ce"], rel=1e-5)


class PoisonAt(TrainerCallback):
    """Make one expert weight infinite before a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.stepped: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = torch.inf

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepped.append(state.global_step + 1)


@pytest.mark.parametrize("hide", [False, True])
def test_loss_that_is_not_finite_stops_before_the_optimizer_and_names_step_and_batch(
    tmp_path: Path, hide: bool
) -> None:
    poison = PoisonAt(3)
    trainer = trainer_for(
        tmp_path, callbacks=[poison], max_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        logging_nan_inf_filter=hide, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"step 3, micro-batch 1 of 2, process 0: the loss is nan.*\[\[\d+, "):
        trainer.train()
    assert poison.stepped == [1, 2]
    assert not (tmp_path / "checkpoint-3").exists()


def test_stopped_training_leaves_nothing_behind_for_the_next(tmp_path: Path) -> None:
    poison = PoisonAt(2)
    trainer = trainer_for(tmp_path, callbacks=[poison], max_steps=2, logging_steps=5, crossentropy_weight=0.5)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(FloatingPointError, match="step 2"):
        trainer.train()
    trainer.remove_callback(poison)
    trainer.model.load_state_dict(before)
    trainer.args.logging_steps = 1
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "kl" in entry)
    fresh = trainer_for(tmp_path / "fresh", max_steps=2, crossentropy_weight=0.5)
    fresh.train()
    assert first["kl"] == pytest.approx(fresh.state.log_history[0]["kl"], rel=1e-5)
    assert first["num_tokens"] == fresh.state.log_history[0]["num_tokens"]


class PoisonGradient(PoisonAt):
    """Make one gradient infinite after a finite loss."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf)


def test_gradient_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path) -> None:
    poison = PoisonGradient(2)
    with pytest.raises(FloatingPointError, match="step 2: the gradient norm is"):
        trainer_for(tmp_path, callbacks=[poison], max_steps=3).train()
    assert poison.stepped == [1]


def poisoned_on_one_rank(folder: Path) -> None:
    class PoisonRows(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1 and torch.distributed.get_rank() == 1:
                with torch.no_grad():
                    trainer.teacher.model.lm_head.weight.fill_(torch.nan)

    trainer = trainer_for(folder, callbacks=[PoisonRows()], max_steps=4, per_device_train_batch_size=4)
    try:
        trainer.train()
    except FloatingPointError as error:
        (folder / f"{torch.distributed.get_rank()}.txt").write_text(str(error))


def test_every_process_stops_when_one_meets_a_nan(tmp_path: Path) -> None:
    assert in_two_processes(poisoned_on_one_rank, tmp_path) == [0, 0]
    assert "step 2: the loss is not finite on another process" in (tmp_path / "0.txt").read_text()
    assert "step 2, micro-batch 1 of 1, process 1" in (tmp_path / "1.txt").read_text()


def test_lora_student_learns_and_its_base_does_not(tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = trainer_for(tmp_path, "phimoe", peft_config=adapter, max_steps=12, learning_rate=1e-2)
    before = copy.deepcopy(trainer.model.get_base_model().model.layers[0].mlp.experts.down_proj)
    trainer.train()
    logs = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert logs[-1] < logs[0] - 0.05
    assert torch.equal(before, trainer.model.get_base_model().model.layers[0].mlp.experts.down_proj)


@pytest.mark.parametrize("packing", [False, True])
def test_text_is_packed_without_documents_seeing_each_other(tmp_path: Path, packing: bool) -> None:
    """With a frozen student, packed rows must report the divergence of the documents on their own."""
    texts = Dataset.from_dict({"text": [text[:120] for text in documents()[:6]]})
    trainer = trainer_for(
        tmp_path,
        train_dataset=texts,
        eval_dataset=texts,
        packing=packing,
        max_length=256,
        learning_rate=0.0,
        max_steps=1,
    )
    trainer.train()
    encoded = [tiny_tokenizer()(row["text"] + tiny_tokenizer().eos_token)["input_ids"] for row in texts]
    expected = direct_metrics(
        tiny_model("mixtral"), tiny_model("mixtral", seed=1),
        Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in encoded]),
    )  # fmt: skip
    measured = trainer.evaluate()
    for key, value in expected.items():
        assert measured[key] == pytest.approx(value, rel=1e-4), key


def test_completion_only_data_counts_completions_only(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}? ", "completion": f"It is {n + 1}."} for n in range(8)]
    trainer = trainer_for(tmp_path, train_dataset=Dataset.from_list(rows), max_steps=1)
    trainer.train()
    expected = sum(
        len(tiny_tokenizer()(row["prompt"] + row["completion"])["input_ids"])
        + 1  # end of text
        - len(tiny_tokenizer()(row["prompt"])["input_ids"])
        for row in rows
    )
    assert next(e for e in trainer.state.log_history if "num_tokens" in e)["num_tokens"] == expected


def test_student_and_teacher_by_name_and_a_teacher_with_a_padded_vocabulary(tmp_path: Path) -> None:
    student = save_tiny(tmp_path / "student", "olmoe")
    teacher = save_tiny(tmp_path / "teacher", "mixtral", seed=1, vocab_size=384)
    trainer = DistillationTrainer(student, str(teacher), settings(tmp_path / "run"), train_dataset=unequal_rows())
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.model.lm_head.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in trainer.teacher.model.parameters())


def test_teacher_stays_in_eval_mode_while_the_student_trains(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    class Watch(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append((model.training, trainer.teacher.model.training))

    trainer = trainer_for(
        tmp_path, "phimoe", callbacks=[Watch()], per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    trainer.train()
    assert seen == [(True, False)] * 2


def test_input_jitter_of_the_student_is_silenced(tmp_path: Path) -> None:
    student = tiny_model("phimoe", input_jitter_noise=0.3)
    trainer_for(tmp_path, "phimoe", student=student)
    jitters = [vars(m)["input_jitter_noise"] for m in student.modules() if "input_jitter_noise" in vars(m)]
    assert jitters == [0.0] * 4  # block and router of two layers
    assert student.config.input_jitter_noise == 0.0


def test_cpu_runs_compute_in_float32_unless_asked(tmp_path: Path) -> None:
    assert not settings(tmp_path).bf16
    assert settings(tmp_path, bf16=True).bf16
    logs = [train_logs(tmp_path, bf16=bf16)[0]["kl"] for bf16 in (False, True)]
    assert logs[0] == pytest.approx(logs[1], rel=0.02)
    assert logs[0] != logs[1]
    assert math.isfinite(logs[1])
