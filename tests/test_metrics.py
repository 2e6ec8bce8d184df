"""Metrics for `evaluate`: found offline by path, equal to our own loss and to numbers worked out by hand."""

from __future__ import annotations

import configparser
import math
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
from datasets import Dataset
from tiny import FAMILY_NAMES, documents, save_tiny, tiny_batch, tiny_model, tiny_tokenizer

from slimmoe_hf.evaluation import held_out, measure_loss
from slimmoe_hf.loading import load_model
from slimmoe_hf.metrics import METRICS, metric_path
from slimmoe_hf.routing import RouterLoad


@pytest.fixture(scope="module")
def balance() -> Any:
    return evaluate.load(metric_path("expert_load_balance"), keep_in_memory=True)  # a failed one would hold its file


def test_perplexity_is_exp_of_our_loss_on_the_same_texts(tmp_path: Path):
    checkpoint, texts = save_tiny(tmp_path / "model"), [text[:700] for text in documents()[:4]]
    metric = evaluate.load(metric_path("perplexity"))
    found = metric.compute(predictions=texts, model_id=str(checkpoint), max_length=48, batch_size=3, device="cpu")
    data = held_out(Dataset.from_dict({"text": texts}), tiny_tokenizer(), 48)
    loss = measure_loss(load_model(checkpoint), data.rows_NT, progress=False).loss
    assert found["loss"] == pytest.approx(loss, abs=1e-6) and found["tokens"] == data.tokens
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(data.bits_per_byte(loss), rel=1e-6)


def test_perplexity_of_nothing_is_one_line(tmp_path: Path):
    metric = evaluate.load(metric_path("perplexity"), keep_in_memory=True)
    with pytest.raises(ValueError, match="perplexity needs text: all predictions are empty"):
        metric.compute(predictions=["", ""], model_id=str(tmp_path))


def test_balance_of_counts_worked_out_by_hand(balance: Any):
    found = balance.compute(predictions=[[5, 5, 5, 5], [8, 0, 0, 0], [1, 2, 3, 4], [8, 8, 4, 0]])
    assert found["min_load"] == pytest.approx([1, 0, 0.4, 0]) and found["max_load"] == pytest.approx([1, 4, 1.6, 1.6])
    # Deviations of the loads from 1: none; 3, -1, -1, -1; -.6, -.2, .2, .6; .6, .6, -.2, -1.
    assert found["coefficient_of_variation"] == pytest.approx([0, 3**0.5, 0.2**0.5, 0.44**0.5])
    # The last: two halves of 2/5 and one of 1/5.
    uneven = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4)) / math.log(4)
    last = -(0.8 * math.log(0.4) + 0.2 * math.log(0.2)) / math.log(4)
    assert found["entropy"] == pytest.approx([1, 0, uneven, last])
    assert found["collapsed"] == 4 and found["collapsed_experts"] == [[1, 1], [1, 2], [1, 3], [3, 3]]


def test_choices_are_counted_as_counts_would_be(balance: Any):
    by_choice = balance.compute(predictions=[[0, 0, 3, 1], [2, 2, 2, 2]], num_experts=4)
    assert by_choice == balance.compute(predictions=[[2, 1, 0, 1], [0, 0, 4, 0]])


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_balance_takes_what_router_load_gives(family: str, balance: Any):
    model = tiny_model(family)
    load = RouterLoad(model)
    with load.counting(), torch.no_grad():
        model(input_ids=tiny_batch()["input_ids"])
    found = balance.compute(predictions=load.counts().tolist())
    assert len(found["entropy"]) == len(load.layers)
    assert all(0 < entropy <= 1 for entropy in found["entropy"]) and all(load >= 1 for load in found["max_load"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"predictions": [[1, 2], [1, 2, 3]]}, "the layers have different numbers of experts"),
        ({"predictions": [[1, 2], [0, 0]]}, "layer 1: nothing was counted there"),
        ({"predictions": [[0, 1], []], "num_experts": 4}, "layer 1: nothing was counted there"),
        ({"predictions": [[1, -2]]}, "none negative, of two experts or more"),
        ({"predictions": [[0, 4]], "num_experts": 4}, "expert 4 was chosen, but there are 4, counted from 0"),
    ],
)
def test_what_cannot_be_balanced_is_said(given: dict[str, Any], message: str, balance: Any):
    with pytest.raises(ValueError, match=message):
        balance.compute(**given)


def test_an_unknown_metric_is_said():
    with pytest.raises(ValueError, match="metric 'bleu': unknown; there are perplexity, expert_load_balance"):
        metric_path("bleu")


def test_the_metrics_are_in_the_package_that_is_built():
    """An editable install finds them anyway; a wheel only what setup.cfg names."""
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[1] / "setup.cfg")
    if settings["options"]["packages"].strip() == "find:":
        patterns = settings["options.packages.find"]["include"].split()
    else:
        patterns = settings["options"]["packages"].split()
    assert any(fnmatch("slimmoe_hf.metrics", pattern) for pattern in patterns)
    assert settings["options.package_data"]["slimmoe_hf.metrics"] == "*/*.py"
    for name in METRICS:
        assert [file.name for file in Path(metric_path(name)).glob("*.py")] == [f"{name}.py"]
