"""Who answers the training prompts, and with what beside the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from windkern.train.anchor import Anchor
from windkern.train.config import WindConfig
from windkern.train.data import Demonstration
from windkern.train.groups import FitGroup
from windkern.train.rollouts import Rollout, joined, rollouts_of
from windkern.train.sampler import Sampler, TransformersSampler
from windkern.train.samplers_recorded import RecordedSampler, completions_of_texts
from windkern.train.seeds import stream


class Responder:
    """Makes the groups a loss wants: N samples of the policy; a demonstration and a sample; a sample of the policy and
    two of its moving average.

    Args:
        config: of the run.
        group: see `windkern.train.objectives.Objective`.
        prompts: training prompts.
        demonstrations: their answers, for group "demonstration".
        tokenizer: of the policy.
        sampler: answers prompts; None takes the policy's own.
        own: makes a sampler of the policy as it is wrapped at the moment.
    """

    def __init__(
        self,
        config: WindConfig,
        group: str,
        prompts: Sequence[str],
        demonstrations: Sequence[Demonstration],
        tokenizer,
        sampler: Sampler | None,
        own: Callable[[], TransformersSampler],
    ):
        self.config, self.group, self.prompts, self.demonstrations = config, group, prompts, demonstrations
        self.tokenizer, self.sampler, self.own = tokenizer, sampler, own
        self.anchor: Anchor | None = None
        if config.reference == "precomputed" and not isinstance(sampler, RecordedSampler):
            raise ValueError(f"args.reference='precomputed' needs a RecordedSampler, got {type(sampler).__name__}")

    def update(self, model) -> None:
        """Let a sampler with weights of its own follow the policy."""
        if hasattr(self.sampler, "update"):
            self.sampler.update(model)

    def __call__(self, places: Sequence[int], iteration: int, block: int) -> list[Rollout]:
        """Responses to the prompts at some places; the block's draws depend on its number only."""
        prompts, seed = [self.prompts[place] for place in places], self.config.seed
        count = 1 if self.group == "anchor" else self.config.num_responses
        sampler = self.sampler or self.own()
        own = rollouts_of(sampler.sample(prompts, count, stream(seed, "sample", iteration, block)), places)
        if self.group == "anchor":
            with self.anchor.in_place():
                batch = self.own().sample(prompts, 2, stream(seed, "anchor", iteration, block))
            return joined(own, rollouts_of(batch, places))
        if self.group == "demonstration":
            batch = completions_of_texts(
                self.tokenizer,
                prompts,
                [[self.demonstrations[place].answer] for place in places],
                system=self.config.system if self.tokenizer.chat_template is not None else None,
                max_new_tokens=self.config.max_new_tokens,
            )
            return joined(rollouts_of(batch, places), own)
        return own

    def recorded(self) -> list[FitGroup]:
        """Every recorded response to every prompt, without constants."""
        found = []
        for place, prompt in enumerate(self.prompts):
            (rollout,) = rollouts_of(self.sampler.everything(prompt), [place])
            found.append(FitGroup(place, rollout.prompt_ids, rollout.completions, {}))
        return found
