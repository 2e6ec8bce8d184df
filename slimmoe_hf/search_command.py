"""What `slimmoe plan --budget` does: score a model, search its shapes, measure the best, write the best one's plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from slimmoe_hf.budget import Sizes
from slimmoe_hf.command_inputs import print_json, read_documents, require, say, target_of
from slimmoe_hf.criteria import check_criteria
from slimmoe_hf.data import document_hash, load_documents
from slimmoe_hf.describe import describe_plan
from slimmoe_hf.evaluation import HeldOut, held_out
from slimmoe_hf.families import refuse_encoder_decoder
from slimmoe_hf.loading import find_checkpoint, load_config, load_tokenizer
from slimmoe_hf.plan import Target
from slimmoe_hf.scoring import clear_output, loss_of, rebuilt, remove_work, scored_model, scored_stream
from slimmoe_hf.search import Search, search_plan
from slimmoe_hf.search_check import Checked, check_search, save_searched
from slimmoe_hf.sizing import own_dtype
from slimmoe_hf.sources import open_source
from slimmoe_hf.stats import ExpertStats

_SHOWN = 12  # of shapes that were not measured


def search(args: argparse.Namespace) -> None:
    """A model, text and a budget in; the plan of the best shape out, with the search beside it.

    Of statistics in place of a model nothing can be measured: the best shape is then the one that is predicted best.

    Args:
        args: As the parser has them.

    Raises:
        ValueError: A size beside the budget, a budget that no shape meets, calibration on other text than the train split, or
            as `scored`, `search_plan` and `check_search`.
    """
    require(args, "output")
    output = clear_output(args)
    if target_of(args) != Target():
        raise ValueError("--budget finds the sizes itself. Leave --expert-width, --num-experts and --kv-groups out.")
    if len(args.inputs) != 1:
        raise ValueError("plan --budget takes one model, or one statistics file (see slimmoe plan --help)")
    args.model = args.inputs[0]
    if Path(args.model).is_file():
        if args.reconstruct or args.data is not None:
            raise ValueError(f"{args.model}: of statistics alone nothing is measured or reconstructed. Give the model.")
        stats, checked = ExpertStats.load(args.model), None
        found = _searched(args, stats)
        plan = found.plan(stats)
    elif args.stream:
        require(args, "data")
        _check_request(args, load_config(open_source(args.model, args.revision).folder))
        (path, stats, given), checked = scored_stream(args, output, loss_of(args, searched=True)), None
        found = _searched(args, stats)
        plan = found.plan(stats)
        if args.reconstruct is not False:
            plan = rebuilt(args, output, path, given, plan)
    else:
        stats, checked = _checked(args)
        found, plan = checked.search, checked.plan
    save_searched(found, plan, output, args.overwrite)
    remove_work(args, output)
    if args.json:
        print_json(found.model_dump(mode="json"))
        return
    console = Console(width=max(Console().width, 110))
    console.print(_table(found))
    console.print(*_notes(found, checked), sep="\n", highlight=False, markup=False, soft_wrap=True)
    console.print(describe_plan(plan), highlight=False, markup=False, soft_wrap=True)
    say(f"{output}: plan, search.json and frontier.png; next: slimmoe slim MODEL --plan {output} --output slimmed")


def _searched(args: argparse.Namespace, stats: ExpertStats) -> Search:
    return search_plan(stats, args.budget, args.active_budget, args.criterion, args.seed, args.expert_criterion)


def _checked(args: argparse.Namespace) -> tuple[ExpertStats, Checked]:
    require(args, "data")
    if args.split != "train":
        raise ValueError(f"--split {args.split}: with --budget shapes are chosen on validation text. Score on train.")
    if args.candidates < 1:
        raise ValueError(f"--candidates {args.candidates}: measure at least 1.")
    path = find_checkpoint(args.model, args.revision)
    _check_request(args, load_config(path))
    text = _validation(args, path)
    model, stats, given = scored_model(args, loss_of(args, searched=True))
    found, rebuild = _searched(args, stats), args.reconstruct is not False
    return stats, check_search(
        model, stats, found, text.rows_NT, given, rebuild=rebuild, number=args.candidates, batch_size=args.batch_size,
        dtype=own_dtype(load_config(path)),
    )  # fmt: skip


def _check_request(args: argparse.Namespace, config: PreTrainedConfig) -> None:
    """Raise ValueError for what would otherwise be found out after the sweep."""
    refuse_encoder_decoder(config, "--budget")
    Sizes(config).limits(args.budget, args.active_budget)
    check_criteria(args.criterion, args.expert_criterion, neurons=True, experts=True)
    loss_of(args, searched=True)


def _validation(args: argparse.Namespace, path: Path) -> HeldOut:
    """Validation text, without documents that were calibrated on or that a test of the result may read."""
    read = [read_documents(args), load_documents(args.data, "test", args.data_revision)]
    elsewhere = {document_hash(row) for split in read for row in split}
    documents = load_documents(args.data, "validation", args.data_revision)
    apart = [place for place, row in enumerate(documents) if document_hash(row) not in elsewhere]
    if not apart:
        raise ValueError(
            f"{args.data}: every document of the validation split is in train or test too. Bring other text."
        )
    return held_out(documents.select(apart), load_tokenizer(path), args.max_length, args.validation_tokens)


def _table(found: Search) -> Table:
    """What was measured, best first, and the next best by prediction; then the frontier."""
    shown = Table(title=_title(found), title_justify="left", box=None)
    for name in ("experts x width", "parameters", "active", "predicted", "plain slices", "reconstructed"):
        shown.add_column(name, justify="left" if name == "experts x width" else "right")
    left = [each for each in found.candidates if each.measured is None]
    references = {"pure width": found.pure_width, "pure drop": found.pure_drop}
    for each in [*found.measured, *left[:_SHOWN]]:
        kind = next((f" ({name})" for name, shape in references.items() if shape and shape.size == each.size), "")
        cells = (_nats(each.predicted, bool(found.measured)), _nats(each.plain), _nats(each.reconstructed))
        shown.add_row(f"{found.name(each)}{kind}", f"{each.total:,}", f"{each.active:,}", *cells)
    if len(left) > _SHOWN:
        shown.add_row(f"and {len(left) - _SHOWN} more")
    return shown


def _title(found: Search) -> str:
    names = zip(("parameters", "active parameters"), found.limits, strict=True)
    asked = " and ".join(f"{limit:,} {name}" for name, limit in names if limit is not None)
    of = (
        "growth of the validation loss, nats per token"
        if found.measured
        else "predicted growth of the loss, in no unit"
    )
    return f"at most {asked}: {of}"


def _nats(value: float | None, unit: bool = True) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if unit else f"{value:.3g}"


def _notes(found: Search, checked: Checked | None) -> list[str]:
    """What the table does not say."""
    lines = []
    if found.original is None:
        lines.append("nothing was measured: give the model and --data instead of statistics, and the best are.")
    else:
        wrong, pairs = found.misordered
        lines.append(
            f"uncut {found.original:.3f}; of {pairs} pairs of these, {wrong} were predicted the wrong way round"
        )
    points = "; ".join(f"{found.name(each)} at {each.total:,}" for each in found.frontier)
    lines.append(f"predicted best of smaller sizes: {points}")
    if found.wider:
        layers = ", ".join(f"{layer} ({width:.0f})" for layer, width in found.wider.items())
        lines.append(
            f"layers that would want more than width {found.best.expert_width}, which a stock model has everywhere: {layers}"
        )
    for (layer, expert), growth in (checked.without if checked else {}).items():
        lines.append(f"without the super expert {expert} of layer {layer} the loss grows by {growth:.3f}")
    return [f"  {line}" for line in lines]
