"""A tiny recipe on a tiny model and real prose, for the tests of recipes, runs and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from tiny import save_tiny, write_text


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


def write_recipe(folder: Path, values: dict[str, Any], name: str = "recipe.yaml") -> Path:
    """Write a recipe as YAML."""
    (folder / name).write_text(yaml.safe_dump(values))
    return folder / name
