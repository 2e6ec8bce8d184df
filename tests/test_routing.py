"""Expert load: counted where the routers decide, and a router that starves an expert is named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from runs import trainer_for, unequal_rows
from tiny import FAMILY_NAMES, NUM_EXPERTS, NUM_LAYERS, tiny_batch, tiny_model

from slimmoe_hf.families import moe_layers
from slimmoe_hf.routing import LoadMonitor, RouterLoad, collapsed_experts, load_shares


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_counts_are_the_choices_of_the_routers(family: str):
    """Two experts a token in every layer, and the sum over two batches is the count of both together."""
    model = tiny_model(family)
    load = RouterLoad(model)
    seen = []
    for _, _, router in moe_layers(model):
        router.register_forward_hook(lambda _m, _i, outputs: seen.append(outputs[2].flatten().bincount(minlength=4)))
    with torch.no_grad(), load.counting():
        for seed in (0, 1):
            model(input_ids=tiny_batch(seed=seed)["input_ids"])
    model(input_ids=tiny_batch()["input_ids"])  # outside of the block: not counted
    expected = torch.stack(seen[: 2 * NUM_LAYERS]).view(2, NUM_LAYERS, NUM_EXPERTS).sum(0)
    assert torch.equal(load.counts(), expected) and load.counts().sum(1).tolist() == [2 * 4 * 24 * 2] * NUM_LAYERS
    load.clear()
    assert not load.counts().any() and load.counts().shape == (NUM_LAYERS, NUM_EXPERTS)


def test_shares_are_multiples_of_an_even_load_and_the_starved_are_found():
    shares_LE = load_shares(torch.tensor([[10, 10, 10, 10], [39, 0, 1, 0], [0, 0, 0, 0]]))
    torch.testing.assert_close(shares_LE, torch.tensor([[1, 1, 1, 1], [3.9, 0, 0.1, 0], [0, 0, 0, 0]]))
    assert collapsed_experts(shares_LE) == [(1, 1), (1, 3)]  # 0.1 is on the line; a layer nobody asked tells nothing


def test_training_logs_the_load_and_warns_of_a_collapse_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A router that cannot choose expert 3: its row points away from every token."""
    student = tiny_model("mixtral")
    router = moe_layers(student)[1][2]
    with torch.no_grad():
        router.weight[3] = -100 * router.weight[:3].sum(0)
        router.weight[:3] = 0.01
    trainer = trainer_for(tmp_path, student=student, learning_rate=0.0)
    with caplog.at_level(logging.WARNING, "slimmoe_hf.routing"):
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "router_load" in entry]
    assert len(logged) == 2
    for entry in logged:
        load_LE = torch.tensor(entry["router_load"])
        assert load_LE.mean(1).tolist() == pytest.approx([1.0] * NUM_LAYERS, abs=1e-3)
        assert entry["router_load_min"] == pytest.approx(float(load_LE.min()), abs=1e-4)
        assert entry["router_load_max"] == pytest.approx(float(load_LE.max()), abs=1e-4)
    said = [record.getMessage() for record in caplog.records if "collapsing" in record.getMessage()]
    assert len({text.split(":", 1)[1] for text in said}) == len(said) >= 1
    assert any("layer 1" in text for text in said)


def test_a_long_run_keeps_some_matrices_and_every_new_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LoadMonitor, "KEPT", 6)
    trainer = trainer_for(tmp_path, max_steps=18, learning_rate=0.0, train_dataset=unequal_rows(2))
    trainer.train()
    history = trainer.state.log_history
    kept = {entry["step"]: torch.tensor(entry["router_load"]) for entry in history if "router_load" in entry}
    assert sum("router_load_min" in entry for entry in history) == 18
    seen: set[tuple[int, int]] = set()
    for step, load_LE in kept.items():
        new = set(collapsed_experts(load_LE)) - seen
        assert new or all(other >= step or step - other >= 3 for other in kept)
        seen |= new
    assert min(kept) == 1 and len(kept) <= 6 + len(seen)
