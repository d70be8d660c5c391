"""Judges: callables, reward models, pair models, recorded verdicts."""
