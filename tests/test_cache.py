"""The teacher cache says what the teacher says, wherever a text turns up, and never something else in silence."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from runs import in_child, in_two_processes, unequal_rows
from safetensors import safe_open
from tiny import VOCAB_SIZE, documents, save_tiny, tiny_model, tiny_tokenizer
from torch.utils.data import DataLoader
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from slimmoe_hf import cache_writer, shards
from slimmoe_hf.answers import CHUNK_BYTES
from slimmoe_hf.cache import CacheCollator, TeacherCache
from slimmoe_hf.cache_answers import write_cache
from slimmoe_hf.cache_format import CacheSpec, normalised, text_key
from slimmoe_hf.cache_writer import CacheWriter, _refuse_other, top_k_answers
from slimmoe_hf.data import batches, tokenize
from slimmoe_hf.identity import model_fingerprint
from slimmoe_hf.loading import weights_sha256
from slimmoe_hf.losses import forward_kl
from slimmoe_hf.memory import cache_bytes_per_token

ROWS = unequal_rows(40, longest=48)
K = 8


@pytest.fixture(scope="module")
def teacher() -> Any:
    return tiny_model("phimoe", seed=3)


@pytest.fixture(scope="module")
def cache(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return written(teacher, tmp_path_factory.mktemp("cache") / "answers", temperatures=[2.0])


def written(teacher: Any, folder: Path, rows: Any = ROWS, **settings: Any) -> TeacherCache:
    return write_cache(teacher, rows, folder, tokenizer=tiny_tokenizer(), **{"top_k": K, **settings})


@torch.no_grad()
def truth(teacher: Any, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """The teacher's log-probabilities after every token but the last of one text, `[T - 1, V]`, float64."""
    logits = teacher(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return (logits.double() / temperature).log_softmax(-1)


def padded(rows: Dataset, picked: list[int]) -> dict[str, torch.Tensor]:
    return batches(rows.select(picked), len(picked), pad_token_id=1)[0]


# Half a float16 step at 16 to 32 nats is 2^-7; renormalising moves all by as much again at most.
FLOAT16: dict[str, Any] = {"rtol": 0, "atol": 2**-6}


def test_full_cache_equals_the_teachers_log_softmax_to_float16(teacher: Any, tmp_path: Path):
    cache = written(teacher, tmp_path / "c", top_k=10**6)
    assert cache.spec.top_k == VOCAB_SIZE
    for row in ROWS["input_ids"]:
        found = cache.answers(torch.tensor([row]))
        dense = torch.empty(1, len(row), VOCAB_SIZE).scatter(-1, found.index_BTK, found.log_probs_BTK)[0, :-1].double()
        expected = truth(teacher, row)
        torch.testing.assert_close(dense, expected, **FLOAT16)
        assert (found.log_tail_BT[0, :-1] == -torch.inf).all()
        # what a student is told: the divergence of what is stored from what the teacher said
        assert (expected.exp() * (expected - dense)).sum(-1).abs().max() < 1e-5


def test_top_k_with_tail_equals_the_loss_with_the_live_teacher(teacher: Any, cache: TeacherCache):
    student = tiny_model("phimoe", seed=4)
    for row in ROWS["input_ids"][:10]:
        found = cache.answers(torch.tensor([row]))
        student_NV, teacher_NV = truth(student, row), truth(teacher, row)
        index_NK, log_probs_NK, log_tail_N = (part[0, :-1] for part in found[:3][1::-1] + found[2:3])
        same = (teacher_NV.topk(K).indices == index_NK).all(-1)  # where the next token is one of the eight
        outside = student_NV.scatter(-1, index_NK, -torch.inf).logsumexp(-1)
        kl = (log_probs_NK.exp() * (log_probs_NK - student_NV.gather(-1, index_NK))).sum(-1)
        kl = kl + log_tail_N.exp() * (log_tail_N - outside)
        live = forward_kl(student_NV, teacher_NV, top_k=K)
        torch.testing.assert_close(kl[same].double(), live[same], rtol=2e-3, atol=2e-3)
        assert (kl[~same] <= forward_kl(student_NV, teacher_NV)[~same] + 2e-3).all()  # still a lower bound


def test_the_next_token_is_always_kept_and_the_likeliest_come_first(teacher: Any, cache: TeacherCache):
    replaced = 0
    for row in ROWS["input_ids"]:
        found, expected = cache.answers(torch.tensor([row])), truth(teacher, row)
        index_NK, following_N1 = found.index_BTK[0, :-1], torch.tensor(row[1:]).unsqueeze(-1)
        assert (index_NK == following_N1).any(-1).all()
        likeliest_NK = expected.topk(K).indices
        assert torch.equal(index_NK[:, :-1], likeliest_NK[:, :-1])
        differs = index_NK[:, -1] != likeliest_NK[:, -1]
        assert torch.equal(index_NK[differs, -1:], following_N1[differs])
        torch.testing.assert_close(found.log_probs_BTK[0, :-1].double(), expected.gather(-1, index_NK), **FLOAT16)
        replaced += int(differs.sum())
    assert replaced > 100


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_tail_is_the_mass_outside_at_every_temperature(teacher: Any, cache: TeacherCache, temperature: float):
    for row in ROWS["input_ids"][:8]:
        found = cache.answers(torch.tensor([row]), temperature=temperature)
        expected = truth(teacher, row, temperature)
        outside = expected.scatter(-1, found.index_BTK[0, :-1], -torch.inf).logsumexp(-1)
        torch.testing.assert_close(found.log_tail_BT[0, :-1].double(), outside, **FLOAT16)
        kept = expected.gather(-1, found.index_BTK[0, :-1])
        torch.testing.assert_close(found.log_probs_BTK[0, :-1].double(), kept, **FLOAT16)
        mass = found.log_probs_BTK.exp().sum(-1) + found.log_tail_BT.exp()
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)


