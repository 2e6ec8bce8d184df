"""Model cards from plain data: metadata as the Hub takes it, Markdown, and the check that both hold together.

What a card says is decided elsewhere (`run_card` for a run, `publishing` for a Trainer); here is how it is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from slimmoe_hf.families import Shape
from slimmoe_hf.lineage import CARD, Base, is_hub_id

MARK = "<!-- Written by slimmoe_hf. Delete this line and the card is yours: it will not be written again. -->"
PLACE = "path/to/this/folder"
TAGS = ("moe", "mixture-of-experts", "pruning", "distillation", "slimmoe")
# What the cards that transformers, TRL and PEFT write have in them, all of it, until a person has taken them up. Tags are
# no sign: they stay.
_AUTOMATIC = (
    (MARK,),
    ("<!-- This model card has been generated automatically according to the information the Trainer had access to.",),
    ("# Model Card for ", "It has been trained using [TRL](", 'question = "If you had a time machine'),
    ("# Model Card for Model ID", "- **Developed by:** [More Information Needed]",
     "Use the code below to get started with the model.\n\n[More Information Needed]"),
)  # fmt: skip
PAPER = "https://arxiv.org/abs/2506.18349"
CITATION = """```bibtex
@inproceedings{li2025slimmoe,
  title     = {SlimMoE: Structured Compression of Large MoE Models via Expert Slimming and Distillation},
  author    = {Zichong Li and Chen Liang and Zixuan Zhang and Ilgee Hong and Young Jin Kim and Weizhu Chen and Tuo Zhao},
  booktitle = {Conference on Language Modeling (COLM)},
  year      = {2025},
  url       = {https://arxiv.org/abs/2506.18349}
}
```"""
_IMAGE = re.compile(r"!\[[^\]]*\]\(\s*(?:<([^>\n]+)>|([^)\s]+))(?:\s+[\"'][^)]*)?\s*\)|<img[^>]+src=[\"']([^\"']+)")
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$])")


def metadata(
    name: str,
    base: Base,
    datasets: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
    tags: Sequence[str] = TAGS,
    adapter: bool = False,
) -> ModelCardData:
    """The card's YAML.

    The Hub knows four relations to a base model: adapter, merge, quantized and finetune. A slimmed and distilled model
    is none of the first three, and its weights were trained on from the base's, so it is a finetune; `pruning` and
    `distillation` are among the tags.

    Args:
        name: Of the model, for its results.
        base: What it was made from.
        datasets: What it was trained on; names that are no Hub ids are left out.
        results: Measured on the model itself.
        tags: For the Hub's search.
        adapter: Whether these are the weights of a PEFT adapter.
    """
    relation = None if base.hub_id is None else "adapter" if adapter else "finetune"
    return ModelCardData(
        base_model=base.hub_id, base_model_relation=relation, language=base.languages or None,
        license=base.license, license_name=base.license_name, license_link=base.license_link,  # type: ignore[arg-type]
        library_name="peft" if adapter else "transformers", pipeline_tag="text-generation",
        datasets=[dataset for dataset in datasets if is_hub_id(dataset)] or None, tags=list(tags),
        model_name=name, eval_results=list(results) or None,
    )  # fmt: skip


def assemble(data: ModelCardData, title: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole README.md.

    Args:
        data: From `metadata`.
        title: The first heading.
        sections: Heading and text of each; the first heading may be empty, and sections without text are left out.
    """
    parts = [f"---\n{data.to_yaml()}\n---", MARK, f"# {title}"]
    for heading, text in sections:
        if text.strip():
            parts += [f"## {heading}", text.strip()] if heading else [text.strip()]
    return "\n\n".join(parts) + "\n"


def may_be_written(file: Path) -> bool:
    """Whether a card may be (over)written: there is none, or it was written by a program and not by a person."""
    text = file.read_text(encoding="utf-8") if file.is_file() else MARK
    return any(all(sign in text for sign in signs) for signs in _AUTOMATIC)


def refuse_orders(file: Path, base_model: str | None, license: str | None) -> None:
    """Raise ValueError where somebody names a base model or licence, and the card is a person's own and stays as it is."""
    if (base_model is not None or license is not None) and not may_be_written(file):
        raise ValueError(f"{file}: is your own card and stays as it is: name licence and base model there.")


