"""The WIND loss as a module, for code that stores its criterion as an object."""

from __future__ import annotations

import torch
from torch import Tensor

from windkern._checks import check_choice
from windkern.losses._groups import check_reduction, step_coefficients
from windkern.losses.wind import OBJECTIVES, wind


class WindLoss(torch.nn.Module):
    """The loss `wind` with fixed hyper-parameters; it has no weights.

    Formula: see `windkern.losses.wind`.

    Args:
        eta: step size, positive.
        beta: weight of the KL to the reference, not negative.
        objective: "square", "square_pair", "square_point", "kl", "nce" or "nce_ratio".
        reduction: "mean" (sum over groups / B), "sum", or "none".

    Raises:
        ValueError: `eta`, `beta`, `objective` or `reduction` is out of range.

    Source:
        See `windkern.losses.wind`.

    Example:
        >>> import torch
        >>> from windkern.losses import WindLoss
        >>> criterion = WindLoss(eta=1.0, beta=0.25, objective="square_pair")
        >>> criterion
        WindLoss(eta=1.0, beta=0.25, objective='square_pair', reduction='mean')
        >>> logps = torch.tensor([[-9.0, -11.0]])
        >>> criterion(logps, logps, logps, torch.tensor([[[0.5, 1.0], [0.0, 0.5]]]))  # c = 0.8, (0 - 0.4)^2
        tensor(0.1600)
    """

    def __init__(self, *, eta: float, beta: float, objective: str = "square", reduction: str = "mean") -> None:
        super().__init__()
        step_coefficients(eta, beta)  # checks both
        self.eta = eta
        self.beta = beta
        self.objective = check_choice("objective", objective, OBJECTIVES)
        self.reduction = check_reduction(reduction)

    def forward(
        self,
        logps: Tensor,
        old_logps: Tensor,
        ref_logps: Tensor,
        prefs: Tensor | None = None,
        *,
        win_rates: Tensor | None = None,
        log_z: Tensor | None = None,
        where: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, () or (B,); arguments and errors are those of `windkern.losses.wind`."""
        return wind(
            logps,
            old_logps,
            ref_logps,
            prefs,
            win_rates=win_rates,
            log_z=log_z,
            eta=self.eta,
            beta=self.beta,
            objective=self.objective,
            where=where,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"eta={self.eta}, beta={self.beta}, objective={self.objective!r}, reduction={self.reduction!r}"
