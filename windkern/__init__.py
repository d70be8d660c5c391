"""Log-probs and win-rate losses straight from hidden states and the head, without the [tokens, vocab] logits."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from windkern import backends, hf, losses, naive, nn, sharding, tabular
    from windkern.backends import BackendUnavailableError
    from windkern.head import Head
    from windkern.ops.fused_loss import fused_loss
    from windkern.ops.logprobs import TokenLogps, token_logps
    from windkern.ops.pairs import pair_loss, win_rates
    from windkern.ops.sequence import sequence_logps
    from windkern.plan import Plan, plan
    from windkern.train.config import WindConfig
    from windkern.train.trainer import WindTrainer

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "Head",
    "Plan",
    "TokenLogps",
    "WindConfig",
    "WindTrainer",
    "backends",
    "fused_loss",
    "hf",
    "losses",
    "naive",
    "nn",
    "pair_loss",
    "plan",
    "sequence_logps",
    "sharding",
    "tabular",
    "token_logps",
    "win_rates",
]

# Imported at first use: torch alone takes seconds, and the command line must be able to show progress meanwhile.
_LAZY = {
    "BackendUnavailableError": "windkern.backends:BackendUnavailableError",
    "Head": "windkern.head:Head",
    "Plan": "windkern.plan:Plan",
    "TokenLogps": "windkern.ops.logprobs:TokenLogps",
    "WindConfig": "windkern.train.config:WindConfig",
    "WindTrainer": "windkern.train.trainer:WindTrainer",
    "backends": "windkern.backends",
    "fused_loss": "windkern.ops.fused_loss:fused_loss",
    "hf": "windkern.hf",
    "losses": "windkern.losses",
    "nn": "windkern.nn",
    "pair_loss": "windkern.ops.pairs:pair_loss",
    "plan": "windkern.plan:plan",
    "naive": "windkern.naive",
    "sequence_logps": "windkern.ops.sequence:sequence_logps",
    "sharding": "windkern.sharding",
    "tabular": "windkern.tabular",
    "token_logps": "windkern.ops.logprobs:token_logps",
    "win_rates": "windkern.ops.pairs:win_rates",
}


# Names that this module imports for itself and `dir` leaves out.
_IMPORTED = ("Any", "ModuleType", "TYPE_CHECKING", "annotations", "importlib", "sys")

# Names that need the extra `train`: without it, `from windkern import *` leaves them out.
_NEEDS_TRAIN = ("WindConfig", "WindTrainer")
if importlib.util.find_spec("transformers") is None:
    for _name in _NEEDS_TRAIN:
        __all__.remove(_name)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'windkern' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if name not in _NEEDS_TRAIN:
            raise
        told = f'windkern.{name} needs {error.name}; run: python -m pip install "windkern[train]"'
        raise ImportError(told, name=error.name) from error
    found = getattr(found, attribute) if attribute else found
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name not in _IMPORTED)})


class _Package(ModuleType):
    """Keep `windkern.plan` the function.

    Hazard: importing the module windkern.plan binds the module to that name. Remedy: bind its function instead.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name == "plan" and isinstance(value, ModuleType)
        super().__setattr__(name, value.plan if is_module else value)


sys.modules[__name__].__class__ = _Package
