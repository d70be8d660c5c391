"""Run the outer iterations of WIND: choose prompts, sample, judge, and make the groups to fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from windkern._files import ANEW, DamagedRecordError, read_json, write_json
from windkern.train.checkpoints.identity import ResumeError
from windkern.train.config import WindConfig
from windkern.train.focus import PromptFocus, exploitability
from windkern.train.groups import Group
from windkern.train.iteration import Iteration
from windkern.train.judges.judge import Judge
from windkern.train.loss_plan import LossPlan
from windkern.train.metrics import group_metrics, rollout_metrics, win_rates_of
from windkern.train.policy import AnyPolicy, Policy
from windkern.train.replay import ReplayBuffer, replayed_groups
from windkern.train.responder import Responder
from windkern.train.rollouts import collect, judged
from windkern.train.store import BEGUN, Block, GroupStore, blocks_of


class OuterLoop:
    """Makes one outer iteration after another, and stores every stage.

    Each stage depends only on the seed, the weights at the start of the iteration and the files of earlier iterations.
    A run that was killed therefore makes the same groups again, without repeating what is stored.

    Args:
        config: settings of the run.
        plan: plan of the loss.
        policy: the policy to train.
        reference: pi_ref; None where the plan needs none.
        respond: samples responses to training prompts.
        judge: None where the plan needs none.
        store: keeps the groups.

    Attributes:
        prompts_per_iteration: prompts that an iteration samples responses to, on all processes together.
    """

    def __init__(
        self,
        config: WindConfig,
        plan: LossPlan,
        policy: Policy,
        reference: AnyPolicy | None,
        respond: Responder,
        judge: Judge | None,
        store: GroupStore,
    ):
        self.config, self.plan, self.policy, self.reference = config, plan, policy, reference
        self.respond, self.judge, self.store = respond, judge, store
        self.prompts, self.world, self.observer = list(respond.prompts), policy.world, policy.observer
        fitted = config.steps_per_iteration * config.prompts_per_step(self.world.size)
        self.prompts_per_iteration = fitted // config.passes_per_iteration
        self.block_size = max(1, config.sampling_batch_size // config.num_generations)  # prompts
        self.forget()

    @property
    def blocks(self) -> int:
        """Number of blocks of an iteration's prompts."""
        return -(-self.prompts_per_iteration // self.block_size)

    def forget(self) -> None:
        """Reset to the state of a new object. Files on disk are kept."""
        config = self.config
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
        self._done = 0  # iterations that focus and replay have seen

    def begin(self, number: int, *, inside: bool) -> Iteration:
        """Sample, judge and score an iteration.

        Args:
            number: number of the iteration, counted from 1.
            inside: whether some of its steps have been taken already (a resumed run). pi_t no longer exists then, so
                its log-probs must be stored.

        Raises:
            FileNotFoundError: `inside`, and a response or the log-probs of pi_t are not stored.
            DamagedRecordError: a stored file is not what was written.
            FloatingPointError: a log-prob is infinite or NaN.
        """
        self._check_layout()
        self._learn_before(number)
        folder = self.store.iteration(number)
        places, uniform = self.focus.choose(number, self.prompts_per_iteration)
        count = self.config.num_generations
        groups = collect(
            self.world,
            self.store,
            folder,
            places,
            self.block_size,
            lambda block: self.respond(block.places, number, block.index),
            self._judged if self.plan.judged else None,
            together=self.respond.sharded,
            begun=inside,
            begin=lambda name, done: self.observer.phase(number, name, len(places) * count, "responses", done * count),
            advance=lambda prompts: self.observer.advance(prompts * count),
        )
        chosen = self.plan.fitted(groups)
        if inside:
            scored = self.world.first(lambda: self._read_scores(folder, chosen, BEGUN))
        else:
            scored = self._score(number, chosen)
            self.world.first(lambda: write_json(folder / "scored.json", scored))
        self._learn(number, groups, chosen, scored)
        return Iteration(
            number=number,
            groups=groups,
            fitted=self._fitted(number, chosen, scored),
            measured=[group for group, drawn in zip(groups, uniform, strict=True) if drawn],
        )

    def recall(self, number: int) -> Iteration:
        """Read a finished iteration from disk and pass it to focus and replay. Nothing is fitted again.

        Raises:
            FileNotFoundError, DamagedRecordError: a file of it is missing or damaged.
        """
        self._learn_before(number)
        groups = self.world.first(lambda: self._read_groups(number))
        chosen, folder = self.plan.fitted(groups), self.store.iteration(number)
        scored = self.world.first(lambda: self._read_scores(folder, chosen, ANEW))
        self._learn(number, groups, chosen, scored)
        return Iteration(number, groups, [], [])

    def measure(self, iteration: Iteration) -> dict[str, float]:
        """Return metrics of the responses to prompts drawn uniformly, and pi_t's distance from equilibrium."""
        found = rollout_metrics(iteration.measured) | group_metrics(iteration.fitted, self.plan)
        if self.config.focus == "hardest":
            found["focus_entropy"] = self.focus.entropy()
        return found

    def _check_layout(self) -> None:
        """Store the layout rules of groups with a new run; compare them with the stored ones in a resumed run.

        Raises:
            ResumeError: the run began with other rules, so that its log-probs were rounded differently.
        """
        path, rules = self.store.folder / "layout.json", dataclasses.asdict(self.policy.rules)

        def check() -> None:
            held = read_json(path)
            if held is None:
                write_json(path, rules)
            elif held != rules:
                raise ResumeError(
                    f"{path} holds the layout rules {held}, but groups are now laid out by {rules}: the model, its "
                    "attention or transformers has changed since the run began; resume with the original ones, or "
                    "start another run in another output_dir"
                )

        self.world.first(check)

    def _judged(self, block: Block, groups: list[Group]) -> list[Group]:
        return judged(groups, [self.prompts[place] for place in block.places], self.judge)

    def _fitted(self, number: int, chosen: list[Group], scored: dict[str, list[list[float]]]) -> list[Group]:
        if self.replay is None:
            return self.plan.with_logps(chosen, scored)
        drawn = self.replay.draw(number, self.prompts_per_iteration, self.config.num_generations)
        return replayed_groups(drawn, self._prompt_ids, mask_truncated=self.plan.mask_truncated)

    def _score(self, number: int, groups: list[Group]) -> dict[str, list[list[float]]]:
        """Return the frozen log-probs that the loss needs, by name, (K,) for each group."""
        size, tell = self.config.per_device_train_batch_size, self.observer.advance
        wanted = {"old_logps": self.policy, "ref_logps": self.reference}
        if "anchor_logps" in self.plan.scored:
            wanted["anchor_logps"] = self.policy.average
        wanted = {name: policy for name, policy in wanted.items() if name in self.plan.scored}
        if wanted:
            count = len(wanted) * sum(len(group.completions) for group in groups)
            self.observer.phase(number, "scoring", count, "log-probs")
        scored = {name: [row.tolist() for row in policy.logps(groups, size, tell)] for name, policy in wanted.items()}
        for name, rows in scored.items():
            for group, row in zip(groups, rows, strict=True):
                if not all(map(math.isfinite, row)):
                    step = (number - 1) * self.config.steps_per_iteration + 1
                    odd = next(value for value in row if not math.isfinite(value))
                    hint = "lower learning_rate" if step > 1 else "the model gives it no probability"
                    raise FloatingPointError(
                        f"the loss of step {step} is nan, because {name} of a response to prompt "
                        f"{self.prompts[group.place]!r} is {odd}; {hint}"
                    )
        return scored

    def _read_scores(self, folder: Path, groups: Sequence[Group], way_out: str) -> dict[str, list[list[float]]]:
        """Read the log-probs of an iteration's groups that `_score` has computed.

        Raises:
            FileNotFoundError, DamagedRecordError: the file is missing, or does not fit the groups.
        """
        path, sizes = folder / "scored.json", [len(group.completions) for group in groups]
        found = read_json(path, way_out)
        if found is None:
            raise FileNotFoundError(f"{path} is missing, and the run needs it; {way_out}")
        if not isinstance(found, dict) or not self.plan.scored <= found.keys():
            raise DamagedRecordError(path, f"it must hold {', '.join(sorted(self.plan.scored))}", way_out)
        for name, rows in found.items():
            fits = isinstance(rows, list) and [len(row) if isinstance(row, list) else None for row in rows] == sizes
            if not fits or any(set(map(type, row)) != {float} for row in rows):
                raise DamagedRecordError(path, f"{name} must hold a number for each response that is fitted", way_out)
        return found

    def _read_groups(self, number: int) -> list[Group]:
        folder, found = self.store.iteration(number), []
        places, _ = self.focus.choose(number, self.prompts_per_iteration)
        for block in blocks_of(places, self.block_size):
            part = self.store.read(folder, block, ANEW)
            if not part:
                path = self.store.path(folder, block.index)
                raise FileNotFoundError(f"{path} is missing, and the run needs it; {ANEW}")
            if self.plan.judged and part[0].prefs is None:
                path = self.store.verdict_path(folder, block.index)
                raise FileNotFoundError(f"{path} is missing, and the run needs it; {ANEW}")
            found += part
        return found

    def _learn_before(self, number: int) -> None:
        """Pass the iterations before `number` to focus and replay."""
        if self.replay is not None or self.config.focus == "hardest":
            for earlier in range(self._done + 1, number):
                self.recall(earlier)

    def _learn(self, number: int, groups: list[Group], chosen: list[Group], scored: dict) -> None:
        if number <= self._done:
            return
        self._done = number
        if self.config.focus == "hardest":
            win_rates = torch.stack([win_rates_of(group.constants) for group in chosen])
            old, ref = (torch.tensor(scored[name]) for name in ("old_logps", "ref_logps"))
            where = torch.stack([group.constants["where"] for group in chosen]) if self.plan.mask_truncated else None
            values = exploitability(old, ref, win_rates, self.plan.pull, where=where)
            self.focus.update([group.place for group in chosen], values.tolist())
        if self.replay is not None:
            self._prompt_ids |= {group.place: group.prompt_ids for group in groups}
            self.replay.remember(number, self.plan.with_logps(chosen, scored), self.plan.target)
