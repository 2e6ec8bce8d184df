"""A tiny recipe on a tiny model and real prose, for the tests of recipes, runs and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tiny import documents, save_tiny, tiny_seq2seq, tiny_tokenizer, write_text


def tiny_recipe(folder: Path, family: str = "phimoe") -> dict[str, Any]:
    """A two-stage recipe whose model and text it writes into `folder`, if they are not there yet."""
    if not (folder / "teacher").exists():
        save_tiny(folder / "teacher", family)
        write_text(folder / "text.jsonl", 100)
    training = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": 2}
    return {
        "model": str(folder / "teacher"),
        "data": {"source": str(folder / "text.jsonl"), "max_length": 64},
        "stages": [
            {
                "target": {"expert_width": 16},
                "calibration": {"tokens": 2048, "loss": "lm"},
                "distillation": dict(training),
            },
            {
                "target": {"expert_width": 8, "kv_groups": 1},
                "calibration": {"tokens": 1024},
                "distillation": dict(training),
            },
        ],
        "evaluation": {"max_new_tokens": 4},
        "output": str(folder / "run"),
    }


SECRET = "hf_SecretThatStandsInTheRecipeOfTheRun01"


def whole_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of the fixture `whole_run`: `tiny_recipe`, logged and evaluated, with a secret and a licensed original."""
    recipe = tiny_recipe(folder)
    if not (folder / "teacher" / "LICENSE").exists():
        card = "---\nlicense: mit\nlanguage: en\nmodel_name: tiny-base\n---\n# Tiny\n"
        (folder / "teacher" / "README.md").write_text(card)
        (folder / "teacher" / "LICENSE").write_text("Do as you like.\n")
    for stage in recipe["stages"]:
        stage["distillation"] |= {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    recipe["stages"][0]["distillation"] |= {"hub_token": SECRET}
    return recipe


def write_recipe(folder: Path, values: dict[str, Any], name: str = "recipe.yaml") -> Path:
    """Write a recipe as YAML."""
    (folder / name).write_text(yaml.safe_dump(values))
    return folder / name


def tiny_pairs_recipe(folder: Path) -> dict[str, Any]:
    """Merge, then factor: a recipe whose Switch Transformer and pairs it writes into `folder`, if they are not there yet."""
    if not (folder / "teacher").exists():
        blocks = {
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
        }
        tiny_seq2seq(**blocks, d_ff=48, dropout_rate=0.1).save_pretrained(folder / "teacher")
        tiny_tokenizer().save_pretrained(folder / "teacher")
        write_pairs(folder / "pairs.jsonl")
    training = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 2}
    loss = {"temperature": 2.0, "distillation_weight": 0.2, "crossentropy_weight": 1.0}
    return {
        "task": "seq2seq",
        "model": str(folder / "teacher"),
        "data": {"source": str(folder / "pairs.jsonl"), "max_source_length": 64, "max_target_length": 24},
        "stages": [
            {
                "merge": {"num_experts": 2},
                "calibration": {"tokens": 1024, "reconstruct": True},
                "distillation": {**training, **loss},
            },
            {"factor": {"rank": 8, "density": 0.1}, "distillation": {**training, **loss}},
        ],
        "evaluation": {"tokens": 512, "max_new_tokens": 6},
        "output": str(folder / "run"),
    }


def write_pairs(path: Path, pairs: int = 600) -> Path:
    """Eight words of real prose, and the two that follow."""
    rows = []
    for text in documents():
        words = text.split()
        for start in range(0, len(words) - 10, 10):
            rows.append(
                {"prompt": " ".join(words[start : start + 8]), "completion": " ".join(words[start + 8 : start + 10])}
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:pairs]))
    return path
