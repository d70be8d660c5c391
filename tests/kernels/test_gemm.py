"""The three products, with the library that the static table chooses on this or another CPU."""

import pytest
import torch
from cases import GEARS, NARROW, UNLIMITED, Problem, Shape
from test_logprobs import check
from tolerances import assert_within

import windkern as wk
from windkern.kernels import buffers, cpu_libraries, cpu_products, gemm
from windkern.plan import _walk_of

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


BF16_PRODUCTS = () if cpu_products._cpp is None else cpu_products._cpp.bf16_products()


def bf16_product(name: str):
    missing = name not in BF16_PRODUCTS
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"needs {name} and the C++ extension"))


@pytest.fixture(
    params=[
        "mkl",
        pytest.param("onednn", marks=needs_onednn),
        pytest.param("zen4", marks=needs_onednn),
        bf16_product("amx"),
        bf16_product("avx512bf16"),
    ]
)
def library(request, monkeypatch):
    monkeypatch.setattr(cpu_products, "PRODUCT", request.param if request.param in BF16_PRODUCTS else None)
    monkeypatch.setattr(cpu_libraries, "ONEDNN", request.param in ("onednn", "zen4"))
    monkeypatch.setattr(cpu_libraries, "ONEDNN_WEIGHT_GRAD", request.param == "onednn")
    monkeypatch.setattr(gemm, "_SMALL_PRODUCT", 1)
    _walk_of.cache_clear()
    yield
    _walk_of.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products(library, dtype):
    products = gemm.products_of("cpu", dtype)
    hidden, weight, dz = torch.randn(37, 24), torch.randn(65, 24), torch.randn(37, 65)
    hidden, weight, dz = (value.to(dtype) for value in (hidden, weight, dz))
    exact = [value.double() for value in (hidden, weight, dz)]

    def close(result, wanted, plain, name):
        assert_within(result, wanted, plain, dtype, name)

    z = products.logits(products.prepared(hidden), products.prepared(weight), None)
    assert z.dtype == products.acc
    close(z, exact[0] @ exact[1].T, exact[0] @ exact[1].T, "logits")
    twice = products.logits(products.prepared(hidden), products.prepared(weight), None, add_to=z.clone())
    close(twice, 2 * exact[0] @ exact[1].T, exact[0] @ exact[1].T * 2, "logits of two blocks")
    first = torch.full((37, 24), torch.nan, dtype=products.acc)
    first = products.hidden_grad(products.prepared(dz), products.prepared(weight), first, first=True)
    close(first, exact[2] @ exact[1], exact[2] @ exact[1], "hidden_grad of the first columns")
    total = torch.ones(37, 24, dtype=products.acc)
    total = products.hidden_grad(products.prepared(dz), products.prepared(weight), total)
    assert total.dtype == products.acc
    close(total, 1 + exact[2] @ exact[1], 1 + exact[2] @ exact[1], "hidden_grad")
    wanted = exact[2].T @ exact[0]
    operands = products.prepared(dz), products.prepared(hidden)
    for out_dtype in {dtype, products.acc}:
        out = torch.empty(65, 24, dtype=out_dtype)
        products.weight_grad(*operands, out, accumulate=False, gain=None)
        close(out, wanted, wanted, "weight_grad")
        products.weight_grad(*operands, out, accumulate=True, gain=torch.tensor(0.5))
        close(out, 1.5 * wanted, wanted * 1.5, "weight_grad added with a gain")


@pytest.mark.parametrize("gear", ["frozen_head", "frozen_body", "trained"])
@pytest.mark.parametrize("seen", [("logps",), ("logps", "lse")], ids=" ".join)
@pytest.mark.parametrize("rows", [4, 600])
def test_temporaries_of_the_library_are_planned(library, gear, seen, rows):
    """Among them the copy that oneDNN takes of columns of a wider matrix, or of a transposed one."""
    problem = Problem(Shape((rows,), (48,), 9001), "plain", seen=seen)
    scored = int((problem.targets != -100).sum())
    asked = {"hidden_grad": GEARS[gear][0], "weight_grad": GEARS[gear][1], "total_rows": rows, "device": "cpu"}
    for budget in (NARROW, 16_000_000, UNLIMITED):
        plan = wk.plan(scored, 48, 9001, torch.float32, memory_budget=budget, **asked)
        with buffers.recording() as record:
            problem.run(wk.token_logps, torch.float32, gear, memory_budget=budget)
        assert record.peak_bytes <= plan.peak_bytes, (record.by_name, plan)


