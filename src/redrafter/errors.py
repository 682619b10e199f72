"""The one exception of the package: bad input, said in a sentence that a user can act on."""


class RedrafterError(ValueError):
    """Something the user gave cannot be honoured; the message is one complete sentence."""


def first_line(error: Exception) -> str:
    """What an error says first, or else its name."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def reason(error: Exception) -> str:
    """The same as a part of a sentence: without a full stop."""
    return first_line(error).rstrip(".")
