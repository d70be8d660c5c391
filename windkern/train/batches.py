"""Make batches of groups: padded rows for the model, and the data set of an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from windkern.hf.layout import GroupRows, LayoutRules, lengths_of, make_layout, make_rows
from windkern.train.groups import Group
from windkern.train.seeds import shuffled


@dataclass
class Batch:
    """B groups of K responses in rows of one length, and the loss's other constants."""

    rows: GroupRows
    shape: tuple[int, int]  # (B, K)
    constants: dict[str, Tensor]

    @property
    def targets(self) -> Tensor:
        """(B, K, R) int64 tokens of the responses, -100 after the end of each."""
        return self.rows.padded()[1].view(*self.shape, -1)

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, for `dataloader_pin_memory`: copies to a GPU overlap with the host."""
        pinned = {name: value.pin_memory() for name, value in self.constants.items()}
        return Batch(self.rows.pin_memory(), self.shape, pinned)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        # Reason: a blocking copy to a GPU waits for everything queued there, such as the last backward pass. On the way
        # back the host must wait, or it would read data that has not arrived.
        options: dict[str, Any] = {"device": device, "non_blocking": torch.device(device).type != "cpu"}
        moved = {name: value.to(**options) for name, value in self.constants.items()}
        return Batch(self.rows.to(device), self.shape, moved)


def collate(groups: Sequence[Group], fill: int, rules: LayoutRules) -> Batch:
    """Lay out groups of the same size in rows.

    Args:
        groups: groups with equally many responses and the same constants.
        fill: token id of padding, which is always masked.
        rules: layout rules of the model that reads the rows, see `windkern.hf.layout_rules`.

    Example:
        >>> groups = [Group(0, (5, 6), ((7, 1), (8, 9, 1)), (False, False), ("a", "b"))]
        >>> collate(groups, 0, LayoutRules(shared=False)).rows.input_ids.tolist()
        [[5, 6, 7, 0], [5, 6, 8, 9]]
        >>> collate(groups, 0, LayoutRules(shared=True)).rows.input_ids.tolist()
        [[5, 6, 7, 8, 9]]
    """
    prompts, completions = [group.prompt_ids for group in groups], [group.completions for group in groups]
    layout = make_layout(lengths_of(prompts, completions), rules)
    names = groups[0].constants
    constants = {name: torch.stack([group.constants[name] for group in groups]) for name in names}
    rows = make_rows(layout, prompts, completions, fill)
    return Batch(rows, (len(groups), len(groups[0].completions)), constants)


class LaysOut(Protocol):
    """Anything that makes batches of groups, as a policy does."""

    def batch(self, groups: Sequence[Group]) -> Batch:
        """Lay out groups in rows for the model."""
        ...


class Counted:
    """A number of tokens, in place of the tensor in which transformers would count them.

    Reason: transformers moves every tensor of a batch to the device, and `batch` already holds these.
    """

    def __init__(self, count: int):
        self.count = count

    def numel(self) -> int:
        """Return the number of tokens, padding included, where this stands for `input_ids`."""
        return self.count

    def sum(self) -> int:
        """Return the number of tokens that are not padding, where this stands for `attention_mask`."""
        return self.count


class Collator:
    """Makes batches of the groups that a step takes, as transformers wants them.

    Args:
        policy: lays out groups as its model takes them.
    """

    def __init__(self, policy: LaysOut):
        self.policy = policy

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Return the batch and its token counts, which stay on the host."""
        batch = self.policy.batch(groups)
        rows = batch.rows
        return {
            "batch": batch,
            "input_ids": Counted(rows.input_ids.numel()),
            "attention_mask": Counted(int(rows.attention_mask.sum())),
        }


class IterationData(Dataset):
    """The groups of the current outer iteration, one item for each group that its steps take, pass after pass.

    Groups of one optimizer step (`step_size` neighbours) stay together in every pass, in the order of the list, and the
    order of the steps changes between passes. A step is therefore the same however it is cut into batches and
    processes. The rounding of a 16-bit forward depends on its batch: since the old policy is scored in the same
    batches, log pi_theta - log pi_t is exactly 0 before the first step.

    Args:
        length: items of an iteration.
        step_size: groups of an optimizer step, on all processes together.
        seed: seed of the order.
    """

    def __init__(self, length: int, step_size: int, seed: int):
        self.length, self.step_size, self.seed = length, step_size, seed
        self.groups: list[Group] = []
        self.iteration = 0
        self._orders: dict[int, list[int]] = {}

    def fill(self, iteration: int, groups: Sequence[Group]) -> None:
        """Take the groups of an iteration.

        Raises:
            ValueError: the items of an iteration are not a whole number of passes over whole steps.
        """
        if len(groups) % self.step_size or self.length % len(groups):
            raise ValueError(
                f"groups must come in whole steps of {self.step_size} and fill {self.length} items in whole "
                f"passes, got {len(groups)}"
            )
        self.iteration, self.groups = iteration, list(groups)
        self._orders = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> Group:
        turn, place = divmod(item, len(self.groups))
        if turn not in self._orders:
            steps = len(self.groups) // self.step_size
            self._orders[turn] = shuffled(steps, self.seed, "fit", self.iteration, turn).tolist()
        step, within = divmod(place, self.step_size)
        return self.groups[self._orders[turn][step] * self.step_size + within]
