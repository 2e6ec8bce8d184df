"""The student's forward pass with the distillation loss inside it, where the head's weights are whole and hooks see them.

A model that `add_distilling_head` was called on takes one more argument, `distil`: the loss is then computed from the last
hidden states, chunk by chunk, and the output is a `DistillationOutput`. DDP and FSDP2 so find the head used within the
forward call that they wrap. Without the argument the forward is what it was.

Shape letters: B rows, T tokens per row, N predictions that count, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from slimmoe_hf.fused import FusedLosses, fused_distillation_loss
from slimmoe_hf.logit_losses import apply_head, losses_of_logits
from slimmoe_hf.losses import IGNORED, DistillationLoss
from slimmoe_hf.signals import Head, Teacher
from slimmoe_hf.terms import Seen, Terms, at_predictions


@dataclass
class DistillationOutput(ModelOutput):
    """What a forward pass with the loss inside gives.

    Attributes:
        loss: Carries the gradient.
        losses: Of each of the N predictions, without gradient.
        router_kl_N, hidden_mse_N: The terms, where they were asked for; without gradient.
        logits: `[B, T, V]`, where they were asked for or could not be avoided.
        router_logits: One `[B * T, E]` per layer, where the model was asked for them.
        encoder_router_logits, decoder_router_logits: Of an encoder-decoder likewise, `[B, T, E]`.
    """

    loss: Tensor | None = None
    losses: FusedLosses | None = None
    router_kl_N: Tensor | None = None
    hidden_mse_N: Tensor | None = None
    logits: Tensor | None = None
    router_logits: Any = None
    encoder_router_logits: Any = None
    decoder_router_logits: Any = None


_ROUTING = ("router_logits", "encoder_router_logits", "decoder_router_logits")


@dataclass(frozen=True)
class Distillation:
    """What a forward pass needs for the loss of its batch.

    Attributes:
        labels_BT: As the data has them, not shifted; -100 where a token is not trained on.
        teacher: Its answers to the N predictions that count.
        taught: What its layers made of the same tokens, for the terms.
        loss: The divergence.
        weights: Of divergence and cross-entropy.
        weight: What each prediction counts in the sum, a scalar.
        terms: The terms on routers and layers.
        logits: Whether all logits are made: they are wanted, or the head is none that can be fused.
        ahead: As `predicted` takes it.
    """

    labels_BT: Tensor
    teacher: Teacher
    taught: Seen
    loss: DistillationLoss
    weights: tuple[float, float]
    weight: Tensor
    terms: Terms
    logits: bool = False
    ahead: int = 1

    @torch.compiler.disable(recursive=False)  # layers are compiled below it; hooks and the loss are no graph
    def run(self, model: Any, plain: Callable[..., Any], inputs: dict[str, Any]) -> DistillationOutput:
        """Forward and loss.

        Args:
            model: The student, without wrappers.
            plain: Its own forward.
            inputs: For it.
        """
        counts_BT = predicted(self.labels_BT, self.ahead)
        labels_N = self.labels_BT[:, self.ahead :][counts_BT]
        distillation, crossentropy = self.weights
        with self.terms.watching(model) as seen:
            if self.logits:
                outputs = plain(**inputs)
                logits_NV = at_predictions(outputs.logits, counts_BT)
                values = losses_of_logits(logits_NV, self.teacher, labels_N, self.loss, self.weights, self.weight)
            else:
                outputs, hidden_BTD = _backbone(model, plain, inputs)
                hidden_ND, head = at_predictions(hidden_BTD, counts_BT), Head.of(model)
                values = fused_distillation_loss(
                    hidden_ND.to(head.weight_VD.device), head, self.teacher, labels_N, self.loss,
                    distillation_weight=distillation, crossentropy_weight=crossentropy, weight_N=self.weight,
                )  # fmt: skip
        loss, found = values.loss, {}
        for name, weight, value_N in self.terms.values(seen.at(counts_BT), self.taught):
            loss = loss + weight * (value_N * self.weight).sum().to(loss.device)
            found[name] = value_N.detach()
        return DistillationOutput(
            loss=loss, losses=values._replace(loss=loss.detach()), router_kl_N=found.get("router_kl"),
            hidden_mse_N=found.get("hidden_mse"), logits=outputs.logits if self.logits else None,
            **{name: outputs.get(name) for name in _ROUTING},
        )  # fmt: skip


def predicted(labels_BT: Tensor, ahead: int = 1) -> Tensor:
    """Which positions' prediction is trained on: `[B, T - ahead]`.

    Args:
        labels_BT: As the data has them.
        ahead: How far ahead of a position its label stands: 1 in a causal language model, 0 in an encoder-decoder, whose
            decoder is given the labels shifted.
    """
    return labels_BT[:, ahead:] != IGNORED


def add_distilling_head(model: PreTrainedModel) -> None:
    """Let a model's forward take `distil`, a `Distillation`; in place, on the instance.

    A `copy.deepcopy` of it has a forward of its own, the plain one of its class, and takes `distil` too.

    Args:
        model: A language model, without a PEFT wrapper around it.
    """
    plain = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self: Any, *args: Any, distil: Distillation | None = None, **kwargs: Any) -> Any:
        # A copy of the model gets this function too, while `plain` stays that of the model, and runs its weights.
        own = plain if self is model else functools.partial(type(self).forward, self)
        return own(*args, **kwargs) if distil is None else distil.run(self, own, kwargs)

    vars(model)["forward"] = types.MethodType(forward, model)


def _backbone(model: Any, plain: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """A forward pass that makes no logits but perhaps the last ones, and the last hidden states."""
    if not model.config.is_encoder_decoder:
        # Backbone and head are looked up at each call: PEFT and FSDP replace them.
        outputs = model.base_model(**{name: value for name, value in inputs.items() if name != "labels"})
        return outputs, outputs.last_hidden_state
    with last_hidden_states(model) as seen:
        outputs = plain(**inputs)
    return outputs, seen[0]


@contextmanager
def last_hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect `[B, T, D]` of every forward pass within the block.

    An encoder-decoder may have no backbone apart, and T5's kin scale its output: there they are what the head is given,
    and the model makes the logits of the last position only.

    Args:
        model: A language model, without a PEFT wrapper around it.
    """
    seen: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        seen.append(inputs[0])
        return inputs[0][:, -1:]

    if model.config.is_encoder_decoder:
        head: Any = model.get_output_embeddings()
        hook = head.register_forward_pre_hook(keep)
    else:
        hook = model.base_model.register_forward_hook(lambda _m, _i, out: seen.append(out.last_hidden_state))
    try:
        yield seen
    finally:
        hook.remove()


def keeps_logits_apart(model: PreTrainedModel) -> bool:
    """Whether a model can be asked for its last logits only."""
    if model.config.is_encoder_decoder:
        return isinstance(model.get_output_embeddings(), nn.Module)
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


@torch.no_grad()
def cannot_be_fused(model: PreTrainedModel) -> str:
    """Why the logits of a model are not what `Head.of` makes of its last hidden states; empty if they are.

    A few tokens are put through it; where its weights are not there yet, it is taken at its word.

    Args:
        model: A language model, without a PEFT wrapper around it.
    """
    try:
        head = Head.of(model)
    except ValueError as error:
        return str(error)
    if any(weight.is_meta or not weight.numel() for weight in model.parameters()):
        return ""
    was_training = model.training
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    try:
        with last_hidden_states(model) as seen:
            logits = model.eval()(**inputs, use_cache=False).logits
    finally:
        model.train(was_training)
    made = apply_head(head, seen[0][:, -logits.shape[1] :].to(logits.device))
    return "" if same_logits(logits, made) else "its logits are more than its head"


def same_logits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether they agree but for the rounding of 16-bit products: another formula is far off."""
    return bool((ours.float() - theirs.float()).norm() <= 0.05 * ours.float().norm())
