"""What both families of Hopper GEMMs take."""

from moe.gemm.config import FLASHINFER, WeightFormat, WeightLayout

FORMATS = [
    WeightFormat(),
    FLASHINFER,
    WeightFormat(gate_up_order="up_gate"),
    WeightFormat(is_shuffled=True),
    WeightFormat(layout=WeightLayout.BlockMajorK),
    WeightFormat(layout=WeightLayout.MajorMn),
    *(WeightFormat(layout=layout, gate_up_order="interleaved") for layout in WeightLayout),
]
FORMAT_DIMS = [(256, 128), (128, 320), (1024, 768), (4160, 256)]
AWKWARD_DIMS = [(72, 8), (200, 104), (264, 136), (136, 520)]  # not BlockMajorK, not shuffled
AWKWARD_FORMATS = (WeightFormat(), WeightFormat(layout=WeightLayout.MajorMn, gate_up_order="interleaved"))
BIAS_DIMS = [(256, 192)]
LOADS = {
    "edges_of_tiles": [1, 63, 64, 65, 0, 127, 128, 129, 193],
    "edges_of_branches": [15, 16, 17, 31, 32, 33, 0, 95, 96, 97, 159, 160, 161, 319, 320, 321],
    "one_expert_takes_all": [0, 0, 3001, 0],
    "several_tiles": [700, 333, 0, 1290, 5],
    "nobody": [0, 0],
}
OPTIONS = {"dynamic": {"is_dynamic": True}, "static": {"is_dynamic": False}}
