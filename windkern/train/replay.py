"""A buffer of judged responses for losses that may learn from any policy's samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from windkern._checks import check_count, check_number
from windkern.train.groups import Group
from windkern.train.seeds import stream


class Replayed(NamedTuple):
    """One judged response."""

    prompt: int  # place in the list of training prompts
    tokens: tuple[int, ...]  # tokens of the completion, with its end token if it has one
    score: float  # what draws may favour: its reward or win rate
    constants: tuple[tuple[str, float], ...]  # what the loss takes besides the policy's log-prob, by name
    truncated: bool  # it reached the length limit
    text: str
    iteration: int  # the iteration whose policy sampled it


class ReplayBuffer:
    """Keeps the newest distinct responses to each prompt and draws groups of them.

    Each prompt has a buffer of its own: a response with the same tokens replaces the older one, and the newest
    `capacity` responses stay. A group is a list of responses to one prompt.

    Args:
        capacity: responses kept for a prompt, at least 2.
        on_policy_prob: chance that a group is drawn from the newest iteration, in [0, 1].
        inverse_temperature: preference of the other groups for high scores, per unit of score; 0 for none.
        seed: seed of the draws.

    Raises:
        TypeError, ValueError: a number is out of range.

    Memory:
        About 36 bytes per token (a Python int in a tuple), on the host; nothing on the device.

    Source:
        Bartoldson et al. 2025, TBA (arXiv 2503.18929).

    Example:
        >>> buffer = ReplayBuffer(8, on_policy_prob=0.5, inverse_temperature=1.0, seed=0)
        >>> buffer.add(Replayed(7, (k, 1), float(k), (), False, "", iteration=1) for k in range(4))
        >>> [[entry.tokens for entry in group] for group in buffer.draw(iteration=1, groups=2, size=2)]
        [[(0, 1), (1, 1)], [(3, 1), (2, 1)]]
    """

    def __init__(self, capacity: int, *, on_policy_prob: float, inverse_temperature: float, seed: int):
        self.capacity = check_count("capacity", capacity, least=2)
        self.on_policy_prob = check_number("on_policy_prob", on_policy_prob, least=0)
        if on_policy_prob > 1:
            raise ValueError(f"on_policy_prob must be at most 1, got {on_policy_prob!r}")
        self.inverse_temperature = check_number("inverse_temperature", inverse_temperature, least=0)
        self.seed = check_count("seed", seed)
        self._held: dict[int, dict[tuple[int, ...], Replayed]] = {}  # by prompt and tokens, oldest first
        self._newest = 0  # iteration

    def __len__(self) -> int:
        """Return the number of responses kept, over all prompts."""
        return sum(len(held) for held in self._held.values())

    def add(self, entries: Iterable[Replayed]) -> None:
        """Add responses, in the order of their iterations. Adding the same ones again rebuilds the same buffer.

        Raises:
            TypeError: `tokens` is not a tuple.
            ValueError: a score or constant is not finite, or an iteration is older than what is kept. Nothing is added
                then.
        """
        entries, newest = list(entries), self._newest
        for entry in entries:
            if not isinstance(entry.tokens, tuple):
                raise TypeError(f"tokens must be a tuple of integers, got {type(entry.tokens).__name__}")
            for name, value in (("score", entry.score), *entry.constants):
                if not math.isfinite(value):
                    raise ValueError(f"{name} must be finite, got {value} for prompt {entry.prompt}")
            check_count("iteration", entry.iteration, least=1)
            if entry.iteration < newest:
                raise ValueError(
                    f"entries must be added in the order of their iterations, got {entry.iteration} after {newest}"
                )
            newest = entry.iteration
        self._newest = newest
        for entry in entries:
            held = self._held.setdefault(entry.prompt, {})
            held.pop(entry.tokens, None)  # a repeated response becomes the newest
            held[entry.tokens] = entry
            if len(held) > self.capacity:
                del held[next(iter(held))]

    def remember(self, iteration: int, groups: Sequence[Group], target: str) -> None:
        """Add the responses of an iteration's groups; see `add`.

        Args:
            iteration: the iteration that sampled them.
            groups: with all (K,) constants of the loss.
            target: which of these constants is the score.
        """
        self.add(entry for group in groups for entry in _entries(group, iteration, target))

    def draw(self, iteration: int, groups: int, size: int) -> list[list[Replayed]]:
        """Draw groups of distinct responses, each to one prompt.

        With probability `on_policy_prob` a group's prompt is one with at least `size` distinct responses of
        `iteration`, and its responses are drawn uniformly from these. Such prompts come in shuffled order, each once
        before any comes again. Otherwise, or where there is none, the prompt is any with at least `size` responses, and
        they are drawn one after the other without replacement, each with probability proportional to
        exp(inverse_temperature * score) among those left (so the chance to be in the group is not proportional to it
        unless `size` is small). A later group may have the same prompt again.

        Args:
            iteration: the newest one added; its number also seeds the draw.
            groups: number of groups, at least 1.
            size: responses in each, at least 2.

        Raises:
            TypeError, ValueError: an argument is out of range; no prompt has `size` responses; the buffer holds
                responses newer than `iteration`, which a run at that point could not have drawn.
        """
        check_count("iteration", iteration, least=1)
        check_count("groups", groups, least=1)
        check_count("size", size, least=2)
        if self._newest > iteration:
            raise ValueError(f"iteration must be at least {self._newest}, the newest in the buffer, got {iteration}")
        everything = {prompt: list(held.values()) for prompt, held in sorted(self._held.items())}
        seen = {prompt: held for prompt, held in everything.items() if len(held) >= size}
        if not seen:
            largest = max(map(len, everything.values()), default=0)
            raise ValueError(f"size must be at most {largest}, the most responses kept for a prompt, got {size}")
        fresh = {prompt: [entry for entry in held if entry.iteration == iteration] for prompt, held in seen.items()}
        fresh = {prompt: held for prompt, held in fresh.items() if len(held) >= size}
        generator = torch.Generator().manual_seed(stream(self.seed, "replay", iteration))
        everybody, drawn = list(seen), []
        waiting: list[int] = []
        for _ in range(groups):
            on_policy = float(torch.rand((), generator=generator, dtype=torch.float64)) < self.on_policy_prob
            if on_policy and fresh:
                if not waiting:
                    waiting = _shuffled(list(fresh), generator)
                held = fresh[waiting.pop()]
                scores = torch.zeros(len(held), dtype=torch.float64)
            else:
                held = seen[everybody[int(torch.randint(len(everybody), (), generator=generator))]]
                scores = torch.tensor([entry.score for entry in held], dtype=torch.float64)
                scores = self.inverse_temperature * scores
            drawn.append([held[k] for k in _without_replacement(scores, size, generator)])
        return drawn


def replayed_groups(
    drawn: Sequence[Sequence[Replayed]], prompt_ids: Mapping[int, tuple[int, ...]], *, mask_truncated: bool
) -> list[Group]:
    """Make groups to fit from what `ReplayBuffer.draw` returns.

    Args:
        drawn: groups of responses, each to one prompt.
        prompt_ids: token ids of the prompts, by their places.
        mask_truncated: whether responses without an end token are left out of the fit.
    """
    found = []
    for entries in drawn:
        rows = [dict(entry.constants) for entry in entries]
        constants = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        if mask_truncated:
            constants["where"] = torch.tensor([not entry.truncated for entry in entries])
        found.append(
            Group(
                place=entries[0].prompt,
                prompt_ids=prompt_ids[entries[0].prompt],
                completions=tuple(entry.tokens for entry in entries),
                truncated=tuple(entry.truncated for entry in entries),
                texts=tuple(entry.text for entry in entries),
                constants=constants,
            )
        )
    return found


def _entries(group: Group, iteration: int, target: str) -> list[Replayed]:
    """Return the responses of a group, each with its constants; `where` is left out, since `truncated` implies it."""
    names = [name for name in group.constants if name != "where"]
    rows = zip(*(group.constants[name].tolist() for name in names), strict=True)
    return [
        Replayed(
            prompt=group.place,
            tokens=tokens,
            score=dict(constants)[target],
            constants=constants,
            truncated=truncated,
            text=text,
            iteration=iteration,
        )
        for tokens, constants, truncated, text in zip(
            group.completions,
            (tuple(zip(names, row, strict=True)) for row in rows),
            group.truncated,
            group.texts,
            strict=True,
        )
    ]


def _without_replacement(scores: Tensor, size: int, generator: torch.Generator) -> list[int]:
    """Draw places in turn from softmax(scores) over those left: the largest of scores + Gumbel noise, in order."""
    noise = -torch.empty_like(scores).exponential_(generator=generator).log()
    return (scores + noise).topk(size).indices.tolist()


def _shuffled(items: list[int], generator: torch.Generator) -> list[int]:
    return [items[k] for k in torch.randperm(len(items), generator=generator).tolist()]
