"""A limit on the work that a server is given at once, counted in tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from windkern._checks import check_count


class TokenGate:
    """Admits requests as long as the tokens they may need, taken together, stay within a bound.

    A server's memory is used by tokens, not by prompts: many short requests can run at once, or a few long ones. A
    request larger than the bound runs alone. After a failure no further request is admitted, because its answer would
    be lost when the rest is cancelled.

    Args:
        most: tokens in flight at once.

    Raises:
        ValueError: `most` is not positive.
    """

    def __init__(self, most: int):
        self.most = self.free = check_count("tokens", most, least=1)
        self.failed = False
        self._changed = anyio.Condition()

    @asynccontextmanager
    async def hold(self, tokens: int) -> AsyncIterator[None]:
        """Count `tokens` as in flight inside this context."""
        tokens = min(tokens, self.most)
        async with self._changed:
            while self.free < tokens or self.failed:
                await self._changed.wait()
            self.free -= tokens
        try:
            yield
        except BaseException:
            self.failed = True
            raise
        finally:
            with anyio.CancelScope(shield=True):
                async with self._changed:
                    self.free += tokens
                    self._changed.notify_all()
