"""What a Trainer publishes: the form that others serve, our card, one commit; its checkpoints resume as ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetInfo
from hub_client import TOKEN, serving, use_here
from hub_server import metadata_errors
from runs import settings, trainer_for, unequal_rows
from safetensors.torch import load_file
from tiny import save_tiny, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from slimmoe_hf.callbacks import SlimmingCallback
from slimmoe_hf.card import MARK
from slimmoe_hf.plan import CompressionPlan, Target
from slimmoe_hf.publishing import hub_datasets
from slimmoe_hf.trainer import DistillationTrainer

NO_BIASES = {"attention_bias": False, "lm_head_bias": False}


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
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} - {".gitattributes"}


@pytest.mark.parametrize("biases", [{}, NO_BIASES], ids=["with biases", "without"])
@torch.no_grad()
def test_a_final_model_has_the_serving_form_and_computes_the_same(biases: dict[str, Any], tmp_path: Path):
    student = tiny_model("phimoe", **biases)
    trainer = trainer_for(tmp_path / "out", student=student, teacher_model=tiny_model("phimoe", seed=1))
    before = set(student.state_dict())
    trainer.save_model(str(tmp_path / "final"))
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["architectures"] == ["PhiMoEForCausalLM"] and config["use_cache"] is True
    assert config["attention_bias"] is config["lm_head_bias"] is True
    assert "lm_head.bias" in load_file(tmp_path / "final" / "model.safetensors")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded.eval()(**tiny_batch()).logits, student.eval()(**tiny_batch()).logits)
    assert set(student.state_dict()) == before, "the model that is trained stays as it is"


def test_checkpoints_hold_the_trained_weights_only_and_resume_to_the_same_end(tmp_path: Path):
    def trained(folder: Path, steps: int, **given: Any) -> dict[str, torch.Tensor]:
        trainer = trainer_for(
            folder, student=tiny_model("phimoe", **NO_BIASES), teacher_model=tiny_model("phimoe", seed=1, **NO_BIASES),
            max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=2, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer.train(**given)
        trainer.save_model(str(folder / "final"))
        return load_file(folder / "final" / "model.safetensors")

    whole = trained(tmp_path / "a", 4)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert "lm_head.bias" not in load_file(checkpoint / "model.safetensors")
    assert json.loads((checkpoint / "config.json").read_text())["architectures"] == ["PhimoeForCausalLM"]
    resumed = trained(tmp_path / "a", 4, resume_from_checkpoint=str(checkpoint))
    assert whole.keys() == resumed.keys() and "lm_head.bias" in whole
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_push_to_hub_brings_the_model_its_plan_and_our_card_in_one_commit(hub: Path, tmp_path: Path):
    out = tmp_path / "out"
    calibration = Dataset.from_list([{"input_ids": row} for row in tiny_batch()["input_ids"].tolist()])
    save_tiny(tmp_path / "base", **NO_BIASES)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Base\n")
    trainer = DistillationTrainer(
        str(tmp_path / "base"), str(tmp_path / "base"),
        settings(out, hub_model_id="me/slim", save_strategy="steps", save_steps=1, hub_private_repo=True,
                 dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=unequal_rows(), processing_class=tiny_tokenizer(),
        callbacks=[SlimmingCallback(Target(expert_width=16), calibration_dataset=calibration)],
    )  # fmt: skip
    trainer.train()
    assert MARK in (out / "README.md").read_text(), "TRL writes a card at every checkpoint; it must be ours"
    before = len((hub / "commits.log").read_text().splitlines()) if (hub / "commits.log").exists() else 0
    commit = trainer.push_to_hub(dataset_name="someone/text", tags="test")
    there = hub / "me" / "slim"
    assert commit.oid in commit.commit_url and len((hub / "commits.log").read_text().splitlines()) == before + 1
    assert files(there) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "plan/plan.json", "plan/plan.safetensors", "plan/repairs.safetensors",
    }  # fmt: skip
    assert CompressionPlan.load(there / "plan").sha256 == CompressionPlan.load(out / "plan").sha256
    text = (there / "README.md").read_text()
    data = yaml.safe_load(text.split("---\n")[1])
    assert MARK in text and list(metadata_errors(text)) == [] and "# slim\n" in text
    assert (
        data["license"] == "mit" and data["datasets"] == ["someone/text"] and {"slimmoe", "test"} <= set(data["tags"])
    )
    assert "every expert from 32 to 16 neurons" in text and "KL to the teacher, training text" in text
    assert "| learning rate | 0.001, linear |" in text and "| optimizer steps | 2 |" in text
    for file in (file for file in there.rglob("*") if file.is_file()):
        assert TOKEN.encode() not in file.read_bytes() and str(tmp_path).encode() not in file.read_bytes(), file
    loaded, info = AutoModelForCausalLM.from_pretrained("me/slim", output_loading_info=True)
    assert not any(info.values()) and loaded.config.use_cache is True
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**tiny_batch()).logits, trainer.model.eval()(**tiny_batch()).logits)


def test_an_earlier_push_of_a_stock_trainer_is_cleaned_of_pickles_and_old_shards(hub: Path, tmp_path: Path):
    there = hub / "me" / "again"
    there.mkdir(parents=True)
    for name in ("training_args.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "NOTES.md"):
        (there / name).write_text("old")
    trainer = trainer_for(tmp_path / "out", student=tiny_model("mixtral"), hub_model_id="me/again")
    trainer.push_to_hub()
    assert not files(there) & {"training_args.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert {"NOTES.md", "model.safetensors", "README.md"} <= files(there)


def test_a_card_that_a_person_wrote_survives_training_and_pushing(hub: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    trainer = trainer_for(tmp_path / "out", hub_model_id="me/mine", save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.push_to_hub()
    assert (hub / "me" / "mine" / "README.md").read_text() == "# Mine\n"


def test_a_plain_trainer_with_the_callback_pushes_a_model_with_a_cache_and_tags(hub: Path, tmp_path: Path):
    calibration = Dataset.from_list([{"input_ids": row} for row in tiny_batch()["input_ids"].tolist()])
    rows = Dataset.from_list([{"input_ids": r, "labels": r} for r in tiny_batch()["input_ids"].tolist()])
    seen: list[bool] = []

    class Watching(Trainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(model.config.use_cache)
            if len(seen) == 1:
                self.push_to_hub()
            return super().training_step(model, *args, **kwargs)

    trainer = Watching(
        tiny_model("phimoe"),
        TrainingArguments(str(tmp_path / "out"), max_steps=2, report_to=[], use_cpu=True, hub_model_id="me/plain",
                          save_strategy="no", disable_tqdm=True),
        train_dataset=rows, processing_class=tiny_tokenizer(),
        callbacks=[SlimmingCallback(Target(expert_width=16), calibration_dataset=calibration)],
    )  # fmt: skip
    trainer.train()
    assert seen == [False, False], "a push in between does not turn the cache on for training"
    trainer.push_to_hub()
    there = hub / "me" / "plain"
    assert json.loads((there / "config.json").read_text())["use_cache"] is True
    assert {"moe", "pruning", "slimmoe"} <= set(
        yaml.safe_load((there / "README.md").read_text().split("---\n")[1])["tags"]
    )
    assert (there / "plan" / "plan.json").is_file()


def test_a_dataset_remembers_where_on_the_hub_it_came_from():
    info = DatasetInfo(download_checksums={
        "hf://datasets/someone/text@0123/data/train.parquet": {}, "https://example.org/more.txt": {},
    })  # fmt: skip
    assert hub_datasets(Dataset.from_dict({"text": ["a"]}, info=info).map(lambda row: row)) == ["someone/text"]
    assert hub_datasets(unequal_rows()) == [] and hub_datasets(None) == []
