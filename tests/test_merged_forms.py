"""The forms of a merged model: which of them stock classes load, which are exact, which are smaller; and none that lies."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import trainer_for
from safetensors.torch import load_file, save_file
from test_checkpoint import LAYOUTS, same_tensors, saved
from test_factorization import StopAt
from test_merging import copies, scored
from test_plan import fake_stats
from tiny import families, save_tiny, tiny_batch, tiny_model, tiny_tokenizer, write_text
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, TrainingArguments

from slimmoe_hf import cli, commands
from slimmoe_hf.blends import Blend, Merging
from slimmoe_hf.checkpoint import slim_checkpoint
from slimmoe_hf.criteria import choose_anywhere
from slimmoe_hf.describe import describe_plan
from slimmoe_hf.disk import meta_model
from slimmoe_hf.evaluation import count_parameters
from slimmoe_hf.factored import factored_weights
from slimmoe_hf.factored_checkpoint import load_factored
from slimmoe_hf.factored_size import count_factored
from slimmoe_hf.factorization import densify, factor_experts
from slimmoe_hf.families import SWITCH, moe_layers, shape_of
from slimmoe_hf.loading import load_model
from slimmoe_hf.merged_forms import duplicate_merged, share_merged, unshare
from slimmoe_hf.merging import plan_merge
from slimmoe_hf.plan import CompressionPlan, Target, make_plan
from slimmoe_hf.shards import read_header
from slimmoe_hf.shared_checkpoint import load_shared, save_shared
from slimmoe_hf.student_training import save_checkpoint
from slimmoe_hf.surgery import apply_plan

SWITCH_LAYERS = {
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
}


def model_of(family: str, seed: int = 0):
    """A tiny model; of Switch one with more layers to merge than the first sparse one, which is left alone."""
    return tiny_model(family, seed, **(SWITCH_LAYERS if family == SWITCH else {}))


def merged(family: str, counts: str = "adaptive", number: int = 2):
    """A model and a plan to merge its experts."""
    model = model_of(family)
    return model, plan_merge(model, scored(model), number, counts=counts)


def shared(family: str):
    model, plan = merged(family)
    return share_merged(model, plan)


def auto(model) -> Any:
    return AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def logits(model):
    return model(**tiny_batch()).logits


# Adaptive counts


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_adaptive_counts_are_exact_and_keep_the_top_of_every_layer(number):
    """Half of the usages are equal, and one layer has only small ones."""
    used = torch.tensor([[0.4, 0.4, 0.1, 0.1], [0.26, 0.25, 0.25, 0.24], [0.4, 0.4, 0.1, 0.1]], dtype=torch.float64)
    kept = choose_anywhere(used, number)
    assert sum(map(len, kept)) == 3 * number
    assert [int(each[0]) for each in kept] == [0, 0, 0]
    if number == 2:
        assert [each.tolist() for each in kept] == [[0, 1], [0, 1], [0, 1]]
    assert all((each.diff() > 0).all() for each in kept)


def test_ties_go_to_the_lower_layer_and_the_lower_expert():
    kept = choose_anywhere(torch.full((3, 4), 0.25, dtype=torch.float64), 2)
    assert [each.tolist() for each in kept] == [[0, 1, 2, 3], [0], [0]]


def test_an_adaptive_plan_is_saved_shown_and_checked(tmp_path):
    model = tiny_model("olmoe")
    stats = fake_stats(model)
    stats.tokens_LE[:] = torch.tensor([[9.0, 8, 7, 1], [9, 1, 0, 0]])
    plan = plan_merge(model, stats, 2, counts="adaptive")
    assert {layer: kept.tolist() for layer, kept in plan.experts.items()} == {0: [0, 1, 2], 1: [0]}
    plan.save(tmp_path / "plan")
    loaded = CompressionPlan.load(tmp_path / "plan")
    assert loaded.sha256 == plan.sha256 != plan_merge(model, stats, 2).sha256
    assert "experts 4 -> 2 on average" in describe_plan(loaded) and "counts adaptive" in describe_plan(loaded)
    for refused in (lambda: apply_plan(model, plan),):
        with pytest.raises(ValueError, match=r"experts of its own \(1 to 3\), a stock model has one") as error:
            refused()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="does not leave 2 experts a layer on average"):
        CompressionPlan(plan.meta, {}, {}, {0: plan.experts[0]}, {0: plan.blends[0]}).check()
    with pytest.raises(ValueError, match="num_experts=5 on average is not between 1 and the model's 4"):
        plan_merge(model, stats, 5, counts="adaptive")


def test_random_similarity_is_of_its_seed_alone():
    model = tiny_model("mixtral")
    stats = fake_stats(model)
    plans = [plan_merge(model, stats, 2, similarity="random", seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert plans[0].sha256 == plans[1].sha256 and len({plan.sha256 for plan in plans}) > 1
    assert plans[2].meta.seed == 1


def test_the_first_sparse_encoder_layer_of_switch_is_left_alone_and_not_counted():
    model, plan = merged(SWITCH)
    layers = [layer for layer, _, _ in moe_layers(model)]
    assert sorted(plan.experts) == layers[1:] and sum(map(len, plan.experts.values())) == 2 * len(layers[1:])
    assert sorted(merged(SWITCH, "uniform")[1].experts) == layers, "a stock checkpoint has one number for all layers"


def test_switch_base_32_comes_out_as_published():
    """1,978,514,688 -> 732,806,400 (arXiv 2310.01334): 8 of 32 experts on average in 11 layers; from config and plan alone."""
    from transformers import SwitchTransformersConfig

    config = SwitchTransformersConfig(
        d_ff=3072, num_experts=32, num_sparse_encoder_layers=6, num_sparse_decoder_layers=6
    )
    model = meta_model(config)
    assert count(model) == 1_978_514_688 and count_factored(config, 8).merged == 732_806_400
    before, experts, blends = shape_of(config), {}, {}
    for row, (layer, _, _) in enumerate(moe_layers(model)[1:]):
        number = 3 + row  # 3 to 13, 8 on average
        owner = torch.arange(32) % number
        experts[layer] = torch.arange(number)
        weight = 1 / torch.bincount(owner)[owner].float()
        blends[layer] = Blend(owner, weight, torch.arange(3072).expand(32, -1))
    merging = Merging(similarity="router_logits", grouping="dominant", reference="dominant", counts="adaptive")
    meta = make_plan(fake_stats(model_of(SWITCH)), Target(num_experts=2), "frequency").meta.model_copy(
        update={"before": before, "after": dataclasses.replace(before, num_experts=8), "merging": merging}
    )
    small = share_merged(model, CompressionPlan(meta, {}, {}, experts, blends))
    assert count(small) == count(meta_model(small.config)) == 732_806_400


# Forms in memory


@pytest.mark.parametrize("counts", ["uniform", "adaptive"])
@pytest.mark.parametrize("family", families())
def test_shared_equals_duplicated(family, counts):
    """To rounding: some products are of more rows."""
    model, plan = merged(family, counts)
    duplicated, small = duplicate_merged(copy.deepcopy(model), plan), copy.deepcopy(model)
    assert share_merged(small, plan) is small
    assert_close(logits(small), logits(duplicated), atol=1e-5, rtol=1e-5)
    size = (2 if family == SWITCH else 3) * 32 * 32
    assert count(model) - count(small) == 2 * len(plan.experts) * size, "half of four experts in every layer"
    for (_, _, router), (_, _, was) in zip(moe_layers(small), moe_layers(model), strict=True):
        assert torch.equal(router.weight, was.weight), "routers stay as they are"
    assert small.config.expert_groups == {layer: blend.owner.tolist() for layer, blend in plan.blends.items()}
    again = unshare(small)
    assert type(again) is type(model) and again.config.to_dict() == model.config.to_dict()
    assert count(again) == count(model)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, duplicated.state_dict()[name]), name


@pytest.mark.parametrize("family", families())
def test_active_parameters_are_those_of_the_experts_that_are_held(family):
    model, plan = merged(family)
    total, active = count_parameters(model)
    small_total, small_active = count_parameters(share_merged(model, plan))
    top_k = shape_of(model.config).top_k
    spared = sum(max(top_k - len(kept), 0) for kept in plan.experts.values())  # a layer with fewer than K
    assert small_total < total and small_active == active - spared * (2 if family == SWITCH else 3) * 32 * 32


# The table of forms


FORMS = {"indirect": (False, True, True), "duplicate": (True, True, False), "uniform": (True, False, True)}
"""Whether stock classes load it, whether it is exact, whether it is smaller."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", families())
def test_the_table_of_forms(family, form, tmp_path):
    """Of permuted copies of fewer experts: what is exact says what the original says."""
    stock, exact, smaller = FORMS[form]
    model = copies(family, **(SWITCH_LAYERS if family == SWITCH else {}))
    stats = scored(model)
    stats.tokens_LE[:, [0, 3]] = 1  # or a pair might lead both groups
    whole, size, kind = logits(model), count(model), type(model)
    plan = plan_merge(model, stats, 2, counts="uniform" if form == "uniform" else "adaptive")
    apply = {"indirect": share_merged, "duplicate": duplicate_merged, "uniform": apply_plan}[form]
    small = apply(model, plan)
    small.save_pretrained(tmp_path)
    if stock:
        loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
    else:
        with pytest.raises(
            ValueError, match=r"import slimmoe_hf .* or with slimmoe_hf\.shared_checkpoint\.load_shared"
        ):
            kind.from_pretrained(tmp_path)
        loaded = auto(model).from_pretrained(tmp_path)
    assert_close(logits(loaded), logits(small), atol=1e-5, rtol=1e-5)  # products round otherwise where a file is mapped
    assert torch.allclose(logits(loaded), whole, atol=1e-4, rtol=1e-4) is exact
    stored = sum(tensor.bytes for tensor in read_header(tmp_path / "model.safetensors").values()) // 4
    assert (count(loaded) < size and stored < size) is smaller


