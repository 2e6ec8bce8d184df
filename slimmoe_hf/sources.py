"""Where a checkpoint's files come from: a folder, or the Hub, one shard at a time."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError, NotASafetensorsRepoError, SafetensorsParsingError  # type: ignore[attr-defined]
from huggingface_hub.utils import SafetensorsFileMetadata
from rich import get_console
from rich.progress import track

from slimmoe_hf.loading import find_checkpoint, read_index, weight_files
from slimmoe_hf.shards import INDEX, Stored, read_header

_AT_ONCE = 8  # headers, each a small answer of the Hub that takes a while


class LocalSource:
    """The folder of a checkpoint.

    Attributes:
        folder: Where its files are.
        name: What the user calls it.
        revision: None: a folder has no revisions.
        deletes: Whether shards are downloaded beside the output and deleted when they are read.
    """

    revision: str | None = None
    deletes = False

    def __init__(self, folder: Path) -> None:
        """Take a folder as it is."""
        self.folder = folder
        self.name = str(folder)

    def stored(self) -> dict[str, Stored]:
        """Every tensor of its weight files.

        Raises:
            ValueError: A file is missing, cut short, no safetensors file or outside the folder.
        """
        return {name: tensor for file in weight_files(self.folder) for name, tensor in read_header(file).items()}

    def fetch(self, file: str) -> Path:
        """The folder in which a weight file lies."""
        return self.folder

    def release(self, file: str) -> None:
        """Nothing: a user's own files are never deleted."""


class HubSource:
    """A checkpoint on the Hub, at one commit; its shards are downloaded when they are read.

    Attributes:
        folder: Its small files (config, tokenizer, index), in the Hub's cache.
        name: Its id. revision: The commit.
        deletes: As of `LocalSource`.
    """

    def __init__(self, name: str, revision: str | None, shards: Path | None = None) -> None:
        """Resolve the revision and download the small files.

        Args:
            name: The Hub id.
            revision: A commit, tag or branch.
            shards: Where shards go, to be deleted once they are read; None leaves them in the Hub's cache.

        Raises:
            ValueError: There is no such model, or the Hub cannot be reached.
        """
        self.name, self._shards, self.deletes = name, shards, shards is not None
        try:
            info = HfApi().model_info(name, revision=revision)
            self.revision = str(info.sha)
            self.folder = find_checkpoint(name, self.revision, weights=False)
        except (OSError, HTTPError, HFValidationError) as error:
            raise ValueError(f"{name}: the Hub did not give it: {str(error).strip().splitlines()[0]}") from error

    def stored(self) -> dict[str, Stored]:
        """Every tensor of its weight files, from their headers alone; their places count from the header's end.

        Raises:
            ValueError: It has no safetensors files, or the Hub cannot be reached.
        """
        try:
            files = self._headers()
        except (OSError, HTTPError, ValueError, NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise ValueError(f"{self.name}: no safetensors to be had: {str(error).strip().splitlines()[0]}") from error
        return {
            name: Stored(name, file, tensor.dtype, tuple(tensor.shape), *tensor.data_offsets)
            for file, metadata in files.items()
            for name, tensor in metadata.tensors.items()
        }

    def _headers(self) -> dict[str, SafetensorsFileMetadata]:
        """What weight files say of themselves: those of the index, as `weight_files` has it; the Hub's client prefers
        a single file, which a repository may have beside its shards."""
        if not (self.folder / INDEX).exists():
            return HfApi().get_safetensors_metadata(self.name, revision=self.revision).files_metadata
        names = sorted(set(read_index(self.folder).values()))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            read = partial(HfApi().parse_safetensors_file_metadata, self.name, revision=self.revision)
            return dict(zip(names, pool.map(read, names), strict=True))

    def missing(self) -> dict[str, int]:
        """Weight files that are not in the Hub's cache, and their sizes, from their headers.

        Raises:
            ValueError: As `stored`.
        """
        if has_weights(self.folder):
            return {}
        sizes = Counter[str]()
        for tensor in self.stored().values():
            sizes[tensor.file] += tensor.bytes
        return {file: size for file, size in sorted(sizes.items()) if not (self.folder / file).is_file()}

    def fetch(self, file: str) -> Path:
        """Download a weight file, if it is not here yet; the folder in which it lies.

        Raises:
            ValueError: It cannot be downloaded.
        """
        try:
            if self._shards is None:
                return Path(hf_hub_download(self.name, file, revision=self.revision)).parent
            return Path(hf_hub_download(self.name, file, revision=self.revision, local_dir=self._shards)).parent
        except (OSError, HTTPError) as error:
            raise ValueError(
                f"{self.name}: {file} could not be downloaded: {str(error).strip().splitlines()[0]} "
                "The same command continues."
            ) from error

    def release(self, file: str) -> None:
        """Delete a downloaded weight file, if that was asked for."""
        if self._shards is not None:
            (self._shards / file).unlink(missing_ok=True)


def open_source(model: str, revision: str | None = None, shards: Path | None = None) -> LocalSource | HubSource:
    """A checkpoint by folder or Hub id. Without a network, what the Hub's cache holds whole will do.

    Args:
        model: A folder or a Hub id.
        revision: Of the Hub id.
        shards: As `HubSource`; only a Hub id's downloads can be deleted.

    Raises:
        ValueError: There is no such checkpoint; or a folder's own shards were to be deleted.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if shards is not None:
            raise ValueError(
                f"{model}: is a folder of yours, and only downloads are deleted. Leave --delete-source-shards out."
            )
        return LocalSource(path.resolve())
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        return LocalSource(find_checkpoint(model))  # which says what is wrong with it
    try:
        return HubSource(model, revision, shards)
    except ValueError:
        if shards is not None:
            raise
        return LocalSource(find_checkpoint(model, revision))


def has_weights(folder: Path) -> bool:
    """Whether all weight files of a checkpoint are in its folder."""
    try:
        return bool(weight_files(folder))
    except ValueError:
        return False


def arrived(folder: Path) -> int:
    """Bytes of the weight files in a folder, whether they are all of a checkpoint's or not."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def fetch_weights(*sources: LocalSource | HubSource) -> list[Path]:
    """Bring checkpoints here that are to be read more than once: from the Hub into its cache, a shard after the other.

    Says first how much that is. A shard that is here is not fetched again, so a killed call continues.

    Returns:
        Their folders.

    Raises:
        ValueError: As `HubSource.stored` and `HubSource.fetch`; or the disk of the cache has no room for what is missing.
    """
    wanted = {(source.name, source.revision): source for source in sources if isinstance(source, HubSource)}
    missing = {key: source.missing() for key, source in wanted.items()}
    needed, cache = sum(sum(sizes.values()) for sizes in missing.values()), Path(constants.HF_HUB_CACHE).absolute()
    free = psutil.disk_usage(str(next(place for place in (cache, *cache.parents) if place.is_dir()))).free
    if needed > free:
        raise ValueError(
            f"{cache}: {' and '.join(name for name, _ in wanted)} take {needed / 1e9:,.1f} GB more there, and the disk has "
            f"{free / 1e9:,.1f} GB free. Free some, or set HF_HOME to a place on a larger disk."
        )
    for (name, commit), sizes in missing.items():
        if sizes:
            get_console().log(
                f"{name} at {commit}: {sum(sizes.values()) / 1e9:,.2f} GB to download, {len(sizes)} files one after the other, "
                f"to {cache}; killed, the same command continues",
                markup=False,
            )
        for file in track(sizes, "Downloading", disable=not get_console().is_terminal, transient=True):
            wanted[name, commit].fetch(file)
    return [source.folder for source in sources]
