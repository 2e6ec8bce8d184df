"""Models in a form that stock classes do not have: files like any checkpoint's, exact, and never mistaken for a stock one.

A folder has the usual files, its weights under the names that they have in memory, so that a plain `Trainer` resumes from
it. Stock classes would find experts missing there and invent some; so `config.json` names, as the weights file to load,
none but the function to call, and `from_pretrained` of every stock class stops at it with that name in the message. One
that is given another config (`config=`) does not see that; so what it would miss is there as a mark, an empty tensor of its
name, at whose shape it stops (with `ignore_mismatched_sizes=True` as well, transformers makes experts up and lists them).
Other marks name the groups that shared experts are of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from accelerate import init_empty_weights
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from slimmoe_hf.atomic import replacing, write_text
from slimmoe_hf.families import config_from
from slimmoe_hf.shards import SINGLE
from slimmoe_hf.shared_experts import GROUPS, is_shared, keep_space
from slimmoe_hf.weight_dtypes import as_made, loaded_dtypes

GUARD = "transformers_weights"
"""The key of a `config.json` that has stock classes stop."""
_MARK = torch.empty(0, dtype=torch.uint8)


class FormEntry(BaseModel):
    """What `config.json` says of such a checkpoint.

    Attributes:
        architecture: The stock class that the model is one of.
        family: Its model type, where `config.json` has one of ours in its place.
        aliases: Path of a module -> path of the one that it is the same as (experts that were merged).
        version: Of this format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    family: str | None = None
    aliases: dict[str, str] = {}
    version: int = 1


