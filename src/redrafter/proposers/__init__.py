"""Drafting methods.  Every method is a proposer; the rest of the decode step is shared."""

from redrafter.proposers.base import Method, Proposer
from redrafter.proposers.methods import Drafter, method_of
from redrafter.proposers.prompt_lookup import PromptLookup
from redrafter.proposers.two_model import TwoModel

__all__ = ["Drafter", "Method", "PromptLookup", "Proposer", "TwoModel", "method_of"]
