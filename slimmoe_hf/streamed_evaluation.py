"""Measure a checkpoint that is larger than memory: held-out loss and expert load, one decoder layer at a time.

Its speed a layer at a time is the disk's, and a sample would read all weights for every token: both are left out.

Shape letters: N rows, T tokens per row, D model width, V vocabulary, P predicted tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import get_console
from rich.progress import track
from torch import Tensor

from slimmoe_hf.atomic import write_text
from slimmoe_hf.blocks import EMBEDDINGS, HEAD, Blocks
from slimmoe_hf.calibration import next_tokens
from slimmoe_hf.disk import meta_model
from slimmoe_hf.evaluation import HeldOut, Measurement, Sweep, measurement_of, rounded_load
from slimmoe_hf.loading import load_config
from slimmoe_hf.pace import Pace
from slimmoe_hf.routing import RouterLoad
from slimmoe_hf.streamed_teacher import predicted
from slimmoe_hf.walk import Walk, WalkFolder, model_state


def stream_loss(
    path: Path,
    rows_NT: Tensor,
    batch_size: int = 8,
    *,
    work: Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Sweep:
    """As `evaluation.measure_loss`, of a checkpoint of which one layer at a time is in memory.

    Killed, the same call continues with the layer that it was at; the work of another one in the folder is thrown away.

    Args:
        path: Folder of the checkpoint.
        rows_NT: Token ids.
        batch_size: Rows at a time; the loss does not depend on it.
        work: A folder for what passes between layers (twice tokens x model width); the caller takes it away when the result
            is safe.
        dtype: What is computed in.
        device: What is computed on.
        progress: Show a progress bar.

    Returns:
        As `measure_loss`, without a speed.

    Raises:
        ValueError: As `blocks.Blocks`; weights or a loss that are not finite, or no room on the disk.
    """
    blocks = Blocks(path, dtype, device)
    request = {
        "model": model_state(path), "text": hashlib.sha256(rows_NT.numpy().tobytes()).hexdigest(),
        "rows": list(rows_NT.shape), "batch_size": batch_size, "dtype": str(blocks.dtype), "device": blocks.device.type,
    }  # fmt: skip
    with WalkFolder(work, request, overwrite=True) as folder:
        walk = Walk(blocks, [{"input_ids": ids_NT} for ids_NT in rows_NT.split(batch_size)], folder.path / "layers")
        walk.require_room(2, "fewer evaluation.tokens")
        nats = _through(walk, progress)
        counts = [_noted(walk, "load", view.index) for view in blocks.views if view.router is not None]
    count = rows_NT.shape[0] * (rows_NT.shape[1] - 1)
    if not math.isfinite(nats):
        raise ValueError("the held-out loss is not finite: the weights or their products overflow in this dtype.")
    return Sweep(
        loss=nats / count,
        tokens_per_second=None,
        agreement=None,
        router_layers=[view.index for view in blocks.views if view.router is not None],
        router_load=rounded_load(torch.tensor(counts)),
    )


def stream_measurement(
    path: Path,
    data: HeldOut,
    *,
    batch_size: int = 8,
    work: Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    progress: bool = True,
) -> Measurement:
    """As `evaluation.evaluate_checkpoint`, of a checkpoint of which one layer at a time is in memory.

    Args:
        path: Its folder.
        data: What to measure it on.
        batch_size: Rows at a time.
        work: As for `stream_loss`.
        device: Where to run.
        dtype: What to compute in, whatever the weights are stored in.
        progress: Show a progress bar.

    Returns:
        All that does not need the whole model: no speed, no memory of generating, no samples.

    Raises:
        ValueError: As `stream_loss`.
    """
    swept = stream_loss(path, data.rows_NT, batch_size, work=work, dtype=dtype, device=device, progress=progress)
    return measurement_of(path, meta_model(load_config(path)), data, swept, streamed=True)


def _through(walk: Walk, progress: bool) -> float:
    """Pass all rows through what is left of the model; the sum of their losses, nats."""
    head = walk.layers
    if head in walk.have("nats"):
        return float(_noted(walk, "nats", head)[0])
    for layer in set(walk.have("inputs")) - {0} - {at + 1 for at in walk.have("load")}:
        if walk.blocks.views[layer - 1].router is not None:
            walk.file("inputs", layer).unlink()  # stopped before its experts' load was noted
    order = [*walk.forward_order(), HEAD]
    read = sum(map(walk.blocks.bytes, order))
    get_console().log(
        f"{walk.tokens:,} tokens in one pass; {read / 1e9:,.2f} GB of weights to read ({read / walk.tokens:,.0f} bytes a "
        f"token), up to {2 * walk.bytes / 1e9:,.2f} GB of layer inputs on the disk"
    )
    walk.pace = Pace("the held-out loss", walk.blocks, order, [], walk.tokens)
    shown = progress and get_console().is_terminal
    visits = walk.blocks.visit(order, fresh=order)
    for part in track(visits, "Evaluating", total=len(order), disable=not shown, transient=True):
        if part == EMBEDDINGS:
            walk.forward(part)
        elif part != HEAD:
            _pass_layer(walk, part)
        else:
            nats = sum(_nats(walk, number) for number in range(len(walk.batches)))
            _note(walk, "nats", head, [nats])
    return nats


def _pass_layer(walk: Walk, layer: int) -> None:
    """Its inputs stay until its experts' load is noted."""
    view = walk.blocks.views[layer]
    load = RouterLoad(walk.blocks.model, [view])
    with load.counting():
        walk.forward(layer, keep=True)
    if view.router is not None:
        _note(walk, "load", layer, load.counts()[0].tolist())
    walk.file("inputs", layer).unlink()


@torch.no_grad()
def _nats(walk: Walk, number: int) -> float:
    """The sum of a batch's losses, with the head in hand."""
    batch = walk.on_device(number)
    hidden_PD, labels_P = walk.read("inputs", walk.layers, number).flatten(0, 1), next_tokens(batch).flatten()
    return sum(
        F.cross_entropy(walk.blocks.logits(hidden_PD[some]).float(), labels_P[some], reduction="sum").item()
        for some in predicted(batch, walk.blocks.config.vocab_size)
    )


def _note(walk: Walk, kind: str, number: int, values: Sequence[float]) -> None:
    write_text(walk.file(kind, number), json.dumps(values))


def _noted(walk: Walk, kind: str, number: int) -> list[float]:
    return list(json.loads(walk.file(kind, number).read_text()))
