"""A home of the tests' own, gone with them: nothing is read from the caches and tokens of whoever runs them, nor written there.

Libraries look at these variables when they are imported, so this is imported before any of them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CACHES = {
    "HF_HOME": "huggingface", "TRACKIO_DIR": "trackio", "MPLCONFIGDIR": "matplotlib", "TORCH_EXTENSIONS_DIR": "torch",
    "TRITON_HOME": "triton", "XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config", "XDG_DATA_HOME": "data",
}  # fmt: skip
FOREIGN = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRACKIO_")  # tokens and caches, by old names too
FOLDER = "SLIMMOE_TESTS"


def _made() -> tempfile.TemporaryDirectory[str] | None:
    """The folder, by the process that the others are started from; they find it in the environment."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return None
    folder = tempfile.TemporaryDirectory(prefix="slimmoe-tests-", ignore_cleanup_errors=True)
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    places = {name: str(Path(folder.name, own)) for name, own in CACHES.items()}
    os.environ.update({FOLDER: folder.name, "HF_HUB_OFFLINE": "1", **places})
    return folder


_folder = _made()


def shared_folder() -> Path:
    """What all processes of a run of the tests share."""
    return Path(os.environ[FOLDER])


def remove() -> None:
    """Nothing is left on the disk; only the process that made it does this."""
    if _folder is not None:
        _folder.cleanup()
