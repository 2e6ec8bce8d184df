"""Promise 2: cut on disk equals cut in memory and saved, for every family and layout; and what a damaged source says."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from runs import in_child
from safetensors.torch import load_file, save_file
from test_surgery import random_plan
from tiny import families, save_tiny, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimmoe_hf import checkpoint, shards
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.families import FAMILIES, shape_of
from slimmoe_hf.loading import load_model, weights_sha256
from slimmoe_hf.plan import CompressionPlan, Target, make_plan
from slimmoe_hf.shards import read_header
from slimmoe_hf.student_training import save_checkpoint
from slimmoe_hf.surgery import apply_plan

LAYOUTS = {"per expert": True, "fused": False}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "no_bias": {"attention_bias": False, "lm_head_bias": False},
}


def target_of(family: str) -> Target:
    row = FAMILIES[family]
    return Target(expert_width=None if row.no_width else 16, kv_groups=None if row.no_groups else 1)


def saved(folder: Path, model: PreTrainedModel, per_expert: bool = True, shard: str = "9KB") -> Path:
    """A checkpoint in shards so small that an expert's gate and up projections lie in different ones."""
    model.save_pretrained(folder, max_shard_size=shard, save_original_format=per_expert)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_tensors(a: Path, b: Path) -> None:
    ours, theirs = tensors_of(a), tensors_of(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path / "source", tiny_model("phimoe"))


@pytest.fixture
def plan() -> CompressionPlan:
    return random_plan(tiny_model("phimoe"), target_of("phimoe"))


