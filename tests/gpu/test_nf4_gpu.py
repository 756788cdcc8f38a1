"""The Triton kernel for NF4 on a card: bitsandbytes' bits, and gradients under compile. Skipped where there is none."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA card", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1024, 4096), (96, 128), (40, 40), (1, 16), (8, 128, 512)])
def test_the_kernel_undoes_nf4_as_bitsandbytes_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from workloads.training.nf4 import NF4Stack

    weight = torch.randn(shape, device="cuda", dtype=dtype)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    expected = dequantize_4bit(packed, state).view(shape)
    for kernel in ("triton", "bitsandbytes", "torch"):
        assert torch.equal(NF4Stack(state, kernel)(packed.view(-1)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_compiled_layer_has_the_output_and_gradient_of_bitsandbytes(dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from workloads.training.nf4 import NF4Linear, kernel_for

    device = torch.device("cuda")
    theirs = Linear4bit(4096, 1024, bias=False, compute_dtype=dtype, quant_type="nf4").to(dtype).to(device)
    layer = torch.compile(NF4Linear(theirs, kernel_for("auto", device)), fullgraph=True, dynamic=True)
    weight = dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    for length in (64, 192):
        x_BI = torch.randn(length, 4096, device=device, dtype=dtype, requires_grad=True)
        grad_BO = torch.randn(length, 1024, device=device, dtype=dtype)
        y_BO = layer(x_BI)
        assert torch.equal(y_BO, x_BI @ weight.T)
        assert torch.equal(torch.autograd.grad(y_BO, x_BI, grad_BO)[0], grad_BO @ weight)
