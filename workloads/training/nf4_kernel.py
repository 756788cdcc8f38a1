"""NF4 undone on a card by one Triton launch: both levels of scales and the 4-bit codes.

Without a card it runs in Triton's interpreter (``TRITON_INTERPRET=1`` before this import). See
https://triton-lang.org/main/python-api/triton.html and ``nf4.py`` for the format.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Blocks of 64 weights that one program undoes: each of its 128 threads reads four bytes and, in 16 bits, writes eight
weights at once. Chosen by the machine code, not yet tuned on a card."""


@triton.jit
def _undo(  # type: ignore[no-untyped-def]
    packed, codes, nested, tables, out, blocks, pairs, size, ROWS: tl.constexpr, ROUND: tl.constexpr
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    code_R = tl.load(codes + row_R, row_R < blocks, other=0).to(tl.int32)
    scale_R = tl.load(tables + 16 + code_R) * tl.load(nested + row_R // 256, row_R < blocks, other=0.0)
    scale_R += tl.load(nested + (blocks + 255) // 256)
    byte_RP = row_R[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair_RP = tl.load(packed + byte_RP, byte_RP < pairs, other=0).to(tl.int32)
    even_RP = tl.load(tables + (pair_RP >> 4)) * scale_R[:, None]
    odd_RP = tl.load(tables + (pair_RP & 15)) * scale_R[:, None]
    value_RV = tl.interleave(even_RP, odd_RP)
    if ROUND:
        bits_RV = value_RV.to(tl.int32, bitcast=True)
        value_RV = ((bits_RV + 0x7FFF + ((bits_RV >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    at_RV = row_R[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + at_RV, value_RV.to(out.dtype.element_ty), at_RV < size)


def undo(packed: Tensor, absmax: Tensor, nested_absmax: Tensor, tables: Tensor, out: Tensor) -> Tensor:
    """Fill ``out`` (any shape; float32, float16 or bfloat16) with the weights that the first four hold.

    ``packed`` is uint8 with two weights a byte, ``absmax`` uint8, ``nested_absmax`` float32, ``tables`` float32 [272].
    """
    blocks = triton.cdiv(out.numel(), 64)
    # A card rounds to the nearest bfloat16, the interpreter cuts off: there the kernel rounds by hand.
    by_hand = out.dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    # A fused multiply-add would round once where bitsandbytes rounds twice.
    _undo[(triton.cdiv(blocks, ROWS),)](
        packed, absmax, nested_absmax, tables, out, blocks, packed.numel(), out.numel(),
        ROWS=ROWS, ROUND=by_hand, enable_fp_fusion=False,
    )  # fmt: skip
    return out
