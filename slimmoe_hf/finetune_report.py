"""What a fine-tuning run did and what it brought: `finetune.json`, and the table at its end."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

import slimmoe_hf
from slimmoe_hf.finetune_settings import Adapter

REPORT = "finetune.json"
_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets")


class HeldOut(BaseModel):
    """Mean nats per predicted token of one split, of the model as it came and as it was trained.

    Attributes:
        documents: How many. tokens: Predicted ones that the loss is on.
        before: Loss of the model that was fine-tuned. after: Of what came out, before it was cast to the dtype that it is
            saved in.
    """

    model_config = ConfigDict(frozen=True)

    documents: int
    tokens: int
    before: float
    after: float


class Finetuned(BaseModel):
    """One fine-tuning run.

    Attributes:
        model: What was fine-tuned, as it was named. revision: Its commit, where one was named.
        weights_sha256: Of its weight files: `cat *.safetensors | sha256sum`.
        output_sha256: Of the weight files that were written, the adapter's or whole ones.
        adapter: What was trained; None is all weights. merged: Whether it was merged into whole weights.
        data: The data spec. data_revision: Its commit. split: What was trained on.
        documents: How many were trained on. loss_on: Which tokens the loss is on.
        dtype: What the weights were held in. optim, learning_rate: As trained. arguments: What else the user set.
        max_length: Tokens per row. packing: Whether rows were filled. seed: Of everything random.
        steps: Optimizer steps. tokens: Tokens read in training, prompts too. trained_parameters: How many.
        validation, test: Losses before and after. Nothing was chosen by the test split.
        estimated_memory: Bytes, by `slimmoe_hf.memory`. peak_memory: Bytes measured above what was taken before the model
            was there: by PyTorch on a GPU, anonymous memory of the process on a CPU. Of the last call.
        tokens_per_second: Median over the steps of the last call. seconds: Time of the last call.
        device: Where. history: The Trainer's log. versions: Of the packages.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    revision: str | None
    weights_sha256: str
    output_sha256: str
    adapter: Adapter | None
    merged: bool
    data: str
    data_revision: str | None
    split: str
    documents: int
    loss_on: str
    dtype: str
    optim: str
    learning_rate: float
    arguments: dict[str, Any]
    max_length: int
    packing: bool
    seed: int
    steps: int
    tokens: int
    trained_parameters: int
    validation: HeldOut
    test: HeldOut
    estimated_memory: int
    peak_memory: int | None
    tokens_per_second: float | None
    seconds: float
    device: str
    history: list[dict[str, Any]]
    versions: dict[str, str]

    @classmethod
    def load(cls, folder: Path) -> Finetuned:
        """Read the report of a fine-tuned model.

        Raises:
            ValueError: There is none, or it is of another version.
        """
        try:
            return cls.model_validate_json((folder / REPORT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder / REPORT}: no such report. `slimmoe finetune` writes one.") from None
        except ValidationError as error:
            raise ValueError(
                f"{folder / REPORT}: not a report of this version ({error.error_count()} fields do not fit)."
            ) from None


def versions() -> dict[str, str]:
    """Versions of what computed."""
    return {"slimmoe_hf": slimmoe_hf.__version__, **{name: version(name) for name in _PACKAGES}}


def shown(report: Finetuned) -> list[str | Table]:
    """Losses before and after, and what it took, for a console."""
    losses = Table("held-out loss", box=None, padding=(0, 1, 0, 0))
    for heading in ("tokens", "before", "after"):
        losses.add_column(heading, justify="right", no_wrap=True)
    for name, split in (("validation", report.validation), ("test", report.test)):
        losses.add_row(name, f"{split.tokens:,}", f"{split.before:.4f}", f"{split.after:.4f}")
    what = f"an adapter of rank {report.adapter.rank}" if report.adapter else "all weights"
    speed = f"; {report.tokens_per_second:,.0f} tokens/s" if report.tokens_per_second else ""
    peak = f"; peak {report.peak_memory / 2**30:.2f} GiB" if report.peak_memory else ""
    return [
        f"{report.data}: {report.tokens:,} tokens in {report.steps:,} steps, loss on {report.loss_on}",
        losses,
        f"{what}, {report.trained_parameters:,} parameters{speed}{peak} ({report.device})",
    ]
