"""How much memory a model takes: to run it, to train it, to distil it. From its config alone; `scoring_memory` scores it.

The model's own code is run on tensors without values (`tracing`), with one decoder layer of each kind, and what a layer
adds is multiplied by the layers. A training step has its peak in one of six places; all are looked at:

    forward    in the last decoder layer
    head       output head and loss, forward and backward (a live teacher's forward too)
    top        backward of the last decoder layer: all activations are held, few gradients
    bottom     backward of the first decoder layer: nearly all gradients are held, few activations
    embedding  backward of the input embedding
    optimizer  the optimizer's step, without activations

Not counted: what a kernel takes for itself inside one operation, the CUDA context, fragmentation. Rows are full (no
padding mask), the loss is transformers' own cross-entropy on whole logits (distilling: `fused`, in chunks as large as a
GPU takes them), AdamW is the fused one (as Trainer's is).

Shape letters: B rows, T tokens per row, V vocabulary, L layers, N tokens, S routed token-expert pairs, F expert width.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, ConfigDict, computed_field
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.optimization import Adafactor

from slimmoe_hf import disk
from slimmoe_hf.cache_format import TOP_K, bytes_per_answer
from slimmoe_hf.families import config_from, family_of
from slimmoe_hf.fused import block_rows, chunk_rows, fused_distillation_loss
from slimmoe_hf.lora import lora_config
from slimmoe_hf.losses import DistillationLoss
from slimmoe_hf.signals import Head, TeacherStates, TeacherTopK
from slimmoe_hf.tracing import Phase, Run, layer_kinds, skeleton, trace, trace_optimizer

Optimizer = Literal["adamw", "adamw_bf16", "adamw_8bit", "adafactor"]
Teacher = Literal["live", "offloaded", "cached"]
CACHE_TOP_K = TOP_K
_QUANTISED_FROM, _BLOCK = 4096, 256
"""bitsandbytes keeps moments of smaller tensors in float32, and one float32 scale per block of the others."""


class Memory(BaseModel):
    """Bytes at the peak of one use.

    Attributes:
        use: What for.
        parts: Bytes on the device at the peak, by name; they add up to `total`.
        peak: When that is, as the module says.
        host: Bytes of the computer's own memory on top (an offloaded teacher).
        disk_per_token: Bytes of a teacher's cached answers, per token of text.
    """

    model_config = ConfigDict(frozen=True)

    use: str
    parts: dict[str, int]
    peak: str
    host: int = 0
    disk_per_token: int = 0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without its weights; made once, so do not change it."""
    return _meta_model(_text(config))


def _text(config: PreTrainedConfig) -> str:
    """A config as text that equal configs share, wherever they were read from."""
    values = {**json.loads(config.to_json_string(use_diff=False)), "dtype": "float32"}
    values.pop("_name_or_path", None)
    return json.dumps(values, sort_keys=True)


@functools.lru_cache(maxsize=16)
def _meta_model(text: str) -> PreTrainedModel:
    return disk.meta_model(config_from(json.loads(text)))


def inference_memory(
    config: PreTrainedConfig, *, batch: int = 1, length: int = 4096, dtype: torch.dtype = torch.bfloat16
) -> Memory:
    """Memory to generate text after a prompt of `length` tokens, read in one pass: that pass is the peak.

    A sliding window does not bound the cache then: transformers keeps views of the whole prompt's keys and values
    until the next token.

    Args:
        config: The model's.
        batch: B, sequences at a time.
        length: T, tokens of the prompt (or of prompt and answer together, which is an upper bound).
        dtype: Of weights and cache.

    Raises:
        ValueError: As `family_of`.
    """
    phases = _phases(_text(config), dtype, batch, length, _generate)
    name = max(("forward", "head"), key=lambda each: phases[each].peak)
    cache = phases["head"].activations
    weights = _bytes(meta_model(config), dtype)
    parts = {"weights": weights, "key/value cache": cache, "working set": phases[name].peak - cache}
    return Memory(use="inference", parts=parts, peak=name)


