"""Layouts of groups in rows: the tokens fed, their visibility, the scored tokens, and the split into rows."""

from __future__ import annotations

import dataclasses
import doctest
import functools

import pytest
import torch

from windkern.hf import layout as hf_layout
from windkern.hf.layout import GroupLayout, LayoutRules, Piece, make_layout, make_rows
from windkern.hf.masks import at_all_pairs, seen

WIDE = LayoutRules(balance=1 << 40)


def ids_of(lengths):
    """Return ids that encode their place: 1000 for each group, 100 for each response."""
    prompts = [[1000 * group + k for k in range(size)] for group, (size, _) in enumerate(lengths, 1)]
    responses = [
        [[1000 * group + 100 * number + k for k in range(size)] for number, size in enumerate(sizes, 1)]
        for group, (_, sizes) in enumerate(lengths, 1)
    ]
    return prompts, responses


@pytest.mark.parametrize(
    "rules",
    [WIDE, LayoutRules(shared=False), LayoutRules(balance=8), LayoutRules(balance=1 << 40, row_tokens=64)],
    ids=["shared", "apart", "cut", "packed"],
)
def test_each_scored_token_sees_its_prompt_and_response_and_nothing_else(rules):
    """The specification, token by token: the columns each column sees, its position, and the token it predicts."""
    lengths = [(3, (4, 1, 0, 2)), (1, (2, 3, 3, 1)), (5, (0, 0, 0, 0))]
    prompts, responses = ids_of(lengths)
    layout = make_layout(lengths, rules)
    rows = make_rows(layout, prompts, responses, fill=7)
    visible, flat = at_all_pairs(rows, functools.partial(seen, rows)), rows.input_ids.flatten()
    width, place = rows.input_ids.shape[1], 0
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            for number, token in enumerate(response):
                row, column = divmod(int(rows.index[place]), width)
                context = rows.input_ids[row][visible[row, column]].tolist()
                assert context == prompt + response[:number]
                assert rows.position_ids[row][visible[row, column]].tolist() == list(range(len(context)))
                assert int(flat[rows.index[place]]) == context[-1] and int(rows.targets[place]) == token
                place += 1
    assert place == len(rows.targets) == layout.scored
    assert rows.cu_seqlens.diff().tolist() == [len(each) for group in responses for each in group]
    assert int(rows.attention_mask.sum()) == layout.tokens and rows.longest == int(rows.position_ids.max()) + 1
    assert bool(visible.any(-1).all())  # no row of the mask is empty: its softmax would be NaN
    assert rows.is_shared == rules.shared


def test_padded_index_and_targets_are_the_packed_ones():
    lengths = [(3, (4, 1, 0)), (2, (2, 2, 3))]
    rows = make_rows(make_layout(lengths, WIDE), *ids_of(lengths))
    index, targets = rows.padded()
    assert rows.padded()[0] is index  # a step asks for both, one after the other
    assert index.shape == targets.shape == (6, 4)
    scored = targets != hf_layout.IGNORE_INDEX
    assert torch.equal(index[scored], rows.index) and torch.equal(targets[scored], rows.targets)
    assert scored.sum(1).tolist() == [4, 1, 0, 2, 2, 3]


def test_rows_are_moved_and_padded_without_reading_a_value():
    """On a GPU the host would wait for it; a meta tensor has none to read."""
    made = torch.Generator().manual_seed(0)
    for most in (0, 1, 1, 2, 5, 5, 5, 40):
        draws = torch.randint(0, most + 1, (3, 4), generator=made).tolist()
        lengths = [(prompt, tuple(sizes)) for prompt, sizes in zip((1, 4, 2), draws, strict=True)]
        for rules in (WIDE, LayoutRules(shared=False)):
            rows = make_rows(make_layout(lengths, rules), *ids_of(lengths))
            longest = max(map(max, draws))
            assert rows.longest_response == rows.to(torch.device("cpu")).longest_response == longest
            here, away = rows.padded(), rows.to(torch.device("meta")).padded()
            for one, other in zip(here, away, strict=True):
                assert one.shape == other.shape == (12, max(1, longest)) and other.is_meta