class OwnForm:
    """What a model becomes in such a form: the same class, that saves and loads so.

    Every Trainer's checkpoints are exact then.
    """

    stock: ClassVar[type[PreTrainedModel]]

    def _get_name(self) -> str:
        """The stock class's: by it a Trainer with label smoothing knows whether labels are to be shifted."""
        return stock_of(type(self)).__name__

    def save_form(self, folder: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None) -> None:
        """Write the form."""
        raise NotImplementedError

    @classmethod
    def load_form(cls, folder: str | os.PathLike[str], dtype: str | torch.dtype | None) -> PreTrainedModel:
        """Read the form, ready to be trained."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As every module; marks are passed over, so that a plain `Trainer` resumes.

        Raises:
            ValueError: The weights are of other groups of experts.
        """
        assert isinstance(self, PreTrainedModel)
        _check_groups(state_dict, self.config, type(self).__name__)
        return super().load_state_dict(without_marks(state_dict), *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As the form is saved; other arguments of transformers' (shard size, variant) have no meaning here.

        Raises:
            ValueError: `push_to_hub=True`.
        """
        if push_to_hub:
            raise ValueError(
                f"a {type(self).__name__} is not pushed by save_pretrained: save it, then upload the folder."
            )
        if is_main_process:
            self.save_form(save_directory, state_dict)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        local_files_only: bool = True,
    ) -> Any:
        """As the form is loaded, with the arguments of transformers that apply; always strict."""
        model = cls.load_form(folder, dtype)
        report: dict[str, list[Any]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return (model, report) if output_loading_info else model


_CLASSES: dict[tuple[type[OwnForm], Any], Any] = {}


def class_of(form: type[OwnForm], stock: Any) -> Any:
    """The class of models in a form, for the class that they were of; always the same one.

    Args:
        form: Such as `SharedModel`, whose name tells what is put before the class's.
        stock: A stock class, or one in another form.
    """
    if (form, stock) not in _CLASSES:
        own = {"stock": stock, "__module__": stock.__module__}
        name = f"{form.__name__.removesuffix('Model')}{stock.__name__}"
        _CLASSES[form, stock] = type(name, (form, stock), own)
    return _CLASSES[form, stock]


def stock_of(kind: type[Any]) -> type[PreTrainedModel]:
    """The stock class that a model's class was made from."""
    while issubclass(kind, OwnForm):
        kind = kind.stock
    found: type[PreTrainedModel] = kind
    return found


def write_form(
    model: PreTrainedModel, folder: str | os.PathLike[str], key: str, guard: str, tensors: Mapping[str, Tensor],
    model_type: str | None = None,
) -> None:  # fmt: skip
    """Write a model's config with its guard, its weights and its generation config.

    Args:
        model: Whose config it is. folder: Made if need be; files there are replaced, each in one step.
        key: Of `config.json`, for the entry. guard: What every stock class says to who tries to load it.
        tensors: From `distinct`.
        model_type: To write in place of its own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = model.config.model_type if model_type is not None else None
    entry = FormEntry(architecture=stock_of(type(model)).__name__, family=family, aliases=aliases(model))
    values = model.config.to_dict()
    values |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    values |= {GUARD: guard, key: entry.model_dump(exclude_none=True)}
    values |= {"model_type": model_type} if model_type is not None else {}
    with init_empty_weights():
        stock: Any = stock_of(type(model))(model.config)
    missed = (stock.state_dict().keys() - tensors.keys() - stock.all_tied_weights_keys.keys()) | _groups(model.config)
    written = {name: t.detach().contiguous() for name, t in tensors.items()} | dict.fromkeys(missed, _MARK)
    with replacing(folder / SINGLE, overwrite=True) as partial:
        save_file({name: t.clone() if t is _MARK else t for name, t in written.items()}, partial, {"format": "pt"})
    write_text(folder / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    if isinstance(model.generation_config, GenerationConfig):
        model.generation_config.save_pretrained(str(folder))


def _groups(config: PreTrainedConfig) -> set[str]:
    """Names of the marks of a config's groups."""
    groups = config.to_dict().get(GROUPS, {})
    return {f"{GROUPS}.{layer}.{'-'.join(map(str, owner))}" for layer, owner in groups.items()}


def _check_groups(names: Iterable[str], config: PreTrainedConfig, where: str) -> None:
    """Raise ValueError if marks among the names are of other groups than the config's."""
    found = {name for name in names if name.startswith(f"{GROUPS}.")}
    if found and found != _groups(config):
        raise ValueError(
            f"{where}: these weights are of other groups of experts. Merge with the plan that they are of."
        )


def without_marks(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a file but for those that only mark what stock classes would miss."""
    return {name: t for name, t in tensors.items() if t.shape != _MARK.shape or t.dtype != _MARK.dtype}


def distinct(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the second names of tied weights, and of modules that are one and the same."""
    doubles = tuple(f"{alias}." for alias in aliases(model))
    tied = model.all_tied_weights_keys
    return {name: t for name, t in tensors.items() if not (name in tied or (doubles and name.startswith(doubles)))}


def aliases(model: nn.Module) -> dict[str, str]:
    """Second path -> first path of every module that is in the model twice; of those within it only itself."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        known = first.setdefault(id(module), name)
        has_weights = next(module.parameters(), None) is not None
        if known != name and has_weights and not any(name.startswith(f"{alias}.") for alias in found):
            found[name] = known
    return found


def read_config(
    folder: Path, key: str, what: str, changes: Mapping[str, Any] | None = None
) -> tuple[PreTrainedConfig, FormEntry]:
    """A checkpoint's config, of the stock family, and its entry.

    Args:
        folder: Where it is. key: Of the entry. what: The form, in an error.
        changes: Keys that are to be other than saved.

    Raises:
        ValueError: It is no such checkpoint, or of another version.
    """
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        entry = FormEntry.model_validate(values.pop(key))
        if GROUPS in values:
            values[GROUPS] = {int(layer): [int(e) for e in owner] for layer, owner in values[GROUPS].items()}
    except (OSError, KeyError, AttributeError, ValueError, TypeError, ValidationError) as error:
        raise ValueError(
            f"{folder}: not a {what} checkpoint of this version of slimmoe_hf (config.json lacks a good {key!r}). "
            "Stock ones load with from_pretrained."
        ) from error
    if entry.version != 1:
        raise ValueError(
            f"{folder}: a {what} checkpoint of version {entry.version}; this slimmoe_hf reads 1. Update it."
        )
    values.pop(GUARD, None)
    values["architectures"] = [entry.architecture]
    values["model_type"] = entry.family or values["model_type"]
    return config_from({**values, **(changes or {})}), entry


def skeleton(
    config: PreTrainedConfig, entry: FormEntry, stock: type[PreTrainedModel] | None, folder: Path
) -> PreTrainedModel:
    """The model without weights, its experts shared as the config says; buffers, which no checkpoint holds, are there.

    Args:
        config: From `read_config`. entry: From there too.
        stock: The class that it is one of, where transformers does not have it.
        folder: For errors.

    Raises:
        ValueError: There is no such class, or the config's groups are not of this model.
    """
    found = stock_of(stock) if stock is not None else getattr(transformers, entry.architecture, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"{folder}: transformers has no model {entry.architecture!r}. Pass its class as stock=.")
    with init_empty_weights(include_buffers=False):
        model = found(config)
    if is_shared(config):
        keep_space(model, config.to_dict()[GROUPS])
    return model


def read_tensors(folder: Path, dtype: str | torch.dtype | None, model: PreTrainedModel) -> dict[str, Tensor]:
    """A checkpoint's tensors in memory of their own: where they lie in the file, products would round otherwise.

    Args:
        folder: The checkpoint's.
        dtype: Of all but those that `from_pretrained` would have in another; None leaves each as it was saved.
        model: From `skeleton`.
    """
    file, wanted = folder / SINGLE, getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read ({error}). Fetch or make it again.") from error
    _check_groups(stored, model.config, str(file))
    dtypes = {} if wanted is None else loaded_dtypes(as_made(model, wanted), wanted)
    return {
        name: tensor.to(dtypes.get(name, wanted) if tensor.is_floating_point() else None, copy=True)
        for name, tensor in without_marks(stored).items()
    }


def fill(model: PreTrainedModel, entry: FormEntry, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Give a skeleton its weights, all of them and no others, and its generation config; it is in eval mode then.

    Raises:
        ValueError: The tensors are not exactly this model's.
    """
    try:
        for alias, first in entry.aliases.items():
            model.set_submodule(alias, model.get_submodule(first))
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder}: does not hold the weights of this model: {' '.join(str(error).split())}"
        ) from error
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta] + unexpected
    if left:
        kind = "left over" if left[0] in unexpected else "missing"
        raise ValueError(f"{folder / SINGLE}: {left[0]} is {kind} ({len(left)} such). Fetch or make it again.")
    known = (*model.all_tied_weights_keys, *entry.aliases)
    assert all(name.startswith(known) for name in missing), missing
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    model.eval()
