"""What a distillation loss is computed from: an output head for hidden states, and a teacher's answer in its forms.

Shape letters: N tokens (predictions), D student width, U teacher width, V vocabulary, K entries of a cached teacher,
R rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimmoe_hf.cache_format import normalised
from slimmoe_hf.losses import DistillationLoss
from slimmoe_hf.row_losses import TopK
from slimmoe_hf.sharding import whole

_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # cohere, muse, falcon_h1
_CAPS = ("final_logit_softcapping", "logits_soft_cap")  # gemma, recurrent_gemma
_BIAS = "final_logits_bias"  # a buffer, added to the head's product: bart, marian


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    Attributes:
        weight_VD: `[V, D]`.
        bias_V: `[V]`, or None.
        scale: Of Cohere (`logit_scale`), Granite (`1 / logits_scaling`) and their like.
        softcap: Of Gemma (`final_logit_softcapping`), or None.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    @torch.compiler.disable
    def of(cls, model: PreTrainedModel) -> Head:
        """The output head of a model, for the hidden states that its head module takes.

        A sharded head (FSDP2, ZeRO-3) is gathered: in the forward pass of the model it is whole already.

        Args:
            model: A language model, without a PEFT wrapper around it.

        Raises:
            ValueError: The head is no plain linear layer, so its logits can only come from the model itself.
        """
        module: Any = model.get_output_embeddings()
        if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
            raise ValueError(
                f"the output head is a {type(module).__name__}: only a plain nn.Linear can be fused with the loss. "
                "Leave the head out of the adapter (target_modules) and of quantisation."
            )
        config = model.config.get_text_config().to_dict()
        scale, softcap = 1.0, next((config[key] for key in _CAPS if config.get(key)), None)
        for key in _MULTIPLIERS:
            scale *= 1.0 if config.get(key) is None else config[key]
        if config.get("logits_scaling") is not None:
            scale *= config["logits_scaling"] ** (1 if config["model_type"] == "hyperclovax" else -1)
        bias_V, added_1V = whole(module.bias), dict(model.named_buffers(recurse=False)).get(_BIAS)
        if added_1V is not None:
            bias_V = added_1V[0] if bias_V is None else bias_V + added_1V[0]
        return cls(whole(module.weight), bias_V, scale, softcap)


class TeacherStates(NamedTuple):
    """A teacher's last hidden states, live or cached, and the head they belong to.

    Attributes:
        hidden_NU: `[N, U]`, as its head module takes them.
        head: Its head; it gets no gradient.
    """

    hidden_NU: Tensor
    head: Head


class TeacherLogits(NamedTuple):
    """A teacher's logits, all of them: for teachers whose head cannot be had apart.

    Attributes:
        logits_NV: `[N, V]`; not changed.
    """

    logits_NV: Tensor


class TeacherTopK(NamedTuple):
    """The likeliest tokens of a teacher, as a cache stores them. They are for forward KL only.

    Entries and tail are scaled to sum to 1, which undoes the rounding of their storage and nothing else.

    Attributes:
        log_probs_NK: `[N, K]` log-probabilities at T = 1, of any float dtype.
        index_NK: `[N, K]` ids, each once per row.
        log_tail_N: `[N]`, `log(sum over all other ids of p^(1/temperature))`: at T = 1 the log of their mass.
        vocab_size: V of the teacher.
        temperature: The one that `log_tail_N` was taken at, and so the only one to train at.
    """

    log_probs_NK: Tensor
    index_NK: Tensor
    log_tail_N: Tensor
    vocab_size: int
    temperature: float = 1.0

    def entries(self, where: slice, top_k: int) -> tuple[TopK, TopK]:
        """Some rows' distribution at T = 1 and at `temperature`.

        Where the temperature is another, the tail at T = 1 is what the rounded entries leave: good enough for a log.

        Args:
            where: Which rows.
            top_k: How many of the entries to take; the others join the tail. 0 is all.
        """
        log_probs_RK, log_tail_R = self.log_probs_NK[where], self.log_tail_N[where]
        soft_RK, soft_tail_R = normalised(log_probs_RK, log_tail_R, self.temperature)
        plain_RK, plain_tail_R = soft_RK, soft_tail_R
        if self.temperature != 1.0:
            left_R = (1 - log_probs_RK.float().exp().sum(-1)).clamp(min=0).log()
            if log_probs_RK.shape[-1] >= self.vocab_size:  # all ids are there: what rounding leaves is no one's mass
                left_R = torch.full_like(left_R, -torch.inf)
            plain_RK, plain_tail_R = normalised(log_probs_RK, left_R)
        index_RK = self.index_NK[where].long()
        if 0 < top_k < index_RK.shape[-1]:
            order_RK = plain_RK.argsort(-1, descending=True)
            index_RK = index_RK.gather(-1, order_RK[:, :top_k])
            plain_RK, plain_tail_R = _cut(plain_RK.gather(-1, order_RK), plain_tail_R, top_k)
            soft_RK, soft_tail_R = _cut(soft_RK.gather(-1, order_RK), soft_tail_R, top_k)
        return TopK(plain_RK, index_RK, plain_tail_R), TopK(soft_RK, index_RK, soft_tail_R)


Teacher = TeacherStates | TeacherLogits | TeacherTopK


def teacher_vocabulary(teacher: Teacher) -> int:
    """How many ids a teacher answers over."""
    if isinstance(teacher, TeacherTopK):
        return teacher.vocab_size
    return len(teacher.head.weight_VD) if isinstance(teacher, TeacherStates) else teacher.logits_NV.shape[-1]


def check_signals(tokens: int, vocabulary: int, teacher: Teacher, labels_N: Tensor, loss: DistillationLoss) -> None:
    """Whether a teacher's answer is enough for a loss.

    Args:
        tokens: N.
        vocabulary: V of the student.
        teacher: Its answer.
        labels_N: Ids.
        loss: What is to be computed of them.

    Raises:
        ValueError: What does not fit, in one line.
    """
    if not tokens == len(labels_N) == len(teacher[0]):
        raise ValueError(
            f"{tokens} hidden states, {len(labels_N)} labels, {len(teacher[0])} answers of the teacher: give one of each "
            "per predicted token."
        )
    if loss.top_k and loss.beta != 0.0:
        raise ValueError(
            f"top_k={loss.top_k} with beta={loss.beta}: only forward KL can be cut to the teacher's likeliest tokens. "
            "Set beta=0.0, or top_k=0."
        )
    if not isinstance(teacher, TeacherTopK):
        return
    kept = teacher.log_probs_NK.shape[-1]
    if loss.beta != 0.0:
        raise ValueError(
            f"beta={loss.beta} weighs by the student, so it needs the teacher's probability of every token, and this "
            f"cache has {kept} of {teacher.vocab_size}. Set beta=0.0, or cache hidden states."
        )
    if loss.top_k > kept:
        raise ValueError(f"top_k={loss.top_k}, but this teacher cache has {kept} tokens. Set top_k={kept} or less.")
    if loss.temperature != teacher.temperature:
        raise ValueError(
            f"temperature={loss.temperature}, but this teacher cache serves {teacher.temperature}: what it left out cannot "
            "be tempered afterwards. Set that temperature, or write the cache for this one."
        )
    if teacher.vocab_size > vocabulary:
        raise ValueError(
            f"this teacher cache answers over {teacher.vocab_size} ids and the student has {vocabulary}. Write the cache "
            f"for {vocabulary}."
        )


def _cut(log_probs_RK: Tensor, log_tail_R: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    dropped_R = log_probs_RK[:, top_k:].logsumexp(-1)
    return log_probs_RK[:, :top_k], torch.logaddexp(log_tail_R, dropped_R)