def test_a_layout_survives_json_and_depends_on_lengths_and_rules_alone():
    lengths = [(200, (60, 3, 0, 61)), (9, (1, 1, 1, 1))]
    for rules in (WIDE, LayoutRules(shared=False), LayoutRules(balance=300)):
        layout = make_layout(lengths, rules)
        assert GroupLayout.from_json(layout.to_json()) == layout == make_layout(lengths, rules)
    assert make_layout(lengths, WIDE) != make_layout(lengths, LayoutRules(shared=False))


def test_rows_are_cut_where_attention_would_cost_more_than_it_saves():
    def chunks(prompt, response, rules, count=8):
        return [piece.stop - piece.start for (piece,) in make_layout([(prompt, [response] * count)], rules).rows]

    assert chunks(200, 61, LayoutRules(balance=1152)) == [8]
    assert chunks(10, 2000, LayoutRules(balance=1152)) == [1] * 8
    assert chunks(1000, 500, LayoutRules(balance=4096)) == [4] * 2


@pytest.mark.parametrize(
    ("hidden", "prompt", "response", "count", "shared"),
    [
        (576, 4, 60, 2, False),  # 122 tokens instead of 126
        (576, 8, 256, 2, False),
        (2048, 4, 60, 2, False),
        (576, 200, 60, 8, True),
        (576, 60, 60, 2, True),
        (2048, 240, 60, 2, True),
    ],
)
def test_rows_are_shared_only_where_arithmetic_promises_a_gain(hidden, prompt, response, count, shared):
    """With the balance of SmolLM2 and of Llama-3.2-1B."""
    rules = LayoutRules(balance=3 * hidden)
    layout = make_layout([(prompt, [response] * count)], rules)
    assert layout.is_shared == shared
    together, alone = prompt + count * (response - 1), prompt + response - 1
    ratio = together * (1 + together / (3 * hidden)) / (count * alone * (1 + alone / (6 * hidden)))
    assert (ratio <= 15 / 16) == shared
    assert make_layout([(prompt, [response] * count)], dataclasses.replace(rules, by_cost=False)).is_shared


def test_always_counts_no_cost_but_keeps_masks_small():
    lengths = [(10, [2000] * 8)]
    rules = LayoutRules(balance=1152, by_cost=False)
    sizes = [row[0].stop - row[0].start for row in make_layout(lengths, rules).rows]
    assert sizes == [3, 3, 2]
    assert 5 * 6007**2 <= rules.mask_budget < 5 * 8006**2  # 3 responses fit, 4 do not
    assert len(make_layout(lengths, LayoutRules(balance=1152)).rows) == 8


def test_rows_are_cut_where_masks_would_be_too_large():
    lengths = [(100, [101] * 8)]
    for budget in (1 << 30, 250_000, 100_000, 0):
        layout = make_layout(lengths, LayoutRules(balance=1 << 40, pair_bytes=2, mask_budget=budget))
        sizes = [row[0].stop - row[0].start for row in layout.rows]
        for size in sizes:
            assert 2 * (100 + 100 * size) ** 2 <= max(budget, 2 * size * 200**2) or size == 1
    # A row of one response takes 200^2 pairs, one of n responses ((n + 1) * 100)^2, which is more than the n rows that
    # it replaces: 300^2 > 2 * 200^2 and 400^2 > 3 * 200^2. So without a budget, no rows are shared.
    assert sizes == [1] * 8


def test_packing_joins_neighbours_up_to_a_length():
    lengths = [(2, (3, 3))] * 5
    layout = make_layout(lengths, LayoutRules(balance=1 << 40, row_tokens=13))
    assert [len(row) for row in layout.rows] == [2, 2, 1]
    assert layout.rows[0] == (Piece(0, 0, 2), Piece(1, 0, 2)) and layout.width == 12


def test_errors_name_the_group():
    with pytest.raises(ValueError, match="at least one group"):
        make_layout([], WIDE)
    with pytest.raises(ValueError, match="group 1 has 0 tokens and 2 responses"):
        make_layout([(1, (1, 1)), (0, (1, 1))], WIDE)
    with pytest.raises(ValueError, match="group 0 has 3 tokens and 0 responses"):
        make_layout([(3, ())], WIDE)
    with pytest.raises(ValueError, match="layout must belong to these groups"):
        make_rows(make_layout([(1, (1,))], WIDE), [[1]], [[[1, 2]]])
    with pytest.raises(ValueError, match="balance must be at least 1"):
        LayoutRules(balance=0)


def test_the_examples_run():
    failed, tried = doctest.testmod(hf_layout)
    assert tried and not failed
