"""Models of families that have no row: every way in ends with one line that says so, and nothing is changed or written."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan import fake_stats
from tiny import VOCAB_SIZE, tiny_batch, tiny_model, tiny_tokenizer, write_text
from transformers import AutoConfig, PreTrainedModel

from slimmoe_hf import cli
from slimmoe_hf.budget import Sizes
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.disk import auto_class
from slimmoe_hf.factorization import factor_experts
from slimmoe_hf.merging import plan_merge
from slimmoe_hf.plan import CompressionPlan, Target, make_plan
from slimmoe_hf.reconstruction import reconstruct
from slimmoe_hf.streaming import stream_stats
from slimmoe_hf.surgery import apply_plan

_SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 32, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 256, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "llama4_text": {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "jetmoe": {"kv_channels": 8},
    "nllb-moe": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
    },
    "deepseek_v4": {}, "hy_v4": {}, "doge": {}, "llama": {},
}  # fmt: skip
"""Two with experts that are not known, a mixture of vectors and a dense one beside four that are known to be refused."""

FAST = ("dbrx", "deepseek_v4")  # of the others each takes most of a second


def other_model(model_type: str) -> PreTrainedModel:
    known = AutoConfig.for_model(model_type).to_dict()
    values = {key: value for key, value in _SHAPE.items() if key in known} | OTHERS[model_type]
    if "kv_lora_rank" in known:
        values.pop("head_dim", None)
    ids = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = AutoConfig.for_model(model_type, **{**ids, **values})
    return auto_class(config).from_config(config, dtype=torch.float32).eval()


def plan_for_it(model_type: str) -> CompressionPlan:
    """A plan of sizes that it could have, made by nobody here."""
    plan = make_plan(fake_stats(tiny_model("phimoe")), Target(expert_width=16), "random")
    return dataclasses.replace(plan, meta=plan.meta.model_copy(update={"family": model_type}))


@pytest.mark.parametrize(
    "model_type", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
def test_every_way_in_is_refused_in_one_line_and_changes_nothing(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model, plan, folder = other_model(model_type), plan_for_it(model_type), tmp_path / "model"
    assert torch.isfinite(model(**tiny_batch(rows=1)).logits).all()
    model.save_pretrained(folder)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    said = copy.deepcopy(model.config.to_dict())
    tiny_tokenizer().save_pretrained(folder)
    stats, text = fake_stats(tiny_model("phimoe")), [tiny_batch(rows=1)]
    for way in (
        functools.partial(collect_stats, model, text, progress=False), functools.partial(apply_plan, model, plan),
        functools.partial(reconstruct, model, text, plan, progress=False), functools.partial(Sizes, model.config),
        functools.partial(plan_merge, model, stats, 2), functools.partial(factor_experts, model, rank=4),
        functools.partial(slim_checkpoint, folder, plan, tmp_path / "out"),
        functools.partial(stream_stats, folder, text, work=tmp_path / "work", progress=False),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"cannot be slimmed: |is an encoder-decoder|Add a family.* in CONTRIBUTING\.md"
        ) as error:
            way()
        assert "\n" not in str(error.value) and model_type in str(error.value), way
    assert model.config.to_dict() == said
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    data, out = str(write_text(tmp_path / "text.jsonl")), str(tmp_path / "out")
    plan.save(tmp_path / "plan")
    for command in (
        ["size", str(folder)], ["score", str(folder), "--data", data, "--output", out],
        ["slim", str(folder), "--plan", str(tmp_path / "plan"), "--output", out],
        ["slim", str(folder), "--data", data, "--expert-width", "16", "--output", out],
        ["merge", str(folder), "--data", data, "--num-experts", "2", "--output", out],
    ):  # fmt: skip
        capsys.readouterr()
        assert cli.main(command) == 2, command
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert model_type in line and ("cannot be slimmed" in line or "CONTRIBUTING.md" in line), line
        assert not Path(out).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "plan", "text.jsonl"]
