"""Limits of GPUs that are not here, by compute capability times ten."""

SHARED_LIMIT_OF_ARCH = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may ask for
