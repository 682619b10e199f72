"""Requests, the scheduler that runs them, and what makes a step fast."""
