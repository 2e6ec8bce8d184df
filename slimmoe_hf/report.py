"""What a run found: `report.json`, the table at its end, and the README of its folder.

Anyone can recompute the numbers with plain transformers; `slimmoe_hf.evaluation` says how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Group
from rich.table import Table

from slimmoe_hf.evaluation import Measurement
from slimmoe_hf.factorization import StableRankChange
from slimmoe_hf.generation_evaluation import GenerationScores
from slimmoe_hf.harness import TaskResult

_Rows = list[tuple[str, ...]]


class ModelReport(Measurement):
    """One model of a run: a `Measurement`, and where it comes from.

    Attributes:
        name: For tables. stage: 0 for the teacher. step: What was done last. A `merged` model is as merging left it, a
            `factored` one as factoring did, with all of S.
        path: Its folder, relative to the run's; a teacher's Hub id.
        teacher_sha256: Hash of the weight files of the original model, which every stage learns from.
        scored_sha256: Of a slimmed or merged model: hash of the weight files of the model that was scored and cut.
        stats_sha256, plan_sha256: Of a slimmed or merged model: what decided.
        found: Of a slimmed model whose stage had a budget: the shape that was found, experts x width, and fewer groups; or that
            the budget was met already.
        tasks: What benchmark tasks gave, where some were run.
        generation: How right the answers of an encoder-decoder are.
    """

    name: str
    path: str
    stage: int
    step: Literal["teacher", "slimmed", "merged", "factored", "distilled"]
    teacher_sha256: str
    scored_sha256: str | None = None
    stats_sha256: str | None = None
    plan_sha256: str | None = None
    found: str | None = None
    tasks: list[TaskResult] = Field(default_factory=list)
    generation: GenerationScores | None = None


class EvaluationReport(BaseModel):
    """What the losses were measured on.

    Attributes:
        data: The data spec. revision: Its commit, of a Hub dataset. split: Which split.
        max_length: Block length T in tokens. rows: How many blocks. tokens: Predicted tokens, T - 1 a block.
        documents: Documents read. stream_tokens, stream_bytes: Their size, for bits per byte.
        token_limit: Where reading stopped, if before the end. dtype: What was computed in. prompts: What samples continue.
        left_out: Of an encoder-decoder's pairs, in all splits, how many were too long. Its documents are pairs: rows count
            pairs, tokens and bytes those of completions, and `max_length` is of the prompt.
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
    left_out: int = 0


class Report(BaseModel):
    """A finished run.

    Attributes:
        models: The teacher, then every stage's slimmed and distilled model.
        evaluation: What they were measured on.
        seconds: Time of all steps together, over all calls. threads: CPU threads of the last call.
        version: Of slimmoe_hf.
        stable_ranks: Of the experts before and after merging, by layer and matrix.
    """

    model_config = ConfigDict(frozen=True)

    models: list[ModelReport]
    evaluation: EvaluationReport
    seconds: float
    threads: int
    version: str
    stable_ranks: list[StableRankChange] = Field(default_factory=list)

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

    def with_tasks(self, found: Mapping[str, Sequence[TaskResult]]) -> Report:
        """The report with task results added.

        Args:
            found: By the name of the model. They take the place of earlier results of the same task, metric and settings.
        """
        models = [
            model.model_copy(update={"tasks": merge_tasks(model.tasks, found.get(model.name, []))})
            for model in self.models
        ]
        return self.model_copy(update={"models": models})


def merge_tasks(before: Sequence[TaskResult], found: Sequence[TaskResult]) -> list[TaskResult]:
    """Earlier results, those that were found anew replaced."""
    kept = [result for result in before if not any(result.same_question(new) for new in found)]
    return [*kept, *found]


def _rows(report: Report) -> _Rows:
    """The headings, then a row a model."""
    headings = ("model", "parameters", "active", "file", f"{report.evaluation.split} loss", "bits/byte", "tokens/s")
    rows = [
        (
            model.name, f"{model.total_parameters:,}", f"{model.active_parameters:,}", f"{model.bytes / 1e6:,.1f} MB",
            f"{model.loss:.4f}", f"{model.bits_per_byte:.4f}", speed(model),
        )
        for model in report.models
    ]  # fmt: skip
    return [headings, *rows]


def speed(model: Measurement) -> str:
    """Tokens per second, for people."""
    return "-" if model.tokens_per_second is None else f"{model.tokens_per_second:,.0f}"


def unmeasured(report: Report) -> str:
    """Why a speed is missing; empty where none is."""
    names = " and ".join(model.name for model in report.models if model.streamed)
    return f"No speed of {names}: measured one decoder layer at a time." if names else ""


def _answers(report: Report) -> _Rows:
    """How right the answers of an encoder-decoder are; the headings, then a row a model."""
    rows: _Rows = [("model", "exact match", "F1", "accuracy")]
    for model in report.models:
        if (found := model.generation) is not None:
            rows.append((model.name, *(f"{x:.1%}" for x in (found.exact_match, found.token_f1, found.accuracy))))
    return rows if len(rows) > 1 else []