def test_a_tiny_tail_is_not_lost():
    """1 - sum would be 0, or negative, at a mass of 1e-13."""
    logits = torch.full((1, 50), -30.0)
    logits[0, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    answers = top_k_answers(logits, torch.tensor([0]), 4)
    exact = logits.double().log_softmax(-1)[0, 4:].logsumexp(-1)
    _, tail = normalised(answers["log_probs"].half(), answers["log_tail"][:, 0].half())
    assert exact < -29 and abs(float(tail) - float(exact)) < 2**-6


@pytest.mark.parametrize("size", [1, 3, 7])
def test_lookup_is_independent_of_order_batch_size_and_padding(cache: TeacherCache, size: int):
    order = random.Random(size).sample(range(len(ROWS)), len(ROWS))
    for start in range(0, len(order), size):
        picked = order[start : start + size]
        batch = padded(ROWS, picked)
        together = cache.answers(batch["input_ids"], batch["attention_mask"])
        assert together.known_BT.sum() == sum(len(ROWS[number]["input_ids"]) - 1 for number in picked)
        for row, number in enumerate(picked):
            ids = torch.tensor([ROWS[number]["input_ids"]])
            alone = cache.answers(ids)
            for one, other in zip(together, alone, strict=True):
                assert torch.equal(one[row, : ids.shape[1]], other[0])
            assert not together.known_BT[row, ids.shape[1] - 1 :].any()


def test_batches_of_the_writer_and_bounded_chunks_of_logits_change_no_answer(
    teacher: Any, cache: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * VOCAB_SIZE * 5)
    widest = []
    real = top_k_answers
    monkeypatch.setattr("slimmoe_hf.answers.top_k_answers", lambda *given: widest.append(len(given[0])) or real(*given))
    other = written(teacher, tmp_path / "c", batch_size=3, temperatures=[2.0])
    assert max(widest) == 5
    assert_same_answers(cache, other)


def assert_same_answers(one: TeacherCache, other: TeacherCache, rows: Any = ROWS) -> None:
    for row in rows["input_ids"]:
        left, right = (cache.answers(torch.tensor([row])) for cache in (one, other))
        torch.testing.assert_close(left.log_probs_BTK, right.log_probs_BTK, **FLOAT16)
        torch.testing.assert_close(left.log_tail_BT, right.log_tail_BT, **FLOAT16)
        assert (left.index_BTK == right.index_BTK).float().mean() > 0.99  # entries within a rounding error may swap


def test_equal_rows_are_stored_once(teacher: Any, cache: TeacherCache, tmp_path: Path):
    twice = Dataset.from_list([*ROWS, *ROWS, {"input_ids": [7], "labels": [7]}])
    other = written(teacher, tmp_path / "c", twice, temperatures=[2.0])
    assert other.manifest.texts == cache.manifest.texts == len(ROWS)
    assert files(other.folder) == files(cache.folder)


def test_bytes_per_token_are_those_that_are_planned_with(teacher: Any, tmp_path: Path):
    cache = written(teacher, tmp_path / "c", top_k=64)
    header = shards.read_header(cache.folder / cache.manifest.shards[0].file)
    answers = sum(header[name].bytes for name in cache.spec.columns())
    assert answers == cache.manifest.answers * cache_bytes_per_token(VOCAB_SIZE)
    assert cache.manifest.answers == sum(len(row) - 1 for row in ROWS["input_ids"])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, torch.uint16), ((1 << 16) + 1, torch.int32)])
