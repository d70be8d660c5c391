"""Inverse value learning: a small value model on top of a frozen base."""
