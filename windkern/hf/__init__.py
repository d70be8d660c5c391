"""Log-probs of transformers' causal LMs from their hidden states and heads, without the logits."""

from windkern.hf.causal_lm import (
    IGNORE_INDEX,
    CausalLM,
    UnsupportedModelError,
    completion_targets,
    hidden_and_head,
    run,
    run_inside,
    sequence_logps,
)

__all__ = [
    "IGNORE_INDEX",
    "CausalLM",
    "UnsupportedModelError",
    "completion_targets",
    "hidden_and_head",
    "run",
    "run_inside",
    "sequence_logps",
]
