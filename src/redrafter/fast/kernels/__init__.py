"""Kernels in Triton, each behind a function of `redrafter.fast`; they import triton, so on first use."""