def test_every_id_fits_its_index(vocab_size: int, dtype: torch.dtype, tmp_path: Path):
    spec = CacheSpec(teacher="t", tokenizer_sha256="", vocab_size=vocab_size, top_k=2)
    last = vocab_size - 1
    with CacheWriter(tmp_path / "c", spec) as writer:
        writer.add([5, last], top_k_answers(torch.arange(vocab_size).float().unsqueeze(0), torch.tensor([last]), 2))
        cache = writer.finish()
    assert spec.columns()["indices"][0] is dtype
    assert cache.answers(torch.tensor([[5, last]])).index_BTK[0, 0].tolist() == [last, last - 1]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_cache_is_safetensors_and_json(cache: TeacherCache):
    for file in cache.folder.iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            with safe_open(file, framework="np") as content:
                assert content.keys()
    assert {file.suffix for file in cache.folder.iterdir()} == {".json", ".safetensors"}


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prose() -> Dataset:
    """Documents of unequal length, tokenised and cut to 64 tokens."""
    texts = [{"text": text[: 60 + 37 * (number % 9)]} for number, text in enumerate(documents()[:30])]
    return tokenize(texts, tiny_tokenizer(), 64, packing=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_documents_are_found_in_any_packing(teacher: Any, prose: Dataset, tmp_path: Path, workers: int):
    """Best-fit packing as TRL does it: a cache of documents serves packed rows, in the workers of a DataLoader too."""
    cache = written(teacher, tmp_path / "c", prose)
    packed = pack_dataset(prose, 128, "bfd")
    assert max(map(len, packed["seq_lengths"])) > 2
    collator = DataCollatorForLanguageModeling(pad_token_id=1, padding_free=True, pad_to_multiple_of=8)
    loader = DataLoader(packed, batch_size=2, collate_fn=CacheCollator(collator, cache), num_workers=workers)
    counted = 0
    for batch in loader:
        counts = batch["labels"][:, 1:] != -100
        assert batch["teacher_log_probs"].dtype == torch.float16 and batch["teacher_indices"].shape[-1] == K
        logits = teacher(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        expected = logits[:, :-1][counts].log_softmax(-1)
        index_NK = batch["teacher_indices"][:, :-1][counts].long()
        found_NK, _ = normalised(batch["teacher_log_probs"][:, :-1][counts], batch["teacher_log_tail"][:, :-1][counts])
        torch.testing.assert_close(found_NK, expected.gather(-1, index_NK), **FLOAT16)
        counted += int(counts.sum())
    assert counted == sum(len(row) - 1 for row in prose["input_ids"])


def test_a_cache_of_packed_rows_holds_their_documents(teacher: Any, prose: Dataset, tmp_path: Path):
    of_documents = written(teacher, tmp_path / "documents", prose)
    of_packed = written(teacher, tmp_path / "packed", pack_dataset(prose, 128, "bfd"))
    assert of_packed.manifest.texts == of_documents.manifest.texts
    of_packed.check(rows=prose)
    assert_same_answers(of_documents, of_packed, prose)


def test_wrapped_rows_are_found_whole(teacher: Any, prose: Dataset, tmp_path: Path):
    wrapped = pack_dataset(prose.select_columns("input_ids"), 50, "wrapped")
    cache = written(teacher, tmp_path / "c", wrapped)
    batch = DataCollatorForLanguageModeling(pad_token_id=1)([dict(row) for row in wrapped])
    found = CacheCollator(lambda examples: batch, cache)([])
    assert (found["teacher_log_tail"][batch["attention_mask"] == 0] == 0).all()
    with pytest.raises(ValueError, match=r"holds no answers to \d+ tokens of row 0 of this batch, which begin \["):
        cache.answers(torch.tensor([prose[0]["input_ids"]]))


def test_a_token_without_an_answer_is_not_trained_on_in_silence(teacher: Any, prose: Dataset, tmp_path: Path):
    cache = written(teacher, tmp_path / "c", prose)
    first, second = prose[0]["input_ids"], prose[1]["input_ids"]
    ids = torch.tensor([first + second])
    batch = {
        "input_ids": ids, "labels": ids.clone(),
        "position_ids": torch.tensor([[*range(len(first)), *range(len(second))]]),
    }  # fmt: skip
    collator = CacheCollator(lambda examples: dict(batch), cache)
    with pytest.raises(ValueError, match=f"trains on token {len(first)}, with which a text begins"):
        collator([])
    batch["labels"][0, len(first)] = -100
    assert "teacher_log_probs" in collator([])


def test_streams_are_answered_as_datasets_are(teacher: Any, cache: TeacherCache, tmp_path: Path):
    for name, rows in {"stream": ROWS.to_iterable_dataset(), "generator": iter(ROWS)}.items():
        other = written(teacher, tmp_path / name, rows, temperatures=[2.0])
        assert files(other.folder) == files(cache.folder)


# -- hidden states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["phimoe", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_and_head_make_the_teachers_logits(family: str, dtype: torch.dtype, tmp_path: Path):
    teacher = tiny_model(family, seed=5).to(dtype)
    cache = written(teacher, tmp_path / "c", kind="hidden")
    weight, bias = cache.head()
    assert (bias is not None) == (family == "phimoe") and weight.dtype == dtype
    assert cache.spec.bytes_per_answer == 2 * teacher.config.hidden_size
    for row in ROWS["input_ids"][:6]:
        hidden, known = cache.hidden_states(torch.tensor([row]))
        assert known.sum() == len(row) - 1
        with torch.no_grad():
            logits = torch.nn.functional.linear(hidden.to(dtype), weight, bias)[0, :-1]
        expected = truth(teacher, row)
        tolerance = 0.02 if dtype == torch.float32 else 0.3  # bfloat16 teachers differ so between batch sizes
        torch.testing.assert_close(logits.double().log_softmax(-1), expected, rtol=0, atol=tolerance)
    with pytest.raises(ValueError, match="holds hidden states, no top-k answers"):
        cache.answers(torch.tensor([ROWS[0]["input_ids"]]))
    cache.check(rows=ROWS, temperature=3.0, beta=0.5)  # every loss can be had of hidden states


def test_a_teacher_whose_logits_are_more_than_head_times_hidden_states(tmp_path: Path):
    teacher = tiny_model("mixtral", seed=5)
    plain = written(teacher, tmp_path / "plain")
    forward = teacher.forward

    def capped(*given: Any, **named: Any) -> Any:
        outputs = forward(*given, **named)
        outputs.logits = 2 * torch.tanh(outputs.logits / 2)
        return outputs

    teacher.forward = capped
    with pytest.raises(ValueError, match="logits of a mixtral are more than its output head times"):
        written(teacher, tmp_path / "hidden", kind="hidden")
    cache = written(teacher, tmp_path / "top")
    row = ROWS[0]["input_ids"]
    found = cache.answers(torch.tensor([row]))
    expected = truth(teacher, row).gather(-1, found.index_BTK[0, :-1])
    torch.testing.assert_close(found.log_probs_BTK[0, :-1].double(), expected, **FLOAT16)
    assert not torch.equal(found.log_probs_BTK, plain.answers(torch.tensor([row])).log_probs_BTK)


# -- kills, processes --------------------------------------------------------------------------------------------------

SHARD = 400 * (4 * K + 2)


def _write_and_die(folder: Path, after: int, where: str) -> None:
    """Write a cache, and be killed at the `after`th write to a shard (half of it done), or before the `after`th fsync.

    Two fsyncs are the request's; each shard has one before it is renamed, one after, and one of the journal.
    """
    calls = 0
    real_write, real_fsync = shards.write, os.fsync

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def do(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == after:
                if where == "write":
                    real_write(given[0], bytes(given[1][: len(given[1]) // 2]))  # half a shard
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given)

        return do

    if where == "write":
        shards.write = dying(real_write)
    else:
        cache_writer.os.fsync = dying(real_fsync)  # type: ignore[attr-defined]
    written(tiny_model("phimoe", seed=3), folder, shard_bytes=SHARD, batch_size=2)


@pytest.mark.parametrize(("where", "after"), [("write", 9), ("fsync", 5), ("fsync", 6), ("fsync", 7)])
def test_killed_and_restarted_it_has_the_same_bytes_and_redoes_one_shard(
    teacher: Any, tmp_path: Path, where: str, after: int, monkeypatch: pytest.MonkeyPatch
):
    whole = written(teacher, tmp_path / "whole", shard_bytes=SHARD, batch_size=2)
    assert len(whole.manifest.shards) > 2
    folder = tmp_path / "killed"
    assert in_child(_write_and_die, folder, after, where) == -signal.SIGKILL
    assert not folder.exists() and (tmp_path / "killed.unfinished").is_dir()
    with pytest.raises(ValueError, match=r"no teacher cache there; it was begun in .*killed.unfinished"):
        TeacherCache.open(folder)
    journal = tmp_path / "killed.unfinished" / "journal-000.jsonl"
    noted = journal.read_text().splitlines()
    kept = sum(json.loads(line)["answers"] for line in noted)
    answered = 0
    real = top_k_answers

    def counting(logits: torch.Tensor, *given: Any) -> Any:
        nonlocal answered
        answered += len(logits)
        return real(logits, *given)

    monkeypatch.setattr("slimmoe_hf.answers.top_k_answers", counting)
    again = written(teacher, folder, shard_bytes=SHARD, batch_size=2)
    assert files(again.folder) == files(whole.folder)
    longest_batch = 2 * 48
    assert answered <= whole.manifest.answers - kept + longest_batch
    assert len(noted) == 1 and 0 < kept < whole.manifest.answers
    again.check(rows=ROWS)


def test_a_journal_line_that_was_cut_off_is_no_shard(teacher: Any, tmp_path: Path):
    whole = written(teacher, tmp_path / "whole", shard_bytes=SHARD)
    place = tmp_path / "torn.unfinished"
    shutil.copytree(whole.folder, place)
    entries = whole.manifest.shards
    (place / "manifest.json").unlink()
    (place / "request.json").write_text(whole.spec.model_dump_json())
    for left in ("answers-000-00077.safetensors", "answers-005-00000.safetensors.tmp"):  # by more processes, once
        (place / left).write_bytes(b"half")
    (place / "journal-000.jsonl").write_text(entries[0].model_dump_json() + "\n" + entries[1].model_dump_json()[:-9])
    again = written(teacher, tmp_path / "torn", shard_bytes=SHARD)
    assert files(again.folder) == files(whole.folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"top_k": 4}, "top_k was 8, now it is 4"),
        ({"data": {"max_length": 64}}, "max_length was 48, now it is 64"),
        ({"temperatures": [2.0]}, r"temperatures was \[1.0\], now it is \[1.0, 2.0\]"),
        ({"kind": "hidden"}, "kind was top_k, now it is hidden"),
    ],
    ids=["top_k", "data", "temperature", "kind"],
)
def test_another_request_is_refused_with_the_difference(
    teacher: Any, tmp_path: Path, change: dict[str, Any], named: str
):
    place = tmp_path / "c.unfinished"
    place.mkdir()
    spec = written(teacher, tmp_path / "other", data={"max_length": 48}).spec
    (place / "request.json").write_text(spec.model_dump_json())
    with pytest.raises(ValueError, match=f"unfinished cache of another request: .*{named}"):
        written(teacher, tmp_path / "c", **{"data": {"max_length": 48}, **change})
    written(teacher, tmp_path / "c", **{"data": {"max_length": 48}, **change}, overwrite=True)


def test_another_teacher_is_refused_with_the_difference(teacher: Any, tmp_path: Path):
    place = tmp_path / "c.unfinished"
    place.mkdir()
    (place / "request.json").write_text(written(teacher, tmp_path / "other").spec.model_dump_json())
    with pytest.raises(ValueError, match="another request: fingerprint was "):
        written(tiny_model("phimoe", seed=9), tmp_path / "c")


KNOWN = {"weights_sha256": "1" * 64, "config_sha256": "2" * 64}


@pytest.mark.parametrize("now", [None, "b" * 40], ids=["offline", "a commit later"])
def test_the_same_weights_at_another_commit_are_the_same_teacher(now: str | None, cache: TeacherCache, tmp_path: Path):
    begun = cache.spec.model_copy(update={**KNOWN, "revision": "a" * 40})
    (tmp_path / "request.json").write_text(begun.model_dump_json())
    _refuse_other(tmp_path, begun.model_copy(update={"revision": now}))
    for changed in ({"weights_sha256": "3" * 64}, {"config_sha256": None}):
        with pytest.raises(ValueError, match=r"another request: revision was a.*_sha256 was "):
            _refuse_other(tmp_path, begun.model_copy(update={"revision": now, **changed}))
    unknown = begun.model_copy(update=dict.fromkeys(KNOWN))
    (tmp_path / "request.json").write_text(unknown.model_dump_json())
    with pytest.raises(ValueError, match="another request: revision was a"):
        _refuse_other(tmp_path, unknown.model_copy(update={"revision": now}))


def _write_in_two(folder: Path) -> None:
    cache = written(tiny_model("phimoe", seed=3), folder, shard_bytes=SHARD)
    assert cache.manifest.texts == len(ROWS)


@pytest.mark.slow  # two processes and their rendezvous, twice
def test_two_processes_answer_as_one_does(teacher: Any, tmp_path: Path):
    one = written(teacher, tmp_path / "one")
    assert in_two_processes(_write_in_two, tmp_path / "two") == [0, 0]
    two = TeacherCache.open(tmp_path / "two")
    two.check(rows=ROWS)
    assert {shard.file[:11] for shard in two.manifest.shards} == {"answers-000", "answers-001"}
    assert two.manifest.answers == one.manifest.answers
    assert_same_answers(one, two)
    assert not list(tmp_path.glob("*.unfinished")) and not list(two.folder.glob("*.lock"))


def test_one_process_finishes_what_two_began(teacher: Any, tmp_path: Path):
    """A shard of a second process, as it leaves it when both are killed: its texts are not answered again."""
    place = tmp_path / "c.unfinished"
    other = written(teacher, tmp_path / "other", ROWS.select(range(20)))
    place.mkdir()
    (place / "request.json").write_text(other.spec.model_dump_json())
    entry = other.manifest.shards[0].model_copy(update={"file": "answers-001-00000.safetensors"})
    shutil.copy(other.folder / other.manifest.shards[0].file, place / entry.file)
    (place / "journal-001.jsonl").write_text(entry.model_dump_json() + "\n")
    cache = written(teacher, tmp_path / "c")
    assert [shard.texts for shard in cache.manifest.shards] == [20, 20] and cache.manifest.texts == 40
    cache.check(rows=ROWS)


def test_two_writers_never_share_a_folder(teacher: Any, tmp_path: Path):
    spec = CacheSpec(teacher="t", tokenizer_sha256="", vocab_size=9, top_k=2)
    with CacheWriter(tmp_path / "c", spec), pytest.raises(ValueError, match="another process is writing there"):
        CacheWriter(tmp_path / "c", spec, overwrite=True)


# -- what is refused ---------------------------------------------------------------------------------------------------


def renamed_tokenizer() -> Any:
    changed = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = changed["model"]["vocab"]
    one, other = "A", "B"
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(changed)))


