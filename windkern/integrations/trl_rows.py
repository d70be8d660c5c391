"""Lay out a padded batch of TRL with each prompt once, if several of its rows begin with the same one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from windkern import hf


@dataclass(frozen=True)
class SharedBatch:
    """Rows for the model, and where in the batch their scored tokens belong."""

    rows: hf.GroupRows  # index and targets of the M labelled tokens alone
    place: Tensor  # (M,) int64, into labels[:, 1:].flatten()


def shared_batch(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor, rules: hf.LayoutRules
) -> SharedBatch | None:
    """Lay out the rows of a batch group by group; None if no two share a prompt, or sharing does not pay.

    A prompt is what is attended before the first label; what is between labels (answers of tools) is part of the
    response. Hazard: TRL passes no positions, so padding on the left moves those of a model with a position table.
    Remedy: such a batch of a model whose positions matter by more than their differences is left as it is.

    Args:
        input_ids, attention_mask, labels: (S, L), padded on either side; -100 in labels for what is not scored.
        rules: layout rules of the model.
    """
    # Hazard: on a GPU the host waits for these ids, once per batch. They were on the host a moment ago.
    ids, seen, marked = input_ids.tolist(), attention_mask.bool().tolist(), (labels != hf.IGNORE_INDEX).tolist()
    groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for row, (tokens, attended, scored) in enumerate(zip(ids, seen, marked, strict=True)):
        columns = [column for column, inside in enumerate(attended) if inside]
        wanted = [number for number, column in enumerate(columns) if scored[column]]
        if len(wanted) != sum(scored) or (wanted and not wanted[0]) or (columns and columns[0] and not rules.relative):
            return None
        if wanted:
            prompt = tuple(tokens[column] for column in columns[: wanted[0]])
            groups.setdefault(prompt, []).append((row, columns[wanted[0] : wanted[-1] + 1]))
    prompts = list(groups)
    completions = [[[ids[row][column] for column in columns] for row, columns in groups[each]] for each in prompts]
    if all(len(each) == 1 for each in completions):
        return None
    layout = hf.make_layout(hf.lengths_of(prompts, completions), rules)
    if not layout.is_shared:
        return None
    rows = hf.make_rows(layout, prompts, completions, fill=prompts[0][0])
    order = [(row, column) for prompt in prompts for row, columns in groups[prompt] for column in columns]
    kept = torch.tensor([number for number, (row, column) in enumerate(order) if marked[row][column]])
    width = labels.shape[1] - 1
    place = torch.tensor([row * width + column - 1 for row, column in order])[kept]
    rows = dataclasses.replace(
        rows,
        index=rows.index[kept],
        targets=rows.targets[kept],
        cu_seqlens=torch.tensor([0, len(kept)]),
        longest_response=len(kept),
    )
    return SharedBatch(rows.to(input_ids.device), place.to(labels.device))
