"""`reconstruct` for a model that is larger than memory: its layers come from the checkpoint one by one, and go."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimmoe_hf.atomic import replacing
from slimmoe_hf.blocks import EMBEDDINGS, Blocks
from slimmoe_hf.calibration import seen_in
from slimmoe_hf.layer_repair import LayerRepair
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.reconstruction import RIDGE, check_repairable, cuts_outputs, repair_values, with_repairs
from slimmoe_hf.repairs import Repairing
from slimmoe_hf.taps import Batch, Sweep
from slimmoe_hf.walk import Walk, WalkFolder, model_state


def stream_reconstruct(
    path: Path,
    batches: Iterable[Batch],
    plan: CompressionPlan,
    ridge: float = RIDGE,
    *,
    work: Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> CompressionPlan:
    """The plan that `reconstruct` gives, of a checkpoint of which one layer at a time is in memory.

    Killed, the same call continues with the layer that it was at.

    Args:
        path: Folder of the checkpoint.
        batches: As for `reconstruct`; their ids are held in memory.
        plan: Made for it.
        ridge: As there.
        work: A folder for the inputs of two layers (tokens x model width) and the repairs; the caller takes it away when
            the plan is safe.
        dtype: What is computed in, and what the repaired weights are in.
        device: What is computed on.
        overwrite: Begin anew where `work` holds the work of another request.
        progress: Show a progress bar.

    Returns:
        As `reconstruct`.

    Raises:
        ValueError: As `reconstruct`; a checkpoint that `disk.locate` refuses, weights that are not finite, no room on
            the disk, or `work` holds the work of another request.
    """
    given = [{name: value.cpu() for name, value in batch.items()} for batch in batches]
    blocks = Blocks(path, dtype, device)
    fingerprint = blocks.fingerprint()
    check_repairable(plan, blocks.config, fingerprint, ridge)
    if not cuts_outputs(plan):
        return plan
    seen = seen_in(given)
    seen.require_tokens()
    request = {
        "plan": plan.sha256, "ridge": ridge, "model": model_state(path), "text": seen.sha256, "dtype": str(blocks.dtype),
        "batches": [list(batch["input_ids"].shape) for batch in given], "device": blocks.device.type,
    }  # fmt: skip
    with WalkFolder(work, request, overwrite) as folder:
        walk = Walk(blocks, given, folder.path / "layers")
        walk.require_room(2, "fewer --tokens", repair_values(plan) * blocks.dtype.itemsize)
        done = len(walk.have("repairs"))
        order = [*([] if done in walk.have("inputs") else [EMBEDDINGS]), *range(done, walk.layers)]
        visits = blocks.visit(order, fresh=order)
        for part in track(visits, "Reconstructing", total=len(order), disable=not progress):
            if part == EMBEDDINGS:
                walk.forward(part)
            else:
                _repair(walk, part, plan, ridge)
        found = {layer: load_file(walk.file("repairs", layer)) for layer in range(walk.layers)}
    repairing = Repairing(ridge=ridge, tokens=seen.tokens, data_sha256=seen.sha256)
    return with_repairs(plan, found, repairing, fingerprint)


@torch.no_grad()
def _repair(walk: Walk, part: int, plan: CompressionPlan, ridge: float) -> None:
    """Pass all text through the layer in hand, and keep what is solved of it; its inputs go last, for one that is killed."""
    sweep = Sweep()
    layer = LayerRepair(walk.blocks.model, walk.blocks.views[part], plan, sweep)

    def passed(number: int) -> Tensor:
        batch = walk.on_device(number)
        sweep.start(batch)
        return walk.blocks.forward(part, walk.read("inputs", part, number), batch)

    with layer.listening():
        walk.write("inputs", part + 1, passed)
    with replacing(walk.file("repairs", part), overwrite=True) as partial:
        save_file(layer.solve(ridge), partial)
    walk.file("inputs", part).unlink()
