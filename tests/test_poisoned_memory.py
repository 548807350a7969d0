"""The fixture that other tests rely on to see reads of memory that nobody wrote."""

import torch


def test_every_way_that_the_package_allocates_is_poisoned(poisoned_memory):
    like = torch.zeros(3)
    for floats in (torch.empty(3), torch.empty_like(like), like.new_empty(3)):
        assert floats.isnan().all()
    assert (like.new_empty((2, 2), dtype=torch.int32) > 1 << 29).all()
    assert (torch.empty(2, dtype=torch.int32) > 1 << 29).all()
