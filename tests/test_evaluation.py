"""Measurements: equal to an independent recomputation, independent of the batch size, counted as defined."""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny import FAMILY_NAMES, documents, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimmoe_hf.evaluation import count_parameters, evaluate_checkpoint, generate_text, held_out, measure_loss
from slimmoe_hf.loading import find_checkpoint, load_model, verify_checkpoint, weights_sha256


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("evaluation") / "model")


def some_documents(number: int = 4) -> Dataset:
    return Dataset.from_dict({"text": [text[:700] for text in documents()[:number]]})


def test_loss_equals_an_independent_recomputation(checkpoint: Path):
    """Plain transformers, no function of ours: the recipe that `slimmoe_hf.evaluation` gives in words."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, experts_implementation="eager").eval()
    stream: list[int] = []
    for text in some_documents()["text"]:
        stream += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    rows = torch.tensor(stream[: len(stream) // 48 * 48]).view(-1, 48)
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1]
    nats = -logits.log_softmax(-1).gather(-1, rows[:, 1:, None]).mean().item()
    text_bytes = sum(len(text.encode()) for text in some_documents()["text"])

    found = evaluate_checkpoint(checkpoint, held_out(some_documents(), tokenizer, 48), tokenizer, progress=False)
    assert found.loss == pytest.approx(nats, abs=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) * len(stream) / text_bytes, rel=1e-5)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_loss_does_not_depend_on_the_batch_size(family: str):
    model, rows = tiny_model(family), held_out(some_documents(), tiny_tokenizer(), 32).rows_NT
    losses = [measure_loss(model, rows, size, progress=False).loss for size in (1, 3, len(rows))]
    assert max(losses) - min(losses) < 2e-6


def test_agreement_is_one_with_itself_and_less_with_another():
    model, rows = tiny_model("mixtral"), held_out(some_documents(), tiny_tokenizer(), 32).rows_NT
    assert measure_loss(model, rows, teacher=model, progress=False).agreement == 1.0
    other = measure_loss(model, rows, teacher=tiny_model("mixtral", seed=1), progress=False).agreement
    assert other is not None and other < 0.2


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_router_load_equals_the_choices_counted_one_by_one(family: str):
    model, rows = tiny_model(family), held_out(some_documents(), tiny_tokenizer(), 32).rows_NT
    found = measure_loss(
        model, rows, batch_size=3, teacher=model, progress=False
    )  # the teacher's routing does not count
    layers = [layer for layer in model.model.layers if any("experts" in name for name, _ in layer.named_modules())]
    chosen: list[list[int]] = [[] for _ in layers]
    for number, layer in enumerate(layers):
        router = dict(layer.named_modules())["mlp.router" if family == "phimoe" else "mlp.gate"]
        router.register_forward_hook(
            lambda _m, _i, output, row=number: chosen[row].extend(output[2].flatten().tolist())
        )
    with torch.no_grad():
        model(input_ids=rows)
    for load, choices in zip(found.router_load, chosen, strict=True):
        assert load == [round(choices.count(expert) * 4 / len(choices), 4) for expert in range(4)]
    assert found.router_layers == [index for index, layer in enumerate(model.model.layers) if layer in layers]


def test_a_measurement_has_speed_memory_and_load(checkpoint: Path):
    tokenizer = tiny_tokenizer()
    found = evaluate_checkpoint(checkpoint, held_out(some_documents(), tokenizer, 48), tokenizer, progress=False)
    assert found.prefill_tokens_per_second is not None and found.prefill_tokens_per_second > 0
    assert found.decode_tokens_per_second is not None and found.decode_tokens_per_second > 0
    if sys.platform == "linux":
        assert found.peak_memory is not None and found.peak_memory > found.total_parameters * 4
    assert found.router_layers == [0, 1] and [len(row) for row in found.router_load] == [4, 4]
    assert all(sum(row) == pytest.approx(4, abs=2e-4) for row in found.router_load)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_active_parameters_leave_out_the_experts_not_chosen(family: str, tied: bool):
    model = tiny_model(family, tie_word_embeddings=tied)
    total, active = count_parameters(model)
    assert total == sum(tensor.numel() for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert experts > 0 and active == total - experts // 2  # 2 of 4 experts


def test_held_out_reads_documents_in_order_up_to_the_limit():
    tokenizer = tiny_tokenizer()
    whole, part = held_out(some_documents(), tokenizer, 16), held_out(some_documents(), tokenizer, 16, tokens=300)
    first = len(tokenizer(some_documents()[0]["text"])["input_ids"]) + 1
    assert part.documents == (1 if first >= 300 else 2) and whole.documents == 4
    assert torch.equal(part.rows_NT, whole.rows_NT[: len(part.rows_NT)])
    assert part.tokens == len(part.rows_NT) * 15 and part.stream_tokens >= 300


def test_generated_text_continues_the_prompt_on_one_line(checkpoint: Path):
    model, tokenizer = load_model(checkpoint), tiny_tokenizer()
    lines = generate_text(model, tokenizer, ["The statement", "A class"], 8)
    assert [line.startswith(prompt) for line, prompt in zip(lines, ["The statement", "A class"], strict=True)] == [
        True,
        True,
    ]
    assert lines == generate_text(model, tokenizer, ["The statement", "A class"], 8)
    assert not any("\n" in line for line in lines)


def test_weights_sha256_is_that_of_the_files(checkpoint: Path):
    assert weights_sha256(checkpoint) == hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()


def test_a_sharded_checkpoint_verifies_and_hashes_its_shards_in_order(tmp_path: Path):
    tiny_model("mixtral").save_pretrained(tmp_path, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    verify_checkpoint(tmp_path)
    assert weights_sha256(tmp_path) == hashlib.sha256(b"".join(s.read_bytes() for s in shards)).hexdigest()


def test_a_weight_that_is_not_in_the_files_is_an_error_and_not_a_random_number(tmp_path: Path):
    path = save_tiny(tmp_path / "m", "mixtral")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.input_layernorm\.weight is not in the weight files"):
        load_model(path)


def test_a_model_that_is_nowhere_is_said_so(tmp_path: Path):
    with pytest.raises(ValueError, match="no such folder"):
        find_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no such folder here, and the Hub did not give it"):
        find_checkpoint("nobody/nothing")
