"""What `slimmoe finetune` does."""

from __future__ import annotations

import argparse


def finetune(args: argparse.Namespace) -> None:
    """In the making."""
    raise ValueError("finetune is not there yet")
