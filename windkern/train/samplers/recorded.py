"""Make completions from texts or token ids, either recorded or written by a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from windkern._checks import check_count
from windkern.train.data.loading import encode_prompts, opened_prompts, padding_id
from windkern.train.data.prompts import loosely
from windkern.train.data.records import load_records
from windkern.train.data.turns import encode_responses, response_texts, turn_of
from windkern.train.samplers.sampler import Completions
from windkern.train.seeds import generator


def completions_of_texts(
    tokenizer: Any,
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    *,
    system: str | None = None,
    max_completion_length: int | None = None,
    truncated: Sequence[Sequence[bool]] | None = None,
) -> Completions:
    """Return prompts and responses as token ids with masks, as `TransformersSampler` returns its own.

    Each response is encoded as it follows its prompt, nothing is stripped from it, and it ends as the chat template
    ends a turn, or with the tokenizer's end token where there is no template, unless it was truncated. A text can have
    several encodings; the one used here is the tokenizer's, which need not be the one a server drew, so its log-prob
    can differ a little from the server's: `completions_of_ids` takes the tokens themselves.

    Args:
        tokenizer: tokenizer of the policy.
        prompts: B prompts.
        texts: B times N responses.
        system: system message for the chat template, None for the template's own.
        max_completion_length: longest response, end token included; longer ones are cut and count as truncated.
        truncated: B times N, whether each response was cut off when it was made; None: none was.

    Raises:
        ValueError: no prompts, groups of different sizes, an empty response, or a tokenizer without an end token.

    Example:
        >>> completions_of_texts(None, ["a"], [["x"], ["y"]])
        Traceback (most recent call last):
        ValueError: texts must have one group of responses for each of 1 prompts, got 2
    """
    count = _group_size("texts", prompts, texts)
    opened = opened_prompts(tokenizer, prompts, system=system)
    flat = [text for group in texts for text in group]
    behind = [prompt for prompt in opened for _ in range(count)]
    turn = turn_of(tokenizer)
    if turn.end is None:
        raise ValueError("the tokenizer names no end token (eos_token_id), and its chat template has none either")
    rows = encode_responses(tokenizer, turn, behind, flat)
    cut = [False] * len(rows) if truncated is None else [bool(each) for group in truncated for each in group]
    for k, row in enumerate(rows):
        if cut[k] and not row:
            raise ValueError(f"a truncated response to {prompts[k // count]!r} encodes to no tokens: {flat[k]!r}")
        if not cut[k] and not set(row) & set(turn.ends):
            rows[k] = [*row, turn.end]
    groups = [rows[first : first + count] for first in range(0, len(rows), count)]
    return completions_of_ids(
        tokenizer,
        prompts,
        groups,
        system=system,
        max_completion_length=max_completion_length,
        truncated=[cut[first : first + count] for first in range(0, len(cut), count)],
    )


def completions_of_ids(
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[Sequence[Sequence[int]]],
    *,
    system: str | None = None,
    max_completion_length: int | None = None,
    truncated: Sequence[Sequence[bool]] | None = None,
) -> Completions:
    """Return what `completions_of_texts` returns, for responses whose tokens are known.

    A response ends with its first end token, and nothing is appended to one that has none. The texts are those of the
    tokens that are kept.

    Args:
        tokenizer, prompts, system, max_completion_length: as `completions_of_texts`.
        responses: B times N lists of token ids, as they were drawn, the end token included.
        truncated: B times N, whether each response was cut off when it was made; None: those without an end token.

    Raises:
        ValueError: no prompts, groups of different sizes, an empty response, or an id that is not the tokenizer's.

    Example:
        >>> completions_of_ids(None, ["a"], [[[1]], [[2]]])
        Traceback (most recent call last):
        ValueError: responses must have one group of responses for each of 1 prompts, got 2
    """
    count = _group_size("responses", prompts, responses)
    turn, known = turn_of(tokenizer), len(tokenizer)
    encoded = encode_prompts(tokenizer, prompts, system=system)
    rows = [list(row) for group in responses for row in group]
    cut = [True] * len(rows) if truncated is None else [bool(each) for group in truncated for each in group]
    for k, row in enumerate(rows):
        if strange := [token for token in row if not 0 <= token < known]:
            raise ValueError(f"responses must hold ids below the tokenizer's {known}, got {strange[0]}")
        if not row:
            raise ValueError(f"a response to {prompts[k // count]!r} must have tokens, got none")
        stop = next((place for place, token in enumerate(row) if token in turn.ends), None)
        if stop is not None:
            row, cut[k] = row[: stop + 1], False
        if max_completion_length is not None and len(row) > max_completion_length:
            row, cut[k] = row[:max_completion_length], True
        rows[k] = row
    width = max(map(len, rows))
    tokens = torch.tensor([row + [padding_id(tokenizer)] * (width - len(row)) for row in rows])
    own = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    ids, mask = (each.repeat_interleave(count, 0) for each in encoded)
    asked = [row[seen.bool()].tolist() for row, seen in zip(*encoded, strict=True)]
    groups = [rows[first : first + count] for first in range(0, len(rows), count)]
    return Completions(
        input_ids=torch.cat([ids, tokens], 1),
        attention_mask=torch.cat([mask.bool(), own], 1),
        completion_mask=torch.cat([torch.zeros_like(mask, dtype=torch.bool), own], 1),
        truncated=torch.tensor(cut),
        texts=response_texts(tokenizer, turn, asked, groups),
    )


def _group_size(name: str, prompts: Sequence[str], groups: Sequence[Sequence]) -> int:
    """Return N, which must be the same for every prompt."""
    if len(groups) != len(prompts):
        raise ValueError(
            f"{name} must have one group of responses for each of {len(prompts)} prompts, got {len(groups)}"
        )
    counts = {len(group) for group in groups}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"every prompt must have the same number of responses, at least one, got {sorted(counts)}")
    return counts.pop()


class RecordedSampler:
    """Answers prompts with recorded responses: for offline runs, and for responses of models that cannot run here.

    A prompt is found as it was recorded, else by its text without the space around it.

    Args:
        path: JSON lines, see `windkern.train.data.records.load_records`; a prompt may have several lines.
        tokenizer: tokenizer of the policy whose log-probs are fitted.
        max_completion_length: longest response, end token included; None for no limit.
        system: system message for the chat template, None for the template's own.

    Raises:
        FileNotFoundError, ValueError: the file does not exist or a line is wrong; when sampling, a prompt is not in
            the file or has fewer responses than are wanted.
    """

    def __init__(
        self, path: str | Path, tokenizer: Any, *, max_completion_length: int | None = None, system: str | None = None
    ):
        self.path, self.tokenizer, self.system = Path(path), tokenizer, system
        self.max_completion_length = (
            None
            if max_completion_length is None
            else check_count("max_completion_length", max_completion_length, least=1)
        )
        self._responses: dict[str, list[tuple[str, bool]]] = {}  # texts, and whether they were truncated
        self._loosely: dict[str, list[tuple[str, bool]]] = {}  # the same, by prompts without the space around them
        for record in load_records(path):
            cut = record.truncated or (False,) * len(record.responses)
            responses = list(zip(record.responses, cut, strict=True))
            self._responses.setdefault(str(record.prompt), []).extend(responses)
            self._loosely.setdefault(loosely(record.prompt), []).extend(responses)

    repeats_because = "the file has only one distinct response to each"

    def sample(self, prompts: Sequence[str], num_generations: int, seed: int) -> Completions:
        """Draw `num_generations` of the responses recorded for each prompt, without replacement."""
        check_count("num_generations", num_generations, least=1)
        return self._completions(prompts, [self._choose(prompt, num_generations, seed) for prompt in prompts])

    def everything(self, prompt: str) -> Completions:
        """Return all responses recorded for a prompt.

        Raises:
            ValueError: there are none.
        """
        return self._completions([prompt], [self._choose(prompt, max(1, len(self._found(prompt))), 0)])

    def _completions(self, prompts: Sequence[str], chosen: Sequence[Sequence[tuple[str, bool]]]) -> Completions:
        return completions_of_texts(
            self.tokenizer,
            prompts,
            [[text for text, _ in group] for group in chosen],
            system=self.system,
            max_completion_length=self.max_completion_length,
            truncated=[[cut for _, cut in group] for group in chosen],
        )

    def _found(self, prompt: str) -> list[tuple[str, bool]]:
        return self._responses.get(str(prompt)) or self._loosely.get(loosely(prompt), [])

    def _choose(self, prompt: str, count: int, seed: int) -> list[tuple[str, bool]]:
        found = self._found(prompt)
        if len(found) < count:
            raise ValueError(f"{self.path} has {len(found)} responses to {prompt!r}, but {count} are wanted")
        order = torch.randperm(len(found), generator=generator(seed, prompt))
        return [found[k] for k in order[:count].tolist()]
