"""The outer loop of WIND: sample, judge, score, fit, evaluate, save; again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

import windkern
from windkern import hf, losses
from windkern._checks import check_choice, check_count, check_number
from windkern.train import checkpoint as checkpoints
from windkern.train.evaluate import Evaluation, compare
from windkern.train.judges import Judge
from windkern.train.optim import MasterWeights
from windkern.train.sampler import Completions, Sampler


@dataclass(frozen=True)
class WindSettings:
    """What determines a run, beside model, prompts and judge. Bad values raise ValueError naming the field."""

    iterations: int = 6
    prompts_per_iteration: int = 16
    num_responses: int = 4  # N, to each prompt
    eta: float = 5.0  # step size of the update
    beta: float = 0.05  # weight of the KL to the reference
    objective: str = "square"
    learning_rate: float = 2e-5
    epochs: int = 1  # passes over an iteration's responses
    prompts_per_step: int = 2  # of an optimizer step
    prompts_per_pass: int = 4  # that go through the model at once
    max_grad_norm: float = 1.0
    temperature: float = 1.0  # of the policy: its samples and its log-probs
    eval_responses: int = 2  # to each held-out prompt, after each iteration
    reference_responses: int = 4  # to each held-out prompt, once
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "prompts_per_iteration", "epochs", "prompts_per_step", "prompts_per_pass"):
            check_count(name, getattr(self, name), least=1)
        check_count("num_responses", self.num_responses, least=2)
        for name in ("eval_responses", "reference_responses"):
            check_count(name, getattr(self, name), least=1)
        for name in ("eta", "learning_rate", "max_grad_norm", "temperature"):
            check_number(name, getattr(self, name), above=0)
        check_number("beta", self.beta, least=0)
        check_choice("objective", self.objective, losses.OBJECTIVES)


@dataclass(frozen=True)
class IterationRecord:
    """What one iteration did; the same numbers go to the screen, the table and the checkpoint."""

    iteration: int
    loss: float  # mean over groups, in units of win rate squared
    win_rate: float
    win_rate_se: float
    reward: float | None
    kl: float
    kl_se: float
    train_reward: float | None  # of the responses that were fitted
    truncated: float  # share of them without an end token
    tokens_per_second: float  # sampled and trained tokens over the whole iteration
    seconds: float


class Observer(Protocol):
    """Who wants to know how far a run is."""

    def phase(self, iteration: int, name: str, steps: int) -> None: ...
    def advance(self) -> None: ...
    def finished(self, record: IterationRecord) -> None: ...
    def note(self, text: str) -> None: ...


class _Silent:
    def phase(self, iteration: int, name: str, steps: int) -> None: ...
    def advance(self) -> None: ...
    def finished(self, record: IterationRecord) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class _Pass:
    """Responses to a few prompts that go through the model at once, and everything constant about them."""

    completions: Completions
    targets: Tensor  # (S, L)
    prefs: Tensor  # (B, N, N)
    old_logps: Tensor  # (B, N)
    ref_logps: Tensor  # (B, N)


def stream(seed: int, *labels: object) -> int:
    """A seed for one use of randomness, so that a resumed run draws what an uninterrupted one would have drawn."""
    digest = hashlib.sha256("/".join(map(str, (seed, *labels))).encode()).digest()
    return int.from_bytes(digest[:7], "big")


class WindLoop:
    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        sampler: Sampler,
        judge: Judge,
        train_prompts: Sequence[str],
        heldout_prompts: Sequence[str],
        settings: WindSettings,
        *,
        checkpoint_dir: Path | None = None,
        observer: Observer | None = None,
    ):
        self.settings = settings
        self.model, self.reference = model.eval(), reference.eval().requires_grad_(False)
        self.sampler, self.judge = sampler, judge
        self.train_prompts, self.heldout_prompts = list(train_prompts), list(heldout_prompts)
        self.checkpoint_dir, self.observer = checkpoint_dir, observer or _Silent()
        self.history: list[IterationRecord] = []
        self.master = MasterWeights(
            model,
            lambda weights: torch.optim.AdamW(
                weights, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
            ),
            settings.max_grad_norm,
        )

    def parts(self, model):
        return hf.hidden_and_head(model).at_temperature(self.settings.temperature)

    @torch.no_grad()
    def logps(self, model, batch: Completions, num_responses: int) -> Tensor:
        return hf.sequence_logps(
            model, batch.input_ids, batch.attention_mask, batch.completion_mask, temperature=self.settings.temperature
        ).view(-1, num_responses)

    def run(self):
        s = self.settings
        self.reference_texts = self.sampler.sample(
            self.heldout_prompts, s.reference_responses, stream(s.seed, "reference")
        ).texts
        for iteration in range(1, s.iterations + 1):
            self.observer.phase(iteration, "x", 1)
            self.iterate(iteration)
        return self.history

    def prompts_of(self, iteration):
        s = self.settings
        need, got = s.prompts_per_iteration, []
        first = (iteration - 1) * need
        n = len(self.train_prompts)
        for k in range(first, first + need):
            epoch, place = divmod(k, n)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(stream(s.seed, "order", epoch)))
            got.append(self.train_prompts[int(order[place])])
        return got

    def iterate(self, iteration):
        s = self.settings
        T = {}
        t0 = start = time.perf_counter()
        prompts = self.prompts_of(iteration)
        batch = self.sampler.sample(prompts, s.num_responses, stream(s.seed, "sample", iteration))
        T["sample"] = time.perf_counter() - t0; t0 = time.perf_counter()
        verdict = self.judge.judge(prompts, batch.texts)
        passes = []
        for first in range(0, len(prompts), s.prompts_per_pass):
            chosen = range(first, min(first + s.prompts_per_pass, len(prompts)))
            part = batch.groups(chosen)
            passes.append(_Pass(part, hf.completion_targets(part.input_ids, part.completion_mask),
                                verdict.prefs[first:first + s.prompts_per_pass],
                                self.logps(self.model, part, s.num_responses),
                                self.logps(self.reference, part, s.num_responses)))
        T["score"] = time.perf_counter() - t0; t0 = time.perf_counter()
        loss, norms = self.fit(iteration, passes)
        T["fit"] = time.perf_counter() - t0; t0 = time.perf_counter()
        held = self.sampler.sample(self.heldout_prompts, s.eval_responses, stream(s.seed, "evaluate"))
        T["evs"] = time.perf_counter() - t0; t0 = time.perf_counter()
        ratios = []
        for first in range(0, len(self.heldout_prompts), s.prompts_per_pass * 2):
            part = held.groups(range(first, min(first + s.prompts_per_pass * 2, len(self.heldout_prompts))))
            ratios.append(self.logps(self.model, part, s.eval_responses) - self.logps(self.reference, part, s.eval_responses))
        ev = compare(self.judge, self.heldout_prompts, held.texts, self.reference_texts, torch.cat(ratios))
        T["evk"] = time.perf_counter() - t0
        self.history.append(ev)
        print(iteration, f"win {ev.win_rate.mean:.3f}+-{ev.win_rate.standard_error:.3f} reward {ev.reward.mean:.3f} kl {ev.kl.mean:.2f}+-{ev.kl.standard_error:.2f}",
              f"train r {verdict.rewards.mean():.3f} trunc {batch.truncated.float().mean():.2f} heldtrunc {held.truncated.float().mean():.2f} loss", [round(x, 4) for x in loss], "norm", [round(x, 2) for x in norms],
              {k: round(v, 1) for k, v in T.items()}, f"{time.perf_counter()-start:.0f}s", flush=True)
        self.last = held

    def fit(self, iteration, passes):
        s = self.settings
        c2 = (s.eta / (1 + s.eta * s.beta)) ** 2
        loss_fn = lambda logps, old, ref, prefs: losses.wind(logps, old, ref, prefs, eta=s.eta, beta=s.beta, objective=s.objective, reduction="none")
        per_step = max(1, s.prompts_per_step // s.prompts_per_pass)
        out, norms = [], []
        for epoch in range(s.epochs):
            order = torch.randperm(len(passes), generator=torch.Generator().manual_seed(stream(s.seed, "fit", iteration, epoch))).tolist()
            for first in range(0, len(order), per_step):
                step = [passes[k] for k in order[first:first + per_step]]
                groups = sum(len(p.prefs) for p in step)
                tot = 0.0
                for p in step:
                    m = self.parts(self.model)
                    h = m.hidden(p.completions.input_ids, p.completions.attention_mask)
                    shape = (-1, s.num_responses)
                    loss = windkern.fused_loss(loss_fn, h.view(*p.old_logps.shape, *h.shape[1:]), m.weight, p.targets.view(*p.old_logps.shape, -1),
                        per_group={"old": p.old_logps, "ref": p.ref_logps, "prefs": p.prefs}, reduction="sum", bias=m.bias, transform=m.transform) / (groups * c2)
                    loss.backward()
                    self.master.collect()
                    tot += float(loss.detach())
                norms.append(self.master.step()); out.append(tot)
        return out, norms
