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
from windkern.hf.groups import group_logps, layout_rules, run_rows
from windkern.hf.layout import GroupLayout, GroupRows, LayoutRules, lengths_of, make_layout, make_rows

__all__ = [
    "IGNORE_INDEX",
    "CausalLM",
    "GroupLayout",
    "GroupRows",
    "LayoutRules",
    "UnsupportedModelError",
    "completion_targets",
    "group_logps",
    "hidden_and_head",
    "layout_rules",
    "lengths_of",
    "make_layout",
    "make_rows",
    "run",
    "run_inside",
    "run_rows",
    "sequence_logps",
]
