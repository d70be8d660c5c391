"""Measure a WIND gradient step of a whole model, with and without fused ops: time, peak memory, largest fitting batch.

    python -m benchmarks.step [--size 1b|tiny] [--device cuda] [--out FILE] [--minutes N]

The model is a randomly initialised Llama in bfloat16 with gradient checkpointing, with full fine-tuning and with LoRA
on the body (if peft is installed). A step is forward and backward of groups of eight responses, for given old and
reference log-probs. "plain" is the model's own logits and autograd.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import windkern as wk
from benchmarks import record, timing
from benchmarks.exact import RESPONSES, WIND
from windkern import hf
from windkern.train.jobs import loss_job

TOKENS = 512  # per response
SIZES = {
    # The shape of Llama-3.2-1B.
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 515,
    },
}
SAMPLES = 3
Step = Callable[[Tensor, dict[str, Tensor]], None]


def make_model(size: str, adapter: str, device: str) -> nn.Module:
    """Return a random model that trains all its weights, or LoRA matrices on a frozen body and head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[size], tie_word_embeddings=True)).bfloat16()
    # Reason: transformers is renaming one method to the other.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    if adapter == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config).to(device)
        model.enable_input_require_grads()
    return model.train()


def _batch(model: nn.Module, groups: int, tokens: int, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator(device).manual_seed(1)
    made = {"generator": generator, "device": device}
    ids = torch.randint(0, model.config.vocab_size, (groups * RESPONSES, tokens + 1), **made)
    old = -float(torch.tensor(model.config.vocab_size).log()) * tokens + torch.randn(groups, RESPONSES, **made)
    scores = torch.randn(groups, RESPONSES, **made)
    prefs = torch.sigmoid(scores[:, :, None] - scores[:, None, :])
    return ids, {"old_logps": old, "ref_logps": old.clone(), "prefs": prefs}


def fused_step(model: nn.Module) -> Step:
    """Return the step that `WindTrainer` runs for a batch."""
    loss_fn = functools.partial(wk.losses.wind, reduction="none", **WIND)

    def step(ids: Tensor, constants: dict[str, Tensor]) -> None:
        targets = ids[:, 1:].reshape(-1, RESPONSES, ids.shape[1] - 1)
        job = loss_job(loss_fn, targets, constants, 1.0, {})
        hf.run(model, ids[:, :-1], torch.ones_like(ids[:, :-1]), job).backward()

    return step


def plain_step(model: nn.Module) -> Step:
    def step(ids: Tensor, constants: dict[str, Tensor]) -> None:
        logits = model(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1])).logits
        logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        wk.losses.wind(logps.sum(-1).view(-1, RESPONSES), **constants, **WIND).backward()

    return step


STEPS: dict[str, Callable[[nn.Module], Step]] = {"fused": fused_step, "plain": plain_step}


def measure(name: str, step: Step, model: nn.Module, groups: int, tokens: int, device: str) -> dict[str, Any]:
    """Return the seconds of one step, and its peak bytes beyond the model; `fits` is False if memory ran out."""
    row = {"step": name, "groups": groups, "rows": groups * RESPONSES * tokens, "fits": True}

    def call() -> None:
        model.zero_grad(set_to_none=True)
        step(*batch)

    try:
        batch = _batch(model, groups, tokens, device)
        call()
        measured = timing.measure(call, device)
        seconds = sorted(timing.timed(call, device)[0] for _ in range(SAMPLES))
        row |= {"median_s": seconds[len(seconds) // 2], "peak_bytes": measured.peak_bytes}
    except torch.OutOfMemoryError:
        row["fits"] = False
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return row


def run(
    size: str,
    device: str,
    tokens: int,
    most: int,
    deadline: float,
    save: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Double the groups until a step no longer fits, for each adapter and step; save after each row."""
    rows: list[dict[str, Any]] = []
    for adapter in ("full", "lora"):
        try:
            model = make_model(size, adapter, device)
        except ImportError as error:
            rows.append({"adapter": adapter, "absent": str(error)})
            continue
        for name, build in STEPS.items():
            groups, step = 1, build(model)
            while groups <= most and time.monotonic() < deadline:
                row = {"adapter": adapter, **measure(name, step, model, groups, tokens, device)}
                rows.append(row)
                save(rows)
                print(_line(row), flush=True)
                if not row["fits"]:
                    break
                groups *= 2
        del model, step
    return rows


def _line(row: dict[str, Any]) -> str:
    head = f"{row['adapter']:<5} {row['step']:<6} {row['rows']:>8} tokens"
    if not row["fits"]:
        return f"{head}  does not fit"
    peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
    return f"{head}  {row['median_s']:.3f} s  {peak} GiB beyond the model"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="1b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens per response (default: {TOKENS})")
    parser.add_argument("--most", type=int, default=256, help="largest number of groups of eight responses")
    parser.add_argument("--minutes", type=float, default=3.0, help="start no further step after this many minutes")
    parser.add_argument("--out", type=Path, default=Path("out/step.json"), metavar="FILE")
    chosen = parser.parse_args(argv)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none")
    settings = {"size": chosen.size, "tokens": chosen.tokens, "responses": RESPONSES}
    deadline = time.monotonic() + 60 * chosen.minutes
    document = {"kind": "step", **record.run_info(settings, chosen.device)}

    def save(rows: list[dict[str, Any]]) -> None:
        record.write_atomically(chosen.out, {**document, "rows": rows})

    save(run(chosen.size, chosen.device, chosen.tokens, chosen.most, deadline, save))
    return 0


if __name__ == "__main__":
    sys.exit(main())
