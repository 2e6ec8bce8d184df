"""Publishing: what leaves the machine is whole, the same as here, and nothing private; errors are one line each."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_client import READER, TOKEN, environment, serving, use_here
from hub_server import metadata_errors
from huggingface_hub import parse_eval_result_entries
from peft import LoraConfig, get_peft_model
from recipes import tiny_recipe
from tiny import save_tiny, tiny_batch, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from slimmoe_hf import cli, commands, plots
from slimmoe_hf.card import MARK, images_of
from slimmoe_hf.hub import complete_folder
from slimmoe_hf.pipeline import run_recipe
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.recipe import load_recipe
from slimmoe_hf.report import Report
from slimmoe_hf.upload import publishable

SECRET = "hf_SecretThatStandsInTheRecipeOfTheRun01"
EXPECTED = {
    "README.md", "LICENSE", "recipe.yaml", "report.json", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    *(f"plans/stage-{n}/plan.{kind}" for n in (1, 2) for kind in ("json", "safetensors")),
    *(f"images/{name}.png" for name in ("kept", "scores", "router_load", "losses", "quality_size")),
}  # fmt: skip
# Loads by id with nothing of ours, says what it computes, and runs the code of the card that came along.
RELOAD = """
import sys, torch, contextlib, io
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoModelForCausalLM
name, ids, out = sys.argv[1], torch.load(sys.argv[2]), sys.argv[3]
model, info = AutoModelForCausalLM.from_pretrained(name, dtype="auto", output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    torch.save(model.eval()(ids).logits, out)
assert model.config.use_cache is True
card = open(hf_hub_download(name, "README.md")).read()
if "```python" in card:
    exec(card.split("```python\\n")[1].split("```")[0])
assert not any(module.startswith("slimmoe") for module in sys.modules)
"""


@pytest.fixture(autouse=True)
def as_loud_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` silences this whole process, which other tests listen to."""
    monkeypatch.setattr(commands, "be_quiet", lambda: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose original model has a card and a licence, and whose recipe holds a secret."""
    folder = tmp_path_factory.mktemp("made")
    recipe = tiny_recipe(folder)
    (folder / "teacher" / "README.md").write_text(
        "---\nlicense: mit\nlanguage: en\nmodel_name: tiny-base\n---\n# Tiny\n"
    )
    (folder / "teacher" / "LICENSE").write_text("Do as you like.\n")
    recipe["stages"][0]["distillation"] |= {"hub_token": SECRET}
    for stage in recipe["stages"]:
        stage["distillation"] |= {"max_steps": 2, "logging_steps": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(folder / "recipe.yaml")
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, whose pictures need not be drawn again: that takes longer than all else here."""
    shutil.copytree(made, tmp_path / "my-run")
    monkeypatch.setattr(plots, "png", lambda picture: (made / "model" / "images" / f"{picture.name}.png").read_bytes())
    return tmp_path / "my-run"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    root = tmp_path_factory.mktemp("hub")
    with serving(root, users=True) as endpoint:
        yield root, endpoint


@pytest.fixture
def hub(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a Hub that this process talks to, empty."""
    root, endpoint = served
    for entry in root.iterdir():
        if entry.name != "users.json":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    use_here(monkeypatch, endpoint, tmp_path / "home")
    return root


@pytest.fixture
def pushed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `slimmoe push` here; what it printed. No token may be in that, whatever happens."""

    def push(*argv: object, code: int = 0) -> str:
        capsys.readouterr()  # of what was built for it
        returned = cli.main(["push", *map(str, argv)])
        said = capsys.readouterr()
        assert returned == code, said.err
        assert TOKEN not in said.out + said.err and READER not in said.out + said.err
        lines = [line for line in said.err.splitlines() if line]
        assert len(lines) == (1 if code else 0), said.err
        return lines[0] if code else said.out

    return push


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".gitattributes"]
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def commits(root: Path) -> list[str]:
    return (root / "commits.log").read_text().splitlines() if (root / "commits.log").exists() else []


def refuse_private(folder: Path, *places: Path) -> None:
    """No published byte may name a place on this machine, or a secret."""
    words = [SECRET, TOKEN, str(Path.home()) + "/", "/home/", "/tmp/", *map(str, places)]
    for file in folder.rglob("*"):
        if file.is_file():
            found = [word for word in words if word.encode() in file.read_bytes()]
            assert not found, f"{file.relative_to(folder)} holds {found}"


def test_the_folder_of_a_run_is_complete_holds_nothing_private_and_is_the_same_again(run: Path):
    weights = digests(run / "model")["model.safetensors"]
    complete_folder(run)
    once = digests(run / "model")
    assert set(once) == EXPECTED and once["model.safetensors"] == weights
    refuse_private(run / "model", run, run.parent)
    complete_folder(run)
    assert digests(run / "model") == once
    text = (run / "model" / "README.md").read_text()
    assert list(metadata_errors(text)) == []
    assert {f"images/{name}.png" for name in ("kept", "losses", "router_load")} <= set(images_of(text)) <= set(once)
    assert [line for line in text.splitlines() if line.startswith("![") and line.startswith("![]")] == []


def test_what_is_published_of_a_run_can_be_read_again(run: Path, made: Path):
    complete_folder(run, repo="me/small", base_model="someone/large", license="apache-2.0")
    model = run / "model"
    recipe = load_recipe(model / "recipe.yaml")
    assert (recipe.model, recipe.data.source, recipe.output) == ("someone/large", "text.jsonl", None)
    assert "hub_token" not in recipe.stages[0].distillation and recipe.stages[0].distillation["max_steps"] == 2
    for number in (1, 2):
        published, original = (
            CompressionPlan.load(p) for p in (model / f"plans/stage-{number}", run / f"stage-{number}/plan")
        )
        assert published.sha256 == original.sha256
    report, own = Report.load(model / "report.json"), Report.load(run / "report.json")
    assert [m.loss for m in report.models] == [m.loss for m in own.models]
    assert report.models[0].path == "someone/large" and report.models[-1].path == "."
    data = yaml.safe_load((model / "README.md").read_text().split("---\n")[1])
    assert data["base_model"] == "someone/large" and data["base_model_relation"] == "finetune"
    assert data["license"] == "apache-2.0" and data["language"] == ["en"]
    values = {metric["type"]: metric["value"] for metric in data["model-index"][0]["results"][0]["metrics"]}
    assert values["loss"] == round(own.models[-1].loss, 4) and values["bits_per_byte"] == round(
        own.models[-1].bits_per_byte, 4
    )


def test_the_card_of_a_run_says_what_the_run_found_and_what_it_did_not(run: Path):
    complete_folder(run, repo="me/small")
    text, report = (run / "model" / "README.md").read_text(), Report.load(run / "report.json")
    assert "# small" in text and 'name = "me/small"' in text and "tiny-base" in text
    for model in report.models:
        assert f"| {model.total_parameters:,} |" in text and f"| {model.loss:.4f} |" in text
    assert (
        "| neurons per expert | 32 → 16 | 16 → 8 |" in text and "| key/value groups | 2 (as they are) | 2 → 1 |" in text
    )
    assert "mit, carried over from the card of `tiny-base`" in text and "2506.18349" in text
    assert "No benchmark was run on it" in text and "Bias, safety and truthfulness were not evaluated" in text
    assert "the config allows 256, which was not tried" in text and "- this model: *…" in text


def test_results_of_tasks_go_onto_the_card_and_into_files_that_the_hub_reads(run: Path):
    report = json.loads((run / "report.json").read_text())
    task = {"task": "arc_easy", "metric": "acc", "value": 0.5, "stderr": 0.01, "dataset": "allenai/ai2_arc"}
    part, local = {**task, "metric": "acc_norm", "limit": 10}, {**task, "task": "mine", "dataset": None}
    report["models"][0]["tasks"] = [{**task, "value": 0.75}]
    report["models"][-1]["tasks"] = [task, part, local]
    (run / "report.json").write_text(json.dumps(report))
    complete_folder(run)
    files = list((run / "model" / ".eval_results").iterdir())
    assert [file.name for file in files] == ["arc_easy-acc.yaml"], (
        "part of a benchmark is not it, and a local task is none"
    )
    entries = parse_eval_result_entries(yaml.safe_load(files[0].read_text()))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("allenai/ai2_arc", "arc_easy", 0.5)
    ]
    text = (run / "model" / "README.md").read_text()
    assert "| arc_easy | acc | 0 | 0.7500 ± 0.0100 | 0.5000 ± 0.0100 |" in text and "No benchmark was run" not in text
    assert "| arc_easy (first 10 questions only) | acc_norm | 0 | - | 0.5000 ± 0.0100 |" in text
    assert list(metadata_errors(text)) == [] and ".eval_results/arc_easy-acc.yaml" in publishable(run / "model")


def test_a_collapsed_router_stands_among_the_limits(run: Path):
    report = json.loads((run / "report.json").read_text())
    report["models"][-1] |= {"router_layers": [0, 1], "router_load": [[1.0, 1.0, 1.0, 1.0], [0.02, 1.5, 1.48, 1.0]]}
    (run / "report.json").write_text(json.dumps(report))
    complete_folder(run)
    text = (run / "model" / "README.md").read_text()
    assert "on the held-out text, expert 0 of layer 1 got less than 10% of an even load" in text


def test_a_card_that_a_person_wrote_is_left_alone(run: Path, hub: Path, pushed: Callable[..., str]):
    complete_folder(run)
    own = (run / "model" / "README.md").read_text().replace(MARK, "").replace("## Limits", "## My words")
    (run / "model" / "README.md").write_text(own)
    pushed(run, "me/small")
    assert (hub / "me" / "small" / "README.md").read_text() == own


def test_a_push_is_one_commit_that_arrives_as_it_left_and_a_second_has_nothing_to_do(
    run: Path, hub: Path, pushed: Callable[..., str]
):
    said = pushed(run, "me/small", "--private", "--message", "first words")
    assert f"/me/small: {len(EXPECTED)} files, verified" in said
    assert digests(hub / "me" / "small") == digests(run / "model") and set(digests(run / "model")) == EXPECTED
    assert len(commits(hub)) == 1 and "first words" in commits(hub)[0]
    assert json.loads((hub / ".hub" / "about" / "me" / "small.json").read_text()) == {"private": True}
    assert "exactly these files already; nothing to do" in pushed(run, "me/small")
    assert len(commits(hub)) == 1
    refuse_private(hub, run)


def test_the_model_of_a_run_is_pushed_with_the_card_of_the_run(run: Path, hub: Path, pushed: Callable[..., str]):
    pushed(run, "me/small")
    assert "nothing to do" in pushed(run / "model", "me/small")
    shutil.copytree(run / "model", run.parent / "elsewhere")
    pushed(run.parent / "elsewhere", "me/other", "--license", "apache-2.0")
    text = (hub / "me" / "other" / "README.md").read_text()
    assert "## How it was made" in text and "license: apache-2.0" in text


def test_other_files_are_only_replaced_when_asked_and_then_all_at_once(
    run: Path, hub: Path, pushed: Callable[..., str]
):
    theirs = hub / "me" / "small"
    save_tiny(theirs, "mixtral")
    (theirs / "model.safetensors").rename(theirs / "model-00001-of-00002.safetensors")
    before = digests(theirs)
    line = pushed(run, "me/small", code=2)
    assert "is there already and holds other files" in line and "--overwrite" in line
    assert digests(theirs) == before
    pushed(run, "me/small", "--overwrite")
    assert digests(theirs) == digests(run / "model"), "a stale shard would be loaded with the new ones"
    assert len(commits(hub)) == 1


def test_a_branch_holds_the_model_only_and_main_stays_what_it_was(run: Path, hub: Path, pushed: Callable[..., str]):
    save_tiny(hub / "me" / "small", "mixtral")
    before = digests(hub / "me" / "small")
    assert "/me/small/tree/v2: " in pushed(run, "me/small", "--branch", "v2")
    assert digests(hub / "me" / "small") == before
    assert digests(hub / ".hub" / "branches" / "me" / "small" / "v2") == digests(run / "model")
    assert "nothing to do" in pushed(run, "me/small", "--branch", "v2")


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "wrong token": ({"token": "hf_wrong"}, "does not know this access token"),
    "no token": ({"token": None}, "no access token"),
    "reader": ({"token": READER}, "the Hub refused (You don't have the rights"),
    "not mine": ({"repo": "others/small"}, "Use a token that may write to others"),
    "no network": ({"endpoint": "http://127.0.0.1:9"}, "could not be reached"),
    "offline": ({"offline": True}, "HF_HUB_OFFLINE is set"),
    "bad name": ({"repo": "me/small model"}, "me/small model: not a name that the Hub takes"),
    "no owner": ({"repo": "small"}, "say whose it is to be: owner/small"),
    "full": ({"file": "full"}, "the Hub refused (Private repository storage limit reached)"),
    "public": ({"exists": True, "more": ["--private"]}, "is there already, and public"),
    "licence": ({"more": ["--license", "My Own"]}, "license 'My Own': not an id"),
    "base": ({"more": ["--base-model", "/tmp"]}, "base model '/tmp': not an id on the Hub"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_line_with_the_remedy(
    fault: str,
    made: Path,
    hub: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pushed: Callable[..., str],
    served,
):
    given, says = FAULTS[fault]
    use_here(monkeypatch, given.get("endpoint", served[1]), tmp_path / "home", given.get("token", TOKEN))
    if given.get("offline"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if "file" in given:
        (hub / given["file"]).touch()
    if given.get("exists"):
        save_tiny(hub / "me" / "small", "mixtral")
    line = pushed(made / "model", given.get("repo", "me/small"), *given.get("more", []), code=2)
    assert line.startswith("error: ") and says in line, line
    assert commits(hub) == []


def test_what_arrives_differently_is_noticed(made: Path, hub: Path, pushed: Callable[..., str]):
    (hub / "corrupt").touch()
    line = pushed(made, "me/small", code=2)
    assert "images/kept.png arrived differently from what is here" in line


@pytest.mark.parametrize("place", ["nowhere", "empty", "unfinished", "other weights"])
def test_what_is_no_model_is_refused_before_anybody_is_asked(
    place: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pushed: Callable[..., str]
):
    use_here(monkeypatch, "http://127.0.0.1:9", tmp_path / "home")
    (tmp_path / "empty").mkdir()
    if place == "unfinished":
        (run / "report.json").unlink()
    if place == "other weights":
        shutil.copyfile(run / "stage-1" / "model" / "model.safetensors", run / "model" / "model.safetensors")
    folder = {"nowhere": tmp_path / "nowhere", "empty": tmp_path / "empty"}.get(place, run)
    says = {"nowhere": "no such folder", "empty": "holds no model", "unfinished": "is not finished",
            "other weights": "not the weights that report.json was measured on"}  # fmt: skip
    assert says[place] in pushed(folder, "me/small", code=2)


def test_a_dry_run_asks_nobody_and_writes_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pushed: Callable[..., str]
):
    (run / "model" / "README.md").unlink()
    use_here(monkeypatch, "http://127.0.0.1:9", tmp_path / "home", token=None)
    before = digests(run)
    said = pushed(run, "me/small", "--dry-run", "--private")
    assert digests(run) == before
    assert {line.split()[1] for line in said.splitlines()[: len(EXPECTED)]} == EXPECTED
    assert f"in {len(EXPECTED)} files for me/small (private if it is new); nothing was pushed" in said


def leftovers(folder: Path) -> Path:
    """A model's folder as a Trainer leaves it."""
    save_tiny(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_cache": False, "_name_or_path": "/data/me/base"}))
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "trainer_state.json",
        "checkpoint-2/model.safetensors",
        "notes.txt",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"pickle")
    (folder / "README.md").write_text("---\ntags:\n- generated_from_trainer\n---\n# automatic\n")
    return folder


def test_of_a_trainers_folder_the_model_goes_and_its_leftovers_stay(
    tmp_path: Path, hub: Path, pushed: Callable[..., str]
):
    folder = leftovers(tmp_path / "out")
    before = digests(folder)
    pushed(folder, "me/small", "--base-model", "someone/large", "--license", "mit")
    assert digests(folder) == before, "the folder of a user is only read"
    there = digests(hub / "me" / "small")
    assert set(there) == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                          "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    config = json.loads((hub / "me" / "small" / "config.json").read_text())
    assert (
        config["use_cache"] is True
        and "_name_or_path" not in config
        and config["architectures"] == ["PhiMoEForCausalLM"]
    )
    text = (hub / "me" / "small" / "README.md").read_text()
    assert MARK in text and "base_model: someone/large" in text and "license: mit" in text
    assert "nothing to do" in pushed(folder, "me/small", "--base-model", "someone/large", "--license", "mit")


def test_a_users_own_card_goes_with_its_pictures_and_takes_no_orders(
    tmp_path: Path, hub: Path, pushed: Callable[..., str]
):
    folder = leftovers(tmp_path / "out")
    (folder / "art").mkdir()
    (folder / "art" / "cat.jpg").write_bytes(b"cat")
    (folder / "README.md").write_text("# Mine\n\n![cat](art/cat.jpg)\n")
    pushed(folder, "me/small")
    assert (hub / "me" / "small" / "README.md").read_text().startswith("# Mine")
    assert (hub / "me" / "small" / "art" / "cat.jpg").read_bytes() == b"cat"
    assert "is your own card and stays as it is" in pushed(folder, "me/other", "--license", "mit", code=2)
    (folder / "art" / "cat.jpg").unlink()
    assert "shows art/cat.jpg, which is not in the folder" in pushed(folder, "me/other", code=2)


def test_a_token_in_a_file_stops_the_push(tmp_path: Path, hub: Path, pushed: Callable[..., str]):
    folder = leftovers(tmp_path / "out")
    (folder / "README.md").write_text(f"# Mine\n\nHF_TOKEN={SECRET}\n")
    line = pushed(folder, "me/small", code=2)
    assert "README.md: holds an access token" in line and SECRET not in line
    assert not (hub / "me").exists()


def test_an_adapter_names_its_model_as_others_know_it(tmp_path: Path, hub: Path, pushed: Callable[..., str]):
    save_tiny(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    line = pushed(tmp_path / "adapter", "me/adapter", code=2)
    assert "--base-model" in line and str(tmp_path) not in line.replace(str(tmp_path / "adapter"), "")
    pushed(tmp_path / "adapter", "me/adapter", "--base-model", "someone/base")
    there = hub / "me" / "adapter"
    assert set(digests(there)) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((there / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/base"
    data = yaml.safe_load((there / "README.md").read_text().split("---\n")[1])
    assert (data["base_model_relation"], data["library_name"]) == ("adapter", "peft")
    refuse_private(there, tmp_path)


def test_weights_without_the_biases_that_engines_want_still_load(tmp_path: Path, hub: Path, pushed: Callable[..., str]):
    save_tiny(tmp_path / "plain", attention_bias=False, lm_head_bias=False)
    pushed(tmp_path / "plain", "me/plain")
    _, info = AutoModelForCausalLM.from_pretrained(hub / "me" / "plain", output_loading_info=True)
    assert not any(info.values()), info


def test_only_shards_that_the_index_names_are_weights(tmp_path: Path):
    tiny_model("phimoe").save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "stats.safetensors").write_bytes(b"not weights")
    names = set(publishable(tmp_path))
    assert "stats.safetensors" not in names and "model.safetensors.index.json" in names
    assert len([name for name in names if name.startswith("model-")]) > 2
    (tmp_path / min(name for name in names if name.startswith("model-"))).unlink()
    with pytest.raises(ValueError, match="missing, but the index says"):
        publishable(tmp_path)


def reloaded(endpoint: str, home: Path, repo: str, folder: Path, code: str = RELOAD) -> torch.Tensor:
    """What a fresh process with a fresh cache computes with a repository, by plain transformers."""
    folder.mkdir(exist_ok=True)
    torch.save(tiny_batch()["input_ids"], folder / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", code, repo, str(folder / "ids.pt"), str(folder / "logits.pt")],
        env=environment(endpoint, home, TOKEN), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return torch.load(folder / "logits.pt")


@torch.no_grad()
def test_what_was_pushed_loads_by_its_id_bit_for_bit(run: Path, hub: Path, tmp_path: Path, pushed: Callable[..., str]):
    pushed(run, "me/small")
    loaded, local = (
        AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval() for name in ("me/small", run / "model")
    )
    assert loaded.config._name_or_path == "me/small"
    assert torch.equal(loaded(**tiny_batch()).logits, local(**tiny_batch()).logits)


@pytest.mark.slow  # a whole process
@torch.no_grad()
def test_a_fresh_process_loads_what_was_pushed_by_its_id_bit_for_bit_and_runs_its_card(
    run: Path, hub: Path, served: tuple[Path, str], tmp_path: Path, pushed: Callable[..., str]
):
    pushed(run, "me/small")
    logits = reloaded(served[1], tmp_path / "fresh", "me/small", tmp_path / "out")
    local = AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto").eval()
    assert torch.equal(logits, local(tiny_batch()["input_ids"]).logits)
    for place in (hub, tmp_path / "fresh", tmp_path / "home", run):
        for file in place.rglob("*") if place.exists() else []:
            assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


PUSH = "import sys; from slimmoe_hf.cli import main; sys.exit(main(['push', *sys.argv[1:]]))"


@pytest.mark.slow  # two whole processes, one of them killed
def test_killed_while_it_uploads_nothing_is_there_and_the_same_command_finishes(
    run: Path, hub: Path, served: tuple[Path, str], tmp_path: Path
):
    own = environment(served[1], tmp_path / "home", TOKEN)
    command = [sys.executable, "-c", PUSH, str(run), "me/small"]
    (hub / "stall").write_text("1000")
    first = subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (hub / "stalled").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    first.kill()
    first.communicate()
    (hub / "stall").unlink()
    assert digests(hub / "me" / "small") == {}, "before the commit there is nothing to be seen"
    again = subprocess.run(command, env=own, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert digests(hub / "me" / "small") == digests(run / "model") and len(commits(hub)) == 1
    assert TOKEN not in again.stdout + again.stderr


# config.json of microsoft/Phi-tiny-MoE-instruct, but for its number of layers.
PHI_TINY: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 448, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "num_local_experts": 16, "num_experts_per_tok": 2, "vocab_size": 32064,
    "attention_bias": True, "lm_head_bias": True, "max_position_embeddings": 4096, "sliding_window": 2047,
    "rope_scaling": None, "rope_theta": 10000.0, "router_jitter_noise": 0.01, "input_jitter_noise": 0.01,
    "router_aux_loss_coef": 0.0, "bos_token_id": 1, "eos_token_id": 32000, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.slow  # about a gigabyte of weights is made, sent and fetched
@torch.no_grad()
def test_a_model_of_phi_tinys_real_shape_arrives_and_loads_bit_for_bit(
    hub: Path, served: tuple[Path, str], tmp_path: Path, pushed: Callable[..., str]
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phimoe", **PHI_TINY), dtype=torch.bfloat16).eval()
    expected = model(tiny_batch()["input_ids"]).logits
    model.save_pretrained(tmp_path / "tiny", max_shard_size="300MB")
    del model
    pushed(tmp_path / "tiny", "me/phi-tiny", "--base-model", "microsoft/Phi-tiny-MoE-instruct", "--license", "mit")
    there = digests(hub / "me" / "phi-tiny")
    shards = {name: digest for name, digest in digests(tmp_path / "tiny").items() if name.endswith(".safetensors")}
    assert len(shards) > 2 and shards.items() <= there.items()
    config = json.loads((hub / "me" / "phi-tiny" / "config.json").read_text())
    sizes = {key: value for key, value in PHI_TINY.items() if isinstance(value, int) and not isinstance(value, bool)}
    assert sizes == {key: config[key] for key in sizes} and config["architectures"] == ["PhiMoEForCausalLM"]
    without_card = RELOAD.replace('if "```python" in card:', "if False:")  # it has no tokenizer of Phi's size
    logits = reloaded(served[1], tmp_path / "fresh", "me/phi-tiny", tmp_path / "out", without_card)
    assert torch.equal(logits, expected)
