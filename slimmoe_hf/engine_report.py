"""Which engines load a checkpoint, and why not: the rules of `engines` applied to a folder, as text, as JSON, for a card."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from slimmoe_hf import card
from slimmoe_hf.engine_rules import Effect, Facts, facts_of
from slimmoe_hf.engines import ENGINES, Engine, Size
from slimmoe_hf.families import Shape

NOT_RUN = "not run"
_WORST: tuple[Effect, ...] = ("no", "not known", "differs", "loads")
_WORDS = {
    "loads": "loads", "differs": "loads with other outputs", "no": "does not load", "not known": "not known",
}  # fmt: skip


class Reason(BaseModel):
    """One rule that a checkpoint breaks.

    Attributes:
        effect: What becomes of it. text: Why. source: Where in the engine's files that is to be read; empty if not there.
        mended: `slimmoe export --for` writes a checkpoint that keeps the rule.
    """

    model_config = ConfigDict(frozen=True)

    effect: Effect
    text: str
    source: str
    mended: bool


def _worst(reasons: Iterable[Reason]) -> Effect:
    return min((reason.effect for reason in reasons), key=_WORST.index, default="loads")


class Verdict(BaseModel):
    """What one engine does with a checkpoint.

    Attributes:
        engine: As `slimmoe export --for` takes it. title, version: Of the code that was read. read: When. package: Where from.
        known: Rules are written for its family with this engine.
        effect: The worst of the reasons'.
        reasons: The rules that it breaks.
        runs: What was run with this engine and tiny models of the family; empty where nothing was.
        quantised: Forms that its sizes do not fit, and what happens then.
    """

    model_config = ConfigDict(frozen=True)

    engine: str
    title: str
    version: str
    read: str
    package: str
    known: bool
    effect: Effect
    reasons: list[Reason]
    runs: list[str]
    quantised: list[str]

    @property
    def exported(self) -> Effect:
        """What the effect would be after an export."""
        return _worst(reason for reason in self.reasons if not reason.mended)

    @property
    def words(self) -> str:
        """The effect as users read it, and what it would be after an export."""
        open_ = self.exported == "loads" and not all(reason.mended for reason in self.reasons)
        then = "loads on a condition" if open_ else _WORDS[self.exported]
        if self.exported == self.effect:
            return then
        return f"{_WORDS[self.effect]} as it is; after slimmoe export --for {self.engine}: {then}"

    @property
    def blocking(self) -> list[Reason]:
        """Why it would not load however it is written."""
        return [reason for reason in self.reasons if reason.effect == "no" and not reason.mended]

    @property
    def why(self) -> str:
        """The reasons in a line, the worst first; nothing where there are none."""
        order = sorted(self.reasons, key=lambda reason: _WORST.index(reason.effect))
        return "; ".join(reason.text for reason in order)


def assess(folder: Path, written: Mapping[str, Any] | None = None) -> list[Verdict]:
    """What every engine does with the checkpoint in a folder, by declared rules; no engine is run, no weight read.

    Args:
        folder: Of a checkpoint of any family; of one that an engine has no rules for, it says that nothing is known.
        written: As in `facts_of`.

    Raises:
        ValueError: It is no checkpoint, or damaged.
    """
    facts = facts_of(folder, {family for engine in ENGINES.values() for family in engine.families}, written)
    return [_verdict(name, engine, facts) for name, engine in ENGINES.items()]


def _verdict(name: str, engine: Engine, facts: Facts) -> Verdict:
    runs = [f"{run.what} ({run.versions}, {run.date})" for run in engine.runs if facts.family in run.families]
    known = facts.family in engine.families
    reasons = _reasons(engine, facts)
    return Verdict(
        engine=name, title=engine.title, version=engine.version, read=engine.read, package=engine.package, known=known,
        effect=_worst(reasons), reasons=reasons, runs=runs,
        quantised=_unfit(engine, facts.shape) if known and facts.shape is not None else [],
    )  # fmt: skip


def _reasons(engine: Engine, facts: Facts) -> list[Reason]:
    """What keeps an engine from loading a checkpoint, or from computing what transformers does."""

    def because(effect: Effect, text: str, mended: bool = False) -> Reason:
        return Reason(effect=effect, text=text, source="", mended=mended)

    unread = because("not known", f"no rules are written for {facts.family} with {engine.title}")
    if facts.family not in engine.families:
        form = "dense" if facts.form == "factored" else "duplicate"
        own = f"its experts are {facts.form}, which only slimmoe_hf loads; slimmoe export --form {form} makes it a stock model"
        return [unread] if facts.form is None else [because("no", own), unread]
    if facts.form is not None:
        return [
            because("no", f"its experts are {facts.form}, which only slimmoe_hf loads; --for makes it a stock checkpoint", True),
            because("not known", "what the stock checkpoint of it breaks is said when it is made"),
        ]  # fmt: skip
    found = [
        Reason(effect=rule.effect, text=text, source=rule.source, mended=rule.mended)
        for rule in engine.families[facts.family]
        if (text := rule.check(facts))
    ]
    if quantised := facts.written.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        undone = method == "fp8"
        text = f"its weights are quantised ({method}), and these rules are for others"
        found.append(because("not known", f"{text}; --for undoes that" if undone else text, undone))
    return found


def _unfit(engine: Engine, shape: Shape) -> list[str]:
    """Quantised forms whose blocks some rows do not fill."""
    sizes: dict[Size, int] = {
        "expert width": shape.expert_width, "model width": shape.hidden_size,
        "query heads' width": shape.query_heads * shape.head_width, "key heads' width": shape.kv_groups * shape.head_width,
    }  # fmt: skip
    found = []
    for form in engine.quantisers:
        unfit = [f"{what} {sizes[what]}" for what in form.sizes if sizes[what] % form.multiple]
        if unfit:
            rule = f"no multiple{'s' if len(unfit) > 1 else ''} of {form.multiple}"
            found.append(f"{form.name}: {', '.join(unfit)}: {rule}; {form.otherwise}")
    return found


def engine_text(verdicts: Sequence[Verdict], width: int) -> str:
    """The answer for people, a paragraph an engine, in lines of at most `width` characters where words allow it."""
    paragraphs = []
    for verdict in verdicts:
        ran = f"run with tiny models: {'; '.join(verdict.runs)}" if verdict.runs else f"{NOT_RUN} with any model"
        said = [f"by rules read {verdict.read} in {verdict.package}; this model was {NOT_RUN}"]
        said += [_reason(reason) for reason in verdict.reasons]
        said += [*(f"quantised, {text}" for text in verdict.quantised), ran]
        first = _wrapped(f"{verdict.title} {verdict.version}: {verdict.words}", width, "", "    ")
        paragraphs.append("\n".join([first, *(_wrapped(text, width, "  - ", "    ") for text in said)]))
    return "\n\n".join(paragraphs)


def _reason(reason: Reason) -> str:
    mended = "; --for mends that" if reason.mended and "--for" not in reason.text else ""
    return reason.text + mended + (f" [{reason.source}]" if reason.source else "")


def _wrapped(text: str, width: int, first: str, others: str) -> str:
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def engine_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A line an engine, for the end of a command."""
    lines = []
    for verdict in verdicts:
        why = f": {verdict.why}" if verdict.why else ""
        lines.append(f"{verdict.title} {verdict.version} (by rules of {verdict.read}, {NOT_RUN}): {verdict.words}{why}")
    return lines


def engine_section(verdicts: Sequence[Verdict]) -> str:
    """What a card says of engines, as Markdown; nothing where there are no verdicts."""
    if not verdicts:
        return ""
    rows = [["engine", "this model", "why", "quantised forms that do not fit"]]
    for verdict in verdicts:
        quantised = "; ".join(verdict.quantised) or "-"
        rows.append([f"{verdict.title} {verdict.version}", verdict.words, verdict.why or "-", quantised])
    said = f"By rules read off the engines' own code on {verdicts[0].read}, for the shape of this checkpoint; "
    return f"{said}it was not run in them.\n\n{card.table(rows, numbers=False)}"
