"""What a run is going to do and what every step of it takes: memory, disk and time, before the first of them begins.

Memory is `slimmoe_hf.memory`'s estimate. Time is arithmetic over speed: the floating-point operations of the active
parameters (2 per token forward, 4 backward, 2 more where activations are computed again) and the bytes that move, over
what the machine does. On this machine the speed is measured on one matrix product; of others it is the data sheet's.
Of both, `EFFICIENCY` is assumed: time is a guess to plan by, not a promise.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedConfig
from transformers.training_args import OptimizerNames

from slimmoe_hf.arguments import DistillationConfig
from slimmoe_hf.cache_format import bytes_per_answer
from slimmoe_hf.criteria import check_criteria
from slimmoe_hf.defaults import CALIBRATION_LOSS, NO_LOSS
from slimmoe_hf.families import shape_of
from slimmoe_hf.free_memory import memory_bytes
from slimmoe_hf.launch import is_sharded, processes_of
from slimmoe_hf.loading import DEVICE_SHARE
from slimmoe_hf.machines import Machine
from slimmoe_hf.memory import Memory, Optimizer, Teacher, inference_memory, training_memory
from slimmoe_hf.preflight import Outline, Text, teacher_dtype, training_tokens
from slimmoe_hf.recipe import Recipe, Stage, TeacherCacheSpec
from slimmoe_hf.rundir import CACHE
from slimmoe_hf.scoring_memory import (
    reconstruction_memory,
    scoring_memory,
    streamed_answers_memory,
    streamed_scoring_memory,
)
from slimmoe_hf.search_check import MEASURED
from slimmoe_hf.sizing import Counts, parameter_counts
from slimmoe_hf.stage_search import CHECK_TOKENS, limits_of
from slimmoe_hf.steps import TEACHER, Step
from slimmoe_hf.streamed_answers import GROUP_SHARE, group_tokens

EFFICIENCY = 0.25
"""Share of a large matrix product's speed that a mixture of experts gets in training. Assumed."""
_READ, _WRITE = 1.5e9, 0.5e9  # bytes per second of a disk; assumed
_SHARDED = ("weights", "gradients", "optimizer", "teacher")  # what FSDP2 spreads over its processes


def outlook(recipe: Recipe, outline: Outline, machine: Machine, text: Text | None = None) -> list[Step]:
    """Every step of a run, in order.

    Args:
        recipe: The run.
        outline: Its configs and arguments.
        machine: Where it would be done.
        text: Its rows are counted; None where it has not been read.
    """
    return _Outlook(recipe, outline, machine, text).steps()


