"""A prompt with its responses, from sampling to fitting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from windkern.train.judges.judge import Verdict
from windkern.train.samplers.sampler import Completions


@dataclass(frozen=True)
class Group:
    """N responses to a prompt; what is known about them grows from stage to stage.

    Sampling gives tokens and texts, the judge preferences and rewards. The group that is fitted has K of the N
    responses, and `constants` with what the loss takes besides the policy's log-probs.
    """

    place: int  # place of the prompt in the list of prompts
    prompt_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]  # N, tokens up to and including the end token
    truncated: tuple[bool, ...]  # N, no end token within the limit
    texts: tuple[str, ...]  # N
    prefs: tuple[tuple[float, ...], ...] | None = None  # N x N, once judged
    rewards: tuple[float, ...] | None = None  # N, where the judge has them
    constants: Mapping[str, Tensor] = field(default_factory=dict)  # (K,), (K, K) or (): win_rates, where, old_logps ...

    @property
    def tokens(self) -> int:
        """Tokens of all responses."""
        return sum(map(len, self.completions))

    def of(self, places: Sequence[int], constants: Mapping[str, Tensor]) -> Group:
        """Return a group of the responses at some places, with `constants` in place of the verdict."""
        return Group(
            place=self.place,
            prompt_ids=self.prompt_ids,
            completions=tuple(self.completions[place] for place in places),
            truncated=tuple(self.truncated[place] for place in places),
            texts=tuple(self.texts[place] for place in places),
            constants=constants,
        )

    def having(self, **more: Tensor) -> Group:
        """Return the group with more constants."""
        return replace(self, constants={**self.constants, **more})

    def followed_by(self, other: Group) -> Group:
        """Return an unjudged group of these responses, followed by another group's to the same prompt."""
        return Group(
            place=self.place,
            prompt_ids=self.prompt_ids,
            completions=self.completions + other.completions,
            truncated=self.truncated + other.truncated,
            texts=self.texts + other.texts,
        )


def groups_of(batch: Completions, places: Sequence[int]) -> list[Group]:
    """Return one group for each prompt of a batch; `places` are the prompts' places in the list of prompts."""
    count, found = batch.num_generations, []
    prompt_mask = batch.attention_mask & ~batch.completion_mask
    for k, place in enumerate(places):
        rows = range(k * count, (k + 1) * count)
        found.append(
            Group(
                place=place,
                prompt_ids=tuple(batch.input_ids[rows[0]][prompt_mask[rows[0]]].tolist()),
                completions=tuple(tuple(batch.input_ids[row][batch.completion_mask[row]].tolist()) for row in rows),
                truncated=tuple(batch.truncated[rows[0] : rows[-1] + 1].tolist()),
                texts=batch.texts[k],
            )
        )
    return found


def verdict_of(groups: Sequence[Group]) -> Verdict | None:
    """Return the verdict on some groups as tensors, None if they were not judged."""
    if groups[0].prefs is None:
        return None
    prefs = torch.tensor([group.prefs for group in groups], dtype=torch.float32)
    if groups[0].rewards is None:
        return Verdict(prefs, None)
    return Verdict(prefs, torch.tensor([group.rewards for group in groups], dtype=torch.float32))
