"""Evaluation of a policy against the reference on held-out prompts."""
