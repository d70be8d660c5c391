"""Backward that can be differentiated once, and says so when somebody differentiates it again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(op: str, inputs: Callable[[Any], Iterable[Tensor]]) -> Callable:
    """Like torch's once_differentiable, but raises wherever the gradient is differentiated again.

    `inputs(ctx)` gives tensors on the graphs of the op's inputs. Hazard: a gradient that is on no graph of theirs is
    "not used" when somebody differentiates it with respect to them, or None with allow_unused=True. Remedy: it is put
    there, on the graphs of the inputs and of the upstream gradients.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def once(ctx, *upstream):
            with torch.no_grad():
                grads = backward(ctx, *upstream)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return grads
            message = f"double backward is not implemented for windkern.{op}: its gradient cannot be differentiated"
            given = [value for value in (*upstream, *inputs(ctx)) if isinstance(value, Tensor) and value.requires_grad]
            places = [place for place, grad in enumerate(grads) if isinstance(grad, Tensor)]
            refuse = torch._C._functions.DelayedError(message, len(places) + len(given))
            flagged = refuse(*(grads[place] for place in places), *given)
            result = list(grads)
            for place, grad in zip(places, flagged, strict=False):
                result[place] = grad
            return tuple(result)

        return once

    return decorate


def graph_links(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Empty tensors on the graphs of `tensors`, for an op that does not save them: they hold none of their memory."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return ()
    return tuple(each.narrow(-1, 0, 0).clone() for each in tensors if each is not None and each.requires_grad)
