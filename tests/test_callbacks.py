"""`SlimmingCallback` in each kind of Trainer: the same plan, the same weights, and a clear answer to what cannot work."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from runs import in_two_processes
from tiny import documents, save_tiny, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from slimmoe_hf import (
    CompressionPlan,
    DistillationConfig,
    DistillationTrainer,
    SlimmingCallback,
    Target,
    apply_plan,
    collect_stats,
    make_plan,
)
from slimmoe_hf.data import batches, tokenize
from slimmoe_hf.families import moe_layers, shape_of
from slimmoe_hf.identity import model_sha256
from slimmoe_hf.reconstruction import reconstruct

COMMON = {
    "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "bf16": False, "disable_tqdm": True,
    "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True, "logging_steps": 1,
}  # fmt: skip


def text(start: int, stop: int) -> Dataset:
    return Dataset.from_dict({"text": [piece[:600] for piece in documents()[start:stop]]})


def tokens(start: int, stop: int) -> Dataset:
    return tokenize(text(start, stop), tiny_tokenizer(), 32)


def callback(**changes) -> SlimmingCallback:
    options = {"target": Target(expert_width=16), "calibration_dataset": text(0, 4), "max_length": 32, **changes}
    return SlimmingCallback(**options)


def plain_trainer(folder, model=None, callbacks=None, **changes) -> Trainer:
    arguments = {**COMMON, **changes}
    return Trainer(
        model=model or tiny_model("phimoe"), args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=tokens(10, 20), processing_class=tiny_tokenizer(), callbacks=callbacks or [callback()],
    )  # fmt: skip


def sft_trainer(folder) -> Trainer:
    return SFTTrainer(
        model=tiny_model("phimoe"), args=SFTConfig(output_dir=str(folder), max_length=32, router_aux_loss_coef=0.0, **COMMON),
        train_dataset=text(10, 20), processing_class=tiny_tokenizer(), callbacks=[callback(max_length=None)],
    )  # fmt: skip


def distillation_trainer(folder) -> Trainer:
    return DistillationTrainer(
        model=tiny_model("phimoe"), teacher_model=tiny_model("phimoe"),
        args=DistillationConfig(output_dir=str(folder), max_length=32, **COMMON),
        train_dataset=text(10, 20), processing_class=tiny_tokenizer(), callbacks=[callback(max_length=None)],
    )  # fmt: skip


@pytest.mark.parametrize("build", [plain_trainer, sft_trainer, distillation_trainer])
def test_every_trainer_cuts_the_same_and_trains_what_was_cut(build, tmp_path):
    """The callback gives what the functions give, and every expert of the slimmed model learns."""
    expected = tiny_model("phimoe")
    given = batches(tokens(0, 4), 8, 1)
    plan = make_plan(collect_stats(expected, given, progress=False), Target(expert_width=16))
    plan = reconstruct(expected, given, plan, progress=False)
    apply_plan(expected, plan)

    trainer = build(tmp_path)
    assert CompressionPlan.load(tmp_path / "plan").sha256 == plan.sha256
    assert model_sha256(trainer.model) == model_sha256(expected)
    trainer.train()
    for (_, before, router), (_, after, trained) in zip(moe_layers(expected), moe_layers(trainer.model), strict=True):
        assert not torch.equal(before.gate_up_proj, after.gate_up_proj)
        assert not torch.equal(before.down_proj, after.down_proj)
        assert not torch.equal(router.weight, trained.weight)
    trainer.save_model(tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    batch = {k: v for k, v in tiny_batch().items() if k != "labels"}
    assert torch.equal(reloaded(**batch).logits, trainer.model.eval()(**batch).logits)


def test_a_second_run_applies_the_stored_plan_instead_of_scoring(tmp_path, monkeypatch):
    plain_trainer(tmp_path)
    monkeypatch.setattr("slimmoe_hf.callbacks.collect_stats", lambda *a, **k: pytest.fail("scored again"))
    trainer = plain_trainer(tmp_path)
    assert shape_of(trainer.model.config).expert_width == 16


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target": Target(expert_width=8)}, r"target: .*16.* -> .*8"),
        ({"criterion": "taylor"}, "criterion: 'energy' -> 'taylor'"),
        ({"reconstruct": False}, "reconstruct: True -> False"),
        ({"criterion": "taylor", "loss": "lm"}, "loss: None -> 'lm'"),
        ({"calibration_dataset": text(4, 8)}, "calibration data: "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_changed_request_is_an_error_that_names_what_changed(change, named, tmp_path):
    plain_trainer(tmp_path)
    with pytest.raises(ValueError, match=named):
        plain_trainer(tmp_path, callbacks=[callback(**change)])


def test_a_plan_and_request_from_before_experts_could_be_dropped_are_the_same_request(tmp_path, monkeypatch):
    plain_trainer(tmp_path)
    file = tmp_path / "plan" / "plan.json"
    values = json.loads(file.read_text())
    values["request"]["target"] = {"expert_width": 16, "kv_groups": None}
    del values["request"]["expert_criterion"], values["target"]["num_experts"]
    file.write_text(json.dumps(values))
    monkeypatch.setattr("slimmoe_hf.callbacks.collect_stats", lambda *a, **k: pytest.fail("scored again"))
    plain_trainer(tmp_path)


def test_experts_are_dropped_before_training_too_and_trained_on(tmp_path):
    """Routers keep the rows of the experts that stay; what is saved loads plainly and says the same."""
    trainer = plain_trainer(tmp_path, callbacks=[callback(target=Target(num_experts=3), criterion="reap")])
    plan = CompressionPlan.load(tmp_path / "plan")
    routers = [router.weight.detach().clone() for _, _, router in moe_layers(trainer.model)]
    originals = [router.weight for _, _, router in moe_layers(tiny_model("phimoe"))]
    for layer, (kept, original) in enumerate(zip(routers, originals, strict=True)):
        assert torch.equal(kept, original[plan.experts[layer]])
    trainer.train()
    assert all(
        not torch.equal(old, new.weight) for old, (_, _, new) in zip(routers, moe_layers(trainer.model), strict=True)
    )
    trainer.save_model(tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    batch = {k: v for k, v in tiny_batch().items() if k != "labels"}
    assert shape_of(reloaded.config).num_experts == 3
    assert torch.equal(reloaded(**batch).logits, trainer.model.eval()(**batch).logits)
    with pytest.raises(ValueError, match="expert_criterion: None -> 'frequency'"):
        plain_trainer(
            tmp_path,
            callbacks=[callback(target=Target(num_experts=3), criterion="reap", expert_criterion="frequency")],
        )


def test_a_stale_plan_for_another_model_is_an_error(tmp_path):
    plain_trainer(tmp_path)
    with pytest.raises(ValueError, match="changed: model weights"):
        plain_trainer(tmp_path, model=tiny_model("phimoe", seed=1))


def test_a_model_already_cut_is_left_alone(tmp_path):
    trainer = plain_trainer(tmp_path)
    cut = model_sha256(trainer.model)
    assert model_sha256(plain_trainer(tmp_path, model=trainer.model).model) == cut


def test_a_plan_made_elsewhere_is_applied_and_one_of_another_model_refused(tmp_path):
    plain_trainer(tmp_path / "a", callbacks=[callback(reconstruct=False)])
    plan = CompressionPlan.load(tmp_path / "a" / "plan")
    for number, given in enumerate((plan, tmp_path / "a" / "plan")):
        trainer = plain_trainer(tmp_path / f"b{number}", callbacks=[SlimmingCallback(plan=given)])
        assert shape_of(trainer.model.config).expert_width == 16
        assert CompressionPlan.load(tmp_path / f"b{number}" / "plan").sha256 == plan.sha256
    with pytest.raises(ValueError, match="made for a model with the weights"):
        plain_trainer(tmp_path / "c", model=tiny_model("phimoe", seed=1), callbacks=[SlimmingCallback(plan=plan)])
    with pytest.raises(ValueError, match="either target="):
        SlimmingCallback(Target(expert_width=16), plan=plan)


def test_model_init_rebuilds_the_model_after_the_cut_and_is_refused(tmp_path):
    trainer = Trainer(
        model_init=lambda: tiny_model("phimoe"), args=TrainingArguments(output_dir=str(tmp_path), **COMMON),
        train_dataset=tokens(10, 20), processing_class=tiny_tokenizer(), callbacks=[callback()],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"expert_width=32 .* rebuilt after the cut"):
        trainer.train()


def test_an_optimizer_made_before_the_cut_is_refused(tmp_path):
    model = tiny_model("phimoe")
    trainer = Trainer(
        model=model, args=TrainingArguments(output_dir=str(tmp_path), **COMMON), train_dataset=tokens(10, 20),
        processing_class=tiny_tokenizer(), callbacks=[callback()],
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    )  # fmt: skip
    with pytest.raises(ValueError, match="the optimizer does not hold 4 of the slimmed model's parameters"):
        trainer.train()


def _peft():
    return get_peft_model(tiny_model("phimoe"), LoraConfig(target_modules=["q_proj"]))


def _meta():
    return tiny_model("phimoe").to("meta")


def _offloaded():
    model = tiny_model("phimoe")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_peft, "PEFT-wrapped model cannot be cut: slim first"),
        (_meta, "meta device has no weights"),
        (_offloaded, "offloaded by device_map cannot be cut"),
        (lambda: torch.nn.Linear(2, 2), "this is a Linear"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_way_out(build, message):
    from slimmoe_hf.callbacks import refuse_what_cannot_be_cut

    with pytest.raises(ValueError, match=message):
        refuse_what_cannot_be_cut(build())


def test_an_illegal_target_stops_before_any_scoring(tmp_path, monkeypatch):
    monkeypatch.setattr("slimmoe_hf.callbacks.collect_stats", lambda *a, **k: pytest.fail("scored"))
    with pytest.raises(ValueError, match="expert_width=64 is not between 8 and the model's width of 32"):
        plain_trainer(tmp_path, callbacks=[callback(target=Target(expert_width=64))])
    assert not (tmp_path / "plan").exists()


def test_a_plain_trainer_resumes_with_every_expert(tmp_path):
    """transformers alone would keep the experts and the router of the fresh model (its issue 48805)."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = plain_trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    plain_trainer(tmp_path / "cut", max_steps=4, **saving).train()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    resumed = plain_trainer(tmp_path / "cut", max_steps=4, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert model_sha256(resumed.model) == model_sha256(whole.model)


