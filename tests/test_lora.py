"""LoRA targets: what is adapted is what was asked for, all of it learns, and an adapter survives saving and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import rows
from peft import PeftModel, get_peft_model
from tiny import FAMILY_NAMES, tiny_batch, tiny_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from slimmoe_hf import lora_config
from slimmoe_hf.families import FAMILIES, moe_layers, shape_of

RANK = 4


def adapted(family: str, **parts: bool) -> tuple[PeftModel, PreTrainedModel]:
    """A model with an adapter, and the same model without."""
    model: Any = tiny_model(family)
    return get_peft_model(model, lora_config(model.config, RANK, **parts)), tiny_model(family)


def trained(family: str, **parts: bool) -> tuple[PeftModel, PreTrainedModel]:
    """After two steps: the first moves the outer matrices from zero, the second the inner ones."""
    model, base = adapted(family, **parts)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**tiny_batch()).loss.backward()
        optimizer.step()
    return model.eval(), base


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_batch()["input_ids"]).logits


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest; these models have logits of up to 40."""
    assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_attention_and_both_expert_matrices_are_adapted_and_nothing_else(family: str):
    model, base = adapted(family)
    shape, moe = shape_of(base.config), len(moe_layers(base))
    queries, keys = shape.query_heads * shape.head_width, shape.kv_groups * shape.head_width
    attention = 2 * (shape.hidden_size + queries) + 2 * (shape.hidden_size + keys)
    experts = shape.num_experts * (3 * shape.expert_width + 2 * shape.hidden_size)
    count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert count == RANK * (shape.layers * attention + moe * experts)
    assert all("lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    "parts", [{"router": True}, {"experts": False, "attention": False, "router": True}], ids=["all", "router"]
)
def test_every_matrix_of_the_adapter_learns(family: str, parts: dict[str, bool]):
    model, base = trained(family, **parts)
    outer = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    still = [name for name, weight in outer.items() if not weight.any()]
    # Confident tokens of PhiMoE's sampled routing send its routers no gradient; with these two batches all get one.
    assert still == []
    routers = [name for name in outer if family_router(base) in name]
    assert len(routers) == len(moe_layers(base))


def family_router(model: PreTrainedModel) -> str:
    name = next(name for name, module in model.named_modules() if module is moe_layers(model)[0][2])
    return name.split(".", 3)[3]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_saved_adapter_loads_again_and_merged_it_is_the_same_model(family: str, tmp_path: Path):
    model, base = trained(family, router=True)
    wanted = logits(model)
    assert float((wanted - logits(base)).abs().max()) > 0.1
    base.save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(by_peft), wanted)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), wanted)
    merged: Any = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted)


@pytest.mark.parametrize("family", rows(("deepseek_v3",), lambda row: not row.encoder_decoder))
@torch.no_grad()
def test_every_attention_is_adapted_and_merged_it_is_the_same_model(family: str):
    (model, base), row = adapted(family), FAMILIES[family]
    modules = [name for name, _ in base.named_modules()]
    named = {
        name: [path for path in modules if path.endswith(f".{row.attention}.{name}")]
        for name in row.adapted or row.projections
    }
    assert {name for name, paths in named.items() if not paths} <= {
        "q_proj"
    }  # compressed ones are in two steps instead
    outer = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    on_attention = [name for name in outer if f".{row.attention}." in name and row.experts not in name]
    assert len(on_attention) == sum(map(len, named.values())) > 0
    for weight in outer.values():
        weight.normal_(std=0.1)
    changed, merged = logits(model.eval()), logits(model.merge_and_unload())
    assert_close(merged, changed, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(changed, logits(base), atol=1e-2)


def test_parts_can_be_left_out_and_the_scale_is_twice_the_rank():
    config = tiny_model("phimoe").config
    whole, attention, experts = (
        lora_config(config, **parts) for parts in ({}, {"experts": False}, {"attention": False})
    )
    assert (whole.r, whole.lora_alpha) == (16, 32) and lora_config(config, 8, alpha=4).lora_alpha == 4
    assert whole.target_modules == attention.target_modules and whole.target_parameters == experts.target_parameters
    assert not attention.target_parameters and not experts.target_modules
    assert whole.lora_dropout == 0.0 and not whole.use_dora and whole.bias == "none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0: give 1 or more"),
        ({"alpha": 0}, "alpha=0: give 1 or more"),
        ({"experts": False, "attention": False}, "all off, which leaves nothing to train"),
    ],
)
def test_what_cannot_be_adapted_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        lora_config(tiny_model("mixtral").config, **arguments)


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="'llama' is not a Mixture-of-Experts family"):
        lora_config(LlamaConfig())
