"""Where the teacher's signal comes from. Today: a live model, asked batch by batch.

Shape letters: B rows, T tokens per row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_fsdp_enabled

from slimmoe_hf.losses import shared_vocabulary

_STAYS_EMPTY = (
    "fsdp_cpu_ram_efficient_loading leaves the teacher of every process but the first empty, and only fsdp_version: 2 "
    "without a device_map fills it again. Change one of them."
)


class LiveTeacher:
    """A frozen model in eval mode, so that its routing is the deterministic one.

    Attributes:
        model: The teacher, frozen.
        tokenizer: Its own tokenizer where one is saved beside it, else None.
        vocab_size: V, rows of its head.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Freeze `model` and switch it to eval mode; it is changed in place, and stays on its device until `place`."""
        self.model = model.eval().requires_grad_(False)
        places = set((vars(model).get("hf_device_map") or {}).values())
        self._dispatched = len(places) > 1 or "disk" in places  # accelerate's hooks bring weights and inputs together
        self.tokenizer = tokenizer
        self.vocab_size = int(model.config.get_text_config().vocab_size)

    @classmethod
    def load(
        cls,
        source: str | Path | PreTrainedModel,
        device: torch.device,
        init_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> LiveTeacher:
        """Take a model as it is, or load one.

        Args:
            source: A model, a folder or a Hub id.
            device: Where it will run. On a CPU a teacher loaded by name computes in float32, elsewhere in the dtype of
                its checkpoint; `init_kwargs` may name another.
            init_kwargs: For `from_pretrained`. A `device_map` spreads the teacher as it says, and it stays there:
                `offloaded` makes one that leaves most of it in host memory.
            trust_remote_code: Whether code that comes with the checkpoint may run.

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
        model = AutoModelForCausalLM.from_pretrained(str(source), **kwargs)
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
        ours, theirs = (_base_vocabulary(one) for one in (tokenizer, self.tokenizer))
        differing = sum(theirs.get(index, token) != token for index, token in ours.items())
        if differing or len(ours) != len(theirs):
            raise ValueError(
                f"student and teacher do not share a vocabulary: of the {len(ours)} tokens of the student's tokenizer "
                f"and the {len(theirs)} of the teacher's, {differing} share an id and differ. "
                "Distil from a teacher with the same tokenizer."
            )

    def place(self, accelerator: Accelerator) -> None:
        """Bring the teacher to where it will compute.

        A teacher with a device map stays where that put it. Under FSDP2 each process holds its share, gathered layer by
        layer at every forward. Otherwise every process holds a whole one.

        Args:
            accelerator: The student's.

        Raises:
            ValueError: A process but the first may have loaded no weights, and nothing would bring them.
        """
        plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
        if accelerator.is_fsdp2 and not self._dispatched:
            # `prepare_model(..., evaluation_mode=True)` leaves a model of FSDP2 as it is.
            self.model = fsdp2_prepare_model(accelerator, self.model)
        elif plugin is not None and plugin.cpu_ram_efficient_loading:
            raise ValueError(_STAYS_EMPTY)
        else:
            self.to(accelerator.device)

    def to(self, device: torch.device) -> None:
        """Move the teacher; one with a device map stays where it is."""
        if not self._dispatched:
            self.model.to(device)

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """Logits of one batch.

        Args:
            inputs: What the student's forward takes, without labels.

        Returns:
            `[B, T, V]`, on the device of `input_ids`.
        """
        device = inputs["input_ids"].device
        return self.model(**inputs, use_cache=False).logits.to(device)


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
        "max_memory": {device.index or 0: memory, "cpu": psutil.virtual_memory().available},
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


def _base_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added = tokenizer.get_added_vocab()
    return {index: token for token, index in tokenizer.get_vocab().items() if token not in added}
