"""Stages 3 and 4: grouped GEMMs over expert weights. `dispatch` chooses among the kernels; `few_tokens`; `reference`."""
