"""Compare responses to a prompt: the protocol of judges, and judges made from reward functions."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from windkern._checks import check_number
from windkern.train.data.prompts import shown
from windkern.train.models import require

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


class Verdict(NamedTuple):
    """A judge's verdict on B prompts with N responses each."""

    prefs: Tensor  # (B, N, N) float32, prefs[b, i, j] = chance that response i beats response j
    rewards: Tensor | None  # (B, N) float32, if the judge has them


class Judge(Protocol):
    """Anything that compares responses."""

    name: str  # shown in reports

    def judge(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> Verdict:
        """Compare all N responses to each of B prompts with one another.

        In an evaluation, the policy's responses come first, then the reference's.
        """
        ...


def as_judge(judge: Any, strength: float) -> Judge:
    """Return a judge; a callable (prompts, responses) -> rewards becomes `RewardJudge(judge, strength=strength)`.

    Raises:
        TypeError: `judge` is neither.

    Example:
        >>> as_judge(lambda prompts, responses: [len(text) for text in responses], 2.0).strength
        2.0
        >>> as_judge(3, 1.0)
        Traceback (most recent call last):
        TypeError: judge must be a judge (a method judge and a name) or a callable that returns rewards, got int
    """
    if callable(getattr(judge, "judge", None)) and isinstance(getattr(judge, "name", None), str):
        return judge
    if callable(judge):
        return RewardJudge(judge, strength=strength)
    raise TypeError(
        "judge must be a judge (a method judge and a name) or a callable that returns rewards, "
        f"got {type(judge).__name__}"
    )


class JudgeError(ValueError):
    """A judge failed; the message says which, and how."""


def ask(judge: Judge, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> Verdict:
    """Return a judge's verdict, with errors that name the judge.

    Raises:
        JudgeError: the judge raised an error that does not name it.
    """
    try:
        return judge.judge(prompts, responses)
    except Exception as error:
        if isinstance(error, (ValueError, OSError)) and repr(judge.name) in str(error):
            raise
        raise JudgeError(f"judge {judge.name!r} failed: {type(error).__name__}: {error}") from error


def bradley_terry(rewards: Tensor, strength: float) -> Tensor:
    """Return prefs (..., N, N) from rewards (..., N): P_ij = sigmoid(strength * (r_i - r_j)).

    Example:
        >>> bradley_terry(torch.tensor([1.0, 0.0]), 4.0)[0]
        tensor([0.5000, 0.9820])
    """
    return torch.sigmoid(strength * (rewards[..., :, None] - rewards[..., None, :]))


def group_size(prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> int:
    """Return N, the number of responses to each of B prompts; 0 where there is no prompt.

    Raises:
        ValueError: there is not one group for each prompt, or groups differ in size.
        TypeError: a group is a string, whose letters would be judged as responses.

    Example:
        >>> group_size(["a", "b"], [["x"], ["y", "z"]])
        Traceback (most recent call last):
        ValueError: responses must hold equally many responses to each prompt, got 1 and 2
    """
    if len(responses) != len(prompts):
        raise ValueError(f"responses must hold one group for each of {len(prompts)} prompts, got {len(responses)}")
    if any(isinstance(group, str) for group in responses):
        raise TypeError("responses must hold a list of responses for each prompt, got a string")
    sizes = sorted({len(group) for group in responses})
    if len(sizes) > 1:
        raise ValueError(
            f"responses must hold equally many responses to each prompt, got {' and '.join(map(str, sizes))}"
        )
    return sizes[0] if sizes else 0


class RewardJudge:
    """A judge made from a reward function and the Bradley-Terry link.

        P_ij = sigmoid(strength * (r_i - r_j))

    Args:
        reward: called as reward(prompts, responses) on two lists of S strings, one prompt for each response; returns
            S numbers.
        strength: strength of the link, per unit of reward; positive.
        name: shown in reports.

    Raises:
        ValueError: `strength` is not positive. When judging: the groups differ in size, or the reward function returned
            a wrong number of values, or one that is not finite.

    Example:
        >>> judge = RewardJudge(lambda prompts, responses: [len(text) for text in responses], strength=1.0)
        >>> judge.judge(["hi"], [["a", "abc"]]).rewards
        tensor([[1., 3.]])
    """

    def __init__(self, reward: RewardFunction, *, strength: float, name: str | None = None):
        self.reward = reward
        self.strength = check_number("strength", strength, above=0)
        self.name = name or str(getattr(reward, "__name__", type(reward).__name__))

    def judge(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> Verdict:
        count = group_size(prompts, responses)
        flat_prompts = [prompt for prompt, group in zip(prompts, responses, strict=True) for _ in group]
        flat = [text for group in responses for text in group]
        found = self.reward(flat_prompts, flat)
        try:
            # Reason: a reward model that was not read under no_grad would make preferences that want a gradient.
            found = found.detach() if isinstance(found, Tensor) else list(found)
            values = torch.as_tensor(found, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"reward {self.name!r} must return a list of numbers, one for each of {len(flat)} responses, "
                f"got {shown(found)}"
            ) from error
        if values.shape != (len(flat),):
            raise ValueError(
                f"reward {self.name!r} must return one number for each of {len(flat)} responses, "
                f"got shape {tuple(values.shape)}"
            )
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite()).nonzero()[0])
            raise ValueError(
                f"reward {self.name!r} must return finite numbers, got {float(values[bad])} for {flat[bad]!r}"
            )
        rewards = values.view(len(prompts), count)
        return Verdict(bradley_terry(rewards, self.strength), rewards)


@contextlib.contextmanager
def _current_directory() -> Iterator[None]:
    """Make imports search the current directory, which those of an installed command do not."""
    here = os.getcwd()
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def load_function(name: str) -> Callable:
    """Return the object that `module:attribute` names, for judges given on a command line.

    Modules of the current directory are found too, after all others.

    Raises:
        ValueError: `name` has another form, or names no module, attribute or callable, or the code of the module
            fails; the message says which.

    Example:
        >>> load_function("math:sqrt")(4)
        2.0
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"expected module:function, got {name!r}")
    try:
        with _current_directory():
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"cannot import {module_name!r} of {name!r}: {error}; modules are searched for where Python does and in "
            f"{os.getcwd()}"
        ) from error
    except (Exception, SystemExit) as error:  # the module's own, and whatever its code can raise
        raise ValueError(
            f"judge {name!r}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    function: Any = module
    for part in attribute.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise ValueError(f"module {module_name!r} has no function {attribute!r}")
    return function


def repeated_share(text: str) -> float:
    """Return the share of three-word sequences that occurred earlier in the text: 0 for prose, near 1 for a loop.

    Example:
        >>> repeated_share("one two three four"), repeated_share("la la la la la la")
        (0.0, 0.75)
    """
    words = re.findall(r"[\w']+", text.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


@functools.cache
def _analyzer():
    require("vaderSentiment")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return how positive each response sounds, minus the share of it that is repetition: numbers in [-2, 1].

        reward = VADER compound score of the words - repeated_share(response)

    Capitals, exclamation marks, emoticons and emoji, all of which VADER counts, are removed first: only words
    count. The prompts do not matter.

    Raises:
        MissingPackageError: vaderSentiment is not installed.

    Source:
        Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
    """
    plain = (re.sub(r"[^\w\s',.;-]", " ", text).lower() for text in responses)
    return [
        _analyzer().polarity_scores(words)["compound"] - repeated_share(text)
        for words, text in zip(plain, responses, strict=True)
    ]


def vader_judge(strength: float) -> RewardJudge:
    """Return the judge of the demo: the more positive response is the likelier winner."""
    return RewardJudge(vader_reward, strength=strength, name="VADER sentiment without repetition")
