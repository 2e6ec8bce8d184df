"""`DistillationTrainer`: TRL's `SFTTrainer` with a teacher.

Read `compute_loss`: the teacher's answers, one forward of the student with the loss inside, one value per predicted token,
one division. The loss itself: `student_forward`; where answers come from: `teacher`.

Shape letters: B rows, T tokens per row, N predictions that count, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from slimmoe_hf.admission import (
    open_teacher,
    refuse_unsupported,
    silence_input_jitter,
    student_config,
    student_tokenizer,
)
from slimmoe_hf.arguments import DistillationConfig
from slimmoe_hf.cached_teacher import COLUMNS, FOLDER, CachedTeacher, precomputed
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.losses import IGNORED, load_balancing_loss
from slimmoe_hf.publishing import PublishingTrainer
from slimmoe_hf.resumption import ResumableTrainer
from slimmoe_hf.routing import LoadMonitor
from slimmoe_hf.student_forward import (
    Distillation,
    DistillationOutput,
    add_distilling_head,
    cannot_be_fused,
    predicted,
)
from slimmoe_hf.teacher import LiveTeacher, OwnBase, TeacherSource
from slimmoe_hf.terms import Terms
from slimmoe_hf.token_sums import TokenSums

logger = logging.getLogger(__name__)

# What `SFTTrainer` and `Trainer` write into the config of a model, though it says how to train and not what it is.
_TRAINING_KEYS = ("use_cache", "output_router_logits", "router_aux_loss_coef")


class DistillationTrainer(PublishingTrainer, ResumableTrainer, SFTTrainer):
    """Trains a student on the next-token distributions of a frozen teacher.

    Datasets, packing, completion-only loss, PEFT and saving are `SFTTrainer`'s. The loss of an optimizer step is

        sum over predicted tokens of (distillation_weight * divergence + crossentropy_weight * cross_entropy
                                      + router_logits_weight * router_kl + hidden_states_weight * hidden_mse)

    over their number, counted once over all processes and accumulation steps: it does not depend on how the batch was
    cut. The load-balancing loss, where `router_aux_loss_coef` turns it on, is a mean over micro-batches.

    The teacher is a model (`teacher_model`), a cache of its answers (`teacher_logits_path`, or written first with
    `precompute_teacher_logits`; then no teacher is in memory), or, for a PEFT student without either, the student's base
    with the adapter off. The loss is computed from hidden states, chunk by chunk: no logits of a whole batch are held, but
    for a student whose head is no plain linear layer (quantised, or trained by the adapter).

    Logged: `kl` (forward KL to the teacher over the full vocabulary at T = 1, whatever loss is trained on; from a cache of
    the likeliest tokens, over those and the rest as one, a lower bound of it), `ce`, `top1_agreement`, `entropy` (of the
    student), `teacher_top_k_mass` (the teacher's on its likeliest tokens, where only these count), `router_kl` and
    `hidden_mse` where they are trained on, all means over predicted tokens since the last log; `num_tokens`, predicted
    tokens so far; and `router_load_min` and `router_load_max`, the least and most loaded expert's tokens as multiples of an
    even load.
    Evaluation reports the same, as `eval_kl` and so on, and `eval_loss` as means over the tokens of the
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
        teacher_model: str | Path | PreTrainedModel | None = None,
        args: DistillationConfig | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **sft_arguments: Any,
    ) -> None:
        """Load what is named, compare the vocabularies, then build the `SFTTrainer`.

        Args:
            model: The student: a model, a folder or a Hub id.
            teacher_model: The teacher, likewise. It is frozen, and must not share weights with the student. None where
                `args` names a cache, or where the student's base is to teach its adapter.
            args: The settings; `DistillationConfig("distilled")` if None.
            processing_class: The tokenizer; the student's own if None.
            peft_config: Trains an adapter instead of all weights.
            **sft_arguments: `train_dataset`, `eval_dataset`, `callbacks` and the rest, as `SFTTrainer` takes them.

        Raises:
            TypeError: `args` is not a `DistillationConfig`.
            ValueError: A student or teacher that cannot be distilled, vocabularies that differ, or a cache that does not
                fit the data, the student or the loss.
        """
        args = DistillationConfig("distilled") if args is None else args
        if not isinstance(args, DistillationConfig):
            raise TypeError(f"args is a {type(args).__name__}; DistillationTrainer takes a DistillationConfig.")
        if sft_arguments.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the distillation loss. Override compute_loss instead.")
        config, tokenizer = student_config(model, args), processing_class or student_tokenizer(model, args)
        adapters = [peft_config, *(model.peft_config.values() if isinstance(model, PeftModel) else ())]
        adapters = [adapter for adapter in adapters if adapter is not None]
        refuse_unsupported(config, tokenizer, adapters)
        self.distillation_loss = args.divergence()
        self.terms = Terms(args.router_logits_weight, args.hidden_states_weight)
        teacher = open_teacher(model, teacher_model, args, self.distillation_loss, bool(adapters))
        if isinstance(teacher, CachedTeacher):
            teacher.check(config.vocab_size, tokenizer)
        elif teacher is not None:
            teacher.check_vocabulary(config.vocab_size, tokenizer)
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
        self._prepare_student()
        self._prepare_teacher(teacher, tokenizer)

    def _prepare_student(self) -> None:
        silence_input_jitter(self._student())
        # `compute_loss` asks for router logits itself; the config would carry the wish into the published model.
        routing = {key: value for key, value in self._own_config.items() if key != "use_cache"}
        vars(self._student().config).update(routing)
        whole = self._whole_student()
        if whole.config.model_type in FAMILIES:
            self._router_load = LoadMonitor(whole)
        self._needs_logits = cannot_be_fused(whole)
        if self._needs_logits:
            logger.debug("the student makes all its logits at once: %s", self._needs_logits)
        add_distilling_head(whole)

    def _prepare_teacher(self, teacher: LiveTeacher | CachedTeacher | None, tokenizer: PreTrainedTokenizerBase) -> None:
        """Bring the teacher to where it will answer, and look the data up in a cache; sets what is known of it."""
        student, rows = self._student(), [self.train_dataset, self.eval_dataset]
        if isinstance(teacher, LiveTeacher) and self.args.precompute_teacher_logits:
            teacher.place(self.accelerator)
            folder = Path(self.args.teacher_logits_path or Path(str(self.args.output_dir)) / FOLDER)
            cached = precomputed(
                teacher, rows, folder, self.distillation_loss, tokenizer=tokenizer, accelerator=self.accelerator,
                vocab_size=student.config.vocab_size, batch_size=self.args.per_device_eval_batch_size,
            )  # fmt: skip
            cached.check(student.config.vocab_size, tokenizer)
            teacher = cached
        self.teacher: TeacherSource
        if teacher is None:
            assert isinstance(student, PeftModel)
            self.teacher = OwnBase(student)
        else:
            self.teacher = teacher
        if isinstance(teacher, CachedTeacher):
            teacher.check_rows(rows, files=self.is_world_process_zero())
            self.data_collator = teacher.collator(self.data_collator)
        if isinstance(teacher, LiveTeacher):
            self.terms.check(student.config, teacher.model.config)
        self.teacher_name, self.teacher_fingerprint = self.teacher.name, self.teacher.fingerprint()
        # Under FSDP2 a process other than the first may have loaded no weights to tell the teacher by.
        self._teacher_identity = broadcast_object_list([self.teacher.identity()])[0]
        self.teacher.place(self.accelerator)

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
            return_outputs: Whether to return the student's outputs too, with all its logits.
            num_items_in_batch: Predictions in all micro-batches of the step on all processes; None takes this
                micro-batch's own (evaluation).

        Returns:
            A scalar, or `(scalar, outputs)`.
        """
        weights = self.args.weights_at(self._progress() if model.training else 1.0)
        tokens = predicted(inputs["labels"]).sum()
        if num_items_in_batch is None:
            weight = 1.0 / tokens.clamp(min=1)
        else:
            # The count is global and the processes' gradients are averaged: undo that one division.
            scale = self.accelerator.num_processes // self.get_tp_size()
            weight = scale / torch.as_tensor(num_items_in_batch, device=tokens.device).clamp(min=1)
        outputs = self._forward(model, inputs, weights, weight, return_outputs)
        loss = outputs.loss
        assert loss is not None
        sums = self._train_sums if model.training else self._eval_sums
        sums.add(tokens=tokens, **self._logged(outputs))
        if num_items_in_batch is None:
            sums.add(loss=loss.detach() * tokens)
        if self.aux_loss_enabled and model.training:
            assert outputs.router_logits is not None
            aux_loss = load_balancing_loss(outputs.router_logits, self._top_k(), inputs.get("attention_mask"))
            sums.add(aux_loss=aux_loss, micro_batches=torch.ones_like(aux_loss))
            loss = loss + self.router_aux_loss_coef * aux_loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self, model: nn.Module, inputs: dict[str, Any], weights: tuple[float, float], weight: Tensor, logits: bool
    ) -> DistillationOutput:
        """Both forwards, the teacher's first: what it holds is gone before the student's activations come."""
        labels_BT = inputs["labels"]
        model_inputs = {key: value for key, value in inputs.items() if key not in ("labels", *COLUMNS)}
        with torch.no_grad(), self.accelerator.autocast():
            asked = {**model_inputs, **{key: inputs[key] for key in COLUMNS if key in inputs}}
            answers, taught = self.teacher.answers(asked, predicted(labels_BT), self.terms)
        distil = Distillation(
            labels_BT, answers, taught, self.distillation_loss, weights, weight, self.terms,
            logits=logits or bool(self._needs_logits),
        )  # fmt: skip
        routing = {}
        if "output_router_logits" in self._own_config:
            routing["output_router_logits"] = self.aux_loss_enabled and model.training
        load = self._router_load if model.training else None
        with load.counting() if load is not None else nullcontext():
            outputs: DistillationOutput = model(**model_inputs, **routing, use_cache=False, distil=distil)
        return outputs

    def run_settings(self) -> dict[str, Any]:
        """Besides those of `ResumableTrainer`, who teaches and what the loss is."""
        return {**super().run_settings(), "teacher": self._teacher_identity, **self.args.loss_settings()}

    def _logged(self, outputs: DistillationOutput) -> dict[str, Tensor]:
        """What the logs say of every prediction."""
        values = outputs.losses
        assert values is not None
        logged = {
            "kl": values.kl_N, "ce": values.cross_entropy_N, "top1_agreement": values.top1_agreement_N,
            "entropy": values.student_entropy_N, "router_kl": outputs.router_kl_N, "hidden_mse": outputs.hidden_mse_N,
        }  # fmt: skip
        cached = isinstance(self.teacher, CachedTeacher) and self.teacher.cache.spec.kind == "top_k"
        if cached or self.distillation_loss.top_k:
            logged["teacher_top_k_mass"] = values.teacher_mass_N
        return {name: value for name, value in logged.items() if value is not None}

    def _student(self) -> PreTrainedModel | PeftModel:
        return self.accelerator.unwrap_model(self.model)

    def _whole_student(self) -> PreTrainedModel:
        student = self._student()
        whole: Any = student.get_base_model() if isinstance(student, PeftModel) else student
        return whole

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
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs.logits, inputs["labels"]

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