def amended(text: str, repo: str, base: Base | None, license: str | None, branch: str | None = None) -> str:
    """A card that `slimmoe_hf` wrote, with what was not known then: the repository, the original model, the licence.

    Args:
        text: The whole README.md.
        repo: The Hub id that it is published under.
        base: The original model, where the user names it.
        license: The licence, where the user names it.
        branch: Where it is published, if not on main.
    """
    old, at = ModelCard(text), _revision(branch)
    data, body = old.data, old.text.replace(f'"{PLACE}"', f'"{repo}"')
    loads = rf'(from_pretrained\((?:name|model, "{re.escape(repo)}"))(?:, revision="[^"]*")?'
    body = re.sub(loads, lambda found: found[1] + at, body)
    if base is not None and base.hub_id is not None:
        data["base_model"] = base.hub_id
        data["base_model_relation"] = "adapter" if data["library_name"] == "peft" else "finetune"
    if license is not None:
        data["license"], data["license_name"], data["license_link"] = license, None, None
        said = license_text(Base(repo, license=license), license)
        body = re.sub(r"(?ms)^## Licence\n.*?(?=^## |\Z)", f"## Licence\n\n{said}\n\n", body)
    return f"---\n{data.to_yaml()}\n---\n{body}"


def check_card(text: str, names: Collection[str]) -> None:
    """What can be checked of a card without the Hub, which checks it again.

    Args:
        text: The whole README.md.
        names: Every file of its folder, relative to it.

    Raises:
        ValueError: The metadata cannot be read or has a value of the wrong kind; or an image that it shows is not there.
    """
    try:
        values = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{CARD}: its metadata cannot be read: {' '.join(str(error).split())[:200]}") from error
    for key in ("library_name", "pipeline_tag", "license_name", "base_model_relation"):
        if not isinstance(values.get(key, ""), str):
            raise ValueError(f"{CARD}: {key} in its metadata is {values[key]!r}; it must be one word or name.")
    for key in ("license", "base_model", "datasets", "tags", "language"):
        found = values.get(key, [])
        if not all(isinstance(item, str) for item in (found if isinstance(found, list) else [found])):
            raise ValueError(f"{CARD}: {key} in its metadata is {found!r}; it must be a name or a list of names.")
    if missing := [image for image in images_of(text) if image not in set(names)]:
        raise ValueError(
            f"{CARD}: it shows {missing[0]}, which is not in the folder. Bring the image, or drop the link."
        )


def images_of(text: str) -> list[str]:
    """The images that a card shows, as paths relative to it; those from elsewhere on the web are not among them."""
    found = [next(filter(None, groups)) for groups in _IMAGE.findall(text)]
    local = [image for image in found if "://" not in image and not image.startswith("data:")]
    return [unquote(urlsplit(image).path).removeprefix("./") for image in local]


