"""A checkpoint in the one form that all engines of `engines` read, weights unchanged, without loading the model.

Published names for every weight, zero biases where engines expect some, both spellings of config keys, and a tokenizer that
transformers before 5 knows too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedConfig

from slimmoe_hf.checkpoint import SHARD_BYTES, carry
from slimmoe_hf.cuts import Cut, as_published, name_shards, write_index
from slimmoe_hf.disk import Part, check_tied, expected_shapes, locate, meta_model
from slimmoe_hf.engine_rules import BEGINNING, TOKENIZER
from slimmoe_hf.families import config_from
from slimmoe_hf.loading import load_config, weight_files
from slimmoe_hf.serving import serving_config
from slimmoe_hf.shards import Buffer, ShardWriter, all_finite, read_header

_SPELLED = (
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers",
    "norm_topk_prob", "router_jitter_noise", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
    "tie_word_embeddings",
)  # fmt: skip
"""Keys that some engine has no default for, or another one than transformers."""
_TOKENIZER_5 = "TokenizersBackend"
"""What transformers 5 calls the class that every version knows as `PreTrainedTokenizerFast`."""


def write_engine_form(source: Path, destination: Path) -> None:
    """Write a stock checkpoint once more, as engines expect it: the same weights, read and written one at a time.

    Args:
        source: Its folder, only read.
        destination: A folder that is not there yet.

    Raises:
        ValueError: The checkpoint is damaged, quantised in a way that cannot be undone, or of an unknown family.
    """
    config = load_config(source)
    stored = {name: tensor for file in weight_files(source) for name, tensor in read_header(file).items()}
    parts = locate(config, stored, str(source))
    check_tied(config, stored, source)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    values |= _spelled_out(config, values)
    if any(part.scale is not None for part in parts.values()):
        values["dtype"] = "bfloat16"  # FP8, undone while it is read
    values = engine_config(values)
    destination.mkdir()
    _write_weights(source, destination, _cuts(parts, values))
    (destination / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    carry(source, destination)
    rewrite_tokenizer(destination)


def _spelled_out(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """What transformers takes for granted where a `config.json` does not say it, and engines do not."""
    read = config.to_dict()
    found = {key: read[key] for key in _SPELLED if values.get(key) is None and read.get(key) is not None}
    if read.get("rope_parameters"):
        found["rope_parameters"] = read["rope_parameters"]
    return {**found, "architectures": [type(meta_model(config)).__name__]}


def engine_config(values: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` for all engines: `serving_config`, and what the older ones among them read.

    Args:
        values: Of the config of a model in one of our families.

    Returns:
        A new dict.
    """
    values = serving_config(values)
    if "dtype" in values:
        values["torch_dtype"] = values["dtype"]
    if values["model_type"] == "phimoe":  # llama.cpp's converter asks for it where no rope is scaled too
        values.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    return values


def rewrite_tokenizer(folder: Path) -> None:
    """Have a tokenizer spell its class, its tokens and what it begins texts with as before transformers 5; it stays the same."""
    file = folder / TOKENIZER
    if not file.is_file():
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == _TOKENIZER_5:
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    if values.get("tokenizer_class") in BEGINNING and (folder / "tokenizer.json").is_file():
        values = {**_edges(folder, values), **values}
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _edges(folder: Path, values: dict[str, Any]) -> dict[str, bool]:
    """Whether a tokenizer puts tokens around every text, by what it does with one."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bare, whole = (tokenizer.encode("a", add_special_tokens=added).tokens for added in (False, True))

    def puts(key: str, edge: slice) -> bool:
        token = values.get(key)
        token = token["content"] if isinstance(token, dict) else token
        return whole[edge] == [token] and bare[edge] != [token]

    return {"add_bos_token": puts("bos_token", slice(0, 1)), "add_eos_token": puts("eos_token", slice(-1, None))}


def _cuts(parts: dict[str, Part], values: dict[str, Any]) -> list[Cut]:
    """Every weight as it is, and zeros for the biases that the new config promises."""
    config = config_from(values)
    wanted = expected_shapes(config)
    cuts = [Cut(name, part.shape, part.dtype, part) for name, part in parts.items()]
    zeros = sorted(wanted.keys() - parts.keys())
    assert all(name.endswith(".bias") for name in zeros), zeros
    return as_published(config, [*cuts, *(Cut(name, wanted[name], cuts[0].dtype, None) for name in zeros)])


def _write_weights(source: Path, destination: Path, cuts: Sequence[Cut]) -> None:
    buffer, shards = Buffer(), name_shards(cuts, SHARD_BYTES)
    for file, held in shards.items():
        writer = ShardWriter(destination / file, {cut.name: (cut.dtype, cut.shape) for cut in held})
        try:
            for cut in held:
                weight = cut.read(source, buffer)
                if not all_finite(weight):
                    raise ValueError(f"{source}: {cut.name} holds values that are not finite. Fetch or make it again.")
                writer.add(cut.name, weight)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
    write_index(destination, shards)
