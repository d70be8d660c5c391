"""Losses over (B, N) log-probs in plain differentiable torch, one small file each, listed in `LOSSES`.

To add one, write `losses/<name>.py`, add an entry here, and add a row to `tests/loss_cases.py`.
"""

from __future__ import annotations

from windkern.losses._groups import check_prefs
from windkern.losses.aot import aot
from windkern.losses.apo import VARIANTS, apo
from windkern.losses.bon_sft import bon_sft
from windkern.losses.bond import baseline, bond
from windkern.losses.cpo import cpo
from windkern.losses.dpo import LINKS, dpo
from windkern.losses.entry import PAIR, Group, Loss
from windkern.losses.exo import exo
from windkern.losses.grpo import grpo
from windkern.losses.infonca import infonca
from windkern.losses.inpo import inpo
from windkern.losses.kto import kto
from windkern.losses.listwise_dpo import listwise_dpo
from windkern.losses.module import WindLoss
from windkern.losses.nca import nca
from windkern.losses.orpo import orpo
from windkern.losses.rebel import rebel
from windkern.losses.simpo import simpo
from windkern.losses.spin import spin
from windkern.losses.sppo import sppo
from windkern.losses.trajectory_balance import trajectory_balance
from windkern.losses.wind import OBJECTIVES, against_all, fit_metrics, inverse_square_step, wind