@pytest.mark.parametrize("experts", [None, 3, "only 2"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", families())
def test_cut_on_disk_equals_cut_in_memory(family: str, layout: str, variant: str, experts, tmp_path: Path):
    if variant == "no_bias" and family != "phimoe":
        pytest.skip("the other families have no bias by default")
    if experts is not None and variant != "plain":
        pytest.skip("tied weights and biases have nothing to do with experts")
    if layout == "fused" and (variant != "plain" or experts == "only 2"):
        pytest.skip("what is tied, has a bias or goes as a whole is done as in the other layout")
    if experts is None and target_of(family) == Target():
        pytest.skip(f"nothing but experts can go: {FAMILIES[family].no_width}")
    if layout == "fused" and FAMILIES[family].layout.unit is not None:
        pytest.skip("its experts are units of their own in memory too")
    model = tiny_model(family, **VARIANTS[variant])
    # small enough that an expert's projections lie in different ones; plain units have two of them, and three fit
    source = saved(tmp_path / "source", model, LAYOUTS[layout], "9KB" if FAMILIES[family].layout.gated else "13KB")
    if layout == "per expert":
        index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
        prefix = FAMILIES[family].paths(model.config)[-1].feed_forward
        first, second, *_ = (piece.name for piece in FAMILIES[family].pieces)
        places = [[index[f"{prefix}.{name.format(e)}"] for name in (first, second)] for e in range(4)]
        apart = [one != other for one, other in places]
        assert any(apart), "no expert is spread over shards: this would test less than it says"
    target = target_of(family).model_copy(update={"num_experts": experts})
    plan = random_plan(model, target if experts != "only 2" else Target(num_experts=2))
    slim_checkpoint(source, plan, tmp_path / "on-disk", shard_bytes=10_000)
    save_checkpoint(apply_plan(model, plan), tiny_tokenizer(), tmp_path / "in-memory", "float32")
    same_tensors(tmp_path / "on-disk", tmp_path / "in-memory")
    ours, theirs = (load_model(tmp_path / name) for name in ("on-disk", "in-memory"))
    assert torch.equal(ours(**tiny_batch()).logits, theirs(**tiny_batch()).logits)
    assert shape_of(ours.config) == plan.meta.after


@pytest.mark.parametrize(
    "keys", [("num_experts",), ("num_local_experts",), ("num_experts", "num_local_experts")], ids=str
)
def test_the_number_of_experts_is_written_under_whatever_name_a_config_has_it(keys: tuple[str, ...], tmp_path: Path):
    """Qwen3-MoE's files on the Hub and those that transformers writes differ in it; engines get both."""
    model = tiny_model("qwen3_moe")
    file = saved(tmp_path / "source", model) / "config.json"
    values = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("num_experts", "num_local_experts")}
    file.write_text(json.dumps({**values, **dict.fromkeys(keys, 4)}))
    slimmed = slim_checkpoint(file.parent, random_plan(model, Target(num_experts=3)), tmp_path / "slimmed")
    written = json.loads((slimmed / "config.json").read_text())
    assert (written["num_experts"], written["num_local_experts"]) == (3, 3)
    assert shape_of(AutoModelForCausalLM.from_pretrained(slimmed).config).num_experts == 3


def test_tokenizer_template_and_generation_config_come_along_and_nothing_else_does(source: Path, plan, tmp_path: Path):
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "README.md").write_text("the original's card")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_evil.Evil"}}))
    slimmed = slim_checkpoint(source, plan, tmp_path / "slimmed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (slimmed / name).read_bytes() == (source / name).read_bytes()
    assert not json.loads((slimmed / "config.json").read_text()).get("auto_map")
    assert not {"README.md", "modeling_evil.py", "slim.json", ".lock"} & {file.name for file in slimmed.iterdir()}
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_converts_every_weight(source: Path, plan, tmp_path: Path, dtype: str):
    slimmed = slim_checkpoint(source, plan, tmp_path / "slimmed", dtype=dtype)
    assert {tensor.dtype for tensor in tensors_of(slimmed).values()} == {getattr(torch, dtype)}
    model = AutoModelForCausalLM.from_pretrained(slimmed)
    assert model.dtype == getattr(torch, dtype)
    save_checkpoint(apply_plan(load_model(source), plan), tiny_tokenizer(), tmp_path / "in-memory", dtype)
    same_tensors(slimmed, tmp_path / "in-memory")


def test_shards_are_as_small_as_asked_and_the_index_names_them_all(source: Path, plan, tmp_path: Path):
    slimmed = slim_checkpoint(source, plan, tmp_path / "slimmed", shard_bytes=8_000)
    files = sorted(file.name for file in slimmed.glob("*.safetensors"))
    index = json.loads((slimmed / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 3
    for file in files:
        held = read_header(slimmed / file)
        assert sum(tensor.bytes for tensor in held.values()) <= 8_000 or len(held) == 1
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(slimmed).values())
    assert index["metadata"]["total_size"] == total


def _die_after(number: int):
    """Kill this process, as hard as can be, before the shard after `number` is begun."""
    begin = checkpoint.ShardWriter.__init__

    def counting(self, path: Path, tensors) -> None:
        if len(list(path.parent.glob("*.safetensors"))) == number:
            os._exit(9)
        begin(self, path, tensors)

    checkpoint.ShardWriter.__init__ = counting


def _slim_and_die(source: Path, plan: CompressionPlan, destination: Path) -> None:
    _die_after(3)
    slim_checkpoint(source, plan, destination, shard_bytes=8_000)


def test_killed_and_called_again_it_continues(source: Path, plan, tmp_path: Path, monkeypatch):
    whole = slim_checkpoint(source, plan, tmp_path / "whole", shard_bytes=8_000)
    assert in_child(_slim_and_die, source, plan, tmp_path / "slimmed") == 9
    assert not (tmp_path / "slimmed").exists()
    begun = {file.name: file.stat().st_mtime_ns for file in (tmp_path / ".partial-slimmed").glob("*.safetensors")}
    assert len(begun) == 3
    slim_checkpoint(source, plan, tmp_path / "slimmed", shard_bytes=8_000)
    for name, written in begun.items():
        assert (tmp_path / "slimmed" / name).stat().st_mtime_ns == written, f"{name} was written twice"
    assert weights_sha256(tmp_path / "slimmed") == weights_sha256(whole)


def test_another_request_does_not_continue_what_was_begun(source: Path, plan, tmp_path: Path):
    assert in_child(_slim_and_die, source, plan, tmp_path / "slimmed") == 9
    other = random_plan(tiny_model("phimoe"), target_of("phimoe"), seed=7)
    slim_checkpoint(source, other, tmp_path / "slimmed", shard_bytes=8_000)
    slim_checkpoint(source, other, tmp_path / "whole", shard_bytes=8_000)
    assert weights_sha256(tmp_path / "slimmed") == weights_sha256(tmp_path / "whole")


def test_a_shard_damaged_after_it_was_written_is_noticed_and_written_again(source: Path, plan, tmp_path: Path):
    assert in_child(_slim_and_die, source, plan, tmp_path / "slimmed") == 9
    victim = sorted((tmp_path / ".partial-slimmed").glob("*.safetensors"))[0]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ValueError, match="does not read back as it was written"):
        slim_checkpoint(source, plan, tmp_path / "slimmed", shard_bytes=8_000)
    assert not (tmp_path / "slimmed").exists()
    slim_checkpoint(source, plan, tmp_path / "slimmed", shard_bytes=8_000)


def test_a_full_disk_leaves_nothing_under_the_final_name_and_a_restart_finishes(source, plan, tmp_path, monkeypatch):
    written, real = [0], os.write

    def filling(descriptor: int, content: memoryview) -> int:
        if written[0] + len(content) > 70_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written[0] += len(content)
        return real(descriptor, content)

    monkeypatch.setattr(shards, "write", filling)
    with pytest.raises(ValueError, match=r"the disk is full after [1-9] of \d+ shards.*the same command continues"):
        slim_checkpoint(source, plan, tmp_path / "slimmed", shard_bytes=10_000)
    assert not (tmp_path / "slimmed").exists()
    assert not list((tmp_path / ".partial-slimmed").glob("*.tmp"))
    written[0] = -(10**9)
    slim_checkpoint(source, plan, tmp_path / "slimmed", shard_bytes=10_000)
    slim_checkpoint(source, plan, tmp_path / "whole", shard_bytes=10_000)
    assert weights_sha256(tmp_path / "slimmed") == weights_sha256(tmp_path / "whole")


def test_too_little_room_is_said_before_anything_is_written(source, plan, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ValueError, match="1,000 are free"):
        slim_checkpoint(source, plan, tmp_path / "slimmed")
    assert not list(tmp_path.rglob("*.tmp"))


def rewrite(source: Path, name: str, change) -> Path:
    """Change one tensor of a sharded checkpoint; the file it is in."""
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    file = source / index[name]
    held = load_file(file)
    held[name] = change(held[name])
    save_file({key: value for key, value in held.items() if value is not None}, file, metadata={"format": "pt"})
    return file


UP = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def poison(tensor: torch.Tensor) -> torch.Tensor:
    tensor[:, 3] = torch.nan
    return tensor


def outside(source: Path) -> None:
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00003", "../model-00003"))


def cut_short(source: Path) -> None:
    file = sorted(source.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-100])


