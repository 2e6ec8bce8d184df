"""A training run's progress on the terminal: steps, losses, time left."""

from __future__ import annotations

from typing import Any

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SHOWN = {"loss": "loss", "eval_loss": "validation", "kl": "kl", "eval_kl": "validation kl"}


class TrainingProgress(TrainerCallback):
    """A progress bar with the time left on a terminal, a line at every tenth of the run elsewhere."""

    def __init__(self, label: str) -> None:
        """Show `label` in front."""
        self.label = label
        self._bar: Progress | None = None
        self._shown = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar."""
        if get_console().is_terminal and state.is_world_process_zero:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, transient=True)
            self._bar.start()
            self._bar.add_task(self.label, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=state.global_step, description=f"{self.label} {self._shown}"
            )
        elif state.is_world_process_zero and state.global_step % max(1, state.max_steps // 10) == 0:
            get_console().log(f"{self.label} step {state.global_step} of {state.max_steps} {self._shown}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the latest losses."""
        values = {name: logs[key] for key, name in _SHOWN.items() if key in (logs or {})} if logs else {}
        if values:
            self._shown = ", ".join(f"{name} {float(value):.3f}" for name, value in values.items())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        self.stop()

    def stop(self) -> None:
        """Take the bar away, also after an error: it hides the cursor."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
