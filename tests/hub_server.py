"""The Hub's HTTP interface, reading and pushing, over a folder of repositories, in a process of its own.

python tests/hub_server.py ROOT

It takes a free port and prints it.

A repository is ROOT/owner/name, as `main` has it: put a folder there and it can be read. Other branches, uploaded but
uncommitted objects and what is known of repositories lie under ROOT/.hub. Every GET of a file is a line in
ROOT/requests.log, every commit a line in ROOT/commits.log.

Anyone may read, and without users.json any token may write for any owner. ROOT/users.json says otherwise:
`{sha256 of a token: {"name": "me", "role": "write"}}`. Three files make it misbehave: ROOT/stall, with a number in it,
stops the reading of every upload after so many bytes until the file is gone; ROOT/full has it answer that the space is
used up; ROOT/corrupt has it spoil large files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".pt")
REGULAR_LIMIT = 10_000_000
RELATIONS = ("adapter", "merge", "quantized", "finetune")
SCAN = 1 << 20


class RefusedError(Exception):
    """An answer that is not 2xx: status, X-Error-Code, message; of a repository that is there, its name."""


class Store:
    """Repositories on disk: one folder a branch, whose commit id is a hash of its contents."""

    def __init__(self, root: Path) -> None:
        self.root, self.hidden = root, root / ".hub"
        self._digests: dict[tuple[str, int, int], tuple[str, str]] = {}

    def branches(self, name: str) -> dict[str, Path]:
        """The folders of a repository's branches."""
        if not (self.root / name).is_dir():
            raise RefusedError(404, "RepoNotFound", "Repository not found")
        others = self.hidden / "branches" / name
        return {"main": self.root / name, **{f.name: f for f in others.glob("*") if f.is_dir()}}

    def folder(self, name: str, revision: str) -> Path:
        """The folder of a branch, by its name or the id of its last commit."""
        branches = self.branches(name)
        for branch, folder in branches.items():
            if revision == branch or revision == self.sha(folder):
                return folder
        raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def files(self, folder: Path) -> list[Path]:
        return sorted(file for file in folder.rglob("*") if file.is_file())

    def digests(self, file: Path) -> tuple[str, str]:
        """Git's id of a file as a blob, and its SHA-256."""
        key = (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        if key not in self._digests:
            blob, whole = hashlib.sha1(f"blob {key[1]}\0".encode()), hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(SCAN):
                    blob.update(block)
                    whole.update(block)
            self._digests[key] = blob.hexdigest(), whole.hexdigest()
        return self._digests[key]

    def sha(self, folder: Path) -> str:
        names = [f"{file.relative_to(folder)} {self.digests(file)[1]}\n" for file in self.files(folder)]
        return hashlib.sha1("".join(names).encode()).hexdigest()

    def entry(self, folder: Path, file: Path) -> dict[str, Any]:
        """One file as the Hub describes it."""
        blob, sha256 = self.digests(file)
        size, path = file.stat().st_size, file.relative_to(folder).as_posix()
        lfs = {"lfs": {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 130}} if is_lfs(path, size) else {}
        return {"type": "file", "path": path, "size": size, "oid": blob, **lfs}

    def about(self, name: str) -> dict[str, Any]:
        file = self.hidden / "about" / f"{name}.json"
        return dict(json.loads(file.read_text())) if file.exists() else {"private": False}

    def create(self, name: str, private: bool) -> None:
        if (self.root / name).exists():
            raise RefusedError(409, "", "You already created this model repo", name)
        (self.root / name).mkdir(parents=True)
        (self.root / name / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        file = self.hidden / "about" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"private": private}))

    def branch(self, name: str, branch: str) -> None:
        if branch in (known := self.branches(name)):
            raise RefusedError(409, "", "Reference already exists")
        shutil.copytree(known["main"], self.hidden / "branches" / name / branch)

    def object(self, oid: str) -> Path:
        return self.hidden / "lfs" / oid

    def commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> str:
        """Apply the operations of a commit to a copy of a branch, then put the copy in its place."""
        folder = self.branches(name).get(revision)
        if folder is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != self.sha(folder):
            raise RefusedError(412, "", "A commit has happened since. Please refresh and try again.")
        draft = self.hidden / "drafts" / f"{time.time_ns()}"
        shutil.copytree(folder, draft)
        for line in lines[1:]:
            self.apply(draft, line["key"], line["value"])
        old = draft.with_suffix(".old")
        folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old)
        with (self.root / "commits.log").open("a") as log:
            log.write(f"{name} {revision} {len(lines) - 1} operations: {lines[0]['value']['summary']}\n")
        return self.sha(folder)

    def apply(self, folder: Path, key: str, value: dict[str, Any]) -> None:
        file = folder / value["path"]
        if ".." in Path(value["path"]).parts:
            raise RefusedError(400, "", f"Invalid path {value['path']}")
        if key == "deletedFile":
            if not file.is_file():
                raise RefusedError(404, "EntryNotFound", "A file with this name doesn't exist")
            return file.unlink()
        file.parent.mkdir(parents=True, exist_ok=True)
        if key == "file":
            file.write_bytes(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not self.object(value["oid"]).is_file():
                raise RefusedError(400, "", f"lfs object {value['oid']} was never uploaded")
            shutil.copyfile(self.object(value["oid"]), file)
            if (self.root / "corrupt").exists():
                file.write_bytes(file.read_bytes()[:-1] + b"?")
        else:
            raise RefusedError(400, "", f"unknown operation {key}")
        return None


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > REGULAR_LIMIT


def metadata_errors(content: str) -> Iterator[str]:
    """What the Hub says about the metadata of a model card."""
    if not content.startswith("---\n") or "\n---\n" not in content[3:]:
        return
    try:
        values = yaml.safe_load(content[4:].split("\n---\n")[0]) or {}
    except yaml.YAMLError as error:
        yield f"not YAML: {error}"
        return
    for key in ("license", "license_name", "library_name", "pipeline_tag"):
        if not isinstance(values.get(key, ""), str):
            yield f'"{key}" must be a string'
    for key in ("tags", "datasets", "language"):
        found = values.get(key, [])
        if not all(isinstance(item, str) for item in (found if isinstance(found, list) else [found])):
            yield f'"{key}" must be a string or an array of strings'
    if values.get("base_model_relation", "finetune") not in RELATIONS:
        yield f'"base_model_relation" must be one of {", ".join(RELATIONS)}'
    for model in values.get("model-index", []):
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            yield '"model-index" needs name and results'
        for result in model.get("results", []):
            if "type" not in result.get("task", {}) or not {"type", "name"} <= set(result.get("dataset", {})):
                yield '"model-index" results need task.type, dataset.type and dataset.name'
            if not all({"type", "value"} <= set(metric) for metric in result.get("metrics", [])):
                yield '"model-index" metrics need type and value'


class Hub(BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = [urllib.parse.unquote(part) for part in self.path.split("?")[0].strip("/").split("/")]
        if self.command != "PUT":
            length = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(length)
        try:
            content = self.route(parts)
        except RefusedError as refusal:
            status, code, message, *name = refusal.args
            where = {"url": f"{self.here()}/{name[0]}"} if name else {}
            answer = json.dumps({"error": message, "errors": [{"message": message}], **where}).encode()
            self.reply(status, answer, {"X-Error-Code": code, "X-Error-Message": message})
        else:
            if content is not None:
                self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def route(self, parts: list[str]) -> Any:
        match (self.command, *parts):
            case ("GET", "api", "whoami-v2"):
                user = self.user()
                return {"type": "user", "name": user["name"], "auth": {"accessToken": {"role": user["role"]}}}
            case ("POST", "api", "repos", "create"):
                return self.create(json.loads(self.body))
            case ("POST", "api", "validate-yaml"):
                if errors := list(metadata_errors(json.loads(self.body)["content"])):
                    raise RefusedError(400, "", "; ".join(errors))
                return {"errors": [], "warnings": []}
            case ("POST", "api", "models", owner, name, "preupload", revision):
                self.store.folder(f"{owner}/{name}", revision)
                self.writer(owner)
                return self.preupload(self.store.folder(f"{owner}/{name}", revision))
            case ("POST", "api", "models", owner, name, "branch", branch):
                self.writer(owner)
                return self.store.branch(f"{owner}/{name}", branch) or {}
            case ("POST", "api", "models", owner, name, "commit", revision):
                self.writer(owner)
                oid = self.store.commit(f"{owner}/{name}", revision, [json.loads(x) for x in self.body.splitlines()])
                return {"commitOid": oid, "commitUrl": f"{self.here()}/{owner}/{name}/commit/{oid}"}
            case ("POST", owner, _, "info", "lfs", "objects", "batch"):
                self.writer(owner)
                return {
                    "transfer": "basic",
                    "objects": [self.wanted(each) for each in json.loads(self.body)["objects"]],
                }
            case ("PUT", "lfs", oid):
                return self.receive(oid)
            case ("POST", "lfs", "verify"):
                asked = json.loads(self.body)
                if not self.store.object(asked["oid"]).is_file():
                    raise RefusedError(404, "", "no such object")
                return {}
            case ("GET" | "HEAD", "api", "models", owner, name):
                return self.describe(f"{owner}/{name}", "main")
            case ("GET" | "HEAD", "api", "models", owner, name, "revision", revision):
                return self.describe(f"{owner}/{name}", revision)
            case ("GET" | "HEAD", "api", "models", owner, name, "tree", revision, *_):
                folder = self.store.folder(f"{owner}/{name}", revision)
                return [self.store.entry(folder, file) for file in self.store.files(folder)]
            case ("GET" | "HEAD", owner, name, "resolve", revision, *path):
                return self.file(f"{owner}/{name}", revision, "/".join(path))
        raise RefusedError(404, "RepoNotFound", "not here")

    def user(self) -> dict[str, str]:
        """Who the request's token belongs to."""
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        known = self.store.root / "users.json"
        if not given:
            raise RefusedError(401, "", "Invalid username or password.")
        if not known.exists():
            return {"name": "anyone", "role": "write"}
        found = json.loads(known.read_text()).get(hashlib.sha256(given.encode()).hexdigest())
        if found is None:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        return dict(found)

    def writer(self, owner: str) -> None:
        """Raise unless the request may write for an owner."""
        user = self.user()
        if user["role"] != "write" or user["name"] not in (owner, "anyone"):
            raise RefusedError(403, "", f'You don\'t have the rights to create a model under the namespace "{owner}"')

    def create(self, asked: dict[str, Any]) -> dict[str, str]:
        owner = asked.get("organization") or self.user()["name"]
        self.writer(owner)
        name = f"{owner}/{asked['name']}"
        self.store.create(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": f"{self.here()}/{name}", "name": name}

    def preupload(self, folder: Path) -> dict[str, Any]:
        described = []
        for each in json.loads(self.body)["files"]:
            file, lfs = folder / each["path"], is_lfs(each["path"], each["size"])
            oid = self.store.digests(file)[1 if lfs else 0] if file.is_file() else None
            mode = "lfs" if lfs else "regular"
            described.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": described}

    def wanted(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Where an object is to go; nothing to do for one that is here."""
        if (self.store.root / "full").exists():
            raise RefusedError(403, "", "Private repository storage limit reached")
        if self.store.object(asked["oid"]).is_file():
            return {"oid": asked["oid"], "size": asked["size"]}
        actions = {
            "upload": {"href": f"{self.here()}/lfs/{asked['oid']}"}, "verify": {"href": f"{self.here()}/lfs/verify"}
        }  # fmt: skip
        return {"oid": asked["oid"], "size": asked["size"], "actions": actions}

    def receive(self, oid: str) -> dict[str, str]:
        """An object's bytes, shown under its name once they are all here and hash to it."""
        target, digest = self.store.object(oid), hashlib.sha256()
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f"{oid}.{time.time_ns()}")
        stall, received = self.store.root / "stall", 0
        with draft.open("wb") as stream:
            for block in self.blocks():
                received += len(block)
                digest.update(block)
                stream.write(block)
                while stall.exists() and received >= int(stall.read_text() or 0):
                    (self.store.root / "stalled").touch()
                    time.sleep(0.05)
        if digest.hexdigest() != oid:
            draft.unlink()
            raise RefusedError(400, "", "the bytes do not hash to the object's id")
        draft.rename(target)
        return {}

    def blocks(self) -> Iterator[bytes]:
        """The request's body, sent with a length or in chunks."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers["Content-Length"])
        while left and (block := self.rfile.read(min(left, SCAN // 16))):
            left -= len(block)
            yield block

    def describe(self, name: str, revision: str) -> dict[str, Any]:
        folder = self.store.folder(name, revision)
        entries = [self.store.entry(folder, file) for file in self.store.files(folder)]
        siblings = [
            {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"], "lfs": e.get("lfs")} for e in entries
        ]
        return {
            "id": name,
            "modelId": name,
            "sha": self.store.sha(folder),
            "siblings": siblings,
            **self.store.about(name),
        }

    def file(self, name: str, revision: str, path: str) -> None:
        folder = self.store.folder(name, revision)
        file = folder / path
        if not file.is_file():
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        size, span = file.stat().st_size, self.headers.get("Range")
        etag = self.store.digests(file)[1 if is_lfs(path, size) else 0]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.store.sha(folder), "Accept-Ranges": "bytes"}
        if self.command == "GET":
            with (self.store.root / "requests.log").open("a") as log:
                log.write(f"{path} {span or 'whole'}\n")
        first, end, status = 0, size, 200
        if span and self.command == "GET":
            start, _, last = span.removeprefix("bytes=").partition("-")
            first, end, status = int(start), min(int(last) + 1 if last else size, size), 206
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        with file.open("rb") as stream:
            stream.seek(first)
            self.reply(status, iter(lambda: stream.read(SCAN), b""), headers, end - first)

    def here(self) -> str:
        return f"http://{self.headers['Host']}"

    def reply(self, status: int, content: bytes | Iterator[bytes], headers: dict[str, str], size: int = -1) -> None:
        self.send_response(status)
        size = len(content) if isinstance(content, bytes) else size
        for key, value in {**headers, "Content-Length": str(size)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for block in [content] if isinstance(content, bytes) else content:
            self.wfile.write(block[:size])
            size -= len(block[:size])

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


if __name__ == "__main__":
    Hub.store = Store(Path(sys.argv[1]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_port, flush=True)
    server.serve_forever()
