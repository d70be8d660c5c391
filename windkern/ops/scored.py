"""Count and find scored rows: on a GPU the count is on its way while the host checks the other arguments."""

from __future__ import annotations

import torch
from torch import Tensor


class ScoredRows:
    """The rows that are scored; reading them waits for a GPU once, unless it has counted in the meantime."""

    def __init__(self, scored: Tensor):
        self.scored = scored  # (R,)
        self._event: torch.cuda.Event | None = None
        if scored.is_cuda:
            self._count = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._count.copy_(scored.sum(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(scored.device))

    def positions(self) -> Tensor | None:
        """Return the positions (M,) of the scored rows, or None if all rows are scored."""
        if self._event is None:
            found = self.scored.nonzero().squeeze(1)
            return found if found.numel() < self.scored.numel() else None
        self._event.synchronize()
        count = int(self._count)
        if count == self.scored.numel():
            return None
        return self.scored.nonzero_static(size=count).squeeze(1)
