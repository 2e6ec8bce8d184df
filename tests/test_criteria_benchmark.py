"""The benchmark of criteria on a tiny model: every part is there, and what is there is not measured again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from recipes import tiny_recipe

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.mark.slow  # cuts, measures and trains some hundred tiny students
def test_the_criteria_benchmark_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import criteria
    from criteria_tables import Found

    recipe = tiny_recipe(tmp_path)
    file = tmp_path / "found.json"
    text = [
        "--data",
        recipe["data"]["source"],
        "--max-length",
        "32",
        "--validation-tokens",
        "256",
        "--test-tokens",
        "256",
    ]
    size = ["--calibration", "4", "--sequences", "2", "--steps", "4", "--seeds", "0", "1"]
    command = ["--models", recipe["model"], "--work", str(tmp_path / "work"), "--json", str(file), *text, *size]
    made = list[Any]()
    cut = criteria.Teacher.cut
    monkeypatch.setattr(criteria.Teacher, "cut", lambda self, point: made.append(point) or cut(self, point))

    criteria.main([*command, "--parts", "grid", "recovery", "sequences"])
    whole = json.loads(file.read_text())
    assert len(made) == len(set(made)) == sum(point["steps"] == 0 for point in whole["points"])
    found = Found(whole, Path(recipe["model"]).name)
    assert found.looks == [0, 1, 2, 4], "right after the cut, and three looks at recovery"
    shapes = {(point["experts"], point["width"]) for point in found.points}
    assert {(4, 16), (2, 32), (4, 8), (2, 16), (2, 8)} <= shapes, "width, drop and mixes"
    assert (4, 4) not in shapes and (1, 32) not in shapes, "neither the alignment nor top-k allows them"
    best = found.best()
    assert best is not None and len(found.at(*best)) == 2, "a plan of all seeds"

    made.clear()
    file.write_text(json.dumps({**whole, "points": whole["points"][:40]}))  # as if it had been stopped there
    criteria.main([*command, "--parts", "grid", "recovery", "sequences"])
    again = json.loads(file.read_text())
    assert again["points"][:40] == whole["points"][:40], "what was there is as it was"
    assert len(made) == sum(point["steps"] == 0 for point in whole["points"]) - 40
    losses = [{tuple(p.items())[:11]: p["test_loss"] for p in each["points"]} for each in (whole, again)]
    assert losses[0] == losses[1]
    assert "2x16" in file.with_suffix(".md").read_text()
    with pytest.raises(SystemExit, match="other settings"):
        criteria.main([*command, "--learning-rate", "1"])
    assert sys.modules.pop("criteria")
