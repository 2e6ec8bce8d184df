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
from slimmoe_hf.command_inputs import require
from slimmoe_hf.families import FAMILIES
from slimmoe_hf.hub import MODEL, complete_folder, write_extras
from slimmoe_hf.lineage import CARD, Base, find_base, is_hub_id, public_name
from slimmoe_hf.loading import weight_files, weights_sha256
from slimmoe_hf.report import Report
from slimmoe_hf.rundir import RECIPE, REPORT, STEPS
from slimmoe_hf.serving import serving_config
from slimmoe_hf.shards import read_header
from slimmoe_hf.upload import ADAPTER, ADAPTER_CONFIG, Content, check_repo, publishable, push_files, refuse_secrets

_LOCAL_KEYS = ("_name_or_path", "name_or_path")


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
        refuse_secrets(files)
        if args.dry_run:
            _show(args, folder / MODEL if a_run else folder, files)
            return
        message = args.message or f"Upload {'slimmed model' if a_run else 'model'} with slimmoe_hf"
        pushed = push_files(
            files, args.repo, message=message, private=args.private or None, branch=args.branch,
            existing="replace" if args.overwrite else "refuse",
        )  # fmt: skip
    said = f"{len(files)} files, verified" if pushed.changed else "holds exactly these files already; nothing to do"
    Console().print(f"{pushed.url}: {said}", markup=False, highlight=False, soft_wrap=True)


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
    named = (args.repo, args.base_model, args.license)
    if not args.dry_run:
        complete_folder(run, *named)
        return dict(publishable(model))
    write_extras(run, temporary, *named)
    extras = {file.relative_to(temporary).as_posix(): file for file in temporary.rglob("*") if file.is_file()}
    return dict(sorted((publishable(model) | extras).items()))


def _of_model(args: argparse.Namespace, folder: Path) -> dict[str, Content]:
    """Any other folder, which is only read: what must not be public in its files is changed on the way."""
    files: dict[str, Content] = dict(publishable(folder))
    adapter = ADAPTER in files
    config = json.loads((folder / (ADAPTER_CONFIG if adapter else "config.json")).read_text(encoding="utf-8"))
    origin = str(config.get("base_model_name_or_path" if adapter else "_name_or_path") or "")
    if adapter and args.base_model is None and not is_hub_id(origin):
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: names its model by a path of yours ({public_name(origin)}), which nobody else "
            "has. Give --base-model its id on the Hub, or merge the adapter and push the whole model."
        )
    for name, content in files.items():
        if name.endswith(".json") and isinstance(content, Path) and content.stat().st_size < 1 << 20:
            files[name] = _public_json(name, content, folder, args.base_model)
    written = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    named = args.license is not None or args.base_model is not None
    if card.MARK in written:
        base = find_base(origin, None, args.base_model, args.license, quiet=True)[0] if named else None
        files[CARD] = card.amended(written, args.repo, base, args.license).encode()
    elif card.may_be_written(folder / CARD):
        base = find_base(origin or "the original model", None, args.base_model, args.license)[0]
        files[CARD] = _model_card(args.repo, base, args.license, folder, adapter).encode()
    elif args.license is not None or (named and not adapter):
        raise ValueError(f"{folder / CARD}: is your own card and stays as it is: name licence and base model there.")
    text = files[CARD]
    card.check_card(text.read_text(encoding="utf-8") if isinstance(text, Path) else text.decode(), files.keys())
    return dict(sorted(files.items()))


def _public_json(name: str, file: Path, folder: Path, base_model: str | None) -> Content:
    """A JSON file without names of places on this machine; a model's config in the form that engines expect."""
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


def _model_card(repo: str, base: Base, license: str | None, folder: Path, adapter: bool) -> str:
    """A short card, for a folder that tells nothing but what is in it."""
    kind = "A LoRA adapter" if adapter else "A Mixture-of-Experts model"
    made = f" made from `{base.name}`" if base.hub_id else ""
    code = card.adapter_code(repo, base) if adapter else card.loading_code(repo, "The")
    plan = card.plan_text(folder / "plan")
    tags = ("moe", "mixture-of-experts", "lora", "slimmoe") if adapter else card.TAGS if plan else ("moe", "slimmoe")
    return card.assemble(card.metadata(repo, base, tags=tags, adapter=adapter), repo.split("/")[-1], [
        ("", f"{kind}{made}, pushed with slimmoe_hf. {plan}"),
        ("Use it", code),
        ("Limits", "No measurements came with it: nothing is known here of its quality, its bias or its safety."),
        ("Licence", card.license_text(base, license)),
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
