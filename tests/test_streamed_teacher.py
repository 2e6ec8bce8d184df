"""A separate teacher for `kd_topk`, streamed before the model that is scored; recipes that stream all they can."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from recipes import tiny_recipe
from runs import in_child
from streams import packed, scoring, stopping, text, worst
from tiny import decoder_only, save_tiny, tiny_tokenizer, write_text
from transformers import PreTrainedModel

from slimmoe_hf import cli, pipeline, run_recipe, streamed_teacher
from slimmoe_hf.blocks import EMBEDDINGS, HEAD
from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.data import load_splits
from slimmoe_hf.evaluation import evaluate_checkpoint, held_out
from slimmoe_hf.loading import load_model
from slimmoe_hf.recipe import parse_recipe
from slimmoe_hf.rundir import CACHE
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.streaming import stream_stats
from slimmoe_hf.walk import Walk


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_tiny(folder / "model")
    save_tiny(folder / "teacher", seed=1)
    write_text(folder / "text.jsonl")
    return folder


@pytest.mark.parametrize(
    "family", decoder_only("text walks through one stack of layers; an encoder-decoder is refused")
)
def test_scores_against_a_streamed_teacher_equal_those_in_memory(family: str, tmp_path: Path):
    model = save_tiny(tmp_path / "model", family)
    teacher = save_tiny(tmp_path / "teacher", family, seed=1)
    whole = collect_stats(load_model(model), text(), teacher=load_model(teacher), progress=False)
    streamed = stream_stats(model, text(), teacher=teacher, work=tmp_path / "work", progress=False)
    assert worst(streamed, whole) < 1e-5
    assert streamed.meta == whole.meta and whole.meta.teacher_sha256 is not None


def test_the_teacher_may_be_of_another_size_with_more_ids_and_the_text_packed(origin: Path, tmp_path: Path):
    larger = {"vocab_size": 352, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3}
    teacher = save_tiny(tmp_path / "teacher", "mixtral", seed=1, **larger)
    whole = collect_stats(load_model(origin / "model"), packed(), teacher=load_model(teacher), progress=False)
    streamed = stream_stats(origin / "model", packed(), teacher=teacher, work=tmp_path / "work", progress=False)
    assert worst(streamed, whole) < 1e-5
    assert streamed.meta == whole.meta


def test_logits_that_come_in_many_pieces_give_the_same(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = {"teacher": origin / "teacher", "progress": False}
    whole = stream_stats(origin / "model", text(), work=tmp_path / "whole", **asked)
    monkeypatch.setattr(streamed_teacher, "CHUNK_BYTES", 4 * 320 * 7)
    pieces = stream_stats(origin / "model", text(), work=tmp_path / "pieces", **asked)
    assert worst(pieces, whole) < 1e-5


# The teacher writes for its embeddings and two layers, then the model for embeddings, 0, 1, the head, 1, 0. Next to each,
# what a second start has to read of the teacher and of the model.
WHOLE = [EMBEDDINGS, 0, 1, HEAD], [EMBEDDINGS, 0, 1, HEAD, 0]
READS = [
    WHOLE, ([0, 1, HEAD], WHOLE[1]), ([1, HEAD], WHOLE[1]), ([], WHOLE[1]), ([], [0, 1, HEAD, 0]), ([], [1, HEAD, 0]),
    ([], [HEAD, 1, 0]), ([], [1, 0]), ([], [0]),
]  # fmt: skip


@pytest.mark.parametrize("stopped", range(9))
def test_stopped_anywhere_nothing_is_read_twice_but_the_part_in_hand(
    stopped: int, origin: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
):
    asked = {"teacher": origin / "teacher", "progress": False}
    whole = stream_stats(origin / "model", text(), work=tmp_path / "whole", **asked)
    assert read == [*WHOLE[0], *WHOLE[1]]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, stopped + 1)
        stream_stats(origin / "model", text(), work=tmp_path / "work", **asked)
    read.clear()
    continued = stream_stats(origin / "model", text(), work=tmp_path / "work", **asked)
    assert read == [part for one in READS[stopped] for part in one]
    assert continued.sha256 == whole.sha256


def test_stopped_at_the_teachers_head_only_that_is_read_again(
    origin: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
):
    asked = {"teacher": origin / "teacher", "work": tmp_path / "work", "progress": False}

    def stopped(*_arguments: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(streamed_teacher, "save_file", stopped)
        stream_stats(origin / "model", text(), **asked)
    read.clear()
    stream_stats(origin / "model", text(), **asked)
    assert read == [HEAD, *WHOLE[1]]


def _score_and_die(argv: list[str]) -> None:
    real = Walk.write

    def dying(self: Walk, kind: str, layer: int, make: Any) -> None:
        real(self, kind, layer, make)
        if (kind, layer) == ("gradients", 1):
            os.kill(os.getpid(), signal.SIGKILL)

    Walk.write = dying  # type: ignore[method-assign]
    cli.main(argv)


@pytest.mark.usefixtures("as_loud_as_before")
def test_a_killed_command_continues_with_overwrite_too_and_says_how_long_it_takes(
    origin: Path, tmp_path: Path, read: list[int], capsys: pytest.CaptureFixture[str]
):
    asked = [*scoring(origin, "--teacher", str(origin / "teacher")), "--overwrite", "--output"]
    assert cli.main([*asked, str(tmp_path / "whole.safetensors")]) == 0
    (tmp_path / "stats.safetensors").write_bytes(b"of before")
    killed = [*asked, str(tmp_path / "stats.safetensors"), "--stream"]
    assert in_child(_score_and_die, killed) == -signal.SIGKILL
    assert (tmp_path / "stats.safetensors").read_bytes() == b"of before"
    read.clear()
    rich.reconfigure(width=300)
    assert cli.main(killed) == 0
    assert read == [1, 0], "the layer in hand, whose statistics were not safe yet, and what was left"
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "scoring: about 1 s for the way back, at the pace of the first layer" in shown
    both = [ExpertStats.load(tmp_path / name) for name in ("whole.safetensors", "stats.safetensors")]
    assert worst(*both) < 1e-5 and both[0].meta == both[1].meta
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats.safetensors", "whole.safetensors"]


def forbid_loading(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[str]:
    """Whoever loads the model in a folder whole is stopped; the others that are loaded."""
    real, loaded = PreTrainedModel.from_pretrained.__func__, []

    def watched(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        assert Path(name).resolve() != path.resolve(), "the teacher is loaded whole"
        loaded.append(str(name))
        return real(cls, name, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watched))
    return loaded


@pytest.mark.slow  # a whole run
def test_a_recipe_may_stream_every_stage_and_its_teachers_answers(
    tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
):
    """The line of the Phi recipes: the teacher is never in memory as a whole, and its row of the report is there."""
    values = tiny_recipe(tmp_path)
    values["teacher_cache"] = {"top_k": 16, "stream": True, "stream_memory": "100MB"}
    values["evaluation"] = {"tokens": 200, "max_new_tokens": 1}
    for stage in values["stages"]:
        stage |= {"calibration": {"tokens": 512, "stream": True, "loss": "kd_topk"}, "distillation": {"max_steps": 1}}
    monkeypatch.setattr(pipeline, "collect_stats", None)
    monkeypatch.setattr(pipeline, "load_model", None)
    loaded = forbid_loading(monkeypatch, Path(values["model"]))
    report = run_recipe(parse_recipe(values, "recipe"))
    assert len(set(loaded)) >= 4, "the students are loaded whole, by the function that is watched"
    assert report is not None and report.models[0].streamed and not any(model.streamed for model in report.models[1:])
    monkeypatch.undo()
    text = held_out(load_splits(values["data"]["source"])["test"], tiny_tokenizer(), 64, 200)
    whole = evaluate_checkpoint(Path(values["model"]), text, tiny_tokenizer())
    assert report.models[0].loss == pytest.approx(whole.loss, rel=1e-5)
    assert report.models[0].router_load == whole.router_load and report.models[0].tokens_per_second is None
    for said in ("README.md", "model/README.md"):
        assert "measured one decoder layer at a time" in (tmp_path / "run" / said).read_text(), said
    assert [model.step for model in report.models] == ["teacher", *["slimmed", "distilled"] * 2]
    stats = [ExpertStats.load(tmp_path / "run" / f"stage-{number}" / "stats.safetensors").meta for number in (1, 2)]
    assert [meta.loss for meta in stats] == ["kd_topk"] * 2
    assert [meta.teacher_sha256 for meta in stats] == [None, stats[0].model_sha256]
    assert TeacherCache.open(tmp_path / "run" / CACHE).spec.top_k == 16
    assert not [file for file in (tmp_path / "run").rglob("*") if "stream" in file.name or "scoring" in file.name]
    of_teacher = [*WHOLE[0], HEAD, *WHOLE[0]]
    assert read[:9] == of_teacher and len(read) == 9 + len(WHOLE[1]) + len(WHOLE[0]) + len(WHOLE[1]) + 2 * len(
        [EMBEDDINGS, 0, 1]
    )  # reconstructed


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"stream_memory": "1GB"}, "teacher_cache.stream_memory: it says how much .* goes with stream: true"),
        ({"stream": True, "stream_memory": "much"}, "teacher_cache.stream_memory: expected an amount of memory"),
    ],
)
def test_what_a_streamed_teacher_cache_is_refused_for(cache: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        parse_recipe({**tiny_recipe(tmp_path), "teacher_cache": cache}, "recipe")


def test_the_kept_entries_give_the_loss_of_the_whole_distribution():
    from slimmoe_hf.losses import forward_kl, kept_kl

    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = torch.randn(2, 5, 40, generator=generator).unbind()
    kept = teacher_NV.log_softmax(-1).topk(8)
    whole = forward_kl(student_NV, teacher_NV, top_k=8, add_tail=False)
    assert torch.equal(kept_kl(student_NV, kept.values, kept.indices), whole)
