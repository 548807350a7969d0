import os

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    import emulation.numba_launch  # noqa: F401