MISMATCHES: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"tokenizer": renamed_tokenizer()}, "it was made with another tokenizer"),
    (lambda: {"rows": [{"input_ids": ids[:20]} for ids in ROWS["input_ids"]]}, r"24 of 40 texts are not in it \(the first"),
    (lambda: {"rows": [ROWS[0], {"input_ids": [5, 6, 7]}]}, "the first is in row 1 and has 3 tokens.*max_length=48"),
    (lambda: {"temperature": 3.0}, "it serves temperature 1.0, 2.0, not 3.0: write it with --temperature 3.0"),
    (lambda: {"beta": 0.5}, "beta=0.5 weighs tokens by the student, and only 8 of"),
    (lambda: {"vocab_size": 300}, "its answers are over 320 ids and the student has 300"),
    (lambda: {"fingerprint": model_fingerprint(tiny_model("phimoe", seed=8))}, "it holds answers of another teacher"),
    (lambda: {"weights_sha256": "f" * 64}, "it holds answers of another teacher, .* not ffffffff"),
]  # fmt: skip


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    """A cache of a checkpoint on disk."""
    folder = tmp_path_factory.mktemp("named")
    source = save_tiny(folder / "teacher", seed=3)
    cache = written(str(source), folder / "c", temperatures=[2.0], data={"max_length": 48, "packing": False})
    assert cache.spec.weights_sha256 == weights_sha256(source)
    return cache


