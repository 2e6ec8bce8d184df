"""The `slimmoe` command: parsing, `--config`, errors as one line. Flags are in `parsers`, what commands do in `commands`.

Nothing heavy is imported before a command is known, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimmoe_hf.parsers import FINETUNING, TRAINING, build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Its arguments; default: the process's.

    Returns:
        0, or 2 after one `error:` line on stderr (130 after an interrupt).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parse(argv)
        from slimmoe_hf import commands

        commands.be_quiet()
        commands.COMMANDS[args.command](args)
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; the same command continues a run\n")
        return 130
    except (ValueError, OSError, RuntimeError, ImportError, ArithmeticError) as error:
        if "--debug" in argv:
            raise
        kind = "" if isinstance(error, ValueError | OSError | ArithmeticError) else f"{type(error).__name__}: "
        sys.stderr.write(f"error: {kind}{' '.join(str(error).split())}\n")
        return 2


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse arguments; the keys of `--config` stand in for flags that are not given.

    Raises:
        ValueError: An unknown or missing argument, or an unknown key.
    """
    parser = build_parser()
    if not argv:
        raise ValueError("no command given (see slimmoe --help)")
    command = _commands(parser).get(argv[0])
    file = _config_file(argv)
    extra: dict[str, Any] = {}
    if command is not None and file is not None and argv[0] != "run":
        flags, positional, extra = _config_flags(command, argv[0], Path(file))
        command.set_defaults(**positional)
        argv = [argv[0], *flags, *argv[1:]]
    args = parser.parse_args(argv)
    flags_of_training = FINETUNING if args.command == "finetune" else TRAINING
    args.training = extra | {name: value for name, value in vars(args).items() if name in flags_of_training}
    return args


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices)


def _config_file(argv: list[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        return finder.parse_known_args(argv)[0].config
    except argparse.ArgumentError:
        return None  # a --config without a value: the real parser says so


def _config_flags(
    command: argparse.ArgumentParser, name: str, file: Path
) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """A config file as flags, as positional arguments, and as further training arguments of commands that train."""
    from slimmoe_hf.recipe import training_argument_names
    from slimmoe_hf.schema import suggestion
    from slimmoe_hf.yaml_files import read_yaml

    if not file.is_file():
        raise ValueError(f"{file}: no such file (--config)")
    values = read_yaml(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected keys and values, found {type(values).__name__}.")
    actions = {action.dest: action for action in command._actions if action.dest not in ("help", "config", "debug")}
    flags: list[str] = []
    positional: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    training = training_argument_names(name)
    for given, value in values.items():
        key = str(given).replace("-", "_")
        if key in actions:
            action = actions[key]
            if not action.option_strings:
                positional[key] = value
            elif action.nargs == 0:
                wanted = action.option_strings[0] if value else f"--no-{action.option_strings[0][2:]}"
                flags += [wanted] if wanted in action.option_strings else []
            elif value is not None:
                flags += [action.option_strings[0], *map(str, value if isinstance(value, list) else [value])]
        elif key in training:
            extra[key] = value
        else:
            raise ValueError(f"{file}: {given}: unknown key{suggestion(key, [*actions, *training])}")
    return flags, positional, extra
