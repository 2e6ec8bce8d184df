"""What an engine's rule about a checkpoint is made of: facts read from its files, and checks that are sentences.

A check gives the reason why a checkpoint breaks it, in words for users, or nothing. `engines` declares which engine has which.
Shape letters: D model width, H query heads, F expert width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slimmoe_hf.families import FAMILIES, Shape, shape_of
from slimmoe_hf.loading import FACTORED, form_of, load_config, weight_files
from slimmoe_hf.shards import read_header
from slimmoe_hf.shared_config import SHARED

Effect = Literal["loads", "differs", "no", "not known"]
"""What becomes of a checkpoint: it loads; it loads and computes something else; it does not load; the rules do not say.

A rule whose effect is "loads" names a condition that the rules leave open."""
TOKENIZER = "tokenizer_config.json"
BEGINNING = ("LlamaTokenizer", "LlamaTokenizerFast")
"""Tokenizers that before transformers 5 began every text with a token unless `add_bos_token` said otherwise."""


@dataclass(frozen=True)
class Facts:
    """A checkpoint as rules see it.

    Attributes:
        family: Its `model_type`.
        form: What its experts are, in a form of our own: factored, or merged and shared; None in a stock one.
        written: Its `config.json` as it stands. values: As transformers reads it, with all defaults.
        shape: Its sizes; None, and `values` empty, where no rules are written for its family.
        tensors: Names of all stored weights. files: Names of all files.
        tokenizer: Its `tokenizer_config.json`, empty where there is none.
    """

    family: str
    form: str | None
    written: Mapping[str, Any]
    values: Mapping[str, Any]
    shape: Shape | None
    tensors: frozenset[str]
    files: frozenset[str]
    tokenizer: Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """One thing that an engine asks of a checkpoint.

    Attributes:
        check: Gives the reason where a checkpoint breaks it, otherwise nothing.
        effect: What becomes of it then.
        source: Where in the engine's own files that is to be read.
        mended: `slimmoe export --for` writes checkpoints that keep it, whatever they were.
    """

    check: Callable[[Facts], str]
    effect: Effect
    source: str
    mended: bool = False


def facts_of(folder: Path, known: Collection[str], written: Mapping[str, Any] | None = None) -> Facts:
    """Read a checkpoint's facts from its folder; no weight is read.

    Args:
        folder: The checkpoint.
        known: Families that rules are written for; of others little is read.
        written: The `config.json` that it will be published with; None is its own.

    Raises:
        ValueError: It is no checkpoint, or damaged.
    """
    form = form_of(folder)
    if written is None:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert written is not None
    own = {FACTORED: "factored", SHARED: "merged and shared"}[form] if form is not None else None
    family = str(written.get("model_type"))
    config = load_config(folder) if form is None and family in known else None
    return Facts(
        family, own, written, config.to_dict() if config is not None else {},
        shape_of(config) if config is not None else None,
        frozenset(name for shard in weight_files(folder) for name in read_header(shard)),
        frozenset(entry.name for entry in folder.iterdir()), _tokenizer_of(folder),
    )  # fmt: skip


def _tokenizer_of(folder: Path) -> Mapping[str, Any]:
    file = folder / TOKENIZER
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}). Fetch or make it again.") from error
    return values if isinstance(values, dict) else {}


def named(architecture: str) -> Callable[[Facts], str]:
    """The engine goes by the name of the architecture."""

    def check(facts: Facts) -> str:
        found = (facts.written.get("architectures") or ["none"])[0]
        return "" if found == architecture else f"config.json names the architecture {found}, it knows {architecture}"

    return check


def written(*keys: str) -> Callable[[Facts], str]:
    """The engine reads these keys of `config.json` and has no good default for one that is missing."""

    def check(facts: Facts) -> str:
        missing = [key for key in keys if facts.written.get(key) is None]
        return f"config.json lacks {', '.join(missing)}, which it reads" if missing else ""

    return check


def defaults(**theirs: Any) -> Callable[[Facts], str]:
    """The engine has its own default for a key of `config.json` that is missing, and it is not that of transformers."""

    def check(facts: Facts) -> str:
        missing = [key for key, value in theirs.items() if key not in facts.written and facts.values.get(key) != value]
        return f"config.json lacks {', '.join(missing)}, so it takes its own default" if missing else ""

    return check


def fixed(key: str, value: Any) -> Callable[[Facts], str]:
    """The engine's code has a value where the config has a key."""

    def check(facts: Facts) -> str:
        found = facts.values.get(key)
        return "" if found == value else f"{key} is {found} and it always computes as if it were {value}"

    return check


def ignored(key: str) -> Callable[[Facts], str]:
    """The engine has no code for what a key turns on."""
    return lambda facts: f"{key} is {facts.values[key]} and it does not know that" if facts.values.get(key) else ""


def head_width(facts: Facts) -> str:
    """The engine computes the head width as D/H."""
    shape = facts.shape
    if shape is None or shape.head_width * shape.query_heads == shape.hidden_size:
        return ""
    return (
        f"it takes heads to be D/H wide, {shape.hidden_size}/{shape.query_heads}, and here they are {shape.head_width} (pruned "
        "key/value groups)"
    )


def all_biases(facts: Facts) -> str:
    """The engine builds attention and head with biases always."""
    heads = [
        name for name in facts.tensors if name.endswith(("_proj.weight", "lm_head.weight")) and ".experts." not in name
    ]
    lacking = sorted(name for name in heads if name.removesuffix("weight") + "bias" not in facts.tensors)
    return (
        f"it expects biases in attention and head, and {lacking[0]} has none ({len(lacking)} such)" if lacking else ""
    )


