"""The settings of a distillation run: TRL's `SFTConfig`, or `Seq2SeqTrainingArguments`, and a few fields more."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from slimmoe_hf.losses import DistillationLoss


@dataclass
class DistillationArguments:
    """What the loss is made of and where the teacher comes from, whatever is distilled.

    Defaults that differ from those of `TrainingArguments` and its kin: `router_aux_loss_coef` is 0.0 instead of the model's
    own, and `logging_nan_inf_filter` is False (the trainer stops on a non-finite loss, and the filter costs a device sync
    per micro-batch).

    Attributes:
        beta: 0.0 forward KL, 1.0 reverse KL, between them the generalised Jensen-Shannon divergence.
        temperature: T of the divergence. The divergence is multiplied by T^2, so that its weight keeps its meaning.
        loss_top_k: Entries of the teacher's distribution that the forward KL uses; 0 is all.
        loss_add_tail: With `loss_top_k`, whether the other entries count as one.
        distillation_weight: Weight of the divergence: a number, or `[start, end]` for a linear schedule over training.
        crossentropy_weight: Weight of the cross-entropy with the data, likewise.
        teacher_model_init_kwargs: For `from_pretrained`, where the teacher is given by name. With a teacher larger than
            the GPU, `{"device_map": "auto", "max_memory": {0: "12GB", "cpu": "100GB"}}` keeps 12 GB of it there and
            streams the rest from host memory at every forward.
        teacher_logits_path: Folder of a teacher cache (see `slimmoe cache`), in place of a teacher.
        precompute_teacher_logits: Whether to write that cache with the given teacher before training, which is then out
            of memory; in `output_dir/teacher-cache` where `teacher_logits_path` is None. One that is there is used.
        router_logits_weight: Weight of the KL between the teacher's and the student's router distributions, token by token,
            mean over layers.
        hidden_states_weight: Weight of the mean squared error of the layers' outputs as a share of the teacher's mean
            square, token by token, mean over layers.
    """

    router_aux_loss_coef: float | None = field(
        default=0.0,
        metadata={
            "help": "Coefficient of the load-balancing loss of the student's routers. 0.0 is off; None takes the "
            "coefficient of the model's config."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave non-finite losses out of the logs. Training stops on them either way."}
    )
    beta: float = field(
        default=0.0, metadata={"help": "0.0 is forward KL, 1.0 reverse KL, between them the generalised JSD."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the divergence, which is multiplied by its square."}
    )
    loss_top_k: int = field(
        default=0, metadata={"help": "How many of the teacher's likeliest tokens the forward KL uses; 0 is all."}
    )
    loss_add_tail: bool = field(
        default=True, metadata={"help": "With loss_top_k: whether all other tokens count as one more."}
    )
    # `default_factory` and `str` are for HfArgumentParser, which then reads one or two numbers from the command line.
    distillation_weight: float | list[float] | str = field(
        default_factory=lambda: 1.0,
        metadata={"help": "Weight of the divergence: a number, or start and end of a linear schedule."},
    )
    crossentropy_weight: float | list[float] | str = field(
        default_factory=lambda: 0.0,
        metadata={"help": "Weight of the cross-entropy: a number, or start and end of a linear schedule."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of from_pretrained for a teacher given by name."},
    )
    teacher_logits_path: str | None = field(
        default=None, metadata={"help": "Folder of a teacher cache, in place of a teacher."}
    )
    precompute_teacher_logits: bool = field(
        default=False, metadata={"help": "Write a teacher cache before training, and train from it."}
    )
    router_logits_weight: float = field(
        default=0.0, metadata={"help": "Weight of the KL between the routers of teacher and student; 0.0 is off."}
    )
    hidden_states_weight: float = field(
        default=0.0, metadata={"help": "Weight of the relative squared error of the layers' outputs; 0.0 is off."}
    )

    def weights_at(self, progress: float) -> tuple[float, float]:
        """Weights of divergence and cross-entropy at `progress`, from 0.0 (first step) to 1.0 (last step)."""
        ends = (_ends(self.distillation_weight), _ends(self.crossentropy_weight))
        distillation, crossentropy = (start + (end - start) * progress for start, end in ends)
        return distillation, crossentropy

    def divergence(self) -> DistillationLoss:
        """The divergence that these settings name."""
        return DistillationLoss(self.beta, self.temperature, self.loss_top_k, self.loss_add_tail)

    def loss_settings(self) -> dict[str, Any]:
        """What the loss is made of: a run that goes on with another value is another run."""
        names = (
            "beta", "temperature", "loss_top_k", "loss_add_tail", "distillation_weight", "crossentropy_weight",
            "router_logits_weight", "hidden_states_weight", "router_aux_loss_coef",
        )  # fmt: skip
        return {name: vars(self)[name] for name in names}

    def check_loss(self) -> None:
        """Read schedules, and check every value that the loss is made of.

        Raises:
            ValueError: One is outside its range.
        """
        for name in ("distillation_weight", "crossentropy_weight"):
            setattr(self, name, schedule(name, getattr(self, name)))
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta={self.beta} is outside [0, 1]. 0.0 is forward KL, 1.0 is reverse KL.")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} is not a positive number. 1.0 is no softening.")
        if self.loss_top_k < 0:
            raise ValueError(f"loss_top_k={self.loss_top_k} is negative. Give 0 for the full vocabulary, or 1 or more.")
        if self.loss_top_k and self.beta != 0.0:
            raise ValueError(
                f"loss_top_k={self.loss_top_k} with beta={self.beta}: only forward KL can be cut to the teacher's "
                "likeliest tokens. Set beta=0.0, or loss_top_k=0."
            )
        for progress, when in ((0.0, "start"), (1.0, "end")):
            if sum(self.weights_at(progress)) == 0.0:
                raise ValueError(
                    f"distillation_weight and crossentropy_weight are both 0 at the {when} of training, which leaves "
                    "nothing to learn from. Make one of them positive."
                )
        if self.router_aux_loss_coef is not None and not 0.0 <= self.router_aux_loss_coef < math.inf:
            raise ValueError(f"router_aux_loss_coef={self.router_aux_loss_coef} is negative. 0.0 turns it off.")
        for name in ("router_logits_weight", "hidden_states_weight"):
            if not 0.0 <= vars(self)[name] < math.inf:
                raise ValueError(f"{name}={vars(self)[name]} is not a number of at least 0. 0.0 turns it off.")


@dataclass
class DistillationConfig(DistillationArguments, SFTConfig):
    """Arguments of `DistillationTrainer`: every argument of `SFTConfig` keeps its meaning, `DistillationArguments` come on top.

    `bf16`, where neither it nor `fp16` is set, is on only where the machine has an accelerator that computes in bfloat16: on
    a CPU it is slower than float32 and less exact.

    Raises:
        ValueError: A value outside its range, or an SFT setting that the distillation loss replaces.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        """Fill in defaults that depend on the machine and check every value."""
        if self.bf16 is None and not self.fp16:
            self.bf16 = is_torch_bf16_gpu_available() and not self.use_cpu
        super().__post_init__()
        self.check_loss()
        self.check_terms()
        if self.loss_type != "nll":
            raise ValueError(
                f"loss_type={self.loss_type!r} has no meaning here: distillation_weight and crossentropy_weight choose "
                "the loss. Leave loss_type unset."
            )
        refuse_replaced(self)

    def check_terms(self) -> None:
        """Whether the terms on routers and layers can be had with the other settings.

        Raises:
            ValueError: They cannot.
        """
        for name in ("router_logits_weight", "hidden_states_weight"):
            weight = vars(self)[name]
            if weight and (self.teacher_logits_path is not None or self.precompute_teacher_logits):
                raise ValueError(
                    f"{name}={weight} compares what is inside the models, and a teacher cache holds the teacher's answers "
                    "only. Set it to 0.0, or train with the teacher itself."
                )
            if weight and as_dict(self.gradient_checkpointing_kwargs).get("use_reentrant"):
                raise ValueError(
                    f"{name}={weight} gets no gradient under reentrant gradient checkpointing, which adapters under ZeRO-3 "
                    "come with. Leave use_reentrant out of gradient_checkpointing_kwargs, or set gradient_checkpointing=False."
                )