def test_a_torn_checkpoint_is_never_resumed_from(tmp_path):
    plain_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match=r"checkpoint-4 cannot be resumed from: optimizer\.pt has"):
        plain_trainer(tmp_path, max_steps=6).train(resume_from_checkpoint=str(_cheat(tmp_path / "checkpoint-4")))


def _cheat(checkpoint: Path) -> Path:
    """Put back what the Trainer itself needs to load, under the size the mark does not vouch for."""
    shutil.copy(checkpoint.with_name("checkpoint-2") / "optimizer.pt", checkpoint / "optimizer.pt")
    with (checkpoint / "optimizer.pt").open("ab") as file:
        file.write(b"\0")
    return checkpoint


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from test_callbacks import plain_trainer
from pathlib import Path
from slimmoe_hf.resumption import last_complete_checkpoint
folder = Path(sys.argv[1])
trainer = plain_trainer(folder, max_steps=30, save_strategy="steps", save_steps=5)
found = last_complete_checkpoint(folder)  # the kill may have hit the next one half-written, which True would take
trainer.train(resume_from_checkpoint=str(found) if found else None)
trainer.save_model(folder / "model")
"""


def _run(folder: Path, kill_at: Path | None = None) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    if kill_at is not None:
        while not kill_at.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    error = process.communicate()[1].decode()
    assert process.returncode == (-signal.SIGKILL if kill_at else 0), error


@pytest.mark.slow
def test_killed_and_started_again_a_callback_run_ends_the_same(tmp_path):
    _run(tmp_path / "whole")
    _run(tmp_path / "killed", kill_at=tmp_path / "killed" / "checkpoint-10" / "trainer_state.json")
    _run(tmp_path / "killed")
    whole, killed = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("whole", "killed"))
    assert model_sha256(whole) == model_sha256(killed)


def _cut_and_train(folder: Path) -> None:
    trainer = plain_trainer(folder, callbacks=[callback(reconstruct=False)])
    rank = torch.distributed.get_rank()
    assert torch.distributed.get_world_size() == 2
    folder.with_name(f"{folder.name}-rank{rank}").write_text(model_sha256(trainer.model))
    trainer.train()
    folder.with_name(f"{folder.name}-trained{rank}").write_text(model_sha256(trainer.model))


def test_two_processes_apply_identical_plans(tmp_path):
    """Each sweeps its share of the batches; both apply the plan that one process alone would make, and stay equal.

    Of slices: what is solved anew is one alone's but for the order of sums (`tests/test_reconstruction_use.py`).
    """
    assert in_two_processes(_cut_and_train, tmp_path / "run") == [0, 0]
    alone = plain_trainer(tmp_path / "alone", callbacks=[callback(reconstruct=False)])
    cut, trained = ({(tmp_path / f"run-{what}{rank}").read_text() for rank in (0, 1)} for what in ("rank", "trained"))
    assert cut == {model_sha256(alone.model)}
    assert len(trained) == 1 and trained != cut


def test_raw_text_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pass the tokenizer to the Trainer as processing_class="):
        Trainer(
            model=tiny_model("phimoe"), args=TrainingArguments(output_dir=str(tmp_path), **COMMON),
            train_dataset=tokens(10, 20), callbacks=[callback()],
        )  # fmt: skip


def test_a_teacher_on_disk_scores_like_the_same_teacher_in_memory(tmp_path):
    save_tiny(tmp_path / "teacher", seed=1)
    teachers = {"a": tmp_path / "teacher", "b": tiny_model("phimoe", seed=1), "own": None}
    for name, teacher in teachers.items():
        asked = callback(criterion="taylor", teacher_model=teacher, reconstruct=False)
        plain_trainer(tmp_path / name, callbacks=[asked])
    a, b, own = (CompressionPlan.load(tmp_path / name / "plan") for name in ("a", "b", "own"))
    assert a.sha256 == b.sha256 != own.sha256
    assert a.meta.teacher_sha256 == b.meta.teacher_sha256 == model_sha256(tiny_model("phimoe", seed=1))
