"""Log-probs of transformers' causal LMs from hidden states and heads, without the logits."""

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
from windkern.hf.groups import SHARED_PROMPT, group_logps, layout_rules, run_rows, run_rows_inside
from windkern.hf.layout import GroupLayout, GroupRows, LayoutRules, lengths_of, make_layout, make_rows

__all__ = [
    "IGNORE_INDEX",
    "SHARED_PROMPT",
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
    "run_rows_inside",
    "sequence_logps",
]
