"""Warnings about the responses of a run: a server that decodes greedily, and one that keeps its weights."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from completion_server import Server
from tiny_model import make_tokenizer
from trainer_cases import make_trainer

from windkern.losses import LOSSES
from windkern.train.data.datasets import PromptSets
from windkern.train.groups import Group
from windkern.train.report.notices import Notices
from windkern.train.responder import Responder
from windkern.train.samplers.openai import OpenAISampler

STALE = "never given the new weights"
SAME = "are identical"


class Reader:
    """An observer that keeps the notices it receives."""

    def __init__(self, said: list[str]):
        self.note = said.append


def responder(sampler=None, group="samples", **config) -> tuple[Responder, list[str]]:
    said: list[str] = []
    settings = SimpleNamespace(
        **{"reference": "model", "num_iterations": 3, "loss": "wind", "num_generations": 2} | config
    )
    settings.entry = LOSSES[settings.loss]
    prompts, policy = PromptSets(["p"], [], []), SimpleNamespace(model="weights")
    return Responder(settings, group, prompts, policy, sampler, Notices(Reader(said))), said


def rollout(*completions) -> Group:
    return Group(0, (1,), completions, (False,) * len(completions), ("",) * len(completions))


def openai_sampler(cls=OpenAISampler) -> OpenAISampler:
    return cls("http://127.0.0.1:1/v1", "m", make_tokenizer(), max_completion_length=4)


def test_a_server_that_keeps_its_weights_is_said_once():
    found, said = responder(openai_sampler())
    found.update()
    found.update()
    assert len(said) == 1 and STALE in said[0] and "http://127.0.0.1:1/v1" in said[0]
    assert "from iteration 2 on" in said[0] and "no importance weight" in said[0]
    other, said = responder(openai_sampler(), loss="trajectory_balance")
    other.update()
    assert "responses of any policy" in said[0] and "no importance weight" not in said[0]


def test_a_server_that_follows_or_need_not_is_not_said():
    class Following(OpenAISampler):
        seen = ()

        def update(self, model):
            self.seen = (*self.seen, model)

    follows, said = responder(openai_sampler(Following))
    follows.update()
    assert follows.sampler.seen == ("weights",) and not said
    for sampler, iterations in ((openai_sampler(), 1), (None, 3)):
        once, said = responder(sampler, num_iterations=iterations)
        once.update()
        assert not said


def test_identical_responses_of_a_whole_iteration_are_said_once():
    same, different = rollout((5, 1), (5, 1)), rollout((5, 1), (6, 1))
    for sampler, cause in ((openai_sampler(), "server decodes greedily"), (None, "temperature or top_p is too low")):
        found, said = responder(sampler)
        found.look_at([same, different])
        found.look_at([rollout((5, 1))])  # nothing to compare
        assert not said
        found.look_at([same, same])
        found.look_at([same])
        assert len(said) == 1 and "each of the iteration's 2 prompts are identical" in said[0] and cause in said[0]
    shown, said = responder(None, group="demonstration")
    shown.look_at([same])  # the policy has learnt its demonstration
    assert not said


@pytest.mark.parametrize("content", ["good day", None])
def test_a_run_with_a_greedy_server_says_both(tmp_path, content):
    """With None, the server answers as it should."""
    choice = {"message": {"content": content}, "finish_reason": "stop"}
    server = Server(reply=lambda body: content and (200, json.dumps({"choices": [choice] * body["n"]}), {}))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(tmp_path, sampler=f"openai:{server.url}", save_strategy="no").train()
    finally:
        server.close()
    texts = [str(each.message) for each in caught]
    assert sum(STALE in text for text in texts) == 1
    assert sum(SAME in text for text in texts) == (content is not None)
