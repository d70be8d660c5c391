"""Win-rate games that are small enough to solve exactly, and WIND fitted to samples of them."""

from windkern.tabular.games import LINKS, Game, best_of_n
from windkern.tabular.sampled import FITS, fit
from windkern.tabular.solvers import METHODS, Solution, solve

__all__ = ["FITS", "LINKS", "METHODS", "Game", "Solution", "best_of_n", "fit", "solve"]
