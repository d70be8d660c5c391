"""Completions made of texts: those somebody recorded, or those a server wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from windkern._checks import check_count
from windkern.train.data import encode_prompts
from windkern.train.records import load_records
from windkern.train.sampler import Completions
from windkern.train.seeds import generator


def completions_of_texts(
    tokenizer,
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    *,
    system: str | None = None,
    max_new_tokens: int | None = None,
    truncated: Sequence[Sequence[bool]] | None = None,
) -> Completions:
    """Return prompts and responses as token ids with masks, as `TransformersSampler` returns its own.

    Each response is encoded by itself, behind the opened turn, and ends with the tokenizer's end token, unless it was
    truncated. A text can have several encodings; the one used here is the tokenizer's, which need not be the one a
    server drew, so its log-prob can differ a little from the server's.

    Args:
        tokenizer: of the policy.
        prompts: B.
        texts: B times N responses.
        system: system message for the chat template, None for the template's own.
        max_new_tokens: longest response, end token included; longer ones are cut and count as truncated.
        truncated: B times N, responses that were cut off where they were made; None says none was.

    Raises:
        ValueError: no prompts, groups of different sizes, an empty response, or a tokenizer without an end token.

    Example:
        >>> completions_of_texts(None, ["a"], [["x"], ["y"]])
        Traceback (most recent call last):
        ValueError: texts must have one group of responses for each of 1 prompts, got 2
    """
    if len(texts) != len(prompts):
        raise ValueError(f"texts must have one group of responses for each of {len(prompts)} prompts, got {len(texts)}")
    counts = {len(group) for group in texts}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"every prompt must have the same number of responses, at least one, got {sorted(counts)}")
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer names no end token (eos_token_id)")
    (count,) = counts
    opened = encode_prompts(tokenizer, prompts, system=system)
    flat = [text.strip() for group in texts for text in group]
    cut = [False] * len(flat) if truncated is None else [bool(each) for group in truncated for each in group]
    rows = tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else []
    rows = [row if short else [*row, end] for row, short in zip(rows, cut, strict=True)]
    for k, row in enumerate(rows):
        if not row:
            raise ValueError(f"a truncated response to {prompts[k // count]!r} encodes to no tokens: {flat[k]!r}")
        if max_new_tokens is not None and len(row) > max_new_tokens:
            rows[k], cut[k] = row[:max_new_tokens], True
    width = max(map(len, rows))
    tokens = torch.tensor([row + [end] * (width - len(row)) for row in rows])
    own = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    ids, mask = (each.repeat_interleave(count, 0) for each in opened)
    return Completions(
        input_ids=torch.cat([ids, tokens], 1),
        attention_mask=torch.cat([mask.bool(), own], 1),
        completion_mask=torch.cat([torch.zeros_like(mask, dtype=torch.bool), own], 1),
        truncated=torch.tensor(cut),
        texts=tuple(tuple(flat[first : first + count]) for first in range(0, len(flat), count)),
    )


class RecordedSampler:
    """Answers prompts with recorded responses: for offline runs, and for responses of models that cannot run here.

    Args:
        path: JSON lines, see `windkern.train.records.load_records`; a prompt may have several lines.
        tokenizer: of the policy whose log-probs are fitted.
        max_new_tokens: longest response, end token included; None takes them whole.
        system: system message for the chat template, None for the template's own.

    Raises:
        FileNotFoundError, ValueError: the file does not exist or a line is wrong; when sampling, a prompt is not in
            the file or has fewer responses than are wanted.
    """

    def __init__(self, path: str | Path, tokenizer, *, max_new_tokens: int | None = None, system: str | None = None):
        self.path, self.tokenizer, self.system = Path(path), tokenizer, system
        self.max_new_tokens = None if max_new_tokens is None else check_count("max_new_tokens", max_new_tokens, least=1)
        self._responses: dict[str, list[str]] = {}
        for record in load_records(path):
            self._responses.setdefault(record.prompt.strip(), []).extend(record.responses)

    def sample(self, prompts: Sequence[str], num_responses: int, seed: int) -> Completions:
        """`num_responses` of the responses recorded for each prompt, without putting any back."""
        check_count("num_responses", num_responses, least=1)
        return completions_of_texts(
            self.tokenizer,
            prompts,
            [self._choose(prompt, num_responses, seed) for prompt in prompts],
            system=self.system,
            max_new_tokens=self.max_new_tokens,
        )

    def everything(self, prompt: str) -> Completions:
        """All responses recorded for a prompt.

        Raises:
            ValueError: there are none.
        """
        count = len(self._responses.get(prompt.strip(), []))
        texts = [self._choose(prompt, max(1, count), 0)]
        return completions_of_texts(
            self.tokenizer, [prompt], texts, system=self.system, max_new_tokens=self.max_new_tokens
        )

    def _choose(self, prompt: str, count: int, seed: int) -> list[str]:
        found = self._responses.get(prompt.strip(), [])
        if len(found) < count:
            raise ValueError(f"{self.path} has {len(found)} responses to {prompt!r}, {count} are wanted")
        order = torch.randperm(len(found), generator=generator(seed, prompt))
        return [found[k] for k in order[:count].tolist()]
