"""What Switch Transformers has that no decoder-only family has: two stacks, capacity, plain units, labels of their own."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from test_checkpoint import same_tensors, saved
from test_surgery import deselected, random_plan
from tiny import NUM_EXPERTS, documents, save_tiny, tiny_batch, tiny_seq2seq, tiny_tokenizer, write_text
from torch.testing import assert_close
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from slimmoe_hf import cli, commands
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.callbacks import SlimmingCallback
from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.data import batches, load_documents, tokenize_pairs
from slimmoe_hf.families import FAMILIES, SWITCH, layer_views, moe_layers, shape_of
from slimmoe_hf.loading import load_model
from slimmoe_hf.merged_forms import share_merged
from slimmoe_hf.merging import plan_merge
from slimmoe_hf.plan import CompressionPlan, Target, make_plan, validate_target
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.student_training import save_checkpoint
from slimmoe_hf.surgery import apply_plan


def question(rows: int = 4, source: int = 20, target: int = 9) -> dict[str, torch.Tensor]:
    """What an encoder-decoder is given: sources and answers of unequal length."""
    ids, labels = tiny_batch(rows, source)["input_ids"], tiny_batch(rows, target, seed=1)["labels"]
    mask = torch.ones_like(ids)
    mask[1, -7:], labels[2, -4:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pairs(path: Path) -> Path:
    """Prompts and completions from the standard library's reference."""
    rows = [{"prompt": text[:90], "completion": text[90:130]} for text in documents()[:80]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cut(batch: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    number = len(batch["input_ids"])
    return [{name: value[i : i + rows] for name, value in batch.items()} for i in range(0, number, rows)]


def scored(model, batches, **options):
    return collect_stats(model, batches, progress=False, **options)


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_layers_are_numbered_through_both_stacks():
    model = tiny_seq2seq(num_layers=4, num_sparse_encoder_layers=2)
    assert [index for index, _, _ in moe_layers(model)] == [1, 3, 5]
    assert shape_of(model.config).layers == len(layer_views(model)) == 6
    assert layer_views(model)[5].experts is model.decoder.block[1].layer[2].mlp.experts
    assert layer_views(model)[4].attention is model.decoder.block[0].layer[0].SelfAttention


def test_statistics_do_not_depend_on_how_the_batch_was_cut():
    model, batch = tiny_seq2seq(expert_capacity=3), question()
    whole, single = scored(model, [batch], expert_outputs=True), scored(model, cut(batch, 1), expert_outputs=True)
    for name, tensor in whole.tensors().items():
        assert rel(single.tensors()[name], tensor) < 1e-4, name
    assert whole.meta == single.meta and whole.meta.sequences == 4
    assert whole.meta.tokens == 4 * 20 - 7 + 4 * 9 - 4


def test_padding_on_either_side_counts_for_nothing():
    model, batch = tiny_seq2seq(expert_capacity=3), question()
    pad = torch.nn.functional.pad
    padded = {
        "input_ids": pad(batch["input_ids"], (0, 6), value=1),
        "attention_mask": pad(batch["attention_mask"], (0, 6)),
        "labels": pad(batch["labels"], (0, 5), value=-100),
    }
    plain, with_padding = (scored(model, [each], expert_outputs=True) for each in (batch, padded))
    for name, tensor in plain.tensors().items():
        assert rel(with_padding.tensors()[name], tensor) < 1e-4, name
    assert plain.meta == with_padding.meta
    room = scored(tiny_seq2seq(expert_capacity=64), [padded])
    assert room.tokens_LE.sum(-1).tolist() == [4 * 20 - 7, 4 * 9 - 4]


def test_tokens_beyond_an_experts_capacity_are_not_routed():
    batch = question()
    tokens = [scored(tiny_seq2seq(expert_capacity=capacity), [batch]).tokens_LE for capacity in (64, 2)]
    assert tokens[0].sum(-1).tolist() == [4 * 20 - 7, 4 * 9 - 4], "every token that is no padding, where there is room"
    assert tokens[1].max() <= 2 * 4 and tokens[1].sum() < tokens[0].sum()


@pytest.mark.parametrize("capacity", [64, 2])
def test_the_sweep_computes_what_the_model_does_and_leaves_it_as_it_was(capacity, monkeypatch):
    """Logits within the sweep are the stock ones, dropped tokens included."""
    model, batch, seen = tiny_seq2seq(expert_capacity=capacity), question(), []
    before, expected = copy.deepcopy(model.state_dict()), model(**batch).logits
    hook = model.register_forward_hook(lambda _m, _i, output: seen.append(output.logits))
    scored(model, [batch])
    hook.remove()
    assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match="a batch has no labels"):
        scored(tiny_seq2seq(), [{"input_ids": question()["input_ids"]}])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(expert_width=16), "expert_width=16 cannot be had for switch_transformers: Switch has one d_ff"),
        (
            Target(kv_groups=2),
            "kv_groups=2 cannot be had for switch_transformers: all blocks of Switch add the position",
        ),
        (Target(num_experts=0), "num_experts=0 is not between the 1 that a token is sent to"),
    ],
    ids=str,
)
def test_what_cannot_be_cut_is_refused_with_the_reason(target, message):
    with pytest.raises(ValueError, match=message):
        validate_target(tiny_seq2seq().config, target)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("number", [3, 1])
