"""Helpers that know nothing about language models: folders, locks, memory, progress, signals."""
