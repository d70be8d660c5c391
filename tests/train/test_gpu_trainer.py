"""WindTrainer on a GPU: equal to a CPU, resumed, with LoRA, in bfloat16, without waiting, in less memory."""

import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny_model
from trainer_cases import HELDOUT, lora, make_config, make_trainer, weights_of

import windkern as wk
from windkern import hf
from windkern.hf import LayoutRules
from windkern.train.batches import collate
from windkern.train.groups import Group
from windkern.train.jobs import loss_job
from windkern.train.samplers.sampler import GumbelNoise, TransformersSampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # From peft, and for names that transformers changes.
    pytest.mark.filterwarnings(
        "ignore:.*checkpointing", "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding"
    ),
]
OPTIONS = {"memory_budget": None, "batch_invariant": False, "backend": "auto"}
PACKAGE = str(Path(wk.__file__).parent)
ON_GPU = {"use_cpu": False}


@pytest.fixture(autouse=True)
def _any_kernel():
    torch.use_deterministic_algorithms(False)  # for the kernels of transformers and peft


def sampler():
    """Return answers of the initial model, drawn on the CPU: the same for any device of the trainer."""
    return TransformersSampler(tiny_model.make_model(), tiny_model.make_tokenizer(), max_completion_length=6)


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run(folder, device: dict, *, resume: bool = False, **changes):
    trainer = make_trainer(folder, given={"sampler": sampler()}, **device, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "kl", "gradient_accumulation_steps": 2},
        {"loss": "dpo"},
        {"loss": "sppo", "mask_truncated_completions": True},
        {"fit_responses": 2},
    ],
    ids=str,
)
def test_losses_and_weights_are_those_of_a_cpu(tmp_path, changes):
    here, there = run(tmp_path / "cpu", {}, **changes), run(tmp_path / "gpu", ON_GPU, **changes)
    assert next(there.model.parameters()).is_cuda and not next(here.model.parameters()).is_cuda
    assert losses_of(there) == [pytest.approx(value, rel=3e-3, abs=1e-4) for value in losses_of(here)]
    for one, other in zip(here.state.log_history, there.state.log_history, strict=True):
        for name in ("kl_old", "kl_ref", "residual"):
            assert (name in one) == (name in other)
            assert name not in one or other[name] == pytest.approx(one[name], rel=3e-3, abs=1e-3), name
    # Reason: Adam's first step is the sign of a gradient, so a weight whose gradient is nearly 0 may go either way.
    pairs = list(zip(weights_of(here).values(), weights_of(there).values(), strict=True))
    far = sum(int(((one - other.cpu()).abs() > 1e-3).sum()) for one, other in pairs)
    assert far <= 0.01 * sum(one.numel() for one, _ in pairs)


def test_the_anchor_is_beside_the_policy(tmp_path):
    trainer = run(tmp_path, ON_GPU, loss="bond", num_generations=3, save_strategy="no")
    assert {value.device.type for value in trainer.policy.anchor.state_dict().values()} == {"cuda"}
    assert len(losses_of(trainer)) == 4 and all(value == value for value in losses_of(trainer))


def test_a_resumed_run_ends_where_the_whole_one_ends(tmp_path):
    whole = run(tmp_path / "whole", ON_GPU, num_iterations=3, save_strategy="steps", save_steps=1, save_total_limit=9)
    part = tmp_path / "part"
    run(part, ON_GPU, num_iterations=3, save_strategy="steps", save_steps=1, save_total_limit=9)
    for step in (4, 5, 6):
        for path in sorted((part / f"checkpoint-{step}").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (part / f"checkpoint-{step}").rmdir()
    again = run(part, ON_GPU, resume=True, num_iterations=3, save_strategy="steps", save_steps=1, save_total_limit=9)
    assert losses_of(again) == [pytest.approx(value, rel=1e-4, abs=1e-6) for value in losses_of(whole)]
    for one, other in zip(weights_of(whole).values(), weights_of(again).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ("q_proj", "lm_head")])
def test_an_adapter_on_its_base(tmp_path, modules):
    pytest.importorskip("peft")
    found = []
    for name, device in (("cpu", {}), ("gpu", ON_GPU)):
        model, given = (
            tiny_model.make_model(),
            {"sampler": sampler(), "peft_config": lora(target_modules=list(modules))},
        )
        settings = {"reference": "adapter", "gradient_checkpointing": True, **device}
        torch.manual_seed(0)  # for the initial weights of the adapter
        trainer = make_trainer(tmp_path / name, model=model, given=given, **settings)
        trainer.train()
        found.append(losses_of(trainer))
    assert found[1] == [pytest.approx(value, rel=1e-3, abs=1e-5) for value in found[0]]


@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_bfloat16(tmp_path, kind):
    """With autocast over float32 weights, and with bfloat16 weights whose float32 copies are updated."""
    changes = {"heldout": HELDOUT, "eval_strategy": "epoch", "num_iterations": 3, "steps_per_iteration": 4}
    model = tiny_model.make_model()
    if kind == "autocast":
        changes["bf16"] = True
    else:
        model = model.bfloat16()
    given = {"ref_model": tiny_model.make_model().to(model.dtype)}
    trainer = make_trainer(tmp_path, model=model, given=given, **ON_GPU, **changes)
    trainer.train()
    assert all(value == value and value >= 0 for value in losses_of(trainer)) and len(losses_of(trainer)) == 12
    assert len(trainer.history) == 3 and trainer.history[-1].win_rate is not None
    if kind == "weights":
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        assert {state["master"].dtype for state in optimizer.state.values()} == {torch.float32}
        assert {state["master"].device.type for state in optimizer.state.values()} == {"cuda"}


