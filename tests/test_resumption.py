"""A run killed at any point and started again ends with the same weights as one left alone, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from runs import cached, in_child, in_two_processes, trainer_for, unequal_rows
from safetensors.torch import load_file, save_file
from tiny import FAMILY_NAMES, tiny_batch, tiny_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from slimmoe_hf.resumption import (
    MARK,
    ResumableTrainer,
    is_complete,
    last_complete_checkpoint,
    load_weights,
    mark_complete,
    require_complete,
)
from slimmoe_hf.trainer import DistillationTrainer

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILY_NAMES},
    "phimoe tied": ("phimoe", {"tie_word_embeddings": True}),
    "olmoe tied": ("olmoe", {"tie_word_embeddings": True}),
    "phimoe without biases": ("phimoe", {"attention_bias": False, "lm_head_bias": False}),
    "phimoe head_dim 16": ("phimoe", {"head_dim": 16}),
    "mixtral head_dim 16": ("mixtral", {"head_dim": 16}),
}


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """Every weight another one: the initial ones would hide a loader that loads nothing."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=generator))
    return model


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_load_weights_restores_every_weight_in_place(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    saved = changed(tiny_model(family, **overrides))
    saved.save_pretrained(tmp_path, max_shard_size="100KB")
    model = tiny_model(family, **overrides)
    before = dict(model.named_parameters())
    load_weights(model, tmp_path)
    assert_same_weights(model.state_dict(), saved.state_dict())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    batch = tiny_batch()
    assert torch.equal(model(**batch).logits, saved(**batch).logits)


def test_load_weights_keeps_the_dtype_of_the_model(tmp_path: Path) -> None:
    saved = changed(tiny_model("mixtral"))
    saved.save_pretrained(tmp_path)
    model = tiny_model("mixtral").to(torch.bfloat16)
    load_weights(model, tmp_path)
    assert_same_weights(model.state_dict(), saved.to(torch.bfloat16).state_dict())


def without(name: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_more(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "stray": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


SPOILT: dict[str, tuple[dict[str, Any], Callable[[Path], None], str]] = {
    "narrower": (
        {"intermediate_size": 16}, lambda folder: None,
        r"mlp.experts.gate_up_proj is \[4, 32, 32\] there and \[4, 64, 32\] here",
    ),
    "fewer experts": ({"num_local_experts": 2}, lambda folder: None, r"mlp.gate.weight is \[2, 32\] there"),
    "fewer layers": ({"num_hidden_layers": 1}, lambda folder: None, r"model.layers.1.\S+ is missing"),
    "more layers": ({"num_hidden_layers": 3}, lambda folder: None, r"model.layers.2.\S+ is unexpected"),
    "a tensor gone": ({}, functools.partial(without, "model.norm.weight"), "model.norm.weight is missing"),
    "an expert gone": (
        {}, functools.partial(without, "model.layers.1.block_sparse_moe.experts.2.w2.weight"),
        r"experts.down_proj is \[3, 32, 32\] there and \[4, 32, 32\] by its config",
    ),
    "a tensor too many": ({}, with_more, "stray is unexpected"),
    "truncated": ({}, truncated, "the saved model cannot be read"),
    "no config": ({}, lambda folder: (folder / "config.json").unlink(), "no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_load_weights_refuses_and_names_what_does_not_fit(case: str, tmp_path: Path) -> None:
    overrides, spoil, message = SPOILT[case]
    changed(tiny_model("mixtral", **overrides)).save_pretrained(tmp_path)
    spoil(tmp_path)
    model = tiny_model("mixtral")
    with pytest.raises(ValueError, match=message) as error:
        load_weights(model, tmp_path)
    assert "\n" not in str(error.value)
    assert_same_weights(model.state_dict(), tiny_model("mixtral").state_dict())


def test_load_weights_refuses_untied_weights_for_a_tied_model(tmp_path: Path) -> None:
    changed(tiny_model("mixtral")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="are tied here and differ there"):
        load_weights(tiny_model("mixtral", tie_word_embeddings=True), tmp_path)


# Three steps an epoch, checkpoints after every second step: one of them falls on the end of an epoch.
RUN = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8, "save_strategy": "steps",
    "save_steps": 2, "lr_scheduler_type": "cosine", "crossentropy_weight": [0.0, 0.5], "logging_steps": 3,
}  # fmt: skip


def run(folder: Path, family: str, **arguments: Any) -> DistillationTrainer:
    return trainer_for(folder, family, train_dataset=unequal_rows(12), **{**RUN, **arguments})


@functools.cache
def uninterrupted(family: str, folder: Path) -> dict[str, Tensor]:
    trainer = run(folder, family)
    trainer.train()
    return trainer.model.state_dict()


class KillAfter(TrainerCallback):
    """SIGKILL right after an optimizer step, before anything of it is logged or saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_between_steps(folder: Path, family: str, step: int) -> None:
    run(folder, family, callbacks=[KillAfter(step)]).train()


def killed_while_saving(folder: Path, family: str, step: int, method: str) -> None:
    """Die on entering one part of writing a checkpoint."""
    trainer = run(folder, family)
    original = getattr(trainer, method)

    def die(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(trainer, method, die)
    trainer.train()


@pytest.mark.parametrize(
    ("family", "step"),
    [
        ("phimoe", 5), ("mixtral", 5), *(
            pytest.param(*more, marks=pytest.mark.slow) for more in (("olmoe", 5), ("qwen3_moe", 5), ("phimoe", 3), ("phimoe", 7))
        ),
    ],
)  # fmt: skip
def test_killed_run_ends_with_the_weights_of_one_left_alone(
    family: str, step: int, tmp_path: Path, wholes: Path
) -> None:
    assert in_child(killed_between_steps, tmp_path / "killed", family, step) == -signal.SIGKILL
    trainer = run(tmp_path / "killed", family)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert_same_weights(trainer.model.state_dict(), uninterrupted(family, wholes / family))


# What fits a large student on one GPU; Adafactor's averages are float32 also where the weights are not.
IN_BFLOAT16: dict[str, dict[str, Any]] = {
    "adafactor": {"optim": "adafactor"},
    "adafactor, autocast": {"optim": "adafactor", "bf16": True},
    "adamw": {"bf16": True},
}


def run_in_bfloat16(folder: Path, case: str, **arguments: Any) -> DistillationTrainer:
    student = tiny_model("phimoe").to(torch.bfloat16)
    return run(folder, "phimoe", student=student, learning_rate=1e-2, **IN_BFLOAT16[case], **arguments)


def killed_in_bfloat16(folder: Path, case: str) -> None:
    run_in_bfloat16(folder, case, callbacks=[KillAfter(5)]).train()


@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_killed_run_of_bfloat16_weights_ends_with_those_of_one_left_alone(case: str, tmp_path: Path) -> None:
    """torch's `load_state_dict` would round Adafactor's averages to the dtype of the weights."""
    assert in_child(killed_in_bfloat16, tmp_path / "killed", case) == -signal.SIGKILL
    resumed, whole = (run_in_bfloat16(tmp_path / name, case) for name in ("killed", "whole"))
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert {weight.dtype for weight in resumed.model.parameters()} == {torch.bfloat16}
    assert_same_weights(resumed.model.state_dict(), whole.model.state_dict())
    states = [trainer.optimizer.state_dict()["state"] for trainer in (resumed, whole)]
    for name, state in states[1].items():
        for key, value in state.items():
            loaded = states[0][name][key]
            assert not isinstance(value, Tensor) or (loaded.dtype == value.dtype and torch.equal(loaded, value)), key


@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_torn_checkpoint_is_passed_over(method: str, tmp_path: Path, wholes: Path) -> None:
    assert in_child(killed_while_saving, tmp_path, "phimoe", 4, method) == -signal.SIGKILL
    assert Path(get_last_checkpoint(tmp_path)).name == "checkpoint-4"  # what the stock Trainer would take
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    trainer = run(tmp_path, "phimoe")
    with pytest.raises(ValueError, match=rf"checkpoint-4 cannot be resumed from: it has no {MARK}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(trainer.model.state_dict(), uninterrupted("phimoe", wholes / "phimoe"))
    assert is_complete(tmp_path / "checkpoint-4")


def test_checkpoint_that_is_written_over_is_no_longer_vouched_for(tmp_path: Path) -> None:
    """The torn second writing has the names and sizes of the first."""
    run(tmp_path, "mixtral", max_steps=2).train()
    assert is_complete(tmp_path / "checkpoint-2")
    assert in_child(killed_while_saving, tmp_path, "mixtral", 2, "_save_rng_state") == -signal.SIGKILL
    assert last_complete_checkpoint(tmp_path) is None


def test_fused_experts_come_back_on_resume(tmp_path: Path) -> None:
    """The stock Trainer leaves them as they were (transformers #48805)."""
    first = run(tmp_path, "mixtral", max_steps=2)
    first.train()
    second = run(tmp_path, "mixtral", max_steps=2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert not torch.equal(second.model.state_dict()[name], first.model.state_dict()[name])
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(second.model.state_dict(), first.model.state_dict())


def test_best_model_at_end_brings_its_experts(tmp_path: Path) -> None:
    """Training lowers the divergence; asked for the greatest, the best checkpoint is the first."""
    trainer = run(
        tmp_path, "phimoe", learning_rate=1e-2, eval_dataset=unequal_rows(4, seed=3), eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="kl", greater_is_better=True, max_steps=6,
        save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    first, *later = (entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry)
    assert first > max(later)
    assert trainer.state.best_global_step == 2
    expected = tiny_model("phimoe", seed=4)
    load_weights(expected, tmp_path / "checkpoint-2")
    assert_same_weights(trainer.model.state_dict(), expected.state_dict())
    assert trainer.evaluate()["eval_kl"] == pytest.approx(first, rel=1e-12)


def damage(folder: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


DAMAGE = {
    "no optimizer": ("optimizer.pt", None, "optimizer.pt is missing"),
    "no schedule": ("scheduler.pt", None, "scheduler.pt is missing"),
    "short weights": ("model.safetensors", b"short", r"model.safetensors has 5 bytes, not \d+"),
    "no mark": (MARK, None, f"it has no {MARK}"),
    "broken mark": (MARK, b"{", f"its {MARK} is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoint_is_an_error_when_named_and_passed_over_when_not(case: str, tmp_path: Path) -> None:
    name, content, message = DAMAGE[case]
    trainer = run(tmp_path, "mixtral", max_steps=4)
    trainer.train()
    damage(tmp_path / "checkpoint-4", name, content)
    with pytest.raises(ValueError, match=f"checkpoint-4 cannot be resumed from: {message}"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    damage(tmp_path / "checkpoint-2", name, content)
    with pytest.raises(ValueError, match=f"holds no complete checkpoint .*checkpoint-2: {message}"):
        trainer.train(resume_from_checkpoint=True)


def test_checkpoint_saved_without_optimizer_is_refused(tmp_path: Path) -> None:
    run(tmp_path, "mixtral", max_steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match="it holds no optimizer state"):
        require_complete(tmp_path / "checkpoint-2")


def test_checkpoint_of_fsdp_is_refused_elsewhere(tmp_path: Path) -> None:
    """Its optimizer lies under another name, and the stock Trainer would start a fresh one in silence."""
    run(tmp_path, "mixtral", max_steps=2).train()
    (tmp_path / "checkpoint-2" / "pytorch_model_fsdp.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="it was written under FSDP, and this run is not under FSDP"):
        run(tmp_path, "mixtral", max_steps=2).train(resume_from_checkpoint=True)


def test_changed_width_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, "mixtral", max_steps=2).train()
    narrower = run(tmp_path, "mixtral", student=tiny_model("mixtral", intermediate_size=16))
    with pytest.raises(ValueError, match=r"gate_up_proj is \[4, 64, 32\] there and \[4, 32, 32\] here"):
        narrower.train(resume_from_checkpoint=True)


def test_rotation_keeps_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    """A torn checkpoint with more steps is left from a crash; it must not crowd out the only complete one."""
    (tmp_path / "checkpoint-90").mkdir(parents=True)
    (tmp_path / "checkpoint-90" / "model.safetensors").write_bytes(b"torn")
    run(tmp_path, "mixtral", save_total_limit=1).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-90"}
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-8"


def test_kill_before_the_mark_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    """With save_total_limit=1 the older one may only go once the newer is vouched for."""

    def train_and_die(folder: Path) -> None:
        killed_while_saving(folder, "mixtral", 4, "_save_rng_state")

    assert in_child(train_and_die, tmp_path) == -signal.SIGKILL
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_mark_vouches_for_names_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2" / "shard.pt").write_bytes(b"12345")
    mark_complete(tmp_path)
    assert json.loads((tmp_path / MARK).read_text()) == {"files": {"global_step2/shard.pt": 5}}
    assert is_complete(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [MARK]


def plain_trainer(folder: Path, callbacks: list[TrainerCallback] | None = None) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-2
    )
    rows = [{key: value[0] for key, value in tiny_batch(1, seed=seed).items()} for seed in range(16)]
    return ResumableTrainer(tiny_model("phimoe"), arguments, train_dataset=rows, callbacks=callbacks)


def plain_killed(folder: Path) -> None:
    plain_trainer(folder, [KillAfter(3)]).train()


def test_plain_trainer_resumes_exactly_too(tmp_path: Path) -> None:
    assert in_child(plain_killed, tmp_path / "killed") == -signal.SIGKILL
    resumed, whole = plain_trainer(tmp_path / "killed"), plain_trainer(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert_same_weights(resumed.model.state_dict(), whole.model.state_dict())


def test_noise_of_a_run_depends_on_its_seed_only(tmp_path: Path) -> None:
    """Whatever draws random numbers between building a trainer and training, such as a calibration."""
    first, second = run(tmp_path / "a", "phimoe", max_steps=2), run(tmp_path / "b", "phimoe", max_steps=2)
    first.train()
    torch.rand(100)
    second.train()
    assert_same_weights(first.model.state_dict(), second.model.state_dict())


def lora_run(folder: Path, callbacks: list[TrainerCallback] | None = None) -> DistillationTrainer:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    return run(folder, "mixtral", peft_config=adapter, callbacks=callbacks, learning_rate=1e-2)


def lora_killed(folder: Path) -> None:
    lora_run(folder, [KillAfter(5)]).train()


def test_adapter_resumes_exactly_too(tmp_path: Path) -> None:
    assert in_child(lora_killed, tmp_path / "killed") == -signal.SIGKILL
    resumed, whole = lora_run(tmp_path / "killed"), lora_run(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert_same_weights(resumed.model.state_dict(), whole.model.state_dict())


def train_in_two(folder: Path, steps: int, resume: bool) -> None:
    """A run of eight steps that may end early, as if killed; rank 0 leaves its weights."""

    class StopAfter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    trainer = run(folder, "phimoe", callbacks=[StopAfter()], ddp_find_unused_parameters=True)
    trainer.train(resume_from_checkpoint=resume)
    torch.save(trainer.model.state_dict(), folder / f"rank-{torch.distributed.get_rank()}.pt")


@pytest.mark.slow
def test_two_processes_resume_exactly_and_stay_equal(tmp_path: Path) -> None:
    assert in_two_processes(train_in_two, tmp_path / "whole", 8, False) == [0, 0]
    assert in_two_processes(train_in_two, tmp_path / "cut", 5, False) == [0, 0]
    assert in_two_processes(train_in_two, tmp_path / "cut", 8, True) == [0, 0]
    whole, *resumed = (torch.load(tmp_path / name) for name in ("whole/rank-0.pt", "cut/rank-0.pt", "cut/rank-1.pt"))
    for weights in resumed:
        assert_same_weights(weights, whole)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "teacher": ({"teacher_model": ("mixtral", 2)}, r"teacher was \w{12}\.\.\. and is \w{12}\.\.\.\. Continue"),
    "beta": ({"beta": 0.5}, "beta was 0.0 and is 0.5"),
    "two at once": (
        {"temperature": 2.0, "loss_top_k": 8}, "temperature was 1.0 and is 2.0; loss_top_k was 0 and is 8",
    ),
    "weights": ({"crossentropy_weight": [0.0, 1.0]}, r"crossentropy_weight was 0.0 and is \[0.0, 1.0\]"),
    "terms": ({"router_logits_weight": 1.0}, "router_logits_weight was 0.0 and is 1.0"),
    "cache": ({"precompute_teacher_logits": True}, r"teacher was \w{12}\.\.\. and is cache \w{12}\.\.\."),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_settings_are_refused_with_the_difference_named(change: str, tmp_path: Path) -> None:
    arguments, message = CHANGES[change]
    arguments = dict(arguments)
    if "teacher_model" in arguments:
        family, seed = arguments["teacher_model"]
        arguments["teacher_model"] = tiny_model(family, seed=seed)
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer_for(tmp_path, **saving).train()
    with pytest.raises(ValueError, match=message) as error:
        trainer_for(tmp_path, **saving, **arguments).train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert "\n" not in str(error.value)


def test_other_number_of_threads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(ValueError, match="number of threads was 1 and is 7"):
        trainer_for(tmp_path, max_steps=2).train(resume_from_checkpoint=tmp_path / "checkpoint-1")


def test_run_from_a_cache_resumes_exactly(tmp_path: Path) -> None:
    arguments = {
        "precompute_teacher_logits": True, "teacher_logits_path": str(tmp_path / "cache"), "save_strategy": "steps",
        "save_steps": 2, "max_steps": 4,
    }  # fmt: skip
    whole = trainer_for(tmp_path / "run", "phimoe", **arguments)
    whole.train()
    resumed = trainer_for(tmp_path / "run", "phimoe", **arguments)
    resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


PACKED: dict[str, Any] = {"packing": True, "packing_strategy": "bfd", "max_length": 40}
OTHERWISE: dict[str, dict[str, Any]] = {
    "packed": PACKED, "padding-free": {"padding_free": True, "max_length": None},
    "own base": {"own_base": True, "learning_rate": 1e-2}, "cache of 16 tokens": {"teacher_logits_path": "top_k"},
    "cache of hidden states, packed": {"teacher_logits_path": "hidden", **PACKED},
}  # fmt: skip


def run_otherwise(folder: Path, name: str, case: str, **arguments: Any) -> DistillationTrainer:
    arguments = {**RUN, **OTHERWISE[case], **arguments}
    rows = unequal_rows(12).select_columns(["input_ids"]) if "packing" in arguments else unequal_rows(12)
    if "teacher_logits_path" in arguments:
        arguments["teacher_logits_path"] = str(folder / arguments["teacher_logits_path"])
    if "own_base" in arguments:
        arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    return trainer_for(folder / name, "phimoe", train_dataset=rows, **arguments)


def killed_otherwise(folder: Path, case: str) -> None:
    run_otherwise(folder, "killed", case, callbacks=[KillAfter(5)]).train()


def prepare(folder: Path, case: str) -> None:
    kind = OTHERWISE[case].get("teacher_logits_path")
    if kind is not None:
        cached(folder / kind, unequal_rows(12), "phimoe", kind=kind, top_k=16)


@pytest.mark.parametrize("case", OTHERWISE)
def test_killed_run_of_another_kind_ends_with_the_weights_of_one_left_alone(case: str, tmp_path: Path) -> None:
    prepare(tmp_path, case)
    assert in_child(killed_otherwise, tmp_path, case) == -signal.SIGKILL
    resumed, whole = (run_otherwise(tmp_path, name, case) for name in ("killed", "whole"))
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert resumed.state.global_step == whole.state.global_step == 8
    assert_same_weights(resumed.model.state_dict(), whole.model.state_dict())


def train_otherwise_in_two(folder: Path, name: str, case: str, steps: int, resume: bool) -> None:
    class StopAfter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    trainer = run_otherwise(folder, name, case, callbacks=[StopAfter()], ddp_find_unused_parameters=True)
    trainer.train(resume_from_checkpoint=resume)
    torch.save(trainer.model.state_dict(), folder / name / f"rank-{torch.distributed.get_rank()}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["own base", "cache of hidden states, packed"])
def test_two_processes_of_another_kind_resume_exactly(case: str, tmp_path: Path) -> None:
    """Three starts of two processes each."""
    prepare(tmp_path, case)
    for name, steps, resume in (("whole", 8, False), ("cut", 5, False), ("cut", 8, True)):
        assert in_two_processes(train_otherwise_in_two, tmp_path, name, case, steps, resume) == [0, 0]
    whole, *resumed = (torch.load(tmp_path / name) for name in ("whole/rank-0.pt", "cut/rank-0.pt", "cut/rank-1.pt"))
    for weights in resumed:
        assert_same_weights(weights, whole)


def resume_in_two(folder: Path) -> None:
    with pytest.raises(ValueError, match="number of processes was 1 and is 2"):
        trainer_for(folder, max_steps=2).train(resume_from_checkpoint=folder / "checkpoint-1")


def test_other_number_of_processes_is_refused(tmp_path: Path) -> None:
    """Each has noise of its own, and the same rows fall on others."""
    trainer_for(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    assert in_two_processes(resume_in_two, tmp_path) == [0, 0]
