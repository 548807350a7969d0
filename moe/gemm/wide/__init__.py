"""Hopper kernels for many rows an expert: rows of tokens are the rows of a wgmma."""
