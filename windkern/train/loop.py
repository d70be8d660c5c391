"""The outer loop of WIND: sample, judge, score, fit, evaluate, save; and again."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import windkern
from windkern import hf
from windkern.losses import check_prefs, wind
from windkern.train import checkpoint as checkpoints
from windkern.train.config import Observer, Record, Unobserved, WindSettings, stream
from windkern.train.evaluate import Evaluation, compare
from windkern.train.judges import Judge, Verdict
from windkern.train.optim import MasterWeights
from windkern.train.sampler import Completions, Sampler

_ADAM_BETA2 = 0.95  # a second moment of the last 20 steps: an iteration has few


@dataclass
class _Pass:
    """Responses to a few prompts that go through the model at once, with all that is constant about them."""

    batch: Completions
    targets: Tensor  # (B, N, L)
    constants: dict[str, Tensor]  # old_logps (B, N), ref_logps (B, N), prefs (B, N, N) or win_rates (B, N)


class ResumeError(ValueError):
    """A checkpoint belongs to another run; the message says what differs."""


class WindLoop:
    """Aligns a model with a judge by WIND.

    An outer iteration freezes pi_t, samples N responses to each of some prompts, has them judged, and fits

        log pi_{t+1} = a log pi_t + b log pi_ref + c w - log Z,   a = 1/(1 + eta*beta), b = eta*beta*a, c = eta*a

    by gradient steps on `windkern.losses.wind` inside `windkern.fused_loss`. Old and reference log-probs come from the
    same passes through the decoder as the policy's, under torch.no_grad; no logits exist outside generation. Dropout
    stays off, because pi_theta and pi_t must differ by their weights only.

    After each iteration everything needed to go on is written to `checkpoint_dir`. The optimizer starts anew in each
    iteration (each is a regression problem of its own, with its own pi_t), and randomness is derived from the seed, so
    float32 weights and history are all there is to keep; on a CPU a resumed run ends with the same bits.

    Args:
        model: causal LM to train (its parameters with requires_grad), also the start of the policy.
        reference: frozen causal LM, pi_ref; another object than `model`.
        sampler: answers prompts with `model`, at `settings.temperature`.
        judge: says who wins.
        train_prompts, heldout_prompts: user messages; no prompt may be in both.
        settings: the numbers of the run.
        checkpoint_dir: where to save after each iteration; None saves nothing.
        observer: told about progress.

    Raises:
        ValueError: the prompt lists overlap or are empty, `reference` is `model`, or nothing is trainable.
        UnsupportedModelError: see `windkern.hf.hidden_and_head`.

    Memory:
        For each trained parameter 16 bytes (float32 copy, gradient, two moments of AdamW) beside the two models.

    Source:
        WIND, arXiv 2410.20727; docs/theory.md.
    """

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
        if reference is model:
            raise ValueError("reference must be another object than model, or it would move with it; load it twice")
        if not train_prompts or not heldout_prompts:
            raise ValueError(
                "train_prompts and heldout_prompts must not be empty, "
                f"got {len(train_prompts)} and {len(heldout_prompts)}"
            )
        if shared := set(train_prompts) & set(heldout_prompts):
            raise ValueError(f"{len(shared)} held-out prompts are also training prompts, e.g. {min(shared)!r}")
        self.settings = settings
        self.model, self.reference = model.eval(), reference.eval().requires_grad_(False)
        self.sampler, self.judge = sampler, judge
        self.train_prompts, self.heldout_prompts = list(train_prompts), list(heldout_prompts)
        self.checkpoint_dir = checkpoint_dir
        self.observer = observer or Unobserved()
        self.history: list[Record] = []
        self.reference_texts: tuple[tuple[str, ...], ...] = ()  # to each held-out prompt
        self.master = MasterWeights(model, max_grad_norm=settings.max_grad_norm)
        self._loss = functools.partial(
            wind, eta=settings.eta, beta=settings.beta, objective=settings.objective, reduction="none"
        )
        for scored in (model, reference):
            hf.hidden_and_head(scored)  # an unsupported model is refused now, not after the first sampling

    def run(self, *, resume: bool = False) -> list[Record]:
        """Do the iterations that are left, and return the history of all.

        Args:
            resume: go on from the newest whole checkpoint; without it, checkpoints of an earlier run are deleted.

        Raises:
            ResumeError: the checkpoint is of a run with other settings, prompts or judge. More iterations than before
                are welcome.
        """
        if self.checkpoint_dir is not None:
            if resume:
                self._restore()
            else:
                checkpoints.clear(self.checkpoint_dir)
        if not self.reference_texts:
            self.observer.phase(0, "sampling the reference", 1)
            self.reference_texts = self.sampler.sample(
                self.heldout_prompts, self.settings.reference_responses, stream(self.settings.seed, "reference")
            ).texts
            self.observer.advance()
        for iteration in range(len(self.history) + 1, self.settings.iterations + 1):
            self._iterate(iteration)
        return self.history

    def evaluate(self, num_responses: int, iteration: int) -> tuple[Evaluation, Completions]:
        """Compare the policy as it is now with the reference on the held-out prompts.

        The draws are the same at every iteration, so that its noise is, too.
        """
        seed = stream(self.settings.seed, "evaluate", num_responses)
        self.observer.phase(iteration, "evaluating", 1 + len(self._cuts(self.heldout_prompts, num_responses)))
        batch = self.sampler.sample(self.heldout_prompts, num_responses, seed)
        self.observer.advance()
        ratios = []
        for chosen in self._cuts(self.heldout_prompts, num_responses):
            part = batch.groups(chosen)
            ratios.append(self._score(self.model, part) - self._score(self.reference, part))
            self.observer.advance()
        return compare(self.judge, self.heldout_prompts, batch.texts, self.reference_texts, torch.cat(ratios)), batch

    def _iterate(self, iteration: int) -> None:
        start = time.perf_counter()
        settings, prompts = self.settings, self._prompts_of(iteration)
        self.observer.phase(iteration, "sampling", 1)
        batch = self.sampler.sample(prompts, settings.num_responses, stream(settings.seed, "sample", iteration))
        self.observer.advance()
        verdict = self.judge.judge(prompts, batch.texts)
        passes = self._prepare(iteration, batch, verdict)
        losses, norms = self._fit(iteration, passes)
        evaluation, _ = self.evaluate(settings.eval_responses, iteration)
        self.history.append(
            Record(
                iteration=iteration,
                win_rate=evaluation.win_rate.mean,
                win_rate_se=evaluation.win_rate.standard_error,
                reward=None if evaluation.reward is None else evaluation.reward.mean,
                kl=evaluation.kl.mean,
                kl_se=evaluation.kl.standard_error,
                loss=sum(losses) / len(losses),
                gradient_norm=max(norms),
                train_reward=None if verdict.rewards is None else float(verdict.rewards.mean()),
                truncated=float(batch.truncated.float().mean()),
                tokens=batch.num_tokens,
                seconds=time.perf_counter() - start,
            )
        )
        self._save(iteration)
        self.observer.finished(self.history[-1])

    def _prompts_of(self, iteration: int) -> list[str]:
        """The next prompts of the shuffled training set; a new shuffle each time it has been gone through."""
        count, total = self.settings.prompts_per_iteration, len(self.train_prompts)
        chosen = []
        for position in range((iteration - 1) * count, iteration * count):
            epoch, place = divmod(position, total)
            chosen.append(self.train_prompts[int(_shuffled(total, self.settings.seed, "prompts", epoch)[place])])
        return chosen

    def _cuts(self, prompts: Sequence[str], num_responses: int) -> list[range]:
        """Prompts that go through the model at once: as many responses as in a pass of training."""
        size = max(1, self.settings.prompts_per_pass * self.settings.fitted_responses // num_responses)
        return [range(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]

    @torch.no_grad()
    def _score(self, model: nn.Module, batch: Completions) -> Tensor:
        """(B, N) log-probs, nats."""
        return hf.sequence_logps(
            model,
            batch.input_ids,
            batch.attention_mask,
            batch.completion_mask,
            temperature=self.settings.temperature,
        ).view(-1, batch.num_responses)

    def _prepare(self, iteration: int, batch: Completions, verdict: Verdict) -> list[_Pass]:
        """Cut the responses to fit into passes and score each with pi_t and pi_ref.

        Reason: the rounding of a bfloat16 pass depends on its shape, so pi_t is scored in the passes of training;
        then log pi_theta - log pi_t is exactly 0 before the first step.
        """
        size = min(self.settings.prompts_per_pass, self.settings.prompts_per_step)
        cuts = [range(first, min(first + size, len(batch.texts))) for first in range(0, len(batch.texts), size)]
        self.observer.phase(iteration, "scoring", len(cuts))
        places, target = self._to_fit(verdict.prefs)
        passes = []
        for chosen in cuts:
            part = batch.responses(chosen, places[chosen.start : chosen.stop])
            targets = hf.completion_targets(part.input_ids, part.completion_mask)
            constants = {
                "old_logps": self._score(self.model, part),
                "ref_logps": self._score(self.reference, part),
                **{name: value[chosen.start : chosen.stop] for name, value in target.items()},
            }
            passes.append(_Pass(part, targets.view(len(chosen), -1, targets.shape[1]), constants))
            self.observer.advance()
        return passes

    def _to_fit(self, prefs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Which of the N responses to fit, (B, K) places, and what to.

        Reason: the update holds at every response, so choosing by the true win rates does not move the minimiser. By
        win rates that N samples estimate, the extremes are exaggerated a little, less as N grows.
        """
        keep = self.settings.fit_responses
        if keep is None:
            return torch.arange(prefs.shape[-1]).expand(len(prefs), -1), {"prefs": prefs}
        check_prefs(prefs)
        win_rates = prefs.mean(-1)  # the own comparison counts 1/2
        order = win_rates.argsort(dim=-1, stable=True)
        places = torch.cat([order[:, : keep // 2], order[:, keep // 2 - keep :]], 1)
        return places, {"win_rates": win_rates.gather(-1, places)}

    def _fit(self, iteration: int, passes: list[_Pass]) -> tuple[list[float], list[float]]:
        """Gradient steps on one iteration's responses; returns the loss and the gradient norm of each step."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            self.master.parameters(),
            lr=settings.learning_rate,
            betas=(settings.momentum, _ADAM_BETA2),
            weight_decay=0.0,
            fused=True,
        )
        per_step = max(1, settings.prompts_per_step // settings.prompts_per_pass)
        self.observer.phase(iteration, "fitting", settings.epochs * len(passes))
        losses, norms = [], []
        for epoch in range(settings.epochs):
            order = _shuffled(len(passes), settings.seed, "fit", iteration, epoch).tolist()
            for first in range(0, len(order), per_step):
                step = (iteration - 1) * settings.steps_per_iteration + len(losses)
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate_at(step)
                losses.append(self._accumulate([passes[k] for k in order[first : first + per_step]]))
                norms.append(self.master.step(optimizer))
        return losses, norms

    def _accumulate(self, passes: Iterable[_Pass]) -> float:
        """Gradients of the mean loss over the groups of some passes, in units of win rate squared."""
        passes = list(passes)
        # Reason: divided by c^2 the loss is a squared error of win rates, and a learning rate suits any eta.
        scale = 1 / (sum(len(part.targets) for part in passes) * self.settings.step_scale**2)
        total = 0.0
        for part in passes:
            parts = hf.hidden_and_head(self.model).at_temperature(self.settings.temperature)
            hidden = parts.hidden(part.batch.input_ids, part.batch.attention_mask)  # (S, L, H)
            loss = scale * windkern.fused_loss(
                self._loss,
                hidden.view(*part.targets.shape, -1),
                parts.weight,
                part.targets,
                per_group=part.constants,
                reduction="sum",
                bias=parts.bias,
                transform=parts.transform,
            )
            loss.backward()
            self.master.collect()
            total += float(loss.detach())
            self.observer.advance()
        return total

    def _identity(self) -> dict:
        """What must be equal for two runs to be one; the number of iterations may grow."""
        settings = dataclasses.asdict(self.settings)
        del settings["iterations"]
        return {
            "settings": settings,
            "judge": self.judge.name,
            "prompts": stream(0, *self.train_prompts, "held-out", *self.heldout_prompts),
        }

    def _save(self, iteration: int) -> None:
        if self.checkpoint_dir is None:
            return
        self.observer.phase(iteration, "saving", 1)
        state = {
            "identity": self._identity(),
            "reference_texts": self.reference_texts,
            "history": [record.as_dict() for record in self.history],
        }
        checkpoints.save(self.checkpoint_dir, checkpoints.Checkpoint(iteration, state, self.master.weights))
        self.observer.advance()

    def _restore(self) -> None:
        found = checkpoints.load_latest(self.checkpoint_dir, self.observer.note)
        if found is None:
            self.observer.note(f"no checkpoint in {self.checkpoint_dir}; starting from the beginning")
            return
        theirs, ours = found.state["identity"], self._identity()
        if theirs != ours:
            flat = [{**identity.pop("settings"), **identity} for identity in (theirs, ours)]
            names = sorted(name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name))
            differing = ", ".join(f"{name} {flat[0].get(name)!r} there, {flat[1].get(name)!r} here" for name in names)
            raise ResumeError(
                f"the checkpoints in {self.checkpoint_dir} are of another run ({differing}); "
                "start without --resume, or with another --output-dir"
            )
        self.master.load(found.weights)
        self.history = [Record(**record) for record in found.state["history"]]
        self.reference_texts = tuple(tuple(texts) for texts in found.state["reference_texts"])
        self.observer.note(f"resuming after iteration {found.iteration}")


def _shuffled(count: int, *labels: object) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(stream(*labels)))
