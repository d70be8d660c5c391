"""Backward that can be differentiated once, and says so when somebody differentiates it again."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def differentiable_once(op: str) -> Callable:
    """Like torch's once_differentiable, but raises also where the upstream gradient itself is a constant."""

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def once(ctx, *upstream):
            with torch.no_grad():
                grads = backward(ctx, *upstream)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return grads
            message = f"double backward is not implemented for windkern.{op}: its gradient cannot be differentiated"
            places = [place for place, grad in enumerate(grads) if isinstance(grad, Tensor)]
            flagged = torch._C._functions.DelayedError(message, len(places))(
                *[grads[place].detach().requires_grad_() for place in places]
            )
            flagged = flagged if isinstance(flagged, tuple) else (flagged,)
            result = list(grads)
            for place, grad in zip(places, flagged, strict=True):
                result[place] = grad
            return tuple(result)

        return once

    return decorate
