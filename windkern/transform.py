"""Transform the logits between the head and the softmax."""

from __future__ import annotations

from dataclasses import dataclass

from windkern._checks import check_number


@dataclass(frozen=True)
class LogitTransform:
    """An elementwise map of the logits: `z -> softcap * tanh(scale * z / softcap) / temperature`.

    Without `softcap` it is `z -> scale * z / temperature`. One object serves forward, backward, entropy and
    reference log-probs, so they cannot disagree.

    Args:
        scale: multiplies the logits first (Cohere's `logit_scale`, `1 / logits_scaling` of Granite). Positive.
        softcap: bound of the logits before the temperature (Gemma's `final_logit_softcapping`), or None.
        temperature: divides last. Positive.

    Raises:
        ValueError: a value is not a finite number greater than 0.

    Example:
        >>> LogitTransform(softcap=30.0).is_identity
        False
        >>> LogitTransform().is_identity
        True
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "softcap", "temperature"):
            value = getattr(self, name)
            if name != "softcap" or value is not None:
                object.__setattr__(self, name, float(check_number(name, value, above=0)))

    @property
    def factors(self) -> tuple[float, float | None, float]:
        return self.scale, self.softcap, self.temperature

    @property
    def is_identity(self) -> bool:
        return self.softcap is None and self.scale == self.temperature

    @property
    def slope_at_zero(self) -> float:
        """The derivative at z = 0, which is the derivative everywhere when there is no softcap."""
        return self.scale / self.temperature


IDENTITY = LogitTransform()
