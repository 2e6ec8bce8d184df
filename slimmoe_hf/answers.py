"""A teacher's answers to texts, from a model in memory.

Shape letters: B texts at a time, T tokens of the longest, N answers, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimmoe_hf.cache_format import CacheSpec, Kind
from slimmoe_hf.cache_writer import CacheWriter, top_k_answers
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.identity import model_fingerprint

CHUNK_BYTES = {"cpu": 1 << 22}
"""Of float32 logits at a time: on a CPU what its cache holds, which is twice as fast as ten times that."""
LARGE_CHUNK = 1 << 27

Texts = list[np.ndarray[Any, Any]]
Answered = tuple[Texts, list[dict[str, Tensor]] | None]


def pad_texts(texts: Texts) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of some texts, `[B, T]`, padded on the right."""
    ids_BT = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(texts):
        ids_BT[row, : len(ids)] = torch.from_numpy(ids)
        mask_BT[row, : len(ids)] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


class Answers:
    """A teacher in memory that answers a batch of texts without making logits for all of it at once.

    Attributes:
        config, dtype: The teacher's. width: Of its hidden states.
    """

    def __init__(self, model: PreTrainedModel, kind: Kind, probe: Mapping[str, Tensor] | None = None) -> None:
        """Find out whether the logits are the output head times the last hidden states, and nothing else.

        Args:
            model: The teacher.
            kind: Of the answers.
            probe: What to find it out with, where its computing is done; None is a few tokens.

        Raises:
            ValueError: They are not, and hidden states are what is asked for.
        """
        self.model, self.kind, self.config, self.dtype = model, kind, model.config, model.dtype
        if probe is None:
            # Hooks of accelerate bring inputs to weights that are not on a device yet.
            place = torch.device("cpu") if model.device.type == "meta" else model.device
            probe = {"input_ids": torch.arange(4, device=place).unsqueeze(0)}
        self.device = next(iter(probe.values())).device
        head: Any = model.get_output_embeddings()
        self.head, self.backbone = head, model.base_model
        seen: dict[str, Tensor] = {}
        hooks = [
            self.backbone.register_forward_hook(lambda _m, _i, out: seen.update(hidden=out.last_hidden_state)),
            self.head.register_forward_hook(lambda _m, given, out: seen.update(given=given[0], out=out)),
        ]
        with torch.no_grad():
            logits = model(**probe, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        self.width = int(seen["hidden"].shape[-1])
        self.plain = "out" in seen and all(
            torch.equal(one.float().cpu(), other.float().cpu())
            for one, other in ((seen["hidden"], seen["given"]), (seen["out"], logits))
        )
        if kind == "hidden" and not self.plain:
            raise ValueError(
                f"the logits of a {model.config.model_type} are more than its output head times its last hidden states, so "
                "these are not enough. Take --kind top_k."
            )

    def head_tensors(self, spec: CacheSpec) -> dict[str, Tensor]:
        """Weight and bias of the output head, for the ids that are answered over."""
        bias = {} if self.head.bias is None else {"bias": self.head.bias[: spec.vocab_size]}
        return {"weight": self.head.weight[: spec.vocab_size], **bias}

    @property
    def fingerprint(self) -> str | None:
        """`identity.model_fingerprint` of the teacher; None where it cannot be taken."""
        whole = not any(weight.is_meta for weight in self.model.parameters())
        return model_fingerprint(self.model) if whole and self.config.model_type in FAMILIES else None

    def announce(self, tokens: int | None) -> None:
        """Nothing: its weights are read already."""

    def each(self, batches: Iterable[Texts], spec: CacheSpec, writer: CacheWriter) -> Iterator[Answered]:
        """Every batch of texts with its answers, or with None if the cache holds them all."""
        for texts in batches:
            held = all(writer.holds(ids) for ids in texts)
            yield texts, None if held else self(texts, spec)

    @torch.no_grad()
    def __call__(self, texts: Texts, spec: CacheSpec, hidden_BTD: Tensor | None = None) -> list[dict[str, Tensor]]:
        """The answers to each text, `[its tokens - 1, ...]`, in host memory.

        Args:
            texts: Their ids.
            spec: What is wanted.
            hidden_BTD: What goes into the model in the place of the texts' embeddings.
        """
        counts = [len(ids) - 1 for ids in texts]
        padded = pad_texts(texts)
        ids_BT, mask_BT = padded["input_ids"], padded["attention_mask"]
        inputs = {name: value.to(self.device) for name, value in padded.items()}
        if hidden_BTD is not None:
            inputs = {"inputs_embeds": hidden_BTD}
        answered_BT = mask_BT[:, 1:].bool()
        next_N = ids_BT[:, 1:][answered_BT]
        if self.plain:
            made_BT_ = self.backbone(**inputs, use_cache=False).last_hidden_state
        else:
            made_BT_ = self.model(**inputs, use_cache=False).logits
        made_N_ = made_BT_[:, :-1][answered_BT.to(made_BT_.device)]
        if self.kind == "hidden":
            return [{"hidden": part} for part in made_N_.cpu().split(counts)]
        if int(next_N.max()) >= spec.vocab_size:
            raise ValueError(
                f"token {int(next_N.max())} of the data is beyond the {spec.vocab_size} ids that are answered over. Give a "
                "larger --vocab-size, or the tokenizer of this teacher."
            )
        size = max(1, CHUNK_BYTES.get(made_N_.device.type, LARGE_CHUNK) // (4 * spec.vocab_size))
        parts = []
        for chunk, following in zip(made_N_.split(size), next_N.to(made_N_.device).split(size), strict=True):
            logits_NV = (self.head(chunk) if self.plain else chunk)[:, : spec.vocab_size]
            parts.append(top_k_answers(logits_NV, following.to(logits_NV.device), spec.top_k, spec.temperatures))
        columns = {name: torch.cat([part[name] for part in parts]).cpu().split(counts) for name in parts[0]}
        return [{name: column[row] for name, column in columns.items()} for row in range(len(texts))]
