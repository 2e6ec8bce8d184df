"""What `slimmoe export` does: a checkpoint in a form of our own in, a stock one out."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from slimmoe_hf.atomic import replacing
from slimmoe_hf.checkpoint import carry
from slimmoe_hf.command_inputs import output_path, refuse_source, require, say
from slimmoe_hf.factored_checkpoint import load_factored
from slimmoe_hf.factorization import densify
from slimmoe_hf.loading import FACTORED, form_of, weight_bytes
from slimmoe_hf.merged_forms import unshare
from slimmoe_hf.serving import add_biases, write_serving_config
from slimmoe_hf.shared_checkpoint import SharedModel, load_shared
from slimmoe_hf.shared_config import SHARED


def _duplicated(folder: Path) -> PreTrainedModel:
    return unshare(load_shared(folder))


def _dense(folder: Path) -> PreTrainedModel:
    model = densify(load_factored(folder))
    return unshare(model) if isinstance(model, SharedModel) else model


FORMS: dict[str, tuple[str, str, Callable[[Path], PreTrainedModel]]] = {
    "duplicate": (SHARED, "shared", _duplicated), "dense": (FACTORED, "factored", _dense),
}  # fmt: skip
"""The form asked for -> the form it is made of, what the experts are there, and how."""


def export(args: argparse.Namespace) -> None:
    """A folder in, another out; exact but for the rounding of multiplied-out experts.

    Args:
        args: As the parser has them.

    Raises:
        ValueError: The folder is of another form, or damaged.
    """
    require(args, "folder", "form", "output")
    folder, output = Path(args.folder).expanduser(), output_path(args)
    refuse_source(folder, output)
    wanted, what, load = FORMS[args.form]
    form = form_of(folder)
    if form is None:
        raise ValueError(f"{folder}: a stock checkpoint already; there is nothing to export.")
    if form != wanted:
        (right,) = (name for name, (key, _, _) in FORMS.items() if key == form)
        raise ValueError(f"--form {args.form}: the experts of {folder} are not {what}. Give --form {right}.")
    model = load(folder)
    add_biases(model)
    with replacing(output, args.overwrite) as partial:
        model.save_pretrained(partial, max_shard_size="1GB")
        write_serving_config(partial)
        carry(folder, partial)
        if (folder / "plan").is_dir():
            shutil.copytree(folder / "plan", partial / "plan")
    say(f"{output}: a stock checkpoint, {weight_bytes(output):,} bytes of weights")
