"""Make the groups of an iteration: sample responses, and add what else a loss needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from windkern.train.config import WindConfig
from windkern.train.data.datasets import PromptSets
from windkern.train.groups import Group, groups_of
from windkern.train.policy import Policy
from windkern.train.report.notices import Notices
from windkern.train.samplers.recorded import completions_of_texts
from windkern.train.samplers.sampler import Sampler
from windkern.train.seeds import stream

_COLD = "temperature or top_p is too low, or the policy has collapsed to one response per prompt"


class Responder:
    """Makes the groups that a loss needs.

    They hold N samples of the policy; a demonstration and a sample; or a sample of the policy and two of its moving
    average.

    Args:
        config: settings of the run.
        group: see `windkern.losses.Group`.
        prompts: training prompts, with their answers for group "demonstration".
        policy: the policy to train.
        sampler: answers prompts; None: the policy itself.
        notices: receives what a user should know.
    """

    def __init__(
        self,
        config: WindConfig,
        group: str,
        prompts: PromptSets,
        policy: Policy,
        sampler: Sampler | None,
        notices: Notices,
    ):
        self.config, self.group, self.policy, self.sampler, self.notices = config, group, policy, sampler, notices
        self.prompts, self.demonstrations = prompts.train, prompts.demonstrations
        if config.reference == "precomputed" and not hasattr(sampler, "everything"):
            raise ValueError(
                "args.reference='precomputed' needs a sampler that knows its responses beforehand, with a method "
                f"everything(prompt), such as RecordedSampler; got {type(sampler).__name__}"
            )

    @property
    def sharded(self) -> bool:
        """Whether sampling communicates with other processes, see `AnyPolicy`."""
        return self.policy.sharded

    def update(self) -> None:
        """Give the policy's weights to a sampler that keeps a copy."""
        if hasattr(self.sampler, "update"):
            self.sampler.update(self.policy.model)
        elif (who := getattr(self.sampler, "keeps_weights", None)) is not None and self.config.num_iterations > 1:
            self.notices.once(
                "served weights",
                f"{who} is never given the new weights, because its sampler has no "
                "update(model): from iteration 2 on, the responses come from the initial policy. Their log-probs are "
                + (
                    f"correct, and {self.config.loss} may be fitted to responses of any policy"
                    if self.config.entry.any_policy
                    else "those of the current policy, but the loss takes them for its samples (win rates are then "
                    "against the initial one), and no importance weight corrects that; `windkern losses` says which "
                    "losses are made for responses of any policy"
                ),
            )

    def look_at(self, groups: Sequence[Group]) -> None:
        """Give notice if all responses to each prompt of an iteration are the same."""
        found = [set(group.completions) for group in groups if len(group.completions) > 1]
        if self.group == "demonstration" or not found or any(len(group) > 1 for group in found):
            return
        cause = getattr(self.sampler, "repeats_because", _COLD)
        self.notices.once(
            "identical",
            f"all responses to each of the iteration's {len(found)} prompts are identical, so none wins and nothing "
            f"can be learnt; most likely {cause}",
        )

    def __call__(self, places: Sequence[int], iteration: int, block: int) -> list[Group]:
        """Sample responses to the prompts at some places. A block's draws depend only on its number and the weights."""
        prompts, seed = [self.prompts[place] for place in places], self.config.seed
        count = 1 if self.group == "anchor" else self.config.num_generations
        sampler = self.sampler or self.policy
        own = groups_of(sampler.sample(prompts, count, stream(seed, "sample", iteration, block)), places)
        if self.group == "anchor":
            batch = self.policy.average.sample(
                prompts, self.config.num_generations - 1, stream(seed, "anchor", iteration, block)
            )
            return [mine.followed_by(its) for mine, its in zip(own, groups_of(batch, places), strict=True)]
        if self.group == "demonstration":
            tokenizer = self.policy.tokenizer
            batch = completions_of_texts(
                tokenizer,
                prompts,
                [[self.demonstrations[place].answer] for place in places],
                system=self.config.system if tokenizer.chat_template is not None else None,
                max_completion_length=self.config.max_completion_length,
            )
            return [given.followed_by(mine) for given, mine in zip(groups_of(batch, places), own, strict=True)]
        return own

    def recorded(self) -> list[Group]:
        """Return every recorded response to every prompt."""
        sampler: Any = self.sampler
        everything = ((place, sampler.everything(prompt)) for place, prompt in enumerate(self.prompts))
        return [group for place, batch in everything for group in groups_of(batch, [place])]
