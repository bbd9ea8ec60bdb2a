"""The errors that users see: those that stop with advice, and one for a sample that cannot be read."""

import difflib
import errno
import re
from collections.abc import Iterable

from train_clip.printing import LAYOUT, printable


class UserError(Exception):
    """Stops a command. The message says what was found, what was expected and what to do."""

    def __str__(self) -> str:
        return printable(super().__str__(), LAYOUT)


class UsageError(UserError, ValueError):
    """The command itself is wrong: a verb, an option, a value or a name that does not exist."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that does not exist."""


class WrongType(UserError, TypeError):
    """An argument of another type than expected."""


class BadSample(Exception):
    """One image or caption that cannot be used. The data set counts it by reason and replaces it."""

    def __init__(self, path: str, reason: str) -> None:
        Exception.__init__(self, path, reason)  # not OSError's, which takes them for a number and its text
        self.path = path
        self.reason = reason  # in a few words that are the same for every file with the same fault

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.reason}")


class MissingSample(BadSample, FileNotFoundError):
    """An image that does not exist."""


def did_you_mean(word: str, known: Iterable[str], before: str = "") -> str:
    """Name what a mistyped word is closest to, as a sentence to append; empty where nothing is close."""
    close = difflib.get_close_matches(word.lower(), names := {name.lower(): name for name in known}, n=2)
    return f" Did you mean {' or '.join(before + names[name] for name in close)}?" if close else ""


def first_line(error: BaseException) -> str:
    """Give the first line of what a library said, without its full stop, to be quoted in a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")


# Errors of the system that a user can put right, by their names, and what is expected.
OF_SYSTEM = {
    "ENOSPC EDQUOT": "room for what is written; free some. A run goes on from its newest checkpoint by --resume",
    "ENOENT EACCES EEXIST EPERM EISDIR ENOTDIR ENAMETOOLONG EROFS": "a path that can be read or written",
    "EMFILE ENFILE EAGAIN": "fewer loader processes (--num_workers), or higher limits (ulimit -n, -u)",
}
# What libraries say where a process is gone, and what it means.
OF_PROCESSES = {
    r"DataLoader worker \(pid ([\d, ]+)\) is killed by signal: Bus error": "Loader process {} was killed for lack of "
    "shared memory. Enlarge /dev/shm (docker run --shm-size=8g), or use fewer --num_workers or a smaller --batch_size.",
    r"DataLoader worker \(pid ([\d, ]+)\) is killed by signal: ([\w ]+)": "Loader process {} was killed by a signal "
    "({}), most likely for lack of memory (dmesg tells). Use fewer --num_workers or a smaller --batch_size.",
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) exited unexpectedly": "Loader process {} ended unexpectedly. Use "
    "--num_workers 0 to see why, or fewer if memory ran out.",
    "Connection (?:closed|reset) by peer|Broken pipe|ncclRemoteError|NCCL": "Another process of the run has ended.",
}


def in_a_line(error: BaseException) -> str:
    """What to say of an error of the system or a library; empty where nothing of it is known."""
    name = errno.errorcode.get(getattr(error, "errno", None) or 0)
    expected = next((text for names, text in OF_SYSTEM.items() if name in names.split()), None)
    if not isinstance(error, OSError) or expected is None:
        return of_process(error)
    what = error.filename or ("a process" if name == "EAGAIN" else "a file")
    return f"{what}: {error.strerror}. Expected {expected}."


def of_process(error: BaseException) -> str:
    """What an error of a library says of a process that is gone, in a line; empty where it says nothing of one."""
    text = f"{'' if isinstance(error, OSError) else error} {error.__cause__}"  # of a download, for instance
    found = ((re.search(pattern, text), line) for pattern, line in OF_PROCESSES.items())
    return next((line.format(*match.groups()) for match, line in found if match), "")


def with_notes(line: str, error: BaseException) -> str:
    """A line about an error, and what was noted with it."""
    return "\n".join([line, *getattr(error, "__notes__", [])])


def root_cause(error: BaseException) -> str:
    """The first line of the error that lies deepest, which for a full disk is the system's."""
    while error.__context__ is not None:
        error = error.__context__
    text = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {text}".splitlines()[0][:200]
