"""The shipped recipes: what their headers say is what a dry run says, and they run at full width, two layers deep."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer, write_text
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from slimmoe_hf.disk import expected_shapes
from slimmoe_hf.evaluation import count_parameters
from slimmoe_hf.families import shape_of
from slimmoe_hf.machines import MACHINES
from slimmoe_hf.memory import cache_bytes_per_token
from slimmoe_hf.outlook import outlook
from slimmoe_hf.pipeline import run_recipe
from slimmoe_hf.preflight import outline
from slimmoe_hf.recipe import Recipe, TeacherCacheSpec, load_recipe, parse_recipe
from slimmoe_hf.remedies import remedies
from slimmoe_hf.shards import ShardWriter, read_header
from slimmoe_hf.steps import Step, check_room
from slimmoe_hf.yaml_files import read_yaml

EXAMPLES = Path(__file__).parents[1] / "examples"
# What Microsoft's and AI2's own config.json say, as far as sizes go.
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 64, "long_factor": [1.1] * 64,
    "short_mscale": 1.243163121016122, "long_mscale": 1.243163121016122, "original_max_position_embeddings": 4096,
}  # fmt: skip
PHI: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 16, "vocab_size": 32064, "attention_bias": True, "lm_head_bias": True,
    "max_position_embeddings": 131072, "rope_parameters": LONGROPE, "dtype": "bfloat16", "router_aux_loss_coef": 0.0,
    "input_jitter_noise": 0.01, "eos_token_id": 32000,
}  # fmt: skip
OLMOE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304, "dtype": "bfloat16",
}  # fmt: skip
RECIPES = {
    "phi-mini-moe": ("phimoe", PHI, "A100-80GB"), "phi-tiny-moe": ("phimoe", PHI, "A100-80GB"),
    "phi-mini-moe-node": ("phimoe", PHI, "A100-80GB"), "olmoe": ("olmoe", OLMOE, "A6000-48GB"),
}  # fmt: skip


def config_folder(folder: Path, family: str, values: dict[str, Any]) -> PreTrainedConfig:
    """A model's config and a tokenizer, as the Hub would give them before any weight is downloaded."""
    config = AutoConfig.for_model(family, **values)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return config


@pytest.fixture(params=RECIPES, scope="module")
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Recipe, list[Step]]:
    family, values, machine = RECIPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config_folder(folder, family, values)
    recipe = load_recipe(EXAMPLES / f"{request.param}.yaml").model_copy(update={"model": str(folder)})
    steps = outlook(recipe, outline(recipe), MACHINES[machine])
    check_room(steps, MACHINES[machine], None)
    return request.param, recipe, steps


def test_a_shipped_recipe_fits_its_machine_and_its_header_says_what_the_dry_run_says(planned):
    name, recipe, steps = planned
    machine = MACHINES[RECIPES[name][2]]
    text = (EXAMPLES / f"{name}.yaml").read_text()
    header = text[: text.index("model: ")]
    assert max(step.memory for step in steps) <= machine.memory
    assert max(step.host for step in steps) <= (machine.host or 0)
    memory = int(re.search(r"memory\s+(\d+) GB of", header)[1])
    disk = int(re.search(r"disk\s+(\d+) GB", header)[1])
    hours = float(re.search(r"time\s+([\d.]+) h", header)[1])
    assert memory == round(max(step.memory for step in steps) / 1e9)
    host = re.search(r"(\d+) GB of the host's", header)
    assert host is None or int(host[1]) == round(max(step.host for step in steps) / 1e9)
    assert disk == round(sum(step.disk for step in steps) / 1e9)
    fetched = parameters(recipe) * 2 / 1e8  # seconds, at 100 MB/s
    assert hours == pytest.approx((sum(step.seconds for step in steps) + fetched) / 3600, rel=0.05)
    trained = [int(step.what.split(" tokens")[0].replace(",", "")) for step in steps if step.name.endswith("/distil")]
    assert re.findall(r"(\d+)M", re.search(r"tokens\s+(.*?)\s{2,}", header)[1]) == [
        str(round(t / 1e6)) for t in trained
    ]
    cache = int(re.search(r"258 bytes a token: (\d+) GB", header)[1])
    assert cache_bytes_per_token(32064) == 258 and cache == round(sum(trained) * 258 / 1e9)


