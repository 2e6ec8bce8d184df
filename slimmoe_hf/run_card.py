"""What the model card of a finished run says: `RunFacts` in, README.md out.

Every number is the run's own: from its report, its recipe, its plans and its training logs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import EvalResult

from slimmoe_hf import card
from slimmoe_hf.describe import scored_parts
from slimmoe_hf.harness import TaskResult
from slimmoe_hf.lineage import Base, is_hub_id
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.recipe import Recipe
from slimmoe_hf.report import ModelReport, Report, speed
from slimmoe_hf.routing import COLLAPSED, collapsed_experts
from slimmoe_hf.stage_card import stage_settings

_PICTURES = "Made by `slimmoe plot` from what the run left; `report.json` and `plans/` hold the numbers behind them."


@dataclass(frozen=True)
class RunFacts:
    """All that a card is made from; nothing in it is a path on somebody's machine.

    Attributes:
        repo: The Hub id that it is published under, if known.
        base: What was slimmed, with the licence that the card names.
        license: The licence that the user named, if any.
        teacher: What every stage learned from, if that is another model.
        recipe, report: As published.
        plans: One a stage.
        histories: The trainer's log of every stage; empty where there is none.
        pictures: Path, caption and alternative text in one, of every image.
        config: Of the published model.
        chat: Whether the tokenizer has a chat template.
        branch: Where it is published, if not on main.
        engines: Which engines load it, in Markdown.
    """

    repo: str | None
    base: Base
    license: str | None
    teacher: str | None
    recipe: Recipe
    report: Report
    plans: list[CompressionPlan]
    histories: list[list[dict[str, Any]]]
    pictures: list[tuple[str, str]]
    config: dict[str, Any]
    chat: bool
    branch: str | None = None
    engines: str = ""

    @property
    def original(self) -> ModelReport:
        """The teacher, measured; where that is another model, nothing measured the original."""
        return self.report.models[0]

    @property
    def compared(self) -> str:
        """What `original` is to be called."""
        return "original" if self.teacher is None else "teacher"

    @property
    def result(self) -> ModelReport:
        """What is published, measured."""
        return self.report.models[-1]

    @property
    def name(self) -> str:
        """What the model is called."""
        if self.repo is not None:
            return self.repo.split("/")[-1]
        return f"{self.base.name.split('/')[-1]}, slimmed to {card.count(self.result.total_parameters)}"


def run_card(facts: RunFacts) -> str:
    """The README.md of a run's model."""
    data = card.metadata(facts.name, facts.base, [facts.recipe.data.source], _results(facts))
    prompts = facts.report.evaluation.prompts
    return card.assemble(data, facts.name, [
        ("", _summary(facts)),
        ("Use it", _code(facts, prompts[0] if prompts else "The")),
        ("Before and after", _before_and_after(facts)),
        ("Benchmark tasks", _tasks(facts)),
        ("What was cut, and how it recovered", _pictures(facts)),
        ("How it was made", _making(facts)),
        ("Where it loads", facts.engines),
        ("Limits", _limits(facts)),
        ("Samples", _samples(facts)),
        ("Make it again", _again(facts)),
        ("Licence", card.license_text(facts.base, facts.license)),
        ("Citation", f"The method is SlimMoE ([arXiv 2506.18349]({card.PAPER})):\n\n{card.CITATION}\n\n{_versions(facts)}"),
    ])  # fmt: skip


def _code(facts: RunFacts, prompt: str) -> str:
    return f"{card.loading_code(facts.repo, prompt, facts.branch)}\n\n{_use(facts)}"


