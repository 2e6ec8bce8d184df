"""What transformers' auto classes are told of checkpoints with shared experts, as soon as they are there.

`import slimmoe_hf` does not import transformers, so this waits for it: `watch` has `register_config` and `register_models`
called when the modules of the auto classes have been imported, by whomever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, ClassVar

_MEANINGLESS = {
    "adapter_kwargs", "code_revision", "force_download", "ignore_mismatched_sizes", "local_files_only",
    "low_cpu_mem_usage", "max_memory", "offload_folder", "trust_remote_code", "use_safetensors", "weights_only",
    "_from_auto",
}  # fmt: skip
"""Arguments of `from_pretrained` that ask for nothing here."""
_UNMET = {
    "cache_dir", "device_mesh", "distributed_config", "gguf_file", "key_mapping", "offload_buffers", "offload_state_dict",
    "proxies", "state_dict", "subfolder", "tp_plan", "tp_size", "variant",
}  # fmt: skip
"""Those that ask for something which is not done; whatever is not theirs goes into the config, as with stock classes."""


class _Loader:
    """What an auto class finds for such a checkpoint; the models it makes are of classes of their own."""

    kind: ClassVar[str]

    @classmethod
    def from_pretrained(cls, model: Any, *, config: Any, **asked: Any) -> Any:
        """As `shared_checkpoint.load_shared`, with those arguments of transformers that have a meaning here.

        Raises:
            ValueError: As `load_shared`; the checkpoint is of the other kind, or an argument that cannot be met.
        """
        shared = import_module("slimmoe_hf.shared_checkpoint")
        folder = import_module("slimmoe_hf.loading").find_checkpoint(
            str(model), asked.pop("revision", None), token=asked.pop("token", None)
        )
        given = {name: value for name, value in asked.items() if value is not None and name not in _MEANINGLESS}
        dtype, older = given.pop("dtype", None), given.pop("torch_dtype", None)
        place, report = given.pop("device_map", None), given.pop("output_loading_info", False)
        if isinstance(place, dict) and set(place) != {""}:
            raise ValueError(f"{folder}: a model with shared experts goes to one device: device_map={place!r}.")
        if "quantization_config" in given:
            raise ValueError(
                f"{folder}: a model with shared experts is not quantised while it loads. Make a stock one first: slimmoe "
                f"export {folder} --form duplicate --output OUT"
            )
        if unmet := sorted(given.keys() & _UNMET):
            raise ValueError(f"{folder}: a model with shared experts takes no {', '.join(unmet)}. Leave it out.")
        dtype = dtype or older
        loaded = shared.load_shared(
            folder, dtype=None if dtype == "auto" else dtype, changes={**_changes(config, folder), **given}
        )
        if not type(loaded).__name__.endswith(cls.kind):
            other = "Seq2SeqLM" if loaded.config.is_encoder_decoder else "CausalLM"
            raise ValueError(f"{folder}: a {type(loaded).__name__}; load it with AutoModelFor{other}.")
        if place is not None:
            place = place[""] if isinstance(place, dict) else place
            loaded.to(_device() if place in ("auto", "balanced", "sequential") else place)
        nothing: dict[str, list[Any]] = {
            "missing_keys": [],
            "unexpected_keys": [],
            "mismatched_keys": [],
            "error_msgs": [],
        }
        return (loaded, nothing) if report else loaded


def _changes(config: Any, folder: Any) -> dict[str, Any]:
    """What is otherwise in the config that an auto class hands over than in the folder's."""
    ours, theirs = config.to_dict(), type(config).from_pretrained(folder).to_dict()
    chosen = {
        "attn_implementation": config._attn_implementation,
        "experts_implementation": config._experts_implementation,
    }
    found = {name: value for name, value in ours.items() if theirs.get(name) != value and name != "dtype"}
    return {**found, **{name: value for name, value in chosen.items() if value is not None}}


def _device() -> str:
    return "cuda" if import_module("torch").cuda.is_available() else "cpu"


class SharedForCausalLM(_Loader):
    """Of decoders."""

    kind = "ForCausalLM"


class SharedForConditionalGeneration(_Loader):
    """Of encoder-decoders."""

    kind = "ForConditionalGeneration"


def register_config() -> None:
    """Have `AutoConfig` know the model type."""
    ours = import_module("slimmoe_hf.shared_config")
    auto: Any = import_module("transformers.models.auto.configuration_auto").AutoConfig
    auto.register(ours.SHARED, ours.SharedConfig, exist_ok=True)


def register_models() -> None:
    """Have `AutoModelForCausalLM` and `AutoModelForSeq2SeqLM` know who loads it."""
    ours = import_module("slimmoe_hf.shared_config").SharedConfig
    auto: Any = import_module("transformers.models.auto.modeling_auto")
    auto.AutoModelForCausalLM.register(ours, SharedForCausalLM, exist_ok=True)
    auto.AutoModelForSeq2SeqLM.register(ours, SharedForConditionalGeneration, exist_ok=True)


_AFTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_config,
    "transformers.models.auto.modeling_auto": register_models,
}


class _Watch(MetaPathFinder):
    """Finds the modules of the auto classes as ever, and has something done once they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The ordinary spec."""
        if fullname not in _AFTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run, then = spec.loader.exec_module, _AFTER[fullname]

            def exec_module(module: ModuleType) -> None:
                run(module)
                then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Register now what can be, and the rest when transformers is imported."""
    for name, register in _AFTER.items():
        if name in sys.modules:
            register()
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