@pytest.mark.parametrize(("given", "message"), MISMATCHES, ids=[message[:24] for _, message in MISMATCHES])
def test_each_mismatch_is_named_before_training(given: Callable[[], dict[str, Any]], message: str, named: TeacherCache):
    fits = {
        "rows": ROWS, "tokenizer": tiny_tokenizer(), "temperature": 2.0, "vocab_size": VOCAB_SIZE,
        "weights_sha256": named.spec.weights_sha256, "fingerprint": model_fingerprint(tiny_model("phimoe", seed=3)),
    }  # fmt: skip
    named.check(**fits)
    with pytest.raises(ValueError, match=message) as raised:
        named.check(**{**fits, **given()})
    assert "\n" not in str(raised.value)


def test_all_mismatches_are_named_at_once(named: TeacherCache):
    with pytest.raises(ValueError) as raised:
        named.check(temperature=3.0, vocab_size=300, rows=[{"input_ids": [5, 6, 7]}])
    assert all(part in str(raised.value) for part in ("temperature", "320 ids", "1 of 1 texts"))


def spoil(folder: Path, name: str, how: str) -> None:
    file = folder / name
    if how == "missing":
        file.unlink()
    elif how == "short":
        file.write_bytes(file.read_bytes()[:-3])
    else:
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)


