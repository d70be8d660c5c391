"""Samplers: the policy's own generate, servers, recorded responses."""
