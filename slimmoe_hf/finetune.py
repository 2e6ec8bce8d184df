"""Fine-tune a model, all of it or a LoRA adapter, on one GPU: TRL's `SFTTrainer`, resumed exactly, measured before and after.

What comes out is an adapter for PEFT, or whole weights in the form that plain transformers and serving engines load, and
`finetune.json`, which says what was done to what, and what it brought.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from rich import get_console
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from slimmoe_hf.atomic import refuse_existing, replacing, write_text
from slimmoe_hf.command_inputs import open_checkpoint, same_request
from slimmoe_hf.data import dataset_hash
from slimmoe_hf.finetune_report import REPORT, Finetuned, HeldOut, versions
from slimmoe_hf.finetune_settings import (
    Adapter,
    check_auxiliary_loss,
    check_length,
    check_room,
    device_name,
    estimate,
    finetuning_arguments,
    held_dtype,
    optimizer_name,
)
from slimmoe_hf.loading import files_sha256, find_checkpoint, load_config, load_model, weights_sha256
from slimmoe_hf.losses import IGNORED
from slimmoe_hf.peak import PeakMemory
from slimmoe_hf.progress import TrainingProgress
from slimmoe_hf.resumption import ResumableTrainer, last_complete_checkpoint
from slimmoe_hf.sizing import own_dtype
from slimmoe_hf.student_training import save_checkpoint
from slimmoe_hf.token_sums import TokenEvaluation
from slimmoe_hf.tuning_data import TuningData, read_tuning_data, use_chat_template

_BEFORE = "before.json"
_HELD_OUT = ("validation", "test")


class FinetuningTrainer(ResumableTrainer, TokenEvaluation, SFTTrainer):
    """`SFTTrainer` whose interrupted run ends with the same weights as one left alone, fused experts included.

    The losses that it evaluates are means over the predicted tokens of the whole set, not means of batch means.
    """

    _tag_names = ["slimmoe_hf", "sft"]  # noqa: RUF012
    _tokens_metric = "tokens"

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluate one batch, and add it to the sums."""
        inputs = self._prepare_inputs(inputs)
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        assert found[0] is not None
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
        self._eval_sums.add(tokens=tokens, loss=found[0] * tokens)
        return found


class _Speed(TrainerCallback):
    """Tokens per second of every step of this call."""

    def __init__(self) -> None:
        self.per_step: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen, self._started = state.num_input_tokens_seen, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokens = state.num_input_tokens_seen - self._seen
        self.per_step.append(tokens / (time.perf_counter() - self._started))

    def median(self) -> float | None:
        """Over all steps but the first, which warms up."""
        return statistics.median(self.per_step[1:] or self.per_step) if self.per_step else None


@dataclass(frozen=True)
class _Job:
    """What is trained on what, checked.

    Attributes:
        folder: The model's. config, tokenizer: Its own. dtype: What its weights are held in.
        arguments: Of the Trainer. adapter: What is trained; None is all weights.
        data: What it reads.
    """

    folder: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    arguments: SFTConfig
    adapter: Adapter | None
    data: TuningData

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return Path(str(self.arguments.output_dir))


