"""Gluon's names that changed between Triton 3.6 and 3.9, under one name each, for kernels to call.

Aliases, as a jitted function around a name would not compile where the release lacks it.
"""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

# async_copy_global_to_shared and async_copy_shared_to_global up to 3.7; in 3.8 these or the new ones; the new ones in 3.9.
_is_renamed = hasattr(tma, "async_load")
copy_elements = async_copy.async_load if _is_renamed else async_copy.async_copy_global_to_shared
load_box = tma.async_load if _is_renamed else tma.async_copy_global_to_shared
store_box = tma.async_store if _is_renamed else tma.async_copy_shared_to_global

# reinterpret(memory, dtype, shape, layout): the same shared memory in another shape. A method with an underscore up to 3.8.
_Memory = gl.shared_memory_descriptor
reinterpret = _Memory.reinterpret if hasattr(_Memory, "reinterpret") else _Memory._reinterpret
