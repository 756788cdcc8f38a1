"""Run by test_nf4.py: the Triton kernel in Triton's interpreter, which must be chosen before the import."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from workloads.training.nf4 import NF4Stack

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((96, 128), (40, 40), (1, 16), (3, 96, 64)):
        weight = torch.randn(shape) * torch.rand(shape[0]).view(-1, *[1] * (len(shape) - 1))
        packed, state = quantize_4bit(
            weight.to(dtype), blocksize=64, compress_statistics=True, quant_type="nf4"
        )  # fmt: skip
        undone = NF4Stack(state, "triton")(packed.view(-1))
        print("equal" if torch.equal(undone, dequantize_4bit(packed, state).view(shape)) else "different")
