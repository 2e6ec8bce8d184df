"""`Seq2SeqDistillationTrainer`: transformers' `Seq2SeqTrainer` with a teacher.

The loss is that of `DistillationTrainer`, and so is what is done with it: `distilling`.

Shape letters: B rows, S tokens per row of the encoder, T of the decoder, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
)

from slimmoe_hf.admission import (
    open_teacher,
    refuse_decoder_only_teacher,
    refuse_unsupported_seq2seq,
    refuse_untokenised,
    student_config,
    student_tokenizer,
)
from slimmoe_hf.arguments import Seq2SeqDistillationConfig, as_dict
from slimmoe_hf.distilling import DistillingTrainer
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.losses import IGNORED, load_balancing_loss
from slimmoe_hf.student_forward import DistillationOutput
from slimmoe_hf.teacher import LiveTeacher
from slimmoe_hf.terms import Terms

_EXPERTS_PER_TOKEN = {
    name: row.top_k for name, row in FAMILIES.items() if row.encoder_decoder and row.top_k is not None
}
"""Encoder-decoders whose router logits are known, and how many experts they pick."""
_DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask")


class Seq2SeqDistillationTrainer(DistillingTrainer, Seq2SeqTrainer):
    """Trains an encoder-decoder (Switch Transformers, T5, BART and their kin) on the distributions of a frozen teacher.

    Rows are tokenised: `input_ids`, `labels` and, if need be, `attention_mask`. Labels are not shifted: the decoder's
    position t predicts `labels[t]`, and is given the labels before it. A label of -100 does not count. The teacher, another
    encoder-decoder with the same tokenizer, is given the same; without one, a `PeftModel` learns from its own base. What the
    loss is, what it is divided by and what is logged is as in `DistillationTrainer`, router load aside; what the model adds
    to its own loss (the z-loss of Switch) is not there. `router_aux_loss_coef` adds the load-balancing losses of the routers
    of encoder and decoder, padding left out (Switch only).

    The loss does not depend on how a batch was cut, with dropout and Switch's `router_jitter_noise` at 0: they are noise,
    drawn batch by batch. Switch counts the capacity of its experts row by row from the left, so that padding on the right
    takes no token's place.

    `predict_with_generate`, `generation_config` and `compute_metrics` work as in `Seq2SeqTrainer`; the losses and metrics of
    evaluation are means over the tokens of the whole set. Labels come to `compute_metrics` padded with -100. An interrupted
    run resumes exactly: see `ResumableTrainer`; what is published: `PublishingTrainer`. A teacher cache is not supported.

    Example:
        ```python
        trainer = Seq2SeqDistillationTrainer(
            model="google/switch-base-8", teacher_model="switch-base-8-finetuned",
            args=Seq2SeqDistillationConfig("out", predict_with_generate=True), train_dataset=tokenised,
        )
        trainer.train()
        ```
    """

    args: Seq2SeqDistillationConfig
    _ahead = 0

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        teacher_model: str | Path | PreTrainedModel | None = None,
        args: Seq2SeqDistillationConfig | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Any = None,
        **trainer_arguments: Any,
    ) -> None:
        """Load what is named, compare the vocabularies, then build the `Seq2SeqTrainer`.

        Args:
            model: The student: a model, with an adapter or without, a folder or a Hub id.
            teacher_model: The teacher, likewise. It is frozen, and must not share weights with the student. None where the
                student's base is to teach its adapter.
            args: The settings; `Seq2SeqDistillationConfig("distilled")` if None.
            processing_class: The tokenizer; the student's own if None.
            data_collator: `DataCollatorForSeq2Seq` if None.
            **trainer_arguments: `train_dataset`, `eval_dataset`, `compute_metrics` and the rest, as `Seq2SeqTrainer` takes them.

        Raises:
            TypeError: `args` is not a `Seq2SeqDistillationConfig`.
            ValueError: A student or teacher that cannot be distilled, vocabularies that differ, or rows without `input_ids`
                and `labels`.
        """
        args = Seq2SeqDistillationConfig("distilled") if args is None else args
        if not isinstance(args, Seq2SeqDistillationConfig):
            raise TypeError(
                f"args is a {type(args).__name__}; Seq2SeqDistillationTrainer takes a Seq2SeqDistillationConfig."
            )
        for name, remedy in (("compute_loss_func", "Override compute_loss"), ("model_init", "Give model")):
            if trainer_arguments.get(name) is not None:
                raise ValueError(f"{name} would replace what is distilled. {remedy} instead.")
        for name in ("train_dataset", "eval_dataset"):
            refuse_untokenised(name, trainer_arguments.get(name))
        config, tokenizer = student_config(model, args), processing_class or student_tokenizer(model, args)
        adapters = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
        refuse_unsupported_seq2seq(config, tokenizer, adapters)
        self.router_aux_loss_coef = _router_coefficient(config, args.router_aux_loss_coef)
        self.aux_loss_enabled = self.router_aux_loss_coef > 0
        loss = args.divergence()
        self._settle(config, loss, Terms())
        if teacher_model is None and not adapters:
            raise ValueError(
                "there is no teacher: give teacher_model. Only a PeftModel may do without, and learn from its base."
            )
        refuse_decoder_only_teacher(teacher_model, args)
        teacher = open_teacher(model, teacher_model, args, loss, bool(adapters))
        student = _loaded(model, args)
        if isinstance(teacher, LiveTeacher):
            teacher.check_vocabulary(config.vocab_size, tokenizer)
            _require_same_start(student, teacher.model)
        super().__init__(
            student, args, data_collator or DataCollatorForSeq2Seq(tokenizer), processing_class=tokenizer,
            **trainer_arguments,
        )  # fmt: skip
        self._prepare_student()
        assert teacher is None or isinstance(teacher, LiveTeacher)
        self._seat(teacher)

    def prediction_step(  # type: ignore[override]  # the loss is a tensor, as in `Trainer`
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluate one batch into the sums.

        Returns:
            Its mean loss, and where asked `[B, T, V]` logits (with `predict_with_generate` generated ids) and labels.
        """
        generates = self.args.predict_with_generate and not prediction_loss_only
        inputs = self._prepare_inputs(inputs)
        loss, logits, labels = None, None, inputs.get("labels")
        if labels is not None:
            loss, logits, _ = super().prediction_step(model, inputs, prediction_loss_only or generates, ignore_keys)
        elif not generates:
            raise ValueError(
                "rows without labels have no loss, only texts can be generated. Set predict_with_generate=True."
            )
        if not generates:
            return loss, logits, None if prediction_loss_only else labels
        asked = {name: value for name, value in inputs.items() if name not in ("labels", *_DECODER_INPUTS)}
        _, generated, _ = Seq2SeqTrainer.prediction_step(self, model, asked, False, ignore_keys, **gen_kwargs)
        return loss, generated, labels

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        given = super()._model_inputs(inputs)
        if "decoder_input_ids" not in given:
            given["decoder_input_ids"] = _decoder_inputs(self._whole_student(), inputs["labels"])
        return given

    def _routing(self, wanted: bool) -> dict[str, Any]:
        return {"output_router_logits": True} if wanted else {}

    def _router_loss(self, outputs: DistillationOutput, inputs: dict[str, Any]) -> Tensor:
        top_k = _EXPERTS_PER_TOKEN[self._whole_student().config.model_type]
        parts = [
            (outputs.encoder_router_logits, inputs.get("attention_mask")),
            (outputs.decoder_router_logits, inputs["labels"] != IGNORED),
        ]
        losses = [
            load_balancing_loss([layer.flatten(0, -2) for layer in logits], top_k, mask)
            for logits, mask in parts
            if logits
        ]
        return torch.stack(losses).sum()


