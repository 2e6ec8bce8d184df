"""What a plan says of one layer, for people to read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class LayerSummary(BaseModel):
    """What a plan keeps of one layer.

    Attributes:
        index: Absolute layer index.
        neuron_score_kept: Share of the summed neuron score of the experts that stay; None in a dense layer.
        unknown_experts: Experts that no calibration token reached; they are ranked by weight norms.
        groups_kept: Indices of the key/value groups that stay; None where no group is dropped.
        group_score_kept: Their share of the layer's summed group score.
        experts_kept: Indices of the experts that stay; None where none is dropped.
        expert_score_kept: Their share of the layer's summed expert score.
        super_experts: Those that the model falls apart without (`super_experts`), and how many times the median of the layer
            their largest output is.
        experts_repaired: Share of the squared error of the cut experts' outputs that the repair takes away, on its text.
        attention_repaired: The same of the attention's output.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    neuron_score_kept: float | None = None
    unknown_experts: int = 0
    groups_kept: list[int] | None = None
    group_score_kept: float | None = None
    experts_kept: list[int] | None = None
    expert_score_kept: float | None = None
    super_experts: dict[int, float] = {}
    experts_repaired: float | None = None
    attention_repaired: float | None = None
