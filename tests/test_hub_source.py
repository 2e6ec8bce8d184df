"""Slimming by Hub id, over HTTP: shard by shard, at one commit, each downloaded once, deleted where that is asked for."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rich
from hub_client import environment, serving, use_here
from recipes import tiny_recipe, write_recipe
from streams import one_error, worst
from test_checkpoint import same_tensors, saved
from tiny import tiny_batch, tiny_model, write_text
from transformers import PreTrainedModel

from slimmoe_hf import cli, sources
from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.plan import CompressionPlan, Target, make_plan
from slimmoe_hf.preflight import check, outline, read_text
from slimmoe_hf.recipe import parse_recipe
from slimmoe_hf.stats import ExpertStats

SLIM = "import sys; from slimmoe_hf.cli import main; sys.exit(main())"
# Dies in the middle: as the fourth shard of the output is begun.
DYING = (
    "import os, sys; from slimmoe_hf import checkpoint; begin = checkpoint.ShardWriter.__init__\n"
    "def dying(self, path, tensors):\n"
    "    if len(list(path.parent.glob('*.safetensors'))) == 3: os.kill(os.getpid(), 9)\n"
    "    begin(self, path, tensors)\n"
    "checkpoint.ShardWriter.__init__ = dying\n"
    "from slimmoe_hf.cli import main; sys.exit(main())"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    root = tmp_path_factory.mktemp("hub")
    model = tiny_model("phimoe")
    saved(root / "someone" / "tiny-moe", model)
    stats = collect_stats(model, [tiny_batch()], progress=False)
    make_plan(stats, Target(expert_width=16, num_experts=2)).save(root / "plan")
    with serving(root) as endpoint:
        yield root, endpoint


@pytest.fixture
def slim(hub: tuple[Path, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `slimmoe slim` in a process that has this hub and an empty cache."""
    root, endpoint = hub
    (root / "requests.log").write_text("")
    own = environment(endpoint, tmp_path / "home")

    def run(
        *argv: str, code: str = SLIM, model: str = "someone/tiny-moe", **changed: str
    ) -> subprocess.CompletedProcess[str]:
        given = ["slim", model, "--plan", str(root / "plan"), "--output", str(tmp_path / "out"), "--shard-size", "9KB"]
        return subprocess.run(
            [sys.executable, "-c", code, *given, *argv],
            env=own | changed,
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run


def downloads(root: Path) -> Counter[str]:
    """How often each file of weights was fetched, its header alone not counted."""
    lines = [line.split() for line in (root / "requests.log").read_text().splitlines()]
    return Counter(name for name, span in lines if name.endswith(".safetensors") and not span.endswith("-100000"))


def weights_under(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*.safetensors") if file.stat().st_size > 0]


@pytest.mark.slow
def test_a_hub_model_is_slimmed_as_a_local_one_and_its_shards_stay_in_the_cache(hub, slim, tmp_path: Path):
    root, _ = hub
    done = slim()
    assert done.returncode == 0, done.stderr
    slim_checkpoint(root / "someone" / "tiny-moe", CompressionPlan.load(root / "plan"), tmp_path / "local")
    same_tensors(tmp_path / "out", tmp_path / "local")
    assert len(weights_under(tmp_path / "home")) == len(list((root / "someone" / "tiny-moe").glob("*.safetensors")))


@pytest.mark.slow
def test_killed_and_called_again_no_whole_shard_is_downloaded_twice_and_none_is_kept(hub, slim, tmp_path: Path):
    root, _ = hub
    died = slim("--delete-source-shards", code=DYING)
    assert died.returncode == -signal.SIGKILL, died.stderr
    everything = sorted(file.name for file in (root / "someone" / "tiny-moe").glob("*.safetensors"))
    assert 0 < len(downloads(root)) < len(everything)
    done = slim("--delete-source-shards")
    assert done.returncode == 0, done.stderr
    fetched = downloads(root)
    assert sorted(fetched) == everything
    assert fetched.total() <= len(everything) + 1, "more was fetched twice than the shard in hand at the kill"
    slim_checkpoint(root / "someone" / "tiny-moe", CompressionPlan.load(root / "plan"), tmp_path / "local")
    same_tensors(tmp_path / "out", tmp_path / "local")
    assert weights_under(tmp_path / "home") == []
    assert {file.parent for file in weights_under(tmp_path)} == {tmp_path / "out", tmp_path / "local"}


@pytest.mark.slow
def test_what_is_not_there_is_one_line_and_shards_of_a_folder_are_never_deleted(hub, slim, tmp_path: Path):
    root, _ = hub
    own = str(root / "someone" / "tiny-moe")
    expected = [
        (["someone/nowhere"], "error: someone/nowhere: no such folder here, and the Hub did not give it"),
        (["someone/nowhere", "--delete-source-shards"], "error: someone/nowhere: the Hub did not give it"),
        ([own, "--delete-source-shards"], f"error: {own}: is a folder of yours, and only downloads are deleted"),
    ]
    several = (
        "import sys; from slimmoe_hf.cli import main\n"
        f"codes = [main(['slim', *argv, *sys.argv[3:]]) for argv in {[argv for argv, _ in expected]}]\n"
        "sys.exit(0 if codes == [2, 2, 2] else 1)"
    )
    done = slim(code=several)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 0 and len(lines) == len(expected), done.stderr
    assert all(line.startswith(message) for line, (_, message) in zip(lines, expected, strict=True)), lines
    assert weights_under(root / "someone" / "tiny-moe") and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_size_and_a_dry_run_download_no_weights(hub, slim, tmp_path: Path):
    root, _ = hub
    recipe = write_recipe(tmp_path, {**tiny_recipe(tmp_path), "model": "someone/tiny-moe"})
    both = (
        "import sys; from slimmoe_hf.cli import main\n"
        "sys.exit(main(['size', 'someone/tiny-moe', '--json'])"
        f" or main(['run', {str(recipe)!r}, '--dry-run', '--output', {str(tmp_path / 'out')!r}]))"
    )
    done = slim(code=both)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout)["total_parameters"]
    assert counted == sum(parameter.numel() for parameter in tiny_model("phimoe").parameters())
    assert "from the Hub" in done.stderr and "Not looked at, because it is on the Hub: someone/tiny-moe" in done.stderr
    assert ".safetensors" not in (root / "requests.log").read_text().replace("model.safetensors.index", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_one_line(slim):
    done = slim("--delete-source-shards", HF_ENDPOINT="http://127.0.0.1:9")
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: someone/tiny-moe: the Hub did not give it")


def test_of_a_repository_that_has_a_single_file_too_the_shards_are_fetched_and_what_is_here_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    repository = saved(tmp_path / "hub" / "someone" / "both", tiny_model("phimoe"), shard="100KB")
    shards = sorted(file.name for file in repository.glob("*.safetensors"))
    shutil.copyfile(repository / shards[0], repository / "model.safetensors")
    (tmp_path / "teacher").mkdir()  # none is needed
    recipe = parse_recipe({**tiny_recipe(tmp_path), "model": "someone/both"}, "recipe")
    with serving(tmp_path / "hub") as endpoint:
        use_here(monkeypatch, endpoint, tmp_path / "home")
        source = sources.HubSource("someone/both", None)
        missing, whole = source.missing(), outline(recipe).download
        assert sorted(missing) == shards and sum(missing.values()) == whole
        source.fetch(shards[0])
        left = outline(recipe).download
        assert 0 < left <= whole - missing[shards[0]] and sorted(source.missing()) == shards[1:]
        sources.fetch_weights(source)
        assert outline(recipe).download == 0 and source.missing() == {}
    assert not (source.folder / "model.safetensors").exists()


@pytest.mark.slow  # a Hub of its own, and six sweeps
@pytest.mark.usefixtures("as_loud_as_before")
def test_a_hub_model_is_streamed_from_shards_that_come_once_one_by_one(
    hub: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Stopped while it downloads; a cache reads what the scores have read; `main` moves on, the old commit stays."""
    root, endpoint = hub
    saved(root / "someone" / "moving", tiny_model("phimoe"))
    use_here(monkeypatch, endpoint, tmp_path / "home")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    (root / "requests.log").write_text("")
    text = ["--data", str(write_text(tmp_path / "text.jsonl")), "--max-length", "64", "--tokens", "512", "--stream"]
    score = ["score", "someone/moving", *text, "--output", str(tmp_path / "stats.safetensors")]
    with monkeypatch.context() as patch:
        patch.setattr("slimmoe_hf.sources.psutil.disk_usage", lambda path: type("", (), {"free": 1000}))
        assert "someone/moving take 0.0 GB more there, and the disk has 0.0 GB free" in one_error(capsys, *score)
    assert not downloads(root)
    real = sources.hf_hub_download

    def third(name: str, file: str, **more: Any) -> str:
        if downloads(root).total() == 2:
            raise KeyboardInterrupt
        return real(name, file, **more)

    commit = sources.HubSource("someone/moving", None).revision
    with monkeypatch.context() as patch:
        patch.setattr(sources, "hf_hub_download", third)
        assert "interrupted; the same command continues" in one_error(capsys, *score, code=130)
    shards = sorted(file.name for file in (root / "someone" / "moving").glob("*.safetensors"))
    assert sorted(downloads(root)) == shards[:2], "in order, and nothing beside them"
    capsys.readouterr()
    rich.reconfigure(width=400)
    assert cli.main(score) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"someone/moving at {commit}: 0.00 GB to download, {len(shards) - 2} files one after the other" in said
    assert cli.main(["cache", "write", "someone/moving", *text, "--output", str(tmp_path / "answers")]) == 0
    assert downloads(root) == Counter(shards), "each once"
    local = str(root / "someone" / "moving")
    assert cli.main(["score", local, *text, "--output", str(tmp_path / "local.safetensors")]) == 0
    both = [ExpertStats.load(tmp_path / f"{name}.safetensors") for name in ("stats", "local")]
    assert both[0].sha256 == both[1].sha256 and worst(*both) == 0
    assert TeacherCache.open(tmp_path / "answers").spec.revision == commit

    saved(root / "someone" / "moving", tiny_model("phimoe", seed=1))
    again = [*score[:-1], str(tmp_path / "pinned.safetensors"), "--revision", str(commit)]
    assert cli.main([*score, "--overwrite"]) == 0 and "to download" in "".join(capsys.readouterr())
    assert ExpertStats.load(tmp_path / "stats.safetensors").meta.model_sha256 != both[0].meta.model_sha256
    (tmp_path / "recipe").mkdir()
    recipe = parse_recipe({**tiny_recipe(tmp_path / "recipe"), "model": "someone/moving"}, "recipe")
    found = outline(recipe)
    assert found.download == 0, "all of it is in the cache"
    saved(root / "someone" / "moving", tiny_model("phimoe", seed=2))
    inputs = check(recipe, found, read_text(recipe, found.tokenizer))
    assert inputs.model == inputs.teacher == found.model, "what was looked at first, whatever main is by now"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(again) == 0
    assert ExpertStats.load(tmp_path / "pinned.safetensors").sha256 == both[0].sha256
