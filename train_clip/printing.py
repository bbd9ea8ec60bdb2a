"""What reaches a terminal, a log or a spreadsheet: names, captions and messages as text, never as codes."""

import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from typing_extensions import override

CONTROL = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's control and format characters, surrogates, separators of lines
JOINERS = "\u200c\u200d"  # without which words of Persian and Hindi, and pictures such as 👩‍🔬, fall apart
LAYOUT = "\n\t"  # of our own messages
FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]|[\t\r]")  # how cells begin that spreadsheets run
Intervals = dict[str, list[float]]  # lower and upper bound, by the names of figures


def printable(text: object, kept: str = "") -> str:
    r"""Escape what could steer a terminal, reorder a line or begin another: \x1b, \u202e, \n, a byte that is no UTF-8.

    The result can be written as UTF-8. Characters in ``kept`` stay as they are.
    """
    if (text := str(text)).isprintable():
        return text
    codes = {one for one in {*text} - {*JOINERS, *kept} if unicodedata.category(one) in CONTROL}
    # A byte of a file's name is of U+DC00 on, as Python has it.
    escapes: Any = {one: f"\\x{ord(one) - 0xDC00:02x}" for one in codes if "\udc80" <= one <= "\udcff"}
    escapes |= {one: one.encode("unicode_escape").decode() for one in codes - escapes.keys()}
    return text.translate(str.maketrans(escapes))


def interval(bounds: list[float] | None, form: str = "{:.1%}") -> str:
    """Lower and upper bound as "[31.0%, 37.5%]"; nothing where there are none."""
    return "" if bounds is None else f"[{', '.join(map(form.format, bounds))}]"


def no_formula(cell: str, before: str = " ") -> str:
    """A cell that no spreadsheet runs: where it begins as a formula does, it begins with something else before."""
    return before + cell if FORMULA.match(cell) else cell


class Stream:
    """A text stream that may fail without a word: its reader has left, its terminal is gone, its disk is full."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.passed_over: tuple[type[Exception], ...] = ()  # failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:  # noqa: D102
        with suppress(*self.passed_over):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:  # noqa: D102
        with suppress(*self.passed_over):
            self.stream.flush()


class PlainStream(Stream):
    """One that takes no codes: ``stream`` gets them escaped, whoever writes them.

    To others it is no terminal, or they would color what they write. A bar's first sign, which returns to the
    beginning of its line, passes.
    """

    @override
    def write(self, text: str) -> int:
        bar = "\r" * (text.startswith("\r") and self.stream.isatty())
        self.stream.write(bar + printable(text[len(bar) :], LAYOUT))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # noqa: D102
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:  # noqa: D102
        return False


def open_streams() -> None:
    """Have all three streams open: else the next file would get a closed one's number, and what is printed."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    sys.stdout, sys.stderr = (one or os.fdopen(os.dup(number), "w") for one in (sys.stdout, sys.stderr))
    os.close(number)


def escape_streams() -> None:
    """Let nothing of this process steer the terminal by what it prints; but ``progress_bar`` does."""
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), PlainStream | None):
            if hasattr(stream, "reconfigure"):
                # Arrows and × stand in messages; a terminal or log that cannot write them must not end a run.
                stream.reconfigure(errors="replace")
            setattr(sys, name, PlainStream(Stream(stream)))


def go_on_unread() -> None:
    """Let streams fail silently from here on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, PlainStream):
            stream.stream.passed_over = (OSError, ValueError)


def progress_bar(*columns: Any, **how: Any) -> Any:
    """Rich's bar on the terminal, disabled where there is none. What is printed meanwhile stands above it, escaped."""
    from rich.console import Console
    from rich.progress import Progress

    class Bar(Progress):
        def start(self) -> None:
            super().start()
            if not self.disable:
                # Again: Rich has put streams of its own in front of those, which end at the terminal.
                escape_streams()

    # Past the stream that would escape Rich's codes too. Brackets in what is printed are no markup.
    terminal = sys.stdout.stream if isinstance(sys.stdout, PlainStream) else sys.stdout
    screen = Console(file=terminal, markup=False)
    return Bar(*columns, console=screen, disable=not screen.is_terminal, **how)
