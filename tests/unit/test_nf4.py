"""NF4 layers: bit for bit bitsandbytes' weights, gradients by the input alone, nothing kept but the packed bytes."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from workbench.errors import Failure
from workloads.training import nf4
from workloads.training.adapters import add_adapter, load_base, save_adapter
from workloads.training.config import AdapterConfig
from workloads.training.fsdp import full_state
from workloads.training.nf4 import NF4Linear, NF4Stack, kernel_for, packed_bytes

CPU = torch.device("cpu")
SHAPES = [(96, 128), (40, 40), (1, 16), (3, 64, 48), (600, 256)]
"""Whole blocks of 64, a rest, less than one block, a stack of experts, more than one block of scales."""


def quantized(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Any]:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[0]).view(-1, *[1] * (len(shape) - 1))
    return quantize_4bit(weight.to(dtype), blocksize=64, compress_statistics=True, quant_type="nf4")


def linear4bit(bias: bool = True) -> Any:
    torch.manual_seed(0)
    plain = nn.Linear(128, 96, bias=bias)
    layer = Linear4bit(128, 96, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("kernel", ["torch", "bitsandbytes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_kernel_undoes_nf4_as_bitsandbytes_does(shape: tuple[int, ...], dtype: torch.dtype, kernel: str) -> None:
    packed, state = quantized(shape, dtype)
    undone = NF4Stack(state, kernel)(packed.view(-1))
    assert undone.dtype == dtype
    # bitsandbytes' kernel for AVX-512 takes the scale of another block where rows are no multiple of 64: as one row
    state.shape = torch.Size([1, math.prod(shape)])
    assert torch.equal(undone, dequantize_4bit(packed, state).view(shape))


def test_the_triton_kernel_undoes_nf4_as_bitsandbytes_does() -> None:
    """In a process of its own: Triton reads ``TRITON_INTERPRET`` when it is imported."""
    pytest.importorskip("triton")
    script = Path(__file__).parents[1] / "nf4_interpreted.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal"] * 12


@pytest.mark.parametrize("capability", [90, 120])
def test_the_triton_kernel_compiles_for_cards_without_a_fused_multiply_add(capability: int) -> None:
    """What bitsandbytes rounds twice, a fused one would round once. Triton needs no card to compile."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from workloads.training.nf4_kernel import ROWS, _undo

    kinds = ["*u8", "*u8", "*fp32", "*fp32", "*bf16", "i32", "i32", "i32", "constexpr", "constexpr"]
    source = ASTSource(
        _undo, dict(zip(_undo.arg_names, kinds, strict=True)), {"ROWS": ROWS, "ROUND": False},
        {(place,): [["tt.divisibility", 16]] for place in range(8)},
    )  # fmt: skip
    target = GPUTarget("cuda", capability, 32)
    code = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
    assert "st.global.v4.b32" in code
    assert "fma.rn.f32" not in code


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs where there is a card")
def test_the_benchmark_refuses_without_a_card(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import benchmarks.nf4_kernel

    monkeypatch.setattr(sys, "argv", ["nf4_kernel"])
    assert benchmarks.nf4_kernel.main() == 2
    assert "no CUDA card" in capsys.readouterr().err


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", ["torch", "bitsandbytes"])
def test_a_layer_and_its_gradient_are_those_of_bitsandbytes(kernel: str, bias: bool) -> None:
    theirs = linear4bit(bias)
    ours = NF4Linear(theirs, kernel)
    x_BTI = torch.randn(2, 7, 128, requires_grad=True)
    grad_BTO = torch.randn(2, 7, 96)
    expected, got = theirs(x_BTI), ours(x_BTI)
    assert torch.equal(got, expected)
    assert torch.equal(*(torch.autograd.grad(y, x_BTI, grad_BTO)[0] for y in (got, expected)))


def test_between_forward_and_backward_nothing_is_kept_but_the_packed_bytes() -> None:
    layer, kept = NF4Linear(linear4bit(), "torch"), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(4, 128, requires_grad=True))
    held = {parameter.data_ptr() for parameter in layer.parameters()} | {layer.tables.data_ptr()}
    assert {tensor.data_ptr() for tensor in kept} <= held


