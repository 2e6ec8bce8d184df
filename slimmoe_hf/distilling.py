"""What every trainer with a teacher does, whatever it distils: one forward of each, one value per token, one division.

Read `compute_loss`: the teacher's answers, one forward of the student with the loss inside, one value per predicted token,
one division. The loss itself: `student_forward`; where answers come from: `teacher`.

Shape letters: B rows, T tokens per row, N predictions that count, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import TrainOutput

from slimmoe_hf.admission import silence_input_jitter
from slimmoe_hf.cached_teacher import COLUMNS, CachedTeacher
from slimmoe_hf.families import DECODERS
from slimmoe_hf.losses import DistillationLoss
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
from slimmoe_hf.token_sums import TokenEvaluation, TokenSums

logger = logging.getLogger(__name__)

# What `SFTTrainer` and `Trainer` write into the config of a model, though it says how to train and not what it is.
_TRAINING_KEYS = ("use_cache", "output_router_logits", "router_aux_loss_coef")


class DistillingTrainer(PublishingTrainer, ResumableTrainer, TokenEvaluation):
    """The part that `DistillationTrainer` and `Seq2SeqDistillationTrainer` have in common; they say what they do.

    A subclass calls `_settle` before and `_seat` after the constructor of the Trainer that it adds this to.
    """

    # `compute_loss` divides by the tokens of all accumulation steps itself.
    loss_is_scaled_for_ga: Any = True
    _ahead = 1
    """As `student_forward.predicted` takes it."""
    aux_loss_enabled: bool
    router_aux_loss_coef: float

    def _settle(self, config: PreTrainedConfig, loss: DistillationLoss, terms: Terms) -> None:
        """Note what the loss is, and the student's config as it was."""
        self.distillation_loss, self.terms = loss, terms
        self._own_config = {key: value for key, value in config.to_dict().items() if key in _TRAINING_KEYS}
        self._train_sums = TokenSums()
        self._micro_batches: list[tuple[Tensor, Tensor]] = []
        self._router_load: LoadMonitor | None = None

    def _prepare_student(self) -> None:
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError("context and sequence parallelism are not supported: the teacher needs whole sequences.")
        # Whatever the model's own loss is, ours needs the number of predictions, and knows which these are.
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, self._ahead == 1
        silence_input_jitter(self._student())
        # `compute_loss` asks for router logits itself; the config would carry the wish into the published model.
        routing = {key: value for key, value in self._own_config.items() if key != "use_cache"}
        vars(self._student().config).update(routing)
        whole = self._whole_student()
        if whole.config.model_type in DECODERS:
            self._router_load = LoadMonitor(whole)
        self._needs_logits = cannot_be_fused(whole)
        if self._needs_logits:
            logger.debug("the student makes all its logits at once: %s", self._needs_logits)
        add_distilling_head(whole)

    def _seat(self, teacher: TeacherSource | None) -> None:
        """Bring the teacher to where it will answer, and note who it is; None is the student's own base."""
        student = self._student()
        if teacher is None:
            assert isinstance(student, PeftModel)
            teacher = OwnBase(student)
        self.teacher = teacher
        if isinstance(teacher, LiveTeacher):
            self.terms.check(student.config, teacher.model.config)
        self.teacher_name, self.teacher_fingerprint = teacher.name, teacher.fingerprint()
        # Under FSDP2 a process other than the first may have loaded no weights to tell the teacher by.
        self._teacher_identity = broadcast_object_list([teacher.identity()])[0]
        teacher.place(self.accelerator)

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What both models are given of a batch."""
        return {key: value for key, value in inputs.items() if key not in ("labels", *COLUMNS)}

    def _routing(self, wanted: bool) -> dict[str, Any]:
        """What else the student is given, so that it returns router logits or does not."""
        return {"output_router_logits": wanted} if "output_router_logits" in self._own_config else {}

    def _router_loss(self, outputs: DistillationOutput, inputs: dict[str, Any]) -> Tensor:
        """The load-balancing loss of a micro-batch, where it is turned on."""
        raise NotImplementedError

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
        tokens = predicted(inputs["labels"], self._ahead).sum()
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
            aux_loss = self._router_loss(outputs, inputs)
            sums.add(aux_loss=aux_loss, micro_batches=torch.ones_like(aux_loss))
            loss = loss + self.router_aux_loss_coef * aux_loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self, model: nn.Module, inputs: dict[str, Any], weights: tuple[float, float], weight: Tensor, logits: bool
    ) -> DistillationOutput:
        """Both forwards, the teacher's first: what it holds is gone before the student's activations come."""
        labels_BT, model_inputs = inputs["labels"], self._model_inputs(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            asked = {**model_inputs, **{key: inputs[key] for key in COLUMNS if key in inputs}}
            answers, taught = self.teacher.answers(asked, predicted(labels_BT, self._ahead), self.terms)
        distil = Distillation(
            labels_BT, answers, taught, self.distillation_loss, weights, weight, self.terms,
            logits=logits or bool(self._needs_logits), ahead=self._ahead,
        )  # fmt: skip
        routing = self._routing(self.aux_loss_enabled and model.training)
        load = self._router_load if model.training else None
        with load.counting() if load is not None else nullcontext():
            outputs: DistillationOutput = model(**model_inputs, **routing, use_cache=False, distil=distil)
        return outputs

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; arguments as `ResumableTrainer.train`. What an earlier, perhaps stopped, call has left counts no more."""
        self._train_sums.clear()
        self._micro_batches.clear()
        if self._router_load is not None:
            self._router_load.clear()
        return super().train(*args, **kwargs)

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
