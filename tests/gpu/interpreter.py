"""Repairs Triton's interpreter (3.6 to 3.8), so that it computes what a GPU would, and sooner.

Its bfloat16 is uint16 to NumPy: `tl.dot` multiplies the bit patterns, and a cast from float32 cuts
the low half off instead of rounding to the nearest. And it patches `triton.language` again for each
call of a device function: nearly half of its time in kernels made of small functions. A third of
the rest goes into building the same few types and shapes for every value.
"""

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def repair() -> None:
    """Replace the interpreter's cast and dot where bfloat16 is involved. Once a process."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (cast_impl(self, t, tl.float32) if t.dtype == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, src, dst_type):
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            data = (src.data.astype(np.uint32) << 16).view(np.float32)
        elif kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            data = rounded.view(torch.int16).numpy().view(np.uint16)
        else:
            return cast(self, src, dst_type)
        return interpreter.TensorHandle(data, dst_type.scalar)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn):
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch(fn)  # and never undone: the scope that would undo it is dropped
            # 3.6 writes int(array), which NumPy 2.5 refuses for one-dimensional arrays.
            tl.tensor.__index__ = lambda self: int(self.handle.data.item())
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
    _remember_types()
    # Overflow checks of every integer sum, whose answers it drops: a third of the time.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )


def _remember_types() -> None:
    """Build each block type, shape and NumPy dtype once: a value's shape is read, never changed."""
    block, tensor = tl.block_type.__init__, tl.tensor.__init__
    blocks: dict[tuple, dict] = {}
    shapes: dict[tuple, tuple] = {}

    def block_init(self, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def tensor_init(self, handle, type):
        key = type.shape if type.is_block() else ()
        if key not in shapes:
            tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    tl.block_type.__init__, tl.tensor.__init__ = block_init, tensor_init
    numpy_dtype, dtypes = interpreter._get_np_dtype, {}

    def get_np_dtype(tt_dtype):
        if tt_dtype.name not in dtypes:
            dtypes[tt_dtype.name] = numpy_dtype(tt_dtype)
        return dtypes[tt_dtype.name]

    interpreter._get_np_dtype = get_np_dtype
