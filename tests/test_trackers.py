"""`report_to`: what TensorBoard and Trackio are told, read back with their own readers. Neither is a dependency."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from runs import in_child, trainer_for, unequal_rows

MEANS = ("kl", "ce", "router_kl", "hidden_mse", "entropy", "top1_agreement", "teacher_top_k_mass")
TOLD = (*(f"{split}/{name}" for split in ("train", "eval") for name in (*MEANS, "num_tokens", "loss")),
        "train/grad_norm", "train/router_load_min", "train/router_load_max")  # fmt: skip


def history_of(folder: Path, tracker: str) -> list[dict[str, Any]]:
    """Train two steps that report to a tracker; what the run itself remembers."""
    trainer = trainer_for(
        folder, report_to=[tracker], eval_dataset=unequal_rows(3, seed=5), eval_strategy="steps", eval_steps=1,
        loss_top_k=8, router_logits_weight=0.5, hidden_states_weight=0.5, project=folder.name, run_name="tiny",
    )  # fmt: skip
    trainer.train()
    assert any("router_load" in entry for entry in trainer.state.log_history)  # for plots; no tracker could take it
    return trainer.state.log_history


def expected(history: list[dict[str, Any]], name: str) -> list[float]:
    split, _, key = name.partition("/")
    key = key if split == "train" else f"eval_{key}"
    return [entry[key] for entry in history if key in entry]


def test_tensorboard_is_told_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="needs `pip install tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    history = history_of(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert set(TOLD) <= set(events.Tags()["scalars"])
    for name in TOLD:
        told = [event.value for event in events.Scalars(name)]
        assert len(told) == 2 and told == pytest.approx(expected(history, name), rel=1e-6), name
    tags = [tag for found in events.Tags().values() if isinstance(found, list) for tag in found]
    assert "train/router_load" not in tags


def report_to_trackio(folder: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    history = history_of(folder, "trackio")  # which ends trackio's run with its own
    (folder / "told.json").write_text(json.dumps([history, SQLiteStorage.get_logs(folder.name, "tiny")]))
    os._exit(0)  # its server's threads outlive it


def test_trackio_is_told_every_number(tmp_path: Path) -> None:
    """On this machine (`trackio_space_id` stays None), and in the tests' own folder."""
    trackio = pytest.importorskip("trackio", reason="needs `pip install trackio`")
    assert str(trackio.utils.TRACKIO_DIR) == os.environ["TRACKIO_DIR"]
    assert in_child(report_to_trackio, tmp_path) == 0
    history, told = json.loads((tmp_path / "told.json").read_text())
    for name in TOLD:
        values = list({entry["step"]: entry[name] for entry in told if name in entry}.values())  # it may send one twice
        assert len(values) == 2 and values == pytest.approx(expected(history, name), rel=1e-6), name
    assert not any("router_load" in key.split("/") for entry in told for key in entry)
