"""A local Hub for tests: start the server in a process of its own, and point a process, or this one, at it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

TOKEN, READER = "hf_WriterOfTestsWhoMayPushWhatTheyLike", "hf_ReaderOfTestsWhoMayNotPushAnythingAtAll"


@contextmanager
def serving(root: Path, users: bool = False) -> Iterator[str]:
    """Serve a folder of repositories; gives the endpoint. With `users`, only `me` (and a reader) is known there."""
    root.mkdir(parents=True, exist_ok=True)
    if users:
        known = {TOKEN: {"name": "me", "role": "write"}, READER: {"name": "me", "role": "read"}}
        hashed = {hashlib.sha256(token.encode()).hexdigest(): user for token, user in known.items()}
        (root / "users.json").write_text(json.dumps(hashed))
    command = [sys.executable, str(Path(__file__).with_name("hub_server.py")), str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().strip()  # it listens by now, and the port is nobody else's
            assert port, "the Hub did not start"
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def environment(endpoint: str, home: Path, token: str = "any", **changed: str) -> dict[str, str]:
    """For a process that has this Hub, and a cache of its own."""
    return {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token,
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", **changed,
    }  # fmt: skip


def use_here(monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path, token: str | None = TOKEN) -> None:
    """Point this process, which was started without a network, at a Hub."""
    for name, value in {
        "ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"),
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers the endpoint of its first call
    monkeypatch.delenv("HF_TOKEN", raising=False) if token is None else monkeypatch.setenv("HF_TOKEN", token)
    close_session()
