"""Ways to draft: every method is a proposer, and the rest of the decode step is shared."""

from redrafter.proposers.base import Memoryless, Method, Proposer
from redrafter.proposers.medusa import MedusaProposer
from redrafter.proposers.prompt_lookup import PromptLookup
from redrafter.proposers.recurrent import RecurrentProposer
from redrafter.proposers.two_model import TwoModel

__all__ = ["MedusaProposer", "Memoryless", "Method", "PromptLookup", "Proposer", "RecurrentProposer", "TwoModel"]
