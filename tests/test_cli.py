"""The command line's contract: help with an example, one `error:` line, nothing left behind, JSON for scripts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_input import BAD_RECIPES, Values, broken_config, dense, large_tokenizer, no_tokenizer, not_finite, truncated
from filelock import FileLock
from recipes import tiny_recipe, write_recipe
from runs import in_child
from safetensors.torch import load_file
from tiny import save_tiny

from slimmoe_hf import cli, commands, parsers, parsers_cut, student_training
from slimmoe_hf.criteria import CRITERIA, EXPERT_CRITERIA
from slimmoe_hf.loading import load_model, weights_sha256
from slimmoe_hf.machines import MACHINES
from slimmoe_hf.recipe import load_recipe

COMMANDS = (
    "env",
    "size",
    "score",
    "plan",
    "slim",
    "distill",
    "run",
    "eval",
    "plot",
    "finetune",
    "push",
    "cache",
    "merge",
    "compare",
    "export",
)
DATA = ("--max-length", "64")


@pytest.fixture(autouse=True)
def as_loud_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` silences this whole process, which other tests listen to."""
    monkeypatch.setattr(commands, "be_quiet", lambda: None)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tiny_recipe(folder)
    return folder


@pytest.fixture
def home(origin: Path, tmp_path: Path) -> Path:
    """A copy of the model and the text, to be spoilt."""
    shutil.copytree(origin, tmp_path / "home")
    return tmp_path / "home"