__all__ = [
    "LINKS",
    "LOSSES",
    "OBJECTIVES",
    "VARIANTS",
    "Loss",
    "WindLoss",
    "aot",
    "apo",
    "bon_sft",
    "bond",
    "check_prefs",
    "cpo",
    "dpo",
    "exo",
    "grpo",
    "infonca",
    "inpo",
    "kto",
    "listwise_dpo",
    "nca",
    "orpo",
    "rebel",
    "simpo",
    "spin",
    "sppo",
    "trajectory_balance",
    "wind",
]


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            name="wind",
            function=wind,
            formula="mean_i (d_i - mean d)^2, d_i = l_i - a o_i - b r_i - c w_i (objective='square')",
            inputs=("logps", "old_logps", "ref_logps", "prefs | win_rates", "log_z?"),
            source="WIND (arXiv 2410.20727), docs/theory.md eq. (1.31) to (1.44)",
            separable=True,
            when="several sampled responses per prompt, judged in pairs or by win rate, with a pull to the reference",
            settings={"eta": 4.0, "beta": 0.05},
            variants=("objective", tuple(OBJECTIVES)),
            against_all=against_all,
            scale=inverse_square_step,
            pull=lambda arguments: arguments["beta"],
            metrics=fit_metrics,
        ),
        Loss(
            name="sppo",
            function=sppo,
            formula="mean_i (l_i - o_i - eta (w_i - 1/2))^2",
            inputs=("logps", "old_logps", "prefs | win_rates"),
            source="SPPO (arXiv 2405.00675)",
            separable=True,
            when="as wind without a reference, or to compare with published SPPO runs",
            settings={"eta": 4.0},
            against_all=lambda arguments: True,
            scale=lambda arguments: 1 / arguments["eta"] ** 2,
        ),
        Loss(
            name="inpo",
            function=inpo,
            formula="mean_ij (s_i - s_j - (P_ij - 1/2)/eta)^2, s_i = l_i - (1 - tau/eta) o_i - tau/eta r_i",
            inputs=("logps", "old_logps", "ref_logps", "prefs?"),
            source="INPO (arXiv 2407.00617)",
            separable=True,
            when="wind's pair form in INPO's parameters; pairs with a known winner and two frozen policies",
            settings={"eta": 0.25, "tau": 0.05},
        ),
        Loss(
            name="rebel",
            function=rebel,
            formula="mean_ij (l_i - o_i - l_j + o_j - eta (R_i - R_j))^2",
            inputs=("logps", "old_logps", "rewards"),
            source="REBEL (arXiv 2404.16767)",
            separable=True,
            when="rewards instead of comparisons, no pull to a reference",
            settings={"eta": 1.0},
        ),
        Loss(
            name="trajectory_balance",
            function=trajectory_balance,
            formula="mean_i (d_i - mean d)^2, d_i = l_i - r_i - R_i / beta",
            inputs=("logps", "ref_logps", "rewards", "log_z?"),
            source="TBA (arXiv 2503.18929), VarGrad",
            separable=True,
            when="rewards, and responses from anywhere: replay, old policies, other models",
            settings={"beta": 1.0},
            any_policy=True,
        ),
        Loss(
            name="bond",
            function=bond,
            formula="-(1-beta) l(y*) - beta (r_J - baseline) l(y) + (beta + gamma)/2 (l(y) - a(y))^2",
            inputs=("logps", "anchor_logps", "rewards", "baseline?"),
            source="J-BOND (arXiv 2407.14622)",
            separable=True,
            when="distil best-of-2 of a moving anchor; one sample of the policy and two of the anchor in every step",
            shape=("B", 3),
            fitted=Group("anchor", sampled=3),
            order_only=True,
            across=baseline,
            across_name="baseline",
        ),
        Loss(
            name="bon_sft",
            function=bon_sft,
            formula="-l_best, averaged over ties",
            inputs=("logps", "rewards"),
            source="best-of-N fine-tuning (arXiv 2307.09288, 2407.14622)",
            separable=True,
            when="the simplest use of N scored responses; learns only from the best",
            order_only=True,
        ),
        Loss(
            name="dpo",
            function=dpo,
            formula="-log sigma(beta h), h = (l_w - r_w) - (l_l - r_l) (link='sigmoid')",
            inputs=("logps", "ref_logps"),
            source="DPO (arXiv 2305.18290); cDPO, robust DPO, IPO, hinge, BCO, DiscoPOP as links",
            separable=True,
            when="fixed pairs of a chosen and a rejected response, nothing sampled",
            shape=PAIR,
            settings={"beta": 1.0},
            variants=("link", tuple(LINKS)),
        ),
        Loss(
            name="spin",
            function=spin,
            formula="-log sigma(beta [(l_w - o_w) - (l_l - o_l)])",
            inputs=("logps", "old_logps"),
            source="SPIN (arXiv 2401.01335)",
            separable=True,
            when="demonstrations only, preferred over the model's own samples",
            shape=PAIR,
            settings={"beta": 1.0},
            fitted=Group("demonstration", sampled=1),
        ),
        Loss(
            name="exo",
            function=exo,
            formula="KL(p || q), p = softmax(beta (l - r)), q = softmax(R / alpha) or (1 - eps, eps)",
            inputs=("logps", "ref_logps", "rewards?"),
            source="EXO (arXiv 2402.00856)",
            separable=True,
            when="as infonca, but seeking the mode of the target",
            settings={"beta": 1.0},
        ),
        Loss(
            name="infonca",
            function=infonca,
            formula="-sum_i q_i log softmax(beta (l - r))_i, q = softmax(R / alpha)",
            inputs=("logps", "ref_logps", "rewards"),
            source="InfoNCA (arXiv 2402.05369)",
            separable=True,
            when="graded rewards of fixed responses; dpo for more than two",
            settings={"beta": 1.0},
        ),
        Loss(
            name="nca",
            function=nca,
            formula="-sum_i q_i log sigma(beta d_i) - mean_i log sigma(-beta d_i), d_i = l_i - r_i",
            inputs=("logps", "ref_logps", "rewards?"),
            source="NCA (arXiv 2402.05369)",
            separable=True,
            when="as infonca or dpo, if the likelihood of good responses must not fall",
            settings={"beta": 1.0},
        ),
        Loss(
            name="listwise_dpo",
            function=listwise_dpo,
            formula="-sum_i [z_i - log sum_{j: R_j <= R_i} exp z_j], z = beta (l - r)",
            inputs=("logps", "ref_logps", "rewards"),
            source="Plackett-Luce form of DPO (arXiv 2305.18290)",
            separable=True,
            when="ranked fixed responses, if only the order of the rewards is reliable",
            settings={"beta": 1.0},
            order_only=True,
        ),
        Loss(
            name="simpo",
            function=simpo,
            formula="-log sigma(beta (l_w / T_w - l_l / T_l) - gamma)",
            inputs=("logps", "lengths"),
            source="SimPO (arXiv 2405.14734)",
            separable=True,
            when="fixed pairs without a reference model, normalised by length",
            shape=PAIR,
        ),
        Loss(
            name="orpo",
            function=orpo,
            formula="-l_w / T_w - beta log sigma(odds_w - odds_l), odds = log(p / (1 - p)), p = exp(l / T)",
            inputs=("logps", "lengths"),
            source="ORPO (arXiv 2403.07691)",
            separable=True,
            when="fine-tuning and preference in one stage, without a reference model",
            shape=PAIR,
            settings={"beta": 1.0},
        ),
        Loss(
            name="cpo",
            function=cpo,
            formula="-log sigma(beta (l_w - l_l)) - alpha l_w / T_w",
            inputs=("logps", "lengths"),
            source="CPO (arXiv 2401.08417)",
            separable=True,
            when="fixed pairs without a reference model, imitating the chosen response",
            shape=PAIR,
            settings={"beta": 1.0},
        ),
        Loss(
            name="kto",
            function=kto,
            formula="mean_i w (1 - sigma(+-beta (d_i - z0))), + for desirable; z0 = max(0, mean of kl_gaps)",
            inputs=("logps", "ref_logps", "desirable", "kl_gaps?"),
            source="KTO (arXiv 2402.01306)",
            separable=False,
            when="single responses marked good or bad; z0 spans the batch, so inside fused_loss only with kl_gaps",
            settings={"beta": 1.0},
        ),
        Loss(
            name="apo",
            function=apo,
            formula="1 - sigma(beta d_w) + sigma(beta d_l) (variant='zero')",
            inputs=("logps", "ref_logps"),
            source="APO (arXiv 2408.06266)",
            separable=True,
            when="pairs, if it is known whether the chosen one beats the model",
            shape=PAIR,
            settings={"beta": 1.0},
            variants=("variant", tuple(VARIANTS)),
        ),
        Loss(
            name="aot",
            function=aot,
            formula="mean_k -log sigma(beta (upper_(k) - lower_(k))), both sorted over the batch",
            inputs=("logps", "ref_logps"),
            source="AOT (arXiv 2406.05882)",
            separable=False,
            when="chosen and rejected as two distributions, paired or not; sorts the whole batch",
            shape=PAIR,
            settings={"beta": 1.0},
        ),
        Loss(
            name="grpo",
            function=grpo,
            formula="mean_i mean_t -min(rho A_i, clip(rho) A_i) + beta (exp(x) - x - 1), x = r_t - l_t",
            inputs=("logps", "old_logps", "ref_logps?", "rewards | advantages"),
            source="GRPO (arXiv 2402.03300)",
            separable=False,
            when="policy gradient on token_logps; per token, so not inside fused_loss",
            shape=("B", "N", "T"),
            settings={"clip_high": 0.3},
            span=1.0,
        ),
    )
}
