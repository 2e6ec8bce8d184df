"""What can be done with the models of each family, as a table: of the terminal, of a script, and of the README."""

from __future__ import annotations

from typing import NamedTuple

from slimmoe_hf.families import FAMILIES, UNSUPPORTED, Family

COLUMNS = {
    "width": "expert width",
    "groups": "key/value groups",
    "experts": "drop experts",
    "merge": "merge experts",
    "stream": "block by block",
}
"""What is asked of a family, and how a table says it."""


class Answer(NamedTuple):
    """Whether something can be done.

    Attributes:
        word: `yes`, `some` (within a limit) or `no`. why: The limit, or the reason; empty for `yes`.
    """

    word: str
    why: str = ""


def support(row: Family) -> dict[str, Answer]:
    """An answer for each of `COLUMNS`."""
    width, experts, merge = Answer("yes"), Answer("yes"), Answer("yes")
    if row.shared_key is not None:
        width = Answer(
            "some",
            "a width that divides that of the shared experts, which are a whole number of expert widths wide: the number goes "
            "up as the width goes down, and they stay whole",
        )
    if row.routing_keys is not None:
        experts = Answer(
            "some", "as many of each routing group, so that a token finds enough in those that it may take from"
        )
        merge = Answer("some", "where the router has one group (n_group); merging would not keep several equal")
    return {
        "width": Answer("no", row.no_width) if row.no_width else width,
        "groups": Answer("no", row.no_groups) if row.no_groups else Answer("yes"),
        "experts": experts,
        "merge": Answer("no", row.no_merge) if row.no_merge else merge,
        "stream": Answer("no", row.no_stream) if row.no_stream else Answer("yes"),
    }


def supported() -> dict[str, dict[str, Answer]]:
    """Model type -> answers, those that nothing can be done with last."""
    nothing = {name: dict.fromkeys(COLUMNS, Answer("no", why)) for name, why in UNSUPPORTED.items()}
    return {**{name: support(row) for name, row in sorted(FAMILIES.items())}, **nothing}


def markdown() -> str:
    """The table of the README, its limits and reasons as notes."""
    notes: dict[str, int] = {}
    lines = [f"| model type | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, answers in supported().items():
        if name in UNSUPPORTED:
            continue
        cells = []
        for answer in answers.values():
            mark = f" ({notes.setdefault(answer.why, len(notes) + 1)})" if answer.why else ""
            cells.append(f"{answer.word}{mark}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    listed = [f"{number}. {why}" for why, number in notes.items()]
    refused = [f"- `{name}`: {why}" for name, why in UNSUPPORTED.items()]
    return "\n".join([*lines, "", *listed, "", "Known, and refused with the reason:", "", *refused])
