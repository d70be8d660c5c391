"""Lay groups of responses out in rows: the prompt once for several responses, or once for each.

    row = [prompt, response 1, .., response n]    positions restart after the prompt, responses do not see each other

The last token of a response is not fed to the body, because nothing after it is scored. So the body sees
P + sum (R_i - 1) tokens. A layout depends on lengths and rules only: the same lengths and rules give the same rows, and
the same bits. This module does not depend on a model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from windkern._checks import check_count

IGNORE_INDEX = -100
MASK_BUDGET = 256 << 20
# Rows are shared only if that is predicted to save at least this share of the cost, the accuracy of the prediction.
LEAST_GAIN = 1 / 16
Lengths = tuple[tuple[int, tuple[int, ...]], ...]  # for each group: of its prompt, and of its N responses


@dataclass(frozen=True)
class LayoutRules:
    """The rules that decide, besides lengths, how responses share rows.

    Args:
        shared: whether rows of several responses are allowed at all.
        balance: length of a row, in tokens, at which attention over all pairs of its tokens takes as long as the rest
            of the body.
        pair_bytes: bytes that one pair of tokens of a row takes in masks and, if attention keeps them, in scores.
        mask_budget: bytes that the pairs of one row may take, unless the rows that it replaces take more.
        row_tokens: pack adjacent groups into rows of up to this many tokens; 0 gives each group its own rows.
        relative: whether only differences of positions matter to the model. No row depends on it.
        by_cost: share a row only if that costs less; otherwise share whenever masks are not too large.
    """

    shared: bool = True
    balance: int = 4096
    pair_bytes: int = 5
    mask_budget: int = MASK_BUDGET
    row_tokens: int = 0
    relative: bool = False
    by_cost: bool = True

    def __post_init__(self) -> None:
        for name, least in (("balance", 1), ("pair_bytes", 1), ("mask_budget", 0), ("row_tokens", 0)):
            check_count(name, getattr(self, name), least=least)


@dataclass(frozen=True)
class Piece:
    """Responses [start, stop) of one group, after its prompt."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class GroupLayout:
    """The responses of each row. Equal layouts give equal tensors for equal ids."""

    lengths: Lengths
    rows: tuple[tuple[Piece, ...], ...]

    @property
    def is_shared(self) -> bool:
        """Whether some row needs its own mask. If none does, each row is one prompt and one response."""
        return any(len(row) > 1 or row[0].stop - row[0].start > 1 for row in self.rows)

    @property
    def width(self) -> int:
        """Tokens of the longest row: rows are padded to it on the right."""
        return max(sum(_tokens(self.lengths, piece) for piece in row) for row in self.rows)

    @property
    def tokens(self) -> int:
        """Number of tokens that the body sees, without padding."""
        return sum(_tokens(self.lengths, piece) for row in self.rows for piece in row)

    @property
    def scored(self) -> int:
        """M, the number of tokens of all responses."""
        return sum(sum(responses) for _, responses in self.lengths)

    def to_json(self) -> str:
        """Return text that a run can store and compare; `from_json` turns it into an equal layout."""
        rows = [[[piece.group, piece.start, piece.stop] for piece in row] for row in self.rows]
        return json.dumps({"lengths": self.lengths, "rows": rows}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> GroupLayout:
        data = json.loads(text)
        lengths = tuple((prompt, tuple(responses)) for prompt, responses in data["lengths"])
        return cls(lengths, tuple(tuple(Piece(*piece) for piece in row) for row in data["rows"]))


def _fed(response: int) -> int:
    return max(response - 1, 0)


def _tokens(lengths: Lengths, piece: Piece) -> int:
    prompt, responses = lengths[piece.group]
    return prompt + sum(map(_fed, responses[piece.start : piece.stop]))


def make_layout(lengths: Sequence[tuple[int, Sequence[int]]], rules: LayoutRules) -> GroupLayout:
    """Split groups into rows at the least predicted cost, among the splits whose masks are not too large.

        cost of a row of L tokens = L (1 + L / balance), half of the second term for plain causal attention
        allowed: L^2 pair_bytes <= max(mask_budget, the sum of L^2 pair_bytes of the rows of one response it replaces)

    A group is split into equal numbers of responses, in their order. Rows are padded to the longest. If sharing saves
    less than `LEAST_GAIN` of the cost of rows with one response each, the layout has such rows: short prompts save few
    tokens, and long responses in one row have many pairs. Without `by_cost`, there are as few rows as masks allow.

    Args:
        lengths: for each group, the length of its prompt, at least 1, and the lengths of its responses.
        rules: the same for scoring and fitting.

    Raises:
        ValueError: no group is given, a group has no response, or a prompt has no token.

    Example:
        >>> layout = make_layout([(200, [61] * 8)], LayoutRules())
        >>> len(layout.rows), layout.tokens, make_layout([(200, [61] * 8)], LayoutRules(shared=False)).tokens
        (1, 680, 2080)
    """
    fixed = tuple((int(prompt), tuple(int(each) for each in responses)) for prompt, responses in lengths)
    if not fixed:
        raise ValueError("lengths must hold at least one group, got none")
    for place, (prompt, responses) in enumerate(fixed):
        if prompt < 1 or not responses:
            raise ValueError(
                "a group must have a prompt of at least one token, which predicts the first token of a response, and "
                f"at least one response; group {place} has {prompt} tokens and {len(responses)} responses"
            )
    apart = GroupLayout(
        fixed, tuple((piece,) for group, (_, sizes) in enumerate(fixed) for piece in _in_chunks(group, len(sizes), 1))
    )
    if not rules.shared:
        return apart
    rows: list[tuple[Piece, ...]] = [(piece,) for group in range(len(fixed)) for piece in _cut(fixed, group, rules)]
    if rules.row_tokens:
        rows = _packed(fixed, rows, rules)
    shared = GroupLayout(fixed, tuple(rows))
    if not rules.by_cost:
        return shared
    return shared if _padded_cost(shared, rules) <= (1 - LEAST_GAIN) * _padded_cost(apart, rules) else apart


def _padded_cost(layout: GroupLayout, rules: LayoutRules) -> float:
    """Return the cost of all rows of a layout, padded to the longest."""
    share = 1.0 if layout.is_shared else 0.5
    return len(layout.rows) * layout.width * (1 + share * layout.width / rules.balance)


def _cut(lengths: Lengths, group: int, rules: LayoutRules) -> tuple[Piece, ...]:
    count = len(lengths[group][1])
    best, least = _in_chunks(group, count, 1), math.inf
    for size in range(count, 0, -1):  # Reason: at equal costs, prefer fewer rows
        pieces = _in_chunks(group, count, size)
        cost = sum(_cost(lengths, piece, rules) for piece in pieces) if rules.by_cost else len(pieces)
        if cost < least and all(_is_allowed(lengths, piece, rules) for piece in pieces):
            best, least = pieces, cost
    return best


def _in_chunks(group: int, count: int, size: int) -> tuple[Piece, ...]:
    return tuple(Piece(group, start, min(start + size, count)) for start in range(0, count, size))


def _cost(lengths: Lengths, piece: Piece, rules: LayoutRules) -> float:
    tokens = _tokens(lengths, piece)
    share = 1.0 if piece.stop - piece.start > 1 else 0.5
    return tokens * (1 + share * tokens / rules.balance)


def _is_allowed(lengths: Lengths, piece: Piece, rules: LayoutRules) -> bool:
    if piece.stop - piece.start == 1:
        return True
    prompt, responses = lengths[piece.group]
    instead = sum((prompt + _fed(each)) ** 2 for each in responses[piece.start : piece.stop])
    return _tokens(lengths, piece) ** 2 <= max(rules.mask_budget // rules.pair_bytes, instead)


def _packed(lengths: Lengths, rows: Sequence[tuple[Piece, ...]], rules: LayoutRules) -> list[tuple[Piece, ...]]:
    """Join adjacent rows as long as they fit."""
    most = min(rules.row_tokens, math.isqrt(rules.mask_budget // rules.pair_bytes))
    packed: list[tuple[Piece, ...]] = []
    used = 0
    for row in rows:
        tokens = sum(_tokens(lengths, piece) for piece in row)
        if packed and used + tokens <= most:
            packed[-1] += row
            used += tokens
        else:
            packed.append(row)
            used = tokens
    return packed


@dataclass(frozen=True)
class GroupRows:
    """The input of a model for a layout, and the positions whose hidden states are scored.

    `index` and `targets` list the scored tokens response by response, group by group, in the order of the ids: the
    hidden state at `index[m]` of the flattened rows predicts `targets[m]`. The last token of a prompt appears once for
    each response.
    """

    input_ids: Tensor  # (rows, L) int64, padded on the right
    attention_mask: Tensor  # (rows, L) bool
    position_ids: Tensor  # (rows, L) int64
    last_reader: Tensor  # (rows, L) int64: token k is seen from columns k to last_reader[k]
    index: Tensor  # (M,) int64, into rows * L
    targets: Tensor  # (M,) int64
    cu_seqlens: Tensor  # (S + 1,) int64, S = B * N if all groups have N responses
    longest: int  # number of positions that occur
    longest_response: int  # scored tokens of the longest response; 0 if all are empty
    is_shared: bool  # whether `last_reader` says more than plain causal attention does

    def to(self, device: torch.device) -> GroupRows:
        """Copy to a device; a copy to a GPU does not wait for work that is queued there."""
        options: dict[str, Any] = {"device": device, "non_blocking": torch.device(device).type != "cpu"}
        return self._each(lambda tensor: tensor.to(**options))

    def pin_memory(self) -> GroupRows:
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> GroupRows:
        fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return GroupRows(**fields | {name: change(each) for name, each in fields.items() if isinstance(each, Tensor)})

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return index and targets (S, R) for ops over padded responses, 0 and -100 after the end of a response.

        R is `longest_response`, at least 1. The first call computes them; the host does not wait for a GPU.
        """
        return self._padded

    @functools.cached_property
    def _padded(self) -> tuple[Tensor, Tensor]:
        sizes = self.cu_seqlens.diff()
        column = torch.arange(max(1, self.longest_response), device=sizes.device)
        inside = column < sizes[:, None]
        index = torch.zeros_like(inside, dtype=torch.int64).masked_scatter_(inside, self.index)
        targets = torch.full_like(index, IGNORE_INDEX).masked_scatter_(inside, self.targets)
        return index, targets


def make_rows(
    layout: GroupLayout,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[Sequence[int]]],
    fill: int = 0,
) -> GroupRows:
    """Lay token ids out in the rows of a layout.

    Args:
        layout: made from exactly these lengths.
        prompt_ids: B lists of ids.
        completion_ids: for each prompt, the ids of its responses.
        fill: id of padding, which no token sees.

    Raises:
        ValueError: the lengths are not those of the layout.

    Example:
        >>> layout = make_layout([(2, [2, 3])], LayoutRules())
        >>> rows = make_rows(layout, [[5, 6]], [[[7, 8], [9, 10, 11]]])
        >>> rows.input_ids.tolist(), rows.position_ids.tolist(), rows.last_reader.tolist()
        ([[5, 6, 7, 9, 10]], [[0, 1, 2, 2, 3]], [[4, 4, 2, 4, 4]])
        >>> rows.index.tolist(), rows.targets.tolist(), rows.cu_seqlens.tolist()
        ([1, 2, 1, 3, 4], [7, 8, 9, 10, 11], [0, 2, 5])
    """
    found = lengths_of(prompt_ids, completion_ids)
    if found != layout.lengths:
        raise ValueError("the layout must belong to these groups, but lengths of prompts or responses differ")
    width = layout.width
    ids, positions, reader, used = [], [], [], []
    index: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(layout.rows):
        tokens: list[int] = []
        places: list[int] = []
        last: list[int] = []
        for piece in row:
            begin, prompt = len(tokens), prompt_ids[piece.group]
            end = begin + _tokens(layout.lengths, piece)
            tokens += prompt
            places += range(len(prompt))
            last += [end - 1] * len(prompt)
            for response in range(piece.start, piece.stop):
                fed = completion_ids[piece.group][response][:-1]
                first = number * width + len(tokens)
                before = number * width + begin + len(prompt) - 1
                if len(completion_ids[piece.group][response]):
                    index[piece.group, response] = [before, *range(first, first + len(fed))]
                tokens += fed
                places += range(len(prompt), len(prompt) + len(fed))
                last += [len(tokens) - 1] * len(fed)
        padding = range(len(tokens), width)
        used.append(len(tokens))
        ids.append(tokens + [fill] * len(padding))
        positions.append(places + [0] * len(padding))
        reader.append(last + list(padding))
    order = [(group, response) for group, (_, sizes) in enumerate(layout.lengths) for response in range(len(sizes))]
    targets = [token for group, response in order for token in completion_ids[group][response]]
    sizes = [0, *(size for _, responses in layout.lengths for size in responses)]
    return GroupRows(
        input_ids=torch.tensor(ids),
        attention_mask=torch.arange(width) < torch.tensor(used)[:, None],
        position_ids=torch.tensor(positions),
        last_reader=torch.tensor(reader),
        index=torch.tensor([place for each in order for place in index.get(each, ())], dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        cu_seqlens=torch.tensor(sizes).cumsum(0),
        longest=1 + max(max(row) for row in positions),
        longest_response=max(sizes),
        is_shared=layout.is_shared,
    )


def lengths_of(prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[Sequence[int]]]) -> Lengths:
    """Return the lengths of ids in the form that `make_layout` takes."""
    pairs = zip(prompt_ids, completion_ids, strict=True)
    return tuple((len(prompt), tuple(len(each) for each in responses)) for prompt, responses in pairs)