def test_a_dry_run_of_the_phi_recipe_on_24_gb_says_what_changes(tmp_path: Path):
    config_folder(tmp_path, "phimoe", PHI)
    recipe = load_recipe(EXAMPLES / "phi-mini-moe.yaml").model_copy(update={"model": str(tmp_path)})
    machine = MACHINES["4090-24GB"]
    lines = remedies(recipe, outlook(recipe, outline(recipe), machine), machine, None, elsewhere=True)
    assert [line.split(":")[0] for line in lines] == ["stage-1/distil", "stage-2/distil"], "the rest streams"
    assert all("take a larger machine (A100-80GB, H100-80GB" in line for line in lines)
    assert "A6000-48GB" in lines[1] and "A6000-48GB" not in lines[0]
    stages = [
        stage.model_copy(update={"calibration": stage.calibration.model_copy(update={"stream": False})})
        for stage in recipe.stages
    ]
    held = recipe.model_copy(update={"stages": stages, "teacher_cache": TeacherCacheSpec(batch_size=16)})
    lines = remedies(held, outlook(held, outline(held), machine), machine, None, elsewhere=True)
    said = {line.split(":")[0]: line for line in lines}
    assert "Set teacher_cache.stream: true: " in said["teacher-cache"]
    assert "Set stages.0.calibration.stream: true: " in said["stage-1/score"]
    assert "Set stages.1.calibration.stream: true: " in said["stage-2/score"]


def parameters(recipe: Recipe) -> int:
    from slimmoe_hf.disk import meta_model
    from slimmoe_hf.loading import load_config

    return count_parameters(meta_model(load_config(Path(recipe.model))))[0]


def test_the_phi_recipes_end_at_microsofts_own_sizes(planned):
    name, _, steps = planned
    last = [step for step in steps if step.name.endswith("/slim")][-1].what
    sizes = {"phi-mini-moe": "7,647,632,704", "phi-mini-moe-node": "7,647,632,704", "phi-tiny-moe": "3,755,220,288"}
    assert sizes.get(name, "") in last


def full_width(folder: Path) -> None:
    """Two layers of Phi-3.5-MoE at full width with random weights and four experts, 2 GB, written one tensor at a time."""
    config = config_folder(folder, "phimoe", {**PHI, "num_hidden_layers": 2, "num_local_experts": 4})
    block = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    index, files = (
        {},
        {"embeddings": ("model.embed", "lm_head", "model.norm"), "0": ("model.layers.0.",), "1": ("model.layers.1.",)},
    )
    shapes = expected_shapes(config)
    for number, (_, starts) in enumerate(files.items(), 1):
        file = f"model-{number:05}-of-00003.safetensors"
        tensors = {name: (torch.bfloat16, shape) for name, shape in sorted(shapes.items()) if name.startswith(starts)}
        writer = ShardWriter(folder / file, tensors)
        for place, (name, (_, shape)) in enumerate(tensors.items()):
            count = torch.Size(shape).numel()
            values = block.roll(7919 * place).repeat(-(-count // len(block)))[:count].view(*shape)
            writer.add(name, torch.ones_like(values) if name.endswith("norm.weight") else values)
            index[name] = file
        writer.close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phi")
    full_width(folder / "model")
    write_text(folder / "text.jsonl", 60)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi-tiny-moe"])  # phi-mini-moe is the same without the attention's cut
def test_the_shipped_phi_recipe_runs_at_full_width(name: str, phi: Path, tmp_path: Path):
    """Only model, data and counts are overridden."""
    values = read_yaml(EXAMPLES / f"{name}.yaml")
    values["model"] = str(phi / "model")
    values["data"] = {"source": str(phi / "text.jsonl"), "max_length": 16, "tokens": 4_000, "validation_tokens": 512}
    for stage in values["stages"]:
        stage["calibration"]["tokens"] = 64
        stage["distillation"] |= {"max_steps": 2, "gradient_accumulation_steps": 1, "warmup_steps": 0, "save_steps": 2}
    values["evaluation"] |= {"tokens": 256, "prompts": [], "max_new_tokens": 1}
    recipe = parse_recipe(values, name)
    report = run_recipe(recipe, tmp_path / "run")
    assert report is not None
    assert [model.step for model in report.models] == ["teacher", *["slimmed", "distilled"] * 2]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(info.values()), info
    shape, target = shape_of(model.config), recipe.stages[-1].target
    assert shape.expert_width == target.expert_width and shape.kv_groups == (target.kv_groups or 8)
    assert shape.head_width == 128 and model.dtype == torch.bfloat16
    said = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert said["architectures"] == ["PhiMoEForCausalLM"] and said["use_cache"] is True
    assert said["rope_scaling"]["type"] == "longrope" and said["original_max_position_embeddings"] == 4096
    files = sorted((tmp_path / "run" / "model").glob("*.safetensors"))
    names = {tensor for file in files for tensor in read_header(file)}
    assert {f"model.layers.1.self_attn.{p}_proj.bias" for p in "qkvo"} | {"lm_head.bias"} <= names
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "stage-2" / "slimmed").state_dict()
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, moved[key])]
    assert any("experts.gate_up_proj" in key for key in changed), "two steps of training moved no expert"
