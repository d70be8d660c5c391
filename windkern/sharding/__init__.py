"""Heads that a distributed engine has cut into pieces."""

from windkern.sharding.whole import gathered

__all__ = ["gathered"]
