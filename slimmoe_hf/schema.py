"""Strict YAML as pydantic models: what all kinds of recipes have in common, and how their faults are told."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """A part of a recipe: no unknown keys, no conversions, frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Document(Strict):
    """A whole recipe, of whatever kind."""

    def differences(self, other: Document) -> list[str]:
        """Dotted paths of the values that differ, `output` aside: where a run is stored is not what it is."""
        mine, theirs = self.flat(), other.flat()
        return sorted(
            key for key in mine.keys() | theirs.keys() if key != "output" and mine.get(key) != theirs.get(key)
        )

    def flat(self) -> dict[str, Any]:
        """Dotted path -> value."""
        return _flat(self.model_dump())

    def to_yaml(self) -> str:
        """The recipe with every default spelt out, as it is stored beside the run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def suggestion(key: str, known: Collection[str]) -> str:
    """`; did you mean X?` for the nearest known key, or the known keys where none is near."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known keys: {', '.join(sorted(known))}." if len(known) <= 16 else "."


def first_fault(error: ValidationError, root: type[BaseModel]) -> str:
    """The most telling of pydantic's complaints as one sentence: a misspelt key comes before what it leaves missing.

    Args:
        error: What was raised.
        root: The model that was asked for.
    """
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        message = f"unknown key{suggestion(str(fault['loc'][-1]), _keys_at(fault['loc'][:-1], root))}"
    elif fault["type"] == "missing":
        message = "is missing."
    else:
        message = fault["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:] + ("" if "found" in message else f" (found {fault['input']!r:.60})")
    more = f" ({len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{where}: {message}{more}" if where else f"{message}{more}"


def check_arguments(given: Mapping[str, Any], known: Collection[str], elsewhere: Mapping[str, str]) -> None:
    """Raise ValueError for training arguments that do not exist, or that a recipe says in another place.

    Args:
        given: By name.
        known: Names that there are.
        elsewhere: Why a name cannot be given here.
    """
    for name in given:
        if name in elsewhere:
            raise ValueError(f"{name} cannot be set here: {elsewhere[name]}")
        if name not in known:
            raise ValueError(f"unknown key {name!r}{suggestion(name, known)}")


def settings_of(config: type, elsewhere: Collection[str]) -> frozenset[str]:
    """The names of the fields of a training config that a recipe may set."""
    return frozenset(field.name for field in dataclasses.fields(config) if field.init) - set(elsewhere)


def find_path(value: str, folder: Path) -> str:
    """An existing local path as an absolute one: the current directory's, else the recipe's folder's."""
    for candidate in (Path(value).expanduser(), folder / value):
        if candidate.exists():
            return str(candidate.resolve())
    return value


def _keys_at(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The keys that a model knows at a place in the file."""
    for name in location:
        if isinstance(name, str):
            root = _model_in(root.model_fields[name].annotation) or root
    return list(root.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model that a field holds, itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    return {k: v for key, inner in items for k, v in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()}
