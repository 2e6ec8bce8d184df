"""The walls of the house: who may import whom, which names and flags are public. Growing one is a visible decision."""

import ast
import subprocess
import sys
from pathlib import Path

import slimmoe_hf

PACKAGE = Path(slimmoe_hf.__file__).parent
LEAVES = {
    "families", "family_types", "family_rows", "family_table", "limits",
    "data", "losses", "resumption", "loading", "stats", "atomic", "progress", "shards", "sources", "disk",
    "identity", "serving", "routing", "peak", "lora", "throughput", "shared_config", "shared_experts", "own_form",
    "shared_checkpoint",
    "lineage", "card", "upload", "cache_format", "cache", "cache_writer", "fused", "signals", "row_losses",
    "logit_losses", "student_forward", "terms", "yaml_files", "sharding", "blocks", "walk", "pace", "free_memory",
    "schema", "weight_dtypes", "generation_evaluation", "defaults", "engine_rules", "engines", "engine_report",
}  # fmt: skip
SLIMMING = {
    "calibration", "taps", "sweeps", "criteria", "attention_cuts", "blends", "merging", "plan", "describe", "surgery", "cuts",
    "checkpoint", "factored", "factored_checkpoint", "factorization", "factored_size", "sparsity", "streaming",
    "merged_forms", "engine_form",
    "streamed_teacher",
    "repairs", "layer_repair", "reconstruction", "streamed_repair", "layer_summary",
    "super_experts", "predicted_loss",
}  # fmt: skip
DISTILLING = {
    "teacher", "arguments", "trainer", "token_sums", "publishing", "cache_answers", "cached_teacher", "admission",
    "distilling", "seq2seq", "answers", "streamed_answers",
}  # fmt: skip
JOINTS = {
    "callbacks", "recipe", "pipeline", "preflight", "rundir", "report", "evaluation", "cli", "commands", "outlook", "launch",
    "stage", "memory", "tracing", "sizing", "size_command", "parsers", "command_inputs", "eval_command", "plot_command",
    "finetune_command", "finetune", "finetune_settings", "finetune_report", "tuning_data", "push_command", "cache_command",
    "hub", "run_card", "stage_card", "harness", "student_training", "merge_command", "scoring", "auto_classes", "export_command",
    "scoring_memory", "machines", "remedies", "parser_parts", "parsers_cut", "streamed_evaluation", "steps",
    "parsers_export",
    "grid", "grid_sizes", "compare_point", "compare_worker", "compare_pool", "compare_inputs", "compare_results", "comparison",
    "compare_command",
    "stored_recipe", "budget", "search", "search_check", "search_command", "stage_search",
    "plots",
    "seq2seq_recipe", "seq2seq_models", "seq2seq_preflight", "seq2seq_outlook", "seq2seq_pipeline",
}  # fmt: skip


def imports_of(room: str) -> set[str]:
    """Rooms that a room, a module or a package of several, imports from, wherever in its files."""
    files = sorted((PACKAGE / room).glob("*.py")) or [PACKAGE / f"{room}.py"]
    return set().union(*(_imports(file) for file in files)) - {room}


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slimmoe_hf"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("slimmoe_hf.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: relative import"
    return found


def rooms() -> set[str]:
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    return files | {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"metrics"}


def test_every_module_has_a_room():
    assert rooms() == LEAVES | SLIMMING | DISTILLING | JOINTS


def test_the_two_halves_never_import_each_other():
    for module in SLIMMING:
        assert imports_of(module) <= LEAVES | SLIMMING, module
    for module in DISTILLING:
        assert imports_of(module) <= LEAVES | DISTILLING, module


def test_leaves_import_only_leaves():
    for module in LEAVES:
        assert imports_of(module) <= LEAVES, module


def test_the_public_names():
    assert slimmoe_hf.__all__ == [
        "CRITERIA", "FAMILIES", "CompressionPlan", "DistillationConfig", "DistillationTrainer", "ExpertStats",
        "Seq2SeqDistillationConfig", "Seq2SeqDistillationTrainer", "SlimmingCallback", "Target", "apply_plan",
        "collect_stats", "lora_config", "make_plan", "run_recipe", "search_plan", "slim_checkpoint",
    ]  # fmt: skip
    for name in slimmoe_hf.__all__:
        assert getattr(slimmoe_hf, name).__doc__ or name.isupper(), f"{name} has no docstring"


def test_importing_the_package_does_not_import_torch():
    code = "import sys, slimmoe_hf; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_stay_under_400_lines_and_functions_under_60():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") < 400, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (node.end_lineno or 0) - (body[0].lineno if body else node.lineno) + 1
                assert length < 60, f"{path.name}: {node.name} has {length} lines"
