"""The moving average of weights: its formula, the swap and its undoing, LoRA, bfloat16, FSDP2, checkpoints."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

from windkern.train import anchor as module
from windkern.train.anchor import Anchor


def test_the_examples_run():
    assert not doctest.testmod(module, extraglobs={"torch": torch}).failed


def make(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].bias.requires_grad_(False)
    return model.to(dtype)


@torch.no_grad()
def step(model: nn.Module) -> None:
    """Change the weights, as an optimizer might."""
    for value in model.parameters():
        if value.requires_grad:
            value += 0.1 * torch.randn_like(value)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_is_the_exponential_average():
    model = make(torch.float64)
    path, anchor = [bits(model)], Anchor(model, 0.3)
    for _ in range(5):
        step(model)
        path.append(bits(model))
        anchor.update()
    for name, value in anchor.state_dict().items():
        closed = 0.7**5 * path[0][name] + sum(0.3 * 0.7 ** (5 - t) * path[t][name] for t in range(1, 6))
        torch.testing.assert_close(value, closed, rtol=0, atol=1e-14)


def test_it_stays_where_it_has_arrived_and_rate_1_copies():
    model = make()
    still, copy = Anchor(model, 0.1), Anchor(model, 1.0)
    before = {name: value.clone() for name, value in still.state_dict().items()}
    still.update()
    assert same(before, still.state_dict())
    step(model)
    copy.update()
    for name, value in copy.state_dict().items():
        torch.testing.assert_close(value, model.get_parameter(name).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_takes_the_models_place_and_gives_it_back(dtype):
    model = make(dtype)
    start, anchor = bits(model), Anchor(model, 0.5)
    step(model)
    own = bits(model)
    with anchor.in_place():
        assert same(bits(model), start)
    assert same(bits(model), own)
    anchor.update()
    with anchor.in_place():
        for name, value in anchor.state_dict().items():
            assert torch.equal(model.get_parameter(name), value.to(dtype))
            assert not torch.equal(model.get_parameter(name), own[name])
        assert torch.equal(model[0].bias, own["0.bias"])
    assert same(bits(model), own)


def test_an_exception_brings_the_models_weights_back():
    model = make()
    anchor = Anchor(model, 0.5)
    step(model)
    own = bits(model)
    with pytest.raises(ZeroDivisionError), anchor.in_place():
        assert not same(bits(model), own)
        raise ZeroDivisionError
    assert same(bits(model), own)
    anchor.update()  # and the average is complete again


def test_bfloat16_weights_are_averaged_in_float32():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    anchor = Anchor(model, 0.02)
    nn.init.constant_(model.weight, 1.0078125)  # the next bfloat16
    for _ in range(50):
        anchor.update()  # a step is at most 1/50 of the spacing
    (average,) = anchor.state_dict().values()
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(1.0078125 - 0.0078125 * 0.98**50, abs=1e-6)


def test_a_graph_across_the_swap_is_refused_by_autograd():
    model = make()
    anchor = Anchor(model, 0.5)
    loss = model(torch.randn(2, 4)).sum()
    with anchor.in_place():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_else_may_happen_inside():
    anchor = Anchor(make(), 0.5)
    with anchor.in_place():
        with pytest.raises(RuntimeError, match="update inside in_place"):
            anchor.update()
        with pytest.raises(RuntimeError, match="load_state_dict inside in_place"):
            anchor.load_state_dict(anchor.state_dict())
        with pytest.raises(RuntimeError, match="in_place inside in_place"), anchor.in_place():
            pass


def test_the_state_goes_to_disk_and_back(tmp_path):
    model = make()
    anchor = Anchor(model, 0.5)
    step(model)
    anchor.update()
    torch.save(anchor.state_dict(), tmp_path / "anchor.pt")
    again = Anchor(model, 0.5)
    own = bits(model)
    again.load_state_dict(torch.load(tmp_path / "anchor.pt"))
    assert same(again.state_dict(), anchor.state_dict()) and same(bits(model), own)
    step(model)
    anchor.update()
    again.update()
    assert same(again.state_dict(), anchor.state_dict())


def test_bad_states_are_named_and_change_nothing():
    anchor = Anchor(make(), 0.5)
    before = {name: value.clone() for name, value in anchor.state_dict().items()}
    state = {name: value + 1 for name, value in anchor.state_dict().items()}
    last = list(state)[-1]
    with pytest.raises(ValueError, match=r"1 missing \['0.weight'\], 1 unknown \['0.bias'\]"):
        anchor.load_state_dict({"0.bias" if name == "0.weight" else name: value for name, value in state.items()})
    with pytest.raises(ValueError, match=r"must have shape \(3,\), got \(2,\)"):
        anchor.load_state_dict({**state, last: torch.zeros(2)})
    assert same(anchor.state_dict(), before)


def test_bad_arguments_are_named():
    for rate in (0, 1.5):
        with pytest.raises(ValueError, match="rate must be"):
            Anchor(make(), rate)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        Anchor(make().requires_grad_(False), 0.5)
    with pytest.raises(ValueError, match="parameter weight has no elements, as DeepSpeed ZeRO-3"):
        model = nn.Linear(2, 2)
        model.weight = nn.Parameter(torch.empty(0))
        Anchor(model, 0.5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_of_a_lora_model_only_the_adapters_are_copied():
    peft = pytest.importorskip("peft")
    from tiny_model import make_model

    adapted = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    anchor = Anchor(adapted, 0.5)
    assert anchor.state_dict() and all("lora_" in name for name in anchor.state_dict())
    ids = torch.tensor([[6, 7, 8]])
    with torch.no_grad():
        start = adapted(ids).logits
        step(adapted)
        moved = adapted(ids).logits
        with anchor.in_place():
            assert torch.equal(adapted(ids).logits, start)
        assert torch.equal(adapted(ids).logits, moved) and not torch.equal(moved, start)


def test_sharded_weights_are_averaged_and_swapped(tmp_path):
    """FSDP2 keeps the outermost weights gathered after a forward pass without a backward pass."""
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, sharded = make(), make()
        sharded.load_state_dict(plain.state_dict())
        fully_shard(sharded[2], mesh=init_device_mesh("cpu", (1,)))
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        x, outputs = torch.randn(2, 4), []
        for model in (plain, sharded):
            with torch.no_grad():
                weights = [value for value in model.parameters() if value.requires_grad]  # as an optimizer holds them
                seen = [model(x)]
                anchor = Anchor(model, 0.25)
                for value in weights:
                    value.mul_(2)
                anchor.update()
                with anchor.in_place():
                    seen.append(model(x))
                seen.append(model(x))
            outputs.append(seen)
        assert {type(value).__name__ for value in anchor.state_dict().values()} == {"DTensor"}
        torch.testing.assert_close(outputs[0], outputs[1])
        assert not torch.allclose(outputs[1][0], outputs[1][1]) and not torch.allclose(outputs[1][1], outputs[1][2])
    finally:
        dist.destroy_process_group()
