"""Jobs that take the place of the logits in a causal LM's call: log-probs of groups, and the loss over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

import windkern
from windkern import hf
from windkern.head import Head
from windkern.ops.inputs import Blocks
from windkern.ops.sequence import sequence_logps
from windkern.sharding.streamed import streamed
from windkern.sharding.whole import gathered
from windkern.train.sharded import check_whole

Job = Callable[[hf.CausalLM, Tensor], Tensor]


def check_scorable(model: nn.Module) -> None:
    """Raise unless jobs can run in the calls of a model: it is whole, and its logits are a product that windkern knows.

    Args:
        model: a transformers causal LM, or a PEFT model around one; not wrapped yet.

    Raises:
        UnsupportedModelError: see `windkern.hf.hidden_and_head`.
        ValueError: ZeRO-3 has partitioned the model.
    """
    if isinstance(model, nn.Module):
        check_whole(model)
    hf.hidden_and_head(model)


def _blocks(stack: ExitStack, parts: hf.CausalLM, hidden: Tensor) -> tuple[Blocks, Head]:
    """Return hidden states and head, streamed if it is a separate FSDP2 unit, else whole while `stack` is open."""
    states, head = parts.blocks(hidden)
    if parts.in_pieces:
        return states, dataclasses.replace(head, weight=streamed(parts.lm_head))
    return states, stack.enter_context(gathered(head))


def score_job(targets: Tensor, temperature: float, options: Mapping[str, Any]) -> Job:
    """Return a job that computes (S,) log-probs of the targets (S, L), nats."""

    def job(parts: hf.CausalLM, hidden: Tensor) -> Tensor:
        parts = parts.at_temperature(temperature)
        with ExitStack() as stack:
            states, head = _blocks(stack, parts, hidden)
            return sequence_logps(states, head, targets, **options)

    return job


def loss_job(
    loss: Callable[..., Tensor],
    targets: Tensor,
    constants: Mapping[str, Tensor],
    temperature: float,
    options: Mapping[str, Any],
) -> Job:
    """Return a job that computes a separable loss's mean over groups; targets (B, K, L), constants (B, ...)."""

    def job(parts: hf.CausalLM, hidden: Tensor) -> Tensor:
        parts = parts.at_temperature(temperature)
        groups = targets.shape
        with ExitStack() as stack:
            states, head = _blocks(stack, parts, hidden)
            blocks = states if isinstance(states, tuple) else (states,)
            split = tuple(block.view(*groups, block.shape[-1]) for block in blocks)
            return windkern.fused_loss(
                loss,
                split if isinstance(states, tuple) else split[0],
                head,
                targets,
                per_group=constants,
                **options,
            )

    return job


class Watch:
    """A loss function that remembers the log-probs it saw, for metrics.

    `fused_loss` passes groups chunk by chunk, in order.
    """

    def __init__(self, function: Callable[..., Tensor], scale: float):
        self.function, self.scale = function, scale
        self._seen: list[Tensor] = []

    def __call__(self, logps: Tensor, **constants: Tensor) -> Tensor:
        self._seen.append(logps.detach())
        return self.scale * self.function(logps, **constants)

    @property
    def logps(self) -> Tensor:
        """(B, K) log-probs of the last call."""
        return torch.cat(self._seen)
