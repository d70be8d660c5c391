"""Jobs: a model's own `__call__` returns a job's result from hidden states and head, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from test_hf import FAMILIES, batch, build

from windkern import hf
from windkern.losses import wind
from windkern.train.jobs import Watch, check_scorable, loss_job, score_job

OPTIONS = {"memory_budget": None, "batch_invariant": False, "backend": "auto"}


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param).eval()


def test_any_model_scores_and_generates_as_before(model):
    ids, attention, completion = batch()
    want = hf.sequence_logps(model, ids, attention, completion, temperature=0.7)
    before = model.generate(input_ids=ids, attention_mask=attention, max_new_tokens=3, do_sample=False)
    logits = model(input_ids=ids, attention_mask=attention).logits
    check_scorable(model)
    targets = hf.completion_targets(ids, completion)
    got = hf.run(model, ids, attention, score_job(targets, 0.7, OPTIONS))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    after = model.generate(input_ids=ids, attention_mask=attention, max_new_tokens=3, do_sample=False)
    assert torch.equal(before, after)
    assert torch.equal(logits, model(input_ids=ids, attention_mask=attention).logits)
    assert "forward" not in model.get_output_embeddings().__dict__


def test_a_loss_has_the_gradients_of_its_log_probs():
    model = build("Gemma2").eval()  # caps its logits after the head, which must not change the result of a job
    ids, attention, completion = (torch.cat([each, each.flip(0)[:1]]) for each in batch())  # two groups of two
    targets = hf.completion_targets(ids, completion)
    constants = {
        "old_logps": torch.full((2, 2), -5.0),
        "ref_logps": torch.full((2, 2), -6.0),
        "prefs": torch.tensor([[[0.5, 0.9], [0.1, 0.5]]]).expand(2, -1, -1).contiguous(),
    }

    def loss(logps, **given):
        return wind(logps, **given, eta=2.0, beta=0.1, reduction="none")

    watch = Watch(loss, 0.5)
    value = hf.run(model, ids, attention, loss_job(watch, targets.view(2, 2, -1), constants, 1.0, OPTIONS))
    got = torch.autograd.grad(value, list(model.parameters()))
    logps = hf.sequence_logps(model, ids, attention, completion).view(2, 2)
    plain = 0.5 * loss(logps, **constants).mean()
    want = torch.autograd.grad(plain, list(model.parameters()))
    torch.testing.assert_close(value.detach(), plain.detach())
    torch.testing.assert_close(watch.logps, logps.detach())
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-8)


def test_a_job_that_fails_leaves_the_model_as_it_was():
    model = build("Llama").eval()
    check_scorable(model)
    ids, attention, _ = batch()

    def job(parts, hidden):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        hf.run(model, ids, attention, job)
    assert "forward" not in model.lm_head.__dict__
    assert model(input_ids=ids, attention_mask=attention).logits.shape[-1] == model.config.vocab_size


def test_a_copy_of_the_model_runs_its_own_weights():
    model = build("Llama").eval()
    check_scorable(model)
    ids, attention, completion = batch()
    before = model(input_ids=ids, attention_mask=attention).logits
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.lm_head.weight)
    assert not twin(input_ids=ids, attention_mask=attention).logits.any()
    assert torch.equal(model(input_ids=ids, attention_mask=attention).logits, before)
    job = score_job(hf.completion_targets(ids, completion), 1.0, OPTIONS)
    assert not torch.equal(hf.run(model, ids, attention, job), hf.run(twin, ids, attention, job))


def test_hooks_of_the_model_and_of_its_head_fire():
    """DDP, FSDP2 and ZeRO-3 rely on them."""
    model = build("Llama").eval()
    fired = []
    for name, module in (("model", model), ("decoder", model.model), ("head", model.lm_head)):
        module.register_forward_pre_hook(lambda *_, name=name: fired.append(name))
    check_scorable(model)
    fired.clear()
    ids, attention, completion = batch()
    hf.run(model, ids, attention, score_job(hf.completion_targets(ids, completion), 1.0, OPTIONS))
    assert fired == ["model", "decoder", "head"]