SHARD_NAME, ITS_HASH = "answers-000-00000.safetensors", "its hash is not the one in manifest.json"


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        (SHARD_NAME, "missing", f"{SHARD_NAME}: missing. Write the cache again"),
        (SHARD_NAME, "short", rf"{SHARD_NAME}: has \d+ bytes, not \d+"),
        (SHARD_NAME, "one bit", f"{SHARD_NAME}: {ITS_HASH}"),
        ("index.safetensors", "one bit", f"index.safetensors: {ITS_HASH}"),
        ("index.safetensors", "missing", "index.safetensors: missing"),
        ("index.safetensors", "short", "index.safetensors: truncated at"),
        ("manifest.json", "short", "manifest.json: damaged, or of another version"),
        ("manifest.json", "missing", "no teacher cache there. Write it with slimmoe cache write"),
    ],
)
def test_a_damaged_file_is_found(cache: TeacherCache, tmp_path: Path, name: str, how: str, message: str):
    shutil.copytree(cache.folder, tmp_path / "c")
    spoil(tmp_path / "c", name, how)
    with pytest.raises(ValueError, match=message):
        TeacherCache.open(tmp_path / "c").check(rows=ROWS)


def test_a_manifest_cannot_point_outside_the_folder(cache: TeacherCache, tmp_path: Path):
    shutil.copytree(cache.folder, tmp_path / "c")
    manifest = tmp_path / "c" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(SHARD_NAME, f"../{SHARD_NAME}"))
    with pytest.raises(ValueError, match="damaged"):
        TeacherCache.open(tmp_path / "c")


