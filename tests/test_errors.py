"""Bad input: each exception names the argument, what came, and what would be right."""

import pytest
import torch

import windkern as wk
from windkern import backends

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
        ({"weight": WEIGHT.bfloat16()}, TypeError, "one dtype outside autocast, got hidden torch.float32, weight"),
        ({"weight": META}, ValueError, "weight is on meta but targets is on cpu"),
        ({"targets": TARGETS.float()}, TypeError, "targets must be int64 or int32, got torch.float32"),
        ({"targets": TARGETS[0]}, ValueError, r"targets must have shape \(2, 3\) .*, got \(3,\)"),
        ({"targets": TARGETS + 7}, ValueError, r"targets must be in \[0, 7\) or equal ignore_index, got 7"),
        ({"targets": TARGETS - 1}, ValueError, r"targets must be in \[0, 7\) or equal ignore_index, got -1"),
        ({"targets": TARGETS - 5}, ValueError, r"targets must be in \[0, 7\) or equal ignore_index, got -5"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias must have shape \(7,\), got \(6,\)"),
        ({"bias": torch.zeros(7).double()}, TypeError, "one dtype outside autocast"),
        ({"transform": 2.0}, TypeError, "transform must be a windkern.LogitTransform or None, got float"),
        ({"num_scored": -1}, ValueError, "num_scored must be at least 0, got -1"),
        ({"num_scored": 2.5}, TypeError, "num_scored must be an integer, got float"),
        ({"num_scored": 5}, ValueError, "num_scored must be at least the number of scored targets, 6, got 5"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be at least 0, got -1"),
        ({"memory_budget": "1G"}, TypeError, "memory_budget must be an integer, got str"),
        ({"backend": "torhc"}, ValueError, r"backend must be one of 'auto', .* did you mean 'torch'\?"),
        ({"softcap": 30.0}, TypeError, "unexpected keyword argument 'softcap'"),
    ],
)
def test_token_logps(kwargs, error, match):
    with pytest.raises(error, match=match):
        call(**kwargs)


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
        wk.LogitTransform(**{name: value})


def test_an_explicit_backend_that_cannot_run_raises(monkeypatch):
    broken = backends.Backend("broken", "windkern.kernels.torch_rows", lambda device, dtype: "no such device")
    monkeypatch.setitem(backends.BACKENDS, "broken", broken)
    with pytest.raises(wk.BackendUnavailableError, match=r"backend='broken' cannot run on cpu .*: no such device"):
        call(backend="broken")
    assert wk.backends.why_not("broken", "cpu") == "no such device"
    assert "broken" not in wk.backends.available("cpu")


def test_why_not_of_an_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of"):
        wk.backends.why_not("tritn", "cpu")


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


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'token_logp'"):
        wk.token_logp  # noqa: B018
