"""Open checkpoints: find them, check their files before trusting them, load them whole, hash them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, StrictDataclassError  # type: ignore[attr-defined]
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from slimmoe_hf.disk import auto_class, locate
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.free_memory import free_memory
from slimmoe_hf.own_form import read_config
from slimmoe_hf.shards import INDEX, SINGLE, Stored, all_finite, read_header, read_tensor
from slimmoe_hf.shared_checkpoint import load_shared
from slimmoe_hf.shared_config import SHARED
from slimmoe_hf.shared_experts import is_shared

_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
FACTORED = "slimmoe_factored"
"""The key of a `config.json` that says that a checkpoint's experts are factored (`factored_checkpoint` writes it)."""
DEVICE_SHARE = 0.85  # of a GPU's free memory that weights may take; the rest is for what is computed


def find_checkpoint(
    model: str, revision: str | None = None, weights: bool = True, token: str | bool | None = None
) -> Path:
    """The local folder of a checkpoint; a Hub id is downloaded (weights as safetensors only).

    Args:
        model: A folder or a Hub id.
        revision: A commit, tag or branch of the Hub id.
        weights: Download the weights too; without them the folder has config, tokenizer and index.
        token: For the Hub, where the one that is logged in with will not do.

    Raises:
        ValueError: It is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"{model}: no such folder. A model is the folder of a checkpoint, or a Hub id.")
    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=[*_SMALL, *(["*.safetensors"] if weights else [])], token=token
            )
        )
    except (OSError, HTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{model}: no such folder here, and the Hub did not give it: {reason}") from error


def verify_checkpoint(path: Path, finite: bool = True, shared: bool = False) -> None:
    """Check every file of a checkpoint that a load would trust, one tensor at a time, and that no weight is missing.

    Args:
        path: Its folder.
        finite: Also read every tensor and refuse NaN and infinity.
        shared: As in `load_config`.

    Raises:
        ValueError: One line that names the file or tensor and what is wrong with it.
    """
    config = load_config(path, shared)
    stored = {name: tensor for file in weight_files(path) for name, tensor in read_header(file).items()}
    if config.model_type in FAMILIES and not is_shared(config):
        locate(config, stored, str(path))
    else:
        load_model(path)  # raises where a weight is missing
    if finite:
        for tensor in stored.values():
            if tensor.bytes:
                _verify_finite(path, tensor)
    load_tokenizer(path)


def form_of(path: Path) -> str | None:
    """Which form of our own a checkpoint has, by its key in `config.json`: `FACTORED` or `SHARED`; None for a stock one."""
    values = _read_json(path / "config.json")
    if not isinstance(values, dict):
        raise ValueError(f"{path / 'config.json'}: not a model's config: expected a JSON object.")
    return next((key for key in (FACTORED, SHARED) if key in values), None)


def load_config(path: Path, shared: bool = False) -> PreTrainedConfig:
    """A checkpoint's config.

    Args:
        path: Its folder.
        shared: Its experts may be merged and shared; its `expert_groups` say how, and it is of the stock family.

    Raises:
        ValueError: It is missing, not JSON, not a config that transformers knows, or of a form that is not taken.
    """
    file, form = path / "config.json", form_of(path)
    if form == FACTORED:
        raise ValueError(
            f"{path}: its experts are factored, and this takes stock checkpoints. Make one of it with: slimmoe export {path} "
            "--form dense --output OUT"
        )
    if form == SHARED and not shared:
        raise ValueError(
            f"{path}: its experts are merged and shared, and this takes stock checkpoints. Make one of it with: slimmoe "
            f"export {path} --form duplicate --output OUT"
        )
    try:
        if form == SHARED:
            return read_config(path, SHARED, "shared")[0]
        return AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, StrictDataclassError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())[:200]}") from error


def load_tokenizer(path: Path) -> Tokenizer:
    """A checkpoint's tokenizer.

    Raises:
        ValueError: It has none, or a broken one.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (path / name).exists():
            _read_json(path / name)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{path}: no usable tokenizer: copy tokenizer.json and tokenizer_config.json there."
        ) from error


