"""The command line: ``ppl-vae list | show | fit | evaluate | check | sample | experiment | …``.

Options are made from signatures with jsonargparse; a recipe's own arguments join those of
``fit``. Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import docstring_parser
from jsonargparse import ArgumentParser

from ppl_vae.commands import COMMANDS, fit_command
from ppl_vae.names import nearest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; without ``arguments``, those of the process.

    Returns the exit code: 0; 1 for a command that failed, with one sentence that says why; 130
    for Ctrl-C, which ``fit`` answers by saving a checkpoint first. A command line that makes no
    sense exits with 2.
    """
    given = [_underscored(a) for a in (sys.argv[1:] if arguments is None else arguments)]
    parser = _parser(given)
    chosen = parser.parse_args(given).as_dict()
    command = chosen.pop("subcommand")
    try:
        COMMANDS[command](**chosen[command])
    except KeyboardInterrupt as interrupt:
        hint = f"; go on with: ppl-vae fit --resume {interrupt}" if interrupt.args else ""
        if _speaks(interrupt):
            print(f"ppl-vae {command}: interrupted{hint}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if _speaks(error):
            # Pyro appends tables of shapes to an error's sentence.
            print(
                f"ppl-vae {command}: {str(error).partition(' Trace Shapes:')[0].strip()}",
                file=sys.stderr,
            )
        return 1
    return 0


def _speaks(error: BaseException) -> bool:
    """Whether this process tells of an error; of one that all workers have, only the first does."""
    from ppl_vae.launch import is_first
    from ppl_vae.workers import AGREED

    return not isinstance(error, AGREED) or is_first()


class _Parser(ArgumentParser):
    """Names the nearest option to one that it does not know."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            parsers = [self, *self._subparsers_by_name().values()]
            options = {o for p in parsers for a in p._actions for o in a.option_strings}
            message += f"; {nearest(unknown[1], (o for o in options if o[:2] == '--'))}"
        super().error(message, ex)

    def _subparsers_by_name(self) -> dict[str, ArgumentParser]:
        for action in self._actions:
            if isinstance(action.choices, dict):
                return action.choices
        return {}


def _parser(given: Sequence[str]) -> ArgumentParser:
    parser = _Parser(
        prog="ppl-vae",
        description="Write, fit and trust VAEs as Pyro programs.",
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(title="commands", metavar="COMMAND", description=None)
    for name, function in COMMANDS.items():
        said = docstring_parser.parse(inspect.getdoc(function) or "")
        first_line = said.short_description or ""
        sub = _Parser(description=first_line)
        # Flags stand alone: --json, not --json true.
        parameters = inspect.signature(function).parameters.values()
        flags = {p.name for p in parameters if p.annotation == "bool"}
        words = {p.name for p in parameters if p.annotation == "list[str]"}
        for parameter in said.params:
            if parameter.arg_name in flags:
                sub.add_argument(
                    f"--{parameter.arg_name}", action="store_true", help=parameter.description
                )
            elif parameter.arg_name in words:
                sub.add_argument(parameter.arg_name, nargs="*", help=parameter.description)
        if name == "fit":
            sub.add_argument("recipe", nargs="?", help="name, or path/to/file.py:function")
            sub.add_function_arguments(function, skip={"recipe", "arguments", *flags})
            _add_recipe(parser, sub, given)
        else:
            sub.add_function_arguments(function, as_positional=True, skip={*flags, *words})
        commands.add_subcommand(name, sub, help=first_line[:1].lower() + first_line[1:].rstrip("."))
    return parser


def _add_recipe(parser: ArgumentParser, fit_parser: ArgumentParser, given: Sequence[str]) -> None:
    """Give ``fit`` the arguments of the recipe that the command line names, if it names one."""
    if given[:1] != ["fit"] or any(word.partition("=")[0] == "--resume" for word in given):
        return
    taking = {o for a in fit_parser._actions if a.nargs != 0 for o in a.option_strings}
    # Words that are neither options nor the values of those known so far; a recipe's own options
    # are not, so their values are among the words.
    words = [
        word
        for before, word in itertools.pairwise(given)
        if not word.startswith("-") and before not in taking
    ]
    if not words:
        return
    from ppl_vae.recipes import find_recipe, recipes

    known = {*recipes(), *(word for word in words if ".py:" in word)}
    recipe = next((word for word in words if word in known), words[0])
    try:
        function = find_recipe(recipe)
    except ValueError as error:
        parser.error(str(error))
    reserved = (
        inspect.signature(function).parameters.keys() & inspect.signature(fit_command).parameters
    )
    if reserved:
        parser.error(
            f"recipe {recipe!r} has an argument {reserved.pop()!r}, which fit has: rename it"
        )
    fit_parser.add_function_arguments(function)


def _underscored(word: str) -> str:
    """``--batch-size`` as ``--batch_size``: signatures have underscores, habits have dashes."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


if __name__ == "__main__":  # for launchers, which take a module: torchrun -m ppl_vae.cli
    sys.exit(main())
