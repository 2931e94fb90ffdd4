"""Mistakes that the user can mend, and the checks that find them."""

import contextlib
import difflib
import typing
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the key or file and the remedy."""


class StorageError(RuntimeError):
    """Results cannot be written, for want of room: one line that names the path, what is needed and what is free."""


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def one_line(message: object) -> str:
    """Returns a text, or the message of an error, without line breaks."""
    return " ".join(str(message).split())


def out_of_memory(error: BaseException) -> bool:
    """Tells whether an error means that memory ran out, of a device or of the machine."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def some(names: typing.Sequence[str]) -> str:
    """Lists the first five names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Returns the closing phrase of an error about an unknown name: the nearest known one, or else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


@contextlib.contextmanager
def saying(flag: str, *, instead_of: str) -> Iterator[None]:
    """Replaces the flag `instead_of` by `flag`, by which the user gave the path, in a UserError of its block."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"{instead_of} ", f"{flag} ")) from None
