"""AdamW for models that compute in 16 bits: the weights it steps are float32 copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

if TYPE_CHECKING:
    from windkern.train.config import WindConfig

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_HALF = (torch.bfloat16, torch.float16)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW that keeps a float32 copy of every 16-bit parameter, steps the copy and rounds it into the parameter.

    A bfloat16 weight cannot take steps smaller than 1/256 of itself, which is most steps of a fine-tune; its float32
    copy can. Parameters that are float32 already are their own copy.

    Reason: Kahan summation (optimi, 10 bytes per parameter with weight and gradient, where this takes 16) and
    stochastic rounding (torchao) correct the weights alone, and keep the second moment in bfloat16. With beta2 = 0.999
    it cannot fall there, because 0.999 of it is rounded to itself. In `benchmarks/weight_error.py` gradients fall to
    1/100 after a third of 3000 steps. At the end the second moment is 20 times (optimi) and 8 times (torchao) too
    large. At learning rates of 1e-5 and 1e-6 the weights have moved 0.88 and 0.53 (optimi), 0.96 and 0.98 (torchao) of
    the distance they move in float32; here it is 1.00, and so is the ratio of the second moments. When a small Llama is
    fitted at 1e-5 with repeated batches, optimi ties with this for 600 steps; after 2000 its weights are off by 0.21 of
    the distance they move in float32, and these by 0.12, with about the same KL to the target. (torch-optimi 0.3.3,
    torchao 0.18.0)

    Args:
        params: parameters or groups of them, as for any torch optimizer.
        lr: learning rate.
        betas: decay rates of the first and second moment; the first may be 0.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.

    Memory:
        12 bytes per 16-bit parameter (copy and two moments), and 4 more during a step where gradients are 16-bit.

    Source:
        Loshchilov and Hutter 2019 (arXiv 1711.05101), by torch.optim.adamw; master weights: Micikevicius et al. 2018
        (arXiv 1710.03740).

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        >>> optimizer = MasterAdamW([weight], lr=1e-4, weight_decay=0.0)
        >>> for _ in range(40):
        ...     weight.grad = torch.ones_like(weight)
        ...     optimizer.step()
        >>> weight.tolist(), round(float(optimizer.state[weight]["master"][0]), 4)
        ([0.99609375, 0.99609375, 0.99609375], 0.996)
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step with the gradients that the parameters hold."""
        if closure is not None:
            raise ValueError("closure must be None: MasterAdamW uses the gradients that the parameters hold")
        for group in self.param_groups:
            working = [value for value in group["params"] if value.grad is not None]
            if not working:
                continue
            states = [self._state_of(value) for value in working]
            masters = [state.get("master", value) for state, value in zip(states, working, strict=True)]
            beta1, beta2 = group["betas"]
            adamw(
                masters,
                [value.grad.to(master.dtype) for value, master in zip(working, masters, strict=True)],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for value, master in zip(working, masters, strict=True):
                if master is not value:
                    value.copy_(master)

    def _state_of(self, value: Tensor) -> dict[str, Tensor]:
        state = self.state[value]
        if value.dtype in _HALF and "master" not in state:
            state["master"] = value.detach().float()
        if "step" not in state:
            kept = state.get("master", value)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(kept), torch.zeros_like(kept)
            state["step"] = torch.zeros((), dtype=torch.float32, device=value.device)
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Load as any optimizer does, but keep copies and moments in float32, which torch would round to 16 bits."""
        super().load_state_dict(state_dict)
        saved = [place for group in state_dict["param_groups"] for place in group["params"]]
        values = [value for group in self.param_groups for value in group["params"]]
        for place, value in zip(saved, values, strict=True):
            for name, tensor in state_dict["state"].get(place, {}).items():
                self.state[value][name] = tensor.to(value.device, copy=True)


def accumulate_in_float32(parameters: Iterable[Tensor]) -> None:
    """Make the gradients of 16-bit parameters add up in float32, where torch can (2.10 and later).

    Reason: a sum of bfloat16 numbers stops growing once it is 256 times as large as what is added.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> accumulate_in_float32([weight])
        >>> for _ in range(1000):
        ...     weight.sum().backward()
        >>> weight.grad.tolist()
        [1000.0]
    """
    for value in parameters:
        if value.requires_grad and value.dtype in _HALF and hasattr(value, "grad_dtype"):
            value.grad_dtype = torch.float32


def master_optimizer(
    model: torch.nn.Module, args: WindConfig, processes: int, warn: Callable[[str], None]
) -> tuple[type, dict] | None:
    """Return the optimizer for a model that trains 16-bit weights, and its arguments; None to use transformers' own.

    Args:
        model: its gradients will add up in float32 where one process trains it.
        args: settings of the run, a `WindConfig`.
        processes: number of processes; DDP reduces gradients in the dtype of the weights.
        warn: called if `args.optim` is not AdamW, the only optimizer here with float32 copies.
    """
    if not args.master_weights or not any(value.requires_grad and value.dtype in _HALF for value in model.parameters()):
        return None
    if (name := str(getattr(args.optim, "value", args.optim))) not in ("adamw_torch", "adamw_torch_fused"):
        warn(f"optim={name} has no float32 master weights: 16-bit weights lose steps below 1/256 of themselves")
        return None
    if processes == 1 and args.gradient_accumulation_steps > 1:  # DDP reduces gradients in the dtype of the weights
        accumulate_in_float32(model.parameters())
    betas = (args.adam_beta1, args.adam_beta2)
    return MasterAdamW, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}


def forget_moments(optimizer: torch.optim.Optimizer) -> None:
    """Reset an optimizer's moments. Weights and their float32 copies stay."""
    for value, state in list(optimizer.state.items()):
        if "master" in state:
            for name in _MOMENTS:
                state.pop(name, None)
        else:
            del optimizer.state[value]
