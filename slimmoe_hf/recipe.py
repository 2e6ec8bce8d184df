"""A recipe: model, teacher, data, stages and evaluation in one strict YAML file.

```yaml
model: examples/teacher/model          # what is slimmed; a folder or a Hub id
data: {source: sotu, max_length: 256}
stages:
  - target: {expert_width: 128}
    calibration: {tokens: 65536}
    distillation: {max_steps: 300, learning_rate: 2.0e-3, lr_scheduler_type: cosine}
output: my-run
```

An unknown key is an error that names the nearest known one. A relative path is looked up in the current directory
first, then beside the recipe.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_serializer, field_validator, model_validator

from slimmoe_hf.budget import StageTarget
from slimmoe_hf.criteria import CRITERIA, EXPERT_CRITERIA, calibration_loss, check_criteria
from slimmoe_hf.defaults import CRITERION, RECONSTRUCT
from slimmoe_hf.free_memory import memory_bytes
from slimmoe_hf.schema import Count, Document, Strict, check_arguments, find_path, first_fault, settings_of, suggestion
from slimmoe_hf.seq2seq_recipe import Seq2SeqRecipe, Seq2SeqStage
from slimmoe_hf.yaml_files import read_yaml

# What a stage's `distillation` may not set, because the recipe says it elsewhere or the pipeline decides it.
ELSEWHERE = {
    "output_dir": "the run's folder is `output`",
    "resume_from_checkpoint": "the same command continues a run",
    "seed": "the recipe's `seed` is every step's",
    "max_length": "it is `data.max_length`",
    "packing": "it is `data.packing`",
    "dataset_kwargs": "the data is tokenised before the trainer sees it",
    "model_init_kwargs": "the student is the stage's slimmed model",
    "teacher_model_init_kwargs": "the teacher is the recipe's `teacher`, and `teacher_memory` says where it is",
    "teacher_logits_path": "the recipe's `teacher_cache` asks for one",
    "precompute_teacher_logits": "the recipe's `teacher_cache` asks for it",
    "fsdp": "the config that `accelerate` names says it",
    "fsdp_config": "the config that `accelerate` names says it",
    "push_to_hub": "publish the finished folder instead",
}


class DataSpec(Strict):
    """Where the text comes from, in the grammar of `slimmoe_hf.data`.

    Attributes:
        source: `sotu`, a local file or folder, or a Hub dataset id.
        revision: A commit of a Hub dataset.
        max_length: T, tokens per row, in calibration, training and (unless told otherwise) evaluation.
        packing: Concatenate documents and cut rows of exactly T tokens; otherwise one document a row.
        tokens: Train on at most so many tokens of text, documents chosen by the seed; None is all of it.
        validation_tokens: How many validation tokens a training run looks at when it evaluates.
    """

    source: str
    revision: str | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    packing: bool = True
    tokens: Count | None = None
    validation_tokens: Count | None = 65536


class Calibration(Strict):
    """How a stage's scores are taken.

    Attributes:
        tokens: Tokens of text that are swept. They are set aside from training, once for the whole run.
        loss: What is differentiated: `kd_topk` (against the original model, as in the paper), `lm`, or with `none` nothing,
            which takes one forward pass. None is `none` where nobody looks at gradients, else `kd_topk`; see `Stage.loss`.
        batch_size: Rows at a time; the scores do not depend on it.
        dtype: What is computed in. `float32` resolves the small gradients of the top-8 loss; `bfloat16` takes half the
            memory.
        device: `auto` is the first GPU where there is one; `cpu` for a model that is larger than the GPU.
        stream: Hold one decoder layer in memory at a time, for models that are larger than it. A teacher for `kd_topk`
            is read in the same way.
        reconstruct: Solve the output projections of what stays anew, on the same text.
    """

    tokens: Count = 131072
    loss: Literal["kd_topk", "lm", "none"] | None = None
    batch_size: Count = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    stream: bool = False
    reconstruct: bool = RECONSTRUCT


class Stage(Strict):
    """One stage: score the current student, cut it to `target`, distil it from the original model.

    Attributes:
        target: The shape after the cut, or a budget for it.
        criterion: Which scores decide; see `slimmoe_hf.criteria.CRITERIA`.
        expert_criterion: Which decide on whole experts; see `EXPERT_CRITERIA` there. None is `criterion`, or `reap`
            where that one scores no experts.
        calibration: How they are taken.
        distillation: Arguments of `DistillationConfig`, the stage's own learning-rate schedule among them.
        training_dtype: What the student's weights are held in while it trains. `bfloat16` takes half the memory (and
            with `optim: adafactor` 4 bytes per parameter), but steps smaller than its 8 bits are lost. FSDP2 with mixed
            precision trains in float32 shares whatever this says.
    """

    target: StageTarget
    criterion: str = CRITERION
    expert_criterion: str | None = None
    calibration: Calibration = Calibration()
    distillation: dict[str, Any] = Field(default_factory=dict)
    training_dtype: Literal["float32", "bfloat16"] = "float32"

    @field_validator("distillation")
    @classmethod
    def _known_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        check_arguments(arguments, distillation_arguments(), ELSEWHERE)
        return arguments

    @field_validator("criterion", "expert_criterion")
    @classmethod
    def _known_criterion(cls, name: str | None) -> str | None:
        check_criterion(name)
        return name

    @model_validator(mode="after")
    def _fitting_criteria(self) -> Stage:
        check_criteria(self.criterion, self.expert_criterion, **self.target.asks)
        assert self.loss  # refuses `none` where gradients are looked at
        return self

    @field_serializer("calibration")
    def _loss_by_name(self, calibration: Calibration) -> dict[str, Any]:
        """A stored recipe says what was done, whatever a later version takes where nothing is said."""
        return {**calibration.model_dump(), "loss": self.loss}

    @property
    def loss(self) -> str:
        """What the calibration differentiates, as asked for or as `calibration_loss` says."""
        searched = self.target.searched
        return calibration_loss(self.calibration.loss, self.criterion, self.expert_criterion, searched=searched)


class TeacherCacheSpec(Strict):
    """The teacher's answers, asked for once and kept on disk; no teacher is in memory while a student trains.

    It pays where stages go over the text about as often as it is long: every row is answered, trained on or not.

    Attributes:
        kind: `top_k`, the likeliest tokens and the mass of the rest, for forward KL; or `hidden`, the last hidden states,
            for every divergence.
        top_k: K, tokens kept of each answer.
        batch_size: Texts at a time.
        stream: Hold one decoder layer of the teacher in memory at a time, and read its checkpoint once for every group
            of texts. It needs no memory for the rest, and a disk for what passes between the layers. The teacher is
            measured so too: its row of the report has no speed and no samples, and no benchmark task is put to it.
        stream_memory: How much of the texts passes from layer to layer together ("60GB"); twice as much as a group's
            hidden states. None is half of what is free of memory, and of the disk.
    """

    kind: Literal["top_k", "hidden"] = "top_k"
    top_k: Annotated[int, Field(ge=2)] = 64
    batch_size: Count = 8
    stream: bool = False
    stream_memory: str | None = None

    @field_validator("stream_memory")
    @classmethod
    def _a_size(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None and not info.data.get("stream"):
            raise ValueError("it says how much passes from layer to layer together, so it goes with stream: true")
        if text is not None:
            memory_bytes(text)
        return text


class Evaluation(Strict):
    """What every model of a run is measured on.

    Attributes:
        split: The split nobody trained on or chose by.
        max_length: Block length in tokens; None is `data.max_length`.
        tokens: Read documents up to so many tokens; None is the whole split.
        batch_size: Rows at a time; the loss does not depend on it.
        prompts: What the samples of generated text continue; None takes the openings of the split's first documents.
        max_new_tokens: How many tokens each sample has.
        tasks: Benchmarks that teacher and last model are put to, by the names of lm-evaluation-harness.
        task_path: Folder of task YAML files of your own. num_fewshot: Examples in the prompt; None is each task's own
            number. task_limit: Only the first so many questions of every task.
    """

    split: Literal["test", "validation"] = "test"
    max_length: Annotated[int, Field(ge=2)] | None = None
    tokens: Count | None = None
    batch_size: Count = 8
    prompts: list[str] | None = None
    max_new_tokens: Count = 32
    tasks: list[str] = Field(default_factory=list)
    task_path: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    task_limit: Count | None = None


class Recipe(Document):
    """A whole run, as `slimmoe run` takes it.

    Attributes:
        model: What is slimmed: a folder or a Hub id.
        teacher: The original model that every stage learns from; None is `model`.
        revision: A commit of the model on the Hub; `teacher_revision` of the teacher.
        data: Text for calibration, training, validation and test, which never overlap.
        stages: At least one, each not wider than the one before.
        evaluation: What every model is measured on.
        seed: Every step starts from it.
        dtype: What models are saved in; None is the model's own. Training is in a stage's `training_dtype`, mixed where
            its `distillation` says `bf16: true`.
        teacher_memory: How much device memory the teacher's weights may take while a stage trains ("12GB", "12GiB"):
            the others wait in host memory and come over at every forward. None is the whole teacher on the device. On a
            machine without a GPU it has no effect.
        teacher_cache: Train on a cache of the teacher's answers, written before the first stage; None asks the teacher itself
            at every step.
        accelerate: Path of an `accelerate` config (YAML): every stage trains in the processes that it asks for. Batch
            sizes are per process. None is this process.
        threads: CPU threads; None leaves them alone. Runs are bit-identical on the same number only.
        output: The run's folder; `--output` wins over it.
    """

    model: str
    teacher: str | None = None
    revision: str | None = None
    teacher_revision: str | None = None
    data: DataSpec
    stages: Annotated[list[Stage], Field(min_length=1)]
    evaluation: Evaluation = Evaluation()
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    teacher_memory: str | None = None
    teacher_cache: TeacherCacheSpec | None = None
    accelerate: str | None = None
    threads: Count | None = None
    output: str | None = None

    @property
    def streams_teacher(self) -> bool:
        """Whether the teacher's answers come a layer at a time: then it is measured so too."""
        return self.teacher_cache is not None and self.teacher_cache.stream

    @field_validator("teacher_memory")
    @classmethod
    def _a_size(cls, text: str | None) -> str | None:
        if text is not None:
            memory_bytes(text)
        return text

    @field_validator("teacher_cache")
    @classmethod
    def _one_place(cls, asked: TeacherCacheSpec | None, info: ValidationInfo) -> TeacherCacheSpec | None:
        if asked is not None and info.data.get("teacher_memory") is not None:
            raise ValueError("no teacher is there while a student trains, so teacher_memory has no place; leave it out")
        return asked


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe for a decoder and make its local paths absolute.

    Args:
        path: A YAML file.

    Raises:
        ValueError: One line that names the file, the key and the remedy.
    """
    path = Path(path)
    return resolved(parse_recipe(_read(path), str(path)), path.parent, str(path))


def load_any_recipe(path: str | Path) -> Recipe | Seq2SeqRecipe:
    """As `load_recipe`, of whatever kind the recipe is: `task: seq2seq` is for encoder-decoders."""
    path = Path(path)
    recipe = parse_any_recipe(_read(path), str(path))
    return (
        recipe.resolved(path.parent) if isinstance(recipe, Seq2SeqRecipe) else resolved(recipe, path.parent, str(path))
    )


def reconstructing(recipe: Recipe | Seq2SeqRecipe, asked: bool) -> Recipe | Seq2SeqRecipe:
    """The same, with or without reconstruction in all stages that cut or merge."""

    def changed(stage: Stage | Seq2SeqStage) -> Stage | Seq2SeqStage:
        if isinstance(stage, Seq2SeqStage) and stage.merge is None:
            return stage
        calibration = stage.calibration.model_copy(update={"reconstruct": asked})
        return stage.model_copy(update={"calibration": calibration})

    return recipe.model_copy(update={"stages": [changed(stage) for stage in recipe.stages]})


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe. Give the path of a YAML file; examples/quickstart.yaml is one.")
    return read_yaml(path)


def resolved(recipe: Recipe, folder: Path, where: str = "recipe") -> Recipe:
    """A recipe with absolute local paths: what it means must not hang on where it is read again.

    Args:
        recipe: Paths in it are the current directory's, else those of `folder`.
        folder: Of the recipe's file.
        where: Its name, for errors.

    Raises:
        ValueError: The `accelerate` config is not there.
    """
    local = ("model", "teacher", "accelerate")
    found = {name: find_path(value, folder) for name in local if (value := getattr(recipe, name))}
    if recipe.accelerate is not None and not Path(found["accelerate"]).is_file():
        raise ValueError(f"{where}: accelerate: {recipe.accelerate}: no such file. `accelerate config` writes one.")
    data = recipe.data.model_copy(update={"source": find_path(recipe.data.source, folder)})
    evaluation = recipe.evaluation
    if evaluation.task_path is not None:
        evaluation = evaluation.model_copy(update={"task_path": find_path(evaluation.task_path, folder)})
    return recipe.model_copy(update={**found, "data": data, "evaluation": evaluation})


def parse_recipe(values: Any, where: str) -> Recipe:
    """Check the values of a recipe for a decoder.

    Args:
        values: What the YAML file holds.
        where: Its name, for errors.

    Raises:
        ValueError: One line that names the key and the remedy; or the recipe is for an encoder-decoder.
    """
    recipe = parse_any_recipe(values, where)
    if isinstance(recipe, Seq2SeqRecipe):
        raise ValueError(
            f"{where}: is of an encoder-decoder (task: seq2seq), which only `slimmoe run` takes so far; its folder has a "
            "README.md and report.json."
        )
    return recipe


def parse_any_recipe(values: Any, where: str) -> Recipe | Seq2SeqRecipe:
    """As `parse_recipe`, of whatever kind the recipe is."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{where}: expected keys and values (model, data, stages, ...), found {type(values).__name__}."
        )
    kind: type[Recipe] | type[Seq2SeqRecipe] = Seq2SeqRecipe if "task" in values else Recipe
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {first_fault(error, kind)}") from None


def check_criterion(name: str | None) -> None:
    """Raise ValueError unless it is the name of a criterion, of neurons or of experts, or None."""
    known = list(dict.fromkeys([*CRITERIA, *EXPERT_CRITERIA]))
    if name not in (None, *known):
        raise ValueError(f"unknown criterion {name!r}{suggestion(str(name), known)} There are: {', '.join(known)}")


@functools.cache
def distillation_arguments() -> frozenset[str]:
    """The names that a stage's `distillation` may use: every field of `DistillationConfig` that is a setting."""
    from slimmoe_hf.arguments import DistillationConfig

    return settings_of(DistillationConfig, ELSEWHERE)


def training_argument_names(command: str) -> frozenset[str]:
    """The training arguments that the `--config` of a command may hold; none for those that do not train."""
    if command == "finetune":
        from trl import SFTConfig

        return settings_of(SFTConfig, ELSEWHERE)
    return distillation_arguments() if command == "distill" else frozenset()
