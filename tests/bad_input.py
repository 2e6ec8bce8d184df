"""What can be wrong with a recipe, its checkpoint or its data, and the one line that should say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

Values = dict[str, Any]


def target(**sizes: int) -> Callable[[Path, Values], None]:
    """Set the last stage's target."""

    def spoil(home: Path, recipe: Values) -> None:
        recipe["stages"][-1]["target"] = sizes

    return spoil


def misspelt(home: Path, recipe: Values) -> None:
    recipe["stages"][0]["critreion"] = "taylor"


def not_a_number(home: Path, recipe: Values) -> None:
    recipe["stages"][1]["distillation"]["learning_rate"] = "fast"


def dense(home: Path, recipe: Values) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=320
    )
    LlamaForCausalLM(config).save_pretrained(home / "teacher")


def truncated(home: Path, recipe: Values) -> None:
    file = home / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def beheaded(home: Path, recipe: Values) -> None:
    (home / "teacher" / "model.safetensors").write_bytes(b"\x00" * 7)


def sharded(home: Path) -> list[Path]:
    (home / "teacher" / "model.safetensors").unlink()
    tiny_model("phimoe").save_pretrained(home / "teacher", max_shard_size="100KB")
    return sorted((home / "teacher").glob("*.safetensors"))


def shard_missing(home: Path, recipe: Values) -> None:
    sharded(home)[-1].unlink()


def shard_outside(home: Path, recipe: Values) -> None:
    sharded(home)
    index = home / "teacher" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))


def not_finite(home: Path, recipe: Values) -> None:
    file = home / "teacher" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"][3, 5] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})


def tensor_missing(home: Path, recipe: Values) -> None:
    file = home / "teacher" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.block_sparse_moe.gate.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def pickled(home: Path, recipe: Values) -> None:
    (home / "teacher" / "model.safetensors").rename(home / "teacher" / "pytorch_model.bin")


def broken_config(home: Path, recipe: Values) -> None:
    (home / "teacher" / "config.json").write_text('{"model_type": "phimoe", ')


def wrong_config(home: Path, recipe: Values) -> None:
    config = json.loads((home / "teacher" / "config.json").read_text())
    (home / "teacher" / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))


def no_tokenizer(home: Path, recipe: Values) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (home / "teacher" / name).unlink()


def empty_data(home: Path, recipe: Values) -> None:
    (home / "text.jsonl").write_text("")


def short_data(home: Path, recipe: Values) -> None:
    recipe["data"]["max_length"] = 100_000


def greedy_calibration(home: Path, recipe: Values) -> None:
    recipe["stages"][0]["calibration"]["tokens"] = 10_000_000


def large_tokenizer(home: Path, recipe: Values) -> None:
    tokenizer = tiny_tokenizer().__class__.from_pretrained(home / "teacher")
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(home / "teacher")


def other_teacher(home: Path, recipe: Values) -> None:
    save_tiny(home / "other", vocab_size=256)
    recipe["teacher"] = str(home / "other")


def renamed_tokens(home: Path, recipe: Values) -> None:
    save_tiny(home / "other")
    file = home / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(content))
    recipe["teacher"] = str(home / "other")


def no_room(home: Path, recipe: Values) -> None:
    recipe["stages"][0]["distillation"]["per_device_train_batch_size"] = 10**9


def cached(**settings: Any) -> Callable[[Path, Values], None]:
    """A cache of 64 tokens, and something of the last stage's loss that it cannot serve."""

    def spoil(home: Path, recipe: Values) -> None:
        recipe["teacher_cache"] = {"top_k": 64}
        recipe["stages"][-1]["distillation"] |= settings

    return spoil


BAD_RECIPES: list[tuple[Callable[[Path, Values], None], str]] = [
    (misspelt, "recipe.yaml: stages.0.critreion: unknown key; did you mean criterion?"),
    (not_a_number, "stages.1.distillation: learning_rate='fast' is not a number"),
    (target(expert_width=24), "stages.1.target: expert_width=24 is not between 8 and the model's width of 16"),
    (target(expert_width=0), "stages.1.target: expert_width=0 is not between 8 and"),
    (target(expert_width=12), "stages.1.target: expert_width=12 is not a multiple of 8"),
    (target(kv_groups=3), "stages.1.target: kv_groups=3 is not between 1 and the model's 2 key/value groups"),
    (target(), "stages.1.target: the target asks for nothing"),
    (target(budget=10), "stages.1.target: the budget of 10 parameters cannot be met: the smallest shape"),
    (cached(beta=0.5), "stages.1.distillation: beta=0.5 looks at every token, and teacher_cache keeps 64. Set"),
    (cached(loss_top_k=128), "stages.1.distillation: loss_top_k=128, and teacher_cache.top_k is 64. Raise it."),
    (cached(router_logits_weight=0.1), "stages.1.distillation: router_logits_weight=0.1 compares what is inside"),
    (
        cached(precompute_teacher_logits=True),
        "precompute_teacher_logits cannot be set here: the recipe's `teacher_cache`",
    ),
    (dense, "model_type='llama' is not a Mixture-of-Experts family"),
    (truncated, "teacher/model.safetensors: truncated at "),
    (beheaded, "teacher/model.safetensors: truncated: 7 bytes"),
    (shard_missing, ".safetensors: missing, but the index says that it holds "),
    (shard_outside, "points outside the folder (../model-00001"),
    (not_finite, "model.layers.1.block_sparse_moe.experts.2.w2.weight holds 1 values that are not finite"),
    (tensor_missing, "model.layers.1.block_sparse_moe.gate.weight is not in the weight files"),
    (pickled, "no model.safetensors and no model.safetensors.index.json. Pickled weights are not read"),
    (broken_config, "teacher/config.json: not valid JSON"),
    (wrong_config, "teacher/config.json: Validation error for field 'hidden_size'"),
    (no_tokenizer, "teacher: no usable tokenizer"),
    (empty_data, "text.jsonl: the file is empty"),
    (short_data, "text.jsonl (validation): the data has"),
    (greedy_calibration, "calibration asks for 10000000 tokens, which is all the training data there is"),
    (large_tokenizer, "its tokenizer has 321 tokens, the model embeddings for 320"),
    (other_teacher, "the student has 320 ids, the teacher 256, and the tokenizer emits 320"),
    (renamed_tokens, "student and teacher do not share a vocabulary"),
    (no_room, "GB of memory"),
]
