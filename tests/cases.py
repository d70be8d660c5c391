"""THE table of shapes, dtypes, gears and logit variants on which every back end is tested."""

from __future__ import annotations

import torch

from windkern.testing import GEARS, UNLIMITED, VARIANTS, Problem, Shape

__all__ = ["DTYPES", "GEARS", "NARROW", "SHAPES", "UNLIMITED", "VARIANTS", "VOCABULARIES", "Problem", "Shape"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW = 0  # memory budgets: the smallest plan, about half of everything, everything kept

SHAPES = {
    "tiny": Shape((5,), (8,), 3),  # vocabulary below any tile
    "odd": Shape((3, 11), (24,), 1003),  # no size divides another, several slabs at budget 0
    "blocks": Shape((2, 3, 5), (16, 7), 517),  # two blocks of logits that add up
    "one_row": Shape((1,), (40,), 2049),
}
# Vocabularies of real models (and one that no tile divides); few rows keep them cheap.
VOCABULARIES = (3, 32003, 49152, 151669)
