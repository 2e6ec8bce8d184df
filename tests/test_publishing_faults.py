"""What a Trainer must never publish: its token, places on this machine, and an origin that nothing shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from hub_client import TOKEN, serving, use_here
from peft import LoraConfig
from runs import trainer_for
from tiny import save_tiny, tiny_batch, tiny_model
from transformers import AutoModelForCausalLM

from slimmoe_hf.callbacks import SlimmingCallback
from slimmoe_hf.identity import model_fingerprint
from slimmoe_hf.plan import Target
from slimmoe_hf.trainer import DistillationTrainer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    root = tmp_path_factory.mktemp("hub")
    with serving(root, users=True) as endpoint:
        yield root, endpoint


@pytest.fixture
def hub(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    use_here(monkeypatch, served[1], tmp_path / "home")
    return served[0]


def files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - {".gitattributes"}


def refuse_private(root: Path, *words: str) -> None:
    """No file that the Hub ever got, committed or not, may hold a word."""
    for file in root.rglob("*"):
        found = [word for word in words if file.is_file() and word.encode() in file.read_bytes()]
        assert not found, f"{file} holds {found}"


@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints", "end"])
def test_nothing_is_pushed_while_it_trains_and_never_the_token(strategy: str, hub: Path, tmp_path: Path):
    trainer = trainer_for(
        tmp_path / "out", hub_model_id=f"me/{strategy}", push_to_hub=True, hub_token=TOKEN, hub_strategy=strategy,
        hub_always_push=True, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    assert files(hub / "me" / strategy) == set()
    trainer.save_model()
    assert "model.safetensors" in files(hub / "me" / strategy)
    assert not [name for name in files(hub / "me" / strategy) if name.endswith((".bin", ".pt"))]
    refuse_private(hub, TOKEN, str(tmp_path))


def lora_of(base: str, folder: Path, repo: str) -> DistillationTrainer:
    student = AutoModelForCausalLM.from_pretrained(base)
    return trainer_for(folder, "phimoe", student, peft_config=LoraConfig(target_modules=["q_proj"]), hub_model_id=repo)


def test_an_adapter_of_a_local_model_is_not_pushed_and_one_of_a_known_model_is(hub: Path, tmp_path: Path):
    save_tiny(tmp_path / "base")
    trainer = lora_of(str(tmp_path / "base"), tmp_path / "out", "me/local")
    with pytest.raises(ValueError, match="names its model by a path of yours") as caught:
        trainer.push_to_hub()
    assert "\n" not in str(caught.value) and files(hub / "me" / "local") == set()
    save_tiny(hub / "someone" / "base")
    lora_of("someone/base", tmp_path / "known", "me/known").push_to_hub(revision="v2")
    there = hub / ".hub" / "branches" / "me" / "known" / "v2"
    assert json.loads((there / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/base"
    assert 'from_pretrained(model, "me/known", revision="v2")' in (there / "README.md").read_text()
    refuse_private(hub, str(tmp_path))


def test_a_plan_does_not_say_where_its_teacher_lies(hub: Path, tmp_path: Path):
    save_tiny(tmp_path / "big-teacher", seed=1)
    calibration = Dataset.from_list([{"input_ids": row} for row in tiny_batch()["input_ids"].tolist()])
    slimming = SlimmingCallback(
        Target(expert_width=16), calibration_dataset=calibration, loss="kd_topk", teacher_model=tmp_path / "big-teacher"
    )
    trainer = trainer_for(
        tmp_path / "out", student=tiny_model("phimoe"), teacher_model=tiny_model("phimoe", seed=1), callbacks=[slimming],
        max_steps=1, hub_model_id="me/planned",
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    plan = json.loads((hub / "me" / "planned" / "plan" / "plan.json").read_text())
    assert plan["request"]["teacher_model"] == "big-teacher"
    refuse_private(hub, str(tmp_path))


@pytest.mark.parametrize("place", ["out", "student"])
def test_a_teacher_on_the_hub_is_only_the_origin_where_a_plan_shows_it(place: str, hub: Path, tmp_path: Path):
    save_tiny(hub / "someone" / "teacher", "mixtral", seed=1)
    (hub / "someone" / "teacher" / "README.md").write_text("---\nlicense: mit\n---\n# Teacher\n")
    save_tiny(tmp_path / "student", "mixtral")
    teacher = AutoModelForCausalLM.from_pretrained("someone/teacher")
    trainer = trainer_for(
        tmp_path / "out", student=AutoModelForCausalLM.from_pretrained(tmp_path / "student"), teacher_model=teacher
    )

    def said() -> dict[str, object]:
        trainer.create_model_card()
        return dict(yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1]))

    assert not said().keys() & {"base_model", "base_model_relation", "license"}
    plan = tmp_path / place / "plan" / "plan.json"
    plan.parent.mkdir(parents=True)
    plan.write_text(json.dumps({"fingerprint": model_fingerprint(tiny_model("mixtral"))}))
    assert "base_model" not in said(), "a plan for other weights"
    plan.write_text(json.dumps({"fingerprint": model_fingerprint(teacher)}))
    assert said()["base_model"] == "someone/teacher"
