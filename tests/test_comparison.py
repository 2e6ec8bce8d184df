"""Comparing methods: a tiny grid from end to end, killed and resumed, and every refusal."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recipes import tiny_recipe
from scipy import stats
from tiny import tiny_model
from transformers import AutoConfig

from slimmoe_hf import cli, commands, compare_point, compare_pool, comparison
from slimmoe_hf.compare_point import RESULT, SPEC, STATS, Bench, Point, PointResult, run_point, stage_target
from slimmoe_hf.compare_results import Comparison, Mean, Row, Table, as_markdown
from slimmoe_hf.factorization import factor_experts
from slimmoe_hf.grid import Grid, Method, load_grid, parse_grid
from slimmoe_hf.grid_sizes import check_sizes, size_of_method
from slimmoe_hf.loading import load_tokenizer
from slimmoe_hf.plan import Target
from slimmoe_hf.sizing import parameter_counts

Values = dict[str, Any]
SHIPPED = Path(__file__).parent.parent / "examples"


def tiny_grid(folder: Path) -> Values:
    """Every kind of method at half of the experts of a tiny model, which it writes into `folder`, with text."""
    recipe = tiny_recipe(folder)
    return {
        "model": recipe["model"],
        "data": {"source": recipe["data"]["source"], "max_length": 64, "validation_tokens": 512},
        "seeds": [3, 5],
        "calibration": {"tokens": 512},
        "learning_rates": [1e-3, 1e-2],
        "recovery": {
            "max_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": False, "crossentropy_weight": 0.5,
        },
        "teacher_cache": {"top_k": 16},
        "test_tokens": 512,
        "tables": [
            {"equal": "total", "expert_share": 0.5, "methods": [
                {"name": "narrow", "target": {"expert_width": 16}, "criterion": "taylor"},
                {"name": "drop", "target": {"num_experts": 2}, "criterion": "random"},
                {"name": "merge", "merge": {"num_experts": 2}, "reconstruct": True},
                {"name": "factor", "factor": {"rank": 8, "density": 0.06}},
                {"name": "scratch", "target": {"expert_width": 16}, "from_scratch": True},
                {"name": "stages", "target": {"expert_width": 16}, "criterion": "energy", "stages": 2},
            ]},
            {"equal": "active", "expert_share": 0.5, "methods": [
                {"name": "the same", "target": {"expert_width": 16}, "criterion": "taylor"},
                {"name": "repaired", "target": {"expert_width": 16}, "criterion": "taylor", "reconstruct": True},
            ]},
        ],
    }  # fmt: skip


def write_grid(folder: Path, values: Values) -> Path:
    (folder / "grid.yaml").write_text(yaml.safe_dump(values))
    return folder / "grid.yaml"


def in_this_process(folders: Any, shared: Path, model: Path, processes: int, threads: int, told: Any) -> None:
    """In place of processes, whose imports take most of a tiny point's time."""
    bench = Bench(shared, model, load_tokenizer(model))
    for folder in folders:
        run_point(bench, folder)
        told(folder, None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """A folder with a grid, and what `out` in it found."""
    home = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "do_points", in_this_process)
        threads = torch.get_num_threads()
        found = comparison.compare(write_grid(home, tiny_grid(home)), home / "out")
        torch.set_num_threads(threads)
    assert found is not None
    return home, found


def test_every_method_is_measured_before_and_after_recovery_at_its_size(finished: tuple[Path, Comparison]):
    home, found = finished
    config = AutoConfig.from_pretrained(home / "teacher")
    grid = load_grid(home / "grid.yaml")
    assert [table.equal for table in found.tables] == ["total", "active"]
    for table, asked in zip(found.tables, grid.tables, strict=True):
        assert [row.method for row in table.rows] == [method.name for method in asked.methods]
        for row, method in zip(table.rows, asked.methods, strict=True):
            size = size_of_method(config, method)
            have = row.total_parameters if table.equal == "total" else row.active_parameters
            assert abs(have / table.parameters - 1) < 0.03
            assert (
                abs(row.total_parameters - size.total) <= 0.01 * size.total
            )  # a density makes no whole number of rows
            assert len(row.before.values) == len(row.after.values) == 2 and all(v > 0 for v in row.after.values)
    narrow, *_, stages = found.tables[0].rows
    repaired = found.tables[1].rows[1]
    for plain, other in zip(narrow.before.values, repaired.before.values, strict=True):
        assert other != plain and abs(other - plain) < 1, "the same cut, reconstructed"
    assert narrow.points == found.tables[1].rows[0].points  # one point, two tables
    assert narrow.before.values[0] != narrow.before.values[1]  # another sample of calibration text
    assert stages.points != narrow.points


