"""Stages 3 and 4: grouped GEMMs over expert weights. A family of kernels is a folder; `kernels` chooses among them; `reference`."""
