"""`reconstruct` for a model that is larger than memory: its layers come from the checkpoint one by one, and go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimmoe_hf.atomic import replacing
from slimmoe_hf.blocks import EMBEDDINGS, Blocks
from slimmoe_hf.calibration import seen_in
from slimmoe_hf.disk import published_name
from slimmoe_hf.families import family_of
from slimmoe_hf.layer_repair import LayerRepair
from slimmoe_hf.plan import CompressionPlan
from slimmoe_hf.reconstruction import REPAIRED, RIDGE, check_repairable, cuts_outputs, repair_values, with_repairs
from slimmoe_hf.repairs import REPAIR_KINDS, Repairing, Repairs
from slimmoe_hf.shards import read_header
from slimmoe_hf.sweeps import Batch, Sweep
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
    written: torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> CompressionPlan:
    """The plan that `reconstruct` gives, of a checkpoint of which one layer at a time is in memory, and of the repairs too.

    The repaired weights are in the checkpoint's own dtype, or in `written` if that is wider, and lie in `work`, from where
    `CompressionPlan.save` and `slim_checkpoint` read them one at a time. Killed, the same call continues with the layer that
    it was at.

    Args:
        path: Folder of the checkpoint.
        batches: As for `reconstruct`; their ids are held in memory.
        plan: Made for it.
        ridge: As there.
        work: A folder for the inputs of two layers (tokens x model width) and the repairs; the caller takes it away when
            the plan is saved, or has been cut to.
        dtype: What is computed in; sums and solutions are float64.
        device: What is computed on.
        written: What the cut is to write; None is the checkpoint's own.
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
        "written": str(written),
    }  # fmt: skip
    with WalkFolder(work, request, overwrite) as folder:
        walk = Walk(blocks, given, folder.path / "layers")
        dtypes = _stored_dtypes(blocks)
        if written is not None:
            dtypes = {kind: torch.promote_types(stored, written) for kind, stored in dtypes.items()}
        walk.require_room(2, "fewer --tokens", repair_values(plan) * max(dtype.itemsize for dtype in dtypes.values()))
        done = len(walk.have("repairs"))
        order = [*([] if done in walk.have("inputs") else [EMBEDDINGS]), *range(done, walk.layers)]
        visits = blocks.visit(order, fresh=order)
        for part in track(visits, "Reconstructing", total=len(order), disable=not progress):
            if part == EMBEDDINGS:
                walk.forward(part)
            else:
                _repair(walk, part, plan, ridge, dtypes)
        files = {layer: walk.file("repairs", layer) for layer in range(walk.layers)}
    repairs = _filed(files)
    repairing = Repairing(ridge=ridge, tokens=seen.tokens, data_sha256=seen.sha256, sha256=repairs.sha256)
    return with_repairs(plan, repairs, {n: _shares(file) for n, file in files.items()}, repairing, fingerprint)


def _filed(files: Mapping[int, Path]) -> Repairs:
    """What lies in a file for every layer."""
    headers = {layer: read_header(file) for layer, file in files.items()}
    places = {
        f"{kind}.{layer}": (files[layer].parent, header[kind])
        for layer, header in headers.items()
        for kind in REPAIR_KINDS
        if kind in header
    }
    return Repairs.filed(places, str(next(iter(files.values())).parent))


def _shares(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in REPAIRED if name in opened.keys()}  # noqa: SIM118


def _stored_dtypes(blocks: Blocks) -> dict[str, torch.dtype]:
    """What the output projections are in on disk: of the experts and of the attention of the first layer that has any."""
    family = family_of(blocks.config)
    experts = next(view.paths for view in blocks.views if view.experts is not None)
    found = {"down_proj": blocks.stored_dtype(f"{experts.disk}.{family.disk.down.format(0)}")}
    attention = next((view.paths.attention for view in blocks.views if view.attention is not None), None)
    if attention is not None and family.projections:
        name = published_name(family, f"{attention}.{family.projections[-1]}.weight")
        found["o_proj"] = blocks.stored_dtype(name)
    return found


@torch.no_grad()
def _repair(walk: Walk, part: int, plan: CompressionPlan, ridge: float, dtypes: Mapping[str, torch.dtype]) -> None:
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
        save_file(layer.solve(ridge, dtypes), partial)
    walk.file("inputs", part).unlink()
