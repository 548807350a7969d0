"""Stages 2 and 5: a row for every (token, choice), and the weighted sum of rows. `triton_plan`, `numba_plan`, `finalize`, `reference`."""
