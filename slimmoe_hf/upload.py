"""A folder onto the Hub: which of its files may leave the machine, and one commit that shows all of them at once.

`upload_folder` of huggingface_hub commits in several parts where its fast storage is installed, so that a push cut short
leaves half a model to be seen. `create_commit` brings the large files first, where nobody sees them, and then commits
once: before it the repository is what it was, after it whole, and the same push again sends only what is missing.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from slimmoe_hf.card import images_of
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.lineage import CARD, is_hub_id, public_name
from slimmoe_hf.loading import weight_files
from slimmoe_hf.serving import serving_config
from slimmoe_hf.shards import INDEX, read_header

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# What a published folder may hold beside its weights: a list of what goes, so that nothing goes by accident.
_PUBLISHED = (
    "config.json", "generation_config.json", ADAPTER_CONFIG, "tokenizer.json", "tokenizer_config.json", "vocab.*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken", "*.jinja",
    "additional_chat_templates/*.jinja", CARD, "LICENSE*", "NOTICE*", "recipe.yaml", "report.json",
    "plan/plan.json", "plan/plan.safetensors", "plan/repairs.safetensors", "plans/*/plan.json", "plans/*/plan.safetensors",
    "images/*.png", ".eval_results/*.yaml",
)  # fmt: skip
# What a Trainer that pushed before may have left there, and no model needs: older shards, and pickles.
_STALE = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.pkl")
_KEPT = ".gitattributes"  # the Hub's own
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
_TEXT_LIMIT = 1 << 26
_LOCAL_KEYS = ("_name_or_path", "name_or_path")

Content = Path | bytes
"""A file's contents, or where they lie."""


@dataclass(frozen=True)
class Pushed:
    """What became of a push.

    Attributes:
        url: Where to look at it.
        commit: Its id.
        changed: False where the repository held exactly these files already.
    """

    url: str
    commit: str
    changed: bool


@dataclass(frozen=True)
class _Held:
    """What a branch holds: its last commit, and size, Git's blob id and SHA-256 (of large files) of every file."""

    commit: str
    private: bool
    files: dict[str, tuple[int | None, str | None, str | None]]

    def same(self, name: str, operation: CommitOperationAdd) -> bool:
        if name not in self.files:
            return False
        size, blob, sha256 = self.files[name]
        if size != operation.upload_info.size:
            return False
        return operation.upload_info.sha256.hex() == sha256 if sha256 is not None else _blob_id(operation) == blob


def publishable(folder: Path) -> dict[str, Path]:
    """The files of a model's or adapter's folder that may be published, by their name in the repository.

    Weights as safetensors, config, tokenizer, card with its images, licence, plans, recipe and report. Pickles, training
    arguments, optimizer states and checkpoints are no part of a model and stay where they are.

    Args:
        folder: Of a checkpoint, or of a PEFT adapter.

    Raises:
        ValueError: It is neither; or a file of the checkpoint is missing.
    """
    if (folder / ADAPTER).is_file() and (folder / ADAPTER_CONFIG).is_file():
        weights = [folder / ADAPTER]
    elif (folder / "config.json").is_file():
        weights = weight_files(folder)
    else:
        raise ValueError(
            f"{folder}: holds no model: no config.json with weights, and no adapter. Name the folder of one."
        )
    found = {file.name: file for file in weights}
    if len(weights) > 1:
        found[INDEX] = folder / INDEX
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(folder).as_posix()
        if any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in _PUBLISHED):
            found[name] = file
    if CARD in found:
        for image in images_of(found[CARD].read_text(encoding="utf-8")):
            if (folder / image).is_file() and ".." not in Path(image).parts and not Path(image).is_absolute():
                found[image] = folder / image
    return dict(sorted(found.items()))


