"""A recipe for an encoder-decoder: merge its experts, factor them, recover after each; MC-SMoE as one strict YAML file.

```yaml
task: seq2seq
model: switch/teacher                # what is made small, and the teacher; a folder or a Hub id
data: {source: switch/data, max_source_length: 128, max_target_length: 16}
stages:
  - merge: {num_experts: 2}
    distillation: {max_steps: 400, learning_rate: 3.0e-4}
  - factor: {rank: 8, density: 0.10}
    distillation: {max_steps: 600, learning_rate: 3.0e-4}
output: my-run
```
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from slimmoe_hf.defaults import RECONSTRUCT
from slimmoe_hf.factorization import RANK
from slimmoe_hf.merging import GROUPINGS, SIMILARITIES
from slimmoe_hf.schema import Count, Document, Strict, check_arguments, find_path, settings_of, suggestion

_ELSEWHERE = {
    "output_dir": "the run's folder is `output`",
    "resume_from_checkpoint": "the same command continues a run",
    "seed": "the recipe's `seed` is every step's",
    "model_init_kwargs": "the student is the stage's own model",
    "teacher_model_init_kwargs": "the teacher is the recipe's `teacher`",
    "predict_with_generate": "the recipe's `evaluation` scores generated text",
    "generation_max_length": "it is `evaluation.max_new_tokens`",
    "fsdp": "a run is one process",
    "fsdp_config": "a run is one process",
    "deepspeed": "a run is one process",
    "push_to_hub": "publish the finished folder instead",
    "load_best_model_at_end": "a stage ends with its last step: rows of S go until then",
}


class PairSpec(Strict):
    """Where prompts and completions come from, in the grammar of `slimmoe_hf.data`.

    Attributes:
        source: A local file or folder with the columns `prompt` and `completion`, or a Hub dataset id.
        revision: A commit of a Hub dataset.
        max_source_length: Tokens that the encoder reads; pairs with a longer prompt are left out. max_target_length: Tokens
            that the decoder predicts, likewise.
        tokens: Train on pairs of at most so many tokens together, chosen by the seed; None is all of them.
        validation_tokens: How many validation tokens a training run looks at when it evaluates.
    """

    source: str
    revision: str | None = None
    max_source_length: Annotated[int, Field(ge=2)] = 512
    max_target_length: Annotated[int, Field(ge=2)] = 64
    tokens: Count | None = None
    validation_tokens: Count | None = 32768


class Merge(Strict):
    """M-SMoE: experts that do alike become one, weighted by usage; routers keep all their rows and are frozen.

    Attributes:
        num_experts: How many stay in a layer; with `adaptive` counts, on average over the layers that are merged.
        counts: `adaptive` (more where usage is spread) or `uniform`.
        similarity: A name in `slimmoe_hf.merging.SIMILARITIES`. grouping: One in `GROUPINGS` there.
    """

    num_experts: Count
    counts: Literal["adaptive", "uniform"] = "adaptive"
    similarity: str = "router_logits"
    grouping: str = "dominant"

    @field_validator("similarity")
    @classmethod
    def _known_similarity(cls, name: str) -> str:
        return _known("similarity", name, tuple(SIMILARITIES))

    @field_validator("grouping")
    @classmethod
    def _known_grouping(cls, name: str) -> str:
        return _known("grouping", name, tuple(GROUPINGS))


class Factor(Strict):
    """MC-SMoE's second half: experts as low rank plus rows that are kept, fewer of them as the stage trains.

    Attributes:
        rank: r. density: Share of the elements of S that remains.
        initial_steps: Steps before the first row goes; below 1 a share of the stage's. final_steps: Steps at the end at
            the final density, likewise.
        beta: Of the moving average of importance.
    """

    rank: Annotated[int, Field(ge=8, multiple_of=8)] = RANK
    density: Annotated[float, Field(gt=0, lt=1)] = 0.10
    initial_steps: Annotated[float, Field(ge=0)] = 0.1
    final_steps: Annotated[float, Field(ge=0)] = 0.3
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.85


class PairCalibration(Strict):
    """How usage and router logits are taken.

    Attributes:
        tokens: Tokens of the pairs that are swept, prompts and completions. They are set aside from training.
        batch_size: Pairs at a time; the scores do not depend on it.
        reconstruct: Solve the output projections of merged experts anew, on the same pairs.
    """

    tokens: Count = 32768
    batch_size: Count = 16
    reconstruct: bool = RECONSTRUCT


class Seq2SeqStage(Strict):
    """One stage: merge or factor the model of the stage before, then train it on the teacher's distributions.

    Attributes:
        merge: Merge experts. factor: Factor them. A stage does one of the two.
        calibration: For `merge`.
        distillation: Arguments of `Seq2SeqDistillationConfig`, the stage's own learning-rate schedule among them. All
            parameters train but the routers.
    """

    merge: Merge | None = None
    factor: Factor | None = None
    calibration: PairCalibration = PairCalibration()
    distillation: dict[str, Any] = Field(default_factory=dict)

    @field_validator("distillation")
    @classmethod
    def _known_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        check_arguments(arguments, seq2seq_arguments(), _ELSEWHERE)
        return arguments

    @model_validator(mode="before")
    @classmethod
    def _as_stored(cls, values: Any) -> Any:
        """A stored recipe spells out whatever was the default then: in a stage that factors it decides nothing."""
        if not isinstance(values, dict) or values.get("merge") is not None:
            return values
        if not isinstance(calibration := values.get("calibration"), dict):
            return values
        asked = {key: value for key, value in calibration.items() if (key, type(value)) != ("reconstruct", bool)}
        return {**values, "calibration": asked}

    @model_validator(mode="after")
    def _one_thing(self) -> Seq2SeqStage:
        if (self.merge is None) == (self.factor is None):
            raise ValueError("a stage has either merge or factor, and this one has both or none")
        if self.merge is None and "calibration" in self.model_fields_set and self.calibration != PairCalibration():
            raise ValueError("only a stage that merges is calibrated; leave calibration out")
        return self


class PairEvaluation(Strict):
    """What every model of a run is measured on: its loss, and its greedy answers by exact match, F1 and accuracy.

    Attributes:
        split: The split nobody trained on or chose by.
        tokens: The first pairs that have so many tokens together; None is the whole split.
        batch_size: Pairs at a time; the loss does not depend on it.
        max_new_tokens: An answer is cut there; None is `data.max_target_length`.
    """

    split: Literal["test", "validation"] = "test"
    tokens: Count | None = None
    batch_size: Count = 32
    max_new_tokens: Count | None = None


class Seq2SeqRecipe(Document):
    """A whole run of merging and factoring, as `slimmoe run` takes it.

    Attributes:
        task: What tells it from a recipe for a decoder.
        model: What is made small: a Switch Transformer, fine-tuned on the task; a folder or a Hub id.
        teacher: What every stage learns from; None is `model`.
        revision: A commit of the model on the Hub; `teacher_revision` of the teacher.
        data: Pairs for calibration, training, validation and test, which never overlap.
        stages: A merging one, a factoring one, or one after the other.
        evaluation: What every model is measured on.
        seed: Every step starts from it.
        dtype: What models are saved in; None is the model's own. Training is in float32, mixed where a stage's `distillation`
            says `bf16: true`.
        threads: CPU threads; None leaves them alone. Runs are bit-identical on the same number only.
        output: The run's folder; `--output` wins over it.
    """

    task: Literal["seq2seq"]
    model: str
    teacher: str | None = None
    revision: str | None = None
    teacher_revision: str | None = None
    data: PairSpec
    stages: Annotated[list[Seq2SeqStage], Field(min_length=1)]
    evaluation: PairEvaluation = PairEvaluation()
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    threads: Count | None = None
    output: str | None = None

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: list[Seq2SeqStage]) -> list[Seq2SeqStage]:
        kinds = ["merge" if stage.merge is not None else "factor" for stage in stages]
        if kinds not in (["merge"], ["factor"], ["merge", "factor"]):
            raise ValueError(
                f"there are {', then '.join(kinds)}; one merging stage, one factoring stage, or merge and then factor will do"
            )
        return stages

    def resolved(self, folder: Path) -> Seq2SeqRecipe:
        """The same with absolute local paths: the current directory's, else those of `folder`."""
        found = {name: find_path(value, folder) for name in ("model", "teacher") if (value := vars(self)[name])}
        data = self.data.model_copy(update={"source": find_path(self.data.source, folder)})
        return self.model_copy(update={**found, "data": data})


@functools.cache
def seq2seq_arguments() -> frozenset[str]:
    """The names that a stage's `distillation` may use: every field of `Seq2SeqDistillationConfig` that is a setting."""
    from slimmoe_hf.arguments import Seq2SeqDistillationConfig

    return settings_of(Seq2SeqDistillationConfig, _ELSEWHERE)


def _known(what: str, name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}{suggestion(name, known)} There are: {', '.join(known)}")
    return name