# On disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", families())
def test_a_shared_folder_reloads_bit_for_bit(family, dtype, tmp_path):
    model = shared(family).to(dtype)
    model.save_pretrained(tmp_path)
    stored = read_header(tmp_path / "model.safetensors")
    assert sum(tensor.bytes for tensor in stored.values()) == count(model) * dtype.itemsize, "every expert once"
    for loaded in (load_shared(tmp_path), auto(model).from_pretrained(tmp_path), load_model(tmp_path, dtype)):
        assert type(loaded) is type(model) and loaded.config.expert_groups == model.config.expert_groups
        assert {n: w.dtype for n, w in loaded.named_parameters()} == {n: w.dtype for n, w in model.named_parameters()}
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, loaded.state_dict()[name]), name
    loaded.save_pretrained(tmp_path / "again")  # before it runs: Switch turns its routers to float32 then
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert not loaded.training
    if dtype == torch.float32:  # `to` has turned the rotary angles to bfloat16 as well
        assert torch.equal(logits(loaded), logits(model))


def test_auto_classes_take_their_arguments(tmp_path):
    shared("olmoe").save_pretrained(tmp_path)
    given = {"dtype": "bfloat16", "use_cache": False, "attn_implementation": "eager", "device_map": "cpu"}
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **given)
    assert model.dtype == torch.bfloat16 and not model.config.use_cache and not any(report.values())
    assert model.config._attn_implementation == "eager" and model.config.model_type == "olmoe"
    with pytest.raises(ValueError, match="load it with AutoModelForCausalLM"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="goes to one device"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"model": "cpu", "lm_head": "cpu"})
    with pytest.raises(ValueError, match="takes no variant"):
        AutoModelForCausalLM.from_pretrained(tmp_path, variant="fp16")
    assert "hf_secret" not in str(AutoModelForCausalLM.from_pretrained(tmp_path, token="hf_secret").config.to_dict())


