"""How far a result may be from float64, and how far two evaluations of one expression may differ on any CPU."""

from windkern.testing import (
    FLOAT64_BOUND,
    assert_same_but_for_rounding,
    assert_within,
    error_budget,
    relative_error,
    rounding_bound,
)

__all__ = [
    "FLOAT64_BOUND",
    "LOSS_OPERATIONS",
    "assert_same_but_for_rounding",
    "assert_within",
    "error_budget",
    "relative_error",
    "rounding_bound",
]

# Operations between the log-probs and a loss or its gradient; no loss has as many.
LOSS_OPERATIONS = 64
