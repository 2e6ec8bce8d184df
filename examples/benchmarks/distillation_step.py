"""What does distilling cost beside plain fine-tuning? One training step of the same student, in four ways.

    python examples/benchmarks/distillation_step.py --json examples/benchmarks/results/distillation_step.json

- SFT: TRL's `SFTTrainer` on the student, cross-entropy alone; and transformers' `Trainer`, which makes all logits at once
  (on a CPU the faster of the two).
- cached: `DistillationTrainer` with the teacher's answers read from disk, `precompute_teacher_logits` having written them.
- live: `DistillationTrainer` with the teacher in memory, beside the sum of its parts: the SFT step and the teacher's forward.

A step is forward, loss, backward and optimizer, as the Trainer does them, batches from its data loader. The ways take turns,
so that a machine that slows down slows all; the median of the steps is what counts. Random weights: time does not look at
values.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from slimmoe_hf import DistillationConfig, DistillationTrainer

SFT_ONLY = ("max_length", "dataset_kwargs", "router_aux_loss_coef")


def model(arguments: argparse.Namespace, width: int, seed: int) -> PreTrainedModel:
    """A PhiMoE with random weights and experts `width` wide."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "phimoe", hidden_size=arguments.hidden, num_hidden_layers=arguments.layers, num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=width, num_local_experts=8, vocab_size=arguments.vocabulary,
        max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_jitter_noise=0.01, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One word per id: nothing is tokenised here."""
    words = {f"w{number}": number for number in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")), eos_token="w0", pad_token="w1"
    )


def rows(arguments: argparse.Namespace) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    size = (arguments.rows * (arguments.steps + 2), arguments.length)
    ids = torch.randint(2, arguments.vocabulary, size, generator=generator).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def stepper(trainer: Trainer) -> Any:
    """Makes one optimizer step of a trainer per call, and gives its seconds."""
    trainer.create_optimizer()
    student = trainer.accelerator.prepare(trainer.model)
    batches = iter(trainer.get_train_dataloader())
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps = 1000
    student.train()
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def step() -> float:
        synchronise()
        start = time.perf_counter()
        inputs = next(batches)
        trainer.training_step(student, inputs, (inputs["labels"][:, 1:] != -100).sum())
        trainer.optimizer.step()
        student.zero_grad()
        synchronise()
        return time.perf_counter() - start

    return step


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of every step, by way."""
    data, words = rows(arguments), tokenizer(arguments.vocabulary)
    common: dict[str, Any] = {
        "per_device_train_batch_size": arguments.rows, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
        "gradient_checkpointing": False, "max_length": arguments.length, "max_steps": 1000, "bf16": torch.cuda.is_available(),
        "dataset_kwargs": {"skip_prepare_dataset": True}, "use_cpu": not torch.cuda.is_available(),
        "router_aux_loss_coef": 0.0,
    }  # fmt: skip
    for_trainer = {name: value for name, value in common.items() if name not in SFT_ONLY}
    teacher = model(arguments, 4 * arguments.width, seed=1)

    def distilling(name: str, **settings: Any) -> DistillationTrainer:
        return DistillationTrainer(
            model(arguments, arguments.width, seed=0), teacher, train_dataset=data, processing_class=words,
            args=DistillationConfig(str(folder / name), **common, **settings),
        )  # fmt: skip

    sft = SFTTrainer(
        model(arguments, arguments.width, seed=0), SFTConfig(str(folder / "sft"), **common), train_dataset=data,
        processing_class=words,
    )  # fmt: skip
    plain = Trainer(
        model(arguments, arguments.width, seed=0), TrainingArguments(str(folder / "plain"), **for_trainer),
        train_dataset=data, data_collator=default_data_collator,
    )  # fmt: skip
    cached = distilling("cached", precompute_teacher_logits=True, crossentropy_weight=arguments.crossentropy)
    live = distilling("live", crossentropy_weight=arguments.crossentropy)
    steps = {
        name: stepper(trainer)
        for name, trainer in {"SFT": sft, "Trainer": plain, "cached": cached, "live": live}.items()
    }
    ids = torch.tensor(data[: arguments.rows]["input_ids"], device=live.accelerator.device)

    def forward() -> float:
        """The teacher up to its last hidden states; that it makes logits too is the loss's affair."""
        start = time.perf_counter()
        with torch.no_grad(), live.accelerator.autocast():
            teacher.base_model(input_ids=ids, use_cache=False)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    steps["teacher's forward"] = forward
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.steps + 1):
        for name, step in steps.items():
            seconds = step()
            if turn:  # the first one warms up
                times[name].append(seconds)
    return times


def main() -> None:
    """Measure, print, and save where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--width", type=int, default=448, help="of the student's experts; the teacher's are four times it"
    )
    parser.add_argument("--crossentropy", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = measure(arguments, Path(folder))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    found = {}
    for way in ("SFT", "Trainer"):
        found[f"cached / {way}"] = seconds["cached"] / seconds[way]
        found[f"live / ({way} + teacher's forward)"] = seconds["live"] / (seconds[way] + seconds["teacher's forward"])
    table = Table("", "median, s", "fastest, s", box=None)
    for name, value in seconds.items():
        table.add_row(name, f"{value:.3f}", f"{min(times[name]):.3f}")
    console = Console()
    console.print(table)
    for name, value in found.items():
        console.print(f"{name}: {value:.3f}")
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
        )
        about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({**about, **settings, "seconds": times, "ratios": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
