"""What `slimmoe push` does: the folder of a run, of a model or of an adapter, onto the Hub."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import rich
from huggingface_hub.utils import disable_progress_bars, logging
from rich.console import Console

from slimmoe_hf import card
from slimmoe_hf.command_inputs import require, say
from slimmoe_hf.engine_report import Verdict, assess, engine_lines, engine_section
from slimmoe_hf.hub import MODEL, complete_folder, write_extras
from slimmoe_hf.lineage import CARD, Base, find_base
from slimmoe_hf.loading import FACTORED, weights_sha256
from slimmoe_hf.report import Report
from slimmoe_hf.rundir import RECIPE, REPORT, STEPS
from slimmoe_hf.shared_config import SHARED
from slimmoe_hf.upload import (
    ADAPTER,
    ADAPTER_CONFIG,
    Content,
    check_repo,
    public_form,
    publishable,
    push_files,
    refuse_secrets,
)


def push(args: argparse.Namespace) -> None:
    """A folder in, a repository out: in one commit, compared with what is here afterwards."""
    require(args, "folder", "repo")
    folder = Path(args.folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder. Give the folder of a finished run, or of a model.")
    check_repo(args.repo)
    logging.set_verbosity_error()
    if not rich.get_console().is_terminal:
        disable_progress_bars()
    if folder.name == MODEL and _is_run(folder.parent):
        folder = folder.parent  # its card is that of the run
    a_run = _is_run(folder)
    with tempfile.TemporaryDirectory(prefix="slimmoe-") as temporary:
        files = _of_run(args, folder, Path(temporary)) if a_run else _of_model(args, folder)
        text = files[CARD]
        card.check_card(text.read_text(encoding="utf-8") if isinstance(text, Path) else text.decode(), files.keys())
        refuse_secrets(files)
        served = _served(folder / MODEL if a_run else folder, files)
        if args.dry_run:
            _show(args, folder / MODEL if a_run else folder, files)
            say("\n".join(engine_lines(served)))
            return
        message = args.message or f"Upload {'slimmed model' if a_run else 'model'} with slimmoe_hf"
        pushed = push_files(
            files, args.repo, message=message, private=args.private or None, branch=args.branch,
            existing="replace" if args.overwrite else "refuse",
        )  # fmt: skip
    said = f"{len(files)} files, verified" if pushed.changed else "holds exactly these files already; nothing to do"
    say("\n".join([f"{pushed.url}: {said}", *engine_lines(served)]))


def _served(folder: Path, files: dict[str, Content]) -> list[Verdict]:
    """Which engines load what is to be published; nothing of an adapter."""
    config = files.get("config.json")
    if config is None:
        return []
    return assess(folder, json.loads(config.read_bytes() if isinstance(config, Path) else config))


def _is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file() and (folder / STEPS).is_file()


def _of_run(args: argparse.Namespace, run: Path, temporary: Path) -> dict[str, Content]:
    """The completed model of a finished run. A dry run completes a folder elsewhere."""
    if not (run / REPORT).is_file():
        raise ValueError(f"{run}: this run is not finished (no {REPORT}). The same `slimmoe run` continues it.")
    model = run / MODEL
    if Report.load(run / REPORT).models[-1].weights_sha256 != weights_sha256(model):
        raise ValueError(
            f"{model}: these are not the weights that {REPORT} was measured on, so its card would be wrong. Copy the "
            "folder elsewhere and push that, or run the recipe again."
        )
    card.refuse_orders(model / CARD, args.base_model, args.license)
    named = (args.repo, args.base_model, args.license, args.branch)
    if not args.dry_run:
        complete_folder(run, *named)
        return dict(publishable(model))
    write_extras(run, temporary, *named, quiet=True)
    extras = {file.relative_to(temporary).as_posix(): file for file in temporary.rglob("*") if file.is_file()}
    return dict(sorted((publishable(model) | extras).items()))


def _of_model(args: argparse.Namespace, folder: Path) -> dict[str, Content]:
    """Any other folder, which is only read: what must not be public in its files is changed on the way."""
    files = public_form(publishable(folder), folder, args.base_model)
    adapter = ADAPTER in files
    config = json.loads((folder / (ADAPTER_CONFIG if adapter else "config.json")).read_text(encoding="utf-8"))
    if FACTORED in config:
        raise ValueError(
            f"{folder}: its experts are factored, and the card would say that plain transformers loads it. Push what this "
            f"makes: slimmoe export {folder} --form dense --output OUT"
        )
    origin = str(config.get("base_model_name_or_path" if adapter else "_name_or_path") or "")
    card.refuse_orders(folder / CARD, None if adapter else args.base_model, args.license)
    written = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    named = args.license is not None or args.base_model is not None
    if card.MARK in written:
        base = find_base(origin, None, args.base_model, args.license, quiet=True)[0] if named else None
        files[CARD] = card.amended(written, args.repo, base, args.license, args.branch).encode()
    elif card.may_be_written(folder / CARD):
        origin = origin or "the original model"
        base = find_base(origin, None, args.base_model, args.license, quiet=args.dry_run)[0]
        served = engine_section([] if adapter else _served(folder, files))
        files[CARD] = _model_card(args, base, folder, config if not adapter else {}, adapter, served).encode()
    return dict(sorted(files.items()))


def _model_card(
    args: argparse.Namespace, base: Base, folder: Path, config: dict[str, Any], adapter: bool, served: str
) -> str:
    """A short card, for a folder that tells nothing but what is in it."""
    kind = "A LoRA adapter" if adapter else "A Mixture-of-Experts model"
    made = f" made from `{base.name}`" if base.hub_id else ""
    repo, branch = args.repo, args.branch
    loader = "AutoModelForSeq2SeqLM" if config.get("is_encoder_decoder") else "AutoModelForCausalLM"
    whole = card.loading_code(repo, "The", branch, loader, shared=SHARED in config)
    code = card.adapter_code(repo, base, branch) if adapter else whole
    plan = card.plan_text(folder / "plan")
    tags = ("moe", "mixture-of-experts", "lora", "slimmoe") if adapter else card.TAGS if plan else ("moe", "slimmoe")
    return card.assemble(card.metadata(repo, base, tags=tags, adapter=adapter), repo.split("/")[-1], [
        ("", f"{kind}{made}, pushed with slimmoe_hf. {plan}"),
        ("Use it", code),
        ("Where it loads", served),
        ("Limits", "No measurements came with it: nothing is known here of its quality, its bias or its safety."),
        ("Licence", card.license_text(base, args.license)),
    ])  # fmt: skip


def _show(args: argparse.Namespace, folder: Path, files: dict[str, Content]) -> None:
    """What a push would do, without asking anybody."""
    console, total = Console(), 0
    for name, content in files.items():
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        total += size
        console.print(f"{size:>16,}  {name}", markup=False, highlight=False, soft_wrap=True)
    left = sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
        if file.relative_to(folder).as_posix() not in files
    )  # fmt: skip
    branch = f", branch {args.branch}" if args.branch else ""
    visible = "private" if args.private else "public"
    console.print(
        f"{total:>16,}  bytes in {len(files)} files for {args.repo}{branch} ({visible} if it is new); nothing was pushed",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        console.print(f"{'':>16}  left out: {shown}", markup=False, highlight=False, soft_wrap=True)
