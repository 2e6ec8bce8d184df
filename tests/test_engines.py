"""Which engines load a checkpoint: rules that say what was seen, exports that lose nothing, and never a "loads" unread."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import FAST, model_and_stats, rows, saved
from engine_variants import IDS, ORDER, VARIANTS, effects, save_expected, save_variant
from safetensors.torch import load_file
from tiny import FAMILY_NAMES, save_tiny, tiny_batch, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimmoe_hf import cli, commands, parsers_export
from slimmoe_hf.disk import auto_class
from slimmoe_hf.engine_form import write_engine_form
from slimmoe_hf.engine_report import assess, engine_lines, engine_section
from slimmoe_hf.engines import ENGINES
from slimmoe_hf.factorization import factor_experts
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.loading import files_sha256

PACKAGES = {
    "transformers4": ("transformers==4.57.6", "tokenizers==0.22.*", "huggingface-hub==0.36.*"),
    "mlx": ("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2", "sentencepiece", "protobuf"),
}
"""What runs an engine beside what is installed; SLIMMOE_TRANSFORMERS4 and SLIMMOE_MLX name a Python that has it instead."""
LLAMA_CPP = "SLIMMOE_LLAMA_CPP"


@pytest.fixture(autouse=True)
def as_loud_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` silences this whole process, which other tests listen to."""
    monkeypatch.setattr(commands, "be_quiet", lambda: None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant as `slimmoe export --for` writes it, and what each is to compute."""
    folder, logits = tmp_path_factory.mktemp("engines"), {}
    for name in VARIANTS:
        logits[name] = save_variant(name, folder / "source")
        write_engine_form(folder / "source", folder / name)
        shutil.rmtree(folder / "source")
    save_expected(folder, logits)
    return folder


def verdicts(folder: Path) -> dict[str, str]:
    return {verdict.engine: verdict.effect for verdict in assess(folder)}


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a command that must fail."""
    assert cli.main(list(argv)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_the_rules_say_what_the_engines_were_seen_to_do(exported: Path):
    assert {name: verdicts(exported / name) for name in VARIANTS} == {name: effects(name) for name in VARIANTS}


def test_every_rule_names_its_source_and_every_engine_when_it_was_read():
    assert tuple(ENGINES) == parsers_export.ENGINES == ORDER
    for engine in ENGINES.values():
        assert engine.version and engine.read and engine.package
        assert engine.families.keys() <= FAMILIES.keys()
        rules = [rule for family in engine.families.values() for rule in family]
        assert all(".py" in rule.source or ".cpp" in rule.source for rule in rules)
    assert not ENGINES["vllm"].runs  # it was read and never run


@torch.no_grad()
def test_an_export_of_fused_experts_is_the_same_function_and_leaves_its_source_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = tiny_model("phimoe", attention_bias=False, lm_head_bias=False)
    source, output = tmp_path / "source", tmp_path / "output"
    model.save_pretrained(source, save_original_format=False)
    tiny_tokenizer().save_pretrained(source)
    before = {file.name: files_sha256([file]) for file in source.iterdir()}
    assert set(verdicts(source).values()) == {"no"}  # none reads fused experts of this family
    assert cli.main(["export", str(source), "--for", "mlx", "--output", str(output)]) == 0
    assert "mlx-lm 0.32.2" in capsys.readouterr().out and verdicts(output)["mlx"] == "loads"
    assert before == {file.name: files_sha256([file]) for file in source.iterdir()}
    reloaded, found = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(reloaded.eval()(**tiny_batch()).logits, model(**tiny_batch()).logits)
    weights = load_file(output / "model.safetensors")
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in weights and not weights["lm_head.bias"].any()
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["PhiMoEForCausalLM"] and config["use_cache"] is True
    assert config["rope_theta"] == 10000.0 and config["rope_scaling"] is None and config["torch_dtype"] == "float32"
    assert json.loads((output / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "def f(): <|user|>"
    assert (
        AutoTokenizer.from_pretrained(output)(text).input_ids == AutoTokenizer.from_pretrained(source)(text).input_ids
    )


@pytest.mark.parametrize("family", rows(FAST))
@torch.no_grad()
def test_an_export_of_any_family_is_what_plain_transformers_wants(family: str, tmp_path: Path):
    model = model_and_stats(family)[0]
    write_engine_form(saved(tmp_path / "source", model), tmp_path / "exported")
    kwargs: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32}
    reloaded, info = auto_class(model.config).from_pretrained(tmp_path / "exported", **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(reloaded.eval()(**tiny_batch()).logits, model(**tiny_batch()).logits)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_an_export_mends_what_the_report_says_it_mends(family: str, tmp_path: Path):
    source = save_tiny(tmp_path / "source", family)
    values = json.loads((source / "config.json").read_text())
    silent = ("architectures", "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "norm_topk_prob")
    values |= {"rope_theta": values["rope_parameters"]["rope_theta"]}
    (source / "config.json").write_text(json.dumps({key: values[key] for key in values if key not in silent}))
    promised = {verdict.engine: verdict.exported for verdict in assess(source)}
    assert promised["mlx"] == promised["transformers4"] == "loads" != verdicts(source)["transformers4"]
    write_engine_form(source, tmp_path / "output")
    assert verdicts(tmp_path / "output") == promised


@pytest.mark.parametrize("begins", [True, False])
def test_an_exported_tokenizer_says_what_it_begins_texts_with(begins: bool, tmp_path: Path):
    save_tiny(tmp_path / "source", "mixtral")
    tokenizer = copy.deepcopy(tiny_tokenizer())
    token, ids = str(tokenizer.bos_token), tokenizer("a").input_ids
    assert ids[0] != tokenizer.bos_token_id
    if begins:
        pieces = [(token, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=pieces)
    tokenizer.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "LlamaTokenizer"}))
    assert verdicts(tmp_path / "source")["transformers4"] == "differs"
    write_engine_form(tmp_path / "source", tmp_path / "output")
    assert verdicts(tmp_path / "output")["transformers4"] == "loads"
    said = json.loads((tmp_path / "output" / "tokenizer_config.json").read_text())
    assert (said["add_bos_token"], said["add_eos_token"]) == (begins, False)


def test_an_unread_family_is_not_known_to_load_anywhere_and_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_tiny(tmp_path / "switch", "switch_transformers")
    capsys.readouterr()  # of saving
    assert set(verdicts(tmp_path / "switch").values()) == {"not known"}
    (line, *_) = engine_lines(assess(tmp_path / "switch"))
    assert line.endswith("not run): not known: no rules are written for switch_transformers with vLLM")
    line = error_of(capsys, "export", str(tmp_path / "switch"), "--for", "vllm", "--output", str(tmp_path / "output"))
    assert "no rules are written" in line and not (tmp_path / "output").exists()


@torch.no_grad()
def test_factored_experts_load_nowhere_and_are_exported_as_a_stock_model(tmp_path: Path):
    model = tiny_model("mixtral")
    factor_experts(model, 8)
    model.save_pretrained(tmp_path / "factored")
    tiny_tokenizer().save_pretrained(tmp_path / "factored")
    (only,) = {(verdict.effect, verdict.reasons[0].mended) for verdict in assess(tmp_path / "factored")}
    assert only == ("no", True)
    output = tmp_path / "output"
    assert cli.main(["export", str(tmp_path / "factored"), "--for", "transformers4", "--output", str(output)]) == 0
    assert verdicts(output)["transformers4"] == "loads" and {entry.name for entry in tmp_path.iterdir()} == {
        "factored",
        "output",
    }
    expected, got = (
        model(**tiny_batch()).logits,
        AutoModelForCausalLM.from_pretrained(output).eval()(**tiny_batch()).logits,
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_factored_experts_of_an_unread_family_load_nowhere_until_they_are_made_stock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = tiny_model("qwen2_moe")
    factor_experts(model, 8)
    model.save_pretrained(tmp_path / "factored")
    capsys.readouterr()  # of saving
    assert set(verdicts(tmp_path / "factored").values()) == {"no"}
    line = error_of(capsys, "export", str(tmp_path / "factored"), "--for", "vllm", "--output", str(tmp_path / "output"))
    assert "only slimmoe_hf loads; slimmoe export --form dense makes it a stock model" in line
    assert not (tmp_path / "output").exists()


def test_bad_input_is_one_line_and_nothing_is_written(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    heads, plain, output = str(exported / "phimoe-heads"), str(exported / "mixtral"), str(tmp_path / "output")
    line = error_of(capsys, "export", heads, "--for", "mlx", "--output", output)
    assert "heads to be D/H wide, 64/2" in line and "Nothing was written" in line
    assert "not both" in error_of(capsys, "export", plain, "--for", "mlx", "--form", "dense", "--output", output)
    assert "needs output" in error_of(capsys, "export", plain, "--for", "mlx")
    assert "needs --for" in error_of(capsys, "export", plain, "--output", output)
    assert "--json is for the report" in error_of(capsys, "export", plain, "--for", "mlx", "--output", output, "--json")
    assert "no such folder" in error_of(capsys, "export", str(tmp_path / "none"))
    assert "invalid choice" in error_of(capsys, "export", plain, "--for", "ollama", "--output", output)
    assert "is the model itself" in error_of(capsys, "export", plain, "--for", "mlx", "--output", plain, "--overwrite")
    assert not list(tmp_path.iterdir())
    Path(output).mkdir()
    assert "--overwrite" in error_of(capsys, "export", plain, "--for", "mlx", "--output", output)
    assert not list(Path(output).iterdir())


def test_the_report_says_why_with_its_source_and_what_was_not_run(exported: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["export", str(exported / "phimoe-heads"), "--json"]) == 0
    said: dict[str, Any] = {entry["engine"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert said["vllm"]["effect"] == "loads" and said["vllm"]["runs"] == []
    (reason,) = said["mlx"]["reasons"]
    assert "pruned" in reason["text"] and reason["source"].startswith("mlx_lm/models/phimoe.py")
    fp8 = "expert width 96, query heads' width 32, key heads' width 16: no multiples of 128; it refuses to load them"
    assert any("FP8" in text and fp8 in text for text in said["vllm"]["quantised"])
    assert any(
        "K-quants" in text and "256; such weights take another" in text for text in said["llama.cpp"]["quantised"]
    )
    assert cli.main(["export", str(exported / "phimoe-heads")]) == 0
    shown = capsys.readouterr().out
    assert "vLLM 0.33.0: loads\n  - by rules" in shown and "mlx-lm 0.32.2: does not load\n" in shown
    assert "not run with any model" in shown and max(map(len, shown.splitlines())) <= 120
    assert cli.main(["export", str(exported / "olmoe")]) == 0
    assert "llama.cpp 0c1e57098: loads on a condition\n" in capsys.readouterr().out
    section = engine_section(assess(exported / "phimoe-heads"))
    assert "| vLLM 0.33.0 | loads |" in section and "pruned" in section


def results(engine: str, folder: Path, command: list[str], path: str) -> dict[str, Any]:
    """What `engine_runs.py` says, in a Python that has the engine."""
    script, environment = Path(__file__).with_name("engine_runs.py"), {**os.environ, "PYTHONPATH": path}
    ran = subprocess.run(
        [*command, str(script), engine, str(folder), json.dumps(IDS)], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return dict(json.loads(ran.stdout.strip().splitlines()[-1]))


@pytest.mark.slow  # installs the engine, where no environment with it is named
@pytest.mark.parametrize("engine", PACKAGES)
def test_an_engine_does_what_its_rules_say(engine: str, exported: Path, tmp_path: Path):
    command, path = [os.environ.get(f"SLIMMOE_{engine.upper()}", "")], ""
    if not command[0]:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "engine")]
        done = subprocess.run([*install, *PACKAGES[engine]], capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"{engine} cannot be installed here: {done.stderr.strip()[-200:]}")
        command, path = [sys.executable], str(tmp_path / "engine")
    found = results(engine, exported, command, path)
    seen = {name: "no" if isinstance(got, str) else "loads" if got < 1e-3 else "differs" for name, got in found.items()}
    assert seen == {name: effects(name)[engine] for name in VARIANTS}, found
    if engine == "transformers4":
        assert max(got for got in found.values() if not isinstance(got, str)) < 1e-5


@pytest.mark.slow  # reads and writes every variant with another program
def test_llama_cpp_converts_what_its_rules_let_through(exported: Path):
    if LLAMA_CPP not in os.environ:
        pytest.skip(f"{LLAMA_CPP} does not name the folder of llama.cpp with its convert_hf_to_gguf.py")
    tree = os.environ[LLAMA_CPP]
    found = results("llama.cpp", exported, [sys.executable], os.pathsep.join((tree, f"{tree}/gguf-py")))
    refused = {name for name, got in found.items() if isinstance(got, str)}
    assert refused <= {name for name in VARIANTS if effects(name)["llama.cpp"] == "no"}, found
    assert "qwen3_moe-dense" in refused  # others are refused by what loads the file
