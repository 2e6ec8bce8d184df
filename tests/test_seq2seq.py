"""Seq2SeqDistillationTrainer: the promises of DistillationTrainer, kept for encoder-decoders."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from runs import in_child, in_two_processes
from tiny import SEQ2SEQ_NAMES, VOCAB_SIZE, documents, tiny_model, tiny_seq2seq, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, PreTrainedModel, TrainerCallback
from transformers import Seq2SeqTrainingArguments as StockArguments

from slimmoe_hf import DistillationConfig, DistillationTrainer, Seq2SeqDistillationConfig, Seq2SeqDistillationTrainer
from slimmoe_hf.logit_losses import apply_head
from slimmoe_hf.losses import load_balancing_loss
from slimmoe_hf.signals import Head, TeacherLogits, TeacherStates
from slimmoe_hf.student_forward import last_hidden_states

NOISE = {"dropout_rate": 0.2, "router_jitter_noise": 0.1}


def unequal_pairs(count: int = 8, seed: int = 0) -> Dataset:
    """Random sources and targets, no two of one length in a row, some labels not trained on."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist()

    rows = []
    for index in range(count):
        source, target = ids(4 + index * 7 % 19), ids(3 + index * 5 % 13)
        labels = [*target[: index % 3], *[-100] * (index % 2), *target[index % 3 :], 0]
        rows.append({"input_ids": source, "attention_mask": [1] * len(source), "labels": labels})
    return Dataset.from_list(rows)


