"""What `slimmoe push` does."""

from __future__ import annotations

import argparse


def push(args: argparse.Namespace) -> None:
    """In the making."""
    raise ValueError("push is not there yet")