def load_model(
    path: Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    whole: bool = False,
    room: int | None = None,
) -> PreTrainedModel:
    """Load a checkpoint with plain transformers, in eval mode, and insist that every weight came from its files.

    A model larger than the GPU is for forward passes: what does not fit stays in host memory, and accelerate brings it
    over layer by layer.

    Args:
        path: Its folder.
        dtype: Of the loaded weights.
        device: Where it computes.
        whole: All of it on the device, or not at all: what is to have gradients is not spread.
        room: Bytes of weights that may lie on a GPU; None is most of what is free there.

    Raises:
        ValueError: A weight is missing (transformers would invent it), left over, or of another shape.
    """
    config = load_config(path, shared=True)
    if is_shared(config):
        shared: Any = load_shared(path, dtype=dtype)
        return shared.to(device)  # type: ignore[no-any-return]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    spread = {} if whole else _spread(path, dtype, torch.device(device), room)
    try:
        loaded: Any = auto_class(config).from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **spread
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: does not load: {' '.join(str(error).split())[:200]}") from error
    finally:
        logging.set_verbosity(verbosity)
    model, found = loaded
    for kind, remedy in (
        ("missing_keys", "is not in the weight files"),
        ("mismatched_keys", "has another shape there"),
    ):
        if found[kind]:
            name = sorted(map(str, found[kind]))[0]
            raise ValueError(f"{path}: {name} {remedy} ({len(found[kind])} such). Fetch the checkpoint again.")
    return (model if spread else model.to(device)).eval()


def _spread(path: Path, dtype: str | torch.dtype, device: torch.device, room: int | None) -> dict[str, Any]:
    """Arguments that leave a part of a large model in host memory; none where all of it fits."""
    if device.type != "cuda":
        return {}
    width = (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
    tensors = [tensor for file in weight_files(path) for tensor in read_header(file).values()]
    needed = sum(math.prod(tensor.shape) * width for tensor in tensors)
    room = int(torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE) if room is None else room
    if needed <= room:
        return {}
    return {"device_map": "auto", "max_memory": {device.index or 0: room, "cpu": free_memory()}}


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order.

    Raises:
        ValueError: There are none, or the index names one that is missing or outside the folder.
    """
    index = path / INDEX
    if not index.exists():
        if (path / SINGLE).is_file():
            return [path / SINGLE]
        raise ValueError(f"{path}: no {SINGLE} and no {INDEX}. Pickled weights are not read: convert them.")
    weight_map = read_index(path)
    files: dict[Path, str] = {}
    for tensor, name in weight_map.items():
        files.setdefault(path / name, tensor)
    for file, tensor in files.items():
        if not file.is_file():
            raise ValueError(f"{file}: missing, but the index says that it holds {tensor}. Fetch it again.")
    for file in files:
        promised = {tensor for tensor, name in weight_map.items() if name == file.name}
        if absent := promised - read_header(file).keys():
            raise ValueError(f"{file}: lacks {min(absent)}, which the index says it holds. Fetch it again.")
    return sorted(files)


def read_index(path: Path) -> dict[str, str]:
    """In which file each tensor of a sharded checkpoint is, as its index says; the files need not be there.

    Raises:
        ValueError: The index says nothing, or points outside the folder.
    """
    index = path / INDEX
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map, so it does not say where the weights are.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: {tensor} points outside the folder ({name}); refused.")
    return weight_map


def weights_sha256(path: Path) -> str:
    """SHA-256 of a checkpoint's weight files: `cat *.safetensors | sha256sum` in its folder gives the same."""
    return files_sha256(weight_files(path))


def files_sha256(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of some files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def weight_bytes(path: Path) -> int:
    """Size of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in weight_files(path))


def _verify_finite(path: Path, stored: Stored) -> None:
    if not all_finite(tensor := read_tensor(path, stored)):
        bad = int((~torch.isfinite(tensor.float())).sum())
        raise ValueError(
            f"{path / stored.file}: {stored.name} holds {bad} values that are not finite. Fetch or make it again."
        )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: missing. A checkpoint needs it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}).") from None
