"""The package's only exception: invalid input, described so that the user can correct it."""


class RedrafterError(ValueError):
    """Input that cannot be used. The message is one complete sentence: what is wrong, where, and what to do."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def reason(error: Exception) -> str:
    """`first_line` without the final full stop, for use inside a sentence."""
    return first_line(error).rstrip(".")
