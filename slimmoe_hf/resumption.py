"""Resume a `Trainer` run exactly, or not at all.

Three faults of the stock Trainer are closed here. It loads checkpoints by the names on disk, so that fused experts
silently keep their old weights (transformers #48805): `load_weights` goes through `from_pretrained`. It resumes from
checkpoints that were torn by a crash: `mark_complete` writes a mark last. It starts a fresh optimizer where the saved
one is missing: `require_complete` refuses.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from slimmoe_hf.atomic import PARTIAL, flush, write_text

SETTINGS = "settings.json"
"""What a run must have in common with the one that it continues; part of a checkpoint."""
MARK = "complete.json"
"""The file that vouches for a checkpoint: names and sizes of all others, written last."""


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Restore every weight of a model in place from a saved one, whatever the names on disk.

    The checkpoint is read by `from_pretrained` of the model's own class and copied over: parameters stay the same
    objects (an optimizer may hold them already), on their device, in their dtype. Needs a second copy of the model in
    CPU memory while it runs.

    Args:
        model: The model to fill.
        folder: A folder that `save_pretrained` or a Trainer wrote.

    Raises:
        ValueError: The folder holds no readable model, or tensors are missing, unexpected or of another shape, with
            their names. The model is unchanged then.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json, so no saved model. Name a folder that save_pretrained wrote.")
    targets = model.state_dict()
    # The widest dtype of the model: what was saved from it passes through unchanged.
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in targets.values() if t.is_floating_point()))
    try:
        loaded: Any = type(model).from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: the saved model cannot be read. {str(error).splitlines()[0]}") from error
    saved_model, report = loaded
    saved = saved_model.state_dict()
    faults = [
        *(f"{name} is missing" for name in sorted(report["missing_keys"])),
        *(f"{name} is unexpected" for name in sorted(report["unexpected_keys"])),
        *(f"{name} is {list(was)} there and {list(is_)} by its config" for name, was, is_ in report["mismatched_keys"]),
        *(f"{name} is unexpected" for name in saved if name not in targets),
        *_shape_faults(targets, saved),
        *_tie_faults(targets, saved),
    ]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise ValueError(f"{folder} does not hold the weights of this model: {'; '.join(faults[:5])}{more}.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(saved[name])


def _shape_faults(targets: dict[str, Tensor], saved: dict[str, Tensor]) -> list[str]:
    faults = [f"{name} is missing" for name in targets if name not in saved]
    for name, target in targets.items():
        if name in saved and saved[name].shape != target.shape:
            faults.append(f"{name} is {list(saved[name].shape)} there and {list(target.shape)} here")
    return faults


def _tie_faults(targets: dict[str, Tensor], saved: dict[str, Tensor]) -> list[str]:
    """Two names of one parameter that were two different tensors when saved."""
    faults: list[str] = []
    first_name: dict[tuple[int, torch.Size], str] = {}
    for name, target in targets.items():
        first = first_name.setdefault((target.data_ptr(), target.shape), name)
        if first in saved and name in saved and not _same(saved[first], saved[name]):
            faults.append(f"{name} and {first} are tied here and differ there")
    return faults


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def mark_complete(folder: str | Path) -> None:
    """Vouch for a checkpoint: flush its files to disk, then write their names and sizes under a temporary name, rename.

    Args:
        folder: A checkpoint that every process has finished writing.
    """
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    flush(folder)
    write_text(folder / MARK, json.dumps({"files": files}, indent=1, sort_keys=True))


def unmark(folder: str | Path) -> None:
    """Withdraw the mark before a checkpoint is written over: same names and sizes would pass for the old one."""
    (Path(folder) / MARK).unlink(missing_ok=True)


def is_complete(folder: str | Path) -> bool:
    """Whether a checkpoint is marked, every file it vouches for has its size, and training can go on from it."""
    return not _fault(Path(folder))


def require_complete(folder: str | Path) -> None:
    """Refuse a checkpoint that training cannot go on from.

    Raises:
        ValueError: It is torn (no mark, a file missing or of another size), or holds no optimizer state.
    """
    fault = _fault(Path(folder))
    if fault:
        raise ValueError(
            f"{folder} cannot be resumed from: {fault}. Name a complete checkpoint, or pass "
            "resume_from_checkpoint=True for the last complete one of output_dir."
        )


def require_same_settings(folder: str | Path, ours: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a run with other settings; one without a note of its settings is taken at its word.

    Args:
        folder: A complete checkpoint.
        ours: Name -> value of this run.

    Raises:
        ValueError: Some differ; the line says which and how.
    """
    try:
        theirs = json.loads((Path(folder) / SETTINGS).read_text())
    except FileNotFoundError:
        return
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if names:
        differing = "; ".join(
            f"{name} was {_shown(theirs.get(name))} and is {_shown(ours.get(name))}" for name in names
        )
        raise ValueError(
            f"{folder} cannot be resumed from: {differing}. Continue as it began, or start over in another output_dir."
        )