@pytest.mark.parametrize("gear", ["frozen_head", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gears(library, gear, dtype):
    problem = Problem(Shape((3, 11), (24, 5), 1003), "all")
    for budget in (NARROW, UNLIMITED):
        check(problem, dtype, gear, memory_budget=budget, backend="torch")


@pytest.mark.parametrize("name", [bf16_product("amx"), bf16_product("avx512bf16")])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (7, 65, 3), (50, 130, 33), (49, 64, 1025), (160, 128, 96), (257, 200, 2600), (0, 3, 3), (3, 4, 0)],
)
def test_bfloat16_products_with_float32_sums(monkeypatch, name, shape, threads):
    """All kinds of tails and both layouts of both operands, into a view whose surroundings must not change."""
    monkeypatch.setattr(cpu_products, "PRODUCT", name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows, columns, inner = shape
    left, right, start = torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(rows, columns)
    left, right = left.bfloat16(), right.bfloat16()
    exact = left.double() @ right.double()
    try:
        for a in (left, left.t().contiguous().t()):
            for b in (right, right.t().contiguous().t()):
                for dtype, accumulate in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
                    around = torch.full((rows, columns + 5), torch.nan, dtype=dtype)
                    out = around[:, :columns]
                    if accumulate:
                        out.copy_(start)
                    cpu_products.multiply(a, b, out, accumulate=accumulate)
                    wanted = exact + start.double() if accumulate else exact
                    # A sum of `inner` products of numbers near 1, rounded again when it is stored.
                    bound = 2e-7 * max(1, inner) + torch.finfo(dtype).eps * wanted.abs()
                    assert ((out.double() - wanted).abs() <= bound).all()
                    assert around[:, columns:].isnan().all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", [bf16_product("amx"), bf16_product("avx512bf16")])
def test_a_row_of_a_bfloat16_product_does_not_depend_on_the_other_rows(monkeypatch, name):
    monkeypatch.setattr(cpu_products, "PRODUCT", name)
    left, right = torch.randn(100, 70).bfloat16(), torch.randn(70, 130).bfloat16()
    whole = cpu_products.multiply(left, right, torch.empty(100, 130))
    for rows in (slice(0, 1), slice(5, 12), slice(47, 100)):
        part = left[rows]
        assert torch.equal(cpu_products.multiply(part, right, torch.empty(len(part), 130)), whole[rows])


def test_a_product_that_cannot_add_takes_a_temporary(monkeypatch):
    """In torch 2.8 and 2.9, mm returns float32 for 16-bit operands but addmm does not; the plan counts a temporary."""
    arguments = 512, 4096, 1024, torch.bfloat16
    whole = wk.plan(*arguments).peak_bytes
    monkeypatch.setattr(gemm, "_cuda_has", lambda product: product == "mm")
    products = gemm.products_of("cuda", torch.bfloat16)
    assert (products.name, products.adds, products.widens) == ("torch", False, False)
    _walk_of.cache_clear()
    assert "a temporary for each sum" in str(wk.plan(*arguments))
    assert wk.plan(*arguments).peak_bytes == whole + 4 * 512 * 4096
    _walk_of.cache_clear()
    monkeypatch.setattr(products.__class__, "_mm", lambda self, a, b, out: out.copy_(a.float() @ b.float()))
    left, right, total = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16(), torch.ones(3, 5)
    assert torch.equal(products._addmm(total, left, right), 1 + left.float() @ right.float())


def test_flops_are_counted():
    products = gemm.products_of("cpu", torch.float32)
    with buffers.recording() as record:
        products.logits(torch.randn(5, 3), torch.randn(7, 3), None)
        products.hidden_grad(torch.randn(5, 7), torch.randn(7, 3), torch.zeros(5, 3))
        products.weight_grad(torch.randn(5, 7), torch.randn(5, 3), torch.empty(7, 3), accumulate=False, gain=None)
    assert record.flops == 3 * 2 * 5 * 3 * 7
