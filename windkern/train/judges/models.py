"""Judges made from classification models: a reward model, and a model that compares two responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from windkern._checks import check_count
from windkern.train.data.prompts import as_messages, render
from windkern.train.judges.classifiers import Classifier
from windkern.train.judges.judge import Verdict, group_size

PreferenceFunction = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[float]]
TEMPLATE = "{prompt}\n\nResponse A:\n{first}\n\nResponse B:\n{second}\n\nWhich is better?"


class ModelReward:
    """A reward function made from a reward model, for `RewardJudge(ModelReward(...), strength=1.0)`.

        reward = logit of the one label, or of `label` where there are several

    With a chat template, prompt and response become a user's and an assistant's turn; the messages of a `ChatPrompt`
    are kept. Without a template, prompt and response are a pair of texts, joined as the tokenizer joins pairs. A model
    trained with the Bradley-Terry likelihood has strength 1.

    Args:
        model, tokenizer, batch_size, max_length: see `Classifier`.
        label: index of the logit that is the reward; needed where the model has more than one.

    Raises:
        ValueError: as `Classifier`; the model has several labels and `label` is None, or it has no such label.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        label: int | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
    ):
        self.classifier = Classifier(model, tokenizer, batch_size=batch_size, max_length=max_length)
        labels = self.classifier.num_labels
        if label is None and labels != 1:
            names = [model.config.id2label[k] for k in range(labels)]
            raise ValueError(
                f"label must say which of the model's {labels} labels {names} is the reward (in a settings file "
                "judge_settings: {label: NUMBER})"
            )
        self.label = check_count("label", label or 0)
        if self.label >= labels:
            raise ValueError(f"label must be below the model's {labels} labels, got {label}")

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        tokenizer, encode = self.classifier.tokenizer, self.classifier.encode
        if tokenizer.chat_template is None:
            encoded = [encode(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
        else:
            turns = (
                [*as_messages(prompt), {"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, responses, strict=True)
            )
            # Reason: the template has added the special tokens.
            encoded = [encode(render(tokenizer, turn, open_turn=False), special=False) for turn in turns]
        return self.classifier(encoded)[:, self.label].tolist()


class ModelPreference:
    """A preference function made from a cross-encoder that reads a prompt and two responses, for `PairJudge`.

        P(first beats second) = sigmoid(logit)            one label
        P(first beats second) = softmax(logits)[label]    several

    Args:
        model, tokenizer, batch_size, max_length: see `Classifier`.
        template: text with {prompt}, {first} and {second}.
        label: index of the label that says the first is better.

    Raises:
        ValueError: as `Classifier`; the template lacks a field, or the model has no such label.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: str = TEMPLATE,
        label: int = 0,
        batch_size: int = 16,
        max_length: int | None = None,
    ):
        self.classifier = Classifier(model, tokenizer, batch_size=batch_size, max_length=max_length)
        if missing := [name for name in ("prompt", "first", "second") if "{" + name + "}" not in template]:
            raise ValueError(f"template must hold {{prompt}}, {{first}} and {{second}}, but lacks {missing}")
        self.template = template
        self.label = check_count("label", label)
        if self.label >= self.classifier.num_labels:
            raise ValueError(f"label must be below the model's {self.classifier.num_labels} labels, got {label}")

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
        texts = [
            filled(self.template, {"{prompt}": prompt, "{first}": first, "{second}": second})
            for prompt, first, second in zip(prompts, firsts, seconds, strict=True)
        ]
        logits = self.classifier([self.classifier.encode(text) for text in texts])
        one = self.classifier.num_labels == 1
        return (logits[:, 0].sigmoid() if one else logits.softmax(-1)[:, self.label]).tolist()


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Return a template with its fields replaced by texts; braces in the texts are left alone.

    Example:
        >>> filled("{first}|{second}", {"{first}": "{second}", "{second}": "x"})
        '{second}|x'
    """
    return "".join(parts.get(piece, piece) for piece in _pieces(template, tuple(parts)))


def _pieces(template: str, fields: Sequence[str]) -> Iterator[str]:
    """Split the template at its fields."""
    while template:
        found = [(template.index(name), name) for name in fields if name in template]
        if not found:
            yield template
            return
        place, name = min(found)
        yield template[:place]
        yield name
        template = template[place + len(name) :]


class PairJudge:
    """A judge made from a function that compares two responses, asked in both orders.

        P <- (P + 1 - P^T) / 2,    P_ii = 1/2

    so that a preference for the first place, which such models have, cancels and prefs + prefs^T = 1.

    Args:
        prefer: called as prefer(prompts, firsts, seconds) on three lists of strings; returns, for each entry, the
            chance in [0, 1] that the first beats the second. It is called once, with all N (N - 1) ordered pairs of
            every prompt.
        name: shown in reports.

    Raises:
        ValueError: when judging, groups differ in size, or the function returned a wrong number of values, or one
            outside [0, 1].

    Example:
        >>> judge = PairJudge(lambda prompts, firsts, seconds: [0.8] * len(firsts), name="prefers the first place")
        >>> judge.judge(["hi"], [["a", "b"]]).prefs.tolist()
        [[[0.5, 0.5], [0.5, 0.5]]]
    """

    def __init__(self, prefer: PreferenceFunction, *, name: str | None = None):
        self.prefer = prefer
        self.name = name or str(getattr(prefer, "__name__", type(prefer).__name__))

    def judge(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> Verdict:
        count = group_size(prompts, responses)
        pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
        asked = [
            (prompt, group[i], group[j]) for prompt, group in zip(prompts, responses, strict=True) for i, j in pairs
        ]
        if not asked:  # no prompt, or a single response to each
            return Verdict(torch.full((len(prompts), count, count), 0.5), None)
        values = torch.as_tensor(list(self.prefer(*map(list, zip(*asked, strict=True)))), dtype=torch.float64)
        if values.shape != (len(asked),):
            raise ValueError(
                f"preference {self.name!r} must return one number for each of {len(asked)} ordered pairs, "
                f"got shape {tuple(values.shape)}"
            )
        if not bool(((values >= 0) & (values <= 1)).all()):
            bad = int((~((values >= 0) & (values <= 1))).nonzero()[0])
            raise ValueError(f"preference {self.name!r} must return chances in [0, 1], got {float(values[bad])}")
        raw = torch.full((len(prompts), count, count), 0.5, dtype=torch.float64)
        rows, columns = (list(each) for each in zip(*pairs, strict=True))
        raw[:, rows, columns] = values.view(len(prompts), len(pairs))
        return Verdict(((raw + 1 - raw.mT) / 2).float(), None)
