"""Slim large Mixture-of-Experts language models and train them back to strength, inside the Hugging Face loop."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slimmoe_hf.auto_classes import watch

if TYPE_CHECKING:
    from slimmoe_hf.arguments import DistillationConfig, Seq2SeqDistillationConfig
    from slimmoe_hf.calibration import collect_stats
    from slimmoe_hf.callbacks import SlimmingCallback
    from slimmoe_hf.checkpoint import slim_checkpoint
    from slimmoe_hf.criteria import CRITERIA
    from slimmoe_hf.families import FAMILIES
    from slimmoe_hf.lora import lora_config
    from slimmoe_hf.pipeline import run_recipe
    from slimmoe_hf.plan import CompressionPlan, Target, make_plan
    from slimmoe_hf.search import search_plan
    from slimmoe_hf.seq2seq import Seq2SeqDistillationTrainer
    from slimmoe_hf.stats import ExpertStats
    from slimmoe_hf.surgery import apply_plan
    from slimmoe_hf.trainer import DistillationTrainer

__version__ = "0.1.0"

watch()

# Where each public name lives: imported when first used, so that `slimmoe --help` does not wait for torch.
_HOMES = {
    "CRITERIA": "criteria",
    "FAMILIES": "families",
    "CompressionPlan": "plan",
    "DistillationConfig": "arguments",
    "DistillationTrainer": "trainer",
    "ExpertStats": "stats",
    "Seq2SeqDistillationConfig": "arguments",
    "Seq2SeqDistillationTrainer": "seq2seq",
    "SlimmingCallback": "callbacks",
    "Target": "plan",
    "apply_plan": "surgery",
    "collect_stats": "calibration",
    "lora_config": "lora",
    "make_plan": "plan",
    "run_recipe": "pipeline",
    "search_plan": "search",
    "slim_checkpoint": "checkpoint",
}

__all__ = [
    "CRITERIA",
    "FAMILIES",
    "CompressionPlan",
    "DistillationConfig",
    "DistillationTrainer",
    "ExpertStats",
    "Seq2SeqDistillationConfig",
    "Seq2SeqDistillationTrainer",
    "SlimmingCallback",
    "Target",
    "apply_plan",
    "collect_stats",
    "lora_config",
    "make_plan",
    "run_recipe",
    "search_plan",
    "slim_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"slimmoe_hf.{_HOMES[name]}"), name)
