"""Heads that a distributed engine has sharded."""

from windkern.sharding.ranks import RanksError
from windkern.sharding.streamed import streamed
from windkern.sharding.vocab_parallel import vocab_parallel
from windkern.sharding.whole import gathered

__all__ = ["RanksError", "gathered", "streamed", "vocab_parallel"]