IMPORTS = {
    "without": "",
    "before": "import slimmoe_hf",
    "after": "from transformers import AutoModel\nimport slimmoe_hf",
}


@pytest.mark.slow  # transformers is imported anew, which takes most of ten seconds
@pytest.mark.parametrize("imports", IMPORTS)
def test_another_process_loads_it_after_the_import_and_not_without(imports, tmp_path):
    import subprocess
    import sys

    model = shared("mixtral")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    code = (
        f"{IMPORTS[imports]}\nimport torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"assert len(AutoTokenizer.from_pretrained({str(tmp_path)!r})) == 320\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "torch.save(model(input_ids=torch.arange(9)[None]).logits, 'logits.pt')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    if imports == "without":
        assert done.returncode and "`slimmoe_shared`" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(input_ids=torch.arange(9)[None]).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", families())
def test_duplicated_on_disk_equals_duplicated_in_memory(family, layout, tmp_path):
    model, plan = merged(family)
    source = saved(tmp_path / "source", model, LAYOUTS[layout])
    slim_checkpoint(source, plan, tmp_path / "on-disk", shard_bytes=30_000, duplicate=True)
    save_checkpoint(duplicate_merged(model, plan), tiny_tokenizer(), tmp_path / "in-memory", "float32")
    same_tensors(tmp_path / "on-disk", tmp_path / "in-memory")


# Nothing that stock classes would take for a whole model


def _weights_of_the_form(folder: Path) -> None:
    """As somebody would write them who saves the state and the config by hand."""
    model = shared(SWITCH)
    model.config.save_pretrained(folder)
    save_file(
        {n: t.clone() for n, t in model.state_dict().items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def test_a_state_saved_by_hand_has_every_expert_that_a_stock_class_looks_for(tmp_path):
    """Of Switch the state has every name; of fused experts their sizes differ, which stock classes do not pass over."""
    _weights_of_the_form(tmp_path)
    loaded, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and torch.equal(logits(loaded), logits(shared(SWITCH)))
    model = shared("olmoe")
    model.config.save_pretrained(tmp_path / "fused")
    save_file(dict(model.state_dict()), tmp_path / "fused/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fused")


@pytest.mark.parametrize("kind", ["shared", "factored"])
@pytest.mark.parametrize("family", families())
def test_no_stock_class_invents_experts(family, kind, tmp_path):
    """Not even one that is given the config of a stock model, which has no guard."""
    model = shared(family) if kind == "shared" else factor_experts(model_of(family), 8)
    model.save_pretrained(tmp_path)
    stock, config = type(model_of(family)), model_of(family).config
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match="slimmoe_hf"):
            stock.from_pretrained(tmp_path, **options)
    with pytest.raises(RuntimeError, match="mismatch"):
        stock.from_pretrained(tmp_path, config=config)
    forced = {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
    assert stock.from_pretrained(tmp_path, **forced)[1]["mismatched_keys"], "who forces both is told"


@pytest.mark.parametrize("kind", ["shared", "factored"])
def test_weights_of_other_groups_are_refused(kind, tmp_path):
    """Same sizes, other groups: nothing else would tell."""
    model, plan = merged("olmoe", "uniform")
    other = dataclasses.replace(
        plan, blends={at: dataclasses.replace(b, owner=1 - b.owner) for at, b in plan.blends.items()}
    )
    one, two = (share_merged(copy.deepcopy(model), each) for each in (plan, other))
    if kind == "factored":
        one, two = factor_experts(one, 8), factor_experts(two, 8)
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="of other groups of experts"):
        two.load_state_dict(load_file(tmp_path / "one" / "model.safetensors"), strict=False)
    (tmp_path / "one" / "config.json").write_text((tmp_path / "two" / "config.json").read_text())
    with pytest.raises(ValueError, match="of other groups of experts"):
        (load_shared if kind == "shared" else load_factored)(tmp_path / "one")


@pytest.mark.parametrize("kind", ["shared", "factored"])
def test_label_smoothing_shifts_labels_as_of_a_stock_model(kind, tmp_path):
    model = shared("olmoe") if kind == "shared" else factor_experts(model_of("olmoe"), 8)
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[], label_smoothing_factor=1e-7))
    batch = tiny_batch()
    assert_close(trainer.compute_loss(model, dict(batch)), model(**batch).loss, atol=1e-4, rtol=1e-4)