class _Outlook:
    """The steps of one run on one machine."""

    def __init__(self, recipe: Recipe, outline: Outline, machine: Machine, text: Text | None) -> None:
        self.recipe, self.outline, self.machine = recipe, outline, machine
        self.rows = len(text.train) if text is not None else 0
        self.test_tokens = text.test.tokens if text is not None else recipe.evaluation.tokens or 0
        self.on_cpu = machine.host is None
        self.dtype = getattr(torch, outline.dtype)
        self.computing = torch.float32 if self.on_cpu else self.dtype

    def steps(self) -> list[Step]:
        """All of them."""
        outline = self.outline
        found = []
        if outline.download:
            seconds = outline.download / 1e8
            found.append(
                Step(
                    "fetch",
                    f"{outline.download / 1e9:.1f} GB from the Hub, at 100 MB/s",
                    0,
                    0,
                    outline.download,
                    seconds,
                )
            )
        teacher = (TEACHER, outline.teacher_config)
        found.append(self._stream_loss(*teacher) if self.recipe.streams_teacher else self._evaluate(*teacher))
        if self.recipe.teacher_cache is not None:
            found.append(self._ask_teacher(self.recipe.teacher_cache))
        config = outline.config
        for number, (stage, after) in enumerate(zip(self.recipe.stages, outline.after, strict=True), 1):
            arguments = outline.arguments[number - 1]
            found.append(self._score(number, stage, config))
            if stage.target.searched:
                found.append(self._search(number, stage, config, after))
            elif stage.calibration.reconstruct and stage.target.asks["neurons"]:
                found.append(self._reconstruct(number, stage, config, after))
            found.append(self._slim(number, stage, config, after))
            found.append(self._evaluate(f"stage-{number}/slimmed/evaluate", after))
            found.append(self._distil(number, stage, after, arguments))
            found.append(self._evaluate(f"stage-{number}/distilled/evaluate", after))
            config = after
        if tasks := self.recipe.evaluation.tasks:
            whose = "last model" if self.recipe.streams_teacher else "teacher and last model"
            found.append(Step("tasks", f"{', '.join(tasks)}, {whose}; time not estimated", 0, 0, 0, 0))
        size = parameter_counts(config).bytes(self.dtype)
        found.append(Step("publish", "copy the last stage's model", 0, 0, size, size / _WRITE))
        return found

    def _seconds(self, operations: float, on_host: bool = False) -> float:
        return operations / ((self.machine.host_flops if on_host else self.machine.flops) * EFFICIENCY)

    def _held(self, memory: Memory, on_host: bool) -> tuple[int, int]:
        """Bytes on the device and on the host."""
        if self.on_cpu:
            return memory.total + memory.host, 0
        return (0, memory.total + memory.host) if on_host else (memory.total, memory.host)

    def _score(self, number: int, stage: Stage, config: PreTrainedConfig) -> Step:
        calibration, length = stage.calibration, self.recipe.data.max_length
        dtype, on_host = getattr(torch, calibration.dtype), calibration.device == "cpu"
        differentiated = stage.loss != NO_LOSS
        sizes = {"batch": calibration.batch_size, "length": length, "dtype": dtype, "gradients": differentiated}
        memory = scoring_memory(config, **sizes)
        # Five sums per neuron, or two without gradients, and two norms.
        sums = memory.parts["statistics"] * 7 // 5 if differentiated else memory.parts["statistics"] * 2
        asks = stage.target.asks
        of_experts = check_criteria(stage.criterion, stage.expert_criterion, **asks)
        chosen = [stage.criterion] * asks["neurons"] + [of_experts] * asks["experts"]
        criteria = ", ".join(dict.fromkeys(chosen))
        what = f"{calibration.tokens:,} tokens, {criteria}, {stage.loss}, {calibration.dtype}"
        operations = (4 if differentiated else 2) * _active(config) * calibration.tokens
        reading, passing = 0.0, 0
        teacher = self.outline.teacher_config
        separate = stage.loss == CALIBRATION_LOSS and (number > 1 or self.recipe.teacher is not None)
        if separate:
            operations += 2 * _active(teacher) * calibration.tokens
        if calibration.stream:
            held = [self._held(streamed_scoring_memory(config, stored=self.dtype, **sizes), on_host)]
            if differentiated:
                operations += 2 * _active(config) * calibration.tokens  # every layer is run once more on the way back
            reading = (1 + differentiated) * parameter_counts(config).bytes(self.dtype) / _READ
            files = config.num_hidden_layers + 2 if differentiated else 2
            passing = calibration.tokens * config.hidden_size * dtype.itemsize * files
            if separate:
                asking = {"batch": calibration.batch_size, "length": length, "dtype": dtype, "stored": self.dtype}
                held.append(self._held(streamed_answers_memory(teacher, **asking), on_host))
                reading += parameter_counts(teacher).bytes(self.dtype) / _READ
            what += f", a layer at a time; meanwhile {passing / 1e9:.1f} GB on the disk"
            device_bytes, host_bytes = (max(each) for each in zip(*held, strict=True))
        else:
            device_bytes, host_bytes = self._held(memory, on_host)
            weights = parameter_counts(teacher).bytes(dtype) if separate else 0
            device_bytes += 0 if on_host else weights
            host_bytes += weights if on_host else 0
        where = " on the host's CPU" if on_host and not self.on_cpu else ""
        seconds = self._seconds(operations, on_host) + reading
        key = f"stages.{number - 1}.calibration"
        return Step(f"stage-{number}/score", what + where, device_bytes, host_bytes, sums, seconds, key, passing)

    def _reconstruct(self, number: int, stage: Stage, config: PreTrainedConfig, after: PreTrainedConfig) -> Step:
        """A plan that carries weights; one that does not takes no time worth telling."""
        calibration, before, kept = stage.calibration, shape_of(config), shape_of(after)
        dtype, on_host = getattr(torch, calibration.dtype), calibration.device == "cpu"
        memory = reconstruction_memory(
            config, after, tokens=calibration.tokens, batch=calibration.batch_size, length=self.recipe.data.max_length,
            dtype=dtype, stored=self.dtype, streamed=calibration.stream,
        )  # fmt: skip
        width, hidden = kept.expert_width, kept.hidden_size
        sums = before.top_k * calibration.tokens * 2 * width * (width + hidden)
        solutions = kept.num_experts * width**2 * (width / 3 + 2 * hidden)
        # The text passes once, its experts are run once more, and float64 is half as fast.
        operations = 4 * _active(config) * calibration.tokens + 2 * before.layers * (sums + solutions)
        attention = kept.query_heads * kept.head_width if kept.query_heads < before.query_heads else 0
        carried = before.layers * (kept.num_experts * width + attention) * hidden * self.dtype.itemsize
        what = f"output projections solved anew on {calibration.tokens:,} tokens"
        reading, passing = 0.0, 0
        if calibration.stream:
            # What is solved is hashed, then copied from the work to the plan.
            reading = (parameter_counts(config).bytes(self.dtype) + 2 * carried) / _READ + 2 * carried / _WRITE
            passing = 2 * calibration.tokens * hidden * dtype.itemsize + carried
            what += f", a layer at a time; meanwhile {passing / 1e9:.1f} GB on the disk"
        device_bytes, host_bytes = self._held(memory, on_host)
        seconds, key = self._seconds(operations, on_host) + reading, f"stages.{number - 1}.calibration"
        return Step(f"stage-{number}/plan", what, device_bytes, host_bytes, carried, seconds, key, passing)

    def _search(self, number: int, stage: Stage, config: PreTrainedConfig, after: PreTrainedConfig) -> Step:
        """A plan whose shape is measured: the model, what a cut puts in its place, and logits are in memory together."""
        calibration, length = stage.calibration, self.recipe.data.max_length
        name, key, disk = f"stage-{number}/plan", f"stages.{number - 1}.calibration", 0
        solving = self._reconstruct(number, stage, config, after) if calibration.reconstruct else None
        if calibration.stream:
            what = "shape chosen by prediction, none is measured"
            return replace(solving, what=f"{what}; {solving.what}") if solving else Step(name, what, 0, 0, 0, 0, key)
        dtype, on_host = getattr(torch, calibration.dtype), calibration.device == "cpu"
        tokens = min(CHECK_TOKENS, self.recipe.data.validation_tokens or CHECK_TOKENS)
        memory = inference_memory(config, batch=calibration.batch_size, length=length, dtype=dtype)
        logits = (calibration.batch_size * dtype.itemsize + 4) * length * config.vocab_size
        cut = parameter_counts(after).bytes(dtype)
        memory = memory.model_copy(update={"parts": memory.parts | {"logits": logits, "cut": cut}})
        device_bytes, host_bytes = self._held(memory, on_host)
        seconds = self._seconds(2 * _active(config) * tokens, on_host)
        what = f"at most {MEASURED} shapes within the budget measured on {tokens:,} validation tokens"
        if solving is not None:
            seconds, disk = 2 * seconds + solving.seconds, solving.disk
            device_bytes, host_bytes = max(device_bytes, solving.memory), max(host_bytes, solving.host)
            what += f", output projections solved anew on {calibration.tokens:,} tokens"
        return Step(name, what, device_bytes, host_bytes, disk, MEASURED * seconds, key)

    def _slim(self, number: int, stage: Stage, before: PreTrainedConfig, after: PreTrainedConfig) -> Step:
        read, written = parameter_counts(before).bytes(self.dtype), parameter_counts(after)
        size = written.bytes(self.dtype)
        what = f"{stage.target}: {written.total:,} parameters, {written.active:,} active"
        if stage.target.searched:
            most = zip(limits_of(before, stage.target), ("parameters", "active ones"), strict=True)
            said = " and ".join(f"{limit:,} {name}" for limit, name in most if limit is not None)
            kept = shape_of(after)
            what = (
                f"shape chosen at run time, at most {said}; what is said from here on is of {kept.num_experts} experts of width "
                f"{kept.expert_width}"
            )
        return Step(f"stage-{number}/slim", what, 0, 10**9, size, max(read / _READ, 0) + size / _WRITE)

    def _evaluate(self, name: str, config: PreTrainedConfig) -> Step:
        rows, length, what = self._evaluation()
        # `measure_loss` keeps all logits of a batch, and one row of them in float32.
        logits = (rows * self.computing.itemsize + 4) * length * self.outline.config.vocab_size
        return self._read(name, what, config, self.test_tokens, (rows, length), "evaluation.batch_size", logits)

    def _stream_loss(self, name: str, config: PreTrainedConfig) -> Step:
        rows, length, what = self._evaluation()
        memory = streamed_answers_memory(config, batch=rows, length=length, dtype=self.computing, stored=self.dtype)
        passing = 2 * self.test_tokens * config.hidden_size * self.computing.itemsize
        reading = parameter_counts(config).bytes(self.dtype) / _READ
        seconds = max(self._seconds(2 * _active(config) * self.test_tokens), reading)
        what += f", a layer at a time; meanwhile {passing / 1e9:.1f} GB on the disk"
        return Step(name, what, *self._held(memory, on_host=False), 0, seconds, "evaluation.batch_size", passing)

    def _evaluation(self) -> tuple[int, int, str]:
        """Rows at a time, tokens of each, and what is measured."""
        evaluation = self.recipe.evaluation
        what = f"loss on {self.test_tokens:,} tokens" if self.test_tokens else "loss on the whole split"
        return evaluation.batch_size, evaluation.max_length or self.recipe.data.max_length, what

    def _ask_teacher(self, asked: TeacherCacheSpec) -> Step:
        config, length = self.outline.teacher_config, self.recipe.data.max_length
        tokens = self.rows * length if self.rows else self.recipe.data.tokens or 0
        served = {1.0, *(arguments.temperature for arguments in self.outline.arguments)}
        size = bytes_per_answer(config.vocab_size, asked.top_k, asked.kind, config.hidden_size, len(served))
        what = f"the teacher's answers to {tokens:,} tokens" if tokens else "the teacher's answers to the whole text"
        key = "teacher_cache.batch_size"
        if not asked.stream:
            step = self._read(CACHE, what, config, tokens, (asked.batch_size, length), key)
            return replace(step, disk=tokens * size)
        memory = streamed_answers_memory(
            config, batch=asked.batch_size, length=length, dtype=self.computing, stored=self.dtype,
            device="cpu" if self.on_cpu else "cuda",
        )  # fmt: skip
        room = int((self.machine.memory if self.machine.host is None else self.machine.host) * GROUP_SHARE)
        if asked.stream_memory is not None:
            room = memory_bytes(asked.stream_memory)
        passes = -(-tokens // max(1, group_tokens(room, config.hidden_size, self.computing)))
        reading = passes * parameter_counts(config).bytes(self.dtype) / _READ
        seconds = max(self._seconds(2 * _active(config) * tokens), reading)
        what += f", a layer at a time, {passes} times over its weights"
        on_device, on_host = self._held(memory, on_host=False)
        # Where nobody says how much, no more than half of the free disk is taken.
        passing = min(room, tokens * 2 * config.hidden_size * self.computing.itemsize) if asked.stream_memory else 0
        return Step(CACHE, what, on_device, on_host, tokens * size, seconds, key, passing)

    def _read(
        self,
        name: str,
        what: str,
        config: PreTrainedConfig,
        tokens: int,
        batch: tuple[int, int],
        key: str,
        more: int = 0,
    ) -> Step:
        """A model reads text once; weights that do not fit wait on the host and come over for every batch."""
        rows, length = batch
        memory = inference_memory(config, batch=rows, length=length, dtype=self.computing)
        weights, room = memory.parts["weights"], int(self.machine.memory * DEVICE_SHARE)
        waiting = 0 if self.on_cpu else max(weights - room, 0)  # as `load_model` spreads it
        what += f"; {waiting / 1e9:.0f} GB of weights wait on the host" if waiting else ""
        passes = -(-tokens // (rows * length))
        seconds = self._seconds(2 * _active(config) * tokens) + passes * waiting / self.machine.transfer
        return Step(name, what, memory.total + more - waiting, waiting, 0, seconds, key)

    def _distil(self, number: int, stage: Stage, student: PreTrainedConfig, arguments: DistillationConfig) -> Step:
        teacher, length, rows = self.outline.teacher_config, self.recipe.data.max_length, arguments.train_batch_size
        processes = processes_of(self.recipe)
        memory = self._training_memory(stage, student, arguments)
        parts = dict(memory.parts)
        if processes > 1 and is_sharded(self.recipe):
            parts |= {name: parts[name] // processes for name in _SHARDED if name in parts}
        resident = waiting = 0
        if memory.host and self.recipe.teacher_memory is not None:
            resident = min(memory_bytes(self.recipe.teacher_memory), memory.host)
            waiting = memory.host - resident
        if self.recipe.teacher_cache is not None and self.recipe.teacher_cache.kind == "hidden":
            resident = teacher.vocab_size * teacher.hidden_size * self.dtype.itemsize  # the head that they belong to
        tokens = training_tokens(arguments, self.rows, processes)
        per_token = (8 if arguments.gradient_checkpointing else 6) * _active(student)
        per_token += 0 if self.recipe.teacher_cache else 2 * _active(teacher)
        batches = tokens / (rows * length * processes)
        seconds = self._seconds(per_token * tokens / processes) + batches * waiting / self.machine.transfer
        what = f"{tokens:,} tokens, {OptimizerNames(arguments.optim).value}, {stage.training_dtype} weights"
        what += f"; {waiting / 1e9:.0f} GB of the teacher wait on the host" if waiting else ""
        what += f"; on each of {processes} processes" if processes > 1 else ""
        kept = (arguments.save_total_limit or 1) * (arguments.save_strategy != "no")
        checkpoint = memory.parts["weights"] + memory.parts["optimizer"]
        disk = parameter_counts(student).bytes(self.dtype) + kept * checkpoint
        key = f"stages.{number - 1}.distillation.per_device_train_batch_size"
        return Step(f"stage-{number}/distil", what, sum(parts.values()) + resident, waiting, disk, seconds, key)

    def _training_memory(self, stage: Stage, student: PreTrainedConfig, arguments: DistillationConfig) -> Memory:
        """Of one process, before anything is sharded."""
        where: Teacher = "offloaded" if self.recipe.teacher_memory is not None and not self.on_cpu else "live"
        if self.recipe.teacher_cache is not None:
            where = "cached"
        return training_memory(
            student, optimizer=optimizer_of(str(OptimizerNames(arguments.optim).value), stage.training_dtype),
            weights_dtype=getattr(torch, stage.training_dtype), batch=arguments.train_batch_size,
            length=self.recipe.data.max_length, gradient_checkpointing=arguments.gradient_checkpointing,
            accumulate=arguments.gradient_accumulation_steps > 1, autocast=self._autocast(stage, arguments),
            teacher=where, teacher_config=self.outline.teacher_config,
            teacher_dtype=getattr(torch, teacher_dtype(stage, self.machine.host is None, self.outline.dtype)),
            loss=arguments.divergence(),
            crossentropy=any(arguments.weights_at(at)[1] > 0 for at in (0.0, 1.0)),
        )  # fmt: skip

    def _autocast(self, stage: Stage, arguments: DistillationConfig) -> bool:
        """Whether computing is in bfloat16 there; where the recipe does not say, `DistillationConfig` goes by the machine."""
        if {"bf16", "fp16"} & stage.distillation.keys():
            return bool(stage.distillation.get("bf16") or stage.distillation.get("fp16"))
        return self.machine.host is not None


def optimizer_of(name: str, dtype: str) -> Optimizer:
    """Which of the optimizers that `slimmoe_hf.memory` knows is nearest, never above, what Trainer's `optim` needs."""
    name = name.lower()
    if "8bit" in name or "4bit" in name:
        return "adamw_8bit"
    if "adamw" in name:
        return "adamw" if dtype == "float32" else "adamw_bf16"
    return "adafactor"  # next to no state: a lower bound for any other


def _active(config: PreTrainedConfig) -> int:
    """Parameters that a token is multiplied with."""
    counts: Counts = parameter_counts(config)
    return counts.active_without_lookup