def test_what_is_said_to_be_equal_is_equal(finished: tuple[Path, Comparison]):
    home, found = finished
    results = {
        row.method: [PointResult.model_validate_json((home / "out/points" / key / RESULT).read_text()) for key in row.points]
        for row in found.tables[0].rows
    }  # fmt: skip
    assert {result.recovery_tokens for each in results.values() for result in each} == {2 * 2 * 64}
    scored = {method: {result.calibration_tokens for result in each} for method, each in results.items()}
    assert scored.pop("factor") == scored.pop("scratch") == {0}
    assert all(tokens == {512} for tokens in scored.values())


def test_stages_recover_on_rows_of_their_own(
    finished: tuple[Path, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home, found = finished
    key = found.tables[0].rows[-1].points[0]
    point = Point.model_validate_json((home / "out/points" / key / SPEC).read_text())
    seen: list[set[tuple[int, ...]]] = []

    def recorded(model: Any, teacher: Any, arguments: Any, tokenizer: Any, train: Any, *rest: Any) -> None:
        seen.append({tuple(row) for row in train["input_ids"]})

    monkeypatch.setattr(compare_point, "teach", recorded)
    (tmp_path / SPEC).write_text(point.model_dump_json())
    bench = Bench(home / "out/shared" / point.shared, home / "teacher", load_tokenizer(home / "teacher"))
    run_point(bench, tmp_path)
    first, second = seen
    assert first | second == {tuple(row) for row in bench.train["input_ids"]} and not first & second


def test_the_learning_rate_is_the_one_of_the_lowest_validation_loss(finished: tuple[Path, Comparison]):
    home, found = finished
    assert found.learning_rate == float(min(found.learning_rates, key=found.learning_rates.__getitem__))
    points = [Point.model_validate_json(file.read_text()) for file in home.glob(f"out/points/*/{SPEC}")]
    tuned = [point for point in points if point.split == "validation"]
    assert sorted(point.recovery["learning_rate"] for point in tuned) == [1e-3, 1e-2]
    assert {point.recovery["learning_rate"] for point in points if point.split == "test"} == {found.learning_rate}


def test_a_learning_rate_that_diverges_only_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comparison, "do_points", in_this_process)
    values = tiny_grid(tmp_path)
    table = {**values["tables"][0], "methods": values["tables"][0]["methods"][:1]}
    few = {**values, "seeds": [3], "learning_rates": [1e30, 1e-3], "tables": [table]}
    threads = torch.get_num_threads()
    found = comparison.compare(write_grid(tmp_path, few), tmp_path / "out")
    torch.set_num_threads(threads)
    assert found is not None and found.learning_rate == 1e-3 and list(found.learning_rates) == ["0.001"]


def test_results_table_and_picture_lie_in_the_folder_and_name_no_path(finished: tuple[Path, Comparison]):
    home, found = finished
    out = home / "out"
    assert Comparison.load(out / "results.json") == found
    assert (out / "table.md").read_text() == as_markdown(found)
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    grid = json.loads((out / "results.json").read_text())["grid"]
    assert grid["model"] == "teacher" and grid["data"]["source"] == "text.jsonl"
    assert all(str(home) not in (out / name).read_text() for name in ("results.json", "table.md"))


def test_each_seed_recovers_in_an_order_of_its_own(finished: tuple[Path, Comparison]):
    """Factoring scores nothing and draws nothing: only the order of recovery can tell its seeds apart."""
    (row,) = [row for table in finished[1].tables for row in table.rows if row.method == "factor"]
    assert len(set(row.before.values)) == 1 and len(set(row.after.values)) == len(row.after.values) > 1


def test_finished_points_are_not_done_again_and_torn_ones_are(
    finished: tuple[Path, Comparison], monkeypatch: pytest.MonkeyPatch
):
    home, found = finished
    done: list[str] = []

    def counted(folders: Any, *rest: Any) -> None:
        done.extend(folder.name for folder in folders)
        in_this_process(folders, *rest)

    monkeypatch.setattr(comparison, "do_points", counted)
    assert comparison.compare(home / "grid.yaml", home / "out") == found and not done
    torn, foreign = found.tables[0].rows[0].points
    (home / "out/points" / torn / RESULT).write_text('{"before": 1.0')
    spec = home / "out/points" / foreign / SPEC
    spec.write_text(spec.read_text().replace('"seed": 5', '"seed": 6'))
    again = comparison.compare(home / "grid.yaml", home / "out")
    assert sorted(done) == sorted([torn, foreign])
    rows = zip(found.tables[0].rows, again.tables[0].rows, strict=True) if again else ()
    assert all(old.before == new.before and old.after == new.after for old, new in rows)  # the same, bit for bit


def test_a_changed_grid_does_only_what_is_new(finished: tuple[Path, Comparison], monkeypatch: pytest.MonkeyPatch):
    home, found = finished
    done: list[Point] = []

    def recorded(folders: Any, *rest: Any) -> None:
        done.extend(Point.model_validate_json((folder / SPEC).read_text()) for folder in folders)
        in_this_process(folders, *rest)

    monkeypatch.setattr(comparison, "do_points", recorded)
    values = tiny_grid(home)
    values["tables"] = [{**values["tables"][1], "methods": [
        {"name": "new", "target": {"expert_width": 16}, "criterion": "magnitude"}, *values["tables"][1]["methods"],
    ]}]  # fmt: skip
    values["learning_rates"] = [found.learning_rate]
    (home / "changed.yaml").write_text(yaml.safe_dump(values))
    comparison.compare(home / "changed.yaml", home / "out")
    assert [point.method.criterion for point in done if point.method is not None] == ["magnitude", "magnitude"]


@pytest.mark.slow  # starts five processes, each of which imports everything
def test_killed_and_called_again_it_ends_with_the_same(finished: tuple[Path, Comparison], tmp_path: Path):
    """SIGKILL to the command: its processes end with it, and the second call takes what is finished."""
    home, found = finished
    values = {**tiny_grid(home), "processes": 2}
    grid, out = write_grid(tmp_path, values), tmp_path / "out"
    call = "import sys; from slimmoe_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", call, "compare", str(grid), "--output", str(out)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while len(list(out.glob(f"points/*/{RESULT}"))) < 5:
        assert time.monotonic() < deadline and first.poll() is None, "five points should be done by now"
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(1)
    kept = {file: file.stat().st_mtime_ns for file in out.glob(f"points/*/{RESULT}")}
    time.sleep(3)
    assert {file: file.stat().st_mtime_ns for file in out.glob(f"points/*/{RESULT}")} == kept  # nobody works on
    subprocess.run(command, check=True, stderr=subprocess.PIPE, timeout=300)
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    again = Comparison.load(out / "results.json")
    assert [row.points for table in again.tables for row in table.rows] == [
        row.points for table in found.tables for row in table.rows
    ]
    for old, new in zip(found.tables[0].rows, again.tables[0].rows, strict=True):
        assert old.before.values == pytest.approx(new.before.values, abs=1e-5)
        assert old.after.values == pytest.approx(new.after.values, abs=1e-5)


FAULTY = """
import os, signal, sys
from pathlib import Path
for line in sys.stdin:
    folder = Path(line.strip())
    if folder.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if folder.name == "faulty":
        (folder / "error.txt").write_text("the loss is not finite.")
    print("failed" if folder.name == "faulty" else "done", flush=True)
"""


def test_a_point_that_fails_or_dies_is_named_and_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "worker.py").write_text(FAULTY)
    real = subprocess.Popen

    def stand_in(command: list[str], **how: Any) -> Any:
        return real([sys.executable, str(tmp_path / "worker.py")], **how)

    monkeypatch.setattr(compare_pool.subprocess, "Popen", stand_in)
    folders = [tmp_path / name for name in ("one", "killed", "two", "faulty", "three")]
    for folder in folders:
        folder.mkdir()
    told: dict[str, str | None] = {}
    compare_pool.do_points(folders, tmp_path, tmp_path, 2, 1, lambda folder, fault: told.update({folder.name: fault}))
    assert told == {
        "one": None, "two": None, "three": None, "faulty": "the loss is not finite.",
        "killed": "its process was ended by signal 9, as the system does for want of memory",
    }  # fmt: skip


