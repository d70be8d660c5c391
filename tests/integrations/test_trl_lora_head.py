"""Heads that PEFT changed under TRL's fused call; LoRA against the model's own logits, since TRL's leaves it out."""

from __future__ import annotations

import pytest
import tiny_model
import torch
from test_trl import (
    FIELDS,
    MODELS,
    assert_same,
    inputs_of,
    labelled,
    loss_gradients_metrics,
    make,
    wide_model,
)
from torch import nn
from trl.trainer.utils import FusedCausalLMOutput

from windkern.integrations.trl import FusedHead, use

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, transformers and accelerate


def lora_on_head(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=3, lora_alpha=5)).eval()
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_lora_on_the_head_is_in_every_field(name):
    model, given = lora_on_head(MODELS[name]()), labelled(61)
    labels, trained = given["labels"][:, 1:], [value for value in model.parameters() if value.requires_grad]
    logits = model(given["input_ids"], given["attention_mask"]).logits[:, :-1] / 0.7
    logps = logits.log_softmax(-1)
    wanted = {
        "log_probs": logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1),
        "entropy": -(logps.exp() * logps).sum(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == labels,
        "log_sum_sq_probs": (2 * logps).logsumexp(-1),
    }
    for fields in (FIELDS, ("mean_logits",)):
        head = FusedHead(
            fields, 0.7, FusedCausalLMOutput, {"memory_budget": None, "batch_invariant": False, "backend": "auto"}
        )
        ours = head(model.get_base_model(), **given)
        for key in ("log_probs", *fields):
            theirs = torch.where(labels >= 0, wanted[key], torch.zeros_like(wanted[key]))
            torch.testing.assert_close(ours[key], theirs, rtol=1e-5, atol=1e-5, msg=key)
        scored = torch.where(labels >= 0, wanted["log_probs"], 0.0)
        got = torch.autograd.grad(ours.log_probs.square().sum(), trained)
        want = torch.autograd.grad(scored.square().sum(), trained, retain_graph=True)
        for mine, other in zip(got, want, strict=True):
            assert bool(other.any())
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_a_head_that_is_trained_whole_beside_adapters_trains_as_under_trl(tmp_path):
    peft = pytest.importorskip("peft")
    configuration = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    saved = tiny_model.save(tmp_path / "model")
    trainer = make("dpo", saved, tmp_path, model=peft.get_peft_model(tiny_model.make_model(seed=1), configuration))
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "modules_to_save.default" in name:
                value.add_(torch.randn(value.shape))
    inputs = inputs_of(trainer)
    theirs = loss_gradients_metrics(trainer, inputs)
    assert any("modules_to_save" in name and bool(value.any()) for name, value in theirs[1].items())
    with use(trainer):
        assert_same(loss_gradients_metrics(trainer, inputs), theirs)


def test_a_head_and_adapter_in_pieces_are_gathered(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    model, given = lora_on_head(wide_model(61)), labelled(61)
    base = model.get_base_model()
    head = FusedHead(
        ("mean_logits",), 1.0, FusedCausalLMOutput, {"memory_budget": None, "batch_invariant": False, "backend": "auto"}
    )
    whole = head(base, **given)
    layers = [base.lm_head.base_layer, base.lm_head.lora_A["default"], base.lm_head.lora_B["default"]]
    layers[0].requires_grad_(True)
    head(base, **given).loss.backward()
    expected = [layer.weight.grad for layer in layers]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in layers:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        ours = head(base, **given)
        ours.loss.backward()
        for key in ("log_probs", "mean_logits"):
            torch.testing.assert_close(ours[key], whole[key], msg=key)
        for layer, gradient in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer.weight.grad.full_tensor(), gradient)
    finally:
        dist.destroy_process_group()