def settings(folder: Path, **overrides: Any) -> Seq2SeqDistillationConfig:
    """Two steps over eight rows, nothing printed."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    return Seq2SeqDistillationConfig(str(folder), **{**defaults, **overrides})


KEYWORDS = ("teacher_model", "train_dataset", "eval_dataset", "callbacks", "compute_metrics", "data_collator",
            "compute_loss_func", "model_init", "processing_class")  # fmt: skip


def trainer_for(
    folder: Path, family: str = "switch_transformers", student: Any = None, **overrides: Any
) -> Seq2SeqDistillationTrainer:
    own = {name: overrides.pop(name) for name in list(overrides) if name in KEYWORDS}
    own = {"train_dataset": unequal_pairs(), "processing_class": tiny_tokenizer(), **own}
    teacher = own.pop("teacher_model", None) if "teacher_model" in own else tiny_seq2seq(family, seed=1)
    return Seq2SeqDistillationTrainer(student or tiny_seq2seq(family), teacher, settings(folder, **overrides), **own)


def train_logs(folder: Path, **arguments: Any) -> list[dict[str, float]]:
    trainer = trainer_for(folder, **arguments)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def shifted(labels: list[int], model: PreTrainedModel) -> Tensor:
    """What the decoder is given, written out: its start, then every label but the last, padding for what is not one."""
    before = [model.config.decoder_start_token_id, *labels[:-1]]
    return torch.tensor([[model.config.pad_token_id if label == -100 else label for label in before]])


def row_logits(model: PreTrainedModel, row: dict[str, Any]) -> Tensor:
    return model(torch.tensor([row["input_ids"]]), decoder_input_ids=shifted(row["labels"], model)).logits[0]


def direct(student: PreTrainedModel, teacher: PreTrainedModel, rows: Dataset) -> dict[str, Tensor]:
    """Sums over the tokens that count, row by row and without padding, in float64."""
    ours, theirs = (copy.deepcopy(model).double().eval() for model in (student, teacher))
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ("kl", "ce", "top1_agreement", "num_tokens")}
    for row in rows:
        labels = torch.tensor(row["labels"])
        counts = labels != -100
        s, t = row_logits(ours, row)[counts], row_logits(theirs, row)[counts]
        log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
        sums["kl"] = sums["kl"] + F.kl_div(log_s, log_t, log_target=True, reduction="sum")
        sums["ce"] = sums["ce"] + F.cross_entropy(s, labels[counts], reduction="sum")
        sums["top1_agreement"] += (s.argmax(-1) == t.argmax(-1)).sum()
        sums["num_tokens"] += counts.sum()
    loss = (sums["kl"] + 0.5 * sums["ce"]) / sums["num_tokens"]
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in ours.parameters() if p.grad is not None]).norm()
    means = {name: (value / sums["num_tokens"]).detach() for name, value in sums.items() if name != "num_tokens"}
    return {**means, "num_tokens": sums["num_tokens"], "loss": loss.detach(), "grad_norm": norm}


@pytest.mark.parametrize("family", SEQ2SEQ_NAMES)
@torch.no_grad()
def test_head_gives_exactly_the_models_logits(family: str) -> None:
    """Switch scales what its head is given by d_model**-0.5, BART adds a bias that no parameter holds."""
    model, ids = tiny_seq2seq(family), torch.arange(5, 26).reshape(3, 7)
    whole = model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
    with last_hidden_states(model) as seen:
        last = model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
    assert last.shape[1] == 1
    torch.testing.assert_close(apply_head(Head.of(model), seen[0]), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", SEQ2SEQ_NAMES)
def test_loss_and_gradient_equal_a_direct_computation(family: str, tmp_path: Path) -> None:
    """Also says that the z-loss and load-balancing loss of Switch are not there unasked."""
    student, teacher, rows = tiny_seq2seq(family), tiny_seq2seq(family, seed=1), unequal_pairs()
    expected = direct(student, teacher, rows)
    log = train_logs(
        tmp_path, student=student, teacher_model=teacher, train_dataset=rows, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, crossentropy_weight=0.5, max_grad_norm=1e6,
    )[0]  # fmt: skip
    for name in ("loss", "kl", "ce", "top1_agreement", "num_tokens"):
        assert log[name] == pytest.approx(float(expected[name]), rel=1e-5), name
    assert log["grad_norm"] == pytest.approx(float(expected["grad_norm"]), rel=1e-4)


CUTS = {"2x4": (4, 2), "8x1": (1, 8), "3+3+2": (3, 3)}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in SEQ2SEQ_NAMES},
    "switch that drops tokens": ("switch_transformers", {"expert_capacity": 2}),
}


@functools.cache
def reference_logs(variant: str, folder: Path) -> list[dict[str, float]]:
    family, overrides = VARIANTS[variant]
    return train_logs(folder, family=family, student=tiny_seq2seq(family, **overrides), crossentropy_weight=0.5)


def assert_same_course(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "kl", "ce", "top1_agreement", "num_tokens"):
            assert one[key] == pytest.approx(other[key], rel=1e-5), key


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_norm_do_not_depend_on_accumulation(
    variant: str, cut: str, tmp_path: Path, wholes: Path
) -> None:
    family, overrides = VARIANTS[variant]
    rows, accumulation = CUTS[cut]
    logs = train_logs(
        tmp_path, family=family, student=tiny_seq2seq(family, **overrides), crossentropy_weight=0.5,
        per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    assert_same_course(logs, reference_logs(variant, wholes))


def save_two(folder: Path) -> None:
    trainer = trainer_for(
        folder, crossentropy_weight=0.5, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        per_device_eval_batch_size=2, ddp_find_unused_parameters=True,
    )  # fmt: skip
    before = trainer.evaluate(unequal_pairs(5, seed=5))
    trainer.train()
    if torch.distributed.get_rank() == 0:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        (folder / "logs.json").write_text(json.dumps([before, logs]))


def test_training_and_evaluation_do_not_depend_on_processes(tmp_path: Path, wholes: Path) -> None:
    """Five rows over 2 x 2 are filled up with three repeated ones, which must not count."""
    assert in_two_processes(save_two, tmp_path) == [0, 0]
    evaluated, logs = json.loads((tmp_path / "logs.json").read_text())
    assert_same_course(logs, reference_logs("switch_transformers", wholes))
    expected = direct(tiny_seq2seq(), tiny_seq2seq(seed=1), unequal_pairs(5, seed=5))
    for name in ("loss", "kl", "ce", "num_tokens"):
        assert evaluated[f"eval_{name}"] == pytest.approx(float(expected[name]), rel=1e-5), name


def test_evaluation_means_are_over_tokens_whatever_the_batch_size(tmp_path: Path) -> None:
    student, teacher, rows = tiny_seq2seq(), tiny_seq2seq(seed=1), unequal_pairs(7, seed=5)
    expected = direct(student, teacher, rows)
    for size in (1, 3, 8):
        trainer = trainer_for(
            tmp_path, student=student, teacher_model=teacher, per_device_eval_batch_size=size, crossentropy_weight=0.5
        )
        measured = trainer.evaluate(rows)
        for name in ("loss", "kl", "ce", "top1_agreement", "num_tokens"):
            assert measured[f"eval_{name}"] == pytest.approx(float(expected[name]), rel=1e-5), name


def test_a_label_of_minus_100_and_padding_do_not_count(tmp_path: Path) -> None:
    """Rows without a label to learn from, and longer ones, change nothing."""
    rows = unequal_pairs(4)
    silent = [{"input_ids": [7] * 30, "attention_mask": [1] * 30, "labels": [-100] * 20}] * 4
    mixed = train_logs(
        tmp_path, train_dataset=Dataset.from_list([*rows, *silent]), per_device_train_batch_size=1,
        gradient_accumulation_steps=8, max_steps=1,
    )  # fmt: skip
    alone = train_logs(tmp_path, train_dataset=rows, max_steps=1)
    for key in ("loss", "grad_norm", "num_tokens"):
        assert mixed[0][key] == pytest.approx(alone[0][key], rel=1e-5), key


def routers(model: PreTrainedModel, rows: Dataset) -> tuple[list[Tensor], list[Tensor]]:
    """Router logits of encoder and decoder, of every row on its own; the decoder's where the label counts."""
    encoder, decoder = [], []
    for row in rows:
        out = model(
            torch.tensor([row["input_ids"]]), decoder_input_ids=shifted(row["labels"], model), output_router_logits=True
        )
        encoder.append(out.encoder_router_logits[0][0])
        decoder.append(out.decoder_router_logits[0][0][torch.tensor(row["labels"]) != -100])
    return [torch.cat(encoder)], [torch.cat(decoder)]


