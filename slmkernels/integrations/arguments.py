"""What the integrations share: refusing what cannot be served, and errors in the caller's library's words."""

from collections.abc import Callable

from ..dispatch import Unsupported
from ..validation import check_flag, fail


def refuse_unless_none(name: str, value, reason: str) -> None:
    """`Unsupported` if the argument is given at all."""
    if value is not None:
        fail(name, value, f"None: {reason}", Unsupported)


def refuse_if_set(name: str, value, reason: str) -> None:
    """`Unsupported` if the flag is True."""
    if check_flag(name, value):
        fail(name, value, f"False: {reason}", Unsupported)


def call_renamed(operation: Callable, names: dict[str, str], *args, **kwargs):
    """Call one of our operations; its errors name the arguments as the caller's library does.

    `names` maps our names to theirs. Every message of ours begins with the argument's name.
    """
    try:
        return operation(*args, **kwargs)
    except (TypeError, ValueError) as error:
        ours, space, rest = str(error).partition(" ")
        if ours not in names:
            raise
        raise type(error)(names[ours] + space + rest) from error
