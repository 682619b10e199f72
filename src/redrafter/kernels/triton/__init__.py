"""Kernels in Triton, each behind a function of `redrafter.kernels`; they import triton, so on first use."""
