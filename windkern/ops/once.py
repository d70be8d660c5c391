"""Make a backward raise a clear error when its gradient is differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(op: str, inputs: Callable[[Any], Iterable[Tensor]]) -> Callable:
    """Like torch's once_differentiable, but raises wherever the gradient is differentiated again.

    `inputs(ctx)` returns tensors on the graphs of the op's inputs. Hazard: differentiating a gradient that is not on
    those graphs with respect to the inputs reports them as "not used", or gives None with allow_unused=True. Remedy:
    put it on the graphs of the inputs and of the upstream gradients.
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
    """Return empty tensors on the graphs of `tensors`, for an op that does not save them; they keep no memory alive."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return ()
    return tuple(each.narrow(-1, 0, 0).clone() for each in tensors if each is not None and each.requires_grad)
