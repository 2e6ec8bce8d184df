"""The form that serving engines expect of a saved PhiMoE, and that it changes nothing for plain transformers.

What is expected is read off vLLM's `phimoe.py`: the architecture's name, `bias=True` in qkv, o and head, `rope_parameters`
(and `rope_theta`, `rope_scaling` before it), `head_dim` where heads are not D/H wide, per-expert weights under
`block_sparse_moe`, and two experts a token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_surgery import random_plan
from tiny import decoder_only, families, save_tiny, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import create_model_from_path

from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.engine_form import write_engine_form
from slimmoe_hf.plan import Target
from slimmoe_hf.serving import serving_config
from slimmoe_hf.student_training import save_checkpoint

# As Microsoft's own config.json spells it, at the width of tiny heads.
OLD_ROPE: dict[str, Any] = {
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3],
        "short_mscale": 1.2, "long_mscale": 1.3, "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def save_as_microsoft_does(folder: Path, **overrides: Any) -> Path:
    """A checkpoint whose config has the old spelling and code of its own."""
    save_tiny(folder, **overrides)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config |= {
        **OLD_ROPE,
        "auto_map": {"AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM"},
        "use_cache": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("biases", [True, False])
@torch.no_grad()
def test_a_slimmed_phimoe_has_what_engines_expect_and_computes_the_same(biases: bool, tmp_path: Path):
    source = save_as_microsoft_does(tmp_path / "source", attention_bias=biases, lm_head_bias=biases)
    plan = random_plan(AutoModelForCausalLM.from_pretrained(source), Target(expert_width=16, kv_groups=1))
    config = json.loads((slim_checkpoint(source, plan, tmp_path / "slimmed") / "config.json").read_text())
    assert config["architectures"] == ["PhiMoEForCausalLM"] and config["model_type"] == "phimoe"
    assert config["attention_bias"] is config["lm_head_bias"] is config["use_cache"] is True
    assert config["num_experts_per_tok"] == 2 and config["head_dim"] == 8 and config["auto_map"] == {}
    assert config["rope_scaling"] == OLD_ROPE["rope_scaling"] and config["rope_theta"] == 10000.0
    assert config["original_max_position_embeddings"] == 64
    rope = {key: value for key, value in OLD_ROPE["rope_scaling"].items() if key != "type"}
    assert config["rope_parameters"] == {**rope, "rope_type": "longrope", "rope_theta": 10000.0}
    weights = load_file(tmp_path / "slimmed" / "model.safetensors")
    names = [f"model.layers.{n}.self_attn.{p}_proj.bias" for n in range(2) for p in "qkvo"] + ["lm_head.bias"]
    assert all(bool(weights[name].any()) == biases for name in names)
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in weights

    from slimmoe_hf.surgery import apply_plan

    expected = apply_plan(AutoModelForCausalLM.from_pretrained(source).eval(), plan)(**tiny_batch()).logits
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "slimmed", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(reloaded.eval()(**tiny_batch()).logits, expected)


@pytest.mark.parametrize("family", decoder_only("TRL's trainers, which are to load it, take decoder-only models"))
@torch.no_grad()
def test_saving_changes_no_output_of_any_family(family: str, tmp_path: Path):
    model = tiny_model(family)
    expected = model(**tiny_batch()).logits
    model.config.use_cache = False  # as a Trainer leaves it
    save_checkpoint(model, tiny_tokenizer(), tmp_path, "float32")
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(reloaded.eval()(**tiny_batch()).logits, expected)
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True
    by_name = create_model_from_path(str(tmp_path))  # as TRL's trainers load a model that they are given by name
    assert torch.equal(by_name.eval()(**tiny_batch()).logits, expected)


@pytest.mark.parametrize("name", ["model.layers.2.eh_proj.weight", "mtp.fc.weight"])
def test_layers_that_predict_further_tokens_are_neither_written_nor_promised(name: str, tmp_path: Path):
    """Of published checkpoints, which have them beside the model's own; transformers loads no weight of theirs."""
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    weights, config = tmp_path / "source/model.safetensors", tmp_path / "source/config.json"
    save_file({**load_file(weights), name: torch.ones(2, 2)}, weights, metadata={"format": "pt"})
    ahead = {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1, "num_mtp_modules": 3, "use_mtp": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), **ahead}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    slim_checkpoint(tmp_path / "source", random_plan(loaded, Target(num_experts=6)), tmp_path / "on-disk")
    save_checkpoint(loaded, tiny_tokenizer(), tmp_path / "in-memory", "float32")
    write_engine_form(tmp_path / "source", tmp_path / "for-engines")
    for folder in ("on-disk", "in-memory", "for-engines"):
        said = json.loads((tmp_path / folder / "config.json").read_text())
        assert not any(said[key] for key in ahead), (folder, said)
        assert name not in load_file(tmp_path / folder / "model.safetensors"), folder
        assert AutoConfig.from_pretrained(tmp_path / folder).num_mtp_layers == 0


@pytest.mark.parametrize("family", families())
def test_the_serving_form_is_reached_in_one_step_and_keeps_every_other_value(family: str):
    values = json.loads(tiny_model(family).config.to_json_string(use_diff=False))
    once = serving_config(values)
    assert serving_config(once) == once
    before, after = (AutoConfig.for_model(**each).to_dict() for each in (values, once))
    names = {"architectures", "auto_map", "rope_scaling", "rope_theta"}
    changed = {key for key in after if before.get(key) != after[key]} - names
    assert changed <= {"rope_parameters", "transformers_version"}, changed
    if family == "qwen3_moe":
        assert once["num_experts"] == once["num_local_experts"] == 4