def table(rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A Markdown table whose first row is its heading.

    Args:
        rows: Cells; a `|` in them is escaped.
        numbers: Whether every column but the first is set flush right.
    """
    rule = ["---", *(["---:" if numbers else "---"] * (len(rows[0]) - 1))]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))


def escape(text: str) -> str:
    """Text that Markdown would take for its own, such as what a model wrote, to be shown as it is on one line."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return _SPECIAL.sub(r"\\\1", " ".join(printable.split()))


def count(number: int) -> str:
    """A number of parameters in three digits: `41.9B`, `1.99M`."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{unit}"
    return str(number)


def loading_code(
    repo: str | None, prompt: str, branch: str | None = None, loader: str = "AutoModelForCausalLM", shared: bool = False
) -> str:
    """How to load the model and have it write, as a Markdown block.

    Args:
        repo: Its Hub id; None where it has none yet.
        prompt: What it is to continue.
        branch: Where it is published, if not on main.
        loader: The class of transformers that loads it.
        shared: Its experts are shared, which needs this package.
    """
    at = _revision(branch)
    ours = (
        "import slimmoe_hf  # its experts are merged and shared, which transformers alone does not load\n"
        if shared
        else ""
    )
    return f"""```python
{ours}from transformers import {loader}, AutoTokenizer

name = "{repo or PLACE}"
tokenizer = AutoTokenizer.from_pretrained(name{at})
model = {loader}.from_pretrained(name{at}, dtype="auto")

prompt = {json.dumps(prompt, ensure_ascii=False)}
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""


def _revision(branch: str | None) -> str:
    """What `from_pretrained` has to be told of a branch."""
    return f', revision="{branch}"' if branch not in (None, "main") else ""


def adapter_code(repo: str | None, base: Base, branch: str | None = None, loader: str = "AutoModelForCausalLM") -> str:
    """How to load a PEFT adapter, as a Markdown block.

    Args:
        repo: Its Hub id; None where it has none yet.
        base: The model that it adapts.
        branch: Where it is published, if not on main.
        loader: The class of transformers that loads the model.
    """
    return f"""```python
from peft import PeftModel
from transformers import {loader}

model = {loader}.from_pretrained("{base.hub_id or "path/to/the/model"}", dtype="auto")
model = PeftModel.from_pretrained(model, "{repo or PLACE}"{_revision(branch)})
```"""


def license_text(base: Base, license: str | None) -> str:
    """The card's words on its licence.

    Args:
        base: The original model, its licence the one that the card names.
        license: What the user named, if anything.
    """
    if base.license is None:
        return (
            f"The card of `{base.name}` names no licence, or could not be read, so this card names none. The terms of "
            f"`{base.name}` apply to what was made from it: look them up before you use this model."
        )
    named = base.license if isinstance(base.license, str) else ", ".join(base.license)
    link = f" ([{base.license_name or named}]({base.license_link}))" if base.license_link else ""
    origin = (
        "as whoever made this model says" if license is not None else f"carried over from the card of `{base.name}`"
    )
    return f"{named}{link}, {origin}."


def word(value: Any) -> str:
    """A setting as it is written in a recipe; transformers' defaults are enumerations."""
    return str(value).rsplit(".", 1)[-1].lower()


def loss_in_words(said: Mapping[str, Any]) -> str:
    """What was minimised, from the arguments of a `DistillationConfig`."""
    kinds = {0.0: "forward KL", 1.0: "reverse KL"}
    kind = kinds.get(float(said["beta"]), f"JSD ({said['beta']:g})")
    top = f", top {said['loss_top_k']}" if said["loss_top_k"] else ""
    parts = [f"{_weight(said['distillation_weight'])}{kind}{top}, T = {said['temperature']:g}"]
    if said["crossentropy_weight"]:
        parts.append(f"{_weight(said['crossentropy_weight'])}cross-entropy")
    for name, term in (("router_logits_weight", "router KL"), ("hidden_states_weight", "hidden-state error")):
        if said.get(name):
            parts.append(f"{_weight(said[name])}{term}")
    return " + ".join(parts)


def _weight(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]:g} to {value[1]:g} x "
    return "" if float(value) == 1.0 else f"{float(value):g} x "


def plan_fingerprint(folder: Path) -> str | None:
    """Which weights a plan was made for (see `identity.model_fingerprint`); None where no plan says."""
    try:
        fingerprint = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fingerprint if isinstance(fingerprint, str) else None


def cut_in_words(before: Shape, after: Shape) -> str:
    """What became smaller, for the middle of a sentence."""
    cut = []
    if after.num_experts != before.num_experts:
        cut.append(f"every layer from {before.num_experts} to {after.num_experts} experts")
    if after.expert_width != before.expert_width:
        cut.append(f"every expert from {before.expert_width:,} to {after.expert_width:,} neurons")
    if after.kv_groups != before.kv_groups:
        cut.append(f"attention from {before.kv_groups} to {after.kv_groups} key/value groups")
    return ", ".join(cut) or "nothing"


def plan_text(folder: Path) -> str:
    """What a plan beside the weights says of the cut, in a sentence; nothing where there is none that can be read."""
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        before, after, criterion = Shape(**plan["before"]), Shape(**plan["after"]), plan["criterion"]
        cut = cut_in_words(before, after)
        merging, of_experts = plan.get("merging"), plan.get("expert_criterion")  # which older plans lack
        if merging is not None:
            if merging.get("counts") == "adaptive":
                cut += " on average, the most used ones"
            how = f"by `{merging['similarity']}` into groups by `{merging['grouping']}`, averaged by how much each is used"
            return f"Its experts were merged: {cut}, {how}; `{folder.name}/` says which."
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    narrowed = (before.expert_width, before.kv_groups) != (after.expert_width, after.kv_groups)
    names = dict.fromkeys([*([criterion] if narrowed or of_experts is None else []), *filter(None, [of_experts])])
    chosen = ", experts by ".join(f"`{name}`" for name in names)
    solved = ", output projections solved anew" if plan.get("repairing") else ""
    return f"It was slimmed: {cut}, chosen by {chosen}{solved}; `{folder.name}/` says which stayed."
