"""Log-probs and win-rate losses straight from hidden states and the head, without the [tokens, vocab] logits."""

import importlib

from windkern import backends, losses, nn, reference
from windkern.backends import BackendUnavailableError
from windkern.ops.fused_loss import fused_loss
from windkern.ops.logprobs import TokenLogps, token_logps
from windkern.ops.pairs import pair_loss, win_rates
from windkern.ops.sequence import sequence_logps
from windkern.plan import Plan, plan
from windkern.transform import LogitTransform

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "LogitTransform",
    "Plan",
    "TokenLogps",
    "WindConfig",
    "WindTrainer",
    "backends",
    "fused_loss",
    "hf",
    "losses",
    "nn",
    "pair_loss",
    "plan",
    "reference",
    "sequence_logps",
    "sharding",
    "tabular",
    "token_logps",
    "win_rates",
]

# Imported at first use: they pull in libraries that `import windkern` should not wait for.
_LAZY = {
    "hf": "windkern.hf",
    "sharding": "windkern.integrations.sharding",
    "tabular": "windkern.tabular",
    "WindConfig": "windkern.train.config:WindConfig",
    "WindTrainer": "windkern.train.trainer:WindTrainer",
}


def __getattr__(name: str):
    if name in _LAZY:
        module, _, attribute = _LAZY[name].partition(":")
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found
    raise AttributeError(f"module 'windkern' has no attribute {name!r}")