@dataclass
class Seq2SeqDistillationConfig(DistillationArguments, Seq2SeqTrainingArguments):
    """Arguments of `Seq2SeqDistillationTrainer`: those of `Seq2SeqTrainingArguments` and, on top, `DistillationArguments`.

    A teacher cache and the terms on routers and layers are for decoder-only models so far: their settings are refused.

    Attributes:
        model_init_kwargs: For `from_pretrained`, where the student is given by name; it is loaded in float32 unless `dtype`
            is among them.
        trust_remote_code: Whether code that comes with a checkpoint may run.

    Raises:
        ValueError: A value outside its range, or a setting that does not work here.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *Seq2SeqTrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "teacher_model_init_kwargs"
    ]  # fmt: skip

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained for a student given by name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether code that comes with a checkpoint may run."}
    )

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        self.check_loss()
        for name in ("teacher_logits_path", "precompute_teacher_logits"):
            if vars(self)[name]:
                raise ValueError(
                    f"{name}={vars(self)[name]}: a teacher cache knows a text by its input_ids, and in an encoder-decoder the "
                    "answers depend on the labels too. Leave it out, and give teacher_model."
                )
        for name in ("router_logits_weight", "hidden_states_weight"):
            if vars(self)[name]:
                raise ValueError(
                    f"{name}={vars(self)[name]}: this term is for decoder-only models so far, where it is known which layers to "
                    "compare. Set it to 0.0."
                )
        refuse_replaced(self)


def refuse_replaced(args: TrainingArguments) -> None:
    """Refuse the settings of any Trainer that the distillation loss would silently ignore.

    Args:
        args: Of the Trainer.

    Raises:
        ValueError: One of them is set.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} is not supported: the teacher's distribution "
            "is the smoothing. Set it to 0.0."
        )
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel=True replaces the forward that gives the logits. Leave it off; "
            "model_init_kwargs={'use_kernels': True} brings kernels for the layers."
        )
    if not args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices=False weighs a token by the process it falls on, so the gradient would "
            "depend on how the batch was cut. Leave it True."
        )


