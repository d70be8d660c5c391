"""The losses in plain Python floats, one group at a time: the references of the rows of loss_cases.py.

A group is a dict of lists with masked responses already dropped. Nothing here is imported from windkern.
"""

from __future__ import annotations

import math

ETA, BETA = 0.8, 0.3
A, B_, C = 1 / (1 + ETA * BETA), ETA * BETA / (1 + ETA * BETA), ETA / (1 + ETA * BETA)
Group = dict[str, list]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def variance(d: list[float]) -> float:
    return mean([(x - mean(d)) ** 2 for x in d])


def rows(g: Group, *names: str) -> list[tuple[float, ...]]:
    return list(zip(*[g[name] for name in names], strict=True))


def v_rates(g: Group) -> list[float]:
    return g.get("win_rates") or [mean(row) for row in g["prefs"]]


def u_rates(g: Group) -> list[float]:
    return g.get("win_rates") or [(sum(row) - 0.5) / (len(row) - 1) for row in g["prefs"]]


def s_of(g: Group, b: float = B_) -> list[float]:
    return [l - (1 - b) * o - b * r for l, o, r in rows(g, "logps", "old_logps", "ref_logps")]


def gaps(g: Group, base: str = "ref_logps") -> list[float]:
    return [l - r for l, r in rows(g, "logps", base)]


def log_taylor(p: float, delta: float = 0.02) -> float:
    for end, outside in ((delta, p < delta), (1 - delta, p > 1 - delta)):
        if outside:
            return math.log(end) + (p - end) / end - (p - end) ** 2 / (2 * end**2)
    return math.log(p)


def log_softmax(x: list[float]) -> list[float]:
    total = math.log(sum(math.exp(v - max(x)) for v in x)) + max(x)
    return [v - total for v in x]