def lie(source: Path) -> None:
    """A header that promises one row more than the config, and than the bytes have."""
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    file = source / index[UP]
    content = file.read_bytes()
    assert content.count(b'"shape":[32,32]') > 0
    file.write_bytes(content.replace(b'"shape":[32,32]', b'"shape":[33,32]'))


DAMAGE = {
    "an index that points outside": (outside, r"index\.json: .* points outside the folder \(\.\./model-00003"),
    "a missing shard": (
        lambda s: sorted(s.glob("*.safetensors"))[2].unlink(),
        r"model-00003.*: missing, but the index",
    ),
    "a shard cut short": (cut_short, r"model-00003.*: truncated at model\."),
    "a header that lies": (lie, r"bytes, not what its shape \[33, 32\] needs"),
    "NaN": (lambda s: rewrite(s, UP, poison), r"experts\.2\.w3\.weight holds values that are not finite"),
    "a missing tensor": (lambda s: rewrite(s, UP, lambda t: None), r"lacks .*experts\.2\.w3\.weight"),
    "another shape": (
        lambda s: rewrite(s, UP, lambda t: t[:24].clone()),
        r"is \[24, 32\], config\.json says \[32, 32\]",
    ),
    "no config": (lambda s: (s / "config.json").unlink(), r"config\.json: missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_source_is_named_and_nothing_is_written(source: Path, plan, tmp_path: Path, damage: str):
    spoil, message = DAMAGE[damage]
    spoil(source)
    with pytest.raises(ValueError, match=message):
        slim_checkpoint(source, plan, tmp_path / "slimmed")
    assert not [entry.name for entry in tmp_path.iterdir() if "slimmed" in entry.name]


def test_a_plan_made_for_other_weights_is_refused_unless_told_so(source: Path, tmp_path: Path):
    def scored(model: PreTrainedModel) -> CompressionPlan:
        return make_plan(collect_stats(model, [tiny_batch()], progress=False), target_of("phimoe"))

    own = scored(load_model(source, dtype=torch.bfloat16))
    slim_checkpoint(source, own, tmp_path / "own")  # scored in another dtype, but these are the weights
    other = scored(tiny_model("phimoe", seed=1))
    with pytest.raises(ValueError, match=r"made for another model of the same sizes.*--other-weights"):
        slim_checkpoint(source, other, tmp_path / "slimmed")
    assert not (tmp_path / "slimmed").exists()
    slim_checkpoint(source, other, tmp_path / "slimmed", other_weights=True)
    wider = random_plan(tiny_model("phimoe", intermediate_size=64), Target(expert_width=16))
    with pytest.raises(ValueError, match="expert_width 64, the model has 32"):
        slim_checkpoint(source, wider, tmp_path / "wider")
    with pytest.raises(ValueError, match="the plan is for phimoe, the model is mixtral"):
        slim_checkpoint(saved(tmp_path / "mixtral", tiny_model("mixtral")), wider, tmp_path / "wider")


def test_nothing_is_overwritten_unless_told_so_and_never_the_source(source: Path, plan, tmp_path: Path):
    (tmp_path / "slimmed").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        slim_checkpoint(source, plan, tmp_path / "slimmed")
    slim_checkpoint(source, plan, tmp_path / "slimmed", overwrite=True)
    with pytest.raises(ValueError, match="is the model itself"):
        slim_checkpoint(source, plan, source, overwrite=True)


def test_what_is_in_the_way_is_left_alone(source: Path, plan, tmp_path: Path, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "holder").mkdir()
    shutil.copytree(source, tmp_path / "holder" / "original")
    shutil.copytree(source, tmp_path / ".partial-twin")
    monkeypatch.chdir(tmp_path / "thesis")
    places = {
        tmp_path / "thesis": "you are in it", Path(".."): "you are in it", Path("/"): "you are in it",
        tmp_path / "file": "is a file or a link", tmp_path / "link": "is a file or a link",
    }  # fmt: skip
    for place, message in places.items():
        with pytest.raises(ValueError, match=message):
            slim_checkpoint(source, plan, place, overwrite=True)
    with pytest.raises(ValueError, match="is there already"):
        slim_checkpoint(source, plan, tmp_path / "link")
    (tmp_path / "holder" / "config.json").write_text("{}")
    before = sorted(path for path in tmp_path.rglob("*"))
    for inside, place in (("holder/original", "holder"), (".partial-twin", "twin")):
        with pytest.raises(ValueError, match="is the model itself, or holds it"):
            slim_checkpoint(tmp_path / inside, plan, tmp_path / place, overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="holds files that are no checkpoint; they are left alone"):
        slim_checkpoint(source, plan, tmp_path / "thesis", overwrite=True)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_folder_that_appears_meanwhile_is_left_alone_and_the_work_is_kept(source, plan, tmp_path, monkeypatch):
    finish = checkpoint._Run.finish

    def intruded(self, values) -> None:
        finish(self, values)
        (tmp_path / "slimmed").mkdir()

    monkeypatch.setattr(checkpoint._Run, "finish", intruded)
    with pytest.raises(ValueError, match="is there already"):
        slim_checkpoint(source, plan, tmp_path / "slimmed", shard_bytes=8_000)
    begun = {file.name: file.stat().st_mtime_ns for file in (tmp_path / ".partial-slimmed").glob("*.safetensors")}
    monkeypatch.setattr(checkpoint._Run, "finish", finish)
    (tmp_path / "slimmed").rmdir()
    slim_checkpoint(source, plan, tmp_path / "slimmed", shard_bytes=8_000)
    assert begun == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "slimmed").glob("*.safetensors")}


