"""What ``--help`` prints, and how a wrong word is answered: in plain words, without Python's types."""

import argparse
import inspect
import re
import textwrap
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from train_clip.errors import did_you_mean

WIDTH, COLUMN = 110, 34  # characters of a help page at most; where its second column begins
MOST_SHOWN = 5  # choices beside an option
MARKUP = re.compile(r":\w+:`(?:[~\w.]*\.)?([^`]+)`|`+([^`]*)`+")  # :class:`~package.Name`, ``name``


class Words(NamedTuple):
    """A type in words."""

    metavar: str  # stands for a value in ``--help``
    expected: str  # what a message asks for
    choices: tuple[str, ...] = ()


PLAIN = {
    int: Words("N", "a whole number"),
    float: Words("X", "a number"),
    bool: Words("{true,false}", "true or false", ("true", "false")),
    str: Words("NAME", "a name"),
    Path: Words("PATH", "a path"),
}


def in_words(kind: Any) -> Words:
    """Put an option's type into words. That it may be None goes without saying."""
    kinds = _alternatives(kind)
    names = tuple(dict.fromkeys(str(name) for one in kinds if get_origin(one) is Literal for name in get_args(one)))
    if names:
        return Words("{" + ",".join(names) + "}" if len(names) <= MOST_SHOWN else "NAME", either(names), names)
    if len(kinds) > 1:
        parts = dict.fromkeys(part for one in map(in_words, kinds) for part in one.choices or [one.expected])
        return Words("VALUE", either(parts))
    if of := get_args(kinds[0]):
        if of[0] in PLAIN:
            return Words('"[X, X]"', 'numbers in brackets and quotes, such as "[0.9, 0.98]"')
        return in_words(of[0])  # several objects, where one does too
    return PLAIN.get(kinds[0], Words("VALUE", f"the name of a {getattr(kinds[0], '__name__', kinds[0])}"))


def _alternatives(kind: Any) -> list[Any]:
    if get_origin(kind) not in (Union, types.UnionType):
        return [kind]
    return [one for part in get_args(kind) if part is not type(None) for one in _alternatives(part)]


def either(words: Iterable[str]) -> str:
    """``a, b or c``."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


class HelpFormatter(argparse.HelpFormatter):
    """An option, its values and its help side by side, with the default that it has."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=COLUMN)
        self._width = min(self._width, WIDTH)

    def _expand_help(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, argparse.SUPPRESS) or "default" in text.lower():
            return text
        if isinstance(default, bool):
            default = str(default).lower()
        return f"{text} (default: {f'{default:g}' if isinstance(default, float) else default})"

    def _split_lines(self, text: str, width: int) -> list[str]:
        # hf-hub:NAME stays in one piece.
        return textwrap.wrap(text, width, break_on_hyphens=False)


def help_on_trainer(prog: str, own: dict[str, str | None]) -> str:
    """List the options of ``lightning.Trainer``; ``own`` has the help of those that differ here, None for none."""
    import docstring_parser
    import lightning as L

    parser = argparse.ArgumentParser(
        prog,
        usage=f"{prog} [options of lightning.Trainer]",
        description="A class (a logger, a callback) is given by its name, its arguments by --OPTION.ARGUMENT VALUE.",
        formatter_class=HelpFormatter,
        add_help=False,
    )
    documented = {
        one.arg_name: one.description for one in docstring_parser.parse(L.Trainer.__init__.__doc__ or "").params
    }
    for name, parameter in inspect.signature(L.Trainer).parameters.items():
        if text := own.get(name, documented.get(name)):
            how = {} if name in own else {"default": parameter.default}
            text = " ".join(MARKUP.sub(r"\1\2", text).split())
            parser.add_argument(f"--{name}", metavar=in_words(parameter.annotation).metavar, help=text, **how)
    return parser.format_help()


def explain(message: str, kinds: dict[str, Any], names: dict[tuple[str, str], str]) -> str:
    """Say in plain words what the parser library's message says of an option of one of these types.

    ``names`` says where an option has its value, unless by its name on the command line.
    """
    option = re.search(r'Parser key "(\w+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if option and value and option[1] in kinds:
        words, name = in_words(kinds[option[1]]), names.get((option[1], value[1]), f"--{option[1]}")
        if nested := re.match(r"NestedArg\(key='(.*)', val=", value[1]):
            return f"{name}.{nested[1]}: is for a class; expected --{option[1]} to name one before it."
        return f"{name} {value[1]}: expected {words.expected}.{did_you_mean(value[1], words.choices)}"
    if option := re.search(r"argument --(\w+).*: expected one argument", message):
        return f"--{option[1]}: its value is missing; expected {in_words(kinds[option[1]]).expected}."
    if missing := re.search("arguments are required: (.*)", message):
        return f"{missing[1].upper()} is missing."
    if unknown := re.search("nrecognized arguments: (.*)", message):
        return f"{unknown[1]}: not expected here; a value follows the name of its option."
    return " ".join(message.split())
