"""The outer iteration of WIND: which prompts, their responses, the verdicts, the groups that are fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from windkern._files import ANEW, DamagedRecordError, read_json, write_json
from windkern.losses.bond import PENALTY
from windkern.train.anchor import Anchor
from windkern.train.config import WindConfig
from windkern.train.focus import PromptFocus, exploitability
from windkern.train.groups import FitGroup, fit_groups
from windkern.train.judges.judge import Judge
from windkern.train.metrics import group_metrics, rollout_metrics, win_rates_of
from windkern.train.objectives import Objective
from windkern.train.replay import ReplayBuffer, Replayed
from windkern.train.report.progress import Observer
from windkern.train.rollouts import (
    BEGUN,
    Block,
    Rollout,
    RolloutStore,
    blocks_of,
    collect,
    judged,
)
from windkern.train.scoring import Scorer
from windkern.train.world import World

Respond = Callable[[Sequence[int], int, int], list[Rollout]]  # prompt places, iteration, block -> rollouts


class OuterLoop:
    """Makes the groups of one outer iteration after another, and keeps all of it on the disk.

    Everything is a function of the seed, the weights at the start of the iteration and earlier iterations' files, so a
    run that was killed makes the same groups again, and does not repeat what it finds on the disk.

    Args:
        config: of the run.
        objective: what is fitted.
        prompts: training prompts.
        world: the processes.
        store: where rollouts live.
        respond: samples responses to the prompts at some places.
        judge: None where the objective needs none.
        scorer: scores groups.
        observer: told about progress.
        prompts_per_iteration: sampled and fitted in an iteration.
    """

    def __init__(
        self,
        config: WindConfig,
        objective: Objective,
        prompts: Sequence[str],
        world: World,
        store: RolloutStore,
        respond: Respond,
        judge: Judge | None,
        scorer: Scorer,
        observer: Observer,
        prompts_per_iteration: int,
    ):
        self.config, self.objective, self.prompts, self.world = config, objective, list(prompts), world
        self.store, self.respond, self.judge, self.scorer, self.observer = store, respond, judge, scorer, observer
        self.prompts_per_iteration = prompts_per_iteration
        self.block_size = max(1, config.sampling_batch_size // config.num_responses)  # prompts
        self._scores = set(objective.logps) | ({"old_logps"} if objective.group == "anchor" else set())
        self.forget()

    @property
    def blocks(self) -> int:
        """How many blocks an iteration's prompts make."""
        return -(-self.prompts_per_iteration // self.block_size)

    def forget(self) -> None:
        """Know of no iteration, as a new object does; what is on the disk stays."""
        config = self.config
        self.anchor: Anchor | None = None
        self.rollouts: list[Rollout] = []  # of the current iteration
        self.measured: list[Rollout] = []  # those to prompts that were drawn uniformly
        self.focus = PromptFocus(
            len(self.prompts), mode=config.focus, uniform_share=config.focus_uniform_share, seed=config.seed
        )
        self.replay = (
            ReplayBuffer(
                config.replay_capacity,
                on_policy_prob=config.replay_on_policy_prob,
                inverse_temperature=config.replay_inverse_temperature,
                seed=config.seed,
            )
            if config.replay
            else None
        )
        self._prompt_ids: dict[int, tuple[int, ...]] = {}
        self._done = 0  # iterations that focus and replay know about

    def begin(self, iteration: int, *, inside: bool, together: bool) -> list[FitGroup]:
        """The groups to fit in an iteration, with all their constants.

        Args:
            iteration: counted from 1.
            inside: whether its first steps have been taken already (a resumed run), so that pi_t is gone and its
                log-probs must be on the disk.
            together: whether the policy's forwards talk to each other.

        Raises:
            FileNotFoundError: `inside`, and a response or the log-probs of pi_t are not on the disk.
            DamagedRecordError: what is on the disk is not what was written.
            FloatingPointError: a log-prob is infinite or no number.
        """
        self._learn_before(iteration)
        folder = self.store.iteration(iteration)
        places, uniform = self.focus.choose(iteration, self.prompts_per_iteration)
        size, count = self.block_size, self.config.num_responses
        self.rollouts = collect(
            self.world,
            self.store,
            folder,
            places,
            size,
            lambda block: self.respond(block.places, iteration, block.index),
            self._judge if self.objective.judged else None,
            together=together,
            begun=inside,
            begin=lambda name, done: self.observer.phase(
                iteration, name, len(places) * count, "responses", done * count
            ),
            advance=lambda prompts: self.observer.advance(prompts * count),
        )
        self.measured = [rollout for rollout, drawn in zip(self.rollouts, uniform, strict=True) if drawn]
        groups = fit_groups(self.rollouts, self.objective)
        if inside:
            scored = self.world.first(lambda: self._read_scores(folder, groups, BEGUN))
        else:
            scored = self._score(iteration, groups)
            if self.world.is_main:
                write_json(folder / "scored.json", scored)
            self.world.wait()
        self._learn(iteration, groups, scored)
        groups = [
            group.with_constants(**{name: torch.tensor(scored[name][k]) for name in self.objective.logps})
            for k, group in enumerate(groups)
        ]
        if self.objective.group == "anchor":
            baseline = _baseline(groups, scored["old_logps"])
            groups = [group.with_constants(baseline=baseline) for group in groups]
        return groups if self.replay is None else self._replayed(iteration)

    def measure(self, groups: Sequence[FitGroup]) -> dict[str, float]:
        """What the iteration's responses are like, from prompts that were drawn uniformly, and how far pi_t is."""
        found = rollout_metrics(self.measured) | group_metrics(groups, self.config)
        if self.config.focus == "hardest":
            found["focus_entropy"] = self.focus.entropy()
        return found

    def _judge(self, block: Block, rollouts: list[Rollout]) -> list[Rollout]:
        return judged(rollouts, [self.prompts[place] for place in block.places], self.judge)

    def _score(self, iteration: int, groups: list[FitGroup]) -> dict[str, list[list[float]]]:
        """The log-probs the loss needs, by name, (K,) for each group."""
        size, wanted = self.config.per_device_train_batch_size, self._scores
        if wanted:
            count = len(wanted) * sum(len(group.completions) for group in groups)
            self.observer.phase(iteration, "scoring", count, "log-probs")
        found: dict[str, list[Tensor]] = {}
        if "old_logps" in wanted:
            found["old_logps"] = self.scorer.policy(groups, size, self.observer.advance)
        if "ref_logps" in wanted:
            found["ref_logps"] = self.scorer.frozen(groups, size, self.observer.advance)
        if "anchor_logps" in wanted:
            with self.anchor.in_place():
                found["anchor_logps"] = self.scorer.policy(groups, size, self.observer.advance)
        scored = {name: [row.tolist() for row in rows] for name, rows in found.items()}
        for name, rows in scored.items():
            for group, row in zip(groups, rows, strict=True):
                if not all(map(math.isfinite, row)):
                    step = (iteration - 1) * self.config.steps_per_iteration + 1
                    odd = next(value for value in row if not math.isfinite(value))
                    hint = "lower learning_rate" if step > 1 else "the model gives it no probability"
                    raise FloatingPointError(
                        f"the loss of step {step} is nan, because {name} of a response to prompt "
                        f"{self.prompts[group.place]!r} is {odd}; {hint}"
                    )
        return scored

    def _read_scores(self, folder: Path, groups: Sequence[FitGroup], way_out: str) -> dict[str, list[list[float]]]:
        """The log-probs of an iteration's groups, as `_score` has made them.

        Raises:
            FileNotFoundError, DamagedRecordError: they are not there, or are not those of the groups.
        """
        path, sizes = folder / "scored.json", [len(group.completions) for group in groups]
        found = read_json(path, way_out)
        if found is None:
            raise FileNotFoundError(f"{path} is missing, and the run needs it; {way_out}")
        if not isinstance(found, dict) or not self._scores <= found.keys():
            raise DamagedRecordError(path, f"it must hold {', '.join(sorted(self._scores))}", way_out)
        for name, rows in found.items():
            fits = isinstance(rows, list) and [len(row) if isinstance(row, list) else None for row in rows] == sizes
            if not fits or any(set(map(type, row)) != {float} for row in rows):
                raise DamagedRecordError(path, f"{name} must hold a number for each response that is fitted", way_out)
        return found

    def _learn_before(self, iteration: int) -> None:
        """Let focus and replay know about the iterations before one."""
        if self.replay is not None or self.config.focus == "hardest":
            for earlier in range(self._done + 1, iteration):
                self.recall(earlier)

    def recall(self, iteration: int) -> None:
        """Take an iteration of the past from the disk, and let focus and replay know about it.

        Raises:
            FileNotFoundError, DamagedRecordError: it is not there as a whole.
        """
        self._learn_before(iteration)
        folder = self.store.iteration(iteration)
        self.rollouts = self.world.first(lambda: self._read_rollouts(iteration))
        groups = fit_groups(self.rollouts, self.objective)
        self._learn(iteration, groups, self.world.first(lambda: self._read_scores(folder, groups, ANEW)))

    def _read_rollouts(self, iteration: int) -> list[Rollout]:
        folder, found = self.store.iteration(iteration), []
        places, _ = self.focus.choose(iteration, self.prompts_per_iteration)
        for block in blocks_of(places, self.block_size):
            part, _ = self.store.read(folder, block, ANEW)
            if not part:
                path = self.store.path(folder, block.index)
                raise FileNotFoundError(f"{path} is missing, and the run needs it; {ANEW}")
            found += part
        return found

    def _learn(self, iteration: int, groups: list[FitGroup], scored: dict) -> None:
        if iteration <= self._done:
            return
        self._done = iteration
        if self.config.focus == "hardest":
            win_rates = torch.stack([win_rates_of(group.constants) for group in groups])
            old, ref = torch.tensor(scored["old_logps"]), torch.tensor(scored["ref_logps"])
            values = exploitability(old, ref, win_rates, self.config.beta)
            self.focus.update([group.place for group in groups], values.tolist())
        if self.replay is not None:
            self._remember(iteration, groups, scored)

    def _remember(self, iteration: int, groups: list[FitGroup], scored: dict) -> None:
        entries = []
        for group, rollout, ref_logps in zip(groups, self.rollouts, scored["ref_logps"], strict=True):
            self._prompt_ids[group.place] = group.prompt_ids
            rewards = group.constants["rewards"].tolist()
            for k, tokens in enumerate(group.completions):
                entries.append(
                    Replayed(
                        prompt=group.place,
                        tokens=tokens,
                        reward=rewards[k],
                        ref_logp=ref_logps[k],
                        truncated=rollout.truncated[k],
                        text=rollout.texts[k],
                        iteration=iteration,
                    )
                )
        self.replay.add(entries)

    def _replayed(self, iteration: int) -> list[FitGroup]:
        """Groups drawn from the buffer instead of the fresh ones."""
        drawn = self.replay.draw(iteration, self.prompts_per_iteration, self.config.num_responses)
        found = []
        for entries in drawn:
            constants = {
                "rewards": torch.tensor([entry.reward for entry in entries]),
                "ref_logps": torch.tensor([entry.ref_logp for entry in entries]),
            }
            if self.objective.drop_truncated:
                constants["where"] = torch.tensor([not entry.truncated for entry in entries])
            place = entries[0].prompt
            found.append(FitGroup(place, self._prompt_ids[place], tuple(entry.tokens for entry in entries), constants))
        return found


def _baseline(groups: Sequence[FitGroup], old_logps: Sequence[Sequence[float]]) -> Tensor:
    """() mean of r_J - (l - a) over the policy's own samples, which lowers the variance of J-BOND's backward part."""
    mine, first, second = torch.stack([group.constants["rewards"] for group in groups]).unbind(-1)
    gap = torch.tensor(old_logps)[:, 0] - torch.stack([group.constants["anchor_logps"] for group in groups])[:, 0]
    return (PENALTY * ((mine < first) & (mine < second)) - gap).mean()