def test_router_loss_is_that_of_encoder_and_decoder_without_padding_and_only_where_asked(tmp_path: Path) -> None:
    student, rows = tiny_seq2seq(), unequal_pairs()
    with torch.no_grad():
        expected = sum(float(load_balancing_loss(layers, 1)) for layers in routers(student, rows))
    plain = train_logs(tmp_path, student=copy.deepcopy(student), train_dataset=rows, max_steps=1)[0]
    routed = train_logs(tmp_path, student=copy.deepcopy(student), router_aux_loss_coef=0.5, max_steps=1)[0]
    own = train_logs(tmp_path, student=student, router_aux_loss_coef=None, max_steps=1)[0]
    assert "aux_loss" not in plain
    assert routed["aux_loss"] == pytest.approx(expected, rel=1e-5)
    assert routed["loss"] == pytest.approx(plain["loss"] + 0.5 * expected, rel=1e-5)
    assert routed["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)
    assert own["loss"] == pytest.approx(plain["loss"] + 0.001 * expected, rel=1e-6)  # Switch's own coefficient


def test_the_student_comes_closer_to_its_teacher(tmp_path: Path) -> None:
    """On real text: the second half of a passage from its first, by the tokens of both."""
    encode = tiny_tokenizer()
    texts = [text[start : start + 60] for text in documents()[:12] for start in (0, 200)]
    rows = Dataset.from_list([encode(text[:30], text_target=text[30:]) for text in texts])
    train, held_out = rows.select(range(20)), rows.select(range(20, 24))
    trainer = trainer_for(tmp_path, train_dataset=train, eval_dataset=held_out, max_steps=40, learning_rate=1e-2)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.6 * before


def test_generated_texts_reach_compute_metrics_and_the_losses_stay_means_over_tokens(tmp_path: Path) -> None:
    student, rows, seen = tiny_seq2seq(), unequal_pairs(5, seed=5), []
    trainer = trainer_for(
        tmp_path, student=student, eval_dataset=rows, per_device_eval_batch_size=2, predict_with_generate=True,
        generation_max_length=8, crossentropy_weight=0.5, compute_metrics=lambda found: seen.append(found) or {"seen": 1.0},
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer(), model=student),
    )  # fmt: skip
    metrics = trainer.evaluate(num_beams=1)
    expected = direct(tiny_seq2seq(), tiny_seq2seq(seed=1), rows)
    assert metrics["eval_seen"] == 1.0
    for name in ("loss", "kl", "num_tokens"):
        assert metrics[f"eval_{name}"] == pytest.approx(float(expected[name]), rel=1e-5), name
    for row, generated, labels in zip(rows, seen[0].predictions, seen[0].label_ids, strict=True):
        whole = student.generate(torch.tensor([row["input_ids"]]), max_length=8)[0].tolist()
        assert generated[: len(whole)].tolist() == whole
        assert labels[: len(row["labels"])].tolist() == row["labels"]
        assert (labels[len(row["labels"]) :] == -100).all()
    alone = trainer.predict(rows.remove_columns("labels"), max_length=8)
    assert np.array_equal(alone.predictions, seen[0].predictions)
    assert "test_loss" not in alone.metrics