def test_samples_of_a_gpu_are_samples_of_the_policy():
    """Gumbel noise on the GPU draws from softmax(z / T), and the same seed draws the same."""
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0], device="cuda")
    for temperature in (1.0, 0.5):
        scores = logits.expand(200_000, -1).contiguous()
        draws = []
        for _ in range(2):
            noise = GumbelNoise(torch.Generator("cuda").manual_seed(3), temperature)
            draws.append(noise(torch.empty(0), scores).argmax(-1))
        assert torch.equal(*draws)
        share = torch.bincount(draws[0], minlength=4).double().cpu() / scores.shape[0]
        torch.testing.assert_close(share, (logits / temperature).softmax(-1).double().cpu(), rtol=0, atol=0.005)


def groups_of(count: int, responses: int, tokens: int, vocab: int) -> list[Group]:
    made = torch.Generator().manual_seed(0)
    found = []
    for place in range(count):
        rows = torch.randint(2, vocab, (responses, tokens), generator=made).tolist()
        prefs = torch.rand(responses, responses, generator=made)
        old = -5.0 * tokens + torch.randn(responses, generator=made)
        constants = {"prefs": (prefs + 1 - prefs.mT) / 2, "old_logps": old, "ref_logps": old - 0.1}
        kept = {"truncated": (False,) * responses, "texts": ("",) * responses, "constants": constants}
        found.append(Group(place, (5, 6, 7), tuple(map(tuple, rows)), **kept))
    return found


def test_a_step_waits_for_the_gpu_only_to_count_its_rows(tmp_path):
    trainer = make_trainer(tmp_path, **ON_GPU)
    batch = trainer.policy.batch(groups_of(2, 4, 6, 18))
    trainer.compute_loss(trainer.model, {"batch": batch}).backward()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.compute_loss(trainer.model, {"batch": batch}).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{each.filename}:{each.lineno}" for each in seen if "synchroniz" in str(each.message)]
    # The masks of transformers wait too; ours is the one in fused_loss that counts the scored rows.
    ours = [place for place in places if place.startswith(PACKAGE)]
    assert len(ours) <= 1, places


@pytest.mark.filterwarnings("ignore")  # torch and transformers warn of their own masks
@pytest.mark.parametrize("window", [None, 70])
def test_block_masks_of_flex_attention_are_the_dense_ones(window):
    """Compiled, in values and gradients, over rows of several blocks; tests/hf/test_groups.py runs this on a CPU."""
    model, group = tiny_model.make_mistral(window).cuda(), groups_of(1, 8, 60, 512)[0]
    given = [list(group.prompt_ids) * 40], [[list(each) for each in group.completions]]
    found = {}
    for attention in ("sdpa", "flex_attention"):
        model.set_attn_implementation(attention)
        model.zero_grad(set_to_none=True)
        logps = hf.group_logps(model, *given, shared_prompt="always")
        (logps * torch.linspace(-1, 1, 8, device="cuda")).sum().backward()
        found[attention] = [logps.detach(), *(each.grad for each in model.parameters())]
    for ours, theirs in zip(found["flex_attention"], found["sdpa"], strict=True):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_a_step_takes_less_memory_than_plain_logits():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64000, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).cuda().bfloat16().train()
    batch = collate(groups_of(2, 4, 512, 64000), 0, LayoutRules(shared=False)).to(torch.device("cuda"))

    def loss(logps, **constants):
        return wk.losses.wind(logps, **constants, eta=1.0, beta=0.1, reduction="none")

    def fused():
        job = loss_job(loss, batch.targets, batch.constants, 1.0, OPTIONS | {"memory_budget": 128 << 20})
        return hf.run_rows(model, batch.rows, job, padded=True)

    def plain():
        rows = batch.rows
        logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask.long()).logits
        place, scored = rows.padded()
        logits = logits.flatten(0, 1)[place]
        logps = logits.float().log_softmax(-1).gather(-1, scored.clamp(min=0)[..., None]).squeeze(-1)
        return loss((logps * (scored >= 0)).sum(-1).view(batch.shape), **batch.constants).mean()

    peaks, values = {}, {}
    for name, step in (("fused", fused), ("plain", plain)):
        for _ in range(2):  # the first time allocates the workspaces of libraries
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            value = step()
            value.backward()
            torch.cuda.synchronize()
            peaks[name], values[name] = torch.cuda.max_memory_allocated() - before, float(value.detach())
            del value
    assert values["fused"] == pytest.approx(values["plain"], rel=0.05)
    assert peaks["fused"] < 0.5 * peaks["plain"], peaks


def test_the_settings_find_the_gpu(tmp_path):
    assert make_config(tmp_path, use_cpu=False).device.type == "cuda"
