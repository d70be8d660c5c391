"""The three products, whichever library the static table picks on this or another CPU."""

import pytest
import torch
from cases import NARROW, UNLIMITED, Problem, Shape
from test_logprobs import check
from tolerances import assert_within

from windkern.kernels import buffers, gemm

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(params=["mkl", pytest.param("onednn", marks=needs_onednn), pytest.param("zen4", marks=needs_onednn)])
def library(request, monkeypatch):
    monkeypatch.setattr(gemm, "_ONEDNN", request.param != "mkl")
    monkeypatch.setattr(gemm, "_ONEDNN_WEIGHT_GRAD", request.param == "onednn")
    monkeypatch.setattr(gemm, "_SMALL_PRODUCT", 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products(library, dtype):
    products = gemm.Gemm("cpu", dtype)
    hidden, weight, dz = torch.randn(37, 24), torch.randn(65, 24), torch.randn(37, 65)
    hidden, weight, dz = (value.to(dtype) for value in (hidden, weight, dz))
    exact = [value.double() for value in (hidden, weight, dz)]

    def close(result, wanted, plain, name):
        assert_within(result, wanted, plain, dtype, name)

    z = products.logits(products.logit_operand(hidden), products.logit_operand(weight), None)
    assert z.dtype == products.acc
    close(z, exact[0] @ exact[1].T, exact[0] @ exact[1].T, "logits")
    twice = products.logits(products.logit_operand(hidden), products.logit_operand(weight), None, add_to=z.clone())
    close(twice, 2 * exact[0] @ exact[1].T, exact[0] @ exact[1].T * 2, "logits of two blocks")
    total = torch.ones(37, 24, dtype=products.acc)
    total = products.hidden_grad(products.grad_operand(dz), products.grad_operand(weight), total)
    assert total.dtype == products.acc
    close(total, 1 + exact[2] @ exact[1], 1 + exact[2] @ exact[1], "hidden_grad")
    wanted = exact[2].T @ exact[0]
    operands = products.grad_operand(dz), products.grad_operand(hidden)
    for out_dtype in {dtype, products.acc}:
        out = torch.empty(65, 24, dtype=out_dtype)
        products.weight_grad(*operands, out, accumulate=False, gain=None)
        close(out, wanted, wanted, "weight_grad")
        products.weight_grad(*operands, out, accumulate=True, gain=torch.tensor(0.5))
        close(out, 1.5 * wanted, wanted * 1.5, "weight_grad added with a gain")


@pytest.mark.parametrize("gear", ["frozen_head", "trained"])
@pytest.mark.parametrize("backend_name", ["torch"])
def test_gears(library, gear, backend_name):
    problem = Problem(Shape((3, 11), (24, 5), 1003), "all")
    for budget in (NARROW, UNLIMITED):
        check(problem, torch.float32, gear, memory_budget=budget, backend=backend_name)


def test_flops_are_counted():
    products = gemm.Gemm("cpu", torch.float32)
    with buffers.recording() as record:
        products.logits(torch.randn(5, 3), torch.randn(7, 3), None)
        products.hidden_grad(torch.randn(5, 7), torch.randn(7, 3), torch.zeros(5, 3))
        products.weight_grad(torch.randn(5, 7), torch.randn(5, 3), torch.empty(7, 3), accumulate=False, gain=None)
    assert record.flops == 3 * 2 * 5 * 3 * 7


def test_amd_family_reads_the_first_processor(monkeypatch):
    text = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\n\nprocessor\t: 1\nvendor_id\t: Other\ncpu family\t: 1\n"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for vendor, family, wanted in (("AuthenticAMD", 26, 26), ("GenuineIntel", 6, 0)):
        monkeypatch.setattr(gemm.Path, "exists", lambda path: True)
        monkeypatch.setattr(gemm.Path, "read_text", lambda path, v=vendor, f=family: text.format(v, f))
        assert gemm._amd_family() == wanted


def test_large_buffers_keep_their_values_on_huge_pages():
    large = buffers.on_huge_pages(torch.empty(12 << 20).fill_(3.0))
    assert bool((large == 3.0).all())
    small = torch.ones(4)
    assert buffers.on_huge_pages(small) is small