def test_failed_points_are_one_error_line(
    finished: tuple[Path, Comparison],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    home, _ = finished

    def failing(folders: Any, *rest: Any) -> None:
        for folder in folders:
            rest[-1](folder, "no loss." if folder == folders[0] else None)

    monkeypatch.setattr(comparison, "do_points", failing)
    monkeypatch.setattr(commands, "be_quiet", lambda: None)
    assert cli.main(["compare", str(home / "grid.yaml"), "--output", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "1 of 2 points failed; the others are kept" in line and "scores, seed 3: no loss." in line


@pytest.mark.parametrize("values", [[1.0, 2.0], [4.1, 4.2, 3.9], [0.5, 0.5, 0.5, 0.7, 0.1]], ids=len)
def test_the_interval_is_students(values: list[float]):
    mean = Mean.of(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean.half_width is not None
    assert (mean.mean - mean.half_width, mean.mean + mean.half_width) == pytest.approx(tuple(expected), rel=1e-12)


def test_one_seed_has_no_interval():
    assert Mean.of([3.25]).half_width is None and str(Mean.of([3.25])) == "3.250"


def test_the_table_says_what_was_found():
    rows = [
        Row(
            method="narrow", settings={}, shape="8x96", total_parameters=2436864, active_parameters=1552128,
            before=Mean.of([4.0, 5.0]), after=Mean.of([3.5, 3.5]), seconds=1.0, points=["a", "b"],
        )
    ]  # fmt: skip
    found = Comparison(
        model="teacher", data="sotu", model_sha256="", test_sha256="", total_parameters=10, active_parameters=5, loss=3.0,
        test_tokens=1000, calibration_tokens=200, recovery_tokens=3000, learning_rates={"0.001": 3.9, "0.002": 3.8},
        tuned_on="narrow", learning_rate=0.002, seeds=[0, 1],
        grid={"tables": [{"methods": [{"stages": 2, "factor": None, "merge": {"num_experts": 2}}]}]},
        command="slimmoe compare g.yaml --output out",
        machine="a CPU", version="1", tables=[Table(equal="total", expert_share=0.25, parameters=2436864, rows=rows)],
    )  # fmt: skip
    text = as_markdown(found)
    # 12.706 is t(.975) of one degree of freedom; s / sqrt(2) is .5
    assert "| narrow | 8x96 | 2,436,864 | 1,552,128 | 4.500 \u00b1 6.353 | 3.500 \u00b1 0.000 |" in text
    assert "**Equal total parameters: 2,436,864 (25% of the experts')**" in text
    assert "chosen once, on the validation split, with `narrow` and the first seed" in text
    assert (
        "two seeds" not in text
        and "2 seeds" in text
        and "in stages" in text
        and "Factored" not in text
        and "`uniform` form" in text
    )


@pytest.mark.parametrize("method", [
    {"target": {"expert_width": 16}, "criterion": "taylor"}, {"merge": {"num_experts": 2}},
    {"factor": {"rank": 8, "density": 0.5}}, {"merge": {"num_experts": 2}, "factor": {"rank": 16, "density": 0.25}},
], ids=str)  # fmt: skip
def test_sizes_from_the_config_are_those_of_models(method: Values):
    """Without a model: counted on one, for factored experts before any row of S goes and less what is to go."""
    model, asked = tiny_model("mixtral"), Method(name="m", **_targets(method))
    size = size_of_method(model.config, asked)
    left = tiny_model("mixtral", **{
        "intermediate_size": method.get("target", {}).get("expert_width", 32),
        "num_local_experts": method.get("merge", {}).get("num_experts", 4),
    })  # fmt: skip
    gone = 0
    if asked.factor is not None:
        dense = parameter_counts(left.config)
        elements = dense.total - dense.active if asked.merge is None else 0
        experts = sum(p.numel() for n, p in left.named_parameters() if ".experts." in n)
        assert elements in (0, experts // 2)
        factor_experts(left, asked.factor.rank)
        gone = experts - round(experts * asked.factor.density)
    assert size.total == sum(parameter.numel() for parameter in left.parameters()) - gone


def _targets(method: Values) -> Values:
    return {**method, **({"target": Target(**method["target"])} if "target" in method else {})}


def off(values: Values) -> None:
    values["tables"][0]["methods"][0]["target"] = {"expert_width": 24}


def off_by_factor(values: Values) -> None:
    values["tables"][0]["methods"][3]["factor"]["density"] = 0.9


def off_for_ever(values: Values) -> None:
    values["tables"][0]["expert_share"] = 0.02


def misspelt(values: Values) -> None:
    values["tables"][0]["methods"][0]["critreion"] = "taylor"


def rate_twice(values: Values) -> None:
    values["recovery"]["learning_rate"] = 1e-3


def no_steps(values: Values) -> None:
    del values["recovery"]["max_steps"]


def two_ways(values: Values) -> None:
    values["tables"][0]["methods"][2]["target"] = {"num_experts": 2}


def no_criterion(values: Values) -> None:
    del values["tables"][0]["methods"][0]["criterion"]


def twice(values: Values) -> None:
    values["tables"][0]["methods"][1]["name"] = "narrow"


def rank(values: Values) -> None:
    values["tables"][0]["methods"][3]["factor"]["rank"] = 12


def many_stages(values: Values) -> None:
    values["tables"][0]["methods"][5]["stages"] = 3


def nothing_to_repair(values: Values) -> None:
    values["tables"][0]["methods"][4]["reconstruct"] = True


def wide_loss(values: Values) -> None:
    values["recovery"]["beta"] = 0.5


def no_text(values: Values) -> None:
    values["data"]["source"] += "x"


REFUSED = [
    (off, "tables.0.methods.0 (narrow): ", "% of the table's ", "3% is allowed. Nearest: expert_width 16."),
    (off_by_factor, "tables.0.methods.3 (factor): ", "Nearest: density 0.083."),
    (off_for_ever, "Nearest: expert_width 8. It is off too"),
    (misspelt, "tables.0.methods.0.critreion: unknown key; did you mean criterion?"),
    (rate_twice, "recovery: learning_rate cannot be set here: `learning_rates` has the candidates"),
    (no_steps, "recovery: max_steps, the optimizer steps"),
    (two_ways, "tables.0.methods.2: merge: has both merge and target. Give each a row of its own"),
    (no_criterion, "tables.0.methods.0: narrow: names no criterion"),
    (twice, "tables.0.methods: two methods are named 'narrow'"),
    (rank, "(factor): rank=12 does not fit", "multiple of 8"),
    (many_stages, "(stages): 3 stages of 2 steps in all"),
    (nothing_to_repair, "methods.4: scratch: neither cuts nor merges, so leave reconstruct out"),
    (wide_loss, "recovery: beta=0.5 looks at every token"),
    (no_text, "text.jsonlx: no such file or folder"),
]


@pytest.mark.parametrize(
    ("spoil", "words"), [(row[0], row[1:]) for row in REFUSED], ids=lambda v: getattr(v, "__name__", "")
)
def test_a_bad_grid_is_one_line_and_leaves_nothing(
    finished: tuple[Path, Comparison], tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    home, _ = finished
    values = copy.deepcopy(tiny_grid(home))
    spoil(values)
    monkeypatch.setattr(commands, "be_quiet", lambda: None)
    assert cli.main(["compare", str(write_grid(tmp_path, values)), "--output", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "out" / "points").exists()


def test_a_folder_that_holds_other_things_is_left_alone(
    finished: tuple[Path, Comparison],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    home, _ = finished
    monkeypatch.setattr(commands, "be_quiet", lambda: None)
    (tmp_path / "thesis.txt").write_text("mine")
    command = ["compare", str(home / "grid.yaml"), "--output", str(tmp_path), "--overwrite"]
    assert cli.main(command) == 2 and "holds files that are no comparison" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["compare.yaml", "compare-gpu.yaml"])
def test_the_shipped_grids_are_at_their_budgets_and_the_dry_run_lists_them(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(commands, "be_quiet", lambda: None)
    assert cli.main(["compare", str(SHIPPED / name), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    shown, grid = "".join(capsys.readouterr()), load_grid(SHIPPED / name)
    sizes = check_sizes(grid, AutoConfig.from_pretrained(SHIPPED / "teacher/model"), name)
    for table, number, method in grid.rows():
        line = next(line for line in shown.splitlines() if line.startswith(f"{method.name} "))
        assert method.name in line
        size = sizes[table, number]
        assert f"{size.total:,}" in shown and f"{size.active:,}" in shown
    assert f"{grid.processes} of them at once" in shown and not (tmp_path / "out").exists()


def test_stages_are_geometric_and_the_last_one_exact():
    model = tiny_model("mixtral", intermediate_size=384, num_local_experts=8)
    assert stage_target(model, Target(expert_width=96), 0, 2) == Target(expert_width=192)  # sqrt(384 * 96)
    assert stage_target(model, Target(num_experts=2), 0, 2) == Target(num_experts=4)
    assert stage_target(model, Target(expert_width=100), 1, 2) == Target(expert_width=100)


def test_a_point_is_named_by_everything_that_decides_it():
    values: Values = {
        "shared": "x", "method": {"name": "-", "merge": {"num_experts": 2}}, "seed": 0, "split": "test", "calibration": {},
        "recovery": {"max_steps": 2}, "max_length": 64, "packing": True, "batch_size": 8, "threads": 1,
        "versions": {"torch": "2"},
    }  # fmt: skip
    changes: list[Values] = [
        {"shared": "y"}, {"method": {"name": "-", "merge": {"num_experts": 3}}}, {"seed": 1}, {"split": "validation"},
        {"calibration": {"tokens": 8}}, {"recovery": {"max_steps": 3}}, {"max_length": 65}, {"packing": False}, {"batch_size": 4},
        {"threads": 2}, {"versions": {"torch": "3"}},
    ]  # fmt: skip
    keys = [Point.model_validate(values | change).key for change in ({}, *changes)]
    assert len(set(keys)) == 12
    assert (
        Point.model_validate(values).scores.key
        == Point.model_validate(values | {"recovery": {"max_steps": 9}}).scores.key
    )


def test_scores_are_taken_once_a_seed(finished: tuple[Path, Comparison]):
    home, _ = finished
    assert len(list(home.glob(f"out/points/*/{STATS}"))) == 2


def test_a_grid_takes_gradients_where_a_method_looks_at_them(tmp_path: Path):
    values = tiny_grid(tmp_path)
    values["calibration"].pop("loss", None)
    assert parse_grid(values, "grid").sweep.loss == "kd_topk"
    with pytest.raises(ValueError, match="loss 'none': criterion 'taylor' looks at gradients"):
        parse_grid({**values, "calibration": {**values["calibration"], "loss": "none"}}, "grid")
    [table, _] = values["tables"]
    methods = [method for method in table["methods"] if method.get("criterion") != "taylor"]
    assert parse_grid({**values, "tables": [{**table, "methods": methods}]}, "grid").sweep.loss == "none"


def test_a_grid_survives_its_yaml(finished: tuple[Path, Comparison]):
    grid = load_grid(finished[0] / "grid.yaml")
    assert isinstance(grid, Grid) and parse_grid(yaml.safe_load(grid.to_yaml()), "again") == grid
    assert Path(grid.model).is_absolute()
