"""The layer over many GPUs: exchanges over torch.distributed around the one-GPU pipeline. `import moe.parallel`."""

from moe.parallel.flow import Combine, Dispatch, Dispatched, Exchange, WayBack
from moe.parallel.layer import ParallelLayer, build_layer, count_load
from moe.parallel.overlap import InHalves, WithSharedExpert
from moe.parallel.placement import Placement, even_placement
from moe.parallel.rebalance import (
    Rebalanced,
    WeightMove,
    balanced_placement,
    move_weights,
    rebalance,
    rebalance_together,
)
from moe.parallel.transport import Transport, transport_of

__all__ = [
    "Combine",
    "Dispatch",
    "Dispatched",
    "Exchange",
    "InHalves",
    "ParallelLayer",
    "Placement",
    "Rebalanced",
    "Transport",
    "WayBack",
    "WeightMove",
    "WithSharedExpert",
    "balanced_placement",
    "build_layer",
    "count_load",
    "even_placement",
    "move_weights",
    "rebalance",
    "rebalance_together",
    "transport_of",
]
