"""The reference games of the tabular tests, and random ones for the property tests."""

from __future__ import annotations

import functools

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from windkern.tabular import Game

CONTEXTS, RESPONSES = 20, 100


@functools.cache
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Return (ref, rewards) of CB-1: 20 contexts, 100 responses, standard normal rewards and reference logits."""
    generator = np.random.default_rng(0)
    rewards = generator.standard_normal((CONTEXTS, RESPONSES))
    logits = generator.standard_normal((CONTEXTS, RESPONSES))
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), rewards


@functools.cache
def reference_game(link: str = "step", beta: float = 0.1) -> Game:
    """Return CB-1 (link "step") or CB-1b ("bradley_terry")."""
    ref, rewards = drawn()
    return Game(ref, beta, rewards=rewards, link=link)


def rock_paper_scissors(size: int) -> Tensor:
    """Return preferences (size, size): each response always beats the next (size - 1)/2 around the circle."""
    ahead = (torch.arange(size)[None, :] - torch.arange(size)[:, None]) % size
    return torch.where(ahead == 0, 0.5, (ahead <= (size - 1) // 2).double())


@functools.cache
def near_cyclic_game(beta: float = 0.05) -> Game:
    """Return CB-2: 100 of 101 responses of a cycle, on the reference of CB-1."""
    prefs = rock_paper_scissors(RESPONSES + 1)[:RESPONSES, :RESPONSES]
    return Game(drawn()[0], beta, prefs=prefs.expand(CONTEXTS, RESPONSES, RESPONSES))


KINDS = ("random", "certain", "cycle", "bradley_terry", "step")


@st.composite
def games(draw, kinds: tuple[str, ...] = KINDS, betas: tuple[float, float] = (0.05, 2.0)) -> Game:
    """Draw games of up to 3 contexts and 9 responses with random, hard, cyclic and transitive preferences."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    contexts, responses = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    beta, kind = draw(st.floats(*betas)), draw(st.sampled_from(kinds))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind == "cycle":
        responses = 2 * (responses // 2) + 1
        prefs = rock_paper_scissors(responses).expand(contexts, responses, responses)
    elif kind in ("random", "certain"):
        scale = 2.0 if kind == "random" else 1e6
        upper = (scale * normal(contexts, responses, responses)).sigmoid().triu(1)
        prefs = upper + (torch.ones_like(upper).triu(1) - upper).mT + 0.5 * torch.eye(responses, dtype=torch.float64)
    ref = normal(contexts, responses).softmax(-1)
    if kind in ("bradley_terry", "step"):
        return Game(ref, beta, rewards=normal(contexts, responses), link=kind)
    return Game(ref, beta, prefs=prefs)


def policies(game: Game, seed: int, count: int = 1) -> list[Tensor]:
    """Draw random policies of the game, some of them far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(*game.shape, generator=generator, dtype=torch.float64)).softmax(-1) for _ in range(count)]
