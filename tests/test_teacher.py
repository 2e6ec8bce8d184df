"""A teacher that is larger than the device: a part of it waits elsewhere, and what it says stays the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import trainer_for
from tiny import FAMILY_NAMES, save_tiny, tiny_model

from slimmoe_hf.teacher import LiveTeacher, offloaded


def half_on_disk(family: str, folder: Path) -> dict[str, Any]:
    """A device map that leaves the last layer and the head on disk, for accelerate's hooks to bring."""
    model = tiny_model(family)
    layers = [f"model.layers.{number}" for number in range(model.config.num_hidden_layers)]
    others = [f"model.{name}" for name, _ in model.model.named_children() if name != "layers"]
    places = dict.fromkeys((*others, *layers[:-1]), "cpu") | {layers[-1]: "disk", "lm_head": "disk"}
    return {"device_map": places, "offload_folder": str(folder)}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_offloaded_teacher_gives_the_same_loss_and_gradient_to_the_last_bit(family: str, tmp_path: Path) -> None:
    source = str(save_tiny(tmp_path / "teacher", family, seed=1))
    runs = {}
    for name, kwargs in {"whole": None, "offloaded": half_on_disk(family, tmp_path / "weights")}.items():
        trainer = trainer_for(
            tmp_path, family, teacher_model=source, teacher_model_init_kwargs=kwargs, max_steps=1, learning_rate=0.0
        )
        logits = trainer.teacher.logits({"input_ids": torch.arange(40).view(2, 20)})
        gradients: dict[str, torch.Tensor] = {}
        for weight_name, weight in trainer.model.named_parameters():
            weight.register_post_accumulate_grad_hook(
                lambda weight, name=weight_name, into=gradients: into.update({name: weight.grad.clone()})
            )
        trainer.train()
        runs[name] = (trainer, logits, gradients)
    assert any(weight.is_meta for weight in runs["offloaded"][0].teacher.model.parameters())
    assert not any(weight.is_meta for weight in runs["whole"][0].teacher.model.parameters())
    assert torch.equal(runs["offloaded"][1], runs["whole"][1])
    logs = [run[0].state.log_history[0] for run in runs.values()]
    assert [logs[0][key] for key in ("loss", "grad_norm", "kl")] == [
        logs[1][key] for key in ("loss", "grad_norm", "kl")
    ]
    assert len(gradients) > 10
    for name, gradient in runs["whole"][2].items():
        assert torch.equal(gradient, runs["offloaded"][2][name]), name


def test_teacher_with_a_device_map_is_not_moved(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "teacher", "mixtral", seed=1)
    for kwargs, moved in (({}, "meta"), (half_on_disk("mixtral", tmp_path / "weights"), "cpu")):
        teacher = LiveTeacher.load(source, torch.device("cpu"), kwargs)
        teacher.to(torch.device("meta"))
        assert teacher.model.model.embed_tokens.weight.device.type == moved


def test_on_a_cpu_there_is_nothing_to_offload_a_teacher_from() -> None:
    assert offloaded(10**9, torch.device("cpu")) == {}
    found = offloaded(10**9, torch.device("cuda", 1))
    assert found["device_map"] == "auto" and found["max_memory"][1] == 10**9 and found["max_memory"]["cpu"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to offload from")
def test_teacher_streams_from_host_memory_within_its_share_of_the_gpu(tmp_path: Path) -> None:
    source = save_tiny(
        tmp_path / "teacher", "phimoe", seed=1, hidden_size=512, intermediate_size=1024, num_hidden_layers=8
    )
    device, share = torch.device("cuda", 0), 40 * 10**6
    ids = torch.arange(40, device=device).view(2, 20)
    whole = LiveTeacher.load(source, device)
    size = sum(weight.numel() * weight.element_size() for weight in whole.model.parameters())
    assert size > 3 * share
    whole.to(device)
    expected = whole.logits({"input_ids": ids}).cpu()
    del whole
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    teacher = LiveTeacher.load(source, device, offloaded(share, device))
    teacher.to(device)
    torch.cuda.reset_peak_memory_stats()
    logits = teacher.logits({"input_ids": ids})
    assert logits.device == device
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4)  # a GPU adds in no fixed order
    assert torch.cuda.max_memory_allocated() - before < share + 10 * 10**6  # activations and logits on top
    trainer = trainer_for(
        tmp_path, "phimoe", teacher_model=str(source), use_cpu=False, bf16=False,
        teacher_model_init_kwargs=offloaded(share, device), router_aux_loss_coef=0.0,
    )  # fmt: skip
    trainer.train()
    assert "cpu" in trainer.teacher.model.hf_device_map.values()
    assert math.isfinite(trainer.state.log_history[0]["kl"])
