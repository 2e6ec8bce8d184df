"""What `slimmoe plot` does."""

from __future__ import annotations

import argparse


def plot(args: argparse.Namespace) -> None:
    """In the making."""
    raise ValueError("plot is not there yet")