@torch.no_grad()
def test_dropped_experts_are_as_if_never_selected_in_encoder_and_decoder(number, bias):
    """Against the stock model with masked routers; the capacity that both need is not reached."""
    model, batch = tiny_seq2seq(router_bias=bias, num_sparse_encoder_layers=2), question()
    for _, _, router in moe_layers(model):
        if bias:
            router.bias.normal_()
    plan = random_plan(model, Target(num_experts=number))
    assert len(plan.experts) == 3
    with deselected(model, plan):
        expected = model(**batch).logits
    assert not torch.equal(model(**batch).logits, expected), "the cut changed nothing"
    assert_close(apply_plan(model, plan)(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("experts", "capacity"), [(4, 16), (3, 22), (2, 32), (1, 64)])
def test_fewer_experts_take_more_tokens_each(experts, capacity):
    """16 tokens in each of 4 experts are 64, and 22 in each of 3 are no fewer."""
    model = tiny_seq2seq(expert_capacity=16)
    if experts < NUM_EXPERTS:
        apply_plan(model, random_plan(model, Target(num_experts=experts)))
    assert model.config.expert_capacity == capacity
    routers = [module for module in model.modules() if "expert_capacity" in vars(module)]
    assert len(routers) == 2 and {router.expert_capacity for router in routers} == {capacity}
    for config in (model.config, model.encoder.config, model.decoder.config):
        assert config.num_experts == experts and config.expert_capacity == capacity


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("how", ["merged", "dropped"])
def test_what_is_cut_on_disk_loads_and_generates_like_what_is_cut_in_memory(how, bias, tmp_path: Path):
    model, batch = tiny_seq2seq(router_bias=bias, num_sparse_encoder_layers=2), question()
    source = saved(tmp_path / "source", model)
    stats = scored(model, [batch])
    plan = plan_merge(model, stats, 2) if how == "merged" else make_plan(stats, Target(num_experts=2), "reap")
    slim_checkpoint(source, plan, tmp_path / "on-disk", shard_bytes=10_000)
    save_checkpoint(apply_plan(model, plan), tiny_tokenizer(), tmp_path / "in-memory", "float32")
    same_tensors(tmp_path / "on-disk", tmp_path / "in-memory")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("on-disk", "in-memory")]
    assert [(each["num_experts"], each["expert_capacity"]) for each in configs] == [(2, 128)] * 2
    reloaded = load_model(tmp_path / "on-disk")
    assert torch.equal(reloaded(**batch).logits, model(**batch).logits)
    options = {"attention_mask": batch["attention_mask"], "max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    cached, plain = (model.generate(batch["input_ids"], use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain) and cached.shape[1] == 9
    assert torch.equal(reloaded.generate(batch["input_ids"], **options), cached)


def test_where_nothing_reached_an_expert_a_group_is_averaged_evenly():
    """With one expert chosen by all, the others are unknown, and merge all the same."""
    model = tiny_seq2seq()
    for _, _, router in moe_layers(model):
        router.weight.data.zero_()  # argmax of equal probabilities: the first
    stats = scored(model, [question()])
    assert (stats.tokens_LE[:, 1:] == 0).all() and (stats.tokens_LE[:, 0] > 0).all()
    plan = plan_merge(model, stats, 2, similarity="random", seed=0)  # three of them in one group
    sizes = []
    for blend in plan.blends.values():
        for members in map(blend.members, range(blend.number)):
            even = [float(e == 0) if 0 in members else 1 / len(members) for e in members]
            torch.testing.assert_close(blend.weight[members], torch.tensor(even))
            sizes += [] if 0 in members else [len(members)]
    assert max(sizes) > 1
    apply_plan(model, plan)


def test_the_row_says_where_the_experts_are():
    model = tiny_seq2seq()
    names = {name for name, _ in model.named_parameters()}
    family = FAMILIES[SWITCH]
    for paths in family.paths(model.config)[1::2]:
        for piece in family.pieces:
            assert f"{paths.feed_forward}.{piece.name.format(3)}" in names
        assert f"{paths.feed_forward}.{family.disk.router}" in names


@pytest.mark.parametrize("tokenised", [False, True])
def test_the_callback_cuts_an_encoder_decoder_inside_a_plain_trainer(tokenised, tmp_path: Path):
    text = load_documents(str(pairs(tmp_path / "pairs.jsonl")))
    rows, model = tokenize_pairs(text, tiny_tokenizer(), 32), tiny_seq2seq()
    callback = SlimmingCallback(
        Target(num_experts=2),
        criterion="reap",
        calibration_dataset=rows if tokenised else text,
        loss="lm",
        max_length=32,
    )
    args = Seq2SeqTrainingArguments(str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Seq2SeqTrainer(
        model, args, train_dataset=rows, callbacks=[callback], processing_class=tiny_tokenizer(),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
    )  # fmt: skip
    trainer.train()
    expected = make_plan(scored(tiny_seq2seq(), batches(rows, 8, 1), loss="lm"), Target(num_experts=2), "reap")
    assert callback.plan.sha256 == expected.sha256 and shape_of(model.config).num_experts == 2
    for change in ("labels", "input_ids"):
        other = rows.map(lambda row, key=change: {key: [2, *row[key]]})
        again = SlimmingCallback(
            Target(num_experts=2), criterion="reap", calibration_dataset=other, loss="lm", max_length=32
        )
        with pytest.raises(ValueError, match="another request; changed: calibration"):
            Seq2SeqTrainer(tiny_seq2seq(), args, train_dataset=rows, callbacks=[again])


@pytest.fixture
def command(tmp_path: Path, monkeypatch):
    """`slimmoe NAME` on a tiny Switch and pairs of text; more flags, its exit status."""
    monkeypatch.setattr(commands, "be_quiet", lambda: None)
    source, text = save_tiny(tmp_path / "model", SWITCH), pairs(tmp_path / "pairs.jsonl")

    def run(name: str, *more: str, data: Path = text) -> int:
        given = [name, str(source), "--data", str(data), "--max-length", "32", "--tokens", "600", "--batch-size", "4"]
        return cli.main([*given, *more, *([] if name == "eval" else ["--output", str(tmp_path / "out")])])

    return run


def test_the_commands_score_slim_and_merge_pairs_of_text(command, tmp_path: Path):
    source, batch = tmp_path / "model", question()
    assert command("score") == 0
    stats = ExpertStats.load(tmp_path / "out")
    assert stats.meta.family == SWITCH and 400 < stats.meta.tokens < 700, "documents of 600 tokens, and those truncated"
    rows = tokenize_pairs(load_documents(str(tmp_path / "pairs.jsonl")), tiny_tokenizer(), 32)
    assert all(len(row["input_ids"]) <= 32 and 0 < len(row["labels"]) <= 32 for row in rows)
    assert {row["labels"][-1] for row in rows if len(row["labels"]) < 32} == {0}, "the end of text is predicted too"
    (tmp_path / "out").unlink()
    assert command("slim", "--num-experts", "3", "--criterion", "reap") == 0
    assert shape_of(load_model(tmp_path / "out").config).num_experts == 3
    assert command("merge", "--num-experts", "2", "--form", "uniform", "--overwrite", "--similarity", "outputs") == 0
    plan = CompressionPlan.load(tmp_path / "out" / "plan")
    ours, theirs = load_model(tmp_path / "out"), apply_plan(load_model(source), plan)
    assert torch.equal(ours(**batch).logits, theirs(**batch).logits) and ours.config.expert_capacity == 128
    assert command("merge", "--num-experts", "2", "--overwrite") == 0  # by default as in the paper
    plan = CompressionPlan.load(tmp_path / "out" / "plan")
    ours, theirs = load_model(tmp_path / "out"), share_merged(load_model(source), plan)
    assert plan.adaptive and torch.equal(ours(**batch).logits, theirs(**batch).logits)
    assert ours.config.expert_capacity == 64 and ours.config.num_experts == NUM_EXPERTS


def test_the_commands_answer_bad_input_in_one_line(command, tmp_path: Path, capsys):
    plain = write_text(tmp_path / "text.jsonl")
    chats = tmp_path / "chats.jsonl"
    said = [
        {side: [{"role": "user", "content": text[:200]}] for side in ("prompt", "completion")} for text in documents()
    ]
    chats.write_text("".join(json.dumps(row) + "\n" for row in said))
    for name, more, data, message in (
        ("score", (), plain, "an encoder-decoder reads a prompt and answers with a completion; the data has text"),
        ("score", ("--split", "all"), chats, "the prompts or completions are chats"),
        ("score", ("--stream",), plain, "a switch_transformers is an encoder-decoder, and --stream takes decoder-only"),
        ("slim", ("--expert-width", "16"), plain, "expert_width=16 cannot be had for switch_transformers"),
        ("eval", (), plain, "a switch_transformers is an encoder-decoder, and this takes decoder-only models"),
    ):
        capsys.readouterr()
        assert command(name, *more, data=data) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert message in error and "Traceback" not in error and not (tmp_path / "out").exists()