def test_a_full_disk_and_a_small_shard_say_so(teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"take .* bytes, more than a shard may have. Give a larger --shard-size"):
        written(teacher, tmp_path / "c", shard_bytes=10 * (4 * K + 2))
    spec = CacheSpec(teacher="t", tokenizer_sha256="", vocab_size=VOCAB_SIZE, top_k=K)
    monkeypatch.setattr("slimmoe_hf.cache_answers.psutil.disk_usage", lambda path: type("", (), {"free": 100}))
    tokens = sum(map(len, ROWS["input_ids"]))
    assert tokens * spec.bytes_per_answer > 100
    with pytest.raises(ValueError, match=r"the cache takes up to 0.0 GB and the disk has 0.0 GB free"):
        written(teacher, tmp_path / "d")


def test_answers_that_are_not_finite_are_not_stored(tmp_path: Path):
    teacher = tiny_model("mixtral")
    with torch.no_grad():
        teacher.lm_head.weight[7] = torch.nan
    with pytest.raises(ValueError, match=r"answers to a text that begins \[.*\] are not finite"):
        written(teacher, tmp_path / "c")


def test_the_vocabulary_can_be_cut_to_the_students(teacher: Any, tmp_path: Path):
    most = max(max(row) for row in ROWS["input_ids"]) + 1
    cache = written(teacher, tmp_path / "c", top_k=10**6, vocab_size=most)
    cache.check(vocab_size=most)
    row = ROWS[0]["input_ids"]
    found = cache.answers(torch.tensor([row]))
    expected = truth(teacher, row)[:, :most].log_softmax(-1).gather(-1, found.index_BTK[0, :-1])
    torch.testing.assert_close(found.log_probs_BTK[0, :-1].double(), expected, **FLOAT16)
    with pytest.raises(ValueError, match=f"token {most - 1} of the data is beyond the {most - 1} ids"):
        written(teacher, tmp_path / "d", vocab_size=most - 1)


