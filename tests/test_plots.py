"""Pictures of runs: they show what statistics, plan and report say, are the same every time, and can be read."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from tiny import NUM_EXPERTS, decoder_only, tiny_batch, tiny_model

from slimmoe_hf import cli
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.criteria import CRITERIA, magnitude
from slimmoe_hf.factorization import compare_stable_ranks, stable_ranks
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.merging import plan_merge
from slimmoe_hf.plan import CompressionPlan, Target, make_plan
from slimmoe_hf.plots import _DRAWN, Plot, draw, png
from slimmoe_hf.plots import style as plot_style
from slimmoe_hf.plots.comparison import Compared, ComparedTable, Place
from slimmoe_hf.plots.data import read_pictures
from slimmoe_hf.plots.frontier import Frontier, ShapePlace, SizePlace
from slimmoe_hf.plots.models import Kept, KeptStage, Picture, Scores
from slimmoe_hf.plots.ranks import RankChange, StableRanks, stable_rank_picture
from slimmoe_hf.plots.recovery import (
    DriftStage,
    LoadMap,
    Losses,
    LossStage,
    QualitySize,
    RouterLoads,
    SizePoint,
    SizeRun,
)
from slimmoe_hf.report import Report
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.surgery import apply_plan

NAMES = ["kept", "scores", "router_load", "losses", "quality_size"]


@pytest.fixture(scope="module")
def finished(whole_run: Path) -> Path:
    """A real run of two stages, logged every other step."""
    return whole_run / "run"


@pytest.fixture(scope="module")
def drawn(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Plot]:
    """Its pictures."""
    return draw([finished], tmp_path_factory.mktemp("drawn") / "plots")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "*slimmed")))


def made_up_run(folder: Path, family: str, target: Target, criterion: str = "taylor") -> Path:
    """A run's folder around real statistics and a real plan: everything else is made up."""
    stats = collect_stats(tiny_model(family), [tiny_batch()], loss="lm")
    experts, _, neurons = criterion.rpartition("_and_")
    plan = make_plan(stats, target, neurons, expert_criterion=experts or None)
    (folder / "stage-1").mkdir(parents=True)
    stats.save(folder / "stage-1" / "stats.safetensors")
    plan.save(folder / "stage-1" / "plan")
    (folder / "recipe.yaml").write_text("{}")
    even = [[1.0] * NUM_EXPERTS for _ in stats.meta.layers]
    history = [{"step": 5 * n, "loss": 3.0 / n, "kl": 1.0 / n, "ce": 2.0 / n, "router_load": even} for n in (1, 2)]
    steps = {"stage-1/distil": {"seconds": 1, "outputs": {}, "result": {"history": [*history, {"step": 10}]}}}
    inputs = {"test data": "text"}
    (folder / "steps.json").write_text(json.dumps({"version": 1, "inputs": inputs, "threads": 1, "steps": steps}))
    sizes = {
        "active_parameters": 10,
        "bytes": 1,
        "tokens_per_second": 1.0,
        "weights_sha256": "w",
        "teacher_sha256": "t",
    }
    models = [
        {"name": name, "path": "x", "stage": int(name != "teacher"), "step": name, "total_parameters": size, "loss": loss,
         "bits_per_byte": loss / 2, "router_layers": stats.meta.layers, "router_load": even, **sizes}
        for name, size, loss in (("teacher", 100, 2.0), ("slimmed", 60, 3.0), ("distilled", 60, 2.5))
    ]  # fmt: skip
    evaluation = {
        "data": "text.jsonl", "revision": None, "split": "test", "max_length": 64, "rows": 2, "tokens": 126, "documents": 1,
        "stream_tokens": 130, "stream_bytes": 400, "token_limit": None, "dtype": "float32", "prompts": [],
    }  # fmt: skip
    report = {"models": models, "evaluation": evaluation, "seconds": 1.0, "threads": 1, "version": "0"}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def change(file: Path, edit: Callable[[Any], None]) -> None:
    """Rewrite a JSON file."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def one_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


# What they show


def test_kept_equals_statistics_and_plan(finished: Path):
    picture = read_pictures([finished])[0]["kept"]
    assert isinstance(picture, Kept) and [stage.stage for stage in picture.stages] == [1, 2]
    for stage in picture.stages:
        stats = ExpertStats.load(finished / f"stage-{stage.stage}" / "stats.safetensors")
        plan = CompressionPlan.load(finished / f"stage-{stage.stage}" / "plan")
        scores = CRITERIA[plan.meta.criterion](stats, 0).neurons_LEF.numpy()
        norms = magnitude(stats).neurons_LEF.numpy()
        for row, layer in enumerate(stats.meta.layers):
            totals = scores[row].sum(-1)
            np.testing.assert_allclose(stage.score_share[row], totals / totals.mean(), atol=1e-6)
            for expert in range(NUM_EXPERTS):
                decided = scores if stats.tokens_LE[row, expert] else norms
                kept = decided[row, expert][plan.neurons[layer][expert].numpy()].sum()
                assert stage.kept_share[row][expert] == pytest.approx(kept / decided[row, expert].sum(), abs=1e-6)
            if not stats.tokens_LE.eq(0).any():  # weighted by score, the shares are the plan's own summary
                whole = np.average(stage.kept_share[row], weights=totals)
                assert whole == pytest.approx(plan.meta.layers[layer].neuron_score_kept, abs=1e-5)
        assert stage.groups_kept == [plan.groups[layer].tolist() for layer in sorted(plan.groups)]
    assert picture.stages[0].groups_kept == [] and len(picture.stages[1].groups_kept) == picture.num_layers


def test_scores_count_every_neuron_once_and_cut_where_the_plan_cuts(finished: Path):
    picture = read_pictures([finished])[0]["scores"]
    assert isinstance(picture, Scores)
    for stage in picture.stages:
        stats = ExpertStats.load(finished / f"stage-{stage.stage}" / "stats.safetensors")
        plan = CompressionPlan.load(finished / f"stage-{stage.stage}" / "plan")
        scores_LEF = CRITERIA[plan.meta.criterion](stats, 0).neurons_LEF
        kept, dropped, cuts = [], [], []
        for row, layer in enumerate(stats.meta.layers):
            for expert in range(NUM_EXPERTS):
                if stats.tokens_LE[row, expert] == 0:
                    continue
                scores = scores_LEF[row, expert].numpy()
                stays = np.isin(np.arange(len(scores)), plan.neurons[layer][expert].numpy())
                kept += scores[stays].tolist()
                dropped += scores[~stays].tolist()
                cuts.append(scores[stays].min())
                assert scores[~stays].max() <= cuts[-1]
        assert sum(stage.kept) + stage.kept_below == len(kept)
        assert sum(stage.dropped) + stage.dropped_below == len(dropped)
        assert stage.zeros == sum(score == 0 for score in kept + dropped)
        assert (stage.cut_lowest, stage.cut_highest) == (min(cuts), max(cuts))
        middle = len(stage.edges) // 2
        above = [sum(counts[middle:]) for counts in (stage.kept, stage.dropped)]
        expected = [sum(score >= stage.edges[middle] for score in scores) for scores in (kept, dropped)]
        assert np.abs(np.subtract(above, expected)).max() <= 1  # edges are rounded to six digits


def test_router_load_losses_and_sizes_equal_report_and_history(finished: Path):
    pictures, notes = read_pictures([finished])
    report = Report.load(finished / "report.json")
    steps = json.loads((finished / "steps.json").read_text())["steps"]
    load, losses, sizes = pictures["router_load"], pictures["losses"], pictures["quality_size"]
    assert isinstance(load, RouterLoads) and isinstance(losses, Losses) and isinstance(sizes, QualitySize)
    assert notes == [] and [loads.load for loads in load.maps] == [
        m.router_load for m in (report.models[0], report.models[-1])
    ]
    for number, (drift, curve) in enumerate(zip(load.stages, losses.stages, strict=True), 1):
        history = steps[f"stage-{number}/distil"]["result"]["history"]
        logged = [entry for entry in history if "loss" in entry]
        assert drift.offset == curve.offset == 6 * (number - 1) and curve.length == 6
        assert drift.steps == curve.steps == [2, 4, 6]
        assert drift.least == [[min(row) for row in entry["router_load"]] for entry in logged]
        assert drift.most == [[max(row) for row in entry["router_load"]] for entry in logged]
        for entry, experts in zip(logged, drift.least_expert, strict=True):
            assert [row.index(min(row)) for row in entry["router_load"]] == experts
        assert (curve.kl, curve.ce) == ([entry["kl"] for entry in logged], [entry["ce"] for entry in logged])
        assert (
            curve.eval_ce == [entry["eval_ce"] for entry in history if "eval_ce" in entry] and len(curve.eval_ce) == 2
        )
        assert (curve.slimmed, curve.distilled) == (report.models[2 * number - 1].loss, report.models[2 * number].loss)
    assert [point.loss for point in sizes.runs[0].points] == [model.loss for model in report.models]


def test_files_are_pngs_of_one_width_with_their_data_beside_them(finished: Path, drawn: list[Plot]):
    assert [plot.name for plot in drawn] == NAMES
    assert sorted(path.name for path in drawn[0].png.parent.iterdir()) == sorted(
        f"{name}.{kind}" for name in NAMES for kind in ("png", "json")
    )
    pictures = read_pictures([finished])[0]
    for plot in drawn:
        with Image.open(plot.png) as image:
            assert (
                image.format == "PNG"
                and image.width == 1200
                and image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            )
        assert plot.png.stat().st_size < 150_000
        data = json.loads(plot.json.read_text())
        assert data == pictures[plot.name].model_dump(mode="json") and data["caption"] == plot.caption
        assert plot.caption.endswith(".") and "\n" not in plot.caption and str(finished) not in plot.json.read_text()


def test_the_same_run_gives_the_same_bytes_whatever_matplotlibrc_says(finished: Path, drawn: list[Plot]):
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 33}):
        again = {name: png(picture) for name, picture in read_pictures([finished])[0].items()}
        assert matplotlib.rcParams["font.size"] == 30
    for plot in drawn:
        assert plot.png.read_bytes() == again[plot.name], plot.name


# Router collapse


def test_a_starved_expert_is_named_in_picture_caption_and_on_the_terminal(
    no_pictures: None, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    change(run / "report.json", lambda report: report["models"][-1]["router_load"][1].__setitem__(3, 0.04))
    assert cli.main(["plot", str(run), "--output", str(tmp_path / "plots")]) == 0
    out, err = capsys.readouterr()
    named = "layer 1 sends expert 3 only 4.0% of an even load, on held-out text after the last stage"
    assert sum(named in line and line.startswith("warning: ") for line in err.splitlines()) == 1
    assert any(named in line for line in out.splitlines() if "router_load.png" in line)
    data = json.loads((tmp_path / "plots" / "router_load.json").read_text())
    assert named in data["title"] and named in data["caption"]
    with Image.open(io.BytesIO(png(read_pictures([run])[0]["router_load"]))) as image:
        assert image.convert("RGB").getpixel((2, 2)) == tuple(
            round(255 * part) for part in to_rgb(plot_style.ALARM_PAPER)
        )


def test_starving_while_training_counts_and_starving_in_the_teacher_does_not(run: Path):
    def starve(steps: Any) -> None:
        steps["steps"]["stage-2/distil"]["result"]["history"][0]["router_load"][0][2] = 0.01

    change(run / "steps.json", starve)
    picture = read_pictures([run])[0]["router_load"]
    assert isinstance(picture, RouterLoads)
    assert (picture.collapsed[0].layer, picture.collapsed[0].expert, picture.collapsed[0].load) == (0, 2, 0.01)
    assert "at step 2 of stage 2" in (picture.warning or "")
    change(run / "report.json", lambda report: report["models"][0]["router_load"][0].__setitem__(2, 0.05))
    picture = read_pictures([run])[0]["router_load"]
    assert isinstance(picture, RouterLoads) and picture.starved_in_teacher == 1
    assert (0, 2) not in [(found.layer, found.expert) for found in picture.collapsed]


# Families, and runs that lack something


def test_a_teacher_of_another_shape_is_left_out_of_the_expert_load(run: Path):
    """The run has two layers of four experts; a teacher with one layer more cannot be laid beside it."""

    def another(report: Any) -> None:
        report["models"][0]["router_layers"] = [0, 1, 2]
        report["models"][0]["router_load"] = [[0.0, 1.0, 1.0, 2.0]] * 3

    change(run / "report.json", another)
    picture = read_pictures([run])[0]["router_load"]
    assert isinstance(picture, RouterLoads) and not picture.maps and picture.stages
    assert png(picture)


@pytest.mark.parametrize("family", decoder_only("a run is of a recipe, which takes decoder-only models"))
def test_every_family_is_drawn_dense_layers_and_uncut_groups_too(family: str, tmp_path: Path):
    target = Target(expert_width=16, kv_groups=None if FAMILIES[family].no_groups else 1)
    folder = made_up_run(tmp_path / "run", family, target)
    pictures, notes = read_pictures([folder])
    assert list(pictures) == NAMES and notes == []
    kept, load = pictures["kept"], pictures["router_load"]
    assert isinstance(kept, Kept) and isinstance(load, RouterLoads)
    assert load.layers == kept.stages[0].layers == ([1, 2] if family == "qwen3_moe" else [0, 1])
    assert kept.num_layers == (3 if family == "qwen3_moe" else 2)
    assert len(kept.stages[0].groups_kept) == (0 if FAMILIES[family].no_groups else kept.num_layers)
    for picture in (kept, load):
        with Image.open(io.BytesIO(png(picture))) as image:
            assert image.width == 1200


def test_every_criterion_can_be_shown(tmp_path: Path):
    for criterion in CRITERIA:
        folder = made_up_run(tmp_path / criterion, "mixtral", Target(expert_width=8), criterion)
        pictures, notes = read_pictures([folder])
        assert list(pictures) == NAMES and notes == []
        scores = pictures["scores"]
        assert isinstance(scores, Scores) and scores.stages[0].criterion == criterion


def test_dropped_experts_are_empty_cells_and_in_the_words(tmp_path: Path):
    folder = made_up_run(tmp_path / "run", "mixtral", Target(expert_width=8, num_experts=3), "frequency_and_energy")
    stats, plan = (
        ExpertStats.load(folder / "stage-1" / "stats.safetensors"),
        CompressionPlan.load(folder / "stage-1" / "plan"),
    )
    pictures, notes = read_pictures([folder])
    kept, scores = pictures["kept"], pictures["scores"]
    assert isinstance(kept, Kept) and isinstance(scores, Scores) and list(pictures) == NAMES and notes == []
    stage = kept.stages[0]
    gone = [(layer, e) for layer in (0, 1) for e in range(NUM_EXPERTS) if e not in plan.experts[layer].tolist()]
    assert len(gone) == 2 and stage.dropped == gone
    assert "kept 3 of 4 experts per layer and 25% of every expert's neurons" in stage.words
    assert "Cut: layers to 3 of 4 experts, experts to 25%" in kept.title
    values = CRITERIA["energy"](stats, 0).neurons_LEF
    for layer, row in enumerate(stage.known_shares):
        np.testing.assert_allclose(
            stage.score_share[layer], stats.tokens_LE[layer] / stats.tokens_LE[layer].mean(), atol=1e-6
        )
        for place, expert in enumerate(plan.experts[layer].tolist()):
            own = values[layer, expert]
            assert row[expert] == pytest.approx(float(own[plan.neurons[layer][place]].sum() / own.sum()), abs=1e-6)
        assert [e for e, share in enumerate(row) if share != share] == [e for at, e in gone if at == layer]
    counted = scores.stages[0]
    assert sum(counted.kept) + counted.kept_below == 2 * 3 * 8
    assert sum(counted.dropped) + counted.dropped_below == 2 * 3 * 24
    assert stage.scored_by == "neurons by energy, experts by frequency"
    assert png(kept) and png(scores)


def test_experts_alone_are_drawn_by_the_criterion_that_chose_them(tmp_path: Path):
    folder = made_up_run(tmp_path / "run", "olmoe", Target(num_experts=2), "reap")
    kept = read_pictures([folder])[0]["kept"]
    assert isinstance(kept, Kept) and kept.stages[0].words.startswith(
        "Stage 1 kept 2 of 4 experts per layer with all their"
    )
    assert kept.title == "Cut: layers to 2 of 4 experts" and png(kept)
    assert kept.stages[0].scored_by == "experts by reap"


def test_a_stage_that_keeps_every_expert_is_drawn_by_a_criterion_of_experts_too(tmp_path: Path):
    folder = made_up_run(tmp_path / "run", "olmoe", Target(num_experts=NUM_EXPERTS), "reap")
    kept = read_pictures([folder])[0]["kept"]
    assert isinstance(kept, Kept) and kept.stages[0].words == "Stage 1 kept every neuron, and 2 of 2 key/value groups"


def test_stable_ranks_of_a_merged_model_are_drawn_and_counted():
    model = tiny_model("phimoe")
    before = stable_ranks(model)
    merged = apply_plan(model, plan_merge(model, collect_stats(model, [tiny_batch()], loss="lm"), 2))
    rows = compare_stable_ranks(before, stable_ranks(merged))
    picture = stable_rank_picture("tiny", rows)
    shown = [row for rows in picture.matrices.values() for row in rows]
    assert list(picture.matrices) == ["gate_up_proj", "down_proj"] and len(shown) == len(rows)
    assert [row.after for row in shown] == [
        row.after for matrix in picture.matrices for row in rows if row.name.endswith(matrix)
    ]
    assert {(row.experts_before, row.experts_after) for row in shown} == {(NUM_EXPERTS, 2)}
    fell = sum(row.change < -0.005 for row in rows)
    assert f"fell in {fell}" in picture.title and png(picture).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no stable ranks"):
        stable_rank_picture("tiny", [])


def test_groups_alone_leave_no_score_histogram(no_pictures: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = made_up_run(tmp_path / "run", "mixtral", Target(kv_groups=1))
    assert [plot.name for plot in draw([folder], tmp_path / "plots")] == [name for name in NAMES if name != "scores"]
    assert "run: scores is left out: no stage narrows the experts." in capsys.readouterr().out


def test_what_an_older_run_lacks_is_left_out_with_a_line(
    no_pictures: None, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def forget(report: Any) -> None:
        for model in report["models"]:
            del model["router_load"], model["router_layers"]

    change(run / "report.json", forget)
    assert "router_load" in [plot.name for plot in draw([run], tmp_path / "drift only")]
    picture = read_pictures([run])[0]["router_load"]
    assert isinstance(picture, RouterLoads) and picture.maps == [] and picture.layers == [0, 1]

    def forget_training(steps: Any) -> None:
        for number in (1, 2):
            for entry in steps["steps"][f"stage-{number}/distil"]["result"]["history"]:
                entry.pop("router_load", None)

    change(run / "steps.json", forget_training)
    (run / "stage-1" / "stats.safetensors").unlink()
    (run / "stage-2" / "stats.safetensors").unlink()
    capsys.readouterr()
    assert [plot.name for plot in draw([run], tmp_path / "plots")] == ["losses", "quality_size"]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" is left out")[0] for line in said] == ["run: kept", "run: scores", "run: router_load"]


# Several runs


def test_several_runs_get_a_folder_each_and_one_picture_together(
    no_pictures: None, finished: Path, run: Path, tmp_path: Path
):
    change(run / "report.json", lambda report: report["models"][-1].__setitem__("total_parameters", 5))
    drawn = draw([finished, run], tmp_path / "plots")
    names = [f"{run.parent.name}-run/{name}" for name in NAMES[:-1]]
    assert [plot.name for plot in drawn][4:] == [*names, "quality_size"] and len(drawn) == 9
    data = json.loads((tmp_path / "plots" / "quality_size.json").read_text())
    assert [entry["points"][-1]["total_parameters"] for entry in data["runs"]][1] == 5
    assert all(plot.png.is_file() for plot in drawn)


SPOILT: list[tuple[str, Callable[[Any], None], str]] = [
    ("report.json", lambda report: report["evaluation"].__setitem__("tokens", 7), "they differ in evaluation tokens ("),
    (
        "report.json",
        lambda report: report["evaluation"].__setitem__("split", "validation"),
        "evaluation split (test and val",
    ),
    ("report.json", lambda report: report["models"][0].__setitem__("teacher_sha256", "feed"), "the teacher (sha256 "),
    ("steps.json", lambda steps: steps["inputs"].__setitem__("test data", "beef"), "the held-out text (sha256 "),
]


@pytest.mark.parametrize(("file", "spoil", "message"), SPOILT, ids=["tokens", "split", "teacher", "text"])
def test_runs_that_cannot_be_compared_are_refused(
    file: str, spoil: Callable[[Any], None], message: str, finished: Path, run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    change(run / file, spoil)
    assert message in one_error(capsys, "plot", str(finished), str(run), "--output", str(tmp_path / "plots"))
    assert not (tmp_path / "plots").exists()


# The command


def test_plots_go_into_the_run_and_are_not_replaced_unasked(
    no_pictures: None, run: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["plot", str(run)]) == 0
    first = (run / "plots" / "kept.png").read_bytes()
    assert f"{run / 'plots' / 'kept.png'}: Heat maps" in capsys.readouterr().out
    assert "is there already" in one_error(capsys, "plot", str(run))
    (run / "plots" / "kept.png").write_bytes(b"")
    assert cli.main(["plot", str(run), "--overwrite"]) == 0
    assert (run / "plots" / "kept.png").read_bytes() == first


def test_json_prints_the_data_and_writes_nothing(run: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(run.rglob("*"))
    assert cli.main(["plot", str(run), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    pictures = read_pictures([run])[0]
    assert data == {name: picture.model_dump(mode="json") for name, picture in pictures.items()}
    assert sorted(run.rglob("*")) == before


def damaged(run: Path) -> None:
    (run / "steps.json").write_text((run / "steps.json").read_text()[:500])


def stage_lost(run: Path) -> None:
    change(run / "steps.json", lambda content: content["steps"].pop("stage-2/distil"))


def other_statistics(run: Path) -> None:
    shutil.copy(run / "stage-1" / "stats.safetensors", run / "stage-2" / "stats.safetensors")


BAD_RUNS: list[tuple[Callable[[Path], None], str]] = [
    (lambda run: shutil.rmtree(run), "no such folder"),
    (lambda run: (run / "recipe.yaml").unlink(), "not a run of slimmoe (no recipe.yaml)"),
    (lambda run: (run / "report.json").unlink(), "this run is not finished (no report.json)"),
    (lambda run: (run / "report.json").write_text("{}"), "report.json: not a report of this version"),
    (damaged, "steps.json: damaged, or of another version"),
    (stage_lost, "it lacks 'stage-2/distil'"),
    (lambda run: shutil.rmtree(run / "stage-2" / "plan"), "no plan there"),
    (
        lambda run: (run / "stage-1" / "stats.safetensors").write_bytes(b"0" * 99),
        "stats.safetensors: damaged or cut short",
    ),
    (other_statistics, "stage-2/stats.safetensors: not the statistics that"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_RUNS, ids=[message[-20:] for _, message in BAD_RUNS])
def test_a_bad_run_is_one_line_and_leaves_nothing(
    spoil: Callable[[Path], None], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    spoil(run)
    assert message in one_error(capsys, "plot", str(run), "--output", str(tmp_path / "plots"))
    assert not (tmp_path / "plots").exists() and not list(tmp_path.glob(".partial*"))


def test_bad_requests_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "plot needs the folder of a finished run" in one_error(capsys, "plot")
    assert "plot needs --output where there are several runs" in one_error(capsys, "plot", str(run), str(run))
    assert "given twice" in one_error(capsys, "plot", str(run), str(run), "--output", str(tmp_path / "plots"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    foreign = one_error(capsys, "plot", str(run), "--output", str(tmp_path / "thesis"), "--overwrite")
    assert "holds thesis.txt, which is no plot" in foreign and (tmp_path / "thesis" / "thesis.txt").exists()


# Legibility


def pictures_of_size(layers: int, experts: int, stages: int, dense: int = 0) -> list[Picture]:
    """Made-up data of a large run, and of several runs with long names."""
    values = np.random.default_rng(0)
    rows = list(range(dense, layers))

    def matrix(low: float, high: float) -> list[list[float]]:
        return np.exp(values.uniform(np.log(low), np.log(high), (len(rows), experts))).tolist()

    kept = [
        KeptStage(
            stage=n, criterion="output_fisher", calibration_loss="kd_topk", width_before=6400 // n, width_after=6400 // (n + 1),
            groups_before=8, groups_after=5, experts_before=experts, experts_after=experts - 1,
            dropped=[(row, n % experts) for row in rows], layers=rows, kept_share=matrix(0.3, 1), score_share=matrix(0.01, 9),
            unreached=[(rows[-1], experts - 1)], groups_kept=[[0, 1, 3, 5, 7]] * layers,
        )
        for n in range(1, stages + 1)
    ]  # fmt: skip
    steps = list(range(100, 20001, 100))
    curve = [2.0 + 10 / step for step in steps]
    least, most = [[0.001] * len(rows)] * len(steps), [[30.0] * len(rows)] * len(steps)
    drift = [
        DriftStage(
            stage=n, offset=20000 * (n - 1), steps=steps, least=least, most=most,
            least_expert=[[0] * len(rows)] * len(steps), most_expert=[[1] * len(rows)] * len(steps),
        )
        for n in range(1, stages + 1)
    ]  # fmt: skip
    losses = [
        LossStage(
            stage=n, offset=20000 * (n - 1), length=20000, steps=steps, loss=curve, kl=curve, ce=curve, eval_steps=steps[::20],
            eval_kl=curve[::20], eval_ce=curve[::20], slimmed=4.0, distilled=2.5,
        )
        for n in range(1, stages + 1)
    ]  # fmt: skip
    points = [
        SizePoint(
            model=f"stage-{n} distilled" if n else "teacher", step="distilled" if n else "teacher",
            total_parameters=42_000_000_000 // (n + 1), active_parameters=1, loss=2.0 + n / 9, bits_per_byte=1.0 + n / 18,
        )
        for n in range(stages + 1)
    ]  # fmt: skip
    sizes = (1, 8) if stages == 3 else ()
    names = [f"{letter}-run-whose-name-is-rather-long-for-a-legend" for letter in "abcdefgh"]
    maps = [
        LoadMap(model=name, layers=rows, load=matrix(0.02, 20)) for name in ("teacher", f"stage-{stages} distilled")
    ]
    return [
        Kept(run=names[0], family="qwen3_moe", num_layers=layers, stages=kept),
        RouterLoads(
            run=names[0], layers=rows, num_layers=layers, maps=maps, stages=drift, collapsed=[], starved_in_teacher=9
        ),
        Losses(run=names[0], split="validation", teacher=2.0, stages=losses),
        *(
            QualitySize(
                data="HuggingFaceFW/fineweb-edu", split="validation", tokens=10**8,
                runs=[SizeRun(run=name, points=points) for name in names[:number]],
            )
            for number in sizes
        ),
        StableRanks(
            model=names[0],
            matrices={
                matrix: [
                    RankChange(layer=f"encoder {row}", experts_before=experts, experts_after=experts // 2, before=97.3,
                               after=after, change=after / 97.3 - 1)
                    for row, after in zip(rows, values.uniform(50, 120, len(rows)), strict=True)
                ]
                for matrix in ("gate_up_proj", "down_proj")
            },
        ),
        Compared(
            model="teacher", data="sotu", tokens=10**6, original=1.9, seeds=3, recovery_tokens=10**6,
            tables=[
                ComparedTable(
                    equal=equal,
                    words=f"Equal {equal} parameters: 2,436,864",
                    places=[
                        Place(method=f"{row}. a method whose name is lon", shape="", before=(4 + row / 3, 0.2), after=(2.1, 0.01))
                        for row in range(rows)
                    ],
                )
                for equal, rows in (("total", 12), ("active", 1))
            ],
        ),
        *(
            Frontier(
                family="switch_transformers", total=42_000_000_000, active=7_000_000_000, original=2.0 if rows else None,
                budget=7_600_000_000, active_budget=2_400_000_000,
                places=[
                    ShapePlace(
                        name=f"{experts - row}x{6400 + 64 * row}, {row} groups", total=7_600_000_000 - row * 10**8, active=10**9,
                        predicted=0.9 + row / 7, plain=1.3 + row / 5, reconstructed=1.0 + row / 6 if row % 2 else None,
                    )
                    for row in range(rows)
                ],
                frontier=[
                    SizePlace(name=f"8x{64 * n}", total=10**9 * n, active=10**9, predicted=5 / n) for n in range(1, 8)
                ],
            )
            for rows in (0, 30)
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "experts", "stages", "dense"),
    [(4, 8, 2, 0), pytest.param(32, 16, 3, 0, marks=pytest.mark.slow), (48, 128, 1, 1)],
)
def test_every_text_is_on_the_sheet_large_enough_and_on_no_other(layers: int, experts: int, stages: int, dense: int):
    for picture in pictures_of_size(layers, experts, stages, dense):
        with plot_style.drawing_style():
            sheet = _DRAWN[picture.name](picture)
            assert len(sheet.png()) < 150_000, picture.name
            canvas = sheet.figure.canvas
            width, height = canvas.get_width_height()
            unseen = _beyond_the_ends(sheet.figure)
            boxes = []
            for text in sheet.figure.findobj(Text):
                what, box = text.get_text(), text.get_window_extent()
                if what.strip() and text.get_visible() and id(text) not in unseen:
                    assert text.get_fontsize() >= plot_style.SMALL, what
                    assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, (picture.name, what)
                    boxes.append((box.padded(-1), what))
            for (one, first), (other, second) in itertools.combinations(boxes, 2):
                assert not one.overlaps(other), (picture.name, first, second)


def _beyond_the_ends(figure: Figure) -> set[int]:
    """Labels of ticks outside of their axis: they exist, and are not drawn."""
    found = set()
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                found |= {id(tick.label1), id(tick.label2)}
    return found


def test_text_has_the_contrast_that_wcag_asks_for():
    for ink, paper in itertools.product(
        (plot_style.INK, plot_style.SOFT, plot_style.ALARM), (plot_style.PAPER, plot_style.ALARM_PAPER)
    ):
        assert plot_style.contrast(to_rgb(ink), to_rgb(paper)) >= 4.5, (ink, paper)
    assert plot_style.contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    for line in plot_style.LINES:
        assert plot_style.contrast(to_rgb(line), to_rgb(plot_style.PAPER)) >= 3, line
    values = np.linspace(0.3, 1, 100)[None]
    for norm, colors in (plot_style.share_scale(values), plot_style.even_scale(values)):
        for value in np.linspace(norm.vmin or 0, norm.vmax or 1, 100):
            cell = to_rgb(colors(norm(value)))
            assert plot_style.contrast(cell, to_rgb(plot_style.ink_on(cell))) >= 4.5


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
DEFICIENT = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(color: str, deficiency: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as somebody with a colour deficiency sees it."""
    part = np.array(to_rgb(color))
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(DEFICIENT[deficiency]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ linear / (0.9505, 1, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", DEFICIENT)
def test_lines_can_be_told_apart_by_colour_blind_eyes(deficiency: str):
    """A difference of 2.3 is just noticeable; 10 is plain. Dashes and markers differ too."""
    for one, other in itertools.combinations(plot_style.LINES, 2):
        assert np.linalg.norm(lab(one, deficiency) - lab(other, deficiency)) > 10, (one, other)
    assert len(set(plot_style.DASHES)) == len(set(plot_style.MARKERS)) == len(plot_style.LINES)


def test_the_middle_of_the_diverging_map_is_an_even_load():
    norm, colors = plot_style.even_scale(np.array([[0.3, 1.0, 2.0]]))
    assert float(norm(1.0)) == pytest.approx(0.5) and (norm.vmin, norm.vmax) == (0.25, 4)
    red, green, blue, _ = colors(norm(1.0))
    assert min(red, green, blue) > 0.95
    assert torch.isclose(torch.tensor(float(norm(0.5)) + float(norm(2.0))), torch.tensor(1.0))