def softmax(x: list[float]) -> list[float]:
    return [math.exp(v) for v in log_softmax(x)]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigma(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def smoothed(u: float, eps: float = 0.0) -> float:
    return -(1 - eps) * log_sigma(u) - eps * log_sigma(-u)


def ordered_pairs(g: Group) -> list[tuple[int, int]]:
    n = len(g["logps"])
    return [(i, j) for i in range(n) for j in range(n) if i != j]


def square(g: Group) -> float:
    return variance([s - C * w for s, w in zip(s_of(g), v_rates(g), strict=True)])


def pair_square(g: Group, b: float, c: float) -> float:
    s = s_of(g, b)
    prefs = g.get("prefs", [[0.5, 1.0], [0.0, 0.5]])
    return mean([(s[i] - s[j] - c * (prefs[i][j] - 0.5)) ** 2 for i, j in ordered_pairs(g)])


def square_point(g: Group) -> float:
    log_z = g.get("log_z", C / 2)
    return mean([(s + log_z - C * w) ** 2 for s, w in zip(s_of(g), u_rates(g), strict=True)])


def kl(g: Group) -> float:
    s, rates, total = s_of(g), v_rates(g), []
    for x, w in zip(s, rates, strict=True):
        p = mean(rates) + (x - mean(s)) / C
        total.append(w * (math.log(w) - log_taylor(p)) + (1 - w) * (math.log(1 - w) - log_taylor(1 - p)))
    return mean(total)


def nce(g: Group) -> float:
    p = [(s + g.get("log_z", C / 2)) / C for s in s_of(g)]
    return mean([g["prefs"][i][j] * (-log_taylor(p[i]) - log_taylor(1 - p[j])) for i, j in ordered_pairs(g)])


def nce_ratio(g: Group) -> float:
    tilts = [B_ * (r - o) + C * w for (o, r), w in zip(rows(g, "old_logps", "ref_logps"), v_rates(g), strict=True)]
    return -sum(t * q for t, q in zip(softmax(tilts), log_softmax(gaps(g, "old_logps")), strict=True))


def sppo(g: Group) -> float:
    return mean([(d - ETA * (w - 0.5)) ** 2 for d, w in zip(gaps(g, "old_logps"), v_rates(g), strict=True)])


def rebel(g: Group) -> float:
    d, R = gaps(g, "old_logps"), g["rewards"]
    return mean([(d[i] - d[j] - ETA * (R[i] - R[j])) ** 2 for i, j in ordered_pairs(g)])


def balance(g: Group) -> float:
    d = [x - R / BETA for x, R in zip(gaps(g), g["rewards"], strict=True)]
    return mean([(g["log_z"] + x) ** 2 for x in d]) if "log_z" in g else variance(d)


def bond(g: Group, beta: float, gamma: float) -> float:
    (y, first, second), (mine, one, two) = g["logps"], g["rewards"]
    best = first if one > two else second if two > one else (first + second) / 2
    reward = -math.log(16) if mine < min(one, two) else 0.0
    gap = y - g["anchor_logps"][0]
    forward, backward = -best, -(reward - g.get("baseline", 0.0)) * y + gap**2 / 2
    return (1 - beta) * forward + beta * backward + gamma * gap**2 / 2


def bon_sft(g: Group) -> float:
    return mean([-l for l, R in rows(g, "logps", "rewards") if max(g["rewards"]) == R])


def margin(g: Group, base: str = "ref_logps") -> float:
    chosen, rejected = gaps(g, base)
    return chosen - rejected


def bco(g: Group) -> float:
    chosen, rejected = gaps(g)
    return -log_sigma(0.5 * chosen) - log_sigma(-0.5 * rejected)


def discopop(g: Group) -> float:
    u = 0.1 * margin(g)
    gate = sigma(u / 0.05)
    return (1 - gate) * -log_sigma(u) + gate * math.exp(-u)


def policy_of(g: Group, beta: float) -> list[float]:
    return log_softmax([beta * d for d in gaps(g)])


def exo(g: Group) -> float:
    target = log_softmax([R / 0.7 for R in g["rewards"]]) if "rewards" in g else [math.log(0.9), math.log(0.1)]
    return sum(math.exp(p) * (p - q) for p, q in zip(policy_of(g, 0.5), target, strict=True))


def infonca(g: Group) -> float:
    return -sum(q * p for q, p in zip(softmax([R / 0.7 for R in g["rewards"]]), policy_of(g, 0.5), strict=True))


def nca(g: Group) -> float:
    q = softmax([R / 0.7 for R in g["rewards"]]) if "rewards" in g else [1.0, 0.0]
    d = [0.5 * x for x in gaps(g)]
    return -sum(w * log_sigma(x) for w, x in zip(q, d, strict=True)) - mean([log_sigma(-x) for x in d])


def plackett_luce(g: Group) -> float:
    """Return the loss of picking the best, then the best of the rest, and so on."""
    left, total = sorted(zip(g["rewards"], [0.5 * d for d in gaps(g)], strict=True), reverse=True), 0.0
    while left:
        total -= log_softmax([z for _, z in left])[0]
        left.pop(0)
    return total


def breslow(g: Group) -> float:
    z, R = [0.5 * d for d in gaps(g)], g["rewards"]
    pairs = list(zip(z, R, strict=True))
    return sum(math.log(sum(math.exp(y) for y, Q in pairs if Q <= P)) - x for x, P in pairs)


def means(g: Group) -> list[float]:
    return [l / T for l, T in rows(g, "logps", "lengths")]


def orpo(g: Group) -> float:
    chosen, rejected = means(g)
    odds = [x - math.log(1 - math.exp(x)) for x in (chosen, rejected)]
    return -chosen - 0.4 * log_sigma(odds[0] - odds[1])


def simpo(g: Group, eps: float = 0.0) -> float:
    chosen, rejected = means(g)
    return smoothed(2 * (chosen - rejected) - 0.6, eps)


def cpo(g: Group) -> float:
    chosen, rejected = g["logps"]
    return smoothed(0.5 * (chosen - rejected), 0.1) - 0.7 * means(g)[0]


def kto_values(g: Group, z0: float) -> float:
    signed = [(d - z0, good) for d, good in zip(gaps(g), g["desirable"], strict=True)]
    return mean([0.8 * (1 - sigma(0.5 * x)) if good else 1.3 * (1 - sigma(-0.5 * x)) for x, good in signed])


def kto(groups: list[Group], start: list[Group]) -> list[float]:
    z0 = max(0.0, mean([d for g in start for d in gaps(g)]))
    return [kto_values(g, z0) for g in groups]


def aot(groups: list[Group], start: list[Group], paired: bool) -> list[float]:
    sides = [[g[name][0] - g[name][1] for name in ("logps", "ref_logps")] if paired else gaps(g) for g in groups]
    upper, lower = ([side[k] for side in sides] for k in (0, 1))
    rank = {x: k for k, x in enumerate(sorted(upper))}
    return [smoothed(0.5 * (x - sorted(lower)[rank[x]]), 0.1) for x in upper]


def apo_zero(g: Group) -> float:
    chosen, rejected = gaps(g)
    return 1 - sigma(0.5 * chosen) + sigma(0.5 * rejected)


def apo_down(g: Group) -> float:
    chosen, rejected = gaps(g)
    return sigma(0.5 * chosen) + 1 - sigma(0.5 * (chosen - rejected))


def grpo(g: Group, average: str = "sequence", beta: float = 0.0, scale: bool = True) -> float:
    R, K = g.get("rewards"), len(g["logps"])
    spread = math.sqrt(K / max(K - 1, 1) * variance(R)) + 1e-4 if R and scale else 1.0
    total = []
    for i, tokens in enumerate(g["logps"]):
        advantage = (R[i] - mean(R)) / spread if R else g["advantages"][i]
        values = []
        for t, l in enumerate(tokens):
            rho = math.exp(l - g["old_logps"][i][t])
            value = -min(rho * advantage, min(max(rho, 0.8), 1.3) * advantage)
            if beta:
                x = g["ref_logps"][i][t] - l
                value += beta * (math.exp(x) - x - 1)
            values.append(value)
        total.append(values)
    if average == "group":
        return mean([value for values in total for value in values])
    return mean([mean(values) if average == "sequence" else sum(values) for values in total])