def test_what_is_read_is_not_written_over(tmp_path, capsys):
    shared("olmoe").save_pretrained(tmp_path / "run" / "final")
    for output in ("run", "run/final"):
        given = ["export", str(tmp_path / "run" / "final"), "--form", "duplicate", "--output", str(tmp_path / output)]
        (tmp_path / "run" / "config.json").write_text("{}")
        assert cli.main([*given, "--overwrite"]) == 2 and "is the model itself, or holds it" in capsys.readouterr().err
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def _lose(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if "experts" in name)]
    save_file(tensors, folder / "model.safetensors")


def _regroup(change: str, to: str):
    def harm(folder: Path) -> None:
        text = (folder / "config.json").read_text()
        assert change in text
        (folder / "config.json").write_text(text.replace(change, to))

    return harm


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (_lose, "is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1234"), "cannot be read"),
        (lambda folder: tiny_model("olmoe").config.save_pretrained(folder), "not a shared checkpoint"),
        (_regroup('"version": 1', '"version": 2'), "of version 2"),
        (_regroup('"expert_groups"', '"expert_group"'), "of other groups of experts"),
        (_regroup('"num_experts": 4', '"num_experts": 5'), r"expert_groups.0 is not a table of the 5 experts"),
        (_regroup('"num_hidden_layers": 2', '"num_hidden_layers": 1'), "expert_groups.1 is not a table of the missing"),
    ],
)
def test_a_damaged_shared_folder_is_named(harm, named, tmp_path):
    shared("olmoe").save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(ValueError, match=named) as error:
        load_shared(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model, plan: share_merged(share_merged(model, plan), plan), "are shared already"),
        (lambda model, plan: duplicate_merged(share_merged(model, plan), plan), "are shared already"),
        (lambda model, plan: apply_plan(share_merged(model, plan), plan), "merged and shared, so they can be neither"),
        (lambda model, plan: scored(share_merged(model, plan)), "merged and shared, so they can be neither"),
        (lambda model, plan: share_merged(tiny_model("olmoe"), plan), "the plan is for mixtral"),
        (lambda model, plan: unshare(model), "has no shared experts"),
        (lambda model, plan: save_shared(model, "nowhere"), "has no shared experts"),
        (
            lambda model, plan: share_merged(model, make_plan(fake_stats(model), Target(num_experts=2))),
            "merges no experts",
        ),
        (lambda model, plan: share_merged(model, plan).save_pretrained("nowhere", push_to_hub=True), "is not pushed"),
        (lambda model, plan: unshare(factor_experts(share_merged(model, plan), 8)), "are factored"),
    ],
)
def test_what_cannot_be_done_is_one_line(change, named):
    model, plan = merged("mixtral")
    with pytest.raises(ValueError, match=named) as error:
        change(model, plan)
    assert "\n" not in str(error.value) and not Path("nowhere").exists()


