"""`DistillationTrainer`: TRL's `SFTTrainer` with a teacher.

Read `compute_loss`: one forward of the student, one of the teacher, one value per predicted token, one division.

Shape letters: B rows, T tokens per row, N predictions that count, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from slimmoe_hf.arguments import DistillationConfig
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.losses import IGNORED, DistillationLoss, TokenLosses, load_balancing_loss
from slimmoe_hf.publishing import PublishingTrainer
from slimmoe_hf.resumption import ResumableTrainer
from slimmoe_hf.routing import LoadMonitor
from slimmoe_hf.teacher import LiveTeacher
from slimmoe_hf.token_sums import TokenSums

logger = logging.getLogger(__name__)

# What `SFTTrainer` and `Trainer` write into the config of a model, though it says how to train and not what it is.
_TRAINING_KEYS = ("use_cache", "output_router_logits", "router_aux_loss_coef")


class DistillationTrainer(PublishingTrainer, ResumableTrainer, SFTTrainer):
    """Trains a student on the next-token distributions of a frozen teacher.

    Datasets, packing, completion-only loss, PEFT and saving are `SFTTrainer`'s. The loss of an optimizer step is

        sum over predicted tokens of (distillation_weight * divergence + crossentropy_weight * cross_entropy)

    over their number, counted once over all processes and accumulation steps: it does not depend on how the batch was
    cut. The load-balancing loss, where `router_aux_loss_coef` turns it on, is a mean over micro-batches.

    Logged: `kl` (forward KL to the teacher over the full vocabulary at T = 1, whatever loss is trained on), `ce`,
    `top1_agreement`, all means over predicted tokens since the last log; `num_tokens`, predicted tokens so far; and
    `router_load_min` and `router_load_max`, the least and most loaded expert's tokens as multiples of an even load.
    Evaluation reports `eval_kl`, `eval_ce`, `eval_top1_agreement` and `eval_loss` as means over the tokens of the
    whole set; `eval_loss` takes the weights at the end of their schedules, so that evaluations of one run compare, and
    leaves out the load-balancing loss, which is per-batch by nature. With several processes and a padding-free
    collator (as `packing=True` brings), rows that fill up the last batch are counted twice.

    A loss or gradient that is not finite stops training before the optimizer steps. An interrupted run resumes
    exactly: see `ResumableTrainer`. What `save_model` and `push_to_hub` publish: see `PublishingTrainer`.

    Example:
        ```python
        trainer = DistillationTrainer(
            model="slim-student", teacher_model="original", args=DistillationConfig("out"), train_dataset=dataset
        )
        trainer.train()
        ```
    """

    args: DistillationConfig
    _tag_names = ["slimmoe_hf", "distillation"]  # noqa: RUF012
    _name = "Distillation"
    # `compute_loss` divides by the tokens of all accumulation steps itself.
    loss_is_scaled_for_ga = True  # type: ignore[assignment]

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        teacher_model: str | Path | PreTrainedModel,
        args: DistillationConfig | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **sft_arguments: Any,
    ) -> None:
        """Load what is named, compare the vocabularies, then build the `SFTTrainer`.

        Args:
            model: The student: a model, a folder or a Hub id.
            teacher_model: The teacher, likewise. It is frozen, and must not share weights with the student.
            args: The settings; `DistillationConfig("distilled")` if None.
            processing_class: The tokenizer; the student's own if None.
            peft_config: Trains an adapter instead of all weights.
            **sft_arguments: `train_dataset`, `eval_dataset`, `callbacks` and the rest, as `SFTTrainer` takes them.

        Raises:
            TypeError: `args` is not a `DistillationConfig`.
            ValueError: A student or teacher that cannot be distilled, or vocabularies that differ.
        """
        args = DistillationConfig("distilled") if args is None else args
        if not isinstance(args, DistillationConfig):
            raise TypeError(f"args is a {type(args).__name__}; DistillationTrainer takes a DistillationConfig.")
        if sft_arguments.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the distillation loss. Override compute_loss instead.")
        config, tokenizer = _student_config(model, args), processing_class or _student_tokenizer(model, args)
        adapters = [peft_config, *(model.peft_config.values() if isinstance(model, PeftModel) else ())]
        _refuse_unsupported(config, tokenizer, [adapter for adapter in adapters if adapter is not None])
        if isinstance(model, nn.Module) and isinstance(teacher_model, nn.Module):
            _refuse_shared_weights(model, teacher_model)
        self.teacher = LiveTeacher.load(
            teacher_model, args.device, _dict(args.teacher_model_init_kwargs), args.trust_remote_code
        )
        self.teacher_name = str(self.teacher.model.config._name_or_path)
        self.teacher.check_vocabulary(config.vocab_size, tokenizer)
        self.distillation_loss = DistillationLoss(args.beta, args.temperature, args.loss_top_k, args.loss_add_tail)
        self._own_config = {key: value for key, value in config.to_dict().items() if key in _TRAINING_KEYS}
        self._train_sums, self._eval_sums = TokenSums(), TokenSums()
        self._micro_batches: list[tuple[Tensor, Tensor]] = []
        self._router_load: LoadMonitor | None = None
        student = str(model) if isinstance(model, Path) else model
        super().__init__(student, args, processing_class=tokenizer, peft_config=peft_config, **sft_arguments)
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError("context and sequence parallelism are not supported: the teacher needs whole sequences.")
        # Whatever the model's own loss is, ours predicts the next token and needs the number of predictions.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.teacher.place(self.accelerator)
        _silence_input_jitter(self._student())
        # `compute_loss` asks for router logits itself; the config would carry the wish into the published model.
        routing = {key: value for key, value in self._own_config.items() if key != "use_cache"}
        vars(self._student().config).update(routing)
        if config.model_type in FAMILIES:
            inner = self._student()
            whole: Any = inner.get_base_model() if isinstance(inner, PeftModel) else inner
            self._router_load = LoadMonitor(whole)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch: its token losses over the number of predictions of the whole optimizer step.

        Args:
            model: The student, wrapped as the accelerator wraps it.
            inputs: A collated batch with `labels` `[B, T]`, -100 where a token is not trained on.
            return_outputs: Whether to return the student's outputs too.
            num_items_in_batch: Predictions in all micro-batches of the step on all processes; None takes this
                micro-batch's own (evaluation).

        Returns:
            A scalar, or `(scalar, outputs)`.
        """
        outputs, losses = self._forward(model, inputs)
        distillation, crossentropy = self.args.weights_at(self._progress() if model.training else 1.0)
        loss_N = distillation * losses.divergence_N
        if crossentropy:
            loss_N = loss_N + crossentropy * losses.cross_entropy_N
        tokens = loss_N.new_tensor(len(loss_N))
        sums = self._train_sums if model.training else self._eval_sums
        sums.add(tokens=tokens, kl=losses.kl_N, ce=losses.cross_entropy_N, top1_agreement=losses.top1_agreement_N)
        if num_items_in_batch is None:
            sums.add(loss=loss_N)
            loss = loss_N.sum() / tokens.clamp(min=1)
        else:
            # The count is global and the processes' gradients are averaged: undo that one division.
            scale = self.accelerator.num_processes // self.get_tp_size()
            loss = loss_N.sum() / torch.as_tensor(num_items_in_batch, device=loss_N.device).clamp(min=1) * scale
        if self.aux_loss_enabled and model.training:
            assert outputs.router_logits is not None
            aux_loss = load_balancing_loss(outputs.router_logits, self._top_k(), inputs.get("attention_mask"))
            sums.add(aux_loss=aux_loss, micro_batches=torch.ones_like(aux_loss))
            loss = loss + self.router_aux_loss_coef * aux_loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[MoeCausalLMOutputWithPast, TokenLosses]:
        """Both forwards, and the losses of the N positions whose next token counts. N = 0 keeps the graph."""
        labels_BT = inputs["labels"][:, 1:]
        model_inputs = {key: value for key, value in inputs.items() if key != "labels"}
        routing = {}
        if "output_router_logits" in self._own_config:
            routing["output_router_logits"] = self.aux_loss_enabled and model.training
        load = self._router_load if model.training else None
        with load.counting() if load is not None else nullcontext():
            outputs = model(**model_inputs, **routing, use_cache=False)
        with self.accelerator.autocast():
            teacher_logits_BTV = self.teacher.logits(model_inputs)
        counts_BT = labels_BT != IGNORED
        student_NV, teacher_NV = outputs.logits[:, :-1][counts_BT], teacher_logits_BTV[:, :-1][counts_BT]
        return outputs, self.distillation_loss(student_NV, teacher_NV, labels_BT[counts_BT])

    def _student(self) -> PreTrainedModel | PeftModel:
        return self.accelerator.unwrap_model(self.model)

    def _progress(self) -> float:
        """0.0 at the first optimizer step, 1.0 at the last."""
        return min(1.0, self.state.global_step / max(1, self.state.max_steps - 1))

    def _top_k(self) -> int:
        config = self._student().config
        family = FAMILIES.get(config.model_type)
        return int((family.top_k if family else None) or config.num_experts_per_tok)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluate one batch into the sums; returns its mean loss, and `[B, T, V]` logits and labels where asked."""
        inputs = self._without_repeated_rows(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, outputs.logits, inputs["labels"])

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Mask the rows that only fill up the last batch of several processes, as `gather_for_metrics` drops them."""
        state, labels = self.accelerator.gradient_state, inputs["labels"]
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        if self.padding_free and self.args.per_device_eval_batch_size > 1:
            return inputs
        row = self.accelerator.process_index * len(labels) + torch.arange(len(labels), device=labels.device)
        return {**inputs, "labels": labels.masked_fill((row >= state.remainder).unsqueeze(-1), IGNORED)}

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The stock loop, with means over the tokens of the whole set instead of a mean of batch means."""
        self._eval_sums.clear()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        means, tokens = self._eval_sums.means(self.accelerator)
        own = {f"{metric_key_prefix}_{name}": value for name, value in {**means, "num_tokens": tokens}.items()}
        return output._replace(metrics={**(output.metrics or {}), **own})

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; the last one of a step also checks them all.

        Raises:
            FloatingPointError: A loss of this step is not finite. The optimizer has not stepped.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append((loss, inputs["input_ids"][:, :8]))
        if self.accelerator.sync_gradients:
            losses = torch.stack([loss for loss, _ in self._micro_batches])
            # One read per step; every process learns of it, so that none steps or saves after another stopped.
            finite = self.accelerator.reduce(losses.isfinite().all().float(), reduction="sum")
            if finite.item() < self.accelerator.num_processes:
                raise FloatingPointError(self._describe(losses))
            self._micro_batches.clear()
        return loss

    def _describe(self, losses: Tensor) -> str:
        where = f"step {self.state.global_step + 1}"
        bad = [(number, loss) for number, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        if not bad:
            return f"{where}: the loss is not finite on another process, which names the batch."
        number, loss = bad[0]
        return (
            f"{where}, micro-batch {number + 1} of {len(losses)}, process {self.accelerator.process_index}: the loss "
            f"is {loss}. Its rows begin with the token ids {self._micro_batches[number][1].tolist()}. The weights are "
            "those of the step before: look at these rows, lower learning_rate, or compute in float32."
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last call before the optimizer steps. A scaler (fp16) skips such steps itself."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the gradient norm is {float(norm)} though the loss is finite. "
                "The weights are those of the step before: lower learning_rate, or compute in float32."
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to a training log; the one place where sums leave the device."""
        load: list[list[float]] | None = None
        if "loss" in logs:
            means, tokens = self._train_sums.means(self.accelerator)
            before = (entry["num_tokens"] for entry in reversed(self.state.log_history) if "num_tokens" in entry)
            logs |= {**means, "num_tokens": next(before, 0) + tokens}
            if self._router_load is not None:
                numbers, load = self._router_load.read(self.accelerator, self.state)
                logs |= numbers
        super().log(logs, start_time)
        if load is not None:  # for plots; the loggers of others take numbers only
            entry: dict[str, Any] = self.state.log_history[-1]
            entry["router_load"] = load

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        config = vars(self._student().config)
        training = {key: config[key] for key in self._own_config}
        config.update(self._own_config)
        try:
            super()._save(output_dir, state_dict)
        finally:
            config.update(training)