def test_a_failed_cut_can_be_called_again_in_the_same_process(source: Path, plan, tmp_path: Path):
    healthy = tmp_path / "healthy"
    shutil.copytree(source, healthy)
    file = rewrite(source, UP, poison)
    kept = []
    try:
        slim_checkpoint(source, plan, tmp_path / "slimmed", shard_bytes=8_000)
    except ValueError as error:
        kept.append(error)  # as a notebook keeps the last traceback
    shutil.copyfile(healthy / file.name, file)
    slim_checkpoint(source, plan, tmp_path / "slimmed", shard_bytes=8_000)
    assert kept


def test_a_finished_shard_that_was_cut_short_is_written_again(source: Path, plan, tmp_path: Path):
    assert in_child(_slim_and_die, source, plan, tmp_path / "slimmed") == 9
    victim = sorted((tmp_path / ".partial-slimmed").glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(ValueError, match="does not read back as it was written"):
        slim_checkpoint(source, plan, tmp_path / "slimmed", shard_bytes=8_000)
    slim_checkpoint(source, plan, tmp_path / "slimmed", shard_bytes=8_000)


def test_a_plan_that_does_not_cover_the_model_is_refused(source: Path, plan, tmp_path: Path):
    partial = dataclasses.replace(plan, neurons={0: plan.neurons[0]})
    with pytest.raises(ValueError, match=r"the plan leaves model\.layers\.1\..* at \[32, 32\], its own sizes ask for"):
        slim_checkpoint(source, partial, tmp_path / "slimmed")


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "mxfp4"])
def test_packed_weights_are_refused_by_name(source: Path, plan, tmp_path: Path, method: str):
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"quantised \({method}\).*unquantised checkpoint"):
        slim_checkpoint(source, plan, tmp_path / "slimmed")