def _shown(value: Any) -> str:
    """Hashes are told apart by their beginnings."""
    return " ".join(f"{word[:12]}..." if len(word) == 64 else word for word in str(value).split())


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint of a run with the most steps, or None; torn ones are passed over."""
    return next((folder for folder in reversed(_checkpoints(Path(output_dir))) if is_complete(folder)), None)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MARK, PARTIAL + MARK))


def _checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run by number of steps."""
    found = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in output_dir.glob("*/")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def _fault(folder: Path) -> str:
    """Why a checkpoint cannot be resumed from; empty where it can."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / MARK).is_file():
        return f"it has no {MARK}, so its writing was cut short (or another program wrote it)"
    try:
        files: dict[str, int] = json.loads((folder / MARK).read_text())["files"]
    except (ValueError, KeyError, TypeError):
        return f"its {MARK} is damaged"
    for name, size in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes, not {size}"
    # `optimizer.pt`, FSDP's `optimizer.bin` or `optimizer_0/`, DeepSpeed's `global_step10/`
    if not any(name.startswith(("optimizer", "global_step")) for name in files):
        return "it holds no optimizer state (save_only_model=True writes none)"
    return ""


def _rotate(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest complete checkpoints beyond `limit`; `keep` stays, and torn ones are not counted."""
    if limit is None or limit <= 0:
        return
    complete = [folder for folder in _checkpoints(output_dir) if is_complete(folder)]
    spare = [folder for folder in complete if folder.resolve() not in keep]
    for folder in spare[: max(0, len(complete) - max(limit, len(keep)))]:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def states_as_saved(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have `load_state_dict` keep the dtype of every state within the block.

    torch casts states to the dtype of their weights: the float32 averages that Adafactor keeps of bfloat16 weights
    would come back rounded, and the resumed run would be another one.

    Args:
        optimizer: It may load its state once within the block.
    """
    saved: dict[str, Any] = {}

    def remember(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        saved.update(state_dict)

    def put_back(optimizer: torch.optim.Optimizer) -> None:
        names = [name for group in saved["param_groups"] for name in group["params"]]
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for name, weight in zip(names, weights, strict=True):
            loaded = optimizer.state.get(weight, {})
            for key, state in loaded.items():
                before = saved["state"][name][key]
                if isinstance(state, Tensor) and before.is_floating_point() and state.dtype != before.dtype:
                    loaded[key] = before.to(state.device)

    hooks = [
        optimizer.register_load_state_dict_pre_hook(remember),
        optimizer.register_load_state_dict_post_hook(put_back),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _require_same_sharding(folder: Path, fsdp: bool, deepspeed: bool) -> None:
    """Sharded weights and optimizers have files of their own; the Trainer passes over missing ones in silence."""
    for name, start, here in (("FSDP", FSDP_MODEL_NAME, fsdp), ("DeepSpeed", "global_step", deepspeed)):
        written_so = any(path.name.startswith(start) for path in folder.iterdir())
        if written_so != here:
            was, is_ = ("under", "is not") if written_so else ("without", "is")
            raise ValueError(
                f"{folder} cannot be resumed from: it was written {was} {name}, and this run {is_} under {name}. Continue "
                "as it began, or start over in another output_dir."
            )


class ResumableTrainer(Trainer):
    """A `Trainer` whose interrupted run ends with the same weights as one left alone (same machine, same threads).

    Checkpoints carry a mark that is written last; `train(resume_from_checkpoint=True)` takes the last complete one,
    and a named one must be complete. Every weight comes back, on resume and with `load_best_model_at_end`; so does the
    optimizer's state, in the dtype that it had. PEFT adapters, FSDP and DeepSpeed load their weights the stock way,
    strictly under FSDP; a checkpoint must have been written under the same of them, and elsewhere without. Settings
    without which it would be another run (`run_settings`) are noted in a checkpoint, and compared.
    """

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; arguments as `Trainer.train`.

        Raises:
            ValueError: There is no complete checkpoint to resume from, the named one is torn or without optimizer
                state, or it is of a model with other shapes or of a run with other settings.
        """
        folder: Path | None = None
        if resume_from_checkpoint is True:
            output_dir = Path(str(self.args.output_dir))
            folder = last_complete_checkpoint(output_dir)
            if folder is None:
                torn = [f"{path.name}: {_fault(path)}" for path in _checkpoints(output_dir)]
                raise ValueError(
                    f"{output_dir} holds no complete checkpoint ({'; '.join(torn) or 'none at all'}). "
                    "Start without resume_from_checkpoint."
                )
        elif resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            require_complete(folder)
        # The Trainer seeds in `__init__`: what ran since, such as a calibration that a second start can skip, would
        # decide the noise of the first steps.
        if folder is not None:
            _require_same_sharding(folder, self.is_fsdp_enabled, self.is_deepspeed_enabled)
            require_same_settings(folder, self.run_settings())
        self._forget_evaluation()
        set_seed(self.args.seed)
        return super().train(None if folder is None else str(folder), *args, **kwargs)

    def _forget_evaluation(self) -> None:
        """Have several processes train together after an `evaluate` that came first.

        It marks the bare model as prepared, for evaluation; `Accelerator.prepare` then leaves it without DDP, and each
        process would train a model of its own.
        """
        replicated = self.accelerator.use_distributed and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if replicated and vars(self.model).pop("_is_accelerate_prepared", False):
            self.accelerator._models.clear()

    def run_settings(self) -> dict[str, Any]:
        """What must be the same when a run is resumed, by a name that a message can use.

        The number of processes, and on a CPU that of threads: sums in another order end in other bits.
        """
        threads = {"number of threads": torch.get_num_threads()} if self.accelerator.device.type == "cpu" else {}
        return {**threads, "number of processes": self.accelerator.num_processes}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            unmark(folder)
        # Rotation has to wait for the mark: until then an older checkpoint may be the only complete one.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_text(folder / SETTINGS, json.dumps(self.run_settings(), indent=1))
            mark_complete(folder)
            best = self.state.best_model_checkpoint
            _rotate(output_dir, limit, {folder.resolve()} | ({Path(best).resolve()} if best else set()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self._model_to_fill(model)
        if target is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(target, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        inner = self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
        if checkpoint is None or not isinstance(inner, torch.optim.Optimizer):  # DeepSpeed's is none, and loads itself
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with states_as_saved(inner):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        target = self._model_to_fill(None)
        if target is None:
            super()._load_best_model()
        else:
            load_weights(target, str(self.state.best_model_checkpoint))

    def _model_to_fill(self, model: nn.Module | None) -> PreTrainedModel | None:
        """The model that `load_weights` can fill; None for adapters and for sharded models."""
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return target if isinstance(target, PreTrainedModel) and not sharded else None