def training_memory(
    config: PreTrainedConfig,
    *,
    optimizer: Optimizer = "adamw",
    weights_dtype: torch.dtype | None = None,
    batch: int = 1,
    length: int = 4096,
    gradient_checkpointing: bool = True,
    accumulate: bool = False,
    autocast: bool = False,
    lora_rank: int | None = None,
    lora_experts: bool = True,
    teacher: Teacher | None = None,
    teacher_config: PreTrainedConfig | None = None,
    teacher_dtype: torch.dtype = torch.bfloat16,
    loss: DistillationLoss | None = None,
    crossentropy: bool = False,
) -> Memory:
    """Memory to train a model, all of it or an adapter, on text or on a teacher's answers.

    Args:
        config: The model's (of a distillation: the student's).
        optimizer: `adamw`, `adamw_bf16` (the same on bfloat16 weights), `adamw_8bit` (bitsandbytes), `adafactor`.
        weights_dtype: Of the weights; None is float32 for `adamw` on all weights, else bfloat16.
        batch: B, rows of one micro-batch.
        length: T, tokens per row.
        gradient_checkpointing: Keep only each layer's input, and compute the layer again on the way back.
        accumulate: Whether gradients are summed over several micro-batches, and so are there from the start.
        autocast: Compute in bfloat16 on float32 weights, as Trainer's `bf16=True` does.
        lora_rank: Train a LoRA adapter of this rank on attention and experts, in float32; None trains all weights.
        lora_experts: Whether that adapter is on the experts too.
        teacher: `live` on the same device, `offloaded` to the host and streamed layer by layer, or `cached` answers.
        teacher_config: The teacher's; needed for a `live` or `offloaded` one.
        teacher_dtype: Of the teacher's weights.
        loss: The distillation loss; plain forward KL if None.
        crossentropy: Whether the loss has a cross-entropy with the text beside the divergence.

    Raises:
        ValueError: As `family_of`; or a teacher without its config.
    """
    if teacher in ("live", "offloaded") and teacher_config is None:
        raise ValueError(f"teacher={teacher!r} needs teacher_config: its size is that of another model.")
    plain = optimizer == "adamw" and lora_rank is None
    dtype = weights_dtype or (torch.float32 if plain else torch.bfloat16)
    streamed = teacher_config if teacher in ("live", "offloaded") else None
    step = _Step(
        autocast, gradient_checkpointing, teacher is not None, _text(streamed) if streamed is not None else None,
        teacher_dtype, loss or DistillationLoss(), crossentropy,
    )  # fmt: skip
    phases = dict(_phases(_text(config), dtype, batch, length, step, lora_rank, lora_experts))
    trained = phases["optimizer"].gradients
    state, spare = _optimizer_state(config, optimizer, dtype)
    if lora_rank is not None:
        state, spare = 2 * trained, 0
    phases["optimizer"] = Phase(trained + spare, 0, trained)
    if accumulate:
        for name in ("forward", "head", "top"):
            before = phases[name]
            phases[name] = Phase(before.peak + trained, before.activations, before.gradients + trained)
    peak = max(phases, key=lambda name: phases[name].peak)
    parts = {"weights": _bytes(meta_model(config), dtype)}
    if lora_rank is not None:
        parts["adapter"] = trained
    parts |= {"gradients": phases[peak].gradients, "optimizer": state, "activations": phases[peak].activations}
    parts["logits and loss" if peak == "head" else "working set"] = (
        phases[peak].peak - phases[peak].activations - phases[peak].gradients
    )
    host = 0
    if streamed is not None:
        whole = _bytes(meta_model(streamed), teacher_dtype)
        parts["teacher"] = whole if teacher == "live" else _largest_module(streamed) * teacher_dtype.itemsize
        host = whole if teacher == "offloaded" else 0
    disk = cache_bytes_per_token(meta_model(config).config.vocab_size) if teacher == "cached" else 0
    use = "LoRA" if lora_rank is not None else "full fine-tuning" if teacher is None else "distillation"
    return Memory(use=use, parts=parts, peak=peak, host=host, disk_per_token=disk)


def cache_bytes_per_token(vocab_size: int, top_k: int = CACHE_TOP_K) -> int:
    """Bytes of a teacher's cached answer to one token, as `cache_format` stores it."""
    return bytes_per_answer(vocab_size, top_k)


@dataclass(frozen=True)
class _Step:
    """Forward, loss and backward of one micro-batch, as the trainers do them."""

    autocast: bool
    checkpointing: bool
    distilling: bool
    teacher: str | None
    teacher_dtype: torch.dtype
    loss: DistillationLoss
    crossentropy: bool

    def companion(self) -> Any:
        """The teacher as a skeleton: it holds nothing between layers, so two are as many as all."""
        if self.teacher is None:
            return None
        model = _meta_model(self.teacher)
        path = family_of(model.config).layers
        return skeleton(model, path, layer_kinds(model, path)[0][:2], self.teacher_dtype)

    def __call__(self, model: Any, ids: Tensor, teacher: Any) -> None:
        """Run it; `teacher` is the companion."""
        model.train()
        if self.checkpointing:
            with warnings.catch_warnings():  # transformers renames the method; both names work
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
        if not self.distilling:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            loss = self._distil(model, ids, teacher)
        loss.backward()

    def _distil(self, model: Any, ids: Tensor, teacher: Any) -> Tensor:
        """What `DistillationTrainer.compute_loss` holds, held as long as it does."""
        whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        counts_BT = torch.ones_like(ids[:, 1:], dtype=torch.bool)
        answers = self._answers(ids, counts_BT, teacher, whole.config.vocab_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            hidden_ND = whole.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][counts_BT]
            head = Head.of(whole)
            vocabulary, gpu = len(head.weight_VD), torch.device("cuda")
            rows = chunk_rows(len(hidden_ND), vocabulary, gpu)
            # Two chunks take what all take, but for the gradient of the hidden states, which waits until it is used.
            some = slice(0, 2 * rows)
            waiting = [hidden_ND[2 * rows :].detach().float()]
            hidden_ND.register_hook(lambda _: waiting.clear())
            return fused_distillation_loss(
                hidden_ND[some], head, _part(answers, some), ids[:, 1:].flatten()[some], self.loss,
                crossentropy_weight=float(self.crossentropy), rows=rows, block=block_rows(rows, vocabulary, gpu),
            ).loss  # fmt: skip

    def _answers(self, ids: Tensor, counts_BT: Tensor, teacher: Any, vocabulary: int) -> TeacherStates | TeacherTopK:
        """Of a live teacher its hidden states, which come before the student's; of a cache its entries."""
        if teacher is None:
            size = counts_BT.numel(), min(CACHE_TOP_K, vocabulary)
            log_probs_NK = torch.empty(size, dtype=torch.float16)
            index_NK = torch.empty(size, dtype=torch.int32)
            return TeacherTopK(log_probs_NK, index_NK, log_probs_NK[:, 0].clone(), vocabulary, self.loss.temperature)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            hidden_BTU = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return TeacherStates(hidden_BTU[:, :-1][counts_BT], Head.of(teacher))


