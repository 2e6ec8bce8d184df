"""What a checkpoint must hold, where it lies, and FP8 undone on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import VARIANTS, saved, target_of, tensors_of
from test_surgery import random_plan
from tiny import families, tiny_model

from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.disk import dequantise, expected_shapes, locate
from slimmoe_hf.loading import load_config, load_model
from slimmoe_hf.shards import read_header


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path / "source", tiny_model("phimoe"))


@pytest.mark.parametrize("family", families())
def test_expected_shapes_are_what_transformers_saves(family: str, tmp_path: Path):
    for variant in VARIANTS.values():
        model = tiny_model(family, **variant)
        model.save_pretrained(tmp_path)
        present = {name: tuple(tensor.shape) for name, tensor in tensors_of(tmp_path).items()}
        assert expected_shapes(model.config) == present


def quantised(source: Path, block: int) -> dict[str, torch.Tensor]:
    """Store every expert in FP8 with a scale for each block; what each is worth, dequantised by hand."""
    worth = {}
    for file in sorted(source.glob("*.safetensors")):
        held = load_file(file)
        for name in [name for name in held if ".experts." in name]:
            rows, columns = held[name].shape
            blocks = held[name].view(rows // block, block, columns // block, block)
            scale = blocks.abs().amax(dim=(1, 3)) / 448.0
            packed = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
            worth[name] = (packed.float() * scale.repeat_interleave(block, 0).repeat_interleave(block, 1)).bfloat16()
            held[name], held[f"{name}_scale_inv"] = packed, scale
        save_file(held, file, metadata={"format": "pt"})
    index = source / "model.safetensors.index.json"
    names = {name: file.name for file in source.glob("*.safetensors") for name in read_header(file)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (source / "config.json").write_text(json.dumps(config))
    return worth


def test_fp8_weights_are_dequantised_while_they_are_cut(tmp_path: Path):
    source = saved(tmp_path / "source", tiny_model("qwen3_moe"))
    plan = random_plan(tiny_model("qwen3_moe"), target_of("qwen3_moe"))
    worth = quantised(source, block=8)
    slimmed = slim_checkpoint(source, plan, tmp_path / "slimmed")
    assert "quantization_config" not in json.loads((slimmed / "config.json").read_text())
    found = tensors_of(slimmed)
    for name, weight in worth.items():
        layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
        axis = 1 if "down_proj" in name else 0
        assert torch.equal(found[name], weight.index_select(axis, plan.neurons[layer][expert])), name
    load_model(slimmed)


def test_dequantising_is_what_transformers_does():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = torch.randn(16, 24).to(torch.float8_e4m3fn), torch.rand(2, 3)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert torch.equal(dequantise(weight, scale, (8, 8)), theirs)


def test_scales_are_for_the_blocks_that_the_config_names():
    """24 rows in blocks of 16 have two scales, as 24 rows in blocks of 12 have: only the config can tell."""
    weight, scale = torch.ones(24, 16).to(torch.float8_e4m3fn), torch.tensor([[1.0], [10.0]])
    assert dequantise(weight, scale, (16, 16))[:, 0].tolist() == [1.0] * 16 + [10.0] * 8
    with pytest.raises(ValueError, match=r"has \[2, 1\] scales, not \[3, 2\]"):
        dequantise(weight, scale, (8, 8))


def test_fp8_without_scales_that_can_be_read_is_refused(tmp_path: Path):
    source = saved(tmp_path / "source", tiny_model("mixtral"))
    plan = random_plan(tiny_model("mixtral"), target_of("mixtral"))
    for file in sorted(source.glob("*.safetensors")):
        held = load_file(file)
        packed = {
            name: weight.to(torch.float8_e4m3fn) if ".experts." in name else weight for name, weight in held.items()
        }
        save_file(packed, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is FP8 without .*w\d\.weight_scale_inv"):
        slim_checkpoint(source, plan, tmp_path / "slimmed")


def test_a_head_of_its_own_beside_a_config_that_ties_it_is_refused(tmp_path: Path):
    source = saved(tmp_path / "source", tiny_model("mixtral"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    plan = random_plan(tiny_model("mixtral"), target_of("mixtral"))
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to .*, and the files hold different"):
        slim_checkpoint(source, plan, tmp_path / "slimmed")


def test_locate_reads_a_checkpoint_from_its_headers_alone(source: Path):
    stored = {name: tensor for file in source.glob("*.safetensors") for name, tensor in read_header(file).items()}
    parts = locate(load_config(source), stored, "here")
    assert parts.keys() == expected_shapes(load_config(source)).keys()
    places = [(part.stored.file, part.stored.begin) for part in parts.values()]
    assert places == sorted(places), "reading would jump about"