# Training


def rows(number: int = 16) -> Dataset:
    ids = tiny_batch(number, 16)["input_ids"].tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def plain_trainer(folder: Path, model, **changes) -> Trainer:
    values = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_steps": 2, "bf16": False, **changes,
    }  # fmt: skip
    return Trainer(model, TrainingArguments(str(folder), **values), train_dataset=rows(), eval_dataset=rows(4))


@pytest.mark.parametrize("family", ["olmoe", SWITCH])
def test_a_plain_trainer_resumes_exactly_and_its_checkpoints_are_of_the_form(family, tmp_path):
    through = plain_trainer(tmp_path / "through", shared(family))
    through.train()
    again = plain_trainer(tmp_path / "again", shared(family))
    again.train(resume_from_checkpoint=str(tmp_path / "through/checkpoint-2"))
    for name, weight in through.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    loaded = load_shared(tmp_path / "through/checkpoint-4")
    assert torch.equal(logits(loaded), logits(through.model.eval()))
    with pytest.raises(ValueError, match="load_shared"):
        through.model.stock.from_pretrained(tmp_path / "through/checkpoint-4")


def test_a_plain_trainer_ends_with_its_best_model(tmp_path):
    """A learning rate that makes it worse and worse: the best is the first."""
    run = plain_trainer(
        tmp_path, shared("olmoe"), eval_strategy="steps", eval_steps=2, learning_rate=0.5, load_best_model_at_end=True,
        metric_for_best_model="loss", lr_scheduler_type="constant",
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint is not None
    best = load_shared(run.state.best_model_checkpoint)
    assert torch.equal(logits(best), logits(run.model.eval()))


def test_a_distillation_resumes_exactly(tmp_path):
    def run(folder, resume=False, *callbacks):
        trainer = trainer_for(
            folder, "mixtral", shared("mixtral"), max_steps=4, save_strategy="steps", save_steps=2, callbacks=[*callbacks]
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    through = run(tmp_path / "through")
    run(tmp_path / "cut", False, StopAt(2))
    resumed = run(tmp_path / "cut", True)
    for name, weight in through.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert not torch.equal(logits(resumed), logits(shared("mixtral")))


@pytest.mark.parametrize("kind", ["shared", "factored"])
def test_a_final_model_is_saved_without_the_biases_that_engines_expect_of_stock_ones(kind, tmp_path):
    """PhiMoE without biases: no engine loads this, and it has to reload."""
    model = tiny_model("phimoe", attention_bias=False, lm_head_bias=False)
    plan = plan_merge(model, fake_stats(model), 2)
    model = share_merged(model, plan) if kind == "shared" else factor_experts(model, 8)
    trainer_for(tmp_path, "phimoe", model).save_model(str(tmp_path / "final"))
    loaded = (load_shared if kind == "shared" else load_factored)(tmp_path / "final")
    assert_close(logits(loaded), logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", families())
def test_a_copy_is_its_own(family):
    model = shared(family)
    before, other = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(other), before) and count(other) == count(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert torch.equal(logits(model), before) and not torch.equal(logits(other), before)


# With factoring: MC-SMoE


@pytest.mark.parametrize("family", families())
def test_merged_experts_are_factored_once_and_keep_their_groups(family, tmp_path):
    """The packed bytes are the count's, four more a kept row; what is multiplied out again is the shared form."""
    model, plan = merged(family)
    small = logits(share_merged(copy.deepcopy(model), plan))
    factored = factor_experts(share_merged(model, plan), 8)
    assert_close(logits(factored), small, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        for weight in factored_weights(factored).values():
            weight.sparse.view(-1, weight.sparse.shape[-1])[::2] = 0
    factored.save_pretrained(tmp_path)
    stored = sum(tensor.bytes for tensor in read_header(tmp_path / "model.safetensors").values())
    packed = load_factored(tmp_path)
    kept = sum(len(weight.index) for weight in factored_weights(packed).values())
    assert stored == 4 * (count(packed) + kept)
    if family == SWITCH:  # whose first sparse layer is in no count
        assert count(packed) == count_factored(model_of(family).config, 2, 8, density=0.5).factored
    whole = load_factored(tmp_path, regrow=True)
    assert type(whole) is type(factored) and torch.equal(logits(whole), logits(factored))
    assert_close(logits(packed), logits(factored), atol=2e-5, rtol=1e-5)
    assert whole.config.expert_groups == {layer: blend.owner.tolist() for layer, blend in plan.blends.items()}
    dense = densify(whole)
    assert_close(logits(unshare(dense)), logits(packed), atol=2e-5, rtol=1e-5)


# Commands


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(commands, "be_quiet", lambda: None)


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_merging_and_exporting_by_command(tmp_path, quiet, capsys):
    source, text = save_tiny(tmp_path / "model", "olmoe"), write_text(tmp_path / "text.jsonl")
    folders = {name: tmp_path / name for name in ("shared", "stock", "duplicate", "uniform", "factored", "dense")}
    given = ["merge", str(source), "--data", str(text), "--max-length", "64", "--tokens", "512", "--num-experts", "2"]
    for form, name in (("indirect", "shared"), ("duplicate", "duplicate"), ("uniform", "uniform")):
        assert cli.main([*given, "--form", form, "--output", str(folders[name])]) == 0
    plan = CompressionPlan.load(folders["shared"] / "plan")
    assert plan.adaptive and not CompressionPlan.load(folders["uniform"] / "plan").adaptive
    small = AutoModelForCausalLM.from_pretrained(folders["shared"])
    assert torch.equal(logits(small), logits(share_merged(load_model(source), plan)))
    assert len(AutoTokenizer.from_pretrained(folders["shared"])) == 320
    assert cli.main(["export", str(folders["shared"]), "--form", "duplicate", "--output", str(folders["stock"])]) == 0
    same_tensors(folders["stock"], folders["duplicate"])
    factor_experts(small, 8).save_pretrained(folders["factored"])
    tiny_tokenizer().save_pretrained(folders["factored"])
    assert cli.main(["export", str(folders["factored"]), "--form", "dense", "--output", str(folders["dense"])]) == 0
    assert_close(logits(load_model(folders["dense"])), logits(load_model(folders["stock"])), atol=2e-5, rtol=1e-5)
    for name, form, message in (
        ("shared", "dense", "are not factored. Give --form duplicate."),
        ("factored", "duplicate", "are not shared. Give --form dense."),
        ("stock", "dense", "a stock checkpoint already"),
    ):
        assert message in refused(
            capsys, "export", str(folders[name]), "--form", form, "--output", str(tmp_path / "no")
        )
    assert "is there already" in refused(
        capsys, "export", str(folders["shared"]), "--form", "duplicate", "--output", str(folders["stock"])
    )
    for more, message in ((["--num-experts", "4"], "has 4 a layer"), (["--num-experts", "0"], "and at least 1")):
        argv = [*given, "--form", "indirect", "--output", str(tmp_path / "no"), *more]
        assert message in refused(capsys, *argv)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow  # ten commands, two of which train and evaluate
def test_commands_take_shared_experts_or_say_what_to_do(tmp_path, quiet, capsys):
    model, text = shared("phimoe"), str(write_text(tmp_path / "text.jsonl"))
    folder, output = str(tmp_path / "shared"), ["--output", str(tmp_path / "out")]
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    teacher, data = str(save_tiny(tmp_path / "teacher")), ["--data", text, "--max-length", "64"]
    for argv in (
        ["score", folder, *data, *output], ["slim", folder, *data, "--num-experts", "2", *output],
        ["merge", folder, *data, "--num-experts", "2", *output], ["finetune", folder, *data, *output],
        ["cache", "write", folder, *data, *output], ["distill", "--model", teacher, "--teacher", folder, *data, *output],
    ):  # fmt: skip
        line = refused(capsys, *argv)
        assert "experts are merged and shared" in line and f"slimmoe export {folder} --form duplicate" in line, argv
    assert cli.main(["size", folder, "--json"]) == 0
    assert f'"total_parameters": {count(model)}' in capsys.readouterr().out
    assert "cannot be cut further" in refused(capsys, "size", folder, "--num-experts", "2")
    assert cli.main(["distill", "--model", folder, "--teacher", teacher, *data, "--max-steps", "1", *output]) == 0
    assert type(load_model(tmp_path / "out")) is type(model)
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "out"), *data, "--split", "train", "--tokens", "500", "--json"]) == 0
    assert f'"total_parameters": {count(model)}' in capsys.readouterr().out


def test_the_card_of_shared_experts_says_how_to_load_them(tmp_path):
    from slimmoe_hf.card import loading_code

    shared_code, stock_code = loading_code("me/x", "The", shared=True), loading_code("me/x", "The")
    assert "import slimmoe_hf" in shared_code and shared_code.replace("import slimmoe_hf", "") != stock_code
    assert "slimmoe" not in stock_code