def _part(answers: TeacherStates | TeacherTopK, some: slice) -> TeacherStates | TeacherTopK:
    """The answers to some of the predictions."""
    if isinstance(answers, TeacherStates):
        return answers._replace(hidden_NU=answers.hidden_NU[some])
    return answers._replace(
        log_probs_NK=answers.log_probs_NK[some], index_NK=answers.index_NK[some], log_tail_N=answers.log_tail_N[some]
    )


def _generate(model: Any, ids: Tensor, _other: Any) -> None:
    """The first pass of `generate`: the whole prompt at once, its keys and values kept."""
    with torch.no_grad():
        model.eval()(input_ids=ids, use_cache=True, logits_to_keep=1)


def phases_of(config: PreTrainedConfig, dtype: torch.dtype, batch: int, length: int, run: Run) -> dict[str, Phase]:
    """`tracing.trace` of a step without an adapter, made once for each config; do not change what it gives."""
    return _phases(_text(config), dtype, batch, length, run)


@functools.lru_cache(maxsize=64)
def _phases(
    config: str,
    dtype: torch.dtype,
    batch: int,
    length: int,
    run: Run,
    lora_rank: int | None = None,
    lora_experts: bool = True,
) -> dict[str, Phase]:
    """`trace` for a config as text, once for each; what it gives is shared, so do not change it."""
    model = _meta_model(config)
    family = family_of(model.config)

    return trace(
        model, family.layers, run, dtype=dtype, batch=batch, length=length,
        adapt=(lambda model: _adapted(model, lora_rank, lora_experts)) if lora_rank is not None else None,
        companion=run.companion if isinstance(run, _Step) else None,
    )  # fmt: skip


def _adapted(model: Any, rank: int, experts: bool) -> Any:
    """A skeleton with an adapter on what its layer has of what is adapted; of a layer without any, on nothing."""
    settings = lora_config(model.config, rank, experts=experts)
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    modules, parameters = (
        [target for target in targets or () if any(name.endswith(f".{target}") for name in names)]
        for targets in (settings.target_modules, settings.target_parameters)
    )
    if modules or parameters:
        settings.target_modules, settings.target_parameters = modules, parameters or None
        return get_peft_model(model, settings, autocast_adapter_dtype=True)
    model.requires_grad_(False)
    model.enable_input_require_grads()  # the way back leads through the layer to adapters below it
    return model


def _bytes(model: nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _largest_module(config: PreTrainedConfig) -> int:
    """Parameters of the largest thing that is streamed: a decoder layer, an embedding or the head."""
    model, path = meta_model(config), family_of(config).layers
    modules = [*model.get_submodule(path).children(), model.get_input_embeddings(), model.get_output_embeddings()]
    return max(sum(parameter.numel() for parameter in module.parameters()) for module in modules if module is not None)


def _optimizer_state(config: PreTrainedConfig, optimizer: Optimizer, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of an optimizer's state for all weights, and of what its step needs besides."""
    parameters = list(meta_model(config).parameters())
    if optimizer == "adafactor":
        steps = {shape: _adafactor(shape, dtype) for shape in {tuple(p.shape) for p in parameters}}
        return sum(steps[tuple(p.shape)][0] for p in parameters), max(spare for _, spare in steps.values())
    if optimizer == "adamw_8bit":
        large = [p.numel() for p in parameters if p.numel() >= _QUANTISED_FROM]
        small = sum(p.numel() for p in parameters if p.numel() < _QUANTISED_FROM)
        return sum(2 * (number + 4 * math.ceil(number / _BLOCK)) for number in large) + 8 * small, 0
    return 2 * sum(p.numel() for p in parameters) * dtype.itemsize, 0


@functools.lru_cache
def _adafactor(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """State of one tensor under transformers' Adafactor as Trainer sets it, and the peak of its step above that."""
    return trace_optimizer(
        lambda tensor: Adafactor([tensor], lr=1e-3, scale_parameter=False, relative_step=False), shape, dtype
    )