def one_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one `error:` line of a command that must fail with exit code 2 and say nothing else on stderr."""
    assert cli.main(list(argv)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "it/s]" not in line and "examples/s]" not in line and line]
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and f"example:\n  slimmoe {command} " in shown and "--debug" in shown


def test_the_commands_are_those_that_are_listed_and_the_criteria_those_that_exist():
    assert set(commands.COMMANDS) == set(COMMANDS)
    assert ", ".join(CRITERIA) == parsers_cut.CRITERIA and ", ".join(EXPERT_CRITERIA) == parsers_cut.EXPERT_CRITERIA
    assert ", ".join(MACHINES) == parsers.MACHINES


def test_flags_are_a_visible_decision():
    flags = {
        name: {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
        for name, parser in cli._commands(cli.build_parser()).items()
    }
    common = {"--help", "--debug"}
    data = {"--data", "--data-revision", "--split", "--max-length", "--tokens"}
    train = data | {"--packing", "--no-packing", "--seed"}
    teacher = {"--teacher", "--teacher-revision", "--revision"}
    output = {"--output", "--overwrite", "--config"}
    target = {"--expert-width", "--kv-groups", "--num-experts", "--criterion", "--expert-criterion"}
    scoring = {"--loss", "--batch-size", "--calibration-dtype", "--calibration-device", "--stream"}
    training = {
        "--max-steps", "--num-train-epochs", "--learning-rate", "--lr-scheduler-type", "--warmup-steps",
        "--per-device-train-batch-size", "--gradient-accumulation-steps", "--save-steps",
    }  # fmt: skip
    assert flags == {
        "env": common | {"--json", "--families"},
        "size": common | {
            "--revision", "--expert-width", "--kv-groups", "--num-experts", "--target", "--stages", "--gpu", "--length",
            "--batch-size", "--dtype", "--json", "--config",
        },
        "score": common | train | teacher | output | scoring,
        "plan": common | train | teacher | output | target | scoring | {
            "--json", "--budget", "--active-budget", "--candidates", "--validation-tokens", "--reconstruct", "--no-reconstruct",
        },
        "slim": common | train | teacher | output | scoring | {
            "--plan", "--other-weights", "--dtype", "--shard-size", "--delete-source-shards", "--reconstruct", "--no-reconstruct",
        } | target,
        "distill": common | train | teacher | output | {
            "--model", "--teacher-cache", "--beta", "--temperature", "--loss-top-k", "--distillation-weight",
            "--crossentropy-weight",
        } | training,
        "run": common | output | {"--dry-run", "--machine", "--reconstruct", "--no-reconstruct"},
        "compare": common | {"--output", "--overwrite", "--dry-run", "--json"},
        "eval": common | data | teacher | output | {
            "--batch-size", "--json", "--tasks", "--task-path", "--num-fewshot", "--limit",
        },
        "plot": common | {"--output", "--overwrite", "--json"},
        "finetune": common | train | output | training | {
            "--revision", "--lora", "--rank", "--alpha", "--router", "--no-experts", "--merge", "--dtype", "--optim",
        },
        "push": common | {
            "--private", "--base-model", "--license", "--branch", "--message", "--dry-run", "--overwrite",
        },
        "cache": common | train | output | {
            "--revision", "--kind", "--top-k", "--temperature", "--vocab-size", "--shard-size", "--batch-size", "--dtype",
            "--verify", "--json", "--stream", "--stream-memory",
        },
        "merge": common | train | teacher | output | scoring | {
            "--num-experts", "--similarity", "--grouping", "--reference", "--shard-size", "--uniform", "--form",
            "--reconstruct", "--no-reconstruct",
        },
        "export": common - {"--config"} | {"--for", "--form", "--json", "--output", "--overwrite"},
    }  # fmt: skip


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from slimmoe_hf.cli import build_parser; build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_way_from_a_model_to_a_better_one(home: Path, capsys: pytest.CaptureFixture[str]):
    """score -> plan -> plan show -> slim -> distill -> eval, each by its command."""
    teacher, text = str(home / "teacher"), str(home / "text.jsonl")
    stats, plan, slim, better = (str(home / name) for name in ("stats.safetensors", "plan", "slim", "better"))
    assert cli.main(["score", teacher, "--data", text, *DATA, "--tokens", "1024", "--output", stats]) == 0
    assert cli.main(["plan", stats, "--expert-width", "16", "--output", plan]) == 0
    capsys.readouterr()
    assert cli.main(["plan", "show", plan, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["criterion"] == "energy" and shown["after"]["expert_width"] == 16 and shown["loss"] == "kd_topk"
    both = ["plan", stats, "--expert-width", "16", "--num-experts", "3", "--output", str(home / "both")]
    unfit = one_error(capsys, *both, "--expert-criterion", "energy")
    assert "'energy' does not score whole experts. Set expert_criterion to" in unfit
    assert "num_experts=1 is not between the 2 that" in one_error(
        capsys, "plan", stats, "--num-experts", "1", "--output", plan + "2"
    )
    assert not (home / "both").exists() and cli.main(both) == 0
    assert cli.main(["slim", teacher, "--plan", str(home / "both"), "--output", str(home / "fewer")]) == 0
    capsys.readouterr()
    assert cli.main(["size", teacher, "--expert-width", "16", "--num-experts", "3", "--json"]) == 0
    sized = json.loads(capsys.readouterr().out)["slimmed"]
    assert sized["target"] == "expert_width=16, num_experts=3"
    assert sized["total_parameters"] == sum(p.numel() for p in load_model(home / "fewer").parameters())
    assert cli.main(["plan", "show", plan, plan]) == 0
    assert "the same decision" in capsys.readouterr().out

    assert cli.main(["slim", teacher, "--plan", plan, "--output", slim]) == 0
    at_once = ["slim", teacher, "--data", text, *DATA, "--tokens", "1024", "--expert-width", "16", "--output"]
    unfit = one_error(capsys, *at_once, str(home / "unfit"), "--criterion", "taylor", "--loss", "none")
    assert "loss 'none': criterion 'taylor' looks at gradients, and it has none. Leave the loss out" in unfit
    unfit = one_error(
        capsys, "plan", teacher, "--data", text, "--budget", "0.6x", "--loss", "none", "--output", plan + "2"
    )
    assert "loss 'none': a search for a budget looks at gradients" in unfit
    assert cli.main([*at_once, str(home / "at-once"), "--no-reconstruct"]) == 0
    assert weights_sha256(home / "at-once") == weights_sha256(Path(slim)), "without gradients, of which it needs none"
    training = ["--max-steps", "6", "--learning-rate", "1e-3", "--per-device-train-batch-size", "4"]
    given = ["--model", slim, "--teacher", teacher, "--data", text, *DATA, *training, "--output", better]
    assert cli.main(["distill", *given]) == 0
    assert not list(home.glob("*.checkpoints")) and not list(home.glob(".partial-*"))
    losses = []
    for model in (slim, better):
        capsys.readouterr()
        assert cli.main(["eval", model, "--data", text, *DATA, "--teacher", teacher, "--json"]) == 0
        measured = json.loads(capsys.readouterr().out)
        losses.append(measured["loss"])
        assert 0 < measured["agreement"] < 1 and measured["split"] == "test" and measured["total_parameters"] == 40000
    assert losses[1] < losses[0]
    assert "is there already. Give another --output, or --overwrite" in one_error(capsys, "distill", *given)


def _distill_and_die(argv: list[str]) -> None:
    true = student_training.TrainingProgress.on_step_end

    def dying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        true(self, args, state, control, **kwargs)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    student_training.TrainingProgress.on_step_end = dying  # type: ignore[method-assign]
    cli.main(argv)


def test_a_killed_distillation_continues_and_ends_with_the_same_weights(home: Path, capsys: pytest.CaptureFixture[str]):
    teacher, text = str(home / "teacher"), str(home / "text.jsonl")
    save_tiny(home / "student", intermediate_size=16)
    training = ["--max-steps", "5", "--save-steps", "2", "--per-device-train-batch-size", "2"]
    given = ["distill", "--model", str(home / "student"), "--teacher", teacher, "--data", text, *DATA, *training]
    assert cli.main([*given, "--output", str(home / "whole")]) == 0
    killed = [*given, "--output", str(home / "killed")]
    assert in_child(_distill_and_die, killed) == -signal.SIGKILL
    assert (home / "killed.checkpoints").is_dir() and not (home / "killed").exists()
    capsys.readouterr()
    assert "holds checkpoints of another request" in one_error(capsys, *killed, "--seed", "1")
    assert cli.main(killed) == 0
    assert "continues from checkpoint-2" in "".join(capsys.readouterr())
    assert weights_sha256(home / "whole") == weights_sha256(home / "killed")


def test_a_cache_takes_the_teachers_place(home: Path, capsys: pytest.CaptureFixture[str]):
    text, cache = ["--data", str(home / "text.jsonl"), *DATA], str(home / "cache")
    save_tiny(home / "student", intermediate_size=16)
    training = ["--max-steps", "3", "--per-device-train-batch-size", "2"]
    given = ["distill", "--model", str(home / "student"), *text, *training]
    assert cli.main(["cache", "write", str(home / "teacher"), *text, "--output", cache, "--top-k", "320"]) == 0
    assert cli.main([*given, "--teacher", str(home / "teacher"), "--output", str(home / "live")]) == 0
    assert cli.main([*given, "--teacher-cache", cache, "--output", str(home / "cached")]) == 0
    live, cached = (load_file(home / name / "model.safetensors") for name in ("live", "cached"))
    start = load_file(home / "student" / "model.safetensors")
    for name in live:
        moved = (live[name] - start[name]).norm()
        assert (cached[name] - live[name]).norm() <= 0.05 * moved, name
    both = [*given, "--teacher", str(home / "teacher"), "--teacher-cache", cache, "--output", str(home / "both")]
    assert "distill takes --teacher, or --teacher-cache" in one_error(capsys, *both)
    other = [*given, "--teacher-cache", cache, "--output", str(home / "other"), "--no-packing"]
    assert "does not fit this training: " in one_error(capsys, *other)
    nowhere, jsd = (
        [*given, "--teacher-cache", str(home / "nowhere")],
        [*given, "--teacher-cache", cache, "--beta", "0.5"],
    )
    assert "nowhere: no teacher cache there" in one_error(capsys, *nowhere, "--output", str(home / "other"))
    assert "beta" in one_error(capsys, *jsd, "--output", str(home / "other"))
    assert not list(home.glob("other*"))


@pytest.mark.slow  # three commands, as another test has them for one split
def test_a_cache_of_both_splits_serves_a_distillation_that_evaluates(home: Path, capsys: pytest.CaptureFixture[str]):
    text, config = ["--data", str(home / "text.jsonl"), *DATA], home / "evaluates.yaml"
    config.write_text("eval_strategy: steps\neval_steps: 1\nper_device_eval_batch_size: 4\n")
    save_tiny(home / "evaluated", intermediate_size=16)
    given = ["distill", "--model", str(home / "evaluated"), *text, "--config", str(config), "--max-steps", "1"]
    for split in ("train", "train+validation"):
        write = ["cache", "write", str(home / "teacher"), *text, "--split", split, "--output", str(home / split)]
        assert cli.main(write) == 0
    alone = [*given, "--teacher-cache", str(home / "train"), "--output", str(home / "alone")]
    line = one_error(capsys, *alone)
    assert (
        "eval_strategy=steps evaluates on the validation split: write the cache with --split train+validation" in line
    )
    both = [*given, "--teacher-cache", str(home / "train+validation"), "--output", str(home / "served")]
    assert cli.main(both) == 0


def test_flags_win_over_the_config_file(home: Path, capsys: pytest.CaptureFixture[str]):
    values = {
        "model": str(home / "teacher"),
        "data": str(home / "text.jsonl"),
        "max-length": 32,
        "tokens": 400,
        "json": True,
    }
    (home / "eval.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["eval", "--config", str(home / "eval.yaml"), "--max-length", "48"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["max_length"] == 48 and measured["model"] == values["model"]


def test_any_training_argument_may_stand_in_the_config_file(home: Path):
    config = home / "distill.yaml"
    config.write_text("packing: false\nadam_beta2: 0.95\nlearning_rate: 1e-3\ndistillation_weight: 0.5\n")
    args = cli.parse(["distill", "--config", str(config), "--learning-rate", "2e-3"])
    assert args.packing is False
    assert args.training == {"adam_beta2": 0.95, "learning_rate": 2e-3, "distillation_weight": 0.5}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command given"),
        (["size"], "size needs a model: a folder, a config.json or a Hub id"),
        (["size", "./nowhere"], "./nowhere: no such folder or file"),
        (["slam"], "invalid choice: 'slam'"),
        (["slim", "m", "--output", "o"], "slim needs --plan, or --data and a size"),
        (
            ["slim", "m", "--output", "o", "--plan", "p", "--data", "d"],
            "slim takes a plan, or --data and a size, not both",
        ),
        (["slim", "m", "--output", "o", "--plan", "p", "--shard-size", "big"], "--shard-size big: not a size"),
        (["slim", "m", "--output", "o", "--plan", "p", "--dtype", "int8"], "--dtype int8: unknown; use float32"),
        (["slim", "m", "--output", "o", "--plan", "nowhere"], "nowhere: no plan there"),
        (["score"], "score needs model, data, output (see slimmoe score --help)"),
        (["score", "m", "--los", "lm"], "unrecognized arguments: --los"),
        (
            ["score", "m", "--data", "d", "--output", "o", "--loss", "ml"],
            "--loss ml: unknown; use one of lm, kd_topk, none.",
        ),
        (["score", "m", "--calibration-dtype", "int8"], "--calibration-dtype: invalid choice: 'int8'"),
        (["score", "./nowhere", "--data", "d", "--output", "o"], "./nowhere: no such folder"),
        (["plan", "--output", "o"], "plan takes one statistics file, or show"),
        (["plan", "nowhere.safetensors", "--output", "o"], "nowhere.safetensors: no such statistics file"),
        (["plan", "show", "nowhere"], "nowhere: no plan there"),
        (["run"], "give the recipe to run"),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["eval", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["eval", "m", "--max-length", "many"], "argument --max-length: invalid int value: 'many'"),
    ],
)
def test_bad_arguments_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert message in one_error(capsys, *argv)


def test_an_unknown_key_of_a_config_file_suggests_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "c.yaml").write_text("max_lenght: 3")
    assert "c.yaml: max_lenght: unknown key; did you mean max_length?" in one_error(
        capsys, "eval", "--config", str(tmp_path / "c.yaml")
    )


def test_overwrite_replaces_nothing_that_is_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A folder where a file is to go, a file where a folder, a folder of the user's, a link."""
    mine = tmp_path / "precious"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(mine)
    commands_and_places = [
        (["eval", "m", "--data", "d", "--output", str(mine)], "precious: is a folder. Give --output a file."),
        (["score", "m", "--data", "d", "--output", str(mine)], "precious: is a folder. Give --output a file."),
        (["plan", "s", "--output", str(mine / "thesis.txt")], "thesis.txt: is a file. Give --output a folder."),
        (["finetune", "m", "--data", "d", "--output", str(mine)], "precious: holds files that slimmoe did not write"),
        (["slim", "m", "--plan", "p", "--output", str(tmp_path / "link")], "link: a link, which --overwrite does not"),
    ]
    for argv, message in commands_and_places:
        assert message in one_error(capsys, *argv, "--overwrite")
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_debug_shows_the_traceback(tmp_path: Path):
    with pytest.raises(ValueError, match="no such recipe"):
        cli.main(["run", str(tmp_path / "nowhere.yaml"), "--debug"])


