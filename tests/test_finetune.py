"""Fine-tuning: it learns, by an adapter and in full; what it saves is what it measured; a killed run ends the same."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from hub_client import environment, serving
from peft import PeftModel
from runs import in_child
from safetensors.torch import load_file
from tiny import documents, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl import SFTConfig

from slimmoe_hf import cli, finetune_command
from slimmoe_hf.data import document_hash
from slimmoe_hf.families import shape_of
from slimmoe_hf.finetune import FinetuningTrainer, finetune
from slimmoe_hf.finetune_report import Finetuned
from slimmoe_hf.finetune_settings import Adapter, estimate, finetuning_arguments
from slimmoe_hf.loading import files_sha256, load_config, weights_sha256
from slimmoe_hf.tuning_data import read_tuning_data

LENGTH = 96
SETTINGS: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "gradient_checkpointing": False,
    "logging_steps": 2,
}  # fmt: skip
ONE_OF_EACH = ("phimoe", "qwen3_moe")


def chats(count: int = 60) -> list[dict[str, Any]]:
    """Questions with prose for answers, no two alike."""
    texts = (documents() * 2)[:count]
    return [
        {"messages": [
            {"role": "user", "content": f"{number}: {text[:20]}?"}, {"role": "assistant", "content": text[20:90]},
        ]}
        for number, text in enumerate(texts)
    ]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two families, and chats."""
    gc.freeze()  # every run collects twice, and would look through all that was ever imported
    folder = tmp_path_factory.mktemp("finetune")
    for family in ONE_OF_EACH:
        save_tiny(folder / family, family)
    write(folder / "chats.jsonl", chats())
    return folder


