"""The two errors that users see: one that stops with advice, and one for a sample that cannot be read."""


class UserError(Exception):
    """Stops a command. The message says what was found, what was expected and what to do."""


class BadSample(Exception):
    """One image or caption that cannot be used. The data set counts it by reason and replaces it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason  # in a few words that are the same for every file with the same fault

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def first_line(error: BaseException) -> str:
    """Give the first line of what a library said, without its full stop, to be quoted in a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")


def root_cause(error: BaseException) -> str:
    """The first line of the error that lies deepest, which for a full disk is the system's."""
    while error.__context__ is not None:
        error = error.__context__
    text = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {text}".splitlines()[0][:200]
