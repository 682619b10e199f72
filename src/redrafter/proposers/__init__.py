"""Ways to draft: every method is a proposer, and the rest of the decode step is shared."""

from redrafter.proposers.base import Proposer
from redrafter.proposers.recurrent import RecurrentProposer

__all__ = ["Proposer", "RecurrentProposer"]
