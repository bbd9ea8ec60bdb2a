"""What is printed, whoever wrote it: text, and never a code that steers the terminal."""

from __future__ import annotations

import ast
import io
import os
import pty
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import train_clip
from tests import forked
from train_clip.errors import BadSample, MissingFile, UsageError, UserError
from train_clip.printing import PlainStream, no_formula, printable

CODES = [
    chr(code)
    for code in range(0x110000)
    if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp") and code not in (0x200C, 0x200D)
]
# Clears the screen, sets its title, colors; the same by one sign of C1; right to left; begins the line again; rings.
HOSTILE = "\x1b[2J \x1b]0;title\x07 \x1b[31m \x9b2J \u202egnp.exe \u2066 \r \x85 \u2028 \udcff \ud800 \x7f"


def codes(text: str, but: str = "") -> set[str]:
    """What of a text could steer a terminal."""
    return set(text) & set(CODES) - set(but)


@given(st.text(st.characters() | st.sampled_from(CODES)), st.sampled_from(["", "\n\t"]))
@example(HOSTILE, "")
def test_any_text(text: str, kept: str) -> None:
    """No code is left, all else is as it was and in its order, the result is UTF-8 and stays the same the next time."""
    shown = printable(text, kept)
    assert not codes(shown, kept)
    assert printable(shown, kept) == shown
    shown.encode()
    rest = iter(shown)
    assert all(letter in rest for letter in text if letter not in CODES or letter in kept)


def test_each_code_is_told_from_the_others() -> None:
    """Every code has an escape of its own, as Python writes it; a byte of a name that is no UTF-8 by its value."""
    # But for bytes that are written as U+0080 to U+009F and U+00AD are.
    assert len({printable(code) for code in CODES}) == len(CODES) - 33
    assert printable("\x1b[2J\x9b\u202e\n\udce4") == r"\x1b[2J\x9b\u202e\n\xe4"
    assert (
        printable("ein Bär 猫 🐈 👩\u200d🔬 می\u200cشود\u00a0\u3000")
        == "ein Bär 猫 🐈 👩\u200d🔬 می\u200cشود\u00a0\u3000"
    )


@given(st.lists(st.text(st.characters() | st.sampled_from(CODES))))
@example([HOSTILE, "\r"])
def test_a_stream(texts: list[str]) -> None:
    """By whichever way text comes to a stream, no code passes; line breaks and tabs do, and so do brackets."""
    inner = io.StringIO()
    stream = PlainStream(inner)
    print(*texts, file=stream, sep="|")
    stream.writelines(texts)
    assert stream.write("x[/b]") == 5
    assert not stream.isatty()
    assert inner.getvalue() == printable("|".join(texts) + "\n" + "".join(texts) + "x[/b]", "\n\t")


@pytest.mark.parametrize("kind", [UserError, UsageError, MissingFile])
def test_an_error(kind: type[UserError]) -> None:
    """Its message, from Python too, keeps its lines and none of what a name holds."""
    assert str(kind(f"a{HOSTILE}\n\tb")) == printable(f"a{HOSTILE}\n\tb", "\n\t")
    assert not codes(str(kind(HOSTILE)))
    assert str(BadSample("a\nb", "c")) == r"a\nb: c"


PROGRAM = """
import logging, sys, warnings
from train_clip import cli, printing
from train_clip.errors import UserError

def verb():
    print(HOSTILE)
    print(HOSTILE, file=sys.stderr)
    sys.stdout.writelines([HOSTILE])
    warnings.warn(HOSTILE)
    logging.warning(HOSTILE)
    with printing.progress_bar("{task.description}") as bar:
        task = bar.add_task("going", total=2)
        for _ in range(2):
            print("a name [/b] " + HOSTILE)
            print("half a line [/b] " + HOSTILE, end="", flush=True)
            print(HOSTILE, file=sys.stderr)
            warnings.warn("again" + HOSTILE)
            bar.update(task, advance=1)
    raise RAISED(HOSTILE)

cli.VERBS["models"] = ("__main__:verb", "")
cli.main(["models"])
"""


def run_on(terminal: bool, raised: str) -> str:
    """What the program prints on a terminal, or on a pipe."""
    program = PROGRAM.replace("HOSTILE", ascii(HOSTILE)).replace("RAISED", raised)
    reader, writer = pty.openpty() if terminal else os.pipe()
    process = forked.start(["-c", program], stdout=writer, stderr=writer, env={**os.environ, "TERM": "xterm"})
    os.close(writer)
    read = b""
    while True:
        try:
            part = os.read(reader, 1 << 16)
        except OSError:  # a terminal that nobody writes to any more
            part = b""
        if not part:
            break
        read += part
    os.close(reader)
    assert process.wait(60) == 1
    return read.decode()


@pytest.mark.parametrize("raised", ["UserError", "RuntimeError", "SystemExit"])
def test_a_process_on_a_pipe(raised: str) -> None:
    """Prints, warnings, logs, what a bar would stand below, messages and tracebacks: lines of text, nothing else."""
    text = run_on(False, raised)
    assert not codes(text, "\n\t")
    assert text.count(r"\x1b[2J") >= 9


@pytest.mark.parametrize("raised", ["UserError", "RuntimeError"])
def test_a_process_on_a_terminal(raised: str) -> None:
    """There the bar is drawn by Rich's own codes; of the names none passes, while it stands there or otherwise."""
    text = run_on(True, raised)
    assert "\x1b[?25l" in text  # the bar hides the cursor
    for code in ("\x1b[2J", "\x1b]", "\x1b[31m", *"\x07\x9b\u202e\u2066\x85\u2028\x7f"):
        assert code not in text, ascii(code)
    assert text.count("a name [/b]") == 2


def test_nothing_goes_past_the_streams() -> None:
    """The package prints by ``print``, warnings, logs and exits; past these two modules no stream is opened, and no
    table or bar of Rich's is made that takes names for markup.
    """  # noqa: D205
    root = Path(train_clip.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            words = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
            name = file.relative_to(root).as_posix()
            if name != "printing.py":
                assert not words.startswith(("sys.__std", "sys.stdout.buffer", "sys.stderr.buffer", "sys.stdout.write"))
                assert not words.startswith("os.write(") or (name, words[:11]) == ("training/signals.py", "os.write(2,")
            if "Console(" in words and isinstance(node, ast.Call) and words.split("(")[0].endswith("Console"):
                assert "markup=False" in words, name


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@x", "\t=1", "\rx", " =1", "\n=1", "＝1"])
def test_no_cell_is_a_formula(cell: str) -> None:
    """What a spreadsheet would run has a blank, or what was asked for, before it; all else is as it was."""
    assert no_formula(cell) == " " + cell
    assert no_formula(cell, "./") == "./" + cell
    for harmless in ("a=1", "a cat", "'=1", "", "(1)"):
        assert no_formula(harmless) == harmless


def test_streams_are_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands in one process; none where a process has no streams."""
    from train_clip.printing import escape_streams

    inner = io.StringIO()
    monkeypatch.setattr(sys, "stdout", inner)
    monkeypatch.setattr(sys, "stderr", None)
    escape_streams(), escape_streams()
    assert sys.stdout.stream.stream is inner  # type: ignore[attr-defined]
    assert sys.stderr is None