def tune(home: Path, output: Path, family: str = "phimoe", data: str = "chats.jsonl", **changes: Any) -> Finetuned:
    training = {**SETTINGS, **changes.pop("training", {})}
    return finetune(str(home / family), str(home / data), output, max_length=LENGTH, training=training, **changes)


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(2, 66).reshape(2, 32)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def heldout_loss(model: PreTrainedModel, rows: Dataset) -> float:
    """By plain transformers, chat by chat: mean cross-entropy of the assistant's tokens."""
    tokenizer, nats, count = tiny_tokenizer(), 0.0, 0
    for row in rows:
        made: Any = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, truncation=True, max_length=LENGTH
        )
        ids, mask = torch.tensor([made["input_ids"]]), torch.tensor(made["assistant_masks"][1:], dtype=torch.bool)
        with torch.no_grad():
            found = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        nats, count = nats - float(found[mask].sum()), count + int(mask.sum())
    return nats / count


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_an_adapter_learns_in_both_expert_matrices_and_merged_it_is_the_same_model(
    family: str, home: Path, tmp_path: Path
):
    report = tune(home, tmp_path / "adapter", family, adapter=Adapter(rank=4, router=True))
    assert report.test.after < report.test.before - 0.1
    merged = tune(home, tmp_path / "merged", family, adapter=Adapter(rank=4, router=True), merge=True)
    assert merged.test == report.test and merged.merged and not report.merged
    base = AutoModelForCausalLM.from_pretrained(home / family)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / family), tmp_path / "adapter")
    wanted = logits(with_adapter)
    assert float((logits(plain) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    before, after = base.state_dict(), plain.state_dict()
    learned = [name for name in before if not torch.equal(before[name], after[name])]
    experts = [name for name in before if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) >= 4 and set(experts) <= set(learned)
    assert all("experts" in name or "_proj.weight" in name or name in routers(base) for name in learned)
    rows = read_tuning_data(str(home / "chats.jsonl"), tiny_tokenizer()).test
    assert heldout_loss(base, rows) == pytest.approx(report.test.before, rel=1e-5)
    assert heldout_loss(plain, rows) == pytest.approx(report.test.after, rel=1e-5)


def routers(model: PreTrainedModel) -> set[str]:
    return {name for name in model.state_dict() if name.endswith((".router.weight", ".mlp.gate.weight"))}


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_all_weights_learn_and_reload_plainly(family: str, home: Path, tmp_path: Path):
    report = tune(home, tmp_path / "full", family, training={"learning_rate": 3e-3})
    assert report.test.after < report.test.before - 0.1 and report.adapter is None
    base, tuned = (AutoModelForCausalLM.from_pretrained(path) for path in (home / family, tmp_path / "full"))
    before, after = base.state_dict(), tuned.state_dict()
    assert [name for name in before if "experts" in name and torch.equal(before[name], after[name])] == []
    rows = read_tuning_data(str(home / "chats.jsonl"), tiny_tokenizer()).test
    assert heldout_loss(tuned, rows) == pytest.approx(report.test.after, rel=1e-5)
    assert tuned.config.use_cache and tuned.config.router_aux_loss_coef == base.config.router_aux_loss_coef
    assert len(AutoTokenizer.from_pretrained(tmp_path / "full")) == len(tiny_tokenizer())


def test_the_folder_holds_what_the_report_says(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(home.parent)
    here = Path(home.name)  # from another folder, `home/phimoe` would pass for an id on the Hub
    report = tune(here, tmp_path / "out", adapter=Adapter(rank=4), revision=None, training={"max_steps": 2})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "finetune.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]  # no checkpoints, nothing partial
    assert Finetuned.load(tmp_path / "out") == report
    assert report.output_sha256 == files_sha256([tmp_path / "out" / "adapter_model.safetensors"])
    assert report.weights_sha256 == weights_sha256(home / "phimoe")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(home / "phimoe") and settings["r"] == 4
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert report.trained_parameters == sum(weight.numel() for weight in weights)
    assert report.steps == 2 and 0 < report.tokens <= 2 * 8 * LENGTH and report.tokens_per_second
    assert [entry["step"] for entry in report.history if "loss" in entry] == [2]


def die_at_step_3(argv: list[str]) -> None:
    true = FinetuningTrainer.training_step

    def dying(self: Any, *arguments: Any) -> Any:
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(self, *arguments)

    FinetuningTrainer.training_step = dying  # type: ignore[method-assign]
    cli.main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--lora", "--rank", "4", "--router"], []], ids=["adapter", "all weights"])
def test_a_killed_run_continues_and_ends_with_the_same_weights(
    flags: list[str], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """PhiMoE's routing is sampled in training, so the noise has to come back too. Slow: three runs, one killed."""
    command = [
        "finetune", str(home / "phimoe"), "--data", str(home / "chats.jsonl"), "--max-length", str(LENGTH), "--max-steps",
        "5", "--save-steps", "2", "--learning-rate", "1e-2", "--per-device-train-batch-size", "4", *flags, "--output",
    ]  # fmt: skip
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    killed = [*command, str(tmp_path / "killed")]
    assert in_child(die_at_step_3, killed) == -signal.SIGKILL
    assert not (tmp_path / "killed").exists() and (tmp_path / "killed.checkpoints" / "checkpoint-2").is_dir()
    capsys.readouterr()
    assert cli.main([*killed, "--seed", "1"]) == 2
    assert "holds checkpoints of another request" in capsys.readouterr().err
    assert cli.main(killed) == 0
    assert "continues from checkpoint-2" in "".join(capsys.readouterr())
    whole, resumed = (Finetuned.load(tmp_path / name) for name in ("whole", "killed"))
    assert resumed.output_sha256 == whole.output_sha256
    assert (resumed.test, resumed.tokens, resumed.steps) == (whole.test, whole.tokens, whole.steps)
    assert not (tmp_path / "killed.checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "steps"), [(Adapter(rank=4), 3), (None, 5)], ids=["adapter", "all weights"])
def test_the_best_checkpoint_by_validation_is_what_is_saved(
    adapter: Adapter | None, steps: int, home: Path, tmp_path: Path
):
    """Steps that grow from nothing to far too large: the last one does harm. Slow: a checkpoint at every step."""
    settings = {
        "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": steps,
        "learning_rate": 8.0, "warmup_steps": 40,
    }  # fmt: skip
    report = tune(home, tmp_path / "out", adapter=adapter, training=settings)
    losses = [entry["eval_loss"] for entry in report.history if "eval_loss" in entry]
    assert len(losses) == steps and min(losses) < min(losses[0], losses[-1]) - 0.1
    assert report.validation.after == pytest.approx(min(losses), rel=1e-6)


def rows_of(home: Path, data: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[tuple[str, str]]:
    """What is read and what of it is learned, by row, of the training set as the trainer gets it."""
    caught: list[Dataset] = []

    class Caught(Exception):  # noqa: N818
        pass

    def catch(self: FinetuningTrainer, **_: Any) -> None:
        caught.append(self.train_dataset)  # type: ignore[arg-type]
        raise Caught

    monkeypatch.setattr(FinetuningTrainer, "train", catch)
    with pytest.raises(Caught):
        tune(home, home / "never", data=data.name, overwrite=True, **changes)
    shutil.rmtree(home / "never.checkpoints")
    tokenizer = tiny_tokenizer()
    return [
        (
            str(tokenizer.decode(row["input_ids"])),
            str(tokenizer.decode([token for token in row["labels"] if token != -100])),
        )
        for row in caught[0]
    ]


def test_of_a_chat_only_what_the_assistant_says_is_learned(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    turns = ["Hi.", "Hello!", "And you?", "Fine."]
    chat = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    rows = [{"messages": [{"role": "system", "content": str(i)}, *chat]} for i in range(60)]
    read = rows_of(home, write(home / "turns.jsonl", rows), monkeypatch, packing=False)
    assert {learned for _, learned in read} == {"Hello!<|end|>Fine.<|end|>"}
    assert all(whole.endswith("<|end|><|assistant|>Fine.<|end|>") for whole, _ in read)


def test_of_a_prompt_only_the_completion_is_learned(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"prompt": f"{i} and one is", "completion": f" {i + 1}."} for i in range(60)]
    read = rows_of(home, write(home / "sums.jsonl", rows), monkeypatch, packing=False)
    assert read and all(learned.strip() == f"{int(whole.split()[0]) + 1}.<|endoftext|>" for whole, learned in read)


def test_text_is_learned_whole_and_fills_its_rows(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"text": text[:300]} for text in documents()[:60]]
    read = rows_of(home, write(home / "text.jsonl", rows), monkeypatch)
    assert all(whole == learned for whole, learned in read)
    lengths = [len(tiny_tokenizer()(whole)["input_ids"]) for whole, _ in read[:-1]]
    assert sum(length == LENGTH for length in lengths) > 0.9 * len(lengths)  # a cut token may read as two


@pytest.mark.parametrize("family", ["phimoe", "mixtral", "olmoe", "qwen3_moe"])
def test_chats_side_by_side_in_a_row_do_not_see_each_other(family: str, tmp_path: Path):
    losses = []
    for packing in (True, False):
        settings = SFTConfig(
            str(tmp_path), bf16=False, use_cpu=True, report_to=[], packing=packing, eval_packing=packing, max_length=256,
            assistant_only_loss=True, router_aux_loss_coef=0.0, disable_tqdm=True, per_device_eval_batch_size=4,
        )  # fmt: skip
        rows = Dataset.from_list(chats(12))
        trainer = FinetuningTrainer(tiny_model(family), settings, train_dataset=rows, processing_class=tiny_tokenizer())
        metrics = trainer.evaluate(rows)
        losses.append((pytest.approx(metrics["eval_loss"], rel=1e-5), metrics["eval_tokens"]))
    assert losses[0][1] == losses[1][1] and losses[0][0].expected == losses[1][0]


def test_no_document_is_in_two_splits_and_held_out_text_is_not_trained_on(home: Path):
    tokenizer, data = tiny_tokenizer(), str(home / "chats.jsonl")
    read = read_tuning_data(data, tokenizer)
    hashes = [{document_hash(row) for row in rows} for rows in (read.train, read.validation, read.test)]
    assert sum(map(len, hashes)) == len(set.union(*hashes)) == 60
    few = read_tuning_data(data, tokenizer, tokens=200)
    assert 0 < len(few.train) < len(read.train) and len(few.test) == len(read.test)
    for split in ("validation", "test"):
        with pytest.raises(ValueError, match=f"--split {split}: that is held-out text"):
            read_tuning_data(data, tokenizer, split)


def test_a_template_that_marks_nobody_puts_the_loss_everywhere_and_says_so(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
    (tmp_path / "plain.jinja").write_text(template)
    settings = {"chat_template_path": str(tmp_path / "plain.jinja"), "max_steps": 1}
    report = tune(home, tmp_path / "out", adapter=Adapter(rank=4), training=settings)
    assert "does not mark what the assistant says, so the loss is on every token" in "".join(capsys.readouterr())
    assert report.loss_on == "everything"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def no_template(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "model" / "chat_template.jinja"
    file.unlink()


def dense(home: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "model")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=320
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")


def damaged(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def data_of(*rows: dict[str, Any]) -> Any:
    def spoil(home: Path, tmp_path: Path) -> None:
        write(tmp_path / "data.jsonl", [*rows])

    return spoil


def as_it_is(home: Path, tmp_path: Path) -> None:
    """Nothing is wrong with the files."""


TURN = {"role": "user", "content": "Hello"}
MANY = [{"messages": [{**TURN, "content": str(i)}]} for i in range(60)]


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (as_it_is, ["--rank", "4"], "--rank is about an adapter: give --lora too"),
        (as_it_is, ["--merge"], "--merge is about an adapter"),
        (as_it_is, ["--no-experts"], "--no-experts is about an adapter"),
        (as_it_is, ["--lora", "--rank", "0"], "rank=0: give 1 or more"),
        (as_it_is, ["--lora", "--alpha", "-1"], "alpha=-1: give 1 or more"),
        (as_it_is, ["--dtype", "int8"], "--dtype int8: unknown; use float32 or bfloat16"),
        (as_it_is, ["--max-length", "1"], "max_length=1: give 2 or more"),
        (as_it_is, ["--max-length", "4"], "no document has a token to learn from among its first 4"),
        (as_it_is, ["--max-length", "4", "--no-packing"], "no document has a token to learn from among its first 4"),
        (as_it_is, ["--max-length", "512"], "max_length=512 is more than the 256 positions"),
        (as_it_is, ["--optim", "adamm"], "adamm"),
        (as_it_is, ["--split", "test"], "--split test: that is held-out text"),
        (as_it_is, ["--per-device-train-batch-size", "0"], "per_device_train_batch_size=0 should be 1 or more"),
        (as_it_is, ["--config", "aux.yaml"], "TRL has no load-balancing loss for a phimoe model"),
        (as_it_is, ["--config", "template.yaml"], "chat_template_path=nowhere.jinja: no such file"),
        (dense, [], "'llama' is not a Mixture-of-Experts family"),
        (dense, ["--lora"], "'llama' is not a Mixture-of-Experts family"),
        (damaged, [], "model.safetensors"),
        (no_template, [], "the model's tokenizer has no chat template"),
        (data_of({"question": "?"}), [], "no column named text, messages, or prompt + completion"),
        (data_of({"prompt": "?"}), [], "no column named text, messages, or prompt + completion"),
        (data_of({"messages": [TURN]}), [], "split holds no text"),
        (data_of(*MANY), [], "row 1: the chat has no turn of the assistant"),
        (data_of(*({"messages": [{"role": "user", "content": [i]}]} for i in range(60))), [], "should be text, found list"),
        (data_of(*({"messages": [{"text": str(i)}]} for i in range(60))), [], "should have a role"),
        (data_of(*({"messages": str(i)} for i in range(60))), [], "messages should be a list of turns"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    spoil: Any, flags: list[str], message: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "phimoe", tmp_path / "model")
    shutil.copy(home / "chats.jsonl", tmp_path / "data.jsonl")
    (tmp_path / "aux.yaml").write_text("router_aux_loss_coef: 0.01")
    (tmp_path / "template.yaml").write_text("chat_template_path: nowhere.jinja")
    spoil(home, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = ["finetune", "model", "--data", "data.jsonl", "--output", "out", "--max-steps", "1", *flags]
    assert cli.main([*given, *([] if "--max-length" in flags else ["--max-length", "64"])]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], lines
    assert sorted(tmp_path.rglob("*")) == before


RUNS = "import sys; from slimmoe_hf.cli import main; sys.exit(main())"
LOADS = (
    "import sys; from peft import AutoPeftModelForCausalLM as Auto; from slimmoe_hf.families import moe_layers\n"
    "model = Auto.from_pretrained(sys.argv[1]); assert len(moe_layers(model.get_base_model())) == 2"
)


@pytest.mark.slow
def test_an_adapter_of_a_hub_model_names_the_hub_model(home: Path, tmp_path: Path):
    """Slow: two processes with a Hub of their own; the second fetches the base that the adapter names."""
    save_tiny(tmp_path / "hub" / "someone" / "tiny-moe")
    flags = ["--revision", "main", "--data", home / "chats.jsonl", "--max-length", LENGTH, "--max-steps", 1, "--lora"]
    command = ["finetune", "someone/tiny-moe", *flags, "--output", tmp_path / "out"]
    with serving(tmp_path / "hub") as endpoint:
        for code, arguments, cache in ((RUNS, command, "one"), (LOADS, [tmp_path / "out"], "another")):
            done = subprocess.run(
                [sys.executable, "-c", code, *map(str, arguments)], env=environment(endpoint, tmp_path / cache),
                capture_output=True, text=True, timeout=200,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-2000:]
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("someone/tiny-moe", "main")


def test_an_optimizer_that_is_not_installed_is_one_line_before_any_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("slimmoe_hf.finetune_settings.is_bitsandbytes_available", lambda: False)
    for optim in ("adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit", "paged_lion_32bit"):
        with pytest.raises(ValueError, match=f"--optim {optim} needs bitsandbytes: pip install bitsandbytes"):
            finetune("nowhere/at-all", "nothing.jsonl", tmp_path / "out", training={"optim": optim})


def test_what_cannot_fit_is_refused_with_the_settings_to_lower(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=500_000))
    with pytest.raises(ValueError, match=r"this machine has 0\.00 GiB free\. It cannot fit") as refusal:
        tune(home, tmp_path / "out")
    assert all(
        name in str(refusal.value)
        for name in ("--lora", "--dtype", "--optim adafactor", "--per-device-train-batch-size", "--max-length")
    )
    with pytest.raises(ValueError, match="It cannot fit") as refusal:
        tune(home, tmp_path / "out", adapter=Adapter(), dtype="bfloat16", training={"per_device_train_batch_size": 1})
    assert str(refusal.value).endswith("change gradient_checkpointing, --max-length.")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_adapted_is_not_counted(home: Path):
    config = load_config(home / "phimoe")
    arguments = finetuning_arguments({}, "unused", LENGTH, True, 0, True)
    whole, attention = (
        estimate(config, arguments, Adapter(experts=experts), "float32").parts["adapter"] for experts in (True, False)
    )
    shape = shape_of(config)
    of_one_expert = 16 * (3 * shape.expert_width + 2 * shape.hidden_size) * 4  # rank 16, in float32
    assert whole - attention == shape.layers * shape.num_experts * of_one_expert


def test_nothing_is_overwritten_unless_asked(home: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        tune(home, tmp_path / "out")
    tune(home, tmp_path / "out", adapter=Adapter(rank=4), overwrite=True, training={"max_steps": 1})
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_the_flags_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen: dict[str, Any] = {}
    monkeypatch.setattr(finetune_command, "run", lambda *args, **kwargs: seen.update(kwargs, args=args))
    monkeypatch.setattr(finetune_command, "shown", lambda report: [])
    given = [
        "finetune", "m", "--revision", "r", "--data", "d", "--data-revision", "v", "--split", "s", "--lora", "--rank", "8",
        "--alpha", "9", "--router", "--no-experts", "--merge", "--dtype", "bfloat16", "--max-length", "77", "--no-packing",
        "--tokens", "5", "--seed", "3", "--overwrite", "--optim", "adafactor", "--output", str(tmp_path / "o"),
    ]  # fmt: skip
    assert cli.main(given) == 0
    assert seen == {
        "args": ("m", "d", tmp_path / "o"), "revision": "r", "data_revision": "v", "split": "s",
        "adapter": Adapter(rank=8, alpha=9, experts=False, router=True), "merge": True, "dtype": "bfloat16",
        "max_length": 77, "packing": False, "tokens": 5, "seed": 3, "overwrite": True, "training": {"optim": "adafactor"},
    }  # fmt: skip