@pytest.mark.parametrize(("spoil", "message"), BAD_RECIPES, ids=[f"{f.__name__}-{m[-12:]}" for f, m in BAD_RECIPES])
def test_bad_input_is_one_line_and_leaves_no_output_folder(
    spoil: Callable[[Path, Values], None], message: str, home: Path, capsys: pytest.CaptureFixture[str]
):
    values = tiny_recipe(home)
    spoil(home, values)
    before = sorted(path for path in home.rglob("*"))
    recipe = write_recipe(home, values)
    assert message in one_error(capsys, "run", str(recipe))
    assert sorted(path for path in home.rglob("*") if path != recipe) == before


def test_a_foreign_and_a_locked_output_folder_are_one_line(home: Path, capsys: pytest.CaptureFixture[str]):
    recipe = str(write_recipe(home, tiny_recipe(home)))
    (home / "foreign").mkdir()
    (home / "foreign" / "thesis.txt").write_text("mine")
    message = one_error(capsys, "run", recipe, "--output", str(home / "foreign"))
    assert "foreign: holds files that are no run of slimmoe" in message
    assert [path.name for path in (home / "foreign").iterdir()] == ["thesis.txt"]
    assert "thesis.txt: is a file" in one_error(capsys, "run", recipe, "--output", str(home / "foreign" / "thesis.txt"))
    (home / "locked").mkdir()
    (home / "locked" / "recipe.yaml").write_text(load_recipe(recipe).to_yaml())  # as a run stores it
    (home / "locked" / "steps.json").write_text("{}")
    with FileLock(home / "locked" / ".lock"):
        message = one_error(capsys, "run", recipe, "--output", str(home / "locked"))
    assert "locked: locked: another slimmoe run is working there" in message


