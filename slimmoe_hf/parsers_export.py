"""The flags of `slimmoe export`; nothing heavy is imported here either."""

from __future__ import annotations

from typing import Any

from slimmoe_hf.parser_parts import add_command, add_output

ENGINES = ("vllm", "llama.cpp", "mlx", "transformers4")


def add_export(commands: Any) -> None:
    """`slimmoe export`."""
    parser = add_command(
        commands, "export",
        "Say which engines load a checkpoint, and why not; or write it for one of them; or make one whose experts are shared or\n"
        "factored a stock one.",
        "slimmoe export my-run/model\n  slimmoe export my-run/model --for llama.cpp --output to-convert\n"
        "  slimmoe export merged --form duplicate --output stock",
    )  # fmt: skip
    parser.add_argument(
        "folder", nargs="?", metavar="DIR", help="the checkpoint; alone, what engines make of it is shown"
    )
    parser.add_argument(
        "--for", dest="engine", choices=ENGINES,
        help="write it as the engine reads it, the same weights, if it loads them; llama.cpp is its converter's input",
    )  # fmt: skip
    parser.add_argument(
        "--form", choices=("duplicate", "dense"),
        help="duplicate: every shared expert in the place of all its members; dense: factored experts multiplied out",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what engines make of it as JSON")
    add_output(parser, "OUT")
