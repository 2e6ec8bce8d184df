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
import torch
import yaml
from filelock import FileLock
from recipes import tiny_recipe, write_recipe
from runs import in_child
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from slimmoe_hf import cli, commands, pipeline
from slimmoe_hf.criteria import CRITERIA
from slimmoe_hf.loading import weights_sha256

COMMANDS = ("env", "score", "plan", "distill", "run", "eval")
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
    assert ", ".join(CRITERIA) == cli._CRITERIA


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
    assert flags == {
        "env": common | {"--json"},
        "score": common | train | teacher | output | {"--loss", "--batch-size"},
        "plan": common | output | {"--expert-width", "--kv-groups", "--criterion", "--seed", "--json"},
        "distill": common | train | teacher | output | {
            "--model", "--max-steps", "--num-train-epochs", "--learning-rate", "--lr-scheduler-type", "--warmup-steps",
            "--per-device-train-batch-size", "--gradient-accumulation-steps", "--save-steps", "--beta", "--temperature",
            "--loss-top-k", "--distillation-weight", "--crossentropy-weight",
        },
        "run": common | output | {"--dry-run"},
        "eval": common | data | teacher | {"--config", "--batch-size", "--json"},
    }  # fmt: skip


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from slimmoe_hf.cli import build_parser; build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_way_from_a_model_to_a_better_one(home: Path, capsys: pytest.CaptureFixture[str]):
    """score -> plan -> plan show -> (apply) -> distill -> eval, each by its command."""
    teacher, text = str(home / "teacher"), str(home / "text.jsonl")
    stats, plan, slim, better = (str(home / name) for name in ("stats.safetensors", "plan", "slim", "better"))
    assert cli.main(["score", teacher, "--data", text, *DATA, "--tokens", "1024", "--output", stats]) == 0
    assert cli.main(["plan", stats, "--expert-width", "16", "--output", plan]) == 0
    capsys.readouterr()
    assert cli.main(["plan", "show", plan, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["criterion"] == "taylor" and shown["after"]["expert_width"] == 16 and shown["loss"] == "kd_topk"
    assert cli.main(["plan", "show", plan, plan]) == 0
    assert "the same decision" in capsys.readouterr().out

    from slimmoe_hf import CompressionPlan, apply_plan

    apply_plan(AutoModelForCausalLM.from_pretrained(teacher), CompressionPlan.load(plan)).save_pretrained(slim)
    tiny_tokenizer().save_pretrained(slim)
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
    true = pipeline.TrainingProgress.on_step_end

    def dying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        true(self, args, state, control, **kwargs)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.TrainingProgress.on_step_end = dying  # type: ignore[method-assign]
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
        (["slim"], "invalid choice: 'slim'"),
        (["score"], "score needs model, data, output (see slimmoe score --help)"),
        (["score", "m", "--los", "lm"], "unrecognized arguments: --los"),
        (["score", "m", "--data", "d", "--output", "o", "--loss", "ml"], "--loss ml: unknown; use one of lm, kd_topk."),
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


def test_debug_shows_the_traceback(tmp_path: Path):
    with pytest.raises(ValueError, match="no such recipe"):
        cli.main(["run", str(tmp_path / "nowhere.yaml"), "--debug"])


Values = dict[str, Any]


def target(**sizes: int) -> Callable[[Path, Values], None]:
    """Set the last stage's target."""

    def spoil(home: Path, recipe: Values) -> None:
        recipe["stages"][-1]["target"] = sizes

    return spoil


def misspelt(home: Path, recipe: Values) -> None:
    recipe["stages"][0]["critreion"] = "taylor"


def not_a_number(home: Path, recipe: Values) -> None:
    recipe["stages"][1]["distillation"]["learning_rate"] = "fast"


def dense(home: Path, recipe: Values) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=320
    )
    LlamaForCausalLM(config).save_pretrained(home / "teacher")


def truncated(home: Path, recipe: Values) -> None:
    file = home / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def beheaded(home: Path, recipe: Values) -> None:
    (home / "teacher" / "model.safetensors").write_bytes(b"\x00" * 7)


def sharded(home: Path) -> list[Path]:
    (home / "teacher" / "model.safetensors").unlink()
    tiny_model("phimoe").save_pretrained(home / "teacher", max_shard_size="100KB")
    return sorted((home / "teacher").glob("*.safetensors"))


def shard_missing(home: Path, recipe: Values) -> None:
    sharded(home)[-1].unlink()


def shard_outside(home: Path, recipe: Values) -> None:
    sharded(home)
    index = home / "teacher" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))


