"""The table of families: as large as is promised, the same in the README, and a message for every other model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from slimmoe_hf import Target, cli
from slimmoe_hf.families import FAMILIES, UNSUPPORTED, family_of
from slimmoe_hf.family_table import COLUMNS, markdown, support, supported
from slimmoe_hf.plan import validate_target

README = Path(__file__).parent.parent / "README.md"
OTHERS = [*UNSUPPORTED, "llama", "gemma4_text", "deepseek_v4", "qwen3_omni_moe_text", "doge"]


def test_there_are_thirty_families_and_twenty_five_take_a_width():
    assert len(FAMILIES) >= 30
    assert sum(not row.no_width for row in FAMILIES.values()) >= 25


def test_every_no_and_every_limit_has_its_reason():
    for name, answers in supported().items():
        assert answers.keys() == COLUMNS.keys()
        assert all((answer.word == "yes") == (not answer.why) for answer in answers.values()), name


def test_the_readme_has_the_table_as_it_is():
    """`python -c "from slimmoe_hf.family_table import markdown; print(markdown())"` prints what belongs between the marks."""
    text = README.read_text()
    begin, end = "<!-- families: generated -->\n", "\n<!-- end of families -->"
    assert text.count(begin) == text.count(end) == 1
    assert text.split(begin)[1].split(end)[0] == markdown()


def test_the_readme_names_those_whose_experts_are_not_factored():
    odd = [f"`{name}`" for name, row in FAMILIES.items() if not (row.layout.plain or row.layout.unit is not None)]
    assert f"takes all but {', '.join(odd[:-1])} and {odd[-1]}." in README.read_text()


def test_a_model_of_several_parts_is_told_which_of_them_can_be_slimmed():
    with pytest.raises(
        ValueError, match=r"a aria is a model of several parts. .* language model by itself \(aria_text\)"
    ):
        family_of(AutoConfig.for_model("aria"))


def test_the_command_prints_it_for_people_and_for_scripts(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["env", "--families", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["olmoe"]["groups"] == {"word": "no", "why": FAMILIES["olmoe"].no_groups}
    assert found.keys() == FAMILIES.keys() | UNSUPPORTED.keys()
    assert cli.main(["env", "--families"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in found) and FAMILIES["jamba"].no_width in shown


@pytest.mark.parametrize("model_type", OTHERS)
def test_any_other_model_is_refused_in_one_line(model_type: str):
    with pytest.raises(
        ValueError, match=r"cannot be slimmed: |slimmoe env --families lists .*CONTRIBUTING\.md"
    ) as error:
        family_of(AutoConfig.for_model(model_type))
    assert "\n" not in str(error.value)


def refusals() -> list[tuple[str, Target, str]]:
    """One for every row and kind of cut that it does not take."""
    found = []
    for name, row in FAMILIES.items():
        answers = support(row)
        if answers["width"].word == "no":
            found.append((name, Target(expert_width=8), row.no_width))
        if answers["groups"].word == "no":
            found.append((name, Target(kv_groups=1), row.no_groups))
    return found


@pytest.mark.parametrize(("family", "target", "why"), refusals(), ids=lambda value: str(value)[:24])
def test_a_cut_that_a_family_does_not_take_is_refused_with_its_reason(family: str, target: Target, why: str):
    from tiny import _SEQ2SEQ, derived_values

    values = _SEQ2SEQ.get(family) or {**derived_values(family), "num_key_value_heads": 4}
    with pytest.raises(ValueError) as error:
        validate_target(AutoConfig.for_model(family, **values), target)
    assert why in str(error.value) and "\n" not in str(error.value)


def test_shared_experts_and_routing_groups_say_what_is_possible():
    from tiny import derived_values

    config = AutoConfig.for_model("deepseek_v3", **derived_values("deepseek_v3"))
    with pytest.raises(
        ValueError, match=r"expert_width=24 .* n_shared_experts times .* 32 neurons.* Nearest: 8, 16, 32\."
    ):
        validate_target(config, Target(expert_width=24))
    with pytest.raises(ValueError, match=r"num_experts=5 .* 2 groups \(n_group\) .* Possible: 4, 6, 8\."):
        validate_target(config, Target(num_experts=5))
