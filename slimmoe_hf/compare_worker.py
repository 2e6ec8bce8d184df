"""A process that does points of a comparison: `python -m slimmoe_hf.compare_worker SHARED MODEL`.

`compare_pool` starts it. It reads the folders of points from stdin, a line each, and answers each with a line; when stdin
ends, it ends with its parent, however that ended.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from pathlib import Path

import rich

from slimmoe_hf.commands import be_quiet
from slimmoe_hf.compare_point import FAILURE, Bench, run_point
from slimmoe_hf.compare_pool import DONE, FAILED
from slimmoe_hf.loading import load_tokenizer


def main(arguments: list[str]) -> int:
    """Do points until stdin ends.

    Args:
        arguments: Of the process: the folder of what is shared, and that of the model.

    Returns:
        The exit code.
    """
    shared, model = map(Path, arguments)
    be_quiet()
    rich.reconfigure(stderr=True, width=200, log_path=False)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    orders: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    bench = Bench(shared, model, load_tokenizer(model))
    while True:
        folder = Path(orders.get())
        rich.get_console().log(f"point {folder.name}")
        answer = DONE
        try:
            run_point(bench, folder)
        except Exception as error:  # one point's fault is not the others'
            traceback.print_exc()
            kind = "" if isinstance(error, ValueError | OSError | ArithmeticError) else f"{type(error).__name__}: "
            (folder / FAILURE).write_text(f"{kind}{' '.join(str(error).split())}", encoding="utf-8")
            answer = FAILED
        answers.write(f"{answer}\n")
        answers.flush()


def _listen(orders: queue.Queue[str]) -> None:
    for line in sys.stdin:
        orders.put(line.rstrip("\n"))
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
