"""A kernel with all that TritonKernel passes on: boxes, a tensor, a number. It copies a [BOX_ROWS, 64] box a program."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from moe.runtime.gluon_names_device import load_box, store_box


@gluon.jit(do_not_specialize=["value"])
def copy_boxes_kernel(source_desc, target_desc, written_ptr, value, BOX_ROWS: gl.constexpr):
    box = gl.allocate_shared_memory(gl.bfloat16, [BOX_ROWS, 64], source_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.expect(ready, source_desc.block_type.nbytes)
    row = gl.program_id(0) * BOX_ROWS
    load_box(source_desc, [row, 0], ready, box)
    mbarrier.wait(ready, 0)
    mbarrier.invalidate(ready)
    store_box(target_desc, [row, 0], box)
    tma.store_wait(pendings=0)
    gl.store(written_ptr + gl.program_id(0), value)
