"""The calibration sweep for a model that is larger than memory: one decoder layer at a time, forth and back.

All text goes through one layer before the next one is read. Then the loss is differentiated at the head, and the layers
come again in reverse order: each is run once more on the inputs that were kept of it, and passes the gradient of these
down. The taps, and so the statistics, are those of `calibration.collect_stats`. Where no loss is
differentiated the way forth is all.

Shape letters: N predicted tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from rich import get_console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimmoe_hf.atomic import replacing
from slimmoe_hf.blocks import EMBEDDINGS, HEAD, Blocks
from slimmoe_hf.calibration import (
    CALIBRATION_LOSSES,
    TokenLoss,
    layer_norms,
    loss_named,
    next_tokens,
    require_finite,
    seen_in,
    stack_layers,
    stored_config,
)
from slimmoe_hf.defaults import CALIBRATION_LOSS
from slimmoe_hf.pace import Pace
from slimmoe_hf.stats import ExpertStats, StatsMeta
from slimmoe_hf.streamed_teacher import Kept, ask_teacher, predicted
from slimmoe_hf.sweeps import Batch, Sweep
from slimmoe_hf.taps import LayerSums, tapped
from slimmoe_hf.walk import Walk, WalkFolder, model_state


def stream_stats(
    path: Path,
    batches: Iterable[Batch],
    loss: str = CALIBRATION_LOSS,
    teacher: Path | None = None,
    *,
    work: Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> ExpertStats:
    """The statistics of `collect_stats`, of a checkpoint of which one layer at a time is in memory.

    Another teacher is asked first, in the same way. Killed, the same call continues with the layer that it was at.

    Args:
        path: Folder of the checkpoint.
        batches: As for `collect_stats`; their ids are held in memory.
        loss: `kd_topk` or `lm`; with `none` the layers are passed once, and nothing is kept for a way back.
        teacher: Folder of the model to be faithful to, for `kd_topk`. Default: the model itself.
        work: A folder for the inputs of all layers (tokens x model width x layers), with `none` of two; the caller takes it
            away when the statistics are safe.
        dtype: What is computed in.
        device: What is computed on.
        overwrite: Begin anew where `work` holds the work of another request. That of the same one is continued.
        progress: Show a progress bar.

    Returns:
        As `collect_stats`.

    Raises:
        ValueError: As `collect_stats`; a checkpoint that `disk.locate` refuses, weights that are not finite, no room on
            the disk, or `work` holds the work of another request.
    """
    if loss not in CALIBRATION_LOSSES:
        loss_named(loss)
    given = [{name: value.cpu() for name, value in batch.items()} for batch in batches]
    seen = seen_in(given)
    seen.require_tokens()
    blocks = Blocks(path, dtype, device)
    request = {
        "model": model_state(path), "text": [_digest(batch) for batch in given], "loss": loss, "dtype": str(blocks.dtype),
        "device": blocks.device.type, "teacher": None if teacher is None else model_state(teacher),
    }  # fmt: skip
    with WalkFolder(work, request, overwrite) as folder:
        walk, kept, differentiated = Walk(blocks, given, folder.path / "layers"), None, loss_named(loss)
        walk.require_room(2 if differentiated is None else walk.layers + 2, "fewer --tokens")
        if teacher is not None:
            assert loss == CALIBRATION_LOSS, "no other loss looks at a teacher"
            size, place = blocks.config.vocab_size, folder.path / "teacher"
            kept = ask_teacher(teacher, given, size, place, blocks.dtype, blocks.device, progress)
        way = _Way(walk) if differentiated is None else _Sweep(walk, differentiated, kept)
        layers = way.run(progress)
    views = blocks.views
    return ExpertStats(
        meta=StatsMeta(
            family=blocks.config.model_type,
            config=stored_config(blocks.config),
            layers=[view.index for view in views if view.experts is not None],
            loss=loss,
            data_sha256=seen.sha256,
            model_sha256=walk.weights_sha256(),
            fingerprint=blocks.fingerprint(),
            teacher_sha256=None if kept is None else kept.weights_sha256,
            tokens=seen.tokens,
            sequences=seen.sequences,
        ),
        **stack_layers(layers),
    )


def _digest(batch: Batch) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(batch.items()):
        digest.update(f"{name}{list(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Taps:
    """What a way through the layers hears of them.

    Attributes:
        walk: All batches, and where they are. blocks: The model.
    """

    def __init__(self, walk: Walk, gradients: bool) -> None:
        self.walk, self.blocks, self._sweep = walk, walk.blocks, Sweep(gradients=gradients)

    def _announce(self, order: list[int], files: int) -> None:
        unique = [part for at, part in enumerate(order) if part not in order[max(0, at - 2) : at]]
        read = sum(self.blocks.bytes(part) for part in unique)
        tokens = self.walk.tokens
        get_console().log(
            f"{tokens:,} tokens in one pass; {read / 1e9:,.2f} GB of weights to read ({read / tokens:,.0f} bytes a token), "
            f"up to {files * self.walk.bytes / 1e9:,.2f} GB of layer inputs on the disk"
        )

    def _tapped(self, part: int) -> AbstractContextManager[list[LayerSums]]:
        return tapped(self.blocks.model, [self.blocks.views[part]], self._sweep)

    def _keep(self, layer: int, sums: LayerSums) -> None:
        found = {**sums.tensors(), **layer_norms(self.blocks.config, self.blocks.views[layer])}
        with replacing(self.walk.file("sums", layer), overwrite=True) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in found.items()}, partial)

    def _kept(self) -> list[dict[str, Tensor]]:
        return [load_file(self.walk.file("sums", layer)) for layer in range(self.walk.layers)]


class _Way(_Taps):
    """The way forth alone: nothing is differentiated, so a layer's inputs go when it has been passed."""

    def __init__(self, walk: Walk) -> None:
        super().__init__(walk, gradients=False)

    def run(self, progress: bool) -> list[dict[str, Tensor]]:
        """All that is not done yet; the statistics of every layer."""
        walk, begun = self.walk, bool(self.walk.have("inputs"))
        layers = [layer for layer in range(walk.layers) if layer not in walk.have("sums")]
        # The head is read for its hash alone.
        ahead = [] if walk.file("hashes", HEAD + 2).exists() else [HEAD]
        order = [*([] if begun else [EMBEDDINGS]), *layers, *ahead]
        self._announce(order, 2)
        walk.pace = Pace("scoring", self.blocks, order, [], walk.tokens)
        for part in track(
            self.blocks.visit(order, fresh=order, hashed=True), "Scoring", total=len(order), disable=not progress
        ):
            walk.note_hashes(part)
            if part == EMBEDDINGS:
                walk.forward(part)
            elif part != HEAD:
                self._forth(part)
        return self._kept()

    def _forth(self, layer: int) -> None:
        """Through a layer, whose statistics are kept before its inputs go."""
        walk = self.walk
        with self._tapped(layer) as [sums], torch.no_grad():

            def passed(number: int) -> Tensor:
                batch = walk.on_device(number)
                self._sweep.start(batch)
                return self.blocks.forward(layer, walk.read("inputs", layer, number), batch)

            walk.write("inputs", layer + 1, passed)
        self._keep(layer, sums)
        walk.file("inputs", layer).unlink()


