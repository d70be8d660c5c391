"""Compare ways to store the weights of a bfloat16 run: distance to a known optimum, memory and time.

    python -m benchmarks.master_weights [--steps N] [--rates X ...] [--vocab N] [--hidden N] [--out FILE]

A small Llama is fitted to another one whose weights differ by 2 %, as after a fine-tune, by the KL of the next token;
the best possible result is 0. The learning rate falls to 0, and each choice gets the same batches in the same order.
"kl" is that of the weights rounded to bfloat16, as products use them, and "kept" is that of the most precise copy; both
are computed in float32, so that the rounding of a forward does not hide that of the weights. Peers that are not
installed are left out: optimi (Kahan summation), torchao (stochastic rounding).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import record, timing
from windkern.train.optim import MasterAdamW

CHANGE = 0.02  # of the standard deviation of each weight: the change by a fine-tune
BATCH, LENGTH, BATCHES = 16, 32, 8  # rows and tokens of a step; number of batches, which repeat
Optimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Choice:
    """The dtype of the trained weights, and their optimizer."""

    weights: torch.dtype
    autocast: bool  # products in bfloat16
    optimizer: Optimizer


def _torch_adamw(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)


def _ours(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return MasterAdamW(parameters, lr=rate)


def _kahan(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    from optimi import AdamW

    return AdamW(parameters, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, kahan_sum=True)


def _stochastic(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    from torchao.optim import _AdamW

    return _AdamW(parameters, lr=rate, weight_decay=0.0, bf16_stochastic_round=True)


EXACT = "float32, no autocast"  # its products use unrounded weights
CHOICES = {
    EXACT: Choice(torch.float32, False, _torch_adamw),
    "float32 under bf16: true": Choice(torch.float32, True, _torch_adamw),
    "bfloat16, MasterAdamW": Choice(torch.bfloat16, False, _ours),
    "bfloat16, torch's AdamW": Choice(torch.bfloat16, False, _torch_adamw),
    "bfloat16, Kahan (optimi)": Choice(torch.bfloat16, False, _kahan),
    "bfloat16, stochastic (torchao)": Choice(torch.bfloat16, False, _stochastic),
}
NEEDS = {_kahan: "optimi", _stochastic: "torchao"}


def make_models(vocab: int, hidden: int) -> tuple[nn.Module, nn.Module]:
    """Return the initial model and the target, both in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
    start = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for value in start.parameters():  # the same numbers in every dtype, larger than a random initialisation
            value.copy_((3 * value if value.dim() > 1 else value).bfloat16())
    target = copy.deepcopy(start)
    with torch.no_grad():
        for value in target.parameters():
            if value.dim() > 1:
                value.add_(CHANGE * value.std() * torch.randn_like(value))
    return start, target


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean KL of a model to the target, nats per token; `wanted` holds the target's log-probs."""
    return F.kl_div(logits.float().log_softmax(-1), wanted, log_target=True, reduction="sum") / wanted[..., 0].numel()


def kept_weights(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the most precise copy of the weights, in float32: a master, or a weight with its compensation."""
    found = []
    for value in parameters:
        state = optimizer.state[value]
        kept = state.get("master", value).detach().float()
        found.append(kept + state["kahan_comp"].float() if state.get("kahan_comp") is not None else kept)
    return found


def fit(choice: Choice, rate: float, steps: int, vocab: int, hidden: int) -> dict[str, Any]:
    """Train one choice; return its distance to the optimum, bytes per parameter, and peak and seconds of a step."""
    start, target = make_models(vocab, hidden)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(vocab, (BATCHES, BATCH, LENGTH), generator=generator)
    with torch.no_grad():
        wanted = [target(ids).logits.log_softmax(-1) for ids in inputs]
    model = copy.deepcopy(start).to(choice.weights)
    parameters = list(model.parameters())
    optimizer = choice.optimizer(parameters, rate)

    def step(place: int) -> float:
        _set_rate(optimizer, rate * (1 - place / steps))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=choice.autocast):
            logits = model(inputs[place % BATCHES]).logits
        loss = divergence(logits, wanted[place % BATCHES])
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    seconds, peaks, losses = [], [], []
    for place in range(steps):
        if place < 3 or place >= 6:
            taken, loss = timing.timed(lambda place=place: step(place))
            seconds.append(taken)
        else:
            measured = timing.measure(lambda place=place: step(place))
            peaks.append(measured.peak_bytes)
            loss = measured.result
        losses.append(loss)
    kept = kept_weights(optimizer, parameters)

    @torch.no_grad()
    def kl_of(weights: list[Tensor]) -> float:
        for value, weight in zip(start.parameters(), weights, strict=True):
            value.copy_(weight)
        return (
            sum(float(divergence(start(ids).logits, want)) for ids, want in zip(inputs, wanted, strict=True)) / BATCHES
        )

    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    gradients = [value.grad for value in parameters if value.grad is not None]
    count = sum(value.numel() for value in parameters)

    def bytes_a_parameter(tensors: list[Tensor]) -> float:
        return sum(value.numel() * value.element_size() for value in tensors) / count

    return {
        "first_loss": losses[0],
        "kl": kl_of([weight if choice is CHOICES[EXACT] else weight.bfloat16() for weight in kept]),
        "kl_kept": kl_of(kept),
        "weights_bytes": bytes_a_parameter(parameters),
        "gradient_bytes": bytes_a_parameter(gradients),
        "state_bytes": bytes_a_parameter(state),
        "cast_bytes": 2.0 if choice.autocast else 0.0,  # autocast's bfloat16 copies, until the end of the backward pass
        "peak_bytes": min((each for each in peaks if each is not None), default=None),  # of a step, above live memory
        "median_s": sorted(seconds)[len(seconds) // 2],
        "parameters": count,
    }


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's optimizers, which are compiled
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def run(rates: list[float], steps: int, vocab: int, hidden: int) -> list[dict[str, Any]]:
    """Run every choice at every learning rate, and print a line for each."""
    rows = []
    for rate in rates:
        for name, choice in CHOICES.items():
            package = NEEDS.get(choice.optimizer)
            if package is not None and importlib.util.find_spec(package) is None:
                print(f"{rate:.0e}  {name:<31} not measured: {package} is not installed", flush=True)
                continue
            row = {"choice": name, "learning_rate": rate, **fit(choice, rate, steps, vocab, hidden)}
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    kept = sum(row[f"{name}_bytes"] for name in ("weights", "gradient", "state", "cast"))
    peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    return (
        f"{row['learning_rate']:.0e}  {row['choice']:<31} kl {row['first_loss']:.1e} -> {row['kl']:.1e}, "
        f"kept {row['kl_kept']:.1e}  {kept:.1f} bytes a parameter  peak of a step +{peak} MiB  "
        f"{1e3 * row['median_s']:.1f} ms a step"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.master_weights", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default: 400)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-5], help="learning rates")
    parser.add_argument("--vocab", type=int, default=1024, help="vocabulary (default: 1024)")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size (default: 128)")
    parser.add_argument("--out", type=Path, default=Path("out/master_weights.json"), metavar="FILE")
    chosen = parser.parse_args(argv)
    if chosen.steps < 7:
        parser.error(f"--steps must be at least 7 (three are measured for memory), got {chosen.steps}")
    settings = {"steps": chosen.steps, "vocab": chosen.vocab, "hidden": chosen.hidden}
    rows = run(chosen.rates, chosen.steps, chosen.vocab, chosen.hidden)
    document = {"kind": "master_weights", **record.run_info(settings), "rows": rows}
    record.write_atomically(chosen.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
