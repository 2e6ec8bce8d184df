"""A model measured one layer at a time: what is found is what `evaluate_checkpoint` finds; killed anywhere or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from streams import stopping
from tiny import save_tiny, tiny_batch, tiny_tokenizer

from slimmoe_hf import streamed_evaluation
from slimmoe_hf.blocks import EMBEDDINGS, HEAD, Blocks
from slimmoe_hf.evaluation import HeldOut, evaluate_checkpoint, measure_loss
from slimmoe_hf.loading import load_model
from slimmoe_hf.streamed_evaluation import stream_loss, stream_measurement

ROWS = tiny_batch(rows=5)["input_ids"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("measured") / "model")


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True, "lm_head_bias": False}], ids=["plain", "tied"])
def test_a_streamed_measurement_is_that_in_memory_without_speed_and_samples(
    overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("slimmoe_hf.streamed_teacher.CHUNK_BYTES", 4 * 320 * 7)  # logits come in many pieces
    path, data = save_tiny(tmp_path / "model", **overrides), HeldOut(ROWS, 1, ROWS.numel(), 4 * ROWS.numel())
    whole = evaluate_checkpoint(path, data, tiny_tokenizer(), batch_size=2, prompts=["a"], progress=False)
    streamed = stream_measurement(path, data, batch_size=2, work=tmp_path / "work")
    assert streamed.loss == pytest.approx(whole.loss, rel=1e-5) and streamed.router_load == whole.router_load
    unlike = {"loss", "bits_per_byte", "tokens_per_second", "samples", "streamed", "peak_memory"}
    unlike |= {"prefill_tokens_per_second", "decode_tokens_per_second"}
    assert streamed.model_dump(exclude=unlike) == whole.model_dump(exclude=unlike)
    assert streamed.streamed and streamed.tokens_per_second is None and streamed.samples == []


def test_in_bfloat16_it_is_that_in_memory_too(model: Path, tmp_path: Path):
    whole = measure_loss(load_model(model, "bfloat16"), ROWS, progress=False)
    streamed = stream_loss(model, ROWS, work=tmp_path / "work", dtype="bfloat16")
    assert streamed.loss == pytest.approx(whole.loss, rel=1e-3)


# Written: the embeddings, the load and output of two layers, the sum at the head. What a second start reads.
READS = [[EMBEDDINGS, 0, 1, HEAD], [0, 1, HEAD], [1, HEAD], [0, 1, HEAD], [1, HEAD], [HEAD], []]


@pytest.mark.parametrize("stopped", range(7))
def test_stopped_anywhere_it_continues_there_and_finds_the_same(
    stopped: int, model: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
):
    """In the middle of three files of hidden states; before a layer's load, or the sum at the head, is noted; after it."""
    whole = stream_loss(model, ROWS, 2, work=tmp_path / "whole")
    assert read == READS[0]
    real, noted = streamed_evaluation._note, [0]

    def note(*given: Any) -> None:
        noted[0] += 1
        if noted[0] == stopped - 2:
            raise KeyboardInterrupt
        real(*given)

    with monkeypatch.context() as patch:
        stopping(patch, stopped + 1)
        if stopped > 2:
            patch.setattr(streamed_evaluation, "_note", note)
        if stopped < 6:
            with pytest.raises(KeyboardInterrupt):
                stream_loss(model, ROWS, 2, work=tmp_path / "work")
        else:
            stream_loss(model, ROWS, 2, work=tmp_path / "work")
    read.clear()
    assert stream_loss(model, ROWS, 2, work=tmp_path / "work") == whole
    assert read == READS[stopped]


def test_the_work_of_another_text_is_not_continued(model: Path, tmp_path: Path):
    stream_loss(model, ROWS, work=tmp_path / "work")
    other = stream_loss(model, ROWS.flip(0, 1), work=tmp_path / "work")
    assert other == stream_loss(model, ROWS.flip(0, 1), work=tmp_path / "other")


def test_a_loss_that_is_no_number_is_an_error(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        Blocks, "logits", lambda _blocks, hidden_ND: hidden_ND.new_full((len(hidden_ND), 320), torch.nan)
    )
    with pytest.raises(ValueError, match="the held-out loss is not finite"):
        stream_loss(model, ROWS, work=tmp_path / "work")
