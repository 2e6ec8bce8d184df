"""The part of the Hub's HTTP interface that reading needs, over a folder of repositories, in a process of its own.

python tests/hub_server.py ROOT PORT: serves ROOT/owner/name; appends every GET of a file to ROOT/requests.log.
"""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.describe("/".join(parts[2:4]), tree="tree" in parts[4:5])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self.file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.missing("RepoNotFound")

    def describe(self, name: str, tree: bool) -> None:
        folder = self.root / name
        if not folder.is_dir():
            return self.missing("RepoNotFound")
        files = sorted(file for file in folder.iterdir() if file.is_file())
        entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT} for f in files]
        info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
        content = json.dumps(entries if tree else info).encode()
        self.reply(200, content, {"Content-Type": "application/json"})

    def file(self, name: str, path: str) -> None:
        file = self.root / name / path
        if not file.is_file():
            return self.missing("EntryNotFound" if (self.root / name).is_dir() else "RepoNotFound")
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        span = self.headers.get("Range")
        if self.command == "GET":
            with (self.root / "requests.log").open("a") as log:
                log.write(f"{path} {span or 'whole'}\n")
        if span and self.command == "GET":
            first, _, last = span.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            return self.reply(206, content[int(first) : end], headers)
        self.reply(200, content, headers)
        return None

    def missing(self, code: str) -> None:
        self.reply(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not here"})

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Hub).serve_forever()
