"""Verifying kernels with or without a GPU."""
