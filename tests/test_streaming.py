"""One layer at a time equals all at once: statistics, plans, teacher caches; killed anywhere or not."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from runs import in_child, unequal_rows
from safetensors.torch import load_file, save_file
from streams import one_error, packed, scoring, stopping, text, worst
from tiny import VOCAB_SIZE, decoder_only, save_tiny, tiny_model, tiny_tokenizer, write_text

from slimmoe_hf import Target, cli, make_plan, streamed_answers
from slimmoe_hf.blocks import EMBEDDINGS, HEAD, Blocks
from slimmoe_hf.cache import TeacherCache, TopK
from slimmoe_hf.cache_answers import write_cache
from slimmoe_hf.cache_writer import CacheWriter
from slimmoe_hf.calibration import CALIBRATION_LOSSES, collect_stats
from slimmoe_hf.loading import load_model
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.streamed_answers import StreamedAnswers
from slimmoe_hf.streaming import stream_stats
from slimmoe_hf.walk import Walk, discard

TEACHER = Path(__file__).parent.parent / "examples" / "teacher" / "model"
ROWS = unequal_rows(24)
ONE_STACK = "text walks through one stack of layers; an encoder-decoder is refused"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming")
    save_tiny(folder / "model")
    write_text(folder / "text.jsonl")
    return folder


@pytest.mark.parametrize("loss", CALIBRATION_LOSSES)
@pytest.mark.parametrize("family", decoder_only(ONE_STACK))
def test_streamed_statistics_equal_those_in_memory(family: str, loss: str, tmp_path: Path):
    """1e-5 norm-wise per expert is what is promised."""
    path = save_tiny(tmp_path / "model", family)
    whole = collect_stats(load_model(path), text(), loss, progress=False)
    streamed = stream_stats(path, text(), loss, work=tmp_path / "work", progress=False)
    assert worst(streamed, whole) < 1e-5
    assert streamed.meta == whole.meta


def test_an_encoder_decoder_is_refused_in_one_line(tmp_path: Path):
    path = save_tiny(tmp_path / "model", "switch_transformers")
    with pytest.raises(
        ValueError, match=r"is an encoder-decoder, and going through .* \(--stream\) takes decoder-only"
    ) as error:
        stream_stats(path, text(), work=tmp_path / "work", progress=False)
    assert "\n" not in str(error.value) and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("overrides", "batches"),
    [
        ({"sliding_window": 8}, text),
        ({"tie_word_embeddings": True, "lm_head_bias": False}, text),
        ({"output_router_logits": True}, text),
        ({"num_hidden_layers": 1}, text),
        ({}, packed),
    ],
    ids=["sliding window", "tied", "router logits", "one layer", "packed"],
)
def test_whatever_the_model_does_between_its_layers_it_does_here_too(
    overrides: dict[str, Any], batches: Callable[[], list[dict[str, torch.Tensor]]], tmp_path: Path
):
    path = save_tiny(tmp_path / "model", "phimoe", **overrides)
    whole = collect_stats(load_model(path), batches(), progress=False)
    streamed = stream_stats(path, batches(), work=tmp_path / "work", progress=False)
    assert worst(streamed, whole) < 1e-5
    assert streamed.meta == whole.meta


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_in_bfloat16_and_with_fused_experts_are_read_as_transformers_reads_them(dtype: str, tmp_path: Path):
    model = tiny_model("mixtral").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", save_original_format=False, max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    whole = collect_stats(load_model(tmp_path / "model", dtype), text(), "lm", progress=False)
    streamed = stream_stats(tmp_path / "model", text(), "lm", work=tmp_path / "work", dtype=dtype, progress=False)
    assert worst(streamed, whole) < 1e-5
    assert streamed.meta == whole.meta


def test_plans_for_the_shipped_teacher_are_identical(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(4096, (2, 96), generator=generator)}
    whole = collect_stats(load_model(TEACHER), [batch], progress=False)
    streamed = stream_stats(TEACHER, [batch], work=tmp_path / "work", progress=False)
    target = Target(expert_width=96, kv_groups=1)
    for criterion in ("taylor", "output_fisher", "energy"):
        plans = [make_plan(stats, target, criterion) for stats in (whole, streamed)]
        assert all(torch.equal(plans[0].neurons[layer], plans[1].neurons[layer]) for layer in plans[0].neurons)
        assert all(torch.equal(plans[0].groups[layer], plans[1].groups[layer]) for layer in plans[0].groups)


def test_only_the_part_in_hand_has_weights(tmp_path: Path):
    """Turning back after the head, the last layer stays: nothing is read twice for it."""
    blocks = Blocks(save_tiny(tmp_path / "model", num_hidden_layers=3), torch.float32, torch.device("cpu"))
    held = []
    for _part in blocks.visit([EMBEDDINGS, 0, 1, 2, HEAD, 2, 1, 0]):
        held.append({at for at, module in blocks._modules.items() if not next(module.parameters()).is_meta})
    assert held == [{EMBEDDINGS}, {0}, {1}, {2}, {2, HEAD}, {2}, {1}, {0}]
    assert all(weight.is_meta for name, weight in blocks.model.named_parameters() if "norm" not in name)


# Two layers write: embeddings, 0, 1, the head, then back 1, 0. Next to each, what a second start has to read.
READS = [[EMBEDDINGS, 0, 1, HEAD, 0], [0, 1, HEAD, 0], [1, HEAD, 0], [HEAD, 1, 0], [1, 0], [0]]


@pytest.mark.parametrize("stopped", range(6))
def test_stopped_anywhere_it_continues_there_and_ends_with_the_same_statistics(
    stopped: int, origin: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
):
    whole = stream_stats(origin / "model", text(), work=tmp_path / "whole", progress=False)
    assert read == READS[0]
    read.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, stopped + 1)
        stream_stats(origin / "model", text(), work=tmp_path / "work", progress=False)
    read.clear()
    continued = stream_stats(origin / "model", text(), work=tmp_path / "work", progress=False)
    assert read == READS[stopped]
    assert continued.sha256 == whole.sha256
    read.clear()
    assert stream_stats(origin / "model", text(), work=tmp_path / "work", progress=False).sha256 == whole.sha256
    assert read == []


@pytest.mark.parametrize("stopped", range(3))
def test_without_a_loss_the_layers_are_passed_once_and_two_files_are_kept(
    stopped: int, origin: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
):
    reads = [[EMBEDDINGS, 0, 1, HEAD], [0, 1, HEAD], [1, HEAD]]
    real, files = Walk.write, set[int]()

    def counted(self: Walk, kind: str, layer: int, make: Callable[[int], torch.Tensor]) -> None:
        real(self, kind, layer, make)
        files.add(len(self.have("inputs")))

    monkeypatch.setattr(Walk, "write", counted)
    monkeypatch.setattr(Blocks, "logits", None)
    whole = stream_stats(origin / "model", text(), "none", work=tmp_path / "whole", progress=False)
    assert read == reads[0] and files == {1, 2}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, stopped + 1)
        stream_stats(origin / "model", text(), "none", work=tmp_path / "work", progress=False)
    read.clear()
    continued = stream_stats(origin / "model", text(), "none", work=tmp_path / "work", progress=False)
    assert read == reads[stopped] and continued.sha256 == whole.sha256
    read.clear()
    assert stream_stats(origin / "model", text(), "none", work=tmp_path / "work", progress=False).sha256 == whole.sha256
    assert read == []


def _score_and_die(argv: list[str]) -> None:
    real = Walk.write

    def dying(self: Walk, kind: str, layer: int, make: Callable[[int], torch.Tensor]) -> None:
        real(self, kind, layer, make)
        if (kind, layer) == ("gradients", 1):
            os.kill(os.getpid(), signal.SIGKILL)

    Walk.write = dying  # type: ignore[method-assign]
    cli.main(argv)


@pytest.mark.usefixtures("as_loud_as_before")
def test_a_killed_command_continues_and_leaves_what_the_one_in_memory_leaves(
    origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(scoring(origin, "--output", str(tmp_path / "whole.safetensors"))) == 0
    rich.reconfigure(width=300)
    killed = scoring(origin, "--stream", "--output", str(tmp_path / "stats.safetensors"))
    assert in_child(_score_and_die, killed) == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("stats*")] == ["stats.safetensors.scoring"]
    message = one_error(capsys, *killed, "--loss", "lm")
    assert "stats.safetensors.scoring: holds unfinished work of another request (loss differ)" in message
    assert cli.main(killed) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tokens in one pass; 0.00 GB of weights to read" in shown
    assert [path.name for path in tmp_path.glob("stats*")] == ["stats.safetensors"]
    both = [ExpertStats.load(tmp_path / name) for name in ("whole.safetensors", "stats.safetensors")]
    assert worst(*both) < 1e-5 and both[0].meta == both[1].meta


@pytest.mark.usefixtures("as_loud_as_before")
def test_what_cannot_be_streamed_is_one_line(origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, output = str(origin / "model"), ["--output", str(tmp_path / "out")]
    write = ["cache", "write", model, "--data", str(origin / "text.jsonl"), *output]
    assert "it goes with --stream" in one_error(capsys, *write, "--stream-memory", "1GB")
    assert "--stream-memory much: not a size" in one_error(capsys, *write, "--stream", "--stream-memory", "much")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("as_loud_as_before")
def test_a_folder_that_only_has_the_name_of_our_work_is_left_alone(
    origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    theirs = tmp_path / "out.scoring" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    message = one_error(capsys, *scoring(origin, "--stream", "--overwrite", "--output", str(tmp_path / "out")))
    assert "out.scoring: holds files that slimmoe did not write (notes.txt). Give another --output." in message
    assert cli.main(scoring(origin, "--output", str(tmp_path / "out"))) == 0
    assert theirs.read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.scoring"]


def spoilt(origin: Path, folder: Path, name: str) -> Path:
    """A copy of the model with a NaN in one of its weights."""
    shutil.copytree(origin / "model", folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[name].view(-1)[5] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name", ["model.layers.1.block_sparse_moe.experts.2.w3.weight", "lm_head.bias", "model.norm.weight"]
)
def test_weights_that_are_not_finite_are_named(name: str, origin: Path, tmp_path: Path):
    path = spoilt(origin, tmp_path / "model", name)
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        stream_stats(path, text(), work=tmp_path / "work", progress=False)


def test_a_disk_that_is_too_small_is_found_before_any_work(
    origin: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("slimmoe_hf.walk.psutil.disk_usage", lambda path: type("", (), {"free": 100}))
    with pytest.raises(
        ValueError, match=r"the inputs of 4 layers take .* the disk has 0.0 GB free. Give fewer --tokens"
    ):
        stream_stats(origin / "model", text(), work=tmp_path / "work", progress=False)
    assert not read


def test_another_request_is_refused_and_overwrite_begins_anew(origin: Path, tmp_path: Path):
    stream_stats(origin / "model", text(), "lm", work=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"unfinished work of another request \(loss, text differ\)"):
        stream_stats(origin / "model", text()[:1], work=tmp_path, progress=False)
    anew = stream_stats(origin / "model", text()[:1], work=tmp_path, progress=False, overwrite=True)
    assert worst(anew, collect_stats(load_model(origin / "model"), text()[:1], progress=False)) < 1e-5


def changed(model: Path, folder: Path) -> Path:
    """The same weights, to be run otherwise."""
    shutil.copytree(model, folder, copy_function=shutil.copy2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    return folder


def test_another_model_is_noticed_when_the_work_is_continued(origin: Path, tmp_path: Path):
    asked = {"loss": "lm", "work": tmp_path / "work", "progress": False}
    stream_stats(origin / "model", text(), **asked)
    same = shutil.copytree(origin / "model", tmp_path / "same", copy_function=shutil.copy2)
    stream_stats(same, text(), **asked)
    os.utime(same / "model.safetensors", ns=(0, 0))
    for other in (same, changed(origin / "model", tmp_path / "changed")):
        with pytest.raises(ValueError, match=r"unfinished work of another request \(model differ\)"):
            stream_stats(other, text(), **asked)


@pytest.mark.parametrize("emptying", ["to begin anew", "to leave nothing"])
def test_killed_while_it_takes_its_work_away_it_is_neither_stuck_nor_confused(
    emptying: str, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    work = tmp_path / "work"
    whole = stream_stats(origin / "model", text(), "lm", work=work, progress=False)

    def half(folder: Path, *_more: Any, **_named: Any) -> None:
        next(folder.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("slimmoe_hf.walk.shutil.rmtree", half)
        if emptying == "to leave nothing":
            discard(work)
        else:
            stream_stats(origin / "model", text(), work=work, progress=False, overwrite=True)
    assert stream_stats(origin / "model", text(), "lm", work=work, progress=False).sha256 == whole.sha256
    discard(work)
    assert not work.exists()


def _die_in_the_second_file(done: Callable[[], object], begun: list[int]) -> None:
    """As `done` would, but for a kill in the middle of the second file that passes between layers."""
    real = Walk.write

    def write(self: Walk, kind: str, layer: int, make: Callable[[int], torch.Tensor]) -> None:
        begun.append(layer)

        def made(number: int) -> torch.Tensor:
            if len(begun) == 2 and number == len(self.batches) - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return make(number)

        real(self, kind, layer, made)

    Walk.write = write  # type: ignore[method-assign]
    done()


@pytest.mark.slow  # a process for every file
@pytest.mark.parametrize("what", ["scores", "answers"])
def test_killed_in_the_middle_of_every_file_it_writes_it_ends_with_the_same(what: str, origin: Path, tmp_path: Path):
    """One file more each time: of scores six, of answers three a group."""

    def made(place: str) -> list[str]:
        if what == "scores":
            return [stream_stats(origin / "model", text(), work=tmp_path / place, progress=False).sha256]
        if not (tmp_path / place).exists():
            write(origin / "model", tmp_path / place, stream=True, stream_memory=260 * 2 * 32 * 4)
        return shards(TeacherCache.open(tmp_path / place))

    whole = made("whole")
    files = 6 if what == "scores" else 3 * len(whole)
    codes = [in_child(_die_in_the_second_file, lambda: made("killed"), []) for _ in range(files)]
    assert codes == [-signal.SIGKILL] * (files - 1) + [0] and files >= 6
    assert made("killed") == whole


def write(model: Path, folder: Path, **more: Any) -> TeacherCache:
    return write_cache(model, ROWS, folder, tokenizer=tiny_tokenizer(), batch_size=4, **more)


def shards(cache: TeacherCache) -> list[str]:
    return [entry.sha256 for entry in cache.manifest.shards]


def answers(cache: TeacherCache) -> Iterator[TopK]:
    """The answers to every text, in the order of the rows."""
    for row in ROWS:
        yield cache.answers(torch.tensor([row["input_ids"]]))


@pytest.mark.parametrize("kind", ["top_k", "hidden"])
@pytest.mark.parametrize("family", decoder_only(ONE_STACK))
def test_a_streamed_teacher_writes_the_cache_of_the_live_one(family: str, kind: Any, tmp_path: Path):
    path = save_tiny(tmp_path / "model", family)
    live = write(path, tmp_path / "live", kind=kind, top_k=16, temperatures=(2.0,))
    streamed = write(path, tmp_path / "streamed", kind=kind, top_k=16, temperatures=(2.0,), stream=True)
    assert streamed.manifest == live.manifest, "hashes of all files among them"
    assert not list(tmp_path.glob("*.stream-*"))


def test_a_group_reads_the_checkpoint_once_and_no_group_is_larger_than_allowed(
    origin: Path, tmp_path: Path, read: list[int], capsys: pytest.CaptureFixture[str]
):
    """130 tokens' inputs and outputs of 32 float32 each fit 33,280 bytes."""
    rich.reconfigure(width=300)
    live = write(origin / "model", tmp_path / "live")
    read.clear()
    streamed = write(origin / "model", tmp_path / "streamed", stream=True, stream_memory=130 * 2 * 32 * 4)
    tokens = sum(len(row["input_ids"]) for row in ROWS)
    shown = " ".join(capsys.readouterr().out.split())
    assert "up to 130 tokens in one pass over 0.00 GB of weights" in shown and f"for {tokens:,} tokens" in shown
    passes = -(-tokens // 130)
    assert (
        f": {passes} for {tokens:,} tokens, " in shown and shown.count("the teacher's answers: about 1 s a pass, ") == 1
    )
    assert f" for {passes}, at the pace of the first layer: " in shown and "both measured on it" in shown
    groups = len(streamed.manifest.shards)
    assert read == [HEAD, *[EMBEDDINGS, 0, 1, HEAD] * groups] and 4 <= groups <= 6
    assert max(entry.answers + entry.texts for entry in streamed.manifest.shards) <= 130
    one, other = ({**cache.manifest.model_dump(), "shards": 0, "index_sha256": 0} for cache in (live, streamed))
    assert one.pop("mean_tail_mass") == pytest.approx(other.pop("mean_tail_mass"), rel=1e-6)
    assert one == other


@pytest.mark.parametrize(("stopped", "more"), [*((at, {}) for at in range(6)), (4, {"overwrite": True})])
def test_a_stopped_streamed_cache_reads_nothing_twice_but_the_part_in_hand(
    stopped: int, more: dict[str, bool], origin: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Every group writes three files: its embeddings, and the outputs of two layers. The head is read once more, to look at."""
    small = {"stream": True, "stream_memory": 260 * 2 * 32 * 4, **more}
    whole = write(origin / "model", tmp_path / "whole", **small)
    groups = len(shards(whole))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, stopped + 1)
        write(origin / "model", tmp_path / "stopped", **small)
    read.clear()
    continued = write(origin / "model", tmp_path / "stopped", **small)
    assert shards(continued) == shards(whole)
    rest = groups - 1 - stopped // 3
    assert read == [HEAD, *[EMBEDDINGS, 0, 1, HEAD][stopped % 3 :], *[EMBEDDINGS, 0, 1, HEAD] * rest]


def test_a_cache_stopped_at_the_head_reads_only_that_again(
    origin: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
):
    whole = write(origin / "model", tmp_path / "whole", stream=True)

    def stopped(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CacheWriter, "add", stopped)
        write(origin / "model", tmp_path / "stopped", stream=True)
    read.clear()
    assert shards(write(origin / "model", tmp_path / "stopped", stream=True)) == shards(whole)
    assert read == [HEAD, HEAD]


def test_with_more_memory_free_than_before_a_killed_cache_keeps_its_groups(
    origin: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Groups of another size would begin anew."""
    free = [260 * 2 * 32 * 4 * 2]
    monkeypatch.setattr(streamed_answers, "free_memory", lambda: free[0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 2)
        write(origin / "model", tmp_path / "answers", stream=True)
    free[0] *= 100
    read.clear()
    continued = write(origin / "model", tmp_path / "answers", stream=True)
    assert read[:4] == [HEAD, 0, 1, HEAD] and max(each.answers for each in continued.manifest.shards) < 260
    assert not list(tmp_path.glob("*.stream-*"))


def test_half_of_a_small_disk_is_what_a_group_takes(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = {"path": origin / "model", "kind": "top_k", "dtype": "float32", "device": torch.device("cpu")}
    monkeypatch.setattr("slimmoe_hf.streamed_answers.psutil.disk_usage", lambda path: type("", (), {"free": 2_560_000}))
    asked = StreamedAnswers(**place, work=tmp_path / "work", memory=None)
    assert asked.tokens == 2_560_000 // 2 // (2 * 32 * 4)


def test_a_continued_cache_reads_no_weights_for_their_hash_and_notices_another_model(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 2)
        write(origin / "model", tmp_path / "answers", stream=True)
    with pytest.raises(ValueError, match=r"unfinished cache of another request: .*config_sha256 was"):
        write(changed(origin / "model", tmp_path / "changed"), tmp_path / "answers", stream=True)
    touched = shutil.copytree(origin / "model", tmp_path / "touched")
    hashed: list[Path] = []
    real = streamed_answers.weights_sha256
    monkeypatch.setattr(streamed_answers, "weights_sha256", lambda path: (hashed.append(path), real(path))[1])
    monkeypatch.setattr(CacheWriter, "finish", lambda *_arguments: None)
    write(origin / "model", tmp_path / "answers", stream=True)
    assert not hashed and not list(tmp_path.glob("*.stream-*"))
    write(touched, tmp_path / "others", stream=True)
    assert hashed == [touched]


def test_a_folder_that_only_has_the_name_of_a_caches_work_is_left_alone(origin: Path, tmp_path: Path):
    theirs = tmp_path / "answers.stream-000" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    with pytest.raises(ValueError, match=r"answers\.stream-000: holds files that slimmoe did not write"):
        write(origin / "model", tmp_path / "answers", stream=True, overwrite=True)
    assert theirs.read_text() == "mine"


@pytest.mark.usefixtures("as_loud_as_before")
def test_the_command_streams_a_cache(origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["cache", "write", str(origin / "model"), "--data", str(origin / "text.jsonl"), "--max-length", "64"]
    argv += ["--tokens", "2000", "--output"]
    assert cli.main([*argv, str(tmp_path / "live")]) == 0
    assert cli.main([*argv, str(tmp_path / "streamed"), "--stream", "--stream-memory", "1MB"]) == 0
    assert "tokens in one pass" in " ".join("".join(capsys.readouterr()).split())
    live, streamed = (TeacherCache.open(tmp_path / name) for name in ("live", "streamed"))
    assert live.manifest == streamed.manifest and live.manifest.spec.vocab_size == VOCAB_SIZE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: a model is streamed through it under a cap")
def test_on_a_gpu_one_layer_at_a_time_is_there_and_the_scores_are_those_in_memory(tmp_path: Path):
    """Eight layers of 25 MB each: less than half of them is ever on the device."""
    path = save_tiny(tmp_path / "model", num_hidden_layers=8, hidden_size=256, intermediate_size=2048)
    whole = collect_stats(load_model(path, device="cuda"), text(), progress=False)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    streamed = stream_stats(path, text(), work=tmp_path / "work", device="cuda", progress=False)
    assert torch.cuda.max_memory_allocated() < size / 2
    assert worst(streamed, whole) < 1e-4, "atomics on a GPU sum in no fixed order"
    live = write(path, tmp_path / "live", device=torch.device("cuda"), dtype="float32")
    cache = write(path, tmp_path / "streamed", device=torch.device("cuda"), dtype="float32", stream=True)
    for one, other in zip(answers(live), answers(cache), strict=True):
        torch.testing.assert_close(one.log_tail_BT, other.log_tail_BT, atol=0.01, rtol=0.01)
