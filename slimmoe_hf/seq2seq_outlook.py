"""What every step of a recipe for an encoder-decoder takes, as `outlook` says it of a decoder's.

Memory is that of weights, gradients and optimizer; activations are not counted.
"""

from __future__ import annotations

import torch
from transformers.training_args import OptimizerNames

from slimmoe_hf.arguments import Seq2SeqDistillationConfig
from slimmoe_hf.machines import Machine
from slimmoe_hf.outlook import EFFICIENCY, optimizer_of
from slimmoe_hf.preflight import is_remote
from slimmoe_hf.seq2seq_preflight import PairOutline, PairText
from slimmoe_hf.seq2seq_recipe import Factor, Seq2SeqRecipe, Seq2SeqStage
from slimmoe_hf.steps import Step

_STATES = {"adamw": 8, "adamw_8bit": 2}
"""Bytes that an optimizer holds of a parameter; next to none of the others."""
_FLOAT32 = 4
_GENERATING = 3  # passes over the test pairs that generating takes, the loss among them; a guess


def pair_steps(recipe: Seq2SeqRecipe, found: PairOutline, machine: Machine, text: PairText | None) -> list[Step]:
    """What a run is going to do, step by step.

    Args:
        recipe: What is asked for.
        found: From `outline_pairs`.
        machine: Where.
        text: The pairs, counted; None where they have not been read.
    """
    return _PairOutlook(recipe, found, machine, text).steps()


class _PairOutlook:
    """The steps of one run on one machine."""

    def __init__(self, recipe: Seq2SeqRecipe, found: PairOutline, machine: Machine, text: PairText | None) -> None:
        self.recipe, self.found, self.text, self.counts = recipe, found, text, found.counts
        self.speed = machine.flops * EFFICIENCY
        self.saved = getattr(torch, found.dtype).itemsize
        config = found.config
        experts = (config.num_sparse_encoder_layers + config.num_sparse_decoder_layers) * (config.num_experts - 1)
        self.met = self.counts.original - experts * 2 * config.d_model * config.d_ff  # one expert a layer, and the rest

    def steps(self) -> list[Step]:
        """All of them."""
        size = final = self.counts.original
        steps = []
        if is_remote(self.recipe.model):
            stored = size * self.saved
            steps.append(Step("fetch", f"{stored / 1e9:.1f} GB from the Hub, at 100 MB/s", 0, 0, stored, stored / 1e8))
        steps.append(self._evaluated("teacher", size))
        for number, stage in enumerate(self.recipe.stages, 1):
            name = f"stage-{number}"
            if stage.merge is not None:
                size = final = self.counts.merged
                steps += self._merging(number, stage)
                steps.append(self._evaluated(f"{name}/merged", size))
            else:
                assert stage.factor is not None
                size, final = self._dense(stage.factor, size), self.counts.factored
                what = f"rank {stage.factor.rank}: {size:,} parameters before rows go"
                steps.append(Step(f"{name}/factor", what, 2 * size * _FLOAT32, 0, size * self.saved, size / 2e6))
                steps.append(self._evaluated(f"{name}/factored", size))
            steps.append(self._distil(number, size, final))
            steps.append(self._evaluated(f"{name}/distilled", final))
        stored = final * self.saved
        return [*steps, Step("publish", f"{final:,} parameters", 0, 0, stored, stored / 5e8)]

    def _merging(self, number: int, stage: Seq2SeqStage) -> list[Step]:
        assert stage.merge is not None
        name, whole, size = f"stage-{number}", self.counts.original * _FLOAT32, self.counts.merged
        tokens = stage.calibration.tokens
        key = f"stages.{number - 1}.calibration.batch_size"
        seconds = 6 * self.met * tokens / self.speed
        score = Step(f"{name}/score", f"{tokens:,} tokens, usage and router logits", whole, 0, 10**6, seconds, key)
        what = f"{self.counts.experts} experts stay, {stage.merge.counts}: {size:,} parameters"
        merging = size / 2e7
        if stage.calibration.reconstruct:  # all pairs pass the whole model for each layer
            config = self.found.config
            merging += (
                2
                * self.met
                * tokens
                * (config.num_sparse_encoder_layers + config.num_sparse_decoder_layers)
                / self.speed
            )
            what += ", output projections solved anew"
        return [score, Step(f"{name}/merge", what, whole + size * _FLOAT32, 0, size * self.saved, merging)]

    def _evaluated(self, name: str, size: int) -> Step:
        tokens = _tokens(self.text, "test")
        what = f"loss and answers on {tokens:,} tokens" if tokens else "loss and answers on the whole split"
        seconds = _GENERATING * 2 * self.met * tokens / self.speed
        return Step(f"{name}/evaluate", what, size * _FLOAT32, 0, 0, seconds, "evaluation.batch_size")

    def _dense(self, factor: Factor, size: int) -> int:
        """Parameters while every row of S is there: L and R on top."""
        return size + self.counts.experts * 2 * factor.rank * (self.found.config.d_model + self.found.config.d_ff)

    def _distil(self, number: int, size: int, final: int) -> Step:
        arguments = self.found.arguments[number - 1]
        optimizer = str(OptimizerNames(arguments.optim).value)
        state = _STATES.get(optimizer_of(optimizer, "float32"), 0)
        tokens = self._training_tokens(arguments)
        memory = size * (2 * _FLOAT32 + state) + self.counts.original * _FLOAT32
        kept = (arguments.save_total_limit or 1) * (arguments.save_strategy != "no")
        disk = kept * size * (_FLOAT32 + state) + final * self.saved
        key = f"stages.{number - 1}.distillation.per_device_train_batch_size"
        what = f"{tokens:,} tokens, {optimizer}; activations not counted"
        return Step(f"stage-{number}/distil", what, memory, 0, disk, 8 * self.met * tokens / self.speed, key)

    def _training_tokens(self, arguments: Seq2SeqDistillationConfig) -> int:
        pairs = len(self.text.train) if self.text is not None else 0
        mean = self.recipe.data.max_source_length + self.recipe.data.max_target_length
        if pairs:
            mean = round(_tokens(self.text, "train") / pairs)
        if arguments.max_steps > 0:
            return arguments.max_steps * arguments.train_batch_size * arguments.gradient_accumulation_steps * mean
        return int(arguments.num_train_epochs * pairs) * mean


def _tokens(text: PairText | None, split: str) -> int:
    """Tokens of the prompts and completions of a split; 0 where they have not been read."""
    rows = vars(text)[split] if text is not None else {"input_ids": [], "labels": []}
    return sum(map(len, rows["input_ids"])) + sum(map(len, rows["labels"]))
