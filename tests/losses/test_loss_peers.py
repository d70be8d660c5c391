"""Values and gradients against the implementations of TRL and Liger, called on the same log-probs.

TRL's losses are methods of its trainers: they are called on a stand-in that has only the settings.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from loss_checks import assert_same, generator
from torch import Tensor

from windkern import losses

B, T = 6, 9
FLOAT32 = 3e-6  # relative error of peers that use float32 constants
WON = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(B, 2)


def imported(path: str, name: str):
    """Import a name of an optional package, ignoring the package's own warnings."""
    pytest.importorskip(path.split(".")[0])
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(__import__(path, fromlist=[name]), name)


def pairs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B, 2) log-probs, the same in another order for the reference, and token counts."""
    g = generator(seed)
    logps = -20 + 4 * torch.randn(B, 2, generator=g, dtype=torch.float64)
    ref = logps + 3 * torch.randn(B, 2, generator=g, dtype=torch.float64)
    return logps.requires_grad_(), ref, torch.randint(3, T, (B, 2), generator=g)


def assert_same_loss(ours: Tensor, theirs: Tensor, logps: Tensor, tolerance: float = 1e-12) -> None:
    assert_same(ours, theirs.to(ours.dtype), tolerance)
    (got,), (want,) = (torch.autograd.grad(loss, logps, retain_graph=True) for loss in (ours, theirs))
    assert_same(got, want, tolerance)


# TRL ------------------------------------------------------------------------------------------------------------------


def stand_in(**settings) -> MagicMock:
    trainer = MagicMock(aux_loss_enabled=False, _metrics={"eval": defaultdict(list)}, **settings)
    trainer.model.training = False
    trainer.accelerator.device = "cpu"
    trainer.accelerator.num_processes = 1
    for gather in ("gather", "gather_for_metrics", "reduce"):
        setattr(trainer.accelerator, gather, lambda value, *rest, **more: value)
    return trainer


def outputs_of(logps: Tensor) -> SimpleNamespace:
    """Return TRL's model outputs for (S,): the first token has the whole log-prob."""
    tokens = torch.zeros(len(logps), T, dtype=logps.dtype)
    tokens = torch.cat([logps[:, None], tokens[:, 1:]], 1)
    zeros = torch.zeros_like(tokens)
    return SimpleNamespace(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def columns(value: Tensor) -> Tensor:
    """Return all chosen, then all rejected: (B, 2) -> (2B,)."""
    return value.T.reshape(-1)


def mask_of(lengths: Tensor) -> Tensor:
    """Return the mask of one prompt token, then as many completion tokens: (S,) -> (S, T + 1)."""
    places = torch.arange(T + 1)
    return ((places >= 1) & (places <= lengths[:, None])).long()


def trl_dpo(kind: str, logps: Tensor, ref: Tensor, lengths: Tensor, **settings) -> Tensor:
    trainer = stand_in(
        loss_types=[kind],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=settings.get("label_smoothing", 0.0),
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
    )
    mask = mask_of(columns(lengths))
    inputs = {
        "input_ids": torch.zeros(2 * B, T + 1, dtype=torch.int64),
        "completion_mask": mask,
        "ref_chosen_logps": ref[:, 0],
        "ref_rejected_logps": ref[:, 1],
    }
    compute = imported("trl.trainer.dpo_trainer", "DPOTrainer")._compute_loss
    return compute(trainer, lambda **kwargs: outputs_of(columns(logps)), inputs, False)


SMOOTHED = {"label_smoothing": 0.1}
DPO = {
    "sigmoid": (losses.dpo, {}),
    "hinge": (losses.dpo, {"link": "hinge"}),
    "robust": (losses.dpo, {"link": "robust", **SMOOTHED}),
    "bco_pair": (losses.dpo, {"link": "bco"}),
    "discopop": (losses.dpo, {"link": "discopop"}),
    "exo_pair": (losses.exo, SMOOTHED),
    "nca_pair": (losses.nca, {}),
    "apo_zero": (losses.apo, {"variant": "zero"}),
    "apo_down": (losses.apo, {"variant": "down"}),
    "aot": (losses.aot, SMOOTHED),
    "aot_unpaired": (losses.aot, {"paired": False, **SMOOTHED}),
}


@pytest.mark.parametrize("kind", DPO)
def test_pairs_of_trl(kind):
    function, options = DPO[kind]
    logps, ref, lengths = pairs()
    theirs = trl_dpo(kind, logps, ref, lengths, **options)
    assert_same_loss(function(logps, ref, beta=0.3, **options), theirs, logps, FLOAT32)


def test_ipo_of_trl_is_ours_on_means_over_tokens():
    logps, ref, lengths = pairs()
    ours = losses.dpo(logps / lengths, ref / lengths, beta=0.3, link="ipo")
    assert_same_loss(ours, trl_dpo("ipo", logps, ref, lengths), logps)


def test_sppo_hard_of_trl_is_twice_ours_with_verdicts():
    logps, ref, lengths = pairs()
    ours = 2 * losses.sppo(logps, ref, win_rates=WON, eta=1 / 0.3)
    assert_same_loss(ours, trl_dpo("sppo_hard", logps, ref, lengths), logps)


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        ("sigmoid", lambda logps, lengths: losses.cpo(logps, lengths, beta=0.3, alpha=0.0, label_smoothing=0.1)),
        ("simpo", lambda logps, lengths: losses.simpo(logps, lengths, beta=0.3, gamma=0.7, label_smoothing=0.1)),
    ],
)
def test_cpo_and_simpo_of_trl(kind, ours):
    logps, _, lengths = pairs()
    trainer = stand_in(beta=0.3, alpha=0.0, loss_type=kind, simpo_gamma=0.7, label_smoothing=0.1)
    given = logps / lengths if kind == "simpo" else logps
    theirs = imported("trl.experimental.cpo.cpo_trainer", "CPOTrainer").cpo_loss(trainer, *given.unbind(-1))[0].mean()
    assert_same_loss(ours(logps, lengths), theirs, logps)