def finetune(
    model: str,
    data: str,
    output: str | Path,
    *,
    revision: str | None = None,
    data_revision: str | None = None,
    split: str = "train",
    adapter: Adapter | None = None,
    merge: bool = False,
    dtype: str | None = None,
    max_length: int = 1024,
    packing: bool = True,
    tokens: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    training: dict[str, Any] | None = None,
) -> Finetuned:
    """Fine-tune a model and save what was learned. A stopped run continues when the same call is made again.

    Chats (`messages`) have their loss on the assistant's tokens where the chat template says which those are, prompts on
    their completion, text everywhere. Text is cut into full rows; chats and prompts are laid whole into rows, where
    none sees another.

    Args:
        model: A folder or a Hub id, of a family in `FAMILIES`.
        data: A data spec.
        output: Where the result goes; checkpoints lie in `OUTPUT.checkpoints` until it is done.
        revision: A commit of a Hub model.
        data_revision: A commit of a Hub dataset.
        split: What to train on; see `read_tuning_data`.
        adapter: Train a LoRA adapter of this kind, in float32; None trains all weights.
        merge: Write whole weights, the adapter merged into them.
        dtype: What weights are held in, `float32` or `bfloat16`. None is float32, and with an adapter on a GPU what the
            checkpoint is stored in. Whole weights are saved in the checkpoint's dtype.
        max_length: T, tokens per row.
        packing: Fill the rows; otherwise one document a row.
        tokens: Train on documents up to so many tokens; None is all.
        seed: Of everything random.
        overwrite: Replace what is there, checkpoints included.
        training: Arguments of `SFTConfig`. Defaults that differ: `router_aux_loss_coef` is 0.0, `bf16` is on only on a GPU
            that has it, and the learning rate of adapters is `ADAPTER_LEARNING_RATE`.

    Returns:
        What was done, as in `finetune.json`.

    Raises:
        ValueError: Something will not do: one line that says what, and the remedy. Nothing has been written then.
    """
    output, training = Path(output).expanduser(), dict(training or {})
    if not overwrite:
        refuse_existing(output)
    if merge and adapter is None:
        raise ValueError("merge: there is no adapter to merge; all weights are trained, and written whole anyway.")
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    arguments = finetuning_arguments(training, str(checkpoints), max_length, packing, seed, adapter is not None)
    job, foreseen = _prepare(model, revision, adapter, dtype, arguments, (data, split, data_revision, tokens), training)
    base = weights_sha256(job.folder)
    same_request(checkpoints, {
        "model": base, "adapter": adapter.model_dump() if adapter else None, "dtype": job.dtype, "max_length": max_length,
        "data": [dataset_hash(rows) for rows in (job.data.train, job.data.validation, job.data.test)], "packing": packing,
        "seed": seed, "arguments": training, "template": job.tokenizer.chat_template,
    }, overwrite)  # fmt: skip
    started, speed = time.perf_counter(), _Speed()
    try:
        with PeakMemory(arguments.device) as peak:
            trainer, losses = _train(job, speed)
    except ValueError:
        if last_complete_checkpoint(checkpoints) is None:
            shutil.rmtree(checkpoints)
        raise
    whole: Any = trainer.model
    trained = sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad)
    with replacing(output, overwrite) as partial:
        sha256 = _save(
            trainer, job, partial, merge, (str(Path(model).resolve()) if Path(model).exists() else model, revision)
        )
        report = Finetuned(
            model=model, revision=revision, weights_sha256=base, output_sha256=sha256, adapter=adapter, merged=merge,
            data=data, data_revision=data_revision, split=split, documents=len(job.data.train), loss_on=job.data.loss_on,
            dtype=job.dtype, optim=optimizer_name(arguments), learning_rate=arguments.learning_rate, arguments=training,
            max_length=max_length, packing=packing, seed=seed, steps=trainer.state.global_step,
            tokens=trainer.state.num_input_tokens_seen, trained_parameters=trained, **losses,
            estimated_memory=foreseen, peak_memory=peak.bytes, tokens_per_second=speed.median(),
            seconds=time.perf_counter() - started, device=device_name(arguments), history=trainer.state.log_history,
            versions=versions(),
        )  # fmt: skip
        (partial / REPORT).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(checkpoints)
    return report


