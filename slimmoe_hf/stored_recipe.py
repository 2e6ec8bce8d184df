"""The recipe that lies beside a run, whichever version wrote it: fields of its time, defaults of its time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from slimmoe_hf.recipe import Calibration, Stage
from slimmoe_hf.schema import Document
from slimmoe_hf.yaml_files import read_yaml

_WERE = {"criterion": "taylor", "calibration.loss": "kd_topk", "calibration.reconstruct": False}
"""What the defaults of a stage were in earlier versions."""
_LACKING = {"reconstruct": False}
"""What a calibration did before it had such a field."""


def read_stored(path: Path) -> Any:
    """The values of a stored recipe. All defaults are spelt out in it: a field that it lacks came later.

    Args:
        path: The `recipe.yaml` of a run.

    Raises:
        ValueError: As `read_yaml`.
    """
    values = read_yaml(path)
    if not isinstance(values, dict) or not isinstance(stages := values.get("stages"), list):
        return values
    return {**values, "stages": [_of_its_time(stage) for stage in stages]}


def _of_its_time(stage: Any) -> Any:
    if not isinstance(stage, dict) or not isinstance(calibration := stage.get("calibration"), dict):
        return stage
    return {**stage, "calibration": {**_LACKING, **calibration}}


def changed_defaults(differences: Sequence[str], theirs: Document) -> str:
    """How to go on with a run that differs in the defaults of an earlier version alone; empty for any other.

    Args:
        differences: From `Document.differences`.
        theirs: The stored recipe.
    """
    now = {
        "criterion": Stage.model_fields["criterion"].default,
        **{f"calibration.{name}": value for name, value in Calibration().model_dump().items()},
    }
    stored, written = theirs.flat(), dict[str, Any]()
    for place in differences:
        name = re.sub(r"^stages\.\d+\.", "", place)
        if name not in _WERE or now[name] == _WERE[name] or stored.get(place) != _WERE[name]:
            return ""
        part, _, field = name.partition(".")
        written[part] = {**written.get(part, {}), field: _WERE[name]} if field else _WERE[name]
    lines = [yaml.safe_dump({key: value}, default_flow_style=True).strip()[1:-1] for key, value in written.items()]
    said = " and ".join(f"`{line}`" for line in sorted(lines, reverse=True))
    return f" (these defaults changed; to go on, write {said} into the recipe's stages)" if said else ""