def test_without_generation_compute_metrics_gets_logits(tmp_path: Path) -> None:
    rows, student = unequal_pairs(3), tiny_seq2seq()
    found = trainer_for(tmp_path, student=student, per_device_eval_batch_size=1).predict(rows)
    with torch.no_grad():
        expected = row_logits(student, rows[0])
    assert found.predictions.shape == (3, max(len(row["labels"]) for row in rows), VOCAB_SIZE)
    np.testing.assert_allclose(found.predictions[0, : len(expected)], expected, atol=1e-5)


class Die(TrainerCallback):
    """End the process as a kill does, after the checkpoint of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os._exit(9)


def run(folder: Path, resume: bool = False, **arguments: Any) -> Seq2SeqDistillationTrainer:
    """Three steps an epoch, a checkpoint after every second, with dropout and jitter: the noise must go on too."""
    trainer = trainer_for(folder, student=tiny_seq2seq(**NOISE), **{
        "train_dataset": unequal_pairs(12), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine",
        "crossentropy_weight": [0.0, 0.5], **arguments,
    })  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    assert in_child(functools.partial(run, callbacks=[Die(5)]), tmp_path / "killed") == 9
    resumed, whole = run(tmp_path / "killed", resume=True), run(tmp_path / "whole")
    theirs = whole.model.state_dict()
    assert [name for name, tensor in resumed.model.state_dict().items() if not torch.equal(tensor, theirs[name])] == []
    last = [entry for entry in whole.state.log_history if "loss" in entry][-1]
    assert [entry for entry in resumed.state.log_history if "loss" in entry][-1]["loss"] == last["loss"]
    for change, message in (
        ({"teacher_model": tiny_seq2seq(seed=2)}, "teacher was .* and is"), ({"beta": 0.5}, "beta was 0.0 and is 0.5")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "whole", resume=True, **change)


@pytest.mark.parametrize("head", [False, True], ids=["head as it is", "head adapted, not fused"])
def test_an_adapter_learns_from_its_own_base(head: bool, tmp_path: Path) -> None:
    modules = ["q", "v", "lm_head"] if head else ["q", "v"]
    torch.manual_seed(0)
    student = get_peft_model(
        tiny_seq2seq("t5"),
        LoraConfig(r=2, target_modules=modules, init_lora_weights=False, task_type="SEQ_2_SEQ_LM"),
    )
    expected = direct(student, tiny_seq2seq("t5"), unequal_pairs())
    trainer = trainer_for(tmp_path, student=student, teacher_model=None, max_steps=8, learning_rate=1e-2)
    assert bool(trainer._needs_logits) == head
    trainer.train()
    logs = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert logs[0] == pytest.approx(float(expected["kl"]), rel=1e-5)
    assert logs[-1] < 0.9 * logs[0]


def test_student_and_teacher_by_name_and_what_is_saved_loads_plainly(tmp_path: Path) -> None:
    for seed, name in enumerate(("student", "teacher")):
        tiny_seq2seq(seed=seed, dtype="bfloat16").save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    trainer = Seq2SeqDistillationTrainer(
        tmp_path / "student", str(tmp_path / "teacher"), settings(tmp_path / "out", gradient_checkpointing=True),
        train_dataset=unequal_pairs(),
    )  # fmt: skip
    trainer.train()
    assert isinstance(trainer.data_collator, DataCollatorForSeq2Seq)
    assert trainer.model.dtype == torch.float32
    trainer.save_model()
    trainer.create_model_card()
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    batch = {"input_ids": torch.arange(5, 12)[None], "decoder_input_ids": torch.arange(5, 9)[None]}
    assert torch.equal(saved(**batch).logits, trainer.model.eval()(**batch).logits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["use_cache"] is True and "output_router_logits" not in config
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card and "8 rows" in card and "forward KL" in card


def test_the_teacher_gives_hidden_states_and_no_logits(tmp_path: Path) -> None:
    kinds = []
    trainer = trainer_for(tmp_path, max_steps=1)
    answers = trainer.teacher.answers
    trainer.teacher.answers = lambda *given: kinds.append(answers(*given)) or kinds[-1]
    trainer.train()
    assert [type(answer) for answer, _ in kinds] == [TeacherStates]
    trainer.teacher._head_apart = False
    fused = kinds.pop()[0]
    counts = torch.ones(1, 4, dtype=torch.bool)
    asked = {"input_ids": torch.arange(5, 12)[None], "decoder_input_ids": torch.arange(5, 9)[None]}
    whole, _ = answers(asked, counts, trainer.terms)
    trainer.teacher._head_apart = True
    apart, _ = answers(asked, counts, trainer.terms)
    assert isinstance(whole, TeacherLogits)
    torch.testing.assert_close(apply_head(apart.head, apart.hidden_NU), whole.logits_NV)
    assert len(fused.hidden_NU) == sum(label != -100 for row in unequal_pairs() for label in row["labels"])


def left_padding() -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.padding_side = "left"
    return tokenizer


def prompt_tuned() -> Any:
    return get_peft_model(tiny_seq2seq("t5"), PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2))


def one_model() -> dict[str, Any]:
    model = tiny_seq2seq()
    return {"student": model, "teacher_model": model}


REFUSALS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "decoder-only student": (lambda: {"student": tiny_model("mixtral")}, "'mixtral' is no encoder-decoder: distil it with D"),
    "decoder-only teacher": (lambda: {"teacher_model": tiny_model("mixtral")}, "the teacher is a mixtral, and an encoder-dec"),
    "no teacher": (lambda: {"teacher_model": None}, "there is no teacher: give teacher_model. Only a PeftModel"),
    "shared weights": (one_model, "teacher_model shares its weights with model"),
    "vocabulary": (
        lambda: {"teacher_model": tiny_seq2seq(vocab_size=256)},
        "student has 320 ids, the teacher 256, and the tokenizer emits 320",
    ),
    "other start": (
        lambda: {"teacher_model": tiny_seq2seq(decoder_start_token_id=3)},
        r"student's decoder is given \[1, 5, 6\], the teacher's \[3, 5, 6\]",
    ),
    "no start": (
        lambda: {"student": tiny_seq2seq(decoder_start_token_id=None)}, "the student .* cannot make its decoder's input"
    ),
    "prompt learning": (lambda: {"student": prompt_tuned()}, "PromptTuningConfig puts virtual tokens"),
    "padding on the left": (lambda: {"processing_class": left_padding()}, "padding_side='left' puts padding"),
    "text": (
        lambda: {"train_dataset": Dataset.from_dict({"text": ["a"]})}, "train_dataset has the columns text, and lacks input_ids"
    ),
    "no labels": (
        lambda: {"eval_dataset": {"a": unequal_pairs().remove_columns("labels")}}, "eval_dataset has .* and lacks labels"
    ),
    "loss function": (lambda: {"compute_loss_func": print}, "compute_loss_func would replace"),
    "model_init": (lambda: {"model_init": tiny_seq2seq}, "model_init would replace"),
    "cache": (lambda: {"teacher_logits_path": "cache"}, "teacher_logits_path=cache: a teacher cache knows a text by"),
    "writing a cache": (lambda: {"precompute_teacher_logits": True}, "precompute_teacher_logits=True: a teacher cache"),
    "router term": (lambda: {"router_logits_weight": 0.1}, "router_logits_weight=0.1: this term is for decoder-only"),
    "hidden term": (lambda: {"hidden_states_weight": 0.1}, "hidden_states_weight=0.1: this term is for decoder-only"),
    "no routers": (
        lambda: {"family": "t5", "router_aux_loss_coef": 0.1}, "not known what the routers of a t5 return; it works with switch"
    ),
    "beta": (lambda: {"beta": 1.5}, r"beta=1.5 is outside \[0, 1\]"),
    "top-k of reverse KL": (lambda: {"loss_top_k": 8, "beta": 1.0}, "loss_top_k=8 with beta=1.0"),
    "label smoothing": (lambda: {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
    "nothing to learn": (lambda: {"distillation_weight": 0.0}, "both 0 at the start of training"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    arguments, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message) as error:
        trainer_for(tmp_path, **arguments())
    assert "\n" not in str(error.value)


def test_other_arguments_and_the_other_trainer_are_refused(tmp_path: Path) -> None:
    model, args = tiny_seq2seq(), DistillationConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(
        TypeError, match="Seq2SeqTrainingArguments; Seq2SeqDistillationTrainer takes a Seq2SeqDistillationCo"
    ):
        Seq2SeqDistillationTrainer(model, "nowhere", StockArguments(str(tmp_path)), processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="'switch_transformers' is an encoder-decoder: distil it with Seq2Seq"):
        DistillationTrainer(model, "nowhere", args, train_dataset=unequal_pairs(), processing_class=tiny_tokenizer())
