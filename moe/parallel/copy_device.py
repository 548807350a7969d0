"""Which rank computes a slot: the hash of `moe.parallel.reference.token_hash` in a kernel's words."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def mix_word(word):
    """Every bit of a uint32 over all bits of another."""
    word = (word ^ (word >> 16)) * tl.full([], 0x85EBCA6B, tl.uint32)
    word = (word ^ (word >> 13)) * tl.full([], 0xC2B2AE35, tl.uint32)
    return word ^ (word >> 16)


@triton.jit
def token_word(token, source_rank, layer):
    """uint32 of a token, the same on every rank."""
    # Added to a tensor: Triton makes a constant, which has no type to change, of an argument that is 1.
    none = tl.zeros_like(token)
    place = (none + source_rank + 1).to(tl.uint32) * tl.full([], 0x165667B1, tl.uint32)
    place += (none + layer + 1).to(tl.uint32) * tl.full([], 0x27D4EB2F, tl.uint32)
    return mix_word(token.to(tl.uint32) * tl.full([], 0x9E3779B1, tl.uint32) + mix_word(place))


@triton.jit
def rank_of_expert(expert, word, num_copies_ptr, rank_of_copy_ptr, NUM_EXPERTS: tl.constexpr, MAX_COPIES: tl.constexpr):
    """The rank whose copy of `expert` a token with that word takes; -1 where the id is no expert's."""
    is_used = (expert >= 0) & (expert < NUM_EXPERTS)
    copy = tl.zeros_like(expert)
    if MAX_COPIES > 1:
        num_copies = tl.load(num_copies_ptr + expert, mask=is_used, other=1)
        copy = (word % num_copies.to(tl.uint32)).to(tl.int32)
    return tl.load(rank_of_copy_ptr + expert * MAX_COPIES + copy, mask=is_used, other=-1)