class _Sweep(_Taps):
    """The way forth and back over all layers."""

    def __init__(self, walk: Walk, loss: TokenLoss, kept: Kept | None) -> None:
        super().__init__(walk, gradients=True)
        self._loss, self._answers = loss, kept

    def run(self, progress: bool) -> list[dict[str, Tensor]]:
        """All that is not done yet; the statistics of every layer."""
        walk, last = self.walk, self.walk.layers
        turned = last in walk.have("gradients") or last - 1 in walk.have("sums")
        forth = [] if turned else [*walk.forward_order(), HEAD]
        back = list(reversed(range(min([*walk.have("sums"), last]))))
        order = [*forth, *back]
        self._announce(order, walk.layers + 2)
        walk.pace = Pace("scoring", self.blocks, forth, back, walk.tokens)
        passed = set(forth)
        visits = self.blocks.visit(order, fresh=forth, hashed=True)
        for part in track(visits, "Scoring", total=len(order), disable=not progress):
            if part in passed:
                passed.discard(part)
                self._forth(part)
            else:
                self._back(part)
        return self._kept()

    def _forth(self, part: int) -> None:
        self.walk.note_hashes(part)
        if part == HEAD:
            self.walk.write("gradients", self.walk.layers, self._at_head)
            self.walk.file("inputs", self.walk.layers).unlink(missing_ok=True)
            return
        with self._tapped(part) if part != EMBEDDINGS else nullcontext():
            self.walk.forward(part, keep=True)

    def _at_head(self, number: int) -> Tensor:
        """The gradient of a batch's loss by the last layer's output, `[B, T, D]`."""
        hidden_BTD, batch = self.walk.read("inputs", self.walk.layers, number), self.walk.on_device(number)
        labels_N, gradient_BTD, first = next_tokens(batch).flatten(), torch.zeros_like(hidden_BTD), 0
        for places_N in predicted(batch, self.blocks.config.vocab_size):
            hidden_ND = hidden_BTD.flatten(0, 1)[places_N].requires_grad_(True)
            with torch.enable_grad():
                logits_NV = self.blocks.logits(hidden_ND)
                if self._answers is not None:
                    value = self._answers.loss(logits_NV, number, first).sum()
                else:
                    value = self._loss(logits_NV, logits_NV.detach(), labels_N[places_N]).sum()
            require_finite(value, number)
            (gradient_BTD.view(-1, gradient_BTD.shape[-1])[places_N],) = torch.autograd.grad(value, hidden_ND)
            first += len(places_N)
        return gradient_BTD

    def _back(self, layer: int) -> None:
        """Through a layer against its direction; its statistics are kept, and what is behind it goes."""
        walk = self.walk
        with self._tapped(layer) as [sums]:

            def gradient(number: int) -> Tensor:
                batch = walk.on_device(number)
                self._sweep.start(batch)
                hidden_BTD = walk.read("inputs", layer, number).requires_grad_(True)
                with torch.enable_grad():
                    output_BTD = self.blocks.forward(layer, hidden_BTD, batch)
                below = walk.read("gradients", layer + 1, number)
                return torch.autograd.grad(output_BTD, hidden_BTD, below)[0]

            walk.write("gradients", layer, gradient)
            self._keep(layer, sums)
        walk.file("inputs", layer).unlink()
        walk.file("gradients", layer + 1).unlink()
