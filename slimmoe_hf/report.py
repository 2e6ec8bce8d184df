"""What a run found: `report.json`, the table at its end, and the README of its folder.

Anyone can recompute the numbers with plain transformers; `slimmoe_hf.evaluation` says how.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from slimmoe_hf.evaluation import Measurement


class ModelReport(Measurement):
    """One model of a run: a `Measurement`, and where it comes from.

    Attributes:
        name: For tables. stage: 0 for the teacher. step: What was done last.
        path: Its folder, relative to the run's; a teacher's Hub id.
        teacher_sha256: Hash of the weight files of the original model, which every stage learns from.
        scored_sha256: Of a slimmed model: hash of the weight files of the model that was scored and cut.
        stats_sha256, plan_sha256: Of a slimmed model: what decided.
    """

    name: str
    path: str
    stage: int
    step: Literal["teacher", "slimmed", "distilled"]
    teacher_sha256: str
    scored_sha256: str | None = None
    stats_sha256: str | None = None
    plan_sha256: str | None = None


class EvaluationReport(BaseModel):
    """What the losses were measured on.

    Attributes:
        data: The data spec. revision: Its commit, of a Hub dataset. split: Which split.
        max_length: Block length T in tokens. rows: How many blocks. tokens: Predicted tokens, T - 1 a block.
        documents: Documents read. stream_tokens, stream_bytes: Their size, for bits per byte.
        token_limit: Where reading stopped, if before the end. dtype: What was computed in. prompts: What samples continue.
    """

    model_config = ConfigDict(frozen=True)

    data: str
    revision: str | None
    split: str
    max_length: int
    rows: int
    tokens: int
    documents: int
    stream_tokens: int
    stream_bytes: int
    token_limit: int | None
    dtype: str
    prompts: list[str]


class Report(BaseModel):
    """A finished run.

    Attributes:
        models: The teacher, then every stage's slimmed and distilled model.
        evaluation: What they were measured on.
        seconds: Time of all steps together, over all calls. threads: CPU threads of the last call.
        version: Of slimmoe_hf.
    """

    model_config = ConfigDict(frozen=True)

    models: list[ModelReport]
    evaluation: EvaluationReport
    seconds: float
    threads: int
    version: str

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a `report.json`.

        Raises:
            ValueError: There is none, or it is of another version.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such report. `slimmoe run` writes one when it is done.") from None
        except ValidationError as error:
            raise ValueError(
                f"{path}: not a report of this version ({error.error_count()} fields do not fit)."
            ) from None


def _rows(report: Report) -> list[tuple[str, ...]]:
    """The headings, then a row a model."""
    headings = ("model", "parameters", "active", "file", f"{report.evaluation.split} loss", "bits/byte", "tokens/s")
    rows = [
        (
            model.name, f"{model.total_parameters:,}", f"{model.active_parameters:,}", f"{model.bytes / 1e6:,.1f} MB",
            f"{model.loss:.4f}", f"{model.bits_per_byte:.4f}", f"{model.tokens_per_second:,.0f}",
        )
        for model in report.models
    ]  # fmt: skip
    return [headings, *rows]


def table(report: Report) -> Table:
    """Sizes, losses and speeds of all models of a run."""
    evaluation = report.evaluation
    title = f"{evaluation.data}, {evaluation.split}: {evaluation.tokens:,} tokens"
    result = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    headings, *rows = _rows(report)
    for number, heading in enumerate(headings):
        justify: Literal["left", "right"] = "left" if number == 0 else "right"
        result.add_column(heading, justify=justify, no_wrap=True)
    for row in rows:
        result.add_row(*row)
    return result


def samples(report: Report) -> list[str]:
    """Generated text right after the last cut and after distillation, one line each, per prompt."""
    before, after = report.models[-2], report.models[-1]
    lines = []
    for cut, healed in zip(before.samples, after.samples, strict=True):
        lines += [f"before distillation: {cut}", f"after distillation:  {healed}"]
    return lines


def shown(model: str) -> str:
    """A model as others may see it: a Hub id as it is, of a local folder the last two names."""
    return "/".join(Path(model).parts[-2:])


def readme(report: Report, model: str) -> str:
    """The README of a run's folder: what it holds, the table, how to load the result.

    Args:
        report: The run.
        model: What was slimmed, as `shown` names it.
    """
    headings, *rows = _rows(report)
    rule = ("---", *["---:"] * (len(headings) - 1))
    lines = "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))
    evaluation = report.evaluation
    return f"""# {model}, slimmed

Made from `{model}` by `slimmoe run recipe.yaml` (slimmoe_hf {report.version}): experts narrowed stage by stage, each stage
distilled from the original model. The licence of `{model}` applies.

{lines}

Loss in nats per predicted token, measured on the {evaluation.split} split of `{evaluation.data}`: {evaluation.tokens:,} tokens in
blocks of {evaluation.max_length}. `report.json` has every number, `recipe.yaml` what was run.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
```
"""
