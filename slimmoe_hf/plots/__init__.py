"""Pictures of finished runs: what was cut, and how it recovered. Each is a PNG, with the data it shows as JSON beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import get_console

from slimmoe_hf.atomic import replacing
from slimmoe_hf.plots.comparison import draw_comparison
from slimmoe_hf.plots.data import read_pictures
from slimmoe_hf.plots.frontier import draw_frontier
from slimmoe_hf.plots.lines import draw_losses, draw_quality_size, draw_scores
from slimmoe_hf.plots.maps import draw_kept, draw_router_loads
from slimmoe_hf.plots.models import Picture
from slimmoe_hf.plots.ranks import draw_stable_ranks
from slimmoe_hf.plots.style import Sheet, drawing_style

_DRAWN: Mapping[str, Callable[[Any], Sheet]] = {
    "kept": draw_kept,
    "scores": draw_scores,
    "router_load": draw_router_loads,
    "losses": draw_losses,
    "quality_size": draw_quality_size,
    "stable_rank": draw_stable_ranks,
    "comparison": draw_comparison,
    "frontier": draw_frontier,
}


@dataclass(frozen=True)
class Plot:
    """A picture that was drawn.

    Attributes:
        name: `kept`, `scores`, `router_load`, `losses` or `quality_size` (of a run that merged an encoder-decoder's experts
            `stable_rank`); of one of several runs, `RUN/kept` and so on.
        caption: One sentence: what is seen, and what it found. A legend, and a text for those who cannot see it.
        png: The picture. json: Exactly the data in it.
    """

    name: str
    caption: str
    png: Path
    json: Path


def read(runs: Sequence[Path]) -> dict[str, Picture]:
    """What `draw` would draw, by name. What a run has no data for, and what should worry, is said on the console.

    Raises:
        ValueError: As `read_pictures`.
    """
    pictures, notes = read_pictures(runs)
    whose = {name: f"{name}: " if len(runs) > 1 else "" for name in pictures}
    warnings = [f"warning: {whose[name]}{picture.warning}" for name, picture in pictures.items() if picture.warning]
    for line in [*notes, *warnings]:
        get_console().print(line, markup=False, highlight=False, soft_wrap=True)
    return pictures


def draw(runs: Sequence[Path], output: Path, overwrite: bool = False) -> list[Plot]:
    """Draw everything that the folders of some finished runs tell.

    Of one run: what was kept, its scores, router load, losses, and quality against size. Of several: the same of each
    in a folder of its own, and all in one picture of quality against size.

    Args:
        runs: Output folders of `slimmoe run`.
        output: The folder for the pictures.
        overwrite: Replace pictures that are there.

    Returns:
        The pictures, in the order above; without those that a run has no data for, which the console says.

    Raises:
        ValueError: A folder that is no finished run's, damaged files, runs that cannot be compared, or something in the
            way at `output`. Nothing is written then.
    """
    if overwrite:
        _refuse_foreign(output)
    pictures = read(runs)
    with replacing(output, overwrite) as partial:
        for name, picture in pictures.items():
            file = partial / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(picture))
            file.with_suffix(".json").write_text(picture.model_dump_json() + "\n", encoding="utf-8")
    return [
        Plot(name, picture.caption, output / f"{name}.png", output / f"{name}.json")
        for name, picture in pictures.items()
    ]


def png(picture: Picture) -> bytes:
    """Draw one picture; the same data gives the same bytes (with the same matplotlib)."""
    with drawing_style():
        return _DRAWN[picture.name](picture).png()


def _refuse_foreign(folder: Path) -> None:
    """Only pictures are replaced: a wrong --output must not cost anybody a folder."""
    files = [file for file in folder.rglob("*") if not file.is_dir()] if folder.is_dir() else []
    for file in files:
        if file.stem not in _DRAWN or file.suffix not in (".png", ".json"):
            raise ValueError(f"{folder}: holds {file.name}, which is no plot; it is left alone. Give another --output.")