def task_rows(found: Mapping[str, Sequence[TaskResult]]) -> _Rows:
    """Task results side by side: the headings, then a row for every task, metric and setting; none without results.

    Args:
        found: By the name of the model.
    """
    questions: list[TaskResult] = []
    for results in found.values():
        questions += [result for result in results if not any(result.same_question(other) for other in questions)]
    rows: _Rows = [("task", "metric", *found)] if questions else []
    for question in questions:
        limit = f", first {question.limit}" if question.limit is not None else ""
        arrow = {True: " \u2191", False: " \u2193", None: ""}[question.higher_is_better]
        values = [
            next((_value(result) for result in results if result.same_question(question)), "-")
            for results in found.values()
        ]
        name = f"{'- ' if question.group else ''}{question.task} ({question.num_fewshot}-shot{limit})"
        rows.append((name, question.metric + arrow, *values))
    return rows


def _value(result: TaskResult) -> str:
    value = f"{result.value:,.4f}" if abs(result.value) < 100 else f"{result.value:,.1f}"
    return value if result.stderr is None else f"{value} \u00b1 {result.stderr:.4f}"


def _tasks(report: Report) -> _Rows:
    return task_rows({model.name: model.tasks for model in report.models if model.tasks})


def table(report: Report) -> Group:
    """Sizes, losses and speeds of all models of a run; below, what benchmark tasks gave, where some were run."""
    evaluation = report.evaluation
    title = f"{evaluation.data}, {evaluation.split}: {evaluation.tokens:,} tokens"
    tables = [aligned(_rows(report), title)]
    if rows := _answers(report):
        tables.append(aligned(rows, f"\nanswers to {evaluation.rows:,} prompts"))
    if why := unmeasured(report):
        tables[0].caption, tables[0].caption_justify = why, "left"
    if rows := _tasks(report):
        tables.append(aligned(rows, "\ntasks", left=2))
    return Group(*tables)


def aligned(rows: _Rows, title: str, left: int = 1) -> Table:
    """Rows under their headings for a terminal, numbers to the right.

    Args:
        rows: The headings first.
        title: Above them.
        left: How many columns, from the first, are text.
    """
    result = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    headings, *lines = rows
    for number, heading in enumerate(headings):
        justify: Literal["left", "right"] = "left" if number < left else "right"
        result.add_column(heading, justify=justify, no_wrap=True)
    for line in lines:
        result.add_row(*line)
    return result


def samples(report: Report) -> list[str]:
    """Generated text right after the last cut and after distillation, one line each, per prompt."""
    before, after = report.models[-2], report.models[-1]
    lines = []
    for cut, healed in zip(before.samples, after.samples, strict=True):
        lines += [f"before distillation: {cut}", f"after distillation:  {healed}"]
    return lines


def readme(report: Report, model: str) -> str:
    """The README of a run's folder: what it holds, the table, how to load the result.

    Args:
        report: The run.
        model: What was slimmed, as `slimmoe_hf.lineage.public_name` shows it.
    """
    lines = markdown(_rows(report))
    tasks = f"\n{markdown(rows, left=2)}\n" if (rows := _tasks(report)) else ""
    evaluation, why = report.evaluation, unmeasured(report)
    return f"""# {model}, slimmed

Made from `{model}` by `slimmoe run recipe.yaml` (slimmoe_hf {report.version}): cut stage by stage, each stage
distilled from the original model. The licence of `{model}` applies.

{lines}

Loss in nats per predicted token, measured on the {evaluation.split} split of `{evaluation.data}`: {evaluation.tokens:,} tokens in
blocks of {evaluation.max_length}. `report.json` has every number, `recipe.yaml` what was run.{f" {why}" if why else ""}
{tasks}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
```
"""


def pair_readme(report: Report, model: str) -> str:
    """As `readme`, of a run that merged or factored the experts of an encoder-decoder."""
    evaluation, steps = report.evaluation, [model.step for model in report.models]
    done = " and ".join(step for step in ("merged", "factored") if step in steps)
    form = "a factored checkpoint" if "factored" in steps else "a checkpoint whose experts are shared"
    load = "from pathlib import Path\n\nfrom slimmoe_hf.seq2seq_models import load_seq2seq"
    return f"""# {model}, {done}

Made from `{model}` by `slimmoe run recipe.yaml` (slimmoe_hf {report.version}): experts {done}, each step followed by
distillation from the original model. The licence of `{model}` applies.

{markdown(_rows(report))}

{markdown(_answers(report))}

Loss in nats per predicted token of the completions, answers by greedy `generate()`, both on the {evaluation.split} split of
`{evaluation.data}`: {evaluation.rows:,} pairs, {evaluation.tokens:,} tokens. `report.json` has every number, `recipe.yaml` what
was run.

`model/` is {form}: plain transformers cannot load it.

```python
{load}
from transformers import AutoTokenizer

model = load_seq2seq(Path("model"))
tokenizer = AutoTokenizer.from_pretrained("model")
```
"""


def markdown(rows: _Rows, left: int = 1) -> str:
    """Rows under their headings in Markdown, numbers to the right.

    Args:
        rows: The headings first.
        left: How many columns, from the first, are text.
    """
    headings, *lines = rows
    rule = (*["---"] * left, *["---:"] * (len(headings) - left))
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *lines))
