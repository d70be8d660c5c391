"""DPO in a plain PyTorch loop: the ten lines that change nothing but where the log-probs come from.

    python examples/plain_loop.py             # a few seconds on one core

The toy language model stands for yours: windkern wants its hidden states and the weight of its head. Never pass the
hidden states through the head yourself, and the [tokens, vocabulary] logits never exist.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import windkern as wk

VOCAB, HIDDEN = 5000, 64


class ToyLM(nn.Module):
    """Tokens (..., T) to hidden states (..., T, H), and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(VOCAB, HIDDEN), nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        flat = self.embedding(ids.flatten(0, -2))
        return self.body(flat)[0].view(*ids.shape, HIDDEN)


def train(model: ToyLM, ids: Tensor, targets: Tensor, steps: int) -> list[float]:
    """Fit pairs: ids (B, 2, T), chosen and rejected; targets (B, 2, T) are the next tokens, -100 in the prompt."""
    with torch.no_grad():
        ref_logps = wk.sequence_logps(model(ids), model.head.weight, targets)  # (B, 2)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        logps = wk.sequence_logps(model(ids), model.head.weight, targets)  # (B, 2), differentiable
        loss = wk.losses.dpo(logps, ref_logps, beta=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def make_pairs(count: int, length: int, prompt: int) -> tuple[Tensor, Tensor]:
    """Random pairs of sequences that share their prompt."""
    tokens = torch.randint(VOCAB, (count, 2, length + 1))
    tokens[:, 1, :prompt] = tokens[:, 0, :prompt]
    targets = tokens[..., 1:].clone()
    targets[..., : prompt - 1] = -100
    return tokens[..., :-1], targets


if __name__ == "__main__":
    torch.manual_seed(0)
    found = train(ToyLM(), *make_pairs(count=8, length=32, prompt=8), steps=30)
    print(f"loss {found[0]:.3f} -> {found[-1]:.3f} in {len(found)} steps")
