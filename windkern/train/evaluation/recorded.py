"""Let recorded responses stand in for a policy in evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from windkern.train.data.prompts import loosely
from windkern.train.data.records import load_records
from windkern.train.groups import Group
from windkern.train.policy import Advance, unheard
from windkern.train.samplers.sampler import Completions


class RecordedTexts:
    """Recorded texts by their prompts; they have neither token ids nor log-probs.

    Args:
        path: see `windkern.train.data.records.load_records`.

    Raises:
        FileNotFoundError, ValueError: as `load_records`.
    """

    sharded = scores = gone = False
    vocabulary = None

    def __init__(self, path: str):
        self.path = path
        self._texts: dict[str, list[str]] = {}
        for record in load_records(path):  # a prompt may have several lines, as `RecordedSampler` reads them
            self._texts.setdefault(loosely(record.prompt), []).extend(record.responses)

    def sample(self, prompts: Sequence[str], num_generations: int, seed: int) -> Completions:
        """Return the first `num_generations` responses to each prompt, whatever the seed.

        Raises:
            ValueError: a prompt has fewer.
        """
        found = [self._texts.get(loosely(prompt), []) for prompt in prompts]
        for prompt, texts in zip(prompts, found, strict=True):
            if len(texts) < num_generations:
                raise ValueError(f"{self.path} has fewer than {num_generations} responses to {prompt!r}")
        count = len(prompts) * num_generations
        none = torch.zeros(count, 0, dtype=torch.bool)
        return Completions(
            input_ids=none.long(),
            attention_mask=none,
            completion_mask=none,
            truncated=torch.zeros(count, dtype=torch.bool),
            texts=tuple(tuple(texts[:num_generations]) for texts in found),
        )

    def logps(self, groups: Sequence[Group], batch_size: int, advance: Advance = unheard) -> list[Tensor]:
        """Raise: texts have no log-probs (`scores` is False)."""
        raise TypeError(f"{self.path} holds texts, which have no log-probs")
