"""`slimmoe cache` as a user meets it: what it leaves, what it prints, and one line for what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_tokenizer, write_text

from slimmoe_hf import cli, commands
from slimmoe_hf.cache import TeacherCache
from slimmoe_hf.data import load_documents, take_tokens, tokenize
from slimmoe_hf.loading import weights_sha256
from slimmoe_hf.memory import cache_bytes_per_token


@pytest.fixture(autouse=True)
def as_loud_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` silences this whole process, which other tests listen to."""
    monkeypatch.setattr(commands, "be_quiet", lambda: None)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache-command")
    save_tiny(folder / "teacher")
    write_text(folder / "text.jsonl")
    assert cli.main([*write(folder), "--output", str(folder / "answers")]) == 0
    return folder


def write(home: Path, *more: str) -> list[str]:
    data = ["--data", str(home / "text.jsonl"), "--max-length", "64", "--tokens", "3000"]
    return ["cache", "write", str(home / "teacher"), *data, *more]


def inspected(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["cache", "inspect", str(folder), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def one_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one `error:` line of a command that must fail with exit code 2; the progress of the work before is no error."""
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_inspect_says_what_was_made_of_what(home: Path, capsys: pytest.CaptureFixture[str]):
    found = inspected(capsys, home / "answers", "--verify")
    assert found["teacher"] == str(home / "teacher") and found["weights_sha256"] == weights_sha256(home / "teacher")
    assert found["data"] == {
        "data": str(home / "text.jsonl"), "data_revision": None, "split": "train", "max_length": 64, "packing": True,
        "tokens": 3000, "seed": 0,
    }  # fmt: skip
    assert found["tokens"] == 64 * found["texts"] >= 2900 and found["answers"] == 63 * found["texts"]
    assert found["bytes_per_answer"] == cache_bytes_per_token(320) == 64 * 4 + 2
    assert found["bytes"] == sum(file.stat().st_size for file in (home / "answers").iterdir())
    assert found["bytes_per_token"] == found["bytes"] / found["tokens"]
    assert 0 < found["mean_tail_mass"] < 1 and found["hashes_verified"]
    assert cli.main(["cache", "inspect", str(home / "answers")]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("data: max_length", "mean_tail_mass", "bytes_per_token"))
    assert not list(home.glob("*.unfinished"))


def test_it_answers_the_rows_that_distill_trains_on(home: Path):
    tokenizer = tiny_tokenizer()
    documents = load_documents(str(home / "text.jsonl"), "train")
    rows = tokenize(take_tokens(documents.shuffle(seed=0), 3000, tokenizer), tokenizer, 64)
    cache = TeacherCache.open(home / "answers")
    cache.check(rows=rows, tokenizer=tokenizer, weights_sha256=weights_sha256(home / "teacher"))
    with pytest.raises(ValueError, match="another max_length, packing or seed"):
        cache.check(rows=tokenize(documents, tokenizer, 64, packing=False))


def test_flags_reach_the_cache(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--top-k", "4", "--temperature", "2", "4", "--shard-size", "3kB", "--no-packing", "--seed", "3"]
    flags += ["--dtype", "bfloat16", "--batch-size", "3", "--vocab-size", "319"]
    tokenizer, texts = tiny_tokenizer(), (home / "text.jsonl").read_text().splitlines(keepends=True)
    known = [text for text in texts if 319 not in tokenizer(json.loads(text)["text"]).input_ids]  # of --vocab-size
    (tmp_path / "text.jsonl").write_text("".join(known))
    command = [*write(home, *flags), "--output", str(tmp_path / "c")]
    command[command.index("--data") + 1] = str(tmp_path / "text.jsonl")
    assert cli.main(command) == 0
    found = inspected(capsys, tmp_path / "c")
    assert found["top_k"] == 4 and found["temperatures"] == [1.0, 2.0, 4.0] and found["shards"] > 1
    assert found["bytes_per_answer"] == 4 * 4 + 3 * 2 and found["computed"] == "bfloat16" and found["vocab_size"] == 319
    assert found["data"]["packing"] is False and found["data"]["seed"] == 3
    assert max(file.stat().st_size for file in (tmp_path / "c").glob("answers-*")) < 4_000
    assert cli.main([*write(home, "--kind", "hidden"), "--output", str(tmp_path / "h")]) == 0
    found = inspected(capsys, tmp_path / "h")
    assert found["kind"] == "hidden" and found["bytes_per_answer"] == 2 * 32
    assert TeacherCache.open(tmp_path / "h").head()[0].shape == torch.Size([320, 32])


def broken_shard(folder: Path) -> None:
    file = next(folder.glob("answers-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def no_shard(folder: Path) -> None:
    next(folder.glob("answers-*")).unlink()


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken_shard, "answers-000-00000.safetensors: its hash is not the one in manifest.json"),
        (no_shard, "answers-000-00000.safetensors: missing. Write the cache again"),
        (no_manifest, "no teacher cache there. Write it with slimmoe cache write"),
    ],
)
def test_a_damaged_cache_is_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], message: str
):
    shutil.copytree(home / "answers", tmp_path / "c")
    spoil(tmp_path / "c")
    assert message in one_error(capsys, "cache", "inspect", str(tmp_path / "c"), "--verify")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "cache takes write and a MODEL, or inspect and the folder of a cache"),
        (["show", "c"], "cache takes write and a MODEL, or inspect and the folder of a cache"),
        (["write", "m"], "cache needs data, output (see slimmoe cache --help)"),
        (["write", "./nowhere", "--data", "d", "--output", "o"], "./nowhere: no such folder"),
        (["write", "m", "--data", "d", "--output", "o", "--shard-size", "big"], "--shard-size big: not a size"),
        (["write", "m", "--data", "d", "--output", "o", "--dtype", "int8"], "--dtype int8: unknown; use float32"),
        (["write", "m", "--kind", "logits"], "--kind: invalid choice: 'logits'"),
        (["inspect", "nowhere"], "nowhere: no teacher cache there"),
        (["inspect", "."], ".: no teacher cache there"),
    ],
)
def test_bad_arguments_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert message in one_error(capsys, "cache", *argv)


def test_settings_out_of_range_and_what_is_there_are_one_line(home: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(home.rglob("*"))
    for flags in (["--top-k", "1"], ["--batch-size", "0"], ["--temperature", "0"]):
        line = one_error(capsys, *write(home, *flags), "--output", str(home / "bad"))
        assert "top_k at least 2 (the likeliest and the next token), the others positive" in line
    assert "answers: is there already. Give another --output, or --overwrite" in one_error(
        capsys, *write(home), "--output", str(home / "answers")
    )
    assert sorted(home.rglob("*")) == before


def test_another_request_is_one_line_that_names_the_difference(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place = tmp_path / "c.unfinished"
    place.mkdir()
    (place / "request.json").write_text(TeacherCache.open(home / "answers").spec.model_dump_json())
    again = [*write(home), "--output", str(tmp_path / "c")]
    line = one_error(capsys, *again, "--top-k", "8", "--seed", "1")
    assert "c.unfinished: holds an unfinished cache of another request: " in line
    assert "top_k was 64, now it is 8" in line and "seed was 0, now it is 1" in line
    assert "begun in" in one_error(capsys, "cache", "inspect", str(tmp_path / "c"))
    assert cli.main(again) == 0
    assert not place.exists()
    finished = {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()}
    assert finished == {file.name: file.read_bytes() for file in (home / "answers").iterdir()}
