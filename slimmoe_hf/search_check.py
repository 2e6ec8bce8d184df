"""The few best shapes of a search, measured: cut in memory one after the other from one model, and reconstructed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimmoe_hf.atomic import replacing
from slimmoe_hf.evaluation import measure_loss
from slimmoe_hf.families import family_of, moe_layers, refuse_encoder_decoder
from slimmoe_hf.identity import model_fingerprint
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.reconstruction import reconstruct
from slimmoe_hf.search import Candidate, Search, calibrated, finished
from slimmoe_hf.stats import ExpertStats
from slimmoe_hf.super_experts import super_experts_of
from slimmoe_hf.surgery import apply_plan
from slimmoe_hf.sweeps import Batch

M = TypeVar("M", bound=PreTrainedModel)
BEST = 5
"""How many shapes are measured beside the references, unless told otherwise."""
MEASURED = BEST + 3
"""How many shapes are measured at most then."""


@dataclass(frozen=True)
class Checked:
    """What was measured of a search.

    Attributes:
        search: With what was measured, and calibrated by it.
        plan: Of its best shape, reconstructed where that was asked for.
        without: `(layer, expert)` of every super expert -> what the loss grows by when its output is zero.
    """

    search: Search
    plan: CompressionPlan
    without: dict[tuple[int, int], float]


def check_search(
    model: PreTrainedModel,
    stats: ExpertStats,
    found: Search,
    rows_NT: Tensor,
    batches: Iterable[Batch] = (),
    *,
    rebuild: bool = True,
    number: int = BEST,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Checked:
    """Measure the few shapes that are predicted best, after pure width, pure drop and the best one with fewer groups.

    To these the weights of the prediction are fitted; then the best of those that are left is measured, and they are fitted
    again, `number` times. A shape is cut from the one model, whose uncut weights it shares.

    Args:
        model: The one that was scored, uncut and in eval mode; nothing of it changes.
        stats: Of it.
        found: From `search_plan`.
        rows_NT: Token ids of the validation text, which was not calibrated on; never of the test text.
        batches: What is reconstructed on: the calibration text.
        rebuild: Measure with output projections solved anew too, and go by that.
        number: How many shapes beside those three.
        batch_size: Rows of the validation text at a time.
        dtype: Of what is solved, as `reconstruct` takes it.
        progress: Show a progress bar.

    Raises:
        ValueError: An encoder-decoder, statistics of another model, or `number` is below 1.
    """
    refuse_encoder_decoder(model.config, "a search")
    if found.stats_sha256 != stats.sha256:
        raise ValueError("the search was made on other statistics. Give those that search_plan was given.")
    if stats.meta.fingerprint not in (None, model_fingerprint(model)):
        raise ValueError("the statistics are of a model with other weights. Score this model.")
    if number < 1:
        raise ValueError(f"number={number}: check at least one shape.")
    check = _Check(model, stats, found, rows_NT, list(batches), rebuild, batch_size, dtype)
    references = [each for each in (found.pure_width, found.pure_drop, found.fewer_groups) if each is not None]
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("Measuring shapes", total=min(len(references) + number, len(found.candidates)))
        for candidate in references:
            check.measure(candidate)
            bar.advance(task)
        for _ in range(number):
            left = [each for each in check.search.candidates if each.measured is None]
            if left:
                check.measure(left[0])
                bar.advance(task)
    assert check.plan is not None
    without = {
        (layer, expert): check.loss_without(layer, expert) - check.original
        for layer, experts in super_experts_of(stats).items()
        for expert in experts
    }
    search = check.search.model_copy(update={"original": check.original})
    return Checked(finished(search, stats), check.plan, without)


def save_searched(found: Search, plan: CompressionPlan, output: Path, overwrite: bool) -> None:
    """Write a plan's folder, as `CompressionPlan.save` makes it, with the search that led to the plan beside it.

    Args:
        found: The search.
        plan: Of its best shape.
        output: The folder.
        overwrite: Replace what is there.
    """
    from slimmoe_hf.plots import png  # matplotlib takes long to import
    from slimmoe_hf.plots.frontier import picture_of

    picture = picture_of(found)
    with replacing(output, overwrite) as partial:
        plan.save(partial)
        (partial / "search.json").write_text(found.model_dump_json(indent=2) + "\n")
        (partial / "frontier.json").write_text(picture.model_dump_json() + "\n", encoding="utf-8")
        (partial / "frontier.png").write_bytes(png(picture))


class _Check:
    """The search so far, and the plan of its best shape."""

    def __init__(
        self, model: PreTrainedModel, stats: ExpertStats, search: Search, rows_NT: Tensor, batches: Sequence[Batch],
        rebuild: bool, batch_size: int, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.model, self.stats, self.search = model, stats, search
        self.plan: CompressionPlan | None = None
        self.rows_NT, self.batches, self.rebuild, self.batch_size = rows_NT, batches, rebuild, batch_size
        self.dtype = dtype
        self.original = self._loss(model)

    def _loss(self, model: PreTrainedModel) -> float:
        return measure_loss(model, self.rows_NT, self.batch_size, progress=False).loss

    def measure(self, candidate: Candidate) -> None:
        """Cut one shape, measure it, and fit the prediction to it too."""
        plan = self.search.plan(self.stats, candidate)
        plain = self._loss(apply_plan(_sharing(self.model), plan)) - self.original
        reconstructed = None
        if self.rebuild:
            sliced, plan = plan, reconstruct(self.model, self.batches, plan, dtype=self.dtype, progress=False)
            reconstructed = plain
            if plan is not sliced:
                reconstructed = self._loss(apply_plan(_sharing(self.model), plan)) - self.original
        self.search = calibrated(self.search.with_measured(candidate, plain, reconstructed))
        if self.search.best.size == candidate.size:
            self.plan = plan

    @torch.no_grad()
    def loss_without(self, layer: int, expert: int) -> float:
        """The loss where one expert puts out nothing."""
        model, layout = _sharing(self.model), family_of(self.model.config).layout
        experts = next(module for index, module, _ in moe_layers(model) if index == layer)
        for name in filter(None, (layout.down, layout.down_bias)):
            silent = experts.get_parameter(name).detach().clone()
            silent[expert] = 0
            experts.register_parameter(name, nn.Parameter(silent, requires_grad=False))
        return self._loss(model)


def _sharing(model: M) -> M:
    """A copy whose weights are the model's own until `apply_plan` puts others in their place."""
    return copy.deepcopy(model, {id(each): each for each in (*model.parameters(), *model.buffers())})