def not_finite(home: Path, recipe: Values) -> None:
    file = home / "teacher" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"][3, 5] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})


def tensor_missing(home: Path, recipe: Values) -> None:
    file = home / "teacher" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.block_sparse_moe.gate.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def pickled(home: Path, recipe: Values) -> None:
    (home / "teacher" / "model.safetensors").rename(home / "teacher" / "pytorch_model.bin")


def broken_config(home: Path, recipe: Values) -> None:
    (home / "teacher" / "config.json").write_text('{"model_type": "phimoe", ')


def wrong_config(home: Path, recipe: Values) -> None:
    config = json.loads((home / "teacher" / "config.json").read_text())
    (home / "teacher" / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))


def no_tokenizer(home: Path, recipe: Values) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (home / "teacher" / name).unlink()


def empty_data(home: Path, recipe: Values) -> None:
    (home / "text.jsonl").write_text("")


def short_data(home: Path, recipe: Values) -> None:
    recipe["data"]["max_length"] = 100_000


def greedy_calibration(home: Path, recipe: Values) -> None:
    recipe["stages"][0]["calibration"]["tokens"] = 10_000_000


def large_tokenizer(home: Path, recipe: Values) -> None:
    tokenizer = tiny_tokenizer().__class__.from_pretrained(home / "teacher")
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(home / "teacher")


def other_teacher(home: Path, recipe: Values) -> None:
    save_tiny(home / "other", vocab_size=256)
    recipe["teacher"] = str(home / "other")


def renamed_tokens(home: Path, recipe: Values) -> None:
    save_tiny(home / "other")
    file = home / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(content))
    recipe["teacher"] = str(home / "other")


def no_room(home: Path, recipe: Values) -> None:
    recipe["stages"][0]["distillation"]["per_device_train_batch_size"] = 10**9


BAD_RECIPES: list[tuple[Callable[[Path, Values], None], str]] = [
    (misspelt, "recipe.yaml: stages.0.critreion: unknown key; did you mean criterion?"),
    (not_a_number, "stages.1.distillation: learning_rate='fast' is not a number"),
    (target(expert_width=24), "stages.1.target: expert_width=24 is not between 8 and the model's width of 16"),
    (target(expert_width=0), "stages.1.target: expert_width=0 is not between 8 and"),
    (target(expert_width=12), "stages.1.target: expert_width=12 is not a multiple of 8"),
    (target(kv_groups=3), "stages.1.target: kv_groups=3 is not between 1 and the model's 2 key/value groups"),
    (target(), "stages.1.target: the target asks for nothing"),
    (dense, "model_type='llama' is not a Mixture-of-Experts family"),
    (truncated, "teacher/model.safetensors: truncated at "),
    (beheaded, "teacher/model.safetensors: truncated: 7 bytes"),
    (shard_missing, ".safetensors: missing, but the index says that it holds "),
    (shard_outside, "points outside the folder (../model-00001"),
    (not_finite, "model.layers.1.block_sparse_moe.experts.2.w2.weight holds 1 values that are not finite"),
    (tensor_missing, "model.layers.1.mlp.router.weight is not in the weight files"),
    (pickled, "no model.safetensors and no model.safetensors.index.json. Pickled weights are not read"),
    (broken_config, "teacher/config.json: not valid JSON"),
    (wrong_config, "teacher/config.json: Validation error for field 'hidden_size'"),
    (no_tokenizer, "teacher: no usable tokenizer"),
    (empty_data, "text.jsonl: the file is empty"),
    (short_data, "text.jsonl (validation): the data has"),
    (greedy_calibration, "calibration asks for 10000000 tokens, which is all the training data there is"),
    (large_tokenizer, "its tokenizer has 321 tokens, the model embeddings for 320"),
    (other_teacher, "the student has 320 ids, the teacher 256, and the tokenizer emits 320"),
    (renamed_tokens, "student and teacher do not share a vocabulary"),
    (no_room, "GB of memory"),
]


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
    shutil.copy(recipe, home / "locked" / "recipe.yaml")
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


def test_a_whole_process_prints_only_what_is_asked_for(home: Path):
    """As a user sees it: JSON alone on stdout, no warning of any library on stderr."""
    argv = ["eval", str(home / "teacher"), "--data", str(home / "text.jsonl"), *DATA, "--json"]
    code = "import sys; from slimmoe_hf.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total_parameters"] > 0
    assert not any(word in done.stderr for word in ("Warning", "Error", "it/s"))