def no_biases(facts: Facts) -> str:
    """The engine builds the attention's output projection without a bias."""
    found = sorted(name for name in facts.tensors if name.endswith("o_proj.bias"))
    return f"it has no place for {found[0]} ({len(found)} such)" if found else ""


def untied(facts: Facts) -> str:
    """The engine wants the head's weights in the files."""
    return (
        "" if "lm_head.weight" in facts.tensors else "it wants lm_head.weight, and here the embedding is used as head"
    )


def per_expert(facts: Facts) -> str:
    """The engine reads one weight per expert and projection."""
    name = FAMILIES[facts.family].disk.up.format(0)
    return "" if any(tensor.endswith(name) for tensor in facts.tensors) else f"its experts lie fused, it reads {name}"


def full_attention(facts: Facts) -> str:
    """The engine lets every token attend to all before it."""
    window, length = facts.values.get("sliding_window"), facts.values.get("max_position_embeddings")
    if not window or not facts.values.get("use_sliding_window", True) or (length and window >= length):
        return ""
    return f"it does not know sliding_window ({window}): past {window} tokens it attends to more"


def rope_kinds(*known: str) -> Callable[[Facts], str]:
    """The engine knows these ways to scale rope, or these were compared with what transformers computes."""

    def check(facts: Facts) -> str:
        kind = (facts.values.get("rope_parameters") or {}).get("rope_type", "default")
        if kind in known:
            return ""
        return f"rope is scaled by {kind}; it is known to compute what transformers does for {', '.join(known)} only"

    return check


def long_factors(short_window: bool) -> Callable[[Facts], str]:
    """The engine takes longrope's long factors at every length; `short_window`: not where the window is no longer than before."""

    def check(facts: Facts) -> str:
        rope = facts.values.get("rope_parameters") or {}
        before, window = rope.get("original_max_position_embeddings"), facts.values.get("max_position_embeddings")
        if rope.get("rope_type") != "longrope" or (short_window and before and window and window <= before):
            return ""
        served = f" (served with at most {before} tokens it does not)" if short_window else ""
        return f"it takes longrope's long factors at every length, transformers the short ones up to {before} tokens{served}"

    return check


def every_layer_sparse(facts: Facts) -> str:
    """The engine expects experts in every layer."""
    layers, sparse = (
        facts.values["num_hidden_layers"],
        {name.split(".")[2] for name in facts.tensors if ".experts." in name},
    )
    dense = sorted(set(map(str, range(layers))) - sparse, key=int)
    return f"it expects experts in every layer, and layer {dense[0]} is dense" if dense else ""


def all_heads_have_keys(facts: Facts) -> str:
    """The engine expects as many key/value heads as query heads."""
    shape = facts.shape
    if shape is None or shape.kv_groups == shape.query_heads:
        return ""
    return f"it expects as many key/value heads as query heads ({shape.query_heads}), and there are {shape.kv_groups}"


def top_two(facts: Facts) -> str:
    """The engine goes by the number of experts per token where transformers' PhiMoE does not."""
    found = facts.values.get("num_experts_per_tok")
    if found == 2:
        return ""
    return f"num_experts_per_tok is {found}, which it goes by, and in transformers PhiMoE always takes 2"


def vocabulary(facts: Facts) -> str:
    """The engine wants a tokenizer."""
    found = facts.files & {"tokenizer.json", "tokenizer.model", "vocab.json"}
    return "" if found else "there is no tokenizer, and it needs one"


def byte_level(facts: Facts) -> str:
    """The engine knows tokenizers by what they make of one text, but for SentencePiece's where it takes those."""
    if facts.family == "mixtral" and "tokenizer.model" in facts.files:
        return ""
    return "its converter has to know the tokenizer, by a hash of what it makes of one text; that was not looked at"


def sentencepiece(facts: Facts) -> str:
    """The engine makes this family's vocabulary of a SentencePiece model and of nothing else."""
    return "" if "tokenizer.model" in facts.files else "there is no tokenizer.model, which it makes the vocabulary of"


def older_tokenizer(facts: Facts) -> str:
    """The engine's tokenizer library does not have the classes and the spellings that came with transformers 5."""
    found = facts.tokenizer.get("tokenizer_class")
    if found in ("TokenizersBackend", "SentencePieceBackend"):
        return f"{TOKENIZER} names {found}, a class that came with transformers 5"
    if isinstance(facts.tokenizer.get("extra_special_tokens"), list):
        return f"{TOKENIZER} has extra_special_tokens as a list, which came with transformers 5"
    return ""


def silent_beginning(facts: Facts) -> str:
    """The engine's tokenizer library takes the beginning of a text from a key that transformers 5 does not write."""
    name = facts.tokenizer.get("tokenizer_class")
    if name not in BEGINNING or "add_bos_token" in facts.tokenizer:
        return ""
    return f"{TOKENIZER} lacks add_bos_token, so its {name} begins every text with <s>, whatever tokenizer.json says"


def older_rope(default: float) -> Callable[[Facts], str]:
    """The engine reads the rope fields as they were spelled before transformers 5, and takes `default` where theta is missing."""

    def check(facts: Facts) -> str:
        rope = facts.values.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default" and facts.written.get("rope_scaling") is None:
            return "config.json lacks rope_scaling, so it does not scale"
        found, theta = facts.written.get("rope_theta"), rope.get("rope_theta")
        if found is None:
            return (
                ""
                if theta == default
                else f"config.json lacks rope_theta, which is {theta}, and it takes {default:g} then"
            )
        return (
            ""
            if found == theta
            else f"config.json has rope_theta {found}, which it reads, and {theta} in rope_parameters"
        )

    return check


def always(reason: str) -> Callable[[Facts], str]:
    """The engine computes something else of every model of the family."""
    return lambda facts: reason
