"""Training from a teacher that is not there: a cache on disk, or the student's own base without its adapter."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from runs import cached, in_two_processes, trainer_for, unequal_rows
from tiny import VOCAB_SIZE, documents, save_tiny, tiny_model, tiny_tokenizer

from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.cached_teacher import CachedTeacher
from slimmoe_hf.pipeline import distil
from slimmoe_hf.preflight import training_arguments
from slimmoe_hf.trainer import DistillationTrainer

KEYS = ("loss", "grad_norm", "kl", "ce", "top1_agreement", "entropy", "num_tokens")


def logs(trainer: DistillationTrainer) -> list[dict[str, float]]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_course(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float, keys: tuple[str, ...] = KEYS
) -> None:
    assert len(ours) == len(theirs) > 1
    for one, other in zip(ours, theirs, strict=True):
        for key in keys:
            assert one[key] == pytest.approx(other[key], rel=tolerance), key


CUTS: dict[str, dict[str, Any]] = {
    "1x8": {}, "2x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "8x1": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "workers": {"dataloader_num_workers": 1}, "checkpointing": {"gradient_checkpointing": True},
    "T = 2": {"temperature": 2.0, "crossentropy_weight": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_cache_of_all_tokens_trains_as_the_live_teacher_step_by_step(cut: str, tmp_path: Path) -> None:
    """float16 holds a log-probability to three digits; what that does to each token averages out."""
    settings = {"max_steps": 4, **CUTS[cut]}
    live = logs(trainer_for(tmp_path / "live", **settings))
    path = cached(tmp_path / "cache", temperatures=(settings.get("temperature", 1.0),))
    trainer = trainer_for(tmp_path / "cached", teacher_logits_path=path, **settings)
    # Off T = 1 the logged kl comes from rounded entries: their rest is no mass that anyone could have.
    keys = KEYS if cut != "T = 2" else tuple(key for key in KEYS if key != "kl")
    assert_same_course(logs(trainer), live, 2e-4, keys)
    assert trainer.state.log_history[0]["teacher_top_k_mass"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_cached_hidden_states_serve_every_divergence(beta: float, tmp_path: Path) -> None:
    live = logs(trainer_for(tmp_path / "live", beta=beta))
    path = cached(tmp_path / "cache", kind="hidden")
    assert_same_course(logs(trainer_for(tmp_path / "cached", teacher_logits_path=path, beta=beta)), live, 1e-3)


def test_few_cached_tokens_train_as_as_many_of_the_live_teacher(tmp_path: Path) -> None:
    live = logs(trainer_for(tmp_path / "live", loss_top_k=8))
    path = cached(tmp_path / "cache", top_k=16)
    ours = logs(trainer_for(tmp_path / "cached", teacher_logits_path=path, loss_top_k=8))
    for one, other in zip(ours, live, strict=True):
        # The cache keeps the label for its sixteenth, which the teacher's likeliest eight have nothing to do with.
        for key in ("loss", "grad_norm", "ce", "top1_agreement", "teacher_top_k_mass"):
            assert one[key] == pytest.approx(other[key], rel=5e-4), key
        assert one["kl"] < other["kl"]  # over eight and the rest as one


PACKINGS: dict[str, dict[str, Any]] = {
    "unpacked": {}, "bfd": {"packing": True}, "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
}  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
def test_precomputed_answers_are_found_however_rows_are_packed(packing: str, tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": [text[:150] for text in documents()[:6]]})
    arguments: dict[str, Any] = {"train_dataset": texts, "eval_dataset": texts, "max_length": 96, **PACKINGS[packing]}
    live = trainer_for(tmp_path / "live", **arguments)
    ours = trainer_for(tmp_path / "cached", precompute_teacher_logits=True, **arguments)
    assert isinstance(ours.teacher, CachedTeacher)
    assert (tmp_path / "cached" / "teacher-cache" / "manifest.json").is_file()
    one, other = logs(ours), logs(live)
    assert [entry["num_tokens"] for entry in one] == [entry["num_tokens"] for entry in other]
    for entry, expected in zip(one, other, strict=True):  # 64 of 320 tokens and the rest as one: a lower bound
        assert 0.5 * expected["kl"] < entry["kl"] < expected["kl"]
        assert entry["ce"] == pytest.approx(expected["ce"], rel=0.02)
    assert ours.evaluate()["eval_kl"] < live.evaluate()["eval_kl"]


def test_no_teacher_is_in_memory_once_its_answers_are_on_disk(tmp_path: Path) -> None:
    teacher = tiny_model("mixtral", seed=1)
    gone = weakref.ref(teacher)
    trainer = trainer_for(tmp_path, teacher_model=teacher, precompute_teacher_logits=True)
    del teacher
    gc.collect()
    assert gone() is None
    assert len(logs(trainer)) == 2


def test_second_start_takes_the_cache_that_is_there_and_no_other_teacher(tmp_path: Path) -> None:
    arguments = {"precompute_teacher_logits": True, "teacher_logits_path": str(tmp_path / "cache")}
    one = logs(trainer_for(tmp_path / "one", **arguments))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert logs(trainer_for(tmp_path / "two", **arguments))[-1]["loss"] == one[-1]["loss"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == written
    with pytest.raises(ValueError, match="holds answers of another teacher"):
        trainer_for(tmp_path / "three", teacher_model=tiny_model("mixtral", seed=2), **arguments)


def stream(rows: Dataset) -> IterableDataset:
    def generate() -> Iterator[dict[str, Any]]:
        yield from rows

    return IterableDataset.from_generator(generate)


@pytest.mark.parametrize("precompute", [False, True])
def test_streamed_rows_are_found_too(precompute: bool, tmp_path: Path) -> None:
    rows = unequal_rows()
    path = str(tmp_path / "cache") if precompute else cached(tmp_path / "cache")
    expected = logs(trainer_for(tmp_path / "live"))
    ours = logs(
        trainer_for(
            tmp_path / "cached", train_dataset=stream(rows), teacher_logits_path=path,
            precompute_teacher_logits=precompute,
        )
    )  # fmt: skip
    assert [entry["num_tokens"] for entry in ours] == [entry["num_tokens"] for entry in expected]
    assert ours[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.5 if precompute else 2e-4)


def save_logs(folder: Path, arguments: dict[str, Any]) -> None:
    found = logs(trainer_for(folder, **arguments))
    if torch.distributed.get_rank() == 0:
        (folder / "logs.json").write_text(json.dumps(found))


def test_two_processes_take_the_course_of_one(tmp_path: Path) -> None:
    path = cached(tmp_path / "cache")
    one = logs(trainer_for(tmp_path / "one", teacher_logits_path=path))
    arguments = {
        "teacher_logits_path": path, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "ddp_find_unused_parameters": True,
    }  # fmt: skip
    assert in_two_processes(save_logs, tmp_path, arguments) == [0, 0]
    assert_same_course(json.loads((tmp_path / "logs.json").read_text()), one, 2e-5)


def broken(folder: Path) -> str:
    path = cached(folder / "cache", shard_bytes=100_000)
    shard = next(Path(path).glob("answers-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    return path


REFUSALS: dict[str, tuple[Any, str]] = {
    "no cache": (lambda folder: {"teacher_logits_path": str(folder / "none")}, "no teacher cache there"),
    "two teachers": (
        lambda folder: {"teacher_logits_path": cached(folder / "cache"), "teacher_model": tiny_model("mixtral", seed=1)},
        "both say who teaches",
    ),
    "nobody to ask": (
        lambda folder: {"precompute_teacher_logits": True, "own_base": True}, "precompute_teacher_logits=True needs",
    ),
    "nobody": (lambda folder: {"own_base": True}, "there is no teacher: give teacher_model"),
    "other rows": (
        lambda folder: {"teacher_logits_path": cached(folder / "cache", unequal_rows(4))}, "4 of 8 texts are not in it",
    ),
    "other eval rows": (
        lambda folder: {
            "teacher_logits_path": cached(folder / "cache"), "eval_dataset": unequal_rows(3, seed=5),
        },
        "3 of 11 texts are not in it",
    ),
    "temperature": (
        lambda folder: {"teacher_logits_path": cached(folder / "cache"), "temperature": 2.0}, "it serves temperature 1.0, not 2",
    ),
    "reverse KL": (lambda folder: {"teacher_logits_path": cached(folder / "cache"), "beta": 1.0}, "beta=1.0 weighs"),
    "more tokens": (
        lambda folder: {"teacher_logits_path": cached(folder / "cache", top_k=8), "loss_top_k": 16}, "keeps 8 tokens",
    ),
    "vocabulary": (
        lambda folder: {
            "teacher_logits_path": cached(folder / "cache"), "student": tiny_model("mixtral", vocab_size=VOCAB_SIZE - 8),
        },
        "over 320 ids and the student has 312",
    ),
    "damaged": (lambda folder: {"teacher_logits_path": broken(folder)}, "its hash is not the one"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_before_training_in_one_line(case: str, tmp_path: Path) -> None:
    arguments, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message) as error:
        trainer_for(tmp_path, **arguments(tmp_path))
    assert "\n" not in str(error.value)


def test_rows_that_the_cache_lacks_stop_an_evaluation_given_later(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, teacher_logits_path=cached(tmp_path / "cache"))
    with pytest.raises(ValueError, match="holds no answers to"):
        trainer.evaluate(unequal_rows(3, seed=5))


@pytest.mark.parametrize("given", ["peft_config", "model"])
def test_base_of_an_adapter_teaches_as_a_copy_of_it_would(given: str, tmp_path: Path) -> None:
    runs = []
    for own_base in (False, True):
        torch.manual_seed(0)
        adapter: Any = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        student, arguments = tiny_model("olmoe"), {"peft_config": adapter}
        teacher = copy.deepcopy(student)
        if given == "model":
            from peft import get_peft_model

            student, arguments = get_peft_model(student, adapter), {}
        if not own_base:
            arguments["teacher_model"] = teacher
        trainer = trainer_for(
            tmp_path, student=student, own_base=own_base, max_steps=4, learning_rate=1e-2, gradient_checkpointing=True,
            **arguments,
        )  # fmt: skip
        runs.append((logs(trainer), trainer))
    assert_same_course(runs[1][0], runs[0][0], 1e-5)
    assert runs[1][0][0]["kl"] > 1e-3 and runs[1][0][-1]["kl"] < runs[1][0][0]["kl"]
    model = runs[1][1].model
    assert model.training and any(weight.requires_grad for weight in model.parameters())


def test_finished_cache_outlives_the_run_that_wrote_it(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", precompute_teacher_logits=True)
    shutil.move(tmp_path / "run" / "teacher-cache", tmp_path / "elsewhere")
    assert TeacherCache.open(tmp_path / "elsewhere").manifest.texts == len(trainer.train_dataset)


def test_stage_of_a_recipe_trains_from_answers_that_it_wrote_and_goes_on_from_them(tmp_path: Path) -> None:
    save_tiny(tmp_path / "student", "phimoe")
    save_tiny(tmp_path / "teacher", "phimoe", seed=1)
    ids = torch.randint(5, VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])

    def train(max_steps: int) -> list[dict[str, Any]]:
        given = {
            "max_steps": max_steps, "precompute_teacher_logits": True, "save_steps": 1, "logging_steps": 1, "use_cpu": True,
            "learning_rate": 1e-3,
        }  # fmt: skip
        arguments = training_arguments(given, tmp_path / "checkpoints", 16, 0, "stages.0.distillation")
        return distil(
            tmp_path / "student", tmp_path / "teacher", arguments, tiny_tokenizer(), rows, rows, "stage-1", "float32"
        )[1]

    first = train(1)
    manifest = tmp_path / "checkpoints" / "teacher-cache" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    history = train(2)
    assert manifest.stat().st_mtime_ns == written
    assert history[0] == first[0] and [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert all(0 < entry["teacher_top_k_mass"] < 1 for entry in history if "loss" in entry)