def _decoder_inputs(model: Any, labels_BT: Tensor) -> Tensor:
    """Labels shifted, as a model gives them to its decoder."""
    shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels_BT)
    return shifted


def _require_same_start(student: PreTrainedModel | PeftModel, teacher: PreTrainedModel) -> None:
    """Both decoders are given one text, so both must begin it alike."""
    labels_BT, begun = torch.arange(5, 8).unsqueeze(0), []
    for name, model in (("student", student), ("teacher", teacher)):
        whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        try:
            begun.append(_decoder_inputs(whole, labels_BT).tolist())
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the {name} ({whole.config.model_type}) cannot make its decoder's input from labels: it needs a "
                "prepare_decoder_input_ids_from_labels, and decoder_start_token_id and pad_token_id in its config."
            ) from error
    if begun[0] != begun[1]:
        raise ValueError(
            f"for the labels {labels_BT[0].tolist()} the student's decoder is given {begun[0][0]}, the teacher's {begun[1][0]}. "
            "Give both configs the same decoder_start_token_id."
        )


def _router_coefficient(config: PreTrainedConfig, given: float | None) -> float:
    if config.model_type in _EXPERTS_PER_TOKEN:
        return float(config.router_aux_loss_coef if given is None else given)
    if given:
        raise ValueError(
            f"router_aux_loss_coef={given}: it is not known what the routers of a {config.model_type} return; it works with "
            f"{', '.join(_EXPERTS_PER_TOKEN)}. Set it to 0.0."
        )
    return 0.0


def _loaded(model: str | Path | PreTrainedModel | PeftModel, args: Seq2SeqDistillationConfig) -> Any:
    if not isinstance(model, str | Path):
        return model
    kwargs = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code, **as_dict(args.model_init_kwargs)}
    return AutoModelForSeq2SeqLM.from_pretrained(str(model), **kwargs)
