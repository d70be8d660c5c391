"""How much a server is given to do at once, counted in tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from windkern._checks import check_count


class TokenGate:
    """Lets requests through while the tokens they may need together stay within a bound.

    A server's memory goes by tokens, not by prompts: many short requests may be under way at once, and few long ones.
    A request that is larger than the bound goes alone.

    Args:
        most: tokens under way at once.

    Raises:
        ValueError: `most` is not positive.
    """

    def __init__(self, most: int):
        self.most = self.free = check_count("tokens", most, least=1)
        self._changed = anyio.Condition()

    @asynccontextmanager
    async def hold(self, tokens: int) -> AsyncIterator[None]:
        """Inside, so many tokens are under way."""
        tokens = min(tokens, self.most)
        async with self._changed:
            while self.free < tokens:
                await self._changed.wait()
            self.free -= tokens
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                async with self._changed:
                    self.free += tokens
                    self._changed.notify_all()
