"""Evaluation on held-out prompts: the policy's responses against the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from windkern.train.config import WindConfig
from windkern.train.evaluation.evaluate import Evaluation, compare
from windkern.train.groups import FitGroup
from windkern.train.judges.judge import Judge
from windkern.train.report.progress import HELD_OUT, OF_HELD_OUT, OF_REFERENCE, Observer
from windkern.train.rollouts import Rollout, RolloutStore, collect, rollouts_of
from windkern.train.samplers.sampler import TransformersSampler
from windkern.train.seeds import stream
from windkern.train.world import World

# Groups, batch size, what is told how many are done -> (K,) log-probs of each.
Scores = Callable[[list[FitGroup], int, Callable[[int], None]], list[torch.Tensor]]
Texts = list[tuple[str, ...]]  # responses to each prompt


class HeldOut:
    """Compares a policy with its reference on prompts it was not trained on.

    The policy's draws have the same seeds at every evaluation, so that its noise is the same, too. The reference
    answers once; its responses are kept in `folder`.

    Args:
        prompts: held-out prompts.
        config: of the run.
        judge: says who wins.
        world: the processes.
        folder: for the reference's responses.
        observer: told about progress.
    """

    def __init__(
        self, prompts: Sequence[str], config: WindConfig, judge: Judge, world: World, folder: Path, observer: Observer
    ):
        self.prompts, self.config, self.judge, self.world = list(prompts), config, judge, world
        self.observer = observer
        self.store, self.folder = RolloutStore(folder), folder

    def _block_size(self, responses: int) -> int:
        return max(1, self.config.sampling_batch_size // responses)

    def reference_texts(
        self, sampler: TransformersSampler, together: bool, iteration: int, *, moved: bool = False
    ) -> Texts:
        """Responses of the reference to each prompt, sampled at the first call and read from the disk afterwards.

        Args:
            sampler: of the reference.
            together: see `World.share`.
            iteration: for the observer, here and below.
            moved: whether the sampler's model is no longer the reference, so that its responses must be there.

        Raises:
            FileNotFoundError, DamagedRecordError: see `windkern.train.rollouts.collect`.
        """
        config = self.config
        count = config.reference_responses

        def sample(block) -> list[Rollout]:
            seed = stream(config.seed, "reference", block.index)
            prompts = [self.prompts[place] for place in block.places]
            return rollouts_of(sampler.sample(prompts, count, seed), block.places)

        places = range(len(self.prompts))
        found = collect(
            self.world,
            self.store,
            self.folder,
            places,
            self._block_size(count),
            sample,
            None,
            together=together,
            begun=moved,
            begin=lambda name, done: self.observer.phase(
                iteration, name, len(places) * count, OF_REFERENCE, done * count
            ),
            advance=lambda prompts: self.observer.advance(prompts * count),
        )
        return [rollout.texts for rollout in found]

    def sample(self, sampler: TransformersSampler, responses: int, together: bool, iteration: int) -> list[Rollout]:
        """Responses of the policy as it is now."""
        size, count = self._block_size(responses), len(self.prompts)
        cuts = [range(first, min(first + size, count)) for first in range(0, count, size)]

        def work(cut: range) -> list[Rollout]:
            seed = stream(self.config.seed, "evaluate", responses, cut.start)
            return rollouts_of(sampler.sample([self.prompts[place] for place in cut], responses, seed), cut)

        def done(finished: Sequence[range]) -> None:
            self.observer.advance(responses * sum(map(len, finished)))

        self.observer.phase(iteration, "sampling", responses * count, HELD_OUT)
        return [rollout for part in self.world.share(cuts, work, together=together, done=done) for rollout in part]

    def evaluate(
        self,
        rollouts: Sequence[Rollout],
        reference: Sequence[Sequence[str]],
        policy: Scores,
        frozen: Scores | None,
        iteration: int,
    ) -> Evaluation:
        """Judge the policy's responses against the reference's; `frozen` scores with the reference where it can."""
        ratios = None
        if frozen is not None:
            groups = [FitGroup(each.place, each.prompt_ids, each.completions, {}) for each in rollouts]
            size, tell = self.config.per_device_eval_batch_size, self.observer.advance
            self.observer.phase(iteration, "scoring", 2 * sum(len(each.completions) for each in rollouts), OF_HELD_OUT)
            pairs = zip(policy(groups, size, tell), frozen(groups, size, tell), strict=True)
            ratios = torch.stack([ours - theirs for ours, theirs in pairs])
        texts = [rollout.texts for rollout in rollouts]
        self.observer.phase(iteration, "judging held-out responses")
        if self.world.size == 1:
            return compare(self.judge, self.prompts, texts, reference, ratios)
        return self.world.agree(
            compare(self.judge, self.prompts, texts, reference, ratios) if self.world.is_main else None
        )
