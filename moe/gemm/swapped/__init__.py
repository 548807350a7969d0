"""Hopper kernels for some tens of rows an expert: rows of the weight are the rows of a wgmma."""
