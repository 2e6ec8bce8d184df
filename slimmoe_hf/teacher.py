"""Where the teacher's signal comes from: `LiveTeacher`, `OwnBase` and, in `cached_teacher`, answers from disk.

Shape letters: B rows, T tokens per row, N predictions that count, U teacher width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.modeling import align_module_device
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_fsdp_enabled
from trl.models import prepare_deepspeed

from slimmoe_hf.cache_format import base_vocabulary
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.free_memory import free_memory
from slimmoe_hf.identity import model_fingerprint, row_fingerprint
from slimmoe_hf.logit_losses import apply_head
from slimmoe_hf.losses import shared_vocabulary
from slimmoe_hf.signals import Head, Teacher, TeacherLogits, TeacherStates
from slimmoe_hf.student_forward import keeps_logits_apart, last_hidden_states, same_logits
from slimmoe_hf.terms import Seen, Terms, at_predictions

logger = logging.getLogger(__name__)
_STAYS_EMPTY = (
    "fsdp_cpu_ram_efficient_loading leaves the teacher of every process but the first empty, and only fsdp_version: 2 "
    "without a device_map fills it again. Change one of them."
)


class TeacherSource(Protocol):
    """What the trainer asks of a teacher, wherever its answers come from.

    Attributes:
        vocab_size: V, ids that it answers over.
        name: What it was loaded from.
    """

    vocab_size: int
    name: str

    def place(self, accelerator: Accelerator) -> None:
        """Be ready to answer, where the student computes."""

    def identity(self) -> str:
        """What tells it from others: a resumed run must have the same."""

    def fingerprint(self) -> str | None:
        """`identity.model_fingerprint` of the model that gives, or gave, the answers; None where it is not known."""

    def answers(self, inputs: Mapping[str, Any], counts_BT: Tensor, terms: Terms) -> tuple[Teacher, Seen]:
        """Answers to the predictions that count, and what the terms want of its layers.

        Args:
            inputs: A batch without labels.
            counts_BT: Which predictions count, as `student_forward.predicted` says.
            terms: Those of the loss.

        Returns:
            Answers to N predictions on the device of `input_ids`, and what was seen of the same.
        """


class LiveTeacher:
    """A frozen model in eval mode, so that its routing is the deterministic one.

    Attributes:
        model: The teacher, frozen.
        tokenizer: Its own tokenizer where one is saved beside it, else None.
        vocab_size: V, rows of its head.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, adapted: PeftModel | None = None
    ) -> None:
        """Freeze `model` and switch it to eval mode, in place; it stays on its device until `place`.

        Args:
            model: The teacher.
            tokenizer: Its own.
            adapted: The model is what this adapter is on. It is called through it, for there FSDP2's hooks are, and what
                is frozen and switched is the caller's affair.
        """
        self.model: Any = model
        self._called: Any = model if adapted is None else adapted  # or DeepSpeed's engine around it
        if adapted is None:
            model.eval().requires_grad_(False)
        places = set((vars(model).get("hf_device_map") or {}).values())
        self._dispatched = len(places) > 1 or "disk" in places  # accelerate's hooks bring weights and inputs together
        self.tokenizer = tokenizer
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.name = str(model.config._name_or_path)
        # Whether its logits are its head times its last hidden states; None until a batch has shown it.
        self._head_apart: bool | None = None if keeps_logits_apart(model) else False

    @classmethod
    def load(
        cls,
        source: str | Path | PreTrainedModel,
        device: torch.device,
        init_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        encoder_decoder: bool = False,
    ) -> LiveTeacher:
        """Take a model as it is, or load one.

        Args:
            source: A model, a folder or a Hub id.
            device: Where it will run. On a CPU a teacher loaded by name computes in float32, elsewhere in the dtype of
                its checkpoint; `init_kwargs` may name another.
            init_kwargs: For `from_pretrained`. A `device_map` spreads the teacher as it says, and it stays there:
                `offloaded` makes one that leaves most of it in host memory.
            trust_remote_code: Whether code that comes with the checkpoint may run.
            encoder_decoder: Whether to load an encoder-decoder.

        Raises:
            OSError: There is no such model.
            ValueError: As `place`.
        """
        kwargs = {"trust_remote_code": trust_remote_code, **(init_kwargs or {})}
        if isinstance(source, PreTrainedModel):
            return cls(source, _saved_tokenizer(source.config._name_or_path, kwargs))
        if kwargs.get("device_map") is not None and is_fsdp_enabled():
            raise ValueError(_STAYS_EMPTY)
        kwargs.setdefault("dtype", torch.float32 if device.type == "cpu" else "auto")
        kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(str(source), **kwargs)
        return cls(model, _saved_tokenizer(str(source), kwargs))

    def check_vocabulary(self, student_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Compare the teacher's vocabulary with the student's.

        Args:
            student_size: Rows of the student's head.
            tokenizer: The tokenizer of the training data.

        Raises:
            ValueError: A token of the data has no logit in one of the two, or the tokenizers give an id to different
                tokens. Added tokens may differ: padding rows are often renamed.
        """
        shared_vocabulary(student_size, self.vocab_size, len(tokenizer))
        if self.tokenizer is None:
            return
        ours, theirs = (base_vocabulary(one) for one in (tokenizer, self.tokenizer))
        differing = sum(theirs.get(index, token) != token for index, token in ours.items())
        if differing or len(ours) != len(theirs):
            raise ValueError(
                f"student and teacher do not share a vocabulary: of the {len(ours)} tokens of the student's tokenizer "
                f"and the {len(theirs)} of the teacher's, {differing} share an id and differ. "
                "Distil from a teacher with the same tokenizer."
            )

    def place(self, accelerator: Accelerator) -> None:
        """Bring the teacher to where it will compute.

        A teacher with a device map stays where that put it. Under FSDP2 and ZeRO-3 each process holds its share,
        gathered layer by layer at every forward. Otherwise every process holds a whole one.

        Args:
            accelerator: The student's.

        Raises:
            ValueError: A process but the first may have loaded no weights, and nothing would bring them.
        """
        plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
        deepspeed = accelerator.state.deepspeed_plugin
        if accelerator.is_fsdp2 and not self._dispatched:
            # `prepare_model(..., evaluation_mode=True)` leaves a model of FSDP2 as it is.
            self.model = self._called = fsdp2_prepare_model(accelerator, self.model)
        elif deepspeed is not None and deepspeed.zero_stage == 3:
            self._called = prepare_deepspeed(self.model, accelerator)  # hooks on the model, with a trace of its own
        elif plugin is not None and plugin.cpu_ram_efficient_loading:
            raise ValueError(_STAYS_EMPTY)
        else:
            self.to(accelerator.device)

    def to(self, device: torch.device) -> None:
        """Move the teacher; one with a device map stays where it is."""
        if not self._dispatched:
            self.model.to(device)

    def identity(self) -> str:
        """A fingerprint of its weights, or where none can be taken its name."""
        return self.fingerprint() or (row_fingerprint(self.model) if self._whole() else self.name)

    def fingerprint(self) -> str | None:
        """None where some weights are elsewhere (offloaded, or sharded as they are after `place` under FSDP2)."""
        known = self.model.config.model_type in FAMILIES
        return model_fingerprint(self.model) if known and self._whole() else None

    def _whole(self) -> bool:
        return not any(weight.is_meta or isinstance(weight, DTensor) for weight in self.model.parameters())

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """Logits of one batch.

        Args:
            inputs: What the student's forward takes, without labels.

        Returns:
            `[B, T, V]`, on the device of `input_ids`.
        """
        device = inputs["input_ids"].device
        return self._called(**inputs, use_cache=False).logits.to(device)

    @torch.no_grad()
    def answers(self, inputs: Mapping[str, Any], counts_BT: Tensor, terms: Terms) -> tuple[Teacher, Seen]:
        """As `TeacherSource.answers`; hidden states with the head, where these are all that the logits are made of."""
        device = inputs["input_ids"].device
        with terms.watching(self.model) as seen:
            hidden_BTU = self._hidden_states(inputs) if self._head_apart is not False else None
            if hidden_BTU is not None:
                hidden_NU = at_predictions(hidden_BTU, counts_BT).to(device)
                return TeacherStates(hidden_NU, self._head(device)), seen.at(counts_BT)
            for kept in (seen.router_logits, seen.hidden_states):
                kept.clear()
            return TeacherLogits(at_predictions(self.logits(inputs), counts_BT)), seen.at(counts_BT)

    def _hidden_states(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The last ones, `[B, T, U]`; None where the first batch shows that the logits are not made of them alone.

        The whole model is called, as hooks of FSDP2 and accelerate want it, with the logits of the last token only.
        """
        last_only = {} if self.model.config.is_encoder_decoder else {"logits_to_keep": 1}
        with last_hidden_states(self.model) as seen:
            logits = self._called(**inputs, use_cache=False, **last_only).logits
        if self._head_apart is None:
            try:
                made = apply_head(self._head(logits.device), seen[0][:, -1:].to(logits.device))
                self._head_apart = same_logits(logits, made)
            except ValueError as error:
                logger.debug("the teacher makes its logits itself: %s", error)
                self._head_apart = False
        return seen[0] if self._head_apart else None

    def _head(self, device: torch.device) -> Head:
        module: Any = self.model.get_output_embeddings()
        with align_module_device(module, device):  # one that accelerate keeps elsewhere
            head = Head.of(self.model)
        bias_V = None if head.bias_V is None else head.bias_V.to(device)
        return Head(head.weight_VD.to(device), bias_V, head.scale, head.softcap)


class OwnBase:
    """The teacher of a PEFT student: the model that its adapter is on, asked without it. No second model in memory.

    Attributes:
        student: The adapted model.
        vocab_size: V, rows of its head.
        name: What it was loaded from.
    """

    def __init__(self, student: PeftModel) -> None:
        """Take the student; nothing of it is changed."""
        self.student = student
        base: Any = student.get_base_model()
        self._live = LiveTeacher(base, adapted=student)
        self.vocab_size, self.name = self._live.vocab_size, self._live.name

    def place(self, accelerator: Accelerator) -> None:
        """Nothing to do: it is where the student is."""

    def identity(self) -> str:
        """That it is the student's own; an adapter is resumed on the model that it began on."""
        return "the student without its adapter"

    def fingerprint(self) -> str | None:
        """Not taken: the adapter's layers stand between."""
        return None

    def answers(self, inputs: Mapping[str, Any], counts_BT: Tensor, terms: Terms) -> tuple[Teacher, Seen]:
        """As `TeacherSource.answers`; in eval mode, and back."""
        with self._alone():
            return self._live.answers(inputs, counts_BT, terms)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        training = self.student.training
        self.student.eval()
        try:
            with self.student.disable_adapter():
                yield
        finally:
            self.student.train(training)


def offloaded(memory: int, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that leave in host memory what exceeds an amount of device memory.

    Accelerate's hooks bring it over, weight by weight, at every forward.

    Args:
        memory: Bytes.
        device: The GPU; on a CPU there is nothing to offload from, and no argument.
    """
    if device.type == "cpu":
        return {}
    return {
        "device_map": "auto",
        "max_memory": {device.index or 0: memory, "cpu": free_memory()},
    }


def _saved_tokenizer(source: str, kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model, or None: a teacher needs none, it only makes the check sharper."""
    if not source:
        return None
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=kwargs.get("revision"), trust_remote_code=kwargs["trust_remote_code"]
        )
    except (OSError, ValueError):
        return None
