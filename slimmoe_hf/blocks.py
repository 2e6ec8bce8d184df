"""A model of which only the part in hand has weights: its decoder layers come from the checkpoint one by one, and go.

The modules, the masks and the position embeddings are the model's own. All its decoder layers but the one in hand pass
on what they are given, so that the model's own forward, begun at the inputs of a layer, runs that layer alone.

Shape letters: E experts, F expert width, D model width, B rows, T tokens of a row, N tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from slimmoe_hf.disk import check_tied, experts_in, locate, published_name, read_part
from slimmoe_hf.families import FAMILIES, family_of, layer_views, refuse_encoder_decoder
from slimmoe_hf.identity import combined, sample, sampled, tensor_sha256
from slimmoe_hf.loading import load_config, weight_files
from slimmoe_hf.shards import DTYPES, Buffer, all_finite, read_header
from slimmoe_hf.weight_dtypes import loaded_dtypes

EMBEDDINGS, HEAD, REST = -1, -2, -3
"""Numbers of what is no decoder layer; the rest, the final norm, is always there."""


class Pass(nn.Module):
    """Stands where a decoder layer has no weights.

    Attributes:
        block_type: What that layer says it is, for models that ask it.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.block_type = vars(layer).get("block_type")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states as they are."""
        return hidden_states


def begins_with(given_BTD: Tensor, model: PreTrainedModel, first: nn.Module) -> bool:
    """Whether a model gives its first layer the embeddings `given_BTD` as they are, so that it can be begun at any other."""
    seen: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model.base_model(inputs_embeds=given_BTD, use_cache=False)
    hook.remove()
    return torch.equal(seen[0], given_BTD)


class _Reader:
    """Reads what a module wants, by the names that its weights have in memory, as they are stored."""

    def __init__(self, path: Path, config: PreTrainedConfig) -> None:
        """Look through the headers.

        Raises:
            ValueError: As `disk.locate` and `disk.check_tied`.
        """
        refuse_encoder_decoder(config, "going through a model layer by layer (--stream)")
        if why := family_of(config).no_stream:
            raise ValueError(f"{path}: cannot be run one layer at a time: {why}. Load it whole (no --stream).")
        self.path, self._family, self._buffer = path, family_of(config), Buffer()
        stored = {name: tensor for file in weight_files(path) for name, tensor in read_header(file).items()}
        self.parts = locate(config, stored, str(path))
        check_tied(config, stored, path)

    def pieces(self, name: str, shape: Sequence[int]) -> dict[str, tuple[int | slice, ...]]:
        """Published names of what makes up a weight of the model, and where in it each lies."""
        experts = experts_in(self._family, name)
        if experts is None:
            return {published_name(self._family, name): ()}
        return {
            piece.format(expert): (expert, slice(row, row + own[0]))
            for piece, row, own in experts.pieces(shape)
            for expert in range(shape[0])
        }

    def read(self, shapes: Mapping[str, Sequence[int]], finite: bool) -> dict[str, Tensor]:
        """Weights by their names in the model; with `finite`, NaN and infinity are refused."""
        wanted = [
            (self.parts[piece], name, place)
            for name, shape in shapes.items()
            for piece, place in self.pieces(name, shape).items()
        ]
        wanted.sort(key=lambda each: (each[0].stored.file, each[0].stored.begin, each[0].first))
        found: dict[str, Tensor] = {}
        for part, name, place in wanted:
            weight = read_part(self.path, part, buffer=self._buffer if place else None)
            if finite and not all_finite(weight):
                raise ValueError(f"{self.path}: {part.name} holds values that are not finite. Fetch or make it again.")
            if place:
                if name not in found:
                    found[name] = torch.empty(tuple(shapes[name]), dtype=weight.dtype)
                found[name][place] = weight
            else:
                found[name] = weight
        return found

    def bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """What `read` reads."""
        pieces = [self.parts[piece] for name, shape in shapes.items() for piece in self.pieces(name, shape)]
        return sum(torch.Size(part.shape).numel() * DTYPES[part.stored.dtype].itemsize for part in pieces)


class Blocks:
    """A checkpoint's model, one part at a time.

    Attributes:
        config: Its config. model: With its weights on the meta device, but for the part in hand and the final norm.
        views: Its decoder layers, `families.LayerView`. hidden_size: D.
        device, dtype: What is computed on and in; weights that `from_pretrained` has in another dtype are in that.
        digests: Hashes of the weights of every part that was hashed when it was read, by their names in the model.
        seconds_reading, seconds_placing: For a byte of the decoder layer that was read last.
    """

    def __init__(self, path: Path, dtype: str | torch.dtype, device: str | torch.device) -> None:
        """Build the model without its weights.

        Args:
            path: Folder of the checkpoint, of a known family.
            dtype: What is computed in.
            device: What is computed on.

        Raises:
            ValueError: As `disk.locate`; or the model changes embeddings before its first layer, so that it cannot be
                begun at another one.
        """
        dtype, device = getattr(torch, dtype) if isinstance(dtype, str) else dtype, torch.device(device)
        self.config, self.dtype, self.device = load_config(path), dtype, device
        self.config.dtype = dtype
        self.seconds_reading = self.seconds_placing = 0.0
        built = copy.deepcopy(self.config)
        if "output_router_logits" in built.to_dict():
            built.output_router_logits = False  # layers that only pass on have none
        self._reader = _Reader(path, self.config)
        # The checkpoint's weights replace all that initialising would write.
        with init_empty_weights(include_buffers=False), no_init_weights():
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(built, dtype=dtype)
        self.model.eval().requires_grad_(False)
        self.views = layer_views(self.model)
        modules = dict(self.model.named_modules())
        slots: Any = modules[family_of(self.config).layers]
        self._slots: nn.ModuleList = slots
        embeddings, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.hidden_size = int(embeddings.weight.shape[-1])
        names = {id(module): name for name, module in modules.items()}
        self._modules: dict[int, nn.Module] = {EMBEDDINGS: embeddings, HEAD: head, **dict(enumerate(slots))}
        self._prefixes = {part: names[id(module)] for part, module in self._modules.items()}
        self._hollow = {part: dict(module.state_dict()) for part, module in self._modules.items()}
        tied = self.model.all_tied_weights_keys
        self._names = {name: tied.get(name, name) for name in self.model.state_dict()}
        self._dtypes = loaded_dtypes(self.model, dtype)
        for number in range(len(slots)):
            slots[number] = Pass(slots[number])
        for module in self.model.base_model.children():
            if not list(module.parameters()):
                module.to(device)  # position embeddings
        inside = tuple(f"{prefix}." for prefix in self._prefixes.values())
        rest = {name: tensor for name, tensor in self.model.state_dict().items() if not name.startswith(inside)}
        read = self._reader.read({name: tensor.shape for name, tensor in rest.items()}, finite=True)
        self.digests: dict[int, dict[str, str]] = {
            REST: {name: tensor_sha256(tensor, self._dtypes[name]) for name, tensor in read.items()}
        }
        self._require_begun_anywhere(read)

    def _require_begun_anywhere(self, rest: dict[str, Tensor]) -> None:
        placed = {name: weight.to(self.device, self._dtypes[name]) for name, weight in rest.items()}
        self.model.load_state_dict(placed, strict=False, assign=True)
        given = torch.ones(1, 2, self.hidden_size, dtype=self.dtype, device=self.device)
        if not begins_with(given, self.model, self._slots[0]):
            raise ValueError(
                f"a {self.config.model_type} changes its embeddings before the first layer, so it cannot be run one "
                "layer at a time. Load it whole."
            )

    def read(self, part: int, finite: bool = False, hashed: bool = False) -> dict[str, Tensor]:
        """The weights of a part as they are stored, by their names inside it.

        Args:
            part: A layer's number, `EMBEDDINGS` or `HEAD`.
            finite: Refuse NaN and infinity.
            hashed: Put their hashes into `digests`.
        """
        wanted, started = self._wanted(part), time.perf_counter()
        found = self._reader.read({self._names[name]: shape for name, shape in wanted.items()}, finite)
        if hashed:
            self.digests[part] = {name: tensor_sha256(found[self._names[name]], self._dtypes[name]) for name in wanted}
        if part >= 0:
            self.seconds_reading = (time.perf_counter() - started) / self.bytes(part)
        inner = len(self._prefixes[part]) + 1
        return {name[inner:]: found[self._names[name]] for name in wanted}

    def stored_dtype(self, name: str) -> torch.dtype:
        """What a weight is in that the checkpoint has under this name, FP8 undone."""
        return self._reader.parts[name].dtype

    def bytes(self, part: int) -> int:
        """What reading a part reads."""
        return self._reader.bytes({self._names[name]: shape for name, shape in self._wanted(part).items()})

    def _wanted(self, part: int) -> dict[str, torch.Size]:
        return {f"{self._prefixes[part]}.{name}": tensor.shape for name, tensor in self._hollow[part].items()}

    @property
    def parts(self) -> list[int]:
        """All parts, in the order in which text passes them."""
        return [EMBEDDINGS, *range(len(self._slots)), HEAD]

    def place(self, part: int, weights: dict[str, Tensor]) -> None:
        """Give a part its weights; they are taken out of `weights`."""
        started = time.perf_counter()
        prefix = self._prefixes[part]
        placed = {name: weights.pop(name).to(self.device, self._dtypes[f"{prefix}.{name}"]) for name in list(weights)}
        self._modules[part].load_state_dict(placed, assign=True)
        if part >= 0:
            self.seconds_placing = (time.perf_counter() - started) / self.bytes(part)

    def clear(self, part: int) -> None:
        """Take a part's weights away."""
        self._modules[part].load_state_dict(self._hollow[part], assign=True)

    def visit(self, order: Sequence[int], fresh: Collection[int] = (), hashed: bool = False) -> Iterator[int]:
        """Place parts one after the other, each read while the one before is at work.

        A part that comes again within two visits stays, so that turning back after the head reads nothing twice.

        Args:
            order: The parts.
            fresh: Those that are looked through for NaN and infinity when they are first read.
            hashed: Hash these too.

        Yields:
            The part that has its weights.
        """
        unread = deque(part for at, part in enumerate(order) if part not in order[max(0, at - 2) : at])
        coming: Future[dict[str, Tensor]] | None = None
        unseen = set(fresh)

        def read(part: int) -> dict[str, Tensor]:
            new = part in unseen
            unseen.discard(part)
            return self.read(part, finite=new, hashed=new and hashed)

        with ThreadPoolExecutor(1) as reader:
            try:
                for at, part in enumerate(order):
                    if part not in order[max(0, at - 2) : at]:
                        assert part == unread[0]
                        weights = coming.result() if coming is not None else read(part)
                        coming = None
                        unread.popleft()
                        self.place(part, weights)
                    if coming is None and unread:
                        coming = reader.submit(read, unread[0])
                    yield part
                    if part not in order[at + 1 : at + 3]:
                        self.clear(part)
            finally:
                for part in set(order):
                    self.clear(part)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The input of the first layer, `[B, T, D]`, with the embeddings in hand."""
        found: Tensor = self._modules[EMBEDDINGS](ids_BT.to(self.device))
        return found

    def forward(self, part: int, hidden_BTD: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The output of the layer in hand, `[B, T, D]`.

        Args:
            part: Its number.
            hidden_BTD: Its input.
            batch: What the model is given beside it: `attention_mask`, `position_ids`; ids and labels are left out.
        """
        given = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            seen.append(output)
            return output.detach()  # nothing is wanted of the norm that follows

        hook = self._modules[part].register_forward_hook(keep)
        passing, self._slots[part] = self._slots[part], self._modules[part]
        try:
            self.model.base_model(inputs_embeds=hidden_BTD, use_cache=False, **given)
        finally:
            self._slots[part] = passing
            hook.remove()
        return seen[0]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The model's logits `[N, V]` of the last layer's outputs, with the head in hand."""
        found: Tensor = self.model(inputs_embeds=hidden_ND.unsqueeze(0), use_cache=False).logits.squeeze(0)
        return found

    def fingerprint(self) -> str | None:
        """`identity.model_fingerprint`, from the files; None for a family that has none."""
        if self.config.model_type not in FAMILIES:
            return None
        parts = self._reader.parts
        samples = {
            name: sample(self.config, self._reader.path, parts[name]) for name in sampled(self.config) & parts.keys()
        }
        return combined(samples)
