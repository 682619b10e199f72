"""Tensor types that all layers share: trees, caches, rows, noise and draft shapes."""
