"""The one exception of the package: bad input, said in a sentence that a user can act on."""


class RedrafterError(ValueError):
    """Something the user gave cannot be honoured; the message is one complete sentence."""