@pytest.mark.parametrize("spoil", [truncated, not_finite, broken_config, no_tokenizer, large_tokenizer, dense])
@pytest.mark.parametrize("command", ["score", "eval"])
def test_other_commands_look_at_a_checkpoint_first_too(
    spoil: Callable[[Path, Values], None], command: str, home: Path, capsys: pytest.CaptureFixture[str]
):
    spoil(home, {})
    message = next(message for function, message in BAD_RECIPES if function is spoil)
    output = ["--output", str(home / "stats.safetensors")] if command == "score" else []
    assert message in one_error(
        capsys, command, str(home / "teacher"), "--data", str(home / "text.jsonl"), *DATA, *output
    )
    assert not (home / "stats.safetensors").exists()


@pytest.mark.slow  # a process of its own a command
def test_a_whole_process_prints_only_what_is_asked_for(home: Path):
    """As a user sees it: JSON alone on stdout, no warning of any library on stderr; and nothing that draws is imported."""
    argv = ["eval", str(home / "teacher"), "--data", str(home / "text.jsonl"), *DATA, "--json"]
    code = "import sys; from slimmoe_hf.cli import main; sys.exit(main() or 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total_parameters"] > 0
    assert not any(word in done.stderr for word in ("Warning", "Error", "it/s"))
