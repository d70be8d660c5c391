"""Bad input: each exception names the argument, what was given, and what would be right."""

import numpy
import pytest
import torch

import windkern as wk
from windkern import backends
from windkern.transform import LogitTransform

HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(7, 4)
TARGETS = torch.zeros(2, 3, dtype=torch.long)
META = torch.zeros(7, 4, device="meta")


def call(hidden=HIDDEN, weight=WEIGHT, targets=TARGETS, **kwargs):
    return wk.token_logps(hidden, weight, targets, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"hidden": [[1.0]]}, TypeError, r"hidden must be a torch.Tensor, got list"),
        ({"hidden": HIDDEN.int()}, TypeError, "hidden must be float64, float32, bfloat16 or float16, got torch.int32"),
        ({"hidden": ()}, ValueError, "hidden must be a tensor or a tuple of one block or more"),
        ({"hidden": (HIDDEN, HIDDEN)}, ValueError, "same number of blocks, got 2 and 1"),
        ({"hidden": HIDDEN[..., :3]}, ValueError, r"hidden must have last dimension 4 to match weight \(7, 4\)"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight must have shape \(vocab, hidden\)"),
        ({"weight": torch.zeros(0)}, ValueError, r"no elements .* windkern.sharding.gathered"),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"no elements .* windkern.sharding.gathered"),
        ({"weight": META}, ValueError, "weight is on meta but targets is on cpu"),
        ({"targets": TARGETS.float()}, TypeError, "targets must be int64 or int32, got torch.float32"),
        ({"targets": TARGETS[0]}, ValueError, r"targets must have shape \(2, 3\) .*, got \(3,\)"),
        ({"targets": TARGETS + 7}, ValueError, r"targets must be in \[0, 7\) or equal ignore_index, got 7"),
        ({"targets": TARGETS - 1}, ValueError, r"targets must be in \[0, 7\) or equal ignore_index, got -1"),
        ({"targets": TARGETS - 5}, ValueError, r"targets must be in \[0, 7\) or equal ignore_index, got -5"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias must have shape \(7,\), got \(6,\)"),
        ({"bias": torch.zeros(7).double()}, TypeError, "bias must not be wider than the logits"),
        ({"scale": "2"}, ValueError, "scale must be a finite number, got .2."),
        ({"softcap": 0}, ValueError, "softcap must be greater than 0, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be greater than 0, got -1.0"),
        ({"temperature": float("inf")}, ValueError, "temperature must be"),
        ({"weight": wk.Head(WEIGHT), "bias": torch.zeros(7)}, ValueError, "bias must not be given with a windkern.He"),
        ({"weight": wk.Head(WEIGHT), "scale": 2.0, "softcap": 3.0}, ValueError, "scale and softcap must not be given"),
        ({"weight": wk.Head(WEIGHT), "temperature": 2.0}, ValueError, "temperature must not be given with a"),
        ({"weight": wk.Head(WEIGHT[:, :3])}, ValueError, r"hidden must have last dimension 3 to match weight"),
        ({"weight": wk.Head(None)}, TypeError, "weight must be a torch.Tensor"),
        ({"max_scored": -1}, ValueError, "max_scored must be at least 0, got -1"),
        ({"max_scored": 2.5}, TypeError, "max_scored must be an integer, got float"),
        ({"max_scored": 5}, ValueError, "max_scored must be at least the number of scored targets, 6, got 5"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be at least 0, got -1"),
        ({"memory_budget": "1G"}, TypeError, "memory_budget must be an integer, got str"),
        ({"backend": "torhc"}, ValueError, r"backend must be one of 'auto', .* did you mean 'torch'\?"),
        ({"transform": 30.0}, TypeError, "unexpected keyword argument 'transform'"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got NoneType"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got float 0.5"),
        ({"ignore_index": "-100"}, TypeError, "ignore_index must be an integer, got str '-100'"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an integer, got bool True"),
        ({"ignore_index": numpy.bool_(True)}, TypeError, "ignore_index must be an integer, got bool"),
        ({"ignore_index": torch.tensor(True)}, TypeError, "ignore_index must be an integer, got Tensor"),
        ({"ignore_index": torch.tensor([1, 2])}, TypeError, "ignore_index must be an integer, got Tensor"),
        ({"ignore_index": 2**70}, ValueError, "ignore_index must fit into 64 bits, got 1180591620717411303424"),
        ({"max_scored": True}, TypeError, "max_scored must be an integer, got bool True"),
        ({"max_scored": numpy.float64(6)}, TypeError, "max_scored must be an integer, got float64 .*6.0"),
        ({"memory_budget": False}, TypeError, "memory_budget must be an integer, got bool False"),
        ({"entropy": "no"}, TypeError, "entropy must be True or False, got str 'no'"),
        ({"entropy": None}, TypeError, "entropy must be True or False, got NoneType"),
        ({"batch_invariant": "no"}, TypeError, "batch_invariant must be True or False, got str 'no'"),
        ({"batch_invariant": 1}, TypeError, "batch_invariant must be True or False, got int 1"),
        ({"hidden": HIDDEN.view(6, 4).to_sparse()}, TypeError, "hidden must be a dense tensor, got torch.sparse_coo"),
        ({"weight": WEIGHT.to_sparse()}, TypeError, "weight must be a dense tensor, got torch.sparse_coo"),
        ({"targets": TARGETS.to_sparse()}, TypeError, "targets must be a dense tensor, got torch.sparse_coo"),
        ({"bias": torch.zeros(7).to_sparse()}, TypeError, "bias must be a dense tensor, got torch.sparse_coo"),
        ({"hidden": HIDDEN.to("meta"), "weight": META, "targets": TARGETS.to("meta")}, ValueError, "the meta device"),
        ({"softcap": 1e39}, ValueError, r"got 1e-39 \(scale=1, softcap=1e\+39,"),
        ({"softcap": 1e-39}, ValueError, "scale / softcap must lie between"),
        ({"scale": 1e30, "temperature": 1e-30}, ValueError, "scale / temperature .*scale=1e.30, softcap"),
        ({"scale": 1e-300, "temperature": 1e300}, ValueError, "scale / temperature must lie"),
    ],
)
def test_token_logps(kwargs, error, match):
    with pytest.raises(error, match=match):
        call(**kwargs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_other_layouts():
    with pytest.raises(TypeError, match="hidden must be a dense tensor, got a nested tensor"):
        call(hidden=torch.nested.nested_tensor([HIDDEN[0], HIDDEN[1]]))
    with pytest.raises(TypeError, match=r"weight must be a dense tensor, got torch.sparse_csr; weight.to_dense\(\)"):
        call(weight=WEIGHT.to_sparse_csr())


def test_what_stands_for_an_integer_a_number_or_a_flag_serves():
    """NumPy's types, as collators pass them, and tensors with one element."""
    plain = call(ignore_index=3, max_scored=6, memory_budget=0, batch_invariant=True, entropy=True)
    for kind in (numpy.int64, numpy.int32, torch.tensor):
        numbers = {name: kind(value) for name, value in (("ignore_index", 3), ("max_scored", 6), ("memory_budget", 0))}
        flags = {"batch_invariant": numpy.bool_(True), "entropy": numpy.bool_(True)}
        for got, want in zip(call(**numbers, **flags), plain, strict=True):
            assert torch.equal(got, want)
    head = wk.Head(WEIGHT, None, numpy.float32(0.5), numpy.float64(3.0), 2)
    numbers = head.scale, head.softcap, head.temperature
    assert numbers == (0.5, 3.0, 2.0) and [type(value) for value in numbers] == [float] * 3
    scalars = call(scale=numpy.float32(0.5), softcap=numpy.float64(3.0), temperature=2)
    for got, want in zip(call(weight=head), scalars, strict=True):
        assert got is want or torch.equal(got, want)
    call(HIDDEN.double(), WEIGHT.double(), softcap=1e39)  # float64 holds it
    sizes = {"rows": numpy.int64(8), "hidden_size": numpy.int64(4), "vocab_size": numpy.int32(9)}
    plan = wk.plan(**sizes, dtype=torch.float32, total_rows=numpy.int64(9), device="cpu")
    assert plan == wk.plan(8, 4, 9, torch.float32, total_rows=9, device="cpu")


def test_logits_that_overflow_are_not_called_masked(backend):
    """-inf without a bias, with a finite bias, and with one that masks a part."""
    hidden, weight, targets = torch.full((2, 2), 3e38), -torch.ones(3, 2), torch.tensor([0, -100])
    for bias in (None, torch.zeros(3), torch.tensor([0.0, -torch.inf, 0.0])):
        with pytest.raises(ValueError, match=r"row 0 are -inf: .* overflows torch.float32"):
            call(hidden, weight, targets, bias=bias, backend=backend)
    with pytest.raises(ValueError, match="bias masks every vocabulary entry of scored row 0"):
        call(torch.zeros(2, 2), weight, targets, bias=torch.full((3,), -torch.inf), backend=backend)


GROUPS = torch.zeros(2, 3, 4, 8), torch.zeros(11, 8), torch.zeros(2, 3, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("loss_fn", "kwargs", "error", "match"),
    [
        (
            lambda logps: logps.sum(-1).long(),
            {},
            TypeError,
            "loss_fn must return losses of a floating dtype, got torch.int64",
        ),
        (lambda logps: logps.sum(-1) > 0, {}, TypeError, "loss_fn must return .* got torch.bool"),
        (lambda logps: logps.sum(-1).to(torch.complex64), {}, TypeError, "loss_fn must return .* got torch.complex64"),
        (lambda logps: logps.detach().sum(-1), {}, ValueError, "loss_fn must return losses that depend on logps"),
        (lambda logps: logps.new_ones(2), {}, ValueError, "loss_fn must return losses that depend on logps"),
        (
            lambda logps: logps.sum(-1),
            {"per_group": [torch.zeros(2)]},
            TypeError,
            "per_group must be .* got list",
        ),
        (lambda logps: logps.sum(-1), {"per_group": {1: torch.zeros(2)}}, TypeError, "keys of per_group .*, got 1"),
        (lambda logps, k: logps.sum(-1), {}, TypeError, r"per_group's entries, as loss_fn\(logps\): missing .*'k'"),
        (
            lambda logps: logps.sum(-1),
            {"per_group": {"k": torch.zeros(2)}},
            TypeError,
            r"loss_fn\(logps, k\): got",
        ),
        (lambda logps: logps.sum(-1), {"per_group": {"k": 3.0}}, TypeError, r"per_group\['k'\] must be a torch.Tensor"),
        (lambda logps: logps.sum(-1), {"batch_invariant": "no"}, TypeError, "batch_invariant must be True or False"),
        (lambda logps: logps.sum(-1), {"ignore_index": 0.5}, TypeError, "ignore_index must be an integer"),
        (lambda logps: logps.sum(-1), {"max_scored": 24.0}, TypeError, "max_scored must be an integer, got float 24.0"),
    ],
)
def test_fused_loss(backend, loss_fn, kwargs, error, match):
    hidden, weight, targets = GROUPS
    with pytest.raises(error, match=match):
        wk.fused_loss(loss_fn, hidden.clone().requires_grad_(), weight, targets, backend=backend, **kwargs)


def test_a_parameter_of_the_loss_is_not_dropped_where_the_model_is_frozen():
    """Nothing in the model requires a gradient, but loss_fn holds a tensor that does."""
    scale = torch.ones((), requires_grad=True)

    def loss_fn(logps):
        return scale * logps.sum(-1)

    with pytest.raises(ValueError, match="loss_fn must not depend on any tensor that requires grad except logps"):
        wk.fused_loss(loss_fn, *GROUPS)
    with torch.no_grad():  # no gradient is asked for, so none is refused
        assert not wk.fused_loss(loss_fn, *GROUPS).requires_grad


def test_keyword_only():
    with pytest.raises(TypeError, match="positional arguments"):
        wk.token_logps(HIDDEN, WEIGHT, TARGETS, torch.zeros(7))


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"normalize": "avg"}, ValueError, "normalize must be one of 'sum', 'mean', got 'avg'"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"packed targets \(M,\)"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens must be int64 or int32"),
        ({"targets": TARGETS[0, 0], "hidden": HIDDEN[0, 0]}, ValueError, r"targets must have shape \(..., T\)"),
    ],
)
def test_sequence_logps(kwargs, error, match):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **kwargs}
    with pytest.raises(error, match=match):
        wk.sequence_logps(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize("bounds", [[0, 2], [1, 3], [0, 3, 2, 3], [0]])
def test_cu_seqlens_must_cover_the_rows(bounds):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of rows, 3"):
        wk.sequence_logps(HIDDEN[0], WEIGHT, TARGETS[0], cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("name", ["scale", "softcap", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_transform(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        LogitTransform(**{name: value})


def test_an_explicit_backend_that_cannot_run_raises(monkeypatch):
    broken = backends.Backend("broken", "windkern.kernels.torch.rows", lambda device, dtype: "no such device")
    monkeypatch.setitem(backends.BACKENDS, "broken", broken)
    with pytest.raises(wk.BackendUnavailableError, match=r"backend='broken' cannot run on cpu .*: no such device"):
        call(backend="broken")
    assert wk.backends.why_not("broken", "cpu") == "no such device"
    assert "broken" not in wk.backends.available("cpu")


def test_why_not_of_an_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of"):
        wk.backends.why_not("tritn", "cpu")


def test_why_not_names_its_arguments():
    with pytest.raises(ValueError, match=r"device must be a torch.device or name one, such as 'cuda', got 'gpu'"):
        wk.backends.available("gpu")
    with pytest.raises(TypeError, match=r"dtype must be torch.float64, .* got torch.int8"):
        wk.backends.why_not("torch", "cpu", torch.int8)


def test_distributed_tensor_is_named(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = torch.nn.Parameter(distribute_tensor(torch.randn(7, 4), mesh, [Shard(0)]))
        with pytest.raises(TypeError, match=r"weight is a DTensor .*windkern.sharding.gathered\(weight\)"):
            call(weight=weight)
        hidden = torch.randn(2, 3, 4)
        with wk.sharding.gathered(weight) as whole:
            wk.token_logps(hidden, whole, TARGETS).logps.sum().backward()
        plain = weight.detach().full_tensor().requires_grad_()
        wk.token_logps(hidden, plain, TARGETS).logps.sum().backward()
        torch.testing.assert_close(weight.grad.full_tensor(), plain.grad)
    finally:
        dist.destroy_process_group()


def test_gathered_passes_plain_tensors_and_refuses_others():
    with wk.sharding.gathered(WEIGHT) as whole:
        assert whole is WEIGHT
    with pytest.raises(TypeError, match="weight must be a"), wk.sharding.gathered("head"):
        pass


def test_debug_mode_reads_the_environment(monkeypatch):
    for value, wanted in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("WINDKERN_DEBUG", value)
        assert backends.debug_mode() is wanted
        assert backends.checks_values(torch.device("cuda")) is wanted and backends.checks_values(torch.device("cpu"))


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'token_logp'"):
        wk.token_logp  # noqa: B018


@pytest.mark.parametrize("bad", [0.0, False, [1], "0"])
def test_a_bad_budget_is_refused_after_a_good_one_that_equals_it(bad):
    hidden, weight, targets = torch.randn(1, 2, 3, 8), torch.randn(11, 8), torch.randint(0, 11, (1, 2, 3))

    def fused(budget):
        return wk.fused_loss(lambda logps: logps.sum(-1), hidden, weight, targets, memory_budget=budget)

    for run in (lambda budget: wk.token_logps(hidden, weight, targets, memory_budget=budget), fused):
        run(0)
        with pytest.raises(TypeError, match="memory_budget must be an integer"):
            run(bad)