def test_a_layer_compiles_into_one_graph_with_the_same_gradient() -> None:
    layer = NF4Linear(linear4bit(), "torch")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (3, 5):
        x_BI = torch.randn(length, 128, requires_grad=True)
        assert torch.equal(compiled(x_BI), layer(x_BI))
        assert torch.equal(*(torch.autograd.grad(each(x_BI).sum(), x_BI)[0] for each in (compiled, layer)))


def test_the_operators_are_registered_as_torch_wants_them() -> None:
    layer = NF4Linear(linear4bit(), "torch")
    bytes_ = (layer.weight, layer.absmax, layer.nested_absmax, layer.tables)
    x_BI = torch.randn(4, 128, requires_grad=True)
    torch.library.opcheck(torch.ops.workbench.nf4_linear.default, (x_BI, *bytes_, layer.bias, layer.shape, "torch"))
    torch.library.opcheck(torch.ops.workbench.nf4_undo.default, (*bytes_, layer.shape, torch.float16, "torch"))


def test_a_cast_of_the_model_leaves_the_packed_bytes_alone() -> None:
    layer = NF4Linear(linear4bit(bias=False), "torch")
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    layer.to(torch.bfloat16)
    assert all(torch.equal(parameter, before[name]) for name, parameter in layer.named_parameters())


def test_a_weight_takes_the_bytes_that_were_told_beforehand() -> None:
    layer = NF4Linear(linear4bit(bias=False), "torch")
    assert sum(parameter.nbytes for parameter in layer.parameters()) == packed_bytes(96 * 128)


def test_a_layer_of_gpt2_is_quantised_as_the_linear_layer_that_it_is() -> None:
    from transformers.pytorch_utils import Conv1D

    plain = nn.Linear(64, 192)
    layer = Conv1D(192, 64)
    layer.weight.data, layer.bias.data = plain.weight.data.T.contiguous(), plain.bias.data
    ours, theirs = (nf4.quantized(each, torch.float32, "torch") for each in (layer, plain))
    assert (ours.in_features, ours.out_features, ours.shape) == (64, 192, [192, 64])
    x = torch.randn(3, 64)
    assert torch.equal(ours(x), theirs(x))


def test_another_format_than_nf4_with_double_quantisation_is_refused() -> None:
    _, state = quantize_4bit(torch.randn(64, 64), blocksize=64, compress_statistics=False, quant_type="nf4")
    with pytest.raises(Failure, match="double quantisation"):
        NF4Stack(state, "torch")


def test_the_kernel_is_chosen_by_the_device() -> None:
    assert kernel_for("auto", CPU) == "bitsandbytes"
    assert kernel_for("auto", torch.device("mps")) == "torch"
    assert kernel_for("torch", CPU) == "torch"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_a_base_has_the_logits_of_bitsandbytes_and_no_layer_of_its(base: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    ours = load_base(base, "float32", "nf4", CPU)
    ids_BT = torch.arange(1, 20)[None]
    assert torch.equal(ours(ids_BT).logits, theirs(ids_BT).logits)
    assert not any(isinstance(module, Linear4bit) for module in ours.modules())
    assert sum(isinstance(module, NF4Linear) for module in ours.modules()) == 14


@pytest.mark.parametrize("targets", ["all-linear", "q_proj", ["q_proj", "down_proj"]])
def test_a_saved_adapter_gives_the_same_logits_again(base: str, tmp_path: Path, targets: Any) -> None:
    from peft import PeftModel

    model = add_adapter(load_base(base, "float32", "nf4", CPU), AdapterConfig(rank=4, targets=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    save_adapter(model, full_state(model), tmp_path)
    again = PeftModel.from_pretrained(load_base(base, "float32", "nf4", CPU), str(tmp_path))
    ids_BT = torch.arange(1, 20)[None]
    assert torch.equal(again.eval()(ids_BT).logits, model.eval()(ids_BT).logits)


def test_answers_are_generated_and_the_bytes_stay_what_they_were(base: str) -> None:
    model = add_adapter(load_base(base, "bfloat16", "nf4", CPU), AdapterConfig(rank=4)).eval()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert model.generate(input_ids=torch.arange(1, 9)[None], max_new_tokens=4, do_sample=False).shape[1] > 8
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())
