"""What `slimmoe export` does: a checkpoint in, and out a stock one, or one for an engine, or what the engines say of it."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel

from slimmoe_hf.atomic import replacing
from slimmoe_hf.checkpoint import carry
from slimmoe_hf.command_inputs import output_path, print_json, refuse_source, require, say
from slimmoe_hf.engine_form import write_engine_form
from slimmoe_hf.engine_report import Verdict, assess, engine_lines, engine_text
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


_WIDTH = 120  # of what goes into a file

FORMS: dict[str, tuple[str, str, Callable[[Path], PreTrainedModel]]] = {
    "duplicate": (SHARED, "shared", _duplicated), "dense": (FACTORED, "factored", _dense),
}  # fmt: skip
"""The form asked for -> the form it is made of, what the experts are there, and how."""


def export(args: argparse.Namespace) -> None:
    """A folder in, another out; exact but for the rounding of multiplied-out experts. With neither form nor engine, a report.

    Args:
        args: As the parser has them.

    Raises:
        ValueError: The folder is of another form, or damaged; or the engine does not load what would be written.
    """
    require(args, "folder")
    folder = Path(args.folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder. Give the folder of a checkpoint.")
    if args.form is not None and args.engine is not None:
        raise ValueError("export takes --form or --for, not both: --for makes a stock checkpoint of every form.")
    if args.form is None and args.engine is None:
        if args.output is not None:
            raise ValueError("export needs --for, or --form, to write something (see slimmoe export --help)")
        _report(folder, args.json)
        return
    require(args, "output")
    if args.json:
        raise ValueError("--json is for the report: leave out --form, --for and --output.")
    output = output_path(args)
    refuse_source(folder, output)
    if args.form is not None:
        _write_form(folder, args.form, output, args.overwrite)
        say(f"{output}: a stock checkpoint, {weight_bytes(output):,} bytes of weights")
        return
    verdict = _write_for(folder, args.engine, output, args.overwrite)
    say(f"{output}: {weight_bytes(output):,} bytes of weights\n{engine_lines([verdict])[0]}")


def _report(folder: Path, as_json: bool) -> None:
    verdicts = assess(folder)
    if as_json:
        print_json([verdict.model_dump(mode="json") for verdict in verdicts])
    else:
        console = Console()
        say(engine_text(verdicts, console.width if console.is_terminal else _WIDTH))


def _write_form(folder: Path, name: str, output: Path, overwrite: bool) -> None:
    """The stock checkpoint of one in a form of our own, which is loaded for it."""
    wanted, what, load = FORMS[name]
    form = form_of(folder)
    if form is None:
        raise ValueError(f"{folder}: a stock checkpoint already; there is nothing to export.")
    if form != wanted:
        (right,) = (name for name, (key, _, _) in FORMS.items() if key == form)
        raise ValueError(f"--form {name}: the experts of {folder} are not {what}. Give --form {right}.")
    model = load(folder)
    add_biases(model)
    with replacing(output, overwrite) as partial:
        model.save_pretrained(partial, max_shard_size="1GB")
        write_serving_config(partial)
        carry(folder, partial)
        _copy_plan(folder, partial)


def _write_for(folder: Path, engine: str, output: Path, overwrite: bool) -> Verdict:
    """A checkpoint as the engine reads it, and what it makes of it; nothing where it does not load it."""
    form = form_of(folder)
    _refuse(folder, _verdict_of(folder, engine))
    with (
        replacing(output, overwrite) as partial,
        tempfile.TemporaryDirectory(prefix=".partial-", dir=output.parent) as near,
    ):
        stock = folder
        if form is not None:
            (name,) = (name for name, (key, _, _) in FORMS.items() if key == form)
            stock = Path(near) / "stock"
            _write_form(folder, name, stock, overwrite=False)
        write_engine_form(stock, partial)
        _copy_plan(folder, partial)
        verdict = _verdict_of(partial, engine)
        _refuse(folder, verdict)  # of a form of our own, the shape is known only now
    return verdict


def _verdict_of(folder: Path, engine: str) -> Verdict:
    return next(verdict for verdict in assess(folder) if verdict.engine == engine)


def _refuse(folder: Path, verdict: Verdict) -> None:
    if verdict.blocking:
        why = "; ".join(reason.text for reason in verdict.blocking)
        raise ValueError(f"{folder}: {verdict.title} {verdict.version} would not load it: {why}. Nothing was written.")
    if not verdict.known:
        raise ValueError(f"{folder}: {verdict.why}, so nothing can be written for it. Convert the checkpoint as it is.")


def _copy_plan(folder: Path, partial: Path) -> None:
    if (folder / "plan").is_dir():
        shutil.copytree(folder / "plan", partial / "plan")
