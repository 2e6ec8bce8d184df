"""Chats to fine-tune on, with no network: the Chit-Chat challenge's (MIT), as a `.jsonl` of `messages`.

pip install chitchat-dataset
python examples/chitchat.py chats.jsonl
"""

import argparse
import json
from pathlib import Path

import chitchat_dataset


def chats() -> list[dict]:
    """Chats of two turns or more; whoever began is the user, and the assistant has the last word."""
    found = []
    for chat in chitchat_dataset.Dataset().values():
        turns = [" ".join(line["text"] for line in turn).strip() for turn in chat["messages"]]
        turns = turns[: len(turns) // 2 * 2]
        if turns and all(turns):
            roles = ("user", "assistant")
            found.append({"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--limit", type=int, help="only so many chats")
    args = parser.parse_args()
    rows = chats()[: args.limit]
    args.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.output}: {len(rows):,} chats")


if __name__ == "__main__":
    main()
