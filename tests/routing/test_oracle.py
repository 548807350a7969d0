"""The oracle itself: where it says that a choice hangs on less than any error."""

import torch
from routing.oracle import select_experts_exactly

from moe.routing.config import RoutingConfig


def margin_of(*logits: float) -> float:
    config = RoutingConfig(num_experts=8, top_k=1, method="DeepSeekV3", n_group=4, topk_group=1)
    return select_experts_exactly(torch.tensor([logits]), None, config).margin


def test_groups_whose_scores_meet_by_coincidence_leave_no_margin():
    # sigmoid(x) + sigmoid(-x) is 1: in float64 for some x, next to it for others.
    assert margin_of(-12 / 7, 12 / 7, -4 / 7, 4 / 7, 4.0, -4.0, -20 / 7, 20 / 7) < 1e-12


def test_groups_of_equal_keys_tie_on_every_machine():
    assert margin_of(1.0, 2.0, 2.0, 1.0, -1.0, -2.0, -3.0, -4.0) > 0.1


def test_a_group_that_leads_does_so_by_its_score():
    assert margin_of(3.0, 2.0, 1.0, 1.0, -1.0, -2.0, -3.0, -4.0) > 0.05
