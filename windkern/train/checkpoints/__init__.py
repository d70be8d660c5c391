"""Checkpoints: written whole, verified, resumed only by the run that wrote them."""