def _original(facts: RunFacts) -> str:
    base = facts.base
    return f"[{base.hub_id}](https://huggingface.co/{base.hub_id})" if base.hub_id else f"`{base.name}`"


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{name}`"


def _results(facts: RunFacts) -> list[EvalResult]:
    """Of the published model only, for the Hub's `model-index`."""
    evaluation, result = facts.report.evaluation, facts.result
    values = [("loss", "nats per token", result.loss), ("perplexity", "perplexity", result.perplexity),
              ("bits_per_byte", "bits per byte", result.bits_per_byte)]  # fmt: skip
    own = [
        EvalResult(
            task_type="text-generation", task_name="Text generation", dataset_type=evaluation.data,
            dataset_name=evaluation.data, dataset_split=evaluation.split, dataset_revision=evaluation.revision,
            metric_type=kind, metric_name=label, metric_value=round(value, 4),
        )
        for kind, label, value in values
    ]  # fmt: skip
    tasks = [
        EvalResult(
            task_type="text-generation", task_name="Text generation", dataset_type=task.dataset or task.task,
            dataset_name=task.task, dataset_revision=task.dataset_revision, metric_type=task.metric,
            metric_name=f"{task.metric}, {task.num_fewshot}-shot", metric_value=round(task.value, 4),
        )
        for task in result.tasks
        if task.limit is None
    ]  # fmt: skip
    return [*own, *tasks]


def _summary(facts: RunFacts) -> str:
    before, after, stages = facts.original, facts.result, len(facts.recipe.stages)
    share = after.total_parameters / before.total_parameters
    stock, plural = facts.config.get("model_type", "stock"), "stages" if stages > 1 else "stage"
    first, last = facts.plans[0].meta.before, facts.plans[-1].meta.after
    stay = "" if last.num_experts < first.num_experts else f"; all {first.num_experts} experts stay"
    scored = "neurons" if stay else "neurons and experts" if last.expert_width < first.expert_width else "experts"
    teacher = f"another model, {_link(facts.teacher)}," if facts.teacher else "the original"
    made = "slimmed" if facts.teacher else f"made **{1 / share:.1f} times smaller**"
    text = (
        f"{_original(facts)} {made} in {stages} {plural} of [SlimMoE]({card.PAPER}): "
        f"{scored} were scored on real text, the least important ones cut ({card.cut_in_words(first, last)}{stay}), and what "
        f"was left was distilled from {teacher} after each cut. It is a stock `{stock}` checkpoint: plain "
        "`transformers` loads it."
    )
    return f"{text}\n\n{card.table(_glance(facts))}"


def _glance(facts: RunFacts) -> list[list[str]]:
    before, after, split = facts.original, facts.result, facts.report.evaluation.split
    return [
        ["", facts.compared, "this model", "difference" if facts.teacher else "change"],
        ["parameters", f"{before.total_parameters:,}", f"{after.total_parameters:,}", _change(after, before, "total_parameters")],
        ["active per token", f"{before.active_parameters:,}", f"{after.active_parameters:,}",
         _change(after, before, "active_parameters")],
        ["weights on disk", _megabytes(before.bytes), _megabytes(after.bytes), _change(after, before, "bytes")],
        [f"{split} loss, nats per token", f"{before.loss:.4f}", f"{after.loss:.4f}", f"{after.loss - before.loss:+.4f}"],
    ]  # fmt: skip


def _change(after: ModelReport, before: ModelReport, what: str) -> str:
    return f"{vars(after)[what] / vars(before)[what] - 1:+.0%}"


def _megabytes(size: int) -> str:
    return f"{size / 1e9:,.2f}\u00a0GB" if size >= 1e9 else f"{size / 1e6:,.1f}\u00a0MB"


def _use(facts: RunFacts) -> str:
    dtype = str(facts.config.get("dtype", "")).removeprefix("torch.")
    stored = f"Weights are stored in {dtype}. " if dtype else ""
    return stored + "Nothing has to be installed but `transformers` and PyTorch, and no code comes with the weights."


def _before_and_after(facts: RunFacts) -> str:
    evaluation, models = facts.report.evaluation, facts.report.models
    rows = [
        ["model", "parameters", "active", "file", f"{evaluation.split} loss", "perplexity", "bits/byte", "tokens/s"]
    ]
    for model in models:
        name = facts.compared if model.step == "teacher" else model.name.replace("-", " ")
        rows.append([
            f"**{name}** (this one)" if model is models[-1] else name, f"{model.total_parameters:,}",
            f"{model.active_parameters:,}", _megabytes(model.bytes), f"{model.loss:.4f}", f"{model.perplexity:.1f}",
            f"{model.bits_per_byte:.4f}", speed(model),
        ])  # fmt: skip
    text = (
        f"Loss is in nats per predicted token, over {evaluation.tokens:,} tokens of the {evaluation.split} split of "
        f"{_link(evaluation.data)} ({evaluation.documents:,} documents in blocks of {evaluation.max_length:,} tokens), measured "
        f"in {evaluation.dtype} on each checkpoint as reloaded from disk; nothing was trained on that split or chosen by it. "
        "Tokens per second are of a forward pass on the machine of the run: compare them with each other only."
    )
    if facts.original.streamed:
        text += f" The {facts.compared} was measured one decoder layer at a time, which gives no speed."
    return f"{card.table(rows)}\n\n{text}"


def _tasks(facts: RunFacts) -> str:
    if not facts.result.tasks:
        return ""
    others: list[TaskResult] = facts.original.tasks
    rows = [["task", "metric", "shots", facts.compared, "this model"]]
    for task in facts.result.tasks:
        same = next((other for other in others if other.same_question(task)), None)
        part = f" (first {task.limit} questions only)" if task.limit is not None else ""
        rows.append([f"{task.task}{part}", task.metric, str(task.num_fewshot), _scored(same), _scored(task)])
    return f"{card.table(rows)}\n\nBy lm-evaluation-harness, with its standard error where it gives one."


def _scored(task: TaskResult | None) -> str:
    if task is None:
        return "-"
    return f"{task.value:.4f}" + (f" ± {task.stderr:.4f}" if task.stderr is not None else "")


def _pictures(facts: RunFacts) -> str:
    shown = [f"![{_alternative(caption)}]({path})\n\n*{card.escape(caption)}*" for path, caption in facts.pictures]
    return "\n\n".join([*shown, _PICTURES]) if shown else ""


def _alternative(caption: str) -> str:
    """What a picture shows, without what it found: that stands below it. Nothing in it ends the alternative text early."""
    return " ".join(caption.partition(": ")[0].replace("[", "(").replace("]", ")").split())


def _making(facts: RunFacts) -> str:
    stages = list(zip(facts.recipe.stages, facts.plans, facts.histories, strict=True))
    columns = [stage_settings(facts.recipe, facts.plans, *stage) for stage in stages]
    heading = ["", *(f"stage {number}" for number in range(1, len(stages) + 1))]
    names = max(columns, key=len)  # of a stage that solved output projections, where one did
    rows = [heading, *([name, *(column.get(name, "-") for column in columns)] for name in names)]
    source, taught = facts.recipe.data.source, facts.teacher or "the original model"
    anew = any(plan.meta.repairing for plan in facts.plans)
    solved = "solved the output projections of what stayed anew on the same text, " if anew else ""
    text = (
        f"Every stage scored its current student on text set aside for that, kept the {scored_parts(facts.plans)} with the "
        f"highest scores, {solved}and then trained the smaller model on the next-token distributions of {taught}. Text: "
        f"{_link(source)}; what was scored on, trained on, validated on and tested on never overlaps. The plans, index by "
        "index, are in `plans/`."
    )
    return f"{text}\n\n{card.table(rows, numbers=False)}"


def _limits(facts: RunFacts) -> str:
    before, after, evaluation = facts.original, facts.result, facts.report.evaluation
    gap, tokens = after.loss - before.loss, sum(_tokens(history) for history in facts.histories)
    worse = f"{abs(gap):.4f} nats per token {'worse' if gap > 0 else 'better'} than"
    window = int(facts.config.get("max_position_embeddings") or 0)
    points = [
        f"On its own test text it is {worse} the {facts.compared} ({math.exp(gap):.2f} times its perplexity).",
        f"It was trained back on {tokens:,} tokens of one source, {_link(evaluation.data)}. On text of another kind or language "
        "it may have lost more than the table shows; that was not measured.",
    ]
    if not after.tasks:
        points.append(
            "No benchmark was run on it: knowledge, reasoning and the following of instructions are not measured."
        )
    points.append("Bias, safety and truthfulness were not evaluated. At best they are what they were in the original.")
    if window > evaluation.max_length:
        points.append(
            f"Trained and measured on blocks of {evaluation.max_length:,} tokens; the config allows {window:,}, which was not "
            "tried."
        )
    if facts.chat:
        points.append("The chat template comes from the original. Whether chats still work was not measured.")
    points += _router_points(facts)
    points.append("No serving engine was run on it; the files have the form that vLLM's code expects of the family.")
    return "\n".join(f"- {point}" for point in points)


def _tokens(history: Sequence[dict[str, Any]]) -> int:
    return max((int(entry["num_tokens"]) for entry in history if "num_tokens" in entry), default=0)


def _router_points(facts: RunFacts) -> list[str]:
    """Experts that the routers hardly use, by the held-out text, or else by the end of training."""
    logged = [entry["router_load"] for entry in (facts.histories or [[]])[-1] if "router_load" in entry]
    where, shares = "the held-out text", facts.result.router_load
    if not shares and logged:
        where, shares = "the last training text", logged[-1]
    if not shares:
        return []
    layers = facts.result.router_layers or list(range(len(shares)))
    starved = collapsed_experts(torch.tensor(shares))
    if not starved:
        return []
    named = ", ".join(f"expert {expert} of layer {layers[row]}" for row, expert in starved[:4])
    more = f" and {len(starved) - 4} more" if len(starved) > 4 else ""
    return [
        f"**Routers have collapsed in part**: on {where}, {named}{more} got less than {COLLAPSED:.0%} of an even load."
    ]


def _samples(facts: RunFacts) -> str:
    prompts, parts = facts.report.evaluation.prompts, []
    shown = [
        (facts.compared, facts.original),
        ("cut, not yet distilled", facts.report.models[-2]),
        ("this model", facts.result),
    ]
    for number, prompt in enumerate(prompts):
        start = " ".join(prompt.split())
        lines = [
            f"- {label}: *…{card.escape(model.samples[number].removeprefix(start))}*"
            for label, model in shown
            if number < len(model.samples)
        ]
        parts.append("\n".join([f"**{card.escape(start)}** …", "", *lines]))
    intro = "The likeliest continuations (greedy decoding) of the openings of held-out documents, not chosen by hand."
    return "\n\n".join([intro, *parts]) if parts else ""


def _again(facts: RunFacts) -> str:
    recipe, evaluation = facts.recipe, facts.report.evaluation
    names = [name for name in (recipe.model, recipe.teacher, recipe.data.source, recipe.accelerate) if name]
    local = [f"`{name}`" for name in dict.fromkeys(names) if name != "sotu" and not is_hub_id(name)]
    own = f" Where the recipe says {', '.join(local)}, put a path of yours." if local else ""
    limit = f" --tokens {evaluation.token_limit}" if evaluation.token_limit else ""
    text = (
        f"The run took {_duration(facts.report.seconds)} of computing; on the same machine and number of threads it gives the "
        f"same weights, bit for bit.{own} `report.json` has every number of this card, with the hashes of the weights that it "
        "was measured on."
    )
    return f"""```bash
slimmoe run recipe.yaml --output again          # with slimmoe_hf {facts.report.version}
slimmoe eval . --data {evaluation.data} --split {evaluation.split} --max-length {evaluation.max_length}{limit}    # the loss above
slimmoe plan show plans/stage-1                 # what was kept, layer by layer
```

{text}"""


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} seconds"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} minutes"


def _versions(facts: RunFacts) -> str:
    saved = facts.config.get("transformers_version")
    return f"Made with slimmoe_hf {facts.report.version}" + (f" and transformers {saved}." if saved else ".")