def test_orpo_of_trl():
    logps, _, lengths = pairs()
    means = logps / lengths
    trainer = stand_in(beta=0.3)
    odds = imported("trl.experimental.orpo.orpo_trainer", "ORPOTrainer").odds_ratio_loss(trainer, *means.unbind(-1))[0]
    assert_same_loss(losses.orpo(logps, lengths, beta=0.3), (-means[:, 0] - odds).mean(), logps, FLOAT32)


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto_of_trl(kind):
    logps, ref, lengths = pairs()
    gaps = 0.3 + torch.randn(2 * B, generator=generator(1), dtype=torch.float64)
    good = torch.rand(2 * B, generator=generator(2)) < 0.5
    trainer = stand_in(
        loss_type=kind,
        beta=0.3,
        desirable_weight=0.8,
        undesirable_weight=1.3,
        precompute_ref_logps=True,
        calculate_KL=kind == "kto",
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda model, batch: gaps
    inputs = {
        "input_ids": torch.zeros(2 * B, T + 1, dtype=torch.int64),
        "attention_mask": torch.ones(2 * B, T + 1, dtype=torch.int64),
        "completion_mask": mask_of(columns(lengths)),
        "label": good,
        "ref_logps": columns(ref),
        "ref_KL_logps": torch.zeros_like(gaps),
    }
    compute = imported("trl.trainer.kto_trainer", "KTOTrainer")._compute_loss
    theirs = compute(trainer, lambda **kwargs: outputs_of(columns(logps)), inputs, False)
    ours = losses.kto(
        columns(logps)[:, None],
        columns(ref)[:, None],
        good[:, None],
        kl_gaps=gaps if kind == "kto" else torch.zeros_like(gaps),
        beta=0.3,
        desirable_weight=0.8,
        undesirable_weight=1.3,
    )
    assert_same_loss(ours, theirs, logps)


# Liger ----------------------------------------------------------------------------------------------------------------


def liger(module: str, name: str):
    return imported(f"liger_kernel.chunked_loss.{module}", f"LigerFusedLinear{name}Function")


def liger_pair(module: str, name: str, given: Tensor, *rest: Tensor, **options) -> Tensor:
    both_halves = torch.empty(2 * B, 1)
    return liger(module, name).preference_loss_fn(*given.unbind(-1), both_halves, *rest, **options)[0]


@pytest.mark.parametrize("kind", [kind for kind in DPO if not kind.startswith("aot")])
def test_pairs_of_liger(kind):
    function, options = DPO[kind]
    logps, ref, _ = pairs()
    smoothing = options.get("label_smoothing", 0.0)
    theirs = liger_pair("dpo_loss", "DPO", logps, *ref.unbind(-1), beta=0.3, loss_type=kind, label_smoothing=smoothing)
    assert_same_loss(function(logps, ref, beta=0.3, **options), theirs, logps, FLOAT32)


def test_reference_free_losses_of_liger():
    logps, _, lengths = pairs()
    means = logps / lengths
    theirs = liger_pair("simpo_loss", "SimPO", means, beta=0.3, gamma=0.7, label_smoothing=0.1)
    assert_same_loss(losses.simpo(logps, lengths, beta=0.3, gamma=0.7, label_smoothing=0.1), theirs, logps)
    theirs = liger_pair("cpo_loss", "CPO", logps, beta=0.3) - 0.7 * means[:, 0].mean()
    assert_same_loss(losses.cpo(logps, lengths, beta=0.3, alpha=0.7), theirs, logps)
    theirs = liger_pair("orpo_loss", "ORPO", means, beta=0.3) - means[:, 0].mean()
    assert_same_loss(losses.orpo(logps, lengths, beta=0.3), theirs, logps)


def test_kto_of_liger():
    logps, ref, _ = pairs()
    good = torch.rand(2 * B, generator=generator(2)) < 0.5
    kl = torch.tensor(0.4, dtype=torch.float64)
    compute = liger("kto_loss", "KTO").preference_loss_fn
    theirs = compute(columns(logps), good, torch.empty(2 * B, 1), columns(ref), 0.3, kl)
    ours = losses.kto(columns(logps)[:, None], columns(ref)[:, None], good[:, None], kl_gaps=kl[None], beta=0.3)
    assert_same_loss(ours, theirs[0], logps)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("grpo", {}), ("bnpo", {"average": "group"}), ("dr_grpo", {"average": "none"})],
)
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_grpo_of_liger(kind, options, beta):
    g = generator(3)
    old = -3 * torch.rand(4, T, generator=g, dtype=torch.float64)
    logps = (old + 0.3 * torch.randn(4, T, generator=g, dtype=torch.float64)).requires_grad_()
    ref = old + 0.3 * torch.randn(4, T, generator=g, dtype=torch.float64)
    advantages = torch.randn(4, generator=g, dtype=torch.float64)
    where = torch.rand(4, T, generator=g) < 0.8
    settings = {"epsilon_low": 0.2, "epsilon_high": 0.28, "beta": beta, "loss_type": kind, "max_completion_length": T}
    theirs = liger("grpo_loss", "GRPO").ppo_loss_fn(logps, where, advantages, where, ref, old, **settings)[0]
    ours = losses.grpo(
        logps[None],
        old[None],
        ref[None] if beta else None,
        advantages=advantages[None],
        clip_high=0.28,
        beta=beta,
        where=where[None],
        **options,
    )
    assert_same_loss(ours / (T if kind == "dr_grpo" else 1), theirs, logps)
