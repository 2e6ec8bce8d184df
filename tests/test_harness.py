"""Benchmark tasks: the harness's numbers equal a recomputation by hand, groups come whole, faults are one line."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich
import torch
import yaml
from recipes import tiny_recipe
from tiny import documents, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimmoe_hf import cli, commands, eval_command, harness
from slimmoe_hf.evaluation import measure_loss
from slimmoe_hf.harness import SPELLINGS, TaskResult, load_tasks, run_tasks
from slimmoe_hf.loading import load_model
from slimmoe_hf.pipeline import run_recipe
from slimmoe_hf.report import Report, readme, table

TASKS = Path(__file__).parent / "tasks"
ROOT = Path(__file__).parents[1]
OWN = ["--task-path", str(TASKS)]


@pytest.fixture(autouse=True)
def as_loud_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` silences this whole process, which other tests listen to."""
    monkeypatch.setattr(commands, "be_quiet", lambda: None)


@pytest.fixture
def few_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own 14,000 tasks take seconds to read."""
    monkeypatch.setattr(harness, "_built_in", dict)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("harness") / "model", max_position_embeddings=128)


@pytest.fixture
def finished(whole_run: Path, tmp_path: Path) -> Path:
    """A finished run of two stages."""
    ignored = shutil.ignore_patterns("checkpoints")
    return Path(shutil.copytree(whole_run / "run", tmp_path / "finished", ignore=ignored))


def by_metric(results: list[TaskResult], task: str) -> dict[str, TaskResult]:
    return {result.metric: result for result in results if result.task == task}


def scores_by_hand(checkpoint: Path, examples: int = 0) -> dict[str, float]:
    """Accuracies by plain transformers: the log-likelihood of every choice, one at a time, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, experts_implementation="eager").eval()
    right = {"acc": 0, "acc_norm": 0}
    rows = json.loads((TASKS / "tiny_choice.json").read_text())
    for row in rows:
        likelihoods = []
        for choice in row["choices"]:
            context = tokenizer(row["context"])["input_ids"]
            whole = tokenizer(row["context"] + " " + choice)["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            likelihoods.append(sum(logits[at - 1, whole[at]].item() for at in range(len(context), len(whole))))
        per_character = [value / len(choice) for value, choice in zip(likelihoods, row["choices"], strict=True)]
        right["acc"] += max(range(3), key=likelihoods.__getitem__) == row["answer"]
        right["acc_norm"] += max(range(3), key=per_character.__getitem__) == row["answer"]
    return {name: number / len(rows) for name, number in right.items()}


def test_accuracy_equals_a_recomputation_by_plain_transformers(checkpoint: Path):
    found = by_metric(run_tasks(checkpoint, ["tiny_choice"], TASKS, batch_size=3), "tiny_choice")
    by_hand = scores_by_hand(checkpoint)
    assert {name: result.value for name, result in found.items()} == pytest.approx(by_hand)
    for name, result in found.items():  # the standard error of a share: 40 questions, Bessel's correction
        assert result.stderr == pytest.approx(math.sqrt(by_hand[name] * (1 - by_hand[name]) / 39), rel=1e-6)
        assert result.samples == 40 and result.num_fewshot == 0 and result.version == "2.0"
        assert result.higher_is_better is True and result.limit is None and result.dataset is None


def test_rolling_perplexity_is_our_loss_under_the_same_windows(tmp_path: Path):
    """The harness's windows: one token of context, then as many predicted as the model has positions."""
    window = 32
    checkpoint = save_tiny(tmp_path / "model", max_position_embeddings=window)
    tokenizer = tiny_tokenizer()
    rows, texts = [], []
    for document in documents():
        ids = tokenizer(document)["input_ids"][: 3 * window]
        text = tokenizer.decode(ids)
        if tokenizer(text)["input_ids"] == ids and len(texts) < 4:  # cut where the tokenizer cuts too
            stream = [tokenizer.bos_token_id, *ids]
            rows += [stream[at : at + window + 1] for at in range(0, 3 * window, window)]
            texts.append(text)
    (tmp_path / "tiny_text.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "tiny_text.yaml").write_text((TASKS / "tiny_text.yaml").read_text())
    (result,) = run_tasks(checkpoint, ["tiny_text"], tmp_path)
    loss = measure_loss(load_model(checkpoint), torch.tensor(rows), progress=False).loss
    nats, size = loss * len(rows) * window, sum(len(text.encode()) for text in texts)
    assert len(texts) == 4 and result.metric == "bits_per_byte" and result.higher_is_better is False
    assert result.value == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_prompts_with_examples_are_those_of_the_harness_itself(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = load_tasks(["tiny_choice"], TASKS, num_fewshot=2, limit=15)
    ours = by_metric(tasks.run(checkpoint), "tiny_choice")
    monkeypatch.chdir(TASKS)
    theirs = simple_evaluate(
        HFLM(pretrained=load_model(checkpoint), tokenizer=AutoTokenizer.from_pretrained(checkpoint), batch_size=8),
        tasks=["tiny_choice"], num_fewshot=2, limit=15,
        task_manager=TaskManager(include_path=TASKS, include_defaults=False),
    )["results"]["tiny_choice"]  # fmt: skip
    assert {name: result.value for name, result in ours.items()} == {
        "acc": theirs["acc,none"], "acc_norm": theirs["acc_norm,none"],
    }  # fmt: skip
    assert {(r.num_fewshot, r.limit, r.samples) for r in ours.values()} == {(2, 15, 15)}
    assert by_metric(tasks.run(checkpoint), "tiny_choice") == ours, "a set of tasks can be put again"


def test_a_group_is_followed_by_its_members(checkpoint: Path):
    found = run_tasks(checkpoint, ["tiny_group", "tiny_text"], TASKS, limit=8)
    assert [(result.task, result.group, result.metric) for result in found] == [
        ("tiny_group", None, "acc"), ("tiny_choice", "tiny_group", "acc"), ("tiny_choice", "tiny_group", "acc_norm"),
        ("tiny_twin", "tiny_group", "acc"), ("tiny_twin", "tiny_group", "acc_norm"), ("tiny_text", None, "bits_per_byte"),
    ]  # fmt: skip
    assert found[0].value == found[1].value == found[3].value and found[0].version == "3.0"


def test_data_of_a_task_is_found_beside_it_from_any_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert run_tasks(checkpoint, ["tiny_text"], TASKS, limit=1)[0].samples == 1
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_chioce", "tiny_chioce: no such task; did you mean tiny_choice, "),
        ("MMLU", "MMLU: no such task. "),
        ("tiny_hub", "task tiny_hub: its data cannot be had: Couldn't reach 'nobody/nothing' on the Hub"),
        ("tiny_lost", "task tiny_lost: its data cannot be had: Unable to find"),
        ("tiny_broken", "task tiny_broken: cannot be loaded: Got invalid output_type 'guessing'"),
        ("tiny_code", "task tiny_code: runs code that the model writes"),
    ],
)
def test_a_task_that_cannot_be_run_is_one_line(
    few_known: None, name: str, message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["eval", str(checkpoint), "--tasks", name, *OWN]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith(f"error: {message}") and not captured.out


def test_without_the_harness_the_remedy_is_one_line(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["eval", str(checkpoint), "--tasks", "mmlu"]) == 2
    assert capsys.readouterr().err == "error: tasks need lm-evaluation-harness: pip install 'slimmoe_hf[eval]'\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "eval needs --data, --tasks or both"),
        (["--data", "d", "--limit", "3"], "--limit says how --tasks are run: name some."),
        (["--tasks", "a", "--limit", "0"], "limit=0 should be 1 or more."),
        (["--tasks", "a", "--num-fewshot", "-1"], "num_fewshot=-1 should be 0 or more."),
        (["--tasks", "a", "--task-path", "nowhere"], "nowhere: no such folder of task YAML files."),
    ],
)
def test_bad_settings_are_one_line(argv: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["eval", str(checkpoint), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_tasks_need_no_text_and_their_results_can_go_to_a_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = [
        "eval",
        str(checkpoint),
        "--tasks",
        "tiny_choice",
        *OWN,
        "--limit",
        "5",
        "--output",
        str(tmp_path / "o.json"),
    ]
    capsys.readouterr()
    assert cli.main([*given, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "o.json").read_text())
    assert [result["metric"] for result in printed["tasks"]] == ["acc", "acc_norm"] and printed["teacher_tasks"] == []
    assert cli.main(given) == 2 and "o.json: is there already" in capsys.readouterr().err
    assert cli.main([*given, "--overwrite"]) == 0
    assert "tiny_choice (0-shot, first 5)" in capsys.readouterr().out


def evaluate_run(run: Path, *more: str) -> Report:
    assert cli.main(["eval", str(run), "--tasks", "tiny_choice", *OWN, *more]) == 0
    return Report.load(run / "report.json")


@pytest.mark.slow  # two runs of the harness over a whole run
def test_results_of_a_run_are_added_to_its_report_beside_those_of_its_teacher(whole_run: Path, finished: Path):
    before = Report.load(finished / "report.json")
    report = evaluate_run(finished)
    measured = {model.name: by_metric(model.tasks, "tiny_choice") for model in report.models}
    assert [len(found) for found in measured.values()] == [2, 0, 0, 0, 2]
    teacher = whole_run / "teacher"
    assert measured["teacher"] == by_metric(run_tasks(teacher, ["tiny_choice"], TASKS), "tiny_choice")
    assert [model.loss for model in report.models] == [model.loss for model in before.models]

    again = evaluate_run(finished)
    assert again == report, "results of the same question take the place of the earlier ones"
    more = evaluate_run(finished, "--limit", "7", "--num-fewshot", "1")
    assert [len(model.tasks) for model in more.models] == [4, 0, 0, 0, 4]
    assert [r.limit for r in more.models[-1].tasks] == [None, None, 7, 7]
    text = (finished / "README.md").read_text()
    assert "| tiny_choice (0-shot) | acc ↑ |" in text and "(1-shot, first 7)" in text
    assert text == readme(more, "finished/teacher").replace("finished/teacher", text.split("`")[1])
    published = Report.load(finished / "model" / "report.json")
    assert published.models[-1].tasks == more.models[-1].tasks, "what is published with the model knows them too"


def test_a_teacher_that_was_streamed_is_not_loaded_for_tasks(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    given: list[Path | None] = []

    def put(tasks: object, subject: Any, batch_size: int) -> dict[str, list[TaskResult]]:
        given.append(subject.teacher)
        return {"model": []}

    monkeypatch.setattr(eval_command, "load_tasks", lambda *_: object())
    monkeypatch.setattr(eval_command, "_put", put)
    monkeypatch.setattr(eval_command, "_add_to_report", lambda *_: None)
    rich.reconfigure(width=400)
    for streamed in (False, True):
        report = json.loads((finished / "report.json").read_text())
        report["models"][0]["streamed"] = streamed
        (finished / "report.json").write_text(json.dumps(report))
        assert cli.main(["eval", str(finished), "--tasks", "tiny_choice"]) == 0
    said = "".join(capsys.readouterr())
    assert said.count("the teacher was streamed: only the model is given the tasks; --teacher names it") == 1
    assert given[0] is not None and given[1] is None


def test_a_report_of_before_there_were_tasks_loads_and_shows_none(finished: Path, tmp_path: Path):
    values = json.loads((finished / "report.json").read_text())
    new = (
        "tasks",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "peak_memory",
        "router_layers",
        "router_load",
    )
    for model in values["models"]:
        for name in new:
            model.pop(name)
    (tmp_path / "report.json").write_text(json.dumps(values))
    report = Report.load(tmp_path / "report.json")
    assert report.models[-1].tasks == [] and report.models[-1].peak_memory is None
    assert len(table(report).renderables) == 1


def test_a_run_whose_model_is_another_one_is_refused(finished: Path, tmp_path: Path, capsys: Any):
    run = tmp_path / "run"
    run.mkdir()
    save_tiny(run / "model", seed=3)
    (run / "report.json").write_text((finished / "report.json").read_text())
    assert cli.main(["eval", str(run), "--tasks", "tiny_choice", *OWN]) == 2
    assert "model: not the weights that" in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_said_to_be_so(tmp_path: Path, capsys: Any):
    for name in ("recipe.yaml", "steps.json"):
        (tmp_path / name).write_text("{}")
    assert cli.main(["eval", str(tmp_path), "--tasks", "tiny_choice", *OWN]) == 2
    assert "a run that is not finished. slimmoe run" in capsys.readouterr().err


def test_a_commit_is_read_off_the_files_that_were_downloaded():
    """As `datasets` records them; no network here to see it for real."""
    commit = "3de24cf8022e94f38a4b6efb94b2bd3ef1cc7c8d"

    info = SimpleNamespace(download_checksums={f"hf://datasets/aps/super_glue@{commit}/boolq/train.parquet": {}})
    config = SimpleNamespace(dataset_path="aps/super_glue", dataset_kwargs=None)
    task = SimpleNamespace(config=config, dataset={"train": SimpleNamespace(info=info)})
    assert harness._dataset(task) == ("aps/super_glue", commit)
    config.dataset_kwargs = {"revision": "main"}
    assert harness._dataset(task) == ("aps/super_glue", "main"), "what the task names wins"


@pytest.mark.slow  # reads the index of the harness's 14,000 tasks
def test_benchmarks_are_found_by_the_names_that_people_use():
    index = harness._built_in()
    assert set(SPELLINGS.values()) <= index.keys()
    manager = harness._manager(["GLUE"], None)
    found = {
        name: harness._known(name, manager, None) for name in ("GLUE", "SuperGLUE", "MMLU", "ARC", "ARC-Challenge")
    }
    assert found == {
        "GLUE": "glue", "SuperGLUE": "super-glue-lm-eval-v1", "MMLU": "mmlu", "ARC": "ai2_arc",
        "ARC-Challenge": "arc_challenge",
    }  # fmt: skip
    assert index["ai2_arc"].tags == {"arc_easy", "arc_challenge"} and {"cola", "rte", "sst2"} <= index["glue"].tags
    assert {"boolq", "copa", "record", "wsc"} <= index["super-glue-lm-eval-v1"].tags
    with pytest.raises(ValueError, match=r"arc_esay: no such task; did you mean .*arc_easy"):
        harness._known("arc_esay", manager, None)


@pytest.mark.slow  # hundreds of questions to a model of 6M parameters, in a process of its own
def test_the_teacher_beats_chance_on_the_tasks_that_ship():
    argv = ["eval", "examples/teacher/model", "--tasks", "sotu_ending", "sotu_text", "--task-path", "examples/tasks"]
    code = "import sys; from slimmoe_hf.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv, "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not done.stderr, done.stderr
    results = [TaskResult.model_validate(values) for values in json.loads(done.stdout)["tasks"]]
    accuracy, bits = by_metric(results, "sotu_ending")["acc"], by_metric(results, "sotu_text")["bits_per_byte"]
    assert accuracy.stderr is not None and accuracy.value - 5 * accuracy.stderr > 0.25, "chance, one of four"
    # The card's 1.2528 is over whole rows of 256 tokens; passages are shorter, so more of their tokens have less before them.
    assert 1.2528 < bits.value < 1.35


@pytest.mark.slow  # reads the text of all messages
def test_the_tasks_that_ship_are_what_their_script_makes(tmp_path: Path):
    script = ROOT / "examples" / "tasks" / "make_tasks.py"
    subprocess.run([sys.executable, script, "--output", tmp_path], check=True, capture_output=True)
    for made in tmp_path.glob("*.json"):
        assert made.read_text() == (script.parent / made.name).read_text(), made.name
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["sotu_ending", "sotu_text"]


def test_a_recipe_puts_teacher_and_last_model_to_its_tasks(no_pictures: None, tmp_path: Path):
    """Before any work, what is missing is found; after it, report, card and `slimmoe eval` agree."""
    values = tiny_recipe(tmp_path)
    values["stages"] = values["stages"][:1]
    values["stages"][0]["distillation"]["max_steps"] = 1
    values["evaluation"] |= {"tasks": ["tiny_lost"], "task_path": str(TASKS), "task_limit": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="task tiny_lost: its data cannot be had"):
        run_recipe(tmp_path / "recipe.yaml")
    assert not (tmp_path / "run").exists()

    values["evaluation"]["tasks"] = ["tiny_choice"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    report = run_recipe(tmp_path / "recipe.yaml")
    assert report is not None and report == Report.load(tmp_path / "run" / "report.json")
    teacher, slimmed, last = report.models
    assert not slimmed.tasks
    for model, path in ((teacher, tmp_path / "teacher"), (last, tmp_path / "run" / "model")):
        assert model.tasks == run_tasks(path, ["tiny_choice"], TASKS, limit=4)
        assert {result.metric for result in model.tasks} == {"acc", "acc_norm"}
    assert "tiny_choice" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_value_that_is_not_finite_is_no_result(checkpoint: Path, few_known: None, monkeypatch: pytest.MonkeyPatch):
    """A report that holds one could not be read again."""
    tasks = load_tasks(["tiny_choice"], TASKS, limit=4)
    found = {
        "results": {"tiny_choice": {"acc,none": math.nan, "acc_norm,none": 0.5}}, "n-shot": {}, "versions": {},
        "higher_is_better": {},
    }  # fmt: skip
    assert [result.metric for result in tasks._results("tiny_choice", None, found, {})] == ["acc_norm"]
