"""What goes wrong when a file is read → the reason, in the same words for every kind of file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from train_clip.errors import BadSample


@contextmanager
def reading(path: str, what: str) -> Iterator[None]:
    """Turn whatever is raised within the block into ``BadSample``.

    Args:
        path: the file that is read there.
        what: it holds, for the reason.

    Raises:
        BadSample: anything was raised.
    """
    try:
        yield
    except BadSample:
        raise
    except FileNotFoundError:
        raise BadSample(path, "file is gone") from None
    except PermissionError:
        raise BadSample(path, "no permission to read the file") from None
    except MemoryError:
        raise BadSample(path, "too large for memory") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise BadSample(path, f"{what} cannot be read ({type(error).__name__})") from error
        # Decoders raise whatever their format's parser does (OSError, SyntaxError, struct.error, …).
        raise BadSample(path, f"damaged {what} ({type(error).__name__})") from error
