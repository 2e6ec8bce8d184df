"""Model cards: metadata that the Hub takes, pictures that exist, names that strangers may see, nothing overwritten."""

from __future__ import annotations

import getpass
from pathlib import Path

import pytest
import yaml
from hub_server import metadata_errors
from huggingface_hub import ModelCard

from slimmoe_hf import card
from slimmoe_hf.lineage import Base, find_base, is_hub_id, public_name, read_base

BASE = Base("someone/base", "someone/base", "mit", languages=["en"])
TRANSFORMERS_CARD = "---\ntags:\n- generated_from_trainer\n---\n# x\n"
PEFT_CARD = "---\nlibrary_name: peft\n---\n# Model Card for Model ID\n"


def written(base: Base = BASE, **arguments: object) -> str:
    data = card.metadata("small", base, ["someone/text", "local-text.jsonl"], **arguments)  # type: ignore[arg-type]
    return card.assemble(data, "small", [("", "What it is."), ("Empty", "  "), ("More", "![a](images/a.png)")])


def test_the_metadata_comes_back_as_it_was_meant_and_passes_the_rules_of_the_hub():
    text = written()
    data = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert data["base_model"] == "someone/base" and data["base_model_relation"] == "finetune"
    assert data["license"] == "mit" and data["language"] == ["en"] and data["library_name"] == "transformers"
    assert data["datasets"] == ["someone/text"], "only ids on the Hub are datasets there"
    assert {"moe", "pruning", "distillation", "slimmoe"} <= set(data["tags"])
    assert list(metadata_errors(text)) == []
    assert "## Empty" not in text and "## More" in text


def test_a_local_base_has_no_relation_and_an_adapter_says_what_it_is():
    data = yaml.safe_load(written(Base("local")).split("---\n")[1])
    assert not {"base_model", "base_model_relation", "license"} & data.keys()
    data = yaml.safe_load(written(adapter=True).split("---\n")[1])
    assert data["base_model_relation"] == "adapter" and data["library_name"] == "peft"


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        (lambda text: text.replace("license: mit", "license: 3"), "license in its metadata is 3"),
        (lambda text: text.replace("- moe\n", "- [a, b]\n"), "tags in its metadata"),
        (lambda text: text.replace("license: mit", "license: [mit"), "cannot be read"),
        (lambda text: text.replace("images/a.png", "images/b.png"), "shows images/b.png, which is not in the folder"),
        (lambda text: text + '\n<img width="9" src="c.png">\n', "shows c.png"),
    ],
)  # fmt: skip
def test_what_the_hub_would_refuse_is_refused_here_in_one_line(spoilt, says):
    card.check_card(written(), {"images/a.png"})
    with pytest.raises(ValueError, match=r"README\.md: ") as caught:
        card.check_card(spoilt(written()), {"images/a.png"})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_pictures_from_the_web_need_not_be_here():
    card.check_card(written() + "\n![logo](https://example.org/logo.png)\n", {"images/a.png"})


@pytest.mark.parametrize(
    ("text", "may"), [(None, True), (TRANSFORMERS_CARD, True), (PEFT_CARD, True), (written(), True), ("# Mine\n", False)],
    ids=["none", "transformers", "peft", "ours", "a person's"],
)  # fmt: skip
def test_only_cards_that_programs_wrote_are_written_again(text: str | None, may: bool, tmp_path: Path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert card.may_be_written(tmp_path / "README.md") is may


def test_a_card_without_our_mark_is_its_readers_own(tmp_path: Path):
    (tmp_path / "README.md").write_text(written().replace(card.MARK, ""))
    assert not card.may_be_written(tmp_path / "README.md")


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("someone/model-7b", "someone/model-7b"), ("sotu", "sotu"), ("/data/texts/train.jsonl", "train.jsonl"),
        ("/data/project/teacher/model", "teacher"), (f"/home/{getpass.getuser()}/model", "model"),
        (f"{Path.home()}/small-moe", "small-moe"), ("../base", "base"), ("~/runs/base", "base"), ("/", "model"),
    ],
)  # fmt: skip
def test_names_that_strangers_see_hold_no_place_and_no_user(name: str, public: str):
    assert public_name(name) == public


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("runs/student") and not is_hub_id("runs/a/b") and not is_hub_id("sotu") and not is_hub_id("/a/b")
    (tmp_path / "runs" / "student").mkdir(parents=True)
    assert not is_hub_id("runs/student")


def test_licence_and_language_come_from_the_card_of_the_original(tmp_path: Path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: de\n---\n# B"
    )
    base = read_base("a/b", "a/b", tmp_path / "README.md")
    assert (base.license, base.license_name, base.languages) == ("other", "own", ["de"])
    assert base.license_link == "https://huggingface.co/a/b/blob/main/LICENSE", "a relative link would lead nowhere"
    assert base.licensed("mit").license == "mit" and base.licensed("mit").license_name is None
    with pytest.raises(ValueError, match="not an id such as"):
        base.licensed("Apache License, Version 2")
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert read_base("b", None, tmp_path / "README.md").license is None


def test_an_unknown_licence_is_left_out_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "base").mkdir()
    base, folder = find_base(str(tmp_path / "base"))
    assert base.license is None and folder == tmp_path / "base"
    assert "no licence is known of base" in "".join(capsys.readouterr()).replace("\n", " ")
    assert "names no licence" in card.license_text(base, None) and "license:" not in written(base)
    assert card.license_text(base.licensed("mit"), "mit") == "mit, as whoever made this model says."


def test_a_card_of_ours_learns_its_repository_base_and_licence_and_keeps_all_else():
    local = Base("local")
    data = card.metadata("small", local)
    text = card.assemble(data, "small", [
        ("Use it", card.loading_code(None, "The")), ("Licence", card.license_text(local, None)), ("Citation", card.CITATION),
    ])  # fmt: skip
    known = card.amended(text, "me/small", BASE, "mit")
    assert 'name = "me/small"' in known and card.MARK in known and card.CITATION in known
    assert "mit, as whoever made this model says." in known and "names no licence" not in known
    found = ModelCard(known).data.to_dict()
    assert (found["base_model"], found["base_model_relation"], found["license"]) == ("someone/base", "finetune", "mit")
    assert card.amended(known, "me/small", None, None) == known


def test_what_a_model_wrote_cannot_break_the_card():
    text = card.escape("a | <b> *c*\n[d](e) # `f`")
    assert text == "a \\| \\<b\\> \\*c\\* \\[d\\](e) \\# \\`f\\`"
    assert card.table([["a|b", "c"], ["d\ne", "1"]]) == "| a\\|b | c |\n| --- | ---: |\n| d e | 1 |"


@pytest.mark.parametrize(
    ("number", "text"), [(41_873_153_344, "41.9B"), (7_647_632_704, "7.65B"), (1_994_240, "1.99M"), (12, "12")]
)
def test_numbers_of_parameters_have_three_digits(number: int, text: str):
    assert card.count(number) == text


def test_the_card_of_the_quickstart_is_one_that_could_be_published():
    folder = Path(__file__).parents[1] / "examples" / "quickstart-model"
    files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    text = (folder / "README.md").read_text()
    card.check_card(text, files)
    assert list(metadata_errors(text)) == [] and len(card.images_of(text)) >= 4
    assert {"card-1.png", "card-2.png"} <= files.keys() and max(files.values()) < 300_000
    assert not any(place in text for place in ("/home/", "/tmp/", "/root", str(Path.cwd())))
