"""Evaluate a policy on held-out prompts: its responses against a reference's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from windkern.train.evaluation.evaluate import Evaluation, compare
from windkern.train.groups import Group, groups_of
from windkern.train.judges.judge import Judge
from windkern.train.policy import AnyPolicy
from windkern.train.report.progress import HELD_OUT, OF_HELD_OUT, OF_REFERENCE, Progress
from windkern.train.rollouts import collect
from windkern.train.seeds import stream
from windkern.train.store import Block, GroupStore, blocks_of
from windkern.train.world import World


class Comparison(NamedTuple):
    """An evaluation with the responses it compared."""

    result: Evaluation
    policy: list[Group]  # one for each prompt
    reference: list[Group]


class Evaluator:
    """Compares a policy with its reference on held-out prompts.

    The policy's draws use the same seeds at every evaluation, so that evaluations share their noise. The reference
    answers once; with a folder its responses are stored there.

    Args:
        prompts: held-out prompts.
        judge: compares responses.
        policy: the policy to compare with the reference.
        reference: pi_ref.
        world: the processes.
        folder: where the reference's responses are stored; None stores nothing.
        observer: told about progress.
        seed: seed of the draws.
        reference_responses: number of the reference's responses to each prompt.
        sampling_batch_size: sequences sampled at a time.
        scoring_batch_size: prompts scored at a time.
        kl: whether to estimate KL(policy || reference); both must score each other's responses.
        units: names for the observer of the policy's and the reference's responses.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        judge: Judge,
        policy: AnyPolicy,
        reference: AnyPolicy,
        world: World,
        folder: Path | None,
        observer: Progress,
        *,
        seed: int,
        reference_responses: int,
        sampling_batch_size: int,
        scoring_batch_size: int,
        kl: bool = True,
        units: tuple[str, str] = (HELD_OUT, OF_REFERENCE),
    ):
        self.prompts, self.judge, self.policy, self.reference = list(prompts), judge, policy, reference
        self.world, self.folder, self.observer, self.seed = world, folder, observer, seed
        self.reference_responses = reference_responses
        self.sampling_batch_size, self.scoring_batch_size = sampling_batch_size, scoring_batch_size
        self.kl, self.units = kl and policy.scores and reference.scores, units
        self._answers: list[Group] = []
        self._answers_of: list[tuple[object, ...]] = []  # the files they were read from

    def answer_once(self, iteration: int) -> list[Group]:
        """Return the reference's responses to each prompt, sampled at the first call and read from disk afterwards.

        Args:
            iteration: number for the observer.

        Raises:
            FileNotFoundError, DamagedRecordError: see `windkern.train.rollouts.collect`.
        """
        count, places, reference = self.reference_responses, range(len(self.prompts)), self.reference

        def sample(block: Block) -> list[Group]:
            return self._sample(reference, block, count, stream(self.seed, "reference", block.index))

        if self.folder is None:
            return self._sample_all(reference, count, sample, iteration, self.units[1])
        if self._answers:
            unchanged: bool = self.world.agree(self._files(self.folder) == self._answers_of)
            if unchanged:
                return self._answers
        self._answers = collect(
            self.world,
            GroupStore(self.folder),
            self.folder,
            places,
            self._block_size(count),
            sample,
            together=reference.sharded,
            begun=reference.gone,
            begin=lambda name, done: self.observer.phase(
                iteration, name, len(places) * count, self.units[1], done * count
            ),
            advance=lambda prompts: self.observer.advance(prompts * count),
        )
        self._answers_of = self._files(self.folder)
        return self._answers

    @staticmethod
    def _files(folder: Path) -> list[tuple[object, ...]]:
        """Identify the files of the reference's responses, and their state."""
        states = ((path, path.stat()) for path in sorted(folder.glob("*.json")))
        return [(path, state.st_ino, state.st_mtime_ns, state.st_size) for path, state in states]

    def compare(self, responses: int, iteration: int) -> Comparison:
        """Judge the current policy against the reference.

        Args:
            responses: number of the policy's responses to each prompt. The draws are the same at every call.
            iteration: number for the observer.
        """
        theirs = self.answer_once(iteration)
        size = self._block_size(responses)

        def sample(block: Block) -> list[Group]:
            return self._sample(
                self.policy, block, responses, stream(self.seed, "evaluate", responses, block.index * size)
            )

        ours = self._sample_all(self.policy, responses, sample, iteration, self.units[0])
        ratios = self._log_ratios(ours, iteration) if self.kl else None
        texts, others = ([group.texts for group in groups] for groups in (ours, theirs))
        self.observer.phase(iteration, "judging held-out responses")
        result = self.world.first(lambda: compare(self.judge, self.prompts, texts, others, ratios))
        return Comparison(result, ours, theirs)

    def _block_size(self, responses: int) -> int:
        return max(1, self.sampling_batch_size // responses)

    def _sample(self, policy: AnyPolicy, block: Block, responses: int, seed: int) -> list[Group]:
        prompts = [self.prompts[place] for place in block.places]
        return groups_of(policy.sample(prompts, responses, seed), block.places)

    def _sample_all(self, policy: AnyPolicy, responses: int, sample: Any, iteration: int, unit: str) -> list[Group]:
        count = len(self.prompts)

        def done(finished: Sequence[Block]) -> None:
            self.observer.advance(responses * sum(len(block.places) for block in finished))

        self.observer.phase(iteration, "sampling", responses * count, unit)
        blocks = blocks_of(range(count), self._block_size(responses))
        found = self.world.share(blocks, sample, together=policy.sharded, done=done)
        return [group for part in found for group in part]

    def _log_ratios(self, groups: list[Group], iteration: int) -> torch.Tensor:
        """Return (B, N) log-probs of the policy's responses under it, minus those under the reference, nats."""
        size, tell = self.scoring_batch_size, self.observer.advance
        self.observer.phase(iteration, "scoring", 2 * sum(len(group.completions) for group in groups), OF_HELD_OUT)
        pairs = zip(self.policy.logps(groups, size, tell), self.reference.logps(groups, size, tell), strict=True)
        return torch.stack([ours - theirs for ours, theirs in pairs])
