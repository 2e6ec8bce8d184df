"""What a model was made from, as far as others may know it: its name, its licence, the files that go where it goes."""

from __future__ import annotations

import getpass
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id
from rich import get_console

from slimmoe_hf.loading import find_checkpoint

CARD = "README.md"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class Base:
    """The model that another was made from, as far as others may know it.

    Attributes:
        name: What to call it: its Hub id, or the name of a local one.
        hub_id: Its id on the Hub; None for a local model.
        license, license_name, license_link: As its own card says; None where that is not known.
        languages: Likewise.
    """

    name: str
    hub_id: str | None = None
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: list[str] = field(default_factory=list)

    def licensed(self, license: str | None) -> Base:
        """With a licence that the user names instead of its own, where one is named.

        Raises:
            ValueError: It is not written as the Hub writes licences.
        """
        if license is None:
            return self
        if not _LICENSE.fullmatch(license):
            raise ValueError(
                f"license {license!r}: not an id such as apache-2.0, mit or other. The Hub lists them all."
            )
        return replace(self, license=license, license_name=None, license_link=None)


def read_base(name: str, hub_id: str | None, card: Path | None) -> Base:
    """What the card of a model says of its licence and languages.

    Args:
        name: What to call the model; a card that names a local model wins over it.
        hub_id: Its id on the Hub.
        card: Its README.md, if there is one. One without readable metadata says nothing.
    """
    try:
        found = (metadata_load(card) if card is not None and card.is_file() else None) or {}
    except (ValueError, yaml.YAMLError):
        found = {}
    named = found.get("model_name")
    languages = found.get("language", [])
    spoken = [
        language for language in (languages if isinstance(languages, list) else [languages]) if language is not None
    ]
    link = found.get("license_link")
    if hub_id is not None and isinstance(link, str) and "://" not in link:
        link = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return Base(
        name=hub_id or (named if isinstance(named, str) and named else name), hub_id=hub_id,
        license=found.get("license"), license_name=found.get("license_name"), license_link=link,
        languages=["no" if language is False else str(language) for language in spoken],  # YAML reads Norwegian as no
    )  # fmt: skip


def is_hub_id(name: str) -> bool:
    """Whether a name can only be an id on the Hub: `owner/name`, and nothing here is called so."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists()


def public_name(name: str) -> str:
    """A model, file or dataset as strangers may see it: Hub ids as they are, of a local path its last name.

    Where that is `model`, as our own tools call it, its parent's says more, unless that is the user's. No name has a
    slash: it would pass for an id on the Hub.
    """
    if is_hub_id(name) or ("/" not in name and "\\" not in name):
        return name
    path = Path(name)
    private = {getpass.getuser(), Path.home().name, "", "/", ".", ".."}
    if path.name == "model" and path.parent.name not in private:
        return path.parent.name
    return path.name or "model"


def find_base(
    model: str,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    quiet: bool = False,
) -> tuple[Base, Path | None]:
    """What is known of the model that another was made from, and its folder, where its files are at hand.

    Args:
        model: How the run, or the config, names it: a folder or a Hub id.
        revision: Of a Hub id.
        base_model: The Hub id that the user names instead.
        license: The licence that the user names instead of its own.
        quiet: Ask the Hub's cache only, and do not say on the console what is not known.

    Raises:
        ValueError: `base_model` is no Hub id, or `license` not written as one.
    """
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(f"base model {base_model!r}: not an id on the Hub, such as microsoft/Phi-3.5-MoE-instruct.")
    hub_id = base_model or (model if is_hub_id(model) else None)
    local = Path(model).expanduser()
    folder: Path | None = local if local.is_dir() else None
    readme = local / CARD
    if folder is None and hub_id is not None:
        try:
            revision = revision if hub_id == model else None
            readme = Path(hf_hub_download(hub_id, CARD, revision=revision, local_files_only=quiet))
            folder = find_checkpoint(hub_id, revision, weights=False) if not quiet else None
        except (OSError, HTTPError, HFValidationError, ValueError):
            pass  # without a network its licence is not known, which the card says
    base = read_base(public_name(model), hub_id, readme).licensed(license)
    if base.license is None and not quiet:
        get_console().print(
            f"no licence is known of {base.name}, so the card names none; --license names one",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    return base, folder


def licence_files(folder: Path | None) -> list[Path]:
    """The licence and notice files of the original model, which go where its weights go."""
    found = [file for file in folder.iterdir() if file.is_file()] if folder is not None else []
    return [file for file in found if file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))]