def test_a_fused_source_gives_the_layout_that_serving_engines_read(tmp_path: Path, plan):
    source = saved(tmp_path / "source", tiny_model("phimoe"), per_expert=False)
    assert any("gate_up_proj" in name for name in tensors_of(source))
    slimmed = slim_checkpoint(source, plan, tmp_path / "slimmed")
    names = tensors_of(slimmed).keys()
    assert not any("gate_up_proj" in name for name in names)
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names


def test_slim_checkpoint_holds_few_weights_at_a_time(source: Path, plan, tmp_path: Path, monkeypatch):
    """What is read ahead is bounded in bytes, not in weights."""
    monkeypatch.setattr(checkpoint, "_AHEAD", 10_000)
    alive, most, sizes = [0], [0], {}
    read, add = checkpoint.Cut.read, checkpoint.ShardWriter.add

    def counting(cut, *arguments) -> torch.Tensor:
        sizes[cut.name] = cut.bytes
        alive[0] += cut.bytes
        most[0] = max(most[0], alive[0])
        return read(cut, *arguments)

    def written(self, name: str, tensor: torch.Tensor) -> None:
        add(self, name, tensor)
        alive[0] -= sizes[name]

    monkeypatch.setattr(checkpoint.Cut, "read", counting)
    monkeypatch.setattr(checkpoint.ShardWriter, "add", written)
    slim_checkpoint(source, plan, tmp_path / "slimmed")
    assert 0 < most[0] <= 10_000 + 2 * max(sizes.values()) < sum(sizes.values())


def test_a_whole_checkpoint_from_the_family_fixture_survives(tmp_path: Path):
    """One file, no index: the other form in which checkpoints come."""
    source = save_tiny(tmp_path / "source")
    plan = random_plan(tiny_model("phimoe"), Target(expert_width=8))
    slimmed = slim_checkpoint(source, plan, tmp_path / "slimmed")
    assert [file.name for file in slimmed.glob("*.safetensors")] == ["model.safetensors"]
    assert not (slimmed / "model.safetensors.index.json").exists()
    assert shape_of(load_model(slimmed).config).expert_width == 8
