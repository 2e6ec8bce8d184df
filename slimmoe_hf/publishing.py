"""What a Trainer publishes: the form that others load and serve, with our card, in one commit, and nothing else.

A stock Trainer pushes what lies in its output folder: its training arguments as a pickle, `use_cache: false`, a card
that knows the model's name; and where the Hub's fast storage is installed, in several commits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from slimmoe_hf import card
from slimmoe_hf.arguments import DistillationConfig, Seq2SeqDistillationConfig
from slimmoe_hf.lineage import CARD, Base, find_base, is_hub_id, public_name
from slimmoe_hf.serving import missing_biases, write_serving_config
from slimmoe_hf.upload import Pushed, public_form, publishable, push_files

_METRICS = {
    "loss": "training loss", "kl": "KL to the teacher, training text", "ce": "cross-entropy, training text",
    "top1_agreement": "same likeliest token as the teacher, training text", "eval_loss": "evaluation loss",
    "eval_kl": "KL to the teacher, evaluation text", "eval_ce": "cross-entropy, evaluation text",
    "eval_top1_agreement": "same likeliest token as the teacher, evaluation text",
}  # fmt: skip
_HUB_FILE = "hf://datasets/"


@dataclass(frozen=True)
class Training:
    """What the card of a trained model is made from.

    Attributes:
        name: What to call it. repo: Its Hub id, if known. branch: Where it is published, if not on main.
        base: What it was made from. teacher: What it learned from: a Hub id, or in words.
        license: The licence that the user named, if any.
        datasets: Hub ids of the training data.
        tags: For the Hub's search.
        args: The training arguments. processes: How many trained.
        history: The trainer's log.
        folder: Where the model is written, with a plan where it was slimmed.
        adapter: Whether it is a PEFT adapter.
    """

    name: str
    repo: str | None
    base: Base
    teacher: str
    license: str | None
    datasets: list[str]
    tags: list[str]
    args: DistillationConfig | Seq2SeqDistillationConfig
    processes: int
    history: list[dict[str, Any]]
    folder: Path
    adapter: bool
    branch: str | None = None


def training_card(training: Training) -> str:
    """The README.md of a model that a `DistillationTrainer`, or that for encoder-decoders, trained."""
    base, teacher = training.base, training.teacher
    data = card.metadata(training.name, base, training.datasets, tags=training.tags, adapter=training.adapter)
    origin = f"[{base.hub_id}](https://huggingface.co/{base.hub_id})" if base.hub_id else f"`{base.name}`"
    taught = f"[{teacher}](https://huggingface.co/{teacher})" if is_hub_id(teacher) else teacher
    plan = card.plan_text(training.folder / "plan")
    loader = "AutoModelForCausalLM" if isinstance(training.args, DistillationConfig) else "AutoModelForSeq2SeqLM"
    code = (
        card.adapter_code(training.repo, base, training.branch, loader)
        if training.adapter
        else card.loading_code(training.repo, "The", training.branch, loader)
    )
    summary = f"{origin}, trained on the next-token distributions of {taught} with slimmoe_hf. {plan}"
    return card.assemble(data, training.name, [
        ("", summary),
        ("Use it", code),
        ("Last measured while training", _measured(training.history)),
        ("How it was trained", card.table([["setting", "value"], *map(list, _settings(training).items())], numbers=False)),
        ("Limits", "What is measured above comes from training, not from a test of its own. Benchmarks, bias and safety were "
                   "not evaluated, nor text of another kind than it was trained on."),
        ("Licence", card.license_text(base, training.license)),
        ("Citation", f"The method is SlimMoE ([arXiv 2506.18349]({card.PAPER})):\n\n{card.CITATION}"),
    ])  # fmt: skip


def _measured(history: list[dict[str, Any]]) -> str:
    last: dict[str, Any] = {}
    for entry in history:
        last |= {key: (entry[key], entry.get("step")) for key in _METRICS if key in entry}
    rows = [[_METRICS[key], f"{last[key][0]:.4f}", str(last[key][1])] for key in _METRICS if key in last]
    return card.table([["", "value", "at step"], *rows]) if rows else ""


def _settings(training: Training) -> dict[str, str]:
    args, steps = training.args, max((entry.get("step", 0) for entry in training.history), default=0)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * training.processes
    length = args.max_length if isinstance(args, DistillationConfig) else None
    tokens = [int(entry["num_tokens"]) for entry in training.history if "num_tokens" in entry]
    return {
        "optimizer steps": f"{steps:,}",
        "tokens trained on": f"{tokens[-1]:,}" if tokens else "-",
        "batch": f"{rows:,} rows of at most {length:,} tokens" if length else f"{rows:,} rows",
        "learning rate": f"{args.learning_rate:g}, {card.word(args.lr_scheduler_type)}",
        "optimizer": card.word(args.optim),
        "loss": card.loss_in_words(vars(args)),
        "seed": str(args.seed),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("slimmoe_hf", "transformers", "trl", "torch")),
    }


def _teacher_in_words(teacher: str, student: str) -> str:
    """What a card calls the teacher, from where it and the student were loaded."""
    if teacher and teacher == student:
        return "the original model"
    return teacher if is_hub_id(teacher) else f"`{public_name(teacher)}`" if teacher else "another model"


def hub_datasets(dataset: Any) -> list[str]:
    """The Hub ids that a dataset was downloaded from, as far as it remembers them."""
    if not isinstance(dataset, Dataset) or not dataset.info.download_checksums:
        return []
    files = [file.removeprefix(_HUB_FILE) for file in dataset.info.download_checksums if file.startswith(_HUB_FILE)]
    return sorted({file.split("@")[0] for file in files if file.split("@")[0].count("/") == 1})


class PublishingTrainer(Trainer):
    """A `Trainer` whose final model is what others load and serve; its checkpoints stay as they are.

    `save_model()` and `push_to_hub()` write the form that serving engines expect (see `slimmoe_hf.serving`). Checkpoints
    hold exactly the trained weights, which resuming needs.

    With `args.push_to_hub`, `save_model()` pushes too. Nothing is pushed while it trains, whatever `args.hub_strategy` says:
    a stock Trainer would push its folder as it is, the training arguments with the token in them among the rest.
    """

    args: DistillationConfig | Seq2SeqDistillationConfig
    teacher_name: str = ""
    teacher_fingerprint: str | None = None
    _branch: str | None = None
    _serving_form = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, tokenizer and config; a final model, not a checkpoint, in the form that engines expect."""
        self._serving_form = output_dir is None or not _internal_call
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._serving_form = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        whole = self._serving_form and isinstance(model, PreTrainedModel)
        if whole and (biases := missing_biases(model)):
            state_dict = {**(model.state_dict() if state_dict is None else state_dict), **biases}
        super()._save(output_dir, state_dict)
        folder = Path(str(self.args.output_dir) if output_dir is None else output_dir)
        if whole and self.args.should_save and (folder / "config.json").is_file():
            write_serving_config(folder)

    def create_model_card(  # type: ignore[override]  # TRL's signature, not transformers'
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Write the README.md of `output_dir`; one that a person wrote stays.

        Args:
            model_name: What to call the model; the repository's or the folder's name by default.
            dataset_name: Hub ids of the training data; where it was downloaded from by default.
            tags: More tags for the Hub's search.
            license: As the Hub writes it; the original model's by default, where its card is at hand.
        """
        folder = Path(str(self.args.output_dir))
        if not self.is_world_process_zero() or not card.may_be_written(folder / CARD):
            return
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.accelerator.unwrap_model(self.model)
        repo = self.hub_model_id if self.hub_model_id and "/" in self.hub_model_id else None
        given = [dataset_name] if isinstance(dataset_name, str) else dataset_name
        more = [tags] if isinstance(tags, str) else list(tags or ())
        student, teacher = str(model.config._name_or_path), self.teacher_name
        base, _ = find_base(self._origin(student, folder) or "a model", license=license, quiet=True)
        text = training_card(Training(
            name=model_name or (repo or folder.resolve().name).split("/")[-1], repo=repo, base=base,
            teacher=_teacher_in_words(teacher, student), license=license,
            datasets=hub_datasets(self.train_dataset) if given is None else list(given),
            tags=list(dict.fromkeys([*card.TAGS, *more])), args=self.args, processes=self.accelerator.num_processes,
            history=self.state.log_history, folder=folder, adapter=isinstance(model, PeftModel),
            branch=self._branch or self.args.hub_revision,
        ))  # fmt: skip
        (folder / CARD).write_text(text, encoding="utf-8")

    def _origin(self, student: str, folder: Path) -> str:
        """What the student was loaded as; or the teacher on the Hub, where a plan says that it was cut from its weights."""
        if is_hub_id(student) or not is_hub_id(self.teacher_name):
            return student
        said = {card.plan_fingerprint(place / "plan") for place in (folder, Path(student))} - {None}
        return self.teacher_name if said and self.teacher_fingerprint in said else student

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing; see the class."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push the model, its tokenizer, card and plan (with the output projections that it solved) to `args.hub_model_id`.

        All in one commit.

        No checkpoint, optimizer state or pickle goes along; pickles and older weights there are deleted in the same commit.

        Args:
            commit_message: Of the commit.
            blocking: Wait until it is there.
            token: Access token; `args.hub_token` or the one you are logged in with by default.
            revision: The branch; `args.hub_revision` or main by default.
            private: Make a new repository private; `args.hub_private_repo` by default.
            **kwargs: For `create_model_card`.

        Returns:
            The commit, or its future where it is not waited for; None on other processes than the first.

        Raises:
            ValueError: As `slimmoe_hf.upload.push_files`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        branch = self._branch = revision if revision is not None else self.args.hub_revision
        self.create_model_card(**kwargs)
        self._finish_current_push()
        push = partial(self._push, commit_message or "End of training", branch, token)
        return push() if blocking else HfApi().run_as_future(push)

    def _push(self, message: str, branch: str | None, token: str | None) -> CommitInfo:
        repo, folder = str(self.hub_model_id), Path(str(self.args.output_dir))
        files = public_form(publishable(folder), folder)
        pushed: Pushed = push_files(files, repo, message=message, branch=branch, existing="update", token=token)
        url = f"{HfApi().endpoint}/{repo}/commit/{pushed.commit}"
        return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=pushed.commit)