def public_form(files: Mapping[str, Path], folder: Path, base_model: str | None = None) -> dict[str, Content]:
    """Files as others may see them: without names of places on this machine, a config in the form that engines expect.

    Args:
        files: From `publishable`; they are only read.
        folder: Where they lie.
        base_model: The Hub id that an adapter is to name.

    Raises:
        ValueError: It is an adapter that names its model by a local path, and `base_model` is not given.
    """
    if ADAPTER in files and base_model is None:
        origin = json.loads(files[ADAPTER_CONFIG].read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not is_hub_id(str(origin or "")):
            raise ValueError(
                f"{files[ADAPTER_CONFIG]}: names its model by a path of yours ({public_name(str(origin or ''))}), which "
                "nobody else has. Give its id on the Hub (slimmoe push --base-model), or merge the adapter and push the "
                "whole model."
            )
    return {
        name: _public_json(name, file, folder, base_model)
        if name.endswith(".json") and file.stat().st_size < 1 << 20
        else file
        for name, file in files.items()
    }


def _public_json(name: str, file: Path, folder: Path, base_model: str | None) -> Content:
    values: Any = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        return file
    before = json.dumps(values)
    for key in _LOCAL_KEYS:
        if isinstance(values.get(key), str) and not is_hub_id(values[key]):
            del values[key]
    if name == ADAPTER_CONFIG and base_model is not None:
        values["base_model_name_or_path"] = base_model
    if name == "config.json" and values.get("model_type") in FAMILIES:
        biases = {key: values[key] for key in ("attention_bias", "lm_head_bias") if key in values}
        values = serving_config(values)
        stored = {tensor for shard in weight_files(folder) for tensor in read_header(shard)}
        if not any(tensor.endswith("lm_head.bias") for tensor in stored):
            values |= biases  # the weights lack them, and a config that promises them would not load
    if name == "plan/plan.json" and isinstance(values.get("request"), dict):
        teacher = values["request"].get("teacher_model")
        values["request"]["teacher_model"] = public_name(teacher) if isinstance(teacher, str) else teacher
    return file if json.dumps(values) == before else (json.dumps(values, indent=2) + "\n").encode()


def check_repo(repo: str) -> None:
    """Raise ValueError unless a repository is named as `owner/name`, in letters that the Hub allows."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo}: not a name that the Hub takes: {_line(error)}") from None
    if repo.count("/") != 1:
        raise ValueError(f"{repo}: say whose it is to be: owner/{repo}, with your name or an organisation of yours.")


def refuse_secrets(files: Mapping[str, Content], token: str | None = None) -> None:
    """Look for access tokens in everything that is text.

    Raises:
        ValueError: There is one; the line says where, and not what.
    """
    own = (token or "").encode()
    for name, content in files.items():
        if name.endswith((".safetensors", ".png", ".model")) or (
            isinstance(content, Path) and content.stat().st_size > _TEXT_LIMIT
        ):
            continue
        text = content.read_bytes() if isinstance(content, Path) else content
        if (own and own in text) or _TOKEN.search(text):
            raise ValueError(f"{name}: holds an access token, which would be public. Take it out, then push again.")


def push_files(
    files: Mapping[str, Content],
    repo: str,
    *,
    message: str,
    private: bool | None = None,
    branch: str | None = None,
    existing: Literal["refuse", "replace", "update"] = "refuse",
    token: str | None = None,
) -> Pushed:
    """Bring files to a model repository in one commit, and compare what the Hub then reports with what is here.

    Args:
        files: Contents by name in the repository.
        repo: `owner/name`; it is made if there is none.
        message: Of the commit.
        private: Make it private; refused where it exists and is public.
        branch: Where to commit; None is `main`. A new branch holds these files only.
        existing: What to do about other files there: `refuse` them, `replace` everything, or `update`: add these, and
            delete older weights and pickles.
        token: Access token; None takes `HF_TOKEN` or that of `hf auth login`.

    Raises:
        ValueError: One line with the remedy: no token or a wrong one, no network, a name or a card that the Hub does not
            take, other files there, no right to write, no space left, or files that arrived differently.
    """
    check_repo(repo)
    api = HfApi(token=token)
    with _plainly(repo, api.endpoint, token):
        token = token or get_token()
        if token is None:
            raise ValueError(
                f"{repo}: no access token. Make one that may write at {api.endpoint}/settings/tokens, then set HF_TOKEN or "
                "run `hf auth login`."
            )
        refuse_secrets(files, token)
        api.whoami(token=token)
        operations = {name: CommitOperationAdd(name, content) for name, content in files.items()}
        held, own = _look(api, repo, branch)
        if held is not None and private and not held.private:
            raise ValueError(
                f"{repo}: is there already, and public. Make it private in its settings, or push elsewhere."
            )
        url = f"{api.endpoint}/{repo}" + (f"/tree/{branch}" if branch else "")
        if held is not None and own and _differences(operations, held) == []:
            return Pushed(url, held.commit, changed=False)
        if held is not None and own and existing == "refuse":
            _refuse_others(repo, operations, held)
        if held is None:
            api.create_repo(repo, private=private, exist_ok=True)
            held, own = _look(api, repo, branch)
        assert held is not None
        if branch is not None:
            api.preupload_lfs_files(repo, operations.values(), free_memory=False)  # cut short, there is no branch yet
            api.create_branch(repo, branch=branch, exist_ok=True)
        stale = _to_delete(operations, held, "replace" if not own else existing)
        commit = api.create_commit(
            repo, [*map(CommitOperationDelete, stale), *operations.values()], commit_message=message, revision=branch,
            parent_commit=held.commit,
        )  # fmt: skip
        arrived = _held(api, repo, commit.oid)
    if wrong := [name for name, operation in operations.items() if not arrived.same(name, operation)]:
        raise ValueError(f"{repo}: {wrong[0]} arrived differently from what is here. Push again.")
    return Pushed(url, commit.oid, changed=True)


def _look(api: HfApi, repo: str, branch: str | None) -> tuple[_Held | None, bool]:
    """What a branch holds, and whether it is its own: one that is not there yet will hold what main does."""
    try:
        main = _held(api, repo, None)
    except RepositoryNotFoundError:
        return None, False
    if branch in (None, "main"):
        return main, True
    try:
        return _held(api, repo, branch), True
    except RevisionNotFoundError:
        return main, False


def _held(api: HfApi, repo: str, revision: str | None) -> _Held:
    info = api.model_info(repo, revision=revision, files_metadata=True)
    files = {
        file.rfilename: (file.size, file.blob_id, file.lfs.sha256 if file.lfs is not None else None)
        for file in info.siblings or []
        if file.rfilename != _KEPT
    }
    return _Held(str(info.sha), bool(info.private), files)


def _differences(operations: Mapping[str, CommitOperationAdd], held: _Held) -> list[str]:
    """Names of files that are only here, only there, or not the same."""
    return [
        name
        for name in sorted(operations.keys() | held.files.keys())
        if name not in operations or not held.same(name, operations[name])
    ]


def _refuse_others(repo: str, operations: Mapping[str, CommitOperationAdd], held: _Held) -> None:
    others = [name for name in _differences(operations, held) if name in held.files]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"{repo}: is there already and holds other files ({others[0]}{more}). Push to another name, or give --overwrite "
            "to replace all that it holds."
        )


def _to_delete(operations: Mapping[str, CommitOperationAdd], held: _Held, existing: str) -> list[str]:
    others = [name for name in held.files if name not in operations]
    if existing == "replace":
        return others
    return [name for name in others if "/" not in name and any(fnmatch.fnmatchcase(name, kind) for kind in _STALE)]


def _blob_id(operation: CommitOperationAdd) -> str:
    """Git's id of a file's contents."""
    with operation.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def _plainly(repo: str, endpoint: str, token: str | None) -> Iterator[None]:
    """Turn what goes wrong between here and the Hub into one line with the remedy, and without the token."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise ValueError(f"{repo}: HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it to push.") from None
    except (HTTPError, OSError, RuntimeError) as error:
        cause: Any = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        reason = _reason(repo, endpoint, cause)
        secret = token or get_token()
        raise ValueError(reason.replace(secret, "***") if secret else reason) from None


def _reason(repo: str, endpoint: str, error: BaseException) -> str:
    if not isinstance(error, HfHubHTTPError):
        return (
            f"{repo}: {endpoint} could not be reached or broke off ({_line(error)}). Look at the network; the same command "
            "goes on."
        )
    status, said = error.response.status_code, error.response.headers.get("X-Error-Message") or _line(error)
    if status == 401:
        return (
            f"{repo}: {endpoint} does not know this access token. Make one that may write at {endpoint}/settings/tokens, then "
            "set HF_TOKEN (which wins) or run `hf auth login`."
        )
    if status in (402, 403, 413, 507):
        return (
            f"{repo}: the Hub refused ({said}). Use a token that may write to {repo.split('/')[0]}, or make room; the same "
            "command goes on."
        )
    if status in (409, 412):
        return f"{repo}: somebody else changed it meanwhile ({said}). Look at it, then give the same command again."
    if status == 429:
        return f"{repo}: the Hub has had too many requests ({said}). Wait a while; the same command goes on."
    return f"{repo}: the Hub answered {status} ({said}). The same command goes on where this one stopped."


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
