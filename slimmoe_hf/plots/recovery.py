"""What the pictures of a recovery show: expert load, losses, quality against size. `plot_models` has those of the cut.

Shape letters: L layers with experts, E experts, S logged steps.
"""

from __future__ import annotations

from pydantic import computed_field

from slimmoe_hf.plots.models import Data, Picture, amount, flat, percent
from slimmoe_hf.routing import COLLAPSED


class LoadMap(Data):
    """Expert load of one model on held-out text: `load` `[L, E]` in multiples of an even load, of `layers`."""

    model: str
    layers: list[int]
    load: list[list[float]]


class DriftStage(Data):
    """Expert load while one stage trained.

    Attributes:
        stage: Counted from 1. offset: Optimizer steps of the stages before.
        steps: Of this stage, `[S]`.
        least, most: `[S, L]`, load of the layer's least and most loaded expert since the step before.
        least_expert, most_expert: `[S, L]`, which they were.
    """

    stage: int
    offset: int
    steps: list[int]
    least: list[list[float]]
    least_expert: list[list[int]]
    most: list[list[float]]
    most_expert: list[list[int]]


class Collapse(Data):
    """An expert that its router all but forgot: `load`, a multiple of an even load, in `layer`, and `where` it was."""

    layer: int
    expert: int
    load: float
    where: str


class RouterLoads(Picture):
    """Expert load before and after, and on the way.

    Attributes:
        layers: Absolute indices of the L layers with experts. num_layers: Dense ones included.
        threshold: Below it an expert counts as starved.
        maps: The teacher's and the final model's, or none where the report has no router load.
        stages: The drift, or none where the trainer logged none.
        collapsed: Experts that starved, in training or in the final model, and had not in the teacher; the worst first.
        starved_in_teacher: How many were below the threshold already.
    """

    name = "router_load"

    run: str
    layers: list[int]
    num_layers: int
    threshold: float = COLLAPSED
    maps: list[LoadMap]
    stages: list[DriftStage]
    collapsed: list[Collapse]
    starved_in_teacher: int

    @property
    def warning(self) -> str | None:
        if not self.collapsed:
            return None
        worst, more = self.collapsed[0], len(self.collapsed) - 1
        others = f" (and {more} more expert{'s' if more > 1 else ''})" if more else ""
        return (
            f"router collapse: layer {worst.layer} sends expert {worst.expert} only {worst.load:.1%} of an even load, "
            f"{worst.where}{others}"
        )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def title(self) -> str:
        if self.warning:
            return self.warning[0].upper() + self.warning[1:]
        return f"No router collapsed: {self._found}"

    @property
    def _found(self) -> str:
        if self.maps:
            before, after = (min(flat(loads.load)) for loads in self.maps)
            return f"the least loaded expert gets {before:.2f} of an even load in the teacher, {after:.2f} in the final model"
        least = min(flat(row for stage in self.stages for row in stage.least))
        return f"while training, no expert got less than {least:.2f} of an even load"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def caption(self) -> str:
        parts = []
        if self.maps:
            parts.append("layer by expert on held-out text in the teacher and in the final model")
        if self.stages:
            parts.append("of every layer's least and most loaded expert while it was trained")
        verdict = self.warning or f"no router collapsed, {self._found}"
        if self.warning and self.maps:
            verdict += f"; {self._found}"
        already = f"; {self.starved_in_teacher} were below it in the teacher already" if self.starved_in_teacher else ""
        return (
            f"Expert load of {self.run}, in multiples of an even load, {' and '.join(parts)}: {verdict} "
            f"(an expert below {self.threshold} counts as starved{already})."
        )


class LossStage(Data):
    """Losses of one stage's training, in nats per token.

    Attributes:
        stage: Counted from 1. offset: Optimizer steps of the stages before.
        length: Of this one. steps: Where it was logged.
        kl: KL from the teacher. ce: Cross-entropy with the text. loss: What was minimised.
        eval_steps, eval_kl, eval_ce: On the validation split; empty where the run did not look at it.
        slimmed, distilled: Held-out loss of the stage's model before and after its training.
    """

    stage: int
    offset: int
    length: int
    steps: list[int]
    loss: list[float]
    kl: list[float]
    ce: list[float]
    eval_steps: list[int]
    eval_kl: list[float]
    eval_ce: list[float]
    slimmed: float
    distilled: float


class Losses(Picture):
    """Loss curves of all stages, one after the other, with the held-out losses beside them.

    Attributes:
        split: What `teacher`, `slimmed` and `distilled` were measured on; the curves are of training text.
        teacher: Held-out loss of the teacher.
    """

    name = "losses"

    run: str
    split: str
    teacher: float
    stages: list[LossStage]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def title(self) -> str:
        slimmed, distilled = self.stages[-1].slimmed, self.stages[-1].distilled
        return (
            f"{self.split.capitalize()} loss {slimmed:.2f} after the last cut, {distilled:.2f} after training; the teacher has "
            f"{self.teacher:.2f}"
        )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def caption(self) -> str:
        falls = "; ".join(
            f"in stage {stage.stage} the KL from the teacher went from {stage.kl[0]:.2f} to {stage.kl[-1]:.2f}"
            for stage in self.stages
        )
        return (
            f"Loss curves of {self.run} over all stages, in nats per token: {falls}, and the {self.split} loss of the "
            f"reloaded checkpoints ended at {self.stages[-1].distilled:.2f} against the teacher's {self.teacher:.2f} (curves "
            f"are means over training text since the log before, marks are on the {self.split} split: other text, so compare "
            "their course and not their height)."
        )


class SizePoint(Data):
    """One model: its size, its held-out loss in nats per token, and that in bits per byte of the text."""

    model: str
    step: str
    total_parameters: int
    active_parameters: int
    loss: float
    bits_per_byte: float


class SizeRun(Data):
    """The models of one run, in order, the teacher first."""

    run: str
    points: list[SizePoint]


class QualitySize(Picture):
    """Held-out loss against size, for runs measured on the same text and with the same teacher."""

    name = "quality_size"

    data: str
    split: str
    tokens: int
    runs: list[SizeRun]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def title(self) -> str:
        teacher = self.runs[0].points[0]
        best = min((run.points[-1] for run in self.runs), key=lambda point: point.total_parameters)
        which = "Smallest model" if len(self.runs) > 1 else "Final model"
        share = percent(best.total_parameters / teacher.total_parameters)
        return f"{which}: {share} of the teacher's parameters, {self.split} loss {best.loss:.2f} instead of {teacher.loss:.2f}"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def caption(self) -> str:
        teacher = self.runs[0].points[0]
        ends = "; ".join(
            f"{run.run} ends at {amount(run.points[-1].total_parameters)} parameters with "
            f"{run.points[-1].loss:.3f} nats per token ({run.points[-1].bits_per_byte:.3f} bits per byte)"
            for run in self.runs
        )
        return (
            f"Loss on the {self.split} split of {self.data} ({self.tokens:,} tokens) against total parameters, before and "
            f"after the distillation of every stage: {ends}; the teacher has {amount(teacher.total_parameters)} and "
            f"{teacher.loss:.3f} ({teacher.bits_per_byte:.3f})."
        )
