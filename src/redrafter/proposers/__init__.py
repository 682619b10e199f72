"""Ways to draft: every method is a proposer, and the rest of the decode step is shared."""

from redrafter.proposers.base import Memoryless, Method, Proposer
from redrafter.proposers.recurrent import RecurrentProposer

__all__ = ["Memoryless", "Method", "Proposer", "RecurrentProposer"]
