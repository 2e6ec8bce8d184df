"""`SlimmingCallback`: cut a model inside any `Trainer`, at the last moment before an optimizer exists."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig

from slimmoe_hf.arguments import DistillationConfig
from slimmoe_hf.calibration import collect_stats
from slimmoe_hf.criteria import calibration_loss, check_criteria
from slimmoe_hf.data import batches, dataset_hash, tokenize, tokenize_pairs
from slimmoe_hf.defaults import CRITERION, NO_LOSS, reconstructs
from slimmoe_hf.disk import auto_class
from slimmoe_hf.factored import refuse_own_form
from slimmoe_hf.families import shape_of
from slimmoe_hf.identity import model_sha256
from slimmoe_hf.plan import CompressionPlan, Target, make_plan, validate_target
from slimmoe_hf.reconstruction import reconstruct
from slimmoe_hf.resumption import load_weights, mark_complete, require_complete
from slimmoe_hf.surgery import apply_plan, check_fits

logger = logging.getLogger(__name__)
PLAN_FOLDER = "plan"


class SlimmingCallback(TrainerCallback):
    """Score, plan and cut the model in place in `on_init_end`; then training is an ordinary run of the slimmed model.

    The plan is written to `output_dir/plan`. A run that is started again applies that one instead of scoring again,
    after checking that the request has not changed. Checkpoints are marked when complete, and a resumed plain `Trainer`
    gets every weight back, fused experts and routers included, which it would not on its own.

    The model is scored in the dtype it is in; float32 is the exact choice.

    Args:
        target: What to cut to. Leave out when `plan` is given.
        criterion: A name in `CRITERIA`; where only experts are dropped, of `expert_criterion`'s.
        calibration_dataset: Text to score with: any TRL format (`text`, `messages`, `prompt` + `completion`), or
            already tokenised (`input_ids`). Keep it apart from the training data.
        loss: `kd_topk` (the paper's) or `lm`, for criteria of gradients; `none` takes one forward pass. Default: `none` where
            the criteria look at no gradients, else `kd_topk`.
        teacher_model: For `kd_topk`: a model, or its path or id. Default: the model itself before the cut, which is
            the paper's first stage.
        plan: A plan made elsewhere, or its folder; nothing is scored then.
        max_length: Tokens per calibration row. Default: the trainer's `max_length`, or 1024 where it has none.
        batch_size: Calibration rows per forward pass, per process.
        seed: For `criterion="random"`.
        expert_criterion: What chooses the experts that stay, where the target drops some: a name in
            `slimmoe_hf.criteria.EXPERT_CRITERIA`. Default: `criterion`, or `reap` where that one scores no experts.
        reconstruct: Solve the output projections of what stays anew, on the calibration text; see
            `slimmoe_hf.reconstruction.reconstruct`. The plan in `output_dir` then holds these weights too. Done unless
            False (`slimmoe_hf.defaults.RECONSTRUCT`); a given plan is taken as it is.

    Raises:
        ValueError: From the trainer's `__init__`: a target the model cannot take, a changed request, or a model that
            cannot be cut as it is (PEFT-wrapped, sharded, offloaded, quantised, on the meta device); from `train()`:
            the model was rebuilt after the cut, or the optimizer does not hold its parameters.

    Example:
        ```python
        callback = SlimmingCallback(Target(expert_width=512), calibration_dataset=dataset.select(range(512)))
        trainer = Trainer(model, args, train_dataset=tokenised, processing_class=tokenizer, callbacks=[callback])
        trainer.train()
        ```
    """

    def __init__(
        self,
        target: Target | None = None,
        criterion: str = CRITERION,
        calibration_dataset: Dataset | None = None,
        *,
        loss: str | None = None,
        teacher_model: str | Path | PreTrainedModel | None = None,
        plan: CompressionPlan | str | Path | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        expert_criterion: str | None = None,
        reconstruct: bool | None = None,
    ) -> None:
        if (target is None) == (plan is None):
            raise ValueError("SlimmingCallback needs either target= (and calibration_dataset=) or plan=, and not both.")
        if target is not None and calibration_dataset is None:
            raise ValueError(
                "SlimmingCallback(target=...) needs calibration_dataset=, the text to score the model with."
            )
        if plan is not None and reconstruct:
            raise ValueError(
                "SlimmingCallback(plan=...) takes the plan as it is. Reconstruct it first, with reconstruct(model, batches, "
                "plan), or give target= and calibration_dataset=."
            )
        if target is not None:
            check_criteria(criterion, expert_criterion, **target.asks)
        self.target, self.criterion, self.dataset = target, criterion, calibration_dataset
        self.loss = calibration_loss(loss, criterion, expert_criterion)
        self.expert_criterion, self.reconstruct = expert_criterion, reconstructs(reconstruct)
        self.teacher_model, self.max_length, self.batch_size, self.seed = teacher_model, max_length, batch_size, seed
        self.given = CompressionPlan.load(plan) if isinstance(plan, (str, Path)) else plan
        self.plan: CompressionPlan | None = None
        self._pushing = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Cut the model; no optimizer exists yet."""
        model, folder = kwargs["model"], Path(str(args.output_dir)) / PLAN_FOLDER
        refuse_what_cannot_be_cut(model)
        rank_zero = _rank() == 0
        found = _from_rank_zero((folder / "plan.json").is_file() if rank_zero else None)
        if self.given is not None:
            self.plan = self.given
            self._compare_given(CompressionPlan.load(folder) if found else None, folder)
        else:
            rows = self._calibration_rows(args, kwargs.get("processing_class"), model.config.is_encoder_decoder)
            stored = CompressionPlan.load(folder) if found else None
            self.plan = self._stored_or_new(model, rows, stored, folder)
        if shape_of(model.config) == self.plan.meta.after and self.plan.meta.before != self.plan.meta.after:
            logger.info("The model already has the plan's sizes: left alone.")
        else:
            if self.given is not None:
                self._check_model(model, self.given)
            apply_plan(model, self.plan)
        if rank_zero and not found:
            self.plan.save(folder)
        _barrier()
        if (folder / "plan.json").is_file():  # not on a machine that does not share the folder
            self.plan = CompressionPlan.load(folder)  # whose repairs, as large as the weights, stay in their file

    def _compare_given(self, stored: CompressionPlan | None, folder: Path) -> None:
        if stored is not None and self.given is not None and stored.sha256 != self.given.sha256:
            raise ValueError(
                f"{folder} holds another plan ({stored.sha256[:12]}) than plan= ({self.given.sha256[:12]}). "
                "Use another output_dir, or delete the folder to start over."
            )

    def _check_model(self, model: PreTrainedModel, plan: CompressionPlan) -> None:
        """A plan is made of one model's weights; on another it would cut at random."""
        check_fits(model, plan)
        have = model_sha256(model)
        if plan.meta.model_sha256 != have:
            raise ValueError(
                f"the plan was made for a model with the weights {plan.meta.model_sha256[:12]}; this one has {have[:12]}. "
                "Pass the model that was scored, or score this one."
            )

    def _calibration_rows(self, args: TrainingArguments, tokenizer: Any, pairs: bool) -> Dataset:
        dataset = self.dataset
        assert dataset is not None
        if "input_ids" in dataset.column_names:
            return dataset
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError("calibration_dataset is raw text: pass the tokenizer to the Trainer as processing_class=.")
        length = self.max_length or (args.max_length if isinstance(args, SFTConfig) else None) or 1024
        return tokenize_pairs(dataset, tokenizer, length) if pairs else tokenize(dataset, tokenizer, length)

    def _request(self, rows: Dataset, pairs: bool) -> dict[str, Any]:
        """What was asked for, as far as it decides the plan; the model is compared by its weights' hash."""
        teacher = self.teacher_model
        name = model_sha256(teacher) if isinstance(teacher, PreTrainedModel) else teacher and str(teacher)
        assert self.target is not None
        forward = (
            calibration_loss(None, self.criterion, self.expert_criterion) == NO_LOSS
        )  # whatever was differentiated
        return {
            "target": self.target.model_dump(exclude_none=True),
            "criterion": self.criterion,
            "expert_criterion": self.expert_criterion,
            **({} if forward else {"loss": self.loss}),
            "seed": self.seed,
            "reconstruct": self.reconstruct,
            "teacher_model": name,
            "calibration data": dataset_hash(rows),
            **({"calibration answers": dataset_hash({"input_ids": row} for row in rows["labels"])} if pairs else {}),
        }

    def _stored_or_new(
        self, model: PreTrainedModel, rows: Dataset, stored: CompressionPlan | None, folder: Path
    ) -> CompressionPlan:
        request = self._request(rows, model.config.is_encoder_decoder)
        if stored is None:
            return self._score(model, rows, request)
        before = {"reconstruct": False, **(stored.meta.request or {})}  # which older versions did not have
        before["target"] = stored.meta.target.model_dump(exclude_none=True)  # whatever sizes a version knew of
        changed = [
            f"{key}: {before.get(key)!r} -> {value!r}" for key, value in request.items() if before.get(key) != value
        ]
        if shape_of(model.config) == stored.meta.before and (have := model_sha256(model)) != stored.meta.model_sha256:
            changed.append(f"model weights: {stored.meta.model_sha256[:12]} -> {have[:12]}")
        if changed:
            raise ValueError(
                f"{folder} holds a plan for another request; changed: {'; '.join(changed)}. "
                "Ask for the same again, use another output_dir, or delete the folder to start over."
            )
        logger.info("Applying the plan found in %s instead of scoring again.", folder)
        return stored

    def _score(self, model: PreTrainedModel, rows: Dataset, request: dict[str, Any]) -> CompressionPlan:
        assert self.target is not None
        validate_target(model.config, self.target)
        teacher = self.teacher_model if self.loss != NO_LOSS else None
        if isinstance(teacher, (str, Path)):
            loaded: Any = auto_class(model.config).from_pretrained(teacher, dtype=model.dtype)
            teacher = loaded.to(model.device).eval()
        share = batches(rows, self.batch_size, model.config.pad_token_id or 0)[_rank() :: _world()]
        stats = collect_stats(model, share, self.loss, teacher, progress=_rank() == 0)
        plan = make_plan(stats, self.target, self.criterion, self.seed, self.expert_criterion)
        if self.reconstruct:
            plan = reconstruct(model, share, plan, progress=_rank() == 0)
        return plan.with_request(request)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that what is about to be trained is the model that was cut, whole after a resume."""
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        assert self.plan is not None
        have, want = shape_of(model.config), self.plan.meta.after
        if have != want:
            sizes = [
                f"{name}={vars(have)[name]} where the plan says {vars(want)[name]}" for name in Target.model_fields
            ]
            raise ValueError(
                f"the model about to be trained has {', '.join(sizes)}: it was rebuilt after the cut. Pass model= instead of "
                "model_init=, or call apply_plan inside model_init and drop the callback."
            )
        if args.fsdp or args.deepspeed:
            return
        if state.global_step > 0 and not isinstance(args, DistillationConfig):
            self._restore(model, Path(str(args.output_dir)), state.global_step)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
        lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
        if optimizer is not None and lost:
            raise ValueError(
                f"the optimizer does not hold {len(lost)} of the slimmed model's parameters ({lost[0]}, ...): it was made "
                "before the cut. Let the Trainer make it, or apply_plan first and pass both."
            )

    def _restore(self, model: PreTrainedModel, output_dir: Path, step: int) -> None:
        """A plain Trainer resumes without the fused experts and PhiMoE's router, and only warns: load them here."""
        checkpoint = output_dir / f"checkpoint-{step}"
        if not checkpoint.is_dir():
            raise ValueError(
                f"resumed at step {step}, but {checkpoint} is not there, and a plain Trainer does not restore fused experts "
                "from elsewhere. Resume from output_dir, or use DistillationTrainer."
            )
        require_complete(checkpoint)
        load_weights(model, checkpoint)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Vouch for the checkpoint just written, which a plain Trainer does not: a torn one is never resumed from."""
        _barrier()
        if _rank() == 0 and not isinstance(args, DistillationConfig):
            mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have a plain Trainer push a model that generates with a cache, and a card that says by its tags what it is.

        More cannot be had from here: its training arguments go along as a pickle, and the card is its own. `slimmoe push`
        brings the same folder without the one and with a better other.
        """
        model = kwargs["model"]
        model.add_model_tags(["moe", "pruning", "slimmoe"])
        model.config.use_cache = self._pushing = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on training as before a push in between: without a cache."""
        if self._pushing:
            kwargs["model"].config.use_cache, self._pushing = args.use_cache, False


def refuse_what_cannot_be_cut(model: Any) -> None:
    """Raise ValueError, with the way out, for a model whose weights are not whole and here.

    Args:
        model: What a Trainer was given.
    """
    if isinstance(model, PeftModel):
        raise ValueError("a PEFT-wrapped model cannot be cut: slim first, then pass peft_config= to a second run.")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"SlimmingCallback cuts transformers models; this is a {type(model).__name__}.")
    if getattr(model, "is_quantized", False):
        raise ValueError("a quantised model cannot be cut: load it in bfloat16 or float32, slim, then quantise.")
    refuse_own_form(model)
    parameters = list(model.parameters())
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in parameters):
        raise ValueError(
            "a sharded model cannot be cut: load it whole on every process; FSDP2 may shard it afterwards."
        )
    placed = set((getattr(model, "hf_device_map", None) or {}).values())
    if placed & {"cpu", "disk"} and len(placed) > 1:
        raise ValueError("a model offloaded by device_map cannot be cut: load it whole, or cut its checkpoint on disk.")
    if any(p.is_meta for p in parameters):
        raise ValueError("a model on the meta device has no weights to cut: load them first, on every process.")


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _world() -> int:
    return torch.distributed.get_world_size() if _distributed() else 1


def _barrier() -> None:
    if _distributed():
        torch.distributed.barrier()


def _from_rank_zero(value: Any) -> Any:
    """Tell every process what rank 0 knows."""
    box = [value]
    if _distributed():
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