def _prepare(
    model: str,
    revision: str | None,
    adapter: Adapter | None,
    dtype: str | None,
    arguments: SFTConfig,
    source: tuple[str, str, str | None, int | None],
    given: dict[str, Any],
) -> tuple[_Job, int]:
    """Check everything, cheapest first, and say what it takes; also the estimate of memory in bytes."""
    data, split, data_revision, tokens = source
    config = load_config(find_checkpoint(model, revision, weights=False))
    if adapter is not None:
        adapter.lora_config(config)  # refuses what cannot be adapted
    check_auxiliary_loss(config, arguments)
    check_length(config, arguments)
    held = held_dtype(dtype, config, arguments, adapter is not None)
    foreseen = estimate(config, arguments, adapter, held)
    get_console().print(check_room(foreseen, arguments, adapter is not None, held), highlight=False, soft_wrap=True)
    folder, tokenizer = open_checkpoint(model, revision)
    if arguments.chat_template_path is not None:
        use_chat_template(tokenizer, arguments.chat_template_path)
    everything = given.get("assistant_only_loss") is False or given.get("completion_only_loss") is False
    read = read_tuning_data(data, tokenizer, split, data_revision, tokens, arguments.seed, everything)
    if read.column == "messages" and read.loss_on == "everything" and not everything:
        get_console().print(
            f"{data}: the chat template does not mark what the assistant says, so the loss is on every token",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return _Job(folder, config, tokenizer, held, _for_data(arguments, read, given), adapter, read), foreseen.total


def _for_data(arguments: SFTConfig, data: TuningData, given: dict[str, Any]) -> SFTConfig:
    """Add what follows from the data; text is cut anywhere, chats and prompts stay whole."""
    text = data.column == "text"
    follows = {
        "assistant_only_loss": data.loss_on == "assistant",
        "packing_strategy": "wrapped" if text else "bfd",
        "eval_packing": arguments.packing and text,
    }
    vars(arguments).update({key: value for key, value in follows.items() if key not in given})
    arguments.chat_template_path = None  # the tokenizer has it by now
    return arguments


def _train(job: _Job, speed: _Speed) -> tuple[FinetuningTrainer, dict[str, HeldOut]]:
    """Train from the last complete checkpoint, if there is one; losses by split."""
    arguments = job.arguments
    set_seed(arguments.seed)
    progress = TrainingProgress("finetune")
    trainer = FinetuningTrainer(
        model=load_model(job.folder, job.dtype, arguments.device, whole=True),
        args=arguments,
        train_dataset=job.data.train,
        eval_dataset=job.data.validation if arguments.eval_strategy != "no" else None,
        processing_class=job.tokenizer,
        peft_config=job.adapter.lora_config(job.config) if job.adapter else None,
        callbacks=[progress, speed],
    )
    trainer.remove_callback(PrinterCallback)
    rows: Any = trainer.train_dataset
    if all(label == IGNORED for row in rows for label in row["labels"]):
        raise ValueError(
            f"no document has a token to learn from among its first {arguments.max_length}. Raise --max-length."
        )
    before = _before(trainer, job)
    checkpoint = last_complete_checkpoint(job.checkpoints)
    if checkpoint is not None:
        get_console().log(f"finetune: continues from {checkpoint.name}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.stop()
    after = _measure(trainer, job)
    return trainer, {
        name: HeldOut(
            documents=len(vars(job.data)[name]), tokens=after[name][1], before=before[name][0], after=after[name][0]
        )
        for name in _HELD_OUT
    }


def _before(trainer: FinetuningTrainer, job: _Job) -> dict[str, tuple[float, int]]:
    """Losses of the model as it came; a continued run remembers them."""
    file = job.checkpoints / _BEFORE
    if not file.is_file():
        write_text(file, json.dumps(_measure(trainer, job)))
    return {name: (loss, tokens) for name, (loss, tokens) in json.loads(file.read_text()).items()}


def _measure(trainer: FinetuningTrainer, job: _Job) -> dict[str, tuple[float, int]]:
    """Loss and predicted tokens of every held-out split."""
    found = {}
    for name in _HELD_OUT:
        documents: Dataset = vars(job.data)[name]
        metrics = trainer.evaluate(documents, metric_key_prefix=name)
        found[name] = metrics.get(f"{name}_loss", math.nan), int(metrics[f"{name}_tokens"])
        if not found[name][1]:
            raise ValueError(
                f"{name}: no document has a token to measure among its first {job.arguments.max_length}. Raise "
                "--max-length, or bring more documents."
            )
    return found


def _save(trainer: FinetuningTrainer, job: _Job, folder: Path, merge: bool, named: tuple[str, str | None]) -> str:
    """Write the adapter or whole weights, with the tokenizer; their SHA-256."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel) and not merge:
        settings = model.peft_config[model.active_adapter]
        settings.base_model_name_or_path, settings.revision = named
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()  # PEFT's is a form to fill in
        job.tokenizer.save_pretrained(folder)
        return files_sha256([folder / SAFETENSORS_WEIGHTS_NAME])
    whole = model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model
    whole.config = job.config  # the trainer's says how to train
    save_checkpoint(whole, job.tokenizer, folder, str(own_dtype(job.config)).removeprefix("torch."))
    return weights_sha256(folder)