def _dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    assert not isinstance(value, str), "TrainingArguments parses JSON text"
    return dict(value or {})


def _student_config(model: str | Path | PreTrainedModel | PeftModel, args: DistillationConfig) -> PreTrainedConfig:
    if isinstance(model, str | Path):
        revision = _dict(args.model_init_kwargs).get("revision")
        return AutoConfig.from_pretrained(str(model), revision=revision, trust_remote_code=args.trust_remote_code)
    return model.config


def _student_tokenizer(
    model: str | Path | PreTrainedModel | PeftModel, args: DistillationConfig
) -> PreTrainedTokenizerBase:
    source, revision = model, None
    if isinstance(source, str | Path):
        revision = _dict(args.model_init_kwargs).get("revision")
    else:
        source = source.config._name_or_path
    return AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=args.trust_remote_code)


def _refuse_unsupported(config: PreTrainedConfig, processing_class: Any, peft_configs: list[PeftConfig]) -> None:
    if config.get_text_config() is not config or isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"model_type={config.model_type!r} is not a plain language model: distilling vision and audio models is not "
            "supported. Give the text model on its own."
        )
    for peft_config in peft_configs:
        if peft_config.is_prompt_learning:
            raise ValueError(
                f"{type(peft_config).__name__} puts virtual tokens before the student's text, where the teacher has "
                "none to compare with. Use LoRA, or train all weights."
            )


def _refuse_shared_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Freezing the teacher would freeze the student, and a cut student would be a cut teacher."""
    if {id(parameter) for parameter in student.parameters()} & {id(parameter) for parameter in teacher.parameters()}:
        raise ValueError(
            "teacher_model shares its weights with model. Give the teacher by name, or a copy.deepcopy of the model."
        )


def _silence_input_jitter(model: PreTrainedModel | PeftModel) -> None:
    """PhiMoE multiplies its inputs by noise twice in training; the teacher it is to match has none."""
    noisy = [module for module in model.modules() if vars(module).get("input_jitter_noise")]
    for module in noisy:
        vars(module)["input_jitter_noise"] = 0.0
    if noisy:
        model.config.input_jitter_noise = 0.0
        logger.info("input_jitter_noise of the student is set to 0: it is no part of what is distilled.")
