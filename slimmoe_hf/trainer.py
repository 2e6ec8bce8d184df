"""`DistillationTrainer`: TRL's `SFTTrainer` with a teacher.

What it does with both: `distilling`, which encoder-decoders share (`seq2seq`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from slimmoe_hf.admission import open_teacher, refuse_unsupported, student_config, student_tokenizer
from slimmoe_hf.arguments import DistillationConfig
from slimmoe_hf.cached_teacher import FOLDER, CachedTeacher, precomputed
from slimmoe_hf.distilling import DistillingTrainer
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.losses import load_balancing_loss
from slimmoe_hf.student_forward import DistillationOutput
from slimmoe_hf.teacher import LiveTeacher
from slimmoe_hf.terms import Terms


class DistillationTrainer(DistillingTrainer, SFTTrainer):
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
        loss = args.divergence()
        self._settle(config, loss, Terms(args.router_logits_weight, args.hidden_states_weight))
        teacher = open_teacher(model, teacher_model, args, loss, bool(adapters))
        if isinstance(teacher, CachedTeacher):
            teacher.check(config.vocab_size, tokenizer)
        elif teacher is not None:
            teacher.check_vocabulary(config.vocab_size, tokenizer)
        student = str(model) if isinstance(model, Path) else model
        super().__init__(student, args, processing_class=tokenizer, peft_config=peft_config, **sft_arguments)
        args.check_terms()  # once more: `SFTTrainer` makes checkpointing reentrant for adapters under ZeRO-3
        self._prepare_student()
        self._prepare_teacher(teacher, tokenizer)

    def _prepare_teacher(self, teacher: LiveTeacher | CachedTeacher | None, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the cache that is asked for, and look the data up in it; then seat the teacher."""
        vocab_size, rows = self._student().config.vocab_size, [self.train_dataset, self.eval_dataset]
        if isinstance(teacher, LiveTeacher) and self.args.precompute_teacher_logits:
            teacher.place(self.accelerator)
            folder = Path(self.args.teacher_logits_path or Path(str(self.args.output_dir)) / FOLDER)
            teacher = precomputed(
                teacher, rows, folder, self.distillation_loss, tokenizer=tokenizer, accelerator=self.accelerator,
                vocab_size=vocab_size, batch_size=self.args.per_device_eval_batch_size,
            )  # fmt: skip
            teacher.check(vocab_size, tokenizer)
        if isinstance(teacher, CachedTeacher):
            teacher.check_rows(rows, files=self.is_world_process_zero())
            self.data_collator = teacher.collator(self.data_collator)
        self._seat(teacher)

    def _router_loss(self, outputs: DistillationOutput, inputs: dict[str, Any]) -> Tensor:
        assert outputs.router_logits is not None
        return load_balancing_loss(outputs.router_logits, self._top_k(), inputs.get("attention_mask"))

    def _top_k(self) -> int:
        config = self._student().config
        family = FAMILIES.get(config.model_type)
        return int((family.top_k if family else None) or config.num_experts_per_tok)

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        flattened = self.padding_free and self.args.per_device_eval_batch_size > 1
        return inputs if flattened else super()._without_repeated_rows(inputs)
