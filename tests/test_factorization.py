"""Factored experts: the same function at first, rows of S that go and come back, files that hold what is left and no more."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILY_NAMES, tiny_batch, tiny_model, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from slimmoe_hf import DistillationTrainer, Target, apply_plan, collect_stats, make_plan
from slimmoe_hf.callbacks import refuse_what_cannot_be_cut
from slimmoe_hf.cli import main
from slimmoe_hf.factored import FactoredWeight, PackedWeight, expert_matrices, factorable, factored_weights
from slimmoe_hf.factored_checkpoint import load_factored, save_factored
from slimmoe_hf.factored_size import count_factored, switch_flops
from slimmoe_hf.factorization import (
    compare_stable_ranks,
    densify,
    factor_experts,
    sparse_density,
    stable_rank,
    stable_rank_table,
    stable_ranks,
)
from slimmoe_hf.merged_forms import duplicate_merged
from slimmoe_hf.merging import plan_merge
from slimmoe_hf.shards import read_header
from slimmoe_hf.sparsity import STATE, SparsityCallback, SparsitySchedule

RANK = 8
MODELS = (*FAMILY_NAMES, "switch", "switch-merged", "switch-tied")
SWITCH_BASE_32 = {"d_ff": 3072, "num_experts": 32, "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6}


def model_of(kind: str) -> PreTrainedModel:
    """A decoder of a fused family, or a Switch, as it is or with experts that share their module or their weights."""
    if kind in FAMILY_NAMES:
        return tiny_model(kind)
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=320, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=4, num_decoder_layers=4, num_experts=4,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, decoder_start_token_id=0, expert_capacity=4096,
        router_jitter_noise=0.0, dropout_rate=0.0,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config).eval()
    if kind == "switch-merged":
        for experts in factorable(model).values():
            experts["expert_3"] = experts["expert_1"]
    if kind == "switch-tied":
        for experts in factorable(model).values():
            for matrix in ("wi", "wo"):
                getattr(experts["expert_3"], matrix).weight = getattr(experts["expert_1"], matrix).weight
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits


def prune(model: PreTrainedModel, share: float = 0.75) -> PreTrainedModel:
    """Zero a share of the rows of every S, drawn by chance; the first of fused experts keeps none."""
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in factored_weights(model).values():
            rows = weight.sparse.view(-1, weight.sparse.shape[-1])
            empty = weight.sparse.shape[-2] if weight.sparse.dim() == 3 else 0
            others = empty + torch.randperm(len(rows) - empty, generator=chance)
            rows[:empty] = 0
            rows[others[: round(share * len(rows)) - empty]] = 0
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_factoring_changes_no_output(kind):
    """Of logits around 10 in the fused families; the whole residual is in S."""
    model = model_of(kind)
    before = logits(model)
    assert factor_experts(model, RANK) is model
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["phimoe", "switch"])
def test_the_low_rank_part_is_the_best_of_its_rank_and_balanced(kind):
    """Eckart-Young: what S holds is the tail of the singular values; L and R share them as square roots."""
    model = model_of(kind)
    dense = {path: matrix.detach().clone() for path, matrix in expert_matrices(model, factorable(model)).items()}
    factored = factored_weights(factor_experts(model, RANK))
    assert factored.keys() == dense.keys()
    for path, weight in factored.items():
        tail = torch.linalg.svdvals(dense[path])[..., RANK:].square().sum(-1)
        torch.testing.assert_close(weight.sparse.square().sum((-2, -1)), tail, rtol=1e-4, atol=1e-5)
        gram_left, gram_right = weight.left.mT @ weight.left, weight.right @ weight.right.mT
        torch.testing.assert_close(gram_left, gram_right, rtol=1e-4, atol=1e-4)


def test_a_matrix_of_low_rank_leaves_nothing_to_the_sparse_part():
    """Rank 3, asked for 8, tall and wide: no division by what is not there."""
    for shape in ((40, 24), (24, 40)):
        weight = torch.randn(2, shape[0], 3) @ torch.randn(2, 3, shape[1])
        factored = FactoredWeight.of(weight, RANK)
        assert factored.sparse.abs().max() < 1e-5 < factored.left.abs().max()
        torch.testing.assert_close(factored.dense(), weight)


@pytest.mark.filterwarnings("ignore:.*checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "switch"])
def test_gradients_reach_all_three_and_are_those_of_the_dense_weight(kind, checkpointing):
    """dW = g: dS = g, dL = g R^T, dR = L^T g, with gradient checkpointing too."""
    model, dense = model_of(kind), model_of(kind)
    matrices = expert_matrices(dense, factorable(dense))
    factor_experts(model, RANK)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # in training mode alone
        model.train()
    model(**tiny_batch()).loss.backward()
    dense(**tiny_batch()).loss.backward()
    for path, weight in factored_weights(model).items():
        expected = matrices[path].grad
        close = {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(weight.sparse.grad, expected, **close)
        torch.testing.assert_close(weight.left.grad, expected @ weight.right.detach().mT, **close)
        torch.testing.assert_close(weight.right.grad, weight.left.detach().mT @ expected, **close)


def test_the_first_sparse_encoder_layer_of_switch_is_left_alone():
    model = factor_experts(model_of("switch"), RANK)
    factored = {path.partition(".layer.")[0] for path in factored_weights(model)}
    assert factored == {"encoder.block.3", "decoder.block.1", "decoder.block.3"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: factor_experts(m, 12), "rank=12 does not fit"),
        (lambda m: factor_experts(m, 32), r"rank=32 does not fit .*below 32"),
        (lambda m: factor_experts(factor_experts(m, 8), 8), "factored already"),
        (lambda m: factor_experts(m.to("meta"), 8), "no weights yet"),
        (densify, "dense already"),
        (lambda m: save_factored(m, "nowhere"), "no factored experts"),
        (lambda m: factor_experts(m, 8).save_pretrained("nowhere", push_to_hub=True), "is not pushed"),
    ],
)
def test_what_cannot_be_done_is_one_line(change, named):
    with pytest.raises(ValueError, match=named) as caught:
        change(tiny_model("phimoe"))
    assert "\n" not in str(caught.value)
    assert not Path("nowhere").exists()


def test_a_dense_family_is_refused_by_name():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    with pytest.raises(ValueError, match="'llama' is not a Mixture-of-Experts family"):
        factor_experts(LlamaForCausalLM(config), 8)


@pytest.mark.parametrize("kind", MODELS)
def test_a_packed_folder_reloads_bit_for_bit(kind, tmp_path):
    """Every weight, in both forms; logits of the trainable form too. The second save equals the first."""
    model = prune(factor_experts(model_of(kind), RANK))
    model.save_pretrained(tmp_path / "a")
    whole = load_factored(tmp_path / "a", regrow=True)
    assert type(whole) is type(model)
    for (name, one), (other_name, other) in zip(model.state_dict().items(), whole.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name
    assert torch.equal(logits(whole), logits(model))
    assert whole.config.architectures == [type(model_of(kind)).__name__]
    assert all(p.data_ptr() % 64 == 0 for p in whole.parameters()), "as in a file: products round otherwise there"
    packed = load_factored(tmp_path / "a")
    for (path, one), other in zip(factored_weights(model).items(), factored_weights(packed).values(), strict=True):
        assert torch.equal(one.dense(), other.dense()), path
    torch.testing.assert_close(logits(packed), logits(model), rtol=1e-5, atol=2e-5)
    packed.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


@pytest.mark.parametrize("kind", ["phimoe", "switch"])
def test_a_bfloat16_model_stays_bfloat16(kind, tmp_path):
    model = prune(factor_experts(model_of(kind).to(torch.bfloat16), RANK))
    model.save_pretrained(tmp_path)
    packed = load_factored(tmp_path)
    assert {p.dtype for p in packed.parameters()} == {p.dtype for p in model.parameters()}
    torch.testing.assert_close(logits(packed), logits(model), rtol=0.05, atol=0.5)
    assert next(load_factored(tmp_path, dtype="float32").parameters()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["olmoe", "switch-merged", "switch-tied"])
def test_the_files_bytes_are_the_parameters_counted(kind, tmp_path):
    """The parameters in memory and four bytes a kept row, and nothing else but the header."""
    model = prune(factor_experts(model_of(kind), RANK))
    model.save_pretrained(tmp_path)
    packed = load_factored(tmp_path)
    weights = factored_weights(packed).values()
    dropped = sum((w.sparse == 0).all(-1).sum().item() * w.sparse.shape[-1] for w in factored_weights(model).values())
    counted = sum(p.numel() for p in model.parameters()) - dropped
    assert sum(p.numel() for p in packed.parameters()) == counted
    stored = read_header(tmp_path / "model.safetensors").values()
    assert sum(tensor.bytes for tensor in stored) == 4 * counted + 4 * sum(len(w.index) for w in weights)
    assert sparse_density(packed) == sparse_density(model) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("kind", MODELS)
def test_a_densified_model_is_a_stock_one(kind, tmp_path):
    model = prune(factor_experts(model_of(kind), RANK))
    expected = logits(model)
    model.save_pretrained(tmp_path / "packed")
    dense = densify(load_factored(tmp_path / "packed"))
    assert type(dense) is type(model_of(kind))
    torch.testing.assert_close(logits(dense), expected, rtol=1e-5, atol=2e-5)
    if kind in ("switch-merged", "switch-tied"):
        assert sum(p.numel() for p in dense.parameters()) == sum(p.numel() for p in model_of(kind).parameters())
        return  # experts that are one and the same need a form of their own, factored or not
    dense.save_pretrained(tmp_path / "dense")
    auto = AutoModelForSeq2SeqLM if kind == "switch" else AutoModelForCausalLM
    plain, report = auto.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(plain), logits(dense))
    assert "factored" not in (tmp_path / "dense/config.json").read_text().lower()


@pytest.mark.parametrize("kind", ["phimoe", "qwen3_moe", "switch"])
def test_no_stock_class_loads_a_packed_folder_with_invented_experts(kind, tmp_path):
    """From the folder, by its own class or an auto class, and from a Trainer's checkpoint."""
    model = factor_experts(model_of(kind), RANK)
    model.save_pretrained(tmp_path)
    for loader in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, type(model_of(kind))):
        with pytest.raises((ValueError, OSError), match=r"load_factored|Unrecognized configuration class"):
            loader.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load_factored"):
        type(model_of(kind)).from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_commands_say_what_to_do_with_a_packed_folder(tmp_path, capsys):
    factor_experts(tiny_model("olmoe"), RANK).save_pretrained(tmp_path)
    assert main(["size", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error:") and f"slimmoe export {tmp_path} --form dense --output OUT" in error
    assert "\n" not in error


def _swap_weights(folder: Path, **overrides) -> None:
    """Put another model's weights beside the config."""
    factor_experts(tiny_model("olmoe", **overrides), RANK).save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other/model.safetensors", folder)


def _change_tensor(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    full = next(key for key in tensors if key.endswith(name))
    tensors[full] = change(tensors[full])
    save_file(tensors, folder / "model.safetensors")


def _add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.extra": torch.zeros(3)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda folder: (folder / "config.json").unlink(), "not a factored checkpoint"),
        (lambda folder: tiny_model("olmoe").config.save_pretrained(folder), "not a factored checkpoint"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1234"), "cannot be read"),
        (lambda folder: _swap_weights(folder, num_hidden_layers=1), "is missing"),
        (lambda folder: _swap_weights(folder, num_hidden_layers=3), "is not what config.json makes of it"),
        (lambda folder: _swap_weights(folder, intermediate_size=40), "is not what config.json makes of it"),
        (lambda folder: _change_tensor(folder, "down_proj.index", lambda t: t + 1), "is not what config.json makes of it"),
        (lambda folder: _change_tensor(folder, "down_proj.index", lambda t: t.flip(0)), "is not what config.json makes of it"),
        (lambda folder: _change_tensor(folder, "down_proj.rows", lambda t: t[1:].clone()), "is not what config.json makes of it"),
        (lambda folder: _add_tensor(folder), r"model\.extra is left over"),
        (lambda folder: _change_tensor(folder, "lm_head.weight", lambda t: t[1:].clone()), "does not hold the weights"),
    ],
)  # fmt: skip
def test_a_damaged_packed_folder_is_named(harm, named, tmp_path):
    factor_experts(tiny_model("olmoe"), RANK).save_pretrained(tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(ValueError, match=named) as caught:
        load_factored(tmp_path / "model")
    assert "\n" not in str(caught.value)


# The callback


def rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    ids = tiny_batch(count, 16)["input_ids"]
    return [{"input_ids": row, "labels": row} for row in ids]


class Watch(TrainerCallback):
    """Notes after every step the density and which rows are there."""

    def __init__(self):
        self.densities, self.present = [], []

    def on_step_end(self, args, state, control, **kwargs):
        weights = factored_weights(kwargs["model"]).values()
        self.present.append(torch.cat([(w.sparse != 0).any(-1).flatten() for w in weights]))
        self.densities.append(sparse_density(kwargs["model"]))


def trainer(folder, callback, model=None, kind=Trainer, watch=None, **changes):
    values = {
        "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant", "bf16": False, **changes,
    }  # fmt: skip
    return kind(
        model=model or factor_experts(tiny_model("olmoe"), RANK), args=TrainingArguments(output_dir=str(folder), **values),
        train_dataset=rows(), eval_dataset=rows(4), processing_class=tiny_tokenizer(),
        callbacks=[callback, *([watch] if watch else [])],
    )  # fmt: skip


def test_the_schedule_is_the_papers_cubic():
    """By hand, P_T = .1, T = 100, T_i = 10, T_f = 30: at half way .1 + .9 / 8."""
    schedule = SparsitySchedule(density=0.1, steps=100, initial_steps=10, final_steps=30, beta=0.85)
    assert [schedule.at(step) for step in (0, 10)] == [1, 1]
    assert schedule.at(40) == pytest.approx(0.1 + 0.9 / 8)
    assert schedule.at(25) == pytest.approx(0.1 + 0.9 * 0.75**3)
    assert [schedule.at(step) for step in (70, 85, 100)] == [0.1, 0.1, 0.1]


@pytest.mark.parametrize("kind", ["olmoe", "switch"])
def test_training_follows_the_schedule_and_ends_at_the_density(kind, tmp_path):
    """To within the longest row of the budget, never above it; the rows gone are zero in what is saved."""
    watch, callback = Watch(), SparsityCallback(0.1, initial_steps=2, final_steps=3)
    run = trainer(tmp_path, callback, factor_experts(model_of(kind), RANK), watch=watch)
    run.train()
    weights = factored_weights(run.model).values()
    row = max(w.sparse.shape[-1] for w in weights) / sum(w.sparse.numel() for w in weights)
    for step, density in enumerate(watch.densities, 1):
        wanted = callback.schedule.at(step)
        assert wanted - row <= density <= wanted, step
    run.save_model(tmp_path / "model")
    assert sparse_density(load_factored(tmp_path / "model")) == watch.densities[-1] <= 0.1


def test_scores_are_the_moving_average_of_the_papers_importance_per_row(tmp_path):
    """Recomputed in full, .85 EMA + .15 |s ds| for every element, then the mean along the row; one threshold over all."""
    callback = SparsityCallback(0.5, initial_steps=0, final_steps=1)
    model = factor_experts(tiny_model("olmoe"), RANK)

    class Recompute(TrainerCallback):
        def __init__(self):
            self.averages = {}

        def on_optimizer_step(self, args, state, control, **kwargs):
            for name, weight in factored_weights(model).items():
                importance = (weight.sparse * weight.sparse.grad).abs().detach()
                self.averages[name] = 0.85 * self.averages.get(name, 0) + 0.15 * importance

    recompute = Recompute()
    trainer(tmp_path, recompute, model, watch=callback, max_steps=3).train()
    kept, dropped = [], []
    for name, weight in factored_weights(model).items():
        score = recompute.averages[name].mean(-1)
        torch.testing.assert_close(callback.scores[name], score, rtol=1e-4, atol=1e-12)
        present = (weight.sparse != 0).any(-1)
        kept.append(score[present])
        dropped.append(score[~present])
    assert torch.cat(kept).min() >= torch.cat(dropped).max()


def test_rows_that_were_zeroed_come_back(tmp_path):
    watch = Watch()
    callback = SparsityCallback(0.3, initial_steps=0, final_steps=8, beta=0.5)
    trainer(tmp_path, callback, watch=watch, max_steps=16, learning_rate=0.1).train()
    present = torch.stack(watch.present).int()
    assert (present.diff(dim=0) == 1).any(), "no row ever came back"
    assert present[-1].float().mean() < 0.5


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("kind", [Trainer, DistillationTrainer])
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(kind, tmp_path):
    """Stopped in the middle of the schedule; a plain Trainer too, which loses stock fused experts when it resumes."""
    saving = {"save_strategy": "steps", "save_steps": 4}

    def run(folder, watch=None):
        callback = SparsityCallback(0.1, initial_steps=2, final_steps=3)
        if kind is Trainer:
            return trainer(folder, callback, watch=watch, **saving)
        from datasets import Dataset
        from runs import trainer_for

        data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows()])
        return trainer_for(
            folder, "olmoe", factor_experts(tiny_model("olmoe"), RANK), train_dataset=data, max_steps=12,
            per_device_train_batch_size=4, callbacks=[callback, *([watch] if watch else [])], **saving,
        )  # fmt: skip

    through = run(tmp_path / "through")
    through.train()
    run(tmp_path / "cut", StopAt(8)).train()
    shutil.rmtree(tmp_path / "cut/checkpoint-4")
    resumed = run(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    for name, weight in through.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert sparse_density(resumed.model) <= 0.1


def test_the_mark_of_a_checkpoint_vouches_for_the_state(tmp_path):
    from slimmoe_hf.resumption import MARK, ResumableTrainer, require_complete

    run = trainer(
        tmp_path, SparsityCallback(0.1), kind=ResumableTrainer, save_strategy="steps", save_steps=6, max_steps=6
    )
    run.train()
    assert STATE in (tmp_path / "checkpoint-6" / MARK).read_text()
    (tmp_path / "checkpoint-6" / STATE).unlink()
    with pytest.raises(ValueError, match=f"{STATE} is missing"):
        require_complete(tmp_path / "checkpoint-6")


def test_a_checkpoint_that_nobody_announced_has_the_state_too(tmp_path):
    """That the best model is to be saved is known after the evaluation alone."""
    run = trainer(
        tmp_path, SparsityCallback(0.1), save_strategy="best", eval_strategy="steps", eval_steps=3, max_steps=6,
        metric_for_best_model="loss",
    )  # fmt: skip
    run.train()
    saved = list(tmp_path.glob("checkpoint-*"))
    assert saved and all((folder / STATE).is_file() for folder in saved)


@pytest.mark.parametrize(
    ("harm", "changes", "named"),
    [
        (lambda folder: (folder / STATE).unlink(), {}, "missing, so this run cannot go on exactly"),
        (lambda folder: (folder / STATE).write_bytes(b"123"), {}, "damaged"),
        (lambda folder: None, {"density": 0.2}, "density was 0.1 and is 0.2"),
        (lambda folder: None, {"initial_steps": 3}, "initial_steps was 2 and is 3"),
    ],
)
def test_a_resume_without_the_state_or_with_other_settings_is_refused(harm, changes, named, tmp_path):
    settings = {"density": 0.1, "initial_steps": 2, "final_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer(tmp_path, SparsityCallback(**settings), watch=StopAt(3), **saving).train()
    harm(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=named):
        trainer(tmp_path, SparsityCallback(**{**settings, **changes}), **saving).train(resume_from_checkpoint=True)


def _packed(folder):
    factor_experts(tiny_model("olmoe"), RANK).save_pretrained(folder / "packed")
    return load_factored(folder / "packed")


def _frozen(folder):
    model = factor_experts(tiny_model("olmoe"), RANK)
    for weight in factored_weights(model).values():
        weight.sparse.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "changes", "named"),
    [
        (lambda _: tiny_model("olmoe"), {}, "no factored experts to make sparse"),
        (_packed, {}, r"load_factored\(folder, regrow=True\)"),
        (_frozen, {}, "is frozen"),
        (lambda _: None, {"initial_steps": 5, "final_steps": 7}, "leave nothing of 12 steps"),
        (lambda _: None, {"density": 1.5}, "density=1.5 is not between 0 and 1"),
        (lambda _: None, {"beta": 1.0}, r"beta=1.0 is not in \[0, 1\)"),
    ],
)
def test_what_cannot_be_made_sparse_is_refused(model, changes, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        trainer(tmp_path, SparsityCallback(**changes), model(tmp_path)).train()


def test_a_sharded_model_is_refused_in_one_line(tmp_path):
    run = trainer(tmp_path, SparsityCallback())
    run.args.fsdp = "full_shard"
    with pytest.raises(ValueError, match="train without FSDP, DeepSpeed and tensor parallelism") as caught:
        run.callback_handler.on_train_begin(run.args, run.state, run.control)
    assert "\n" not in str(caught.value)


# Stable rank and size


def test_stable_rank_of_known_matrices():
    """Of a projection its rank; of diag(2, 1, 1) it is (4 + 1 + 1) / 4."""
    assert stable_rank(torch.diag(torch.tensor([1.0, 1, 1, 0]))) == pytest.approx(3)
    assert stable_rank(torch.diag(torch.tensor([2.0, 1, 1])).expand(5, 3, 3)).tolist() == pytest.approx([1.5] * 5)


@pytest.mark.parametrize("kind", ["phimoe", "switch-merged", "switch-tied"])
def test_stable_ranks_are_per_layer_and_compared(kind):
    before = stable_ranks(model_of(kind))
    model = factor_experts(model_of(kind), RANK)
    with torch.no_grad():
        for weight in factored_weights(model).values():
            weight.sparse.zero_()
    changes = compare_stable_ranks(before, stable_ranks(model))
    layers = len(factorable(model)) + (kind != "phimoe")
    assert len(changes) == 2 * layers
    assert changes[-1].experts_before == (4 if kind == "phimoe" else 3)
    assert all(row.after <= RANK and row.change < 0 for row in changes[2 * (kind != "phimoe") :])
    assert stable_rank_table(changes).count("\n") == len(changes)


def test_switch_base_32_counts_as_published():
    """1,978,514,688 -> 732,806,400 -> 380.7 M (arXiv 2310.01334): 8 of 32 experts in 11 layers, rank 32, density .10."""
    count = count_factored(SwitchTransformersConfig(**SWITCH_BASE_32), experts_kept=8)
    assert (count.original, count.merged, count.experts) == (1_978_514_688, 732_806_400, 88)
    assert round(count.factored / 1e6, 1) == 380.7
    with pytest.raises(ValueError, match=r"makes 90\.2"):
        count_factored(SwitchTransformersConfig(**SWITCH_BASE_32), experts_kept=8.2)


@pytest.mark.parametrize("kind", ["mixtral", "switch"])
def test_the_count_is_that_of_the_model(kind):
    model = model_of(kind)
    count = count_factored(model.config, 4, RANK, density=0.5)
    assert count.original == count.merged == sum(p.numel() for p in model.parameters())
    factor_experts(model, RANK)
    sparse = sum(weight.sparse.numel() for weight in factored_weights(model).values())
    assert count.factored == sum(p.numel() for p in model.parameters()) - sparse // 2


@pytest.mark.parametrize("share", [None, 0.75])
def test_the_operations_counted_are_those_that_run(share, tmp_path):
    """PyTorch's own counter over a forward pass, dense and packed."""
    model, ids = model_of("switch"), torch.randint(2, 320, (1, 20))
    if share is not None:
        prune(factor_experts(model, RANK), share).save_pretrained(tmp_path)
        model = load_factored(tmp_path)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids[:, :7])
    counted = switch_flops(model.config, 20, 7, None if share is None else RANK, density=0.25)
    assert counter.get_total_flops() == counted


def test_a_copy_of_a_factored_model_is_its_own():
    model = factor_experts(tiny_model("mixtral"), RANK)
    other = prune(copy.deepcopy(model))
    assert sparse_density(model) == 1 > sparse_density(other)
    assert all(
        isinstance(w, FactoredWeight) and not isinstance(w, PackedWeight) for w in factored_weights(other).values()
    )


def test_a_factored_model_is_neither_scored_nor_cut_nor_merged():
    model = tiny_model("phimoe")
    stats = collect_stats(model, [tiny_batch()], progress=False)
    merging = plan_merge(model, stats, 3)
    factored = factor_experts(model, rank=8)
    before = {name: tensor.clone() for name, tensor in factored.state_dict().items()}
    for refused in (
        lambda: collect_stats(factored, [tiny_batch()], progress=False),
        lambda: apply_plan(factored, make_plan(stats, Target(num_experts=3))),
        lambda: apply_plan(factored, make_plan(stats, Target(kv_groups=1))),
        lambda: plan_merge(factored, stats, 3),
        lambda: duplicate_merged(factored, merging),
        lambda: refuse_what_cannot_be_cut(factored),
    ):
        with pytest.raises(ValueError, match=r"are factored, so they can be neither scored .*densify\(model\)\.$"):
            refused()
    assert all(torch.equal(before[name], tensor) for name, tensor in factored.state_dict().items())


def test_a_factored_folder_is_not_pushed_with_a_card_that_says_it_is_stock(tmp_path: Path, capsys):
    factor_experts(tiny_model("phimoe"), rank=8).save_pretrained(tmp_path / "packed")
    assert main(["push", str(tmp_path / "packed"), "me/packed", "--dry-run"]) == 2
    assert "packed: its experts are factored, and the card would say" in " ".join(capsys.readouterr().err.split())
