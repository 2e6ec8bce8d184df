"""Make two tasks for lm-evaluation-harness from text that the shipped teacher was not trained on.

    python examples/tasks/make_tasks.py

The text is the test split of `sotu` (annual messages of the years ending in 5, public domain). `sotu_ending`: which of
four endings does a sentence have, after up to two sentences before it? The other three are of nearly the same length
and end sentences of other messages. `sotu_text`: passages, for the perplexity. Both are the same on every machine.
"""

import argparse
import json
import random
import re
from pathlib import Path

from slimmoe_hf.data import load_documents

QUESTIONS, CHOICES, PASSAGES = 12, 4, 10  # questions and passages per message
CONTEXT, ENDING, PASSAGE = 500, (30, 120), 750  # characters
RATIO = 1.15  # at most, of a wrong ending's length and the right one's


def paragraphs(text: str) -> list[list[str]]:
    """The sentences of every paragraph."""
    return [re.split(r"(?<=[.!?])\s+(?=[A-Z])", part.strip()) for part in text.split("\n\n") if part.strip()]


def endings(sentences: list[str], random_state: random.Random) -> list[dict[str, str]]:
    """Sentences of a paragraph cut in two, each with the sentences before it."""
    rows = []
    for at, sentence in enumerate(sentences):
        words = sentence.split(" ")
        cut = random_state.randint(len(words) // 3, 2 * len(words) // 3)
        context = " ".join([*sentences[max(at - 2, 0) : at], *words[:cut]])
        rows.append({"context": context, "ending": " ".join(words[cut:])})
    return [row for row in rows if len(row["context"]) <= CONTEXT and ENDING[0] <= len(row["ending"]) <= ENDING[1]]


def sentence_endings(texts: list[str], random_state: random.Random) -> list[dict[str, object]]:
    """Multiple-choice questions, `QUESTIONS` of every message."""
    messages = [[row for part in paragraphs(text) for row in endings(part, random_state)] for text in texts]
    rows = []
    for number, found in enumerate(messages):
        others = sorted({row["ending"] for n, some in enumerate(messages) if n != number for row in some})
        for row in random_state.sample(found, min(QUESTIONS, len(found))):
            size = len(row["ending"])
            near = [text for text in others if 1 / RATIO <= len(text) / size <= RATIO]
            choices = [row["ending"], *random_state.sample(near, CHOICES - 1)]
            random_state.shuffle(choices)
            rows.append({"context": row["context"], "choices": choices, "answer": choices.index(row["ending"])})
    return rows


def passages(texts: list[str], random_state: random.Random) -> list[dict[str, str]]:
    """Passages of whole sentences, at most `PASSAGE` characters, `PASSAGES` of every message."""
    rows = []
    for text in texts:
        found = []
        for sentences in paragraphs(text):
            while sentences:
                taken = [sentences[0]]
                while len(taken) < len(sentences) and len(" ".join(sentences[: len(taken) + 1])) <= PASSAGE:
                    taken.append(sentences[len(taken)])
                if PASSAGE // 2 <= len(" ".join(taken)) <= PASSAGE:
                    found.append(" ".join(taken))
                sentences = sentences[len(taken) :]
        rows += [{"text": passage} for passage in random_state.sample(found, min(PASSAGES, len(found)))]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the JSON files")
    args = parser.parse_args()
    texts = load_documents("sotu", "test")["text"]
    for name, make in (("sotu_ending", sentence_endings), ("sotu_text", passages)):
        rows = make(texts, random.Random(0))
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (args.output / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
