"""Groups as the trainer's steps take them: padded batches, and the data set of an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from windkern.hf import completion_targets
from windkern.train.groups import Group
from windkern.train.seeds import shuffled


@dataclass
class Batch:
    """B groups of K responses, padded to one length: prompts on the left, completions on the right."""

    input_ids: Tensor  # (B * K, L) int64
    attention_mask: Tensor  # (B * K, L) bool
    completion_mask: Tensor  # (B * K, L) bool
    shape: tuple[int, int]  # (B, K)
    constants: dict[str, Tensor]

    @property
    def targets(self) -> Tensor:
        """(B * K, L), aligned with hidden states."""
        return completion_targets(self.input_ids, self.completion_mask)

    def pin_memory(self) -> Batch:
        """In memory that a GPU can copy from while the host goes on; asked for by `dataloader_pin_memory`."""
        return Batch(
            self.input_ids.pin_memory(),
            self.attention_mask.pin_memory(),
            self.completion_mask.pin_memory(),
            self.shape,
            {name: value.pin_memory() for name, value in self.constants.items()},
        )

    def to(self, device: torch.device) -> Batch:
        # Reason: a blocking copy to a GPU waits for all that is queued there, the last backward pass. On the way back
        # the host must wait, or it would read what has not arrived.
        options = {"device": device, "non_blocking": torch.device(device).type != "cpu"}
        return Batch(
            self.input_ids.to(**options),
            self.attention_mask.to(**options),
            self.completion_mask.to(**options),
            self.shape,
            {name: value.to(**options) for name, value in self.constants.items()},
        )


def collate(groups: Sequence[Group], fill: int) -> Batch:
    """Pad groups of the same size into one batch; `fill` is the id in padding, which no mask lets through.

    Example:
        >>> batch = collate([Group(0, (5, 6), ((7,), (8, 9)), (False, False), ("a", "b"))], fill=0)
        >>> batch.input_ids.tolist(), batch.completion_mask.int().tolist()
        ([[5, 6, 7, 0], [5, 6, 8, 9]], [[0, 0, 1, 0], [0, 0, 1, 1]])
    """
    head = max(len(group.prompt_ids) for group in groups)
    tail = max(len(tokens) for group in groups for tokens in group.completions)
    rows = [(group.prompt_ids, tokens) for group in groups for tokens in group.completions]
    ids = torch.full((len(rows), head + tail), fill, dtype=torch.int64)
    attended, own = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, tokens) in enumerate(rows):
        ids[row, head - len(prompt) : head] = torch.tensor(prompt)
        ids[row, head : head + len(tokens)] = torch.tensor(tokens)
        attended[row, head - len(prompt) : head + len(tokens)] = True
        own[row, head : head + len(tokens)] = True
    names = groups[0].constants
    constants = {name: torch.stack([group.constants[name] for group in groups]) for name in names}
    return Batch(ids, attended, own, (len(groups), len(groups[0].completions)), constants)


class IterationData(Dataset):
    """The groups of the current outer iteration, as many items as its steps take, pass after pass.

    Groups of one optimizer step (`step_size` neighbours) stay together in every pass, in the order of the list; the
    steps change places between passes. So a step is the same however it is cut into batches and processes. And the
    rounding of a 16-bit forward depends on its batch: with the old policy scored in the same batches,
    log pi_theta - log pi_t is exactly 0 before the first step.

    Args:
        length: items of an iteration.
        step_size: groups of an optimizer step, on all processes together.
        seed: of the order.
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