def as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """Keyword arguments, as `TrainingArguments` leaves them in a config that was built."""
    assert not isinstance(value, str), "TrainingArguments parses JSON text"
    return dict(value or {})


def _ends(weight: float | list[float] | str) -> tuple[float, float]:
    """Start and end of a weight that `schedule` has checked."""
    assert not isinstance(weight, str)
    return (weight[0], weight[1]) if isinstance(weight, list) else (weight, weight)


def schedule(name: str, weight: float | list[float] | str) -> float | list[float]:
    """One number, or `[start, end]`, from what YAML, JSON text or a command line made of it.

    Args:
        name: Of the setting, for the error.
        weight: What was given.

    Raises:
        ValueError: It is neither.
    """
    parsed = json.loads(weight) if isinstance(weight, str) else weight
    numbers = list(parsed) if isinstance(parsed, list | tuple) else [parsed]
    legal = all(isinstance(number, int | float) and 0.0 <= number < math.inf for number in numbers)
    if not legal or len(numbers) not in (1, 2):
        raise ValueError(
            f"{name}={weight!r} is neither a number of at least 0 nor two of them. Give one number, or [start, end] "
            "for a linear schedule over training."
        )
    return float(numbers[0]) if len(numbers) == 1 else [float(number) for number in numbers]