def test_the_teacher_answers_in_eval_mode_and_is_left_as_it_was(cache: TeacherCache, tmp_path: Path):
    teacher = tiny_model("phimoe", seed=3).train()
    other = written(teacher, tmp_path / "c", temperatures=[2.0])
    assert teacher.training and files(other.folder) == files(cache.folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU for the teacher to run on")
@pytest.mark.parametrize("kind", ["top_k", "hidden"])
def test_a_teacher_on_a_gpu_answers_as_on_a_cpu(cache: TeacherCache, tmp_path: Path, kind: str):
    source = save_tiny(tmp_path / "teacher", seed=3)
    on_gpu = written(str(source), tmp_path / "c", kind=kind, dtype="float32", temperatures=[2.0])
    ids = torch.tensor([ROWS[0]["input_ids"]], device="cuda")
    if kind == "top_k":
        assert on_gpu.answers(ids).log_probs_BTK.device.type == "cuda"
        assert_same_answers(cache, on_gpu)
    else:
        with torch.no_grad():
            expected = tiny_model("phimoe", seed=3).model(input_ids=ids.cpu(), use_cache=False).last_hidden_state
        torch.testing.assert_close(on_gpu.hidden_states(ids)[0][0, :-1].float(), expected[0, :-1], rtol=1e-2, atol=1e-2)


def test_a_cache_goes_to_another_process_by_its_name(cache: TeacherCache):
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert_same_answers(pickle.loads(sent), cache)


def test_keys_do_not_depend_on_the_container():
    ids = [3, 70000, 5]
    keys = {text_key(ids), text_key(torch.tensor(ids)), text_key(np.array(ids, dtype=np.int64)), text_key(tuple(ids))}
    assert len(keys) == 1 and text_key([3, 70000]) not in keys
