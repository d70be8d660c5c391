"""Log-probs and win-rate losses straight from hidden states and the head, without the [tokens, vocab] logits."""

from windkern import backends, losses, naive
from windkern.backends import BackendUnavailableError
from windkern.head import Head
from windkern.ops.fused_loss import fused_loss
from windkern.ops.logprobs import TokenLogps, token_logps
from windkern.ops.pairs import pair_loss, win_rates
from windkern.ops.sequence import sequence_logps
from windkern.plan import Plan, plan

__all__ = [
    "BackendUnavailableError",
    "Head",
    "Plan",
    "TokenLogps",
    "backends",
    "fused_loss",
    "losses",
    "naive",
    "pair_loss",
    "plan",
    "sequence_logps",
    "token_logps",
    "win_rates",
]
