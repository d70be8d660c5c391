"""Log-probs of groups of responses, with the body run once per prompt instead of once per response.

`group_logps` does everything in one call. A trainer, which scores the same groups under several models and then fits
them, calls the steps one by one:

    rules = layout_rules(model, shared_prompt="auto")              # once: checks the model, under FSDP2 on all ranks
    layout = make_layout(lengths_of(prompts, completions), rules)  # of a batch, from lengths and rules without ids
    rows = make_rows(layout, prompts, completions, fill=pad_id)    # tensors on the CPU; pin_memory() and to(device)
    logps = run_rows(model, rows, score_job)                       # inside the model's call, through any wrapper

* The rows of a batch are a function of its lengths and of `rules`. If pi_t is scored and pi_theta is fitted on the same
  batches with the same rules, both run the same shapes, so log pi_theta - log pi_t is exactly 0 before the first step.
  Store `rules` (a dataclass of numbers) with the run, and reject others on resume; compare with `layout.to_json()`.
* Ranks agree on `rules` by taking those of rank 0, or `shared=False` if any rank has it.
* A frozen reference is another model with its own rules. Its log-probs are constants, so they need not match the
  policy's bit for bit.
* A job gets the model's parts and hidden states of scored tokens only: packed (M, H), in the order of `rows.targets`
  and `rows.cu_seqlens`, for `sequence_logps` and `token_logps`; or with `padded=True` (S, R, H), whose targets are
  `rows.padded()[1]`, for `fused_loss` after a view as (B, N, R, H).
* A mixture of experts routes, balances and counts the tokens it sees, so it counts those of a shared prompt once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from windkern._checks import check_choice, check_count, check_int, check_number
from windkern.hf import call as hf_call
from windkern.hf import masks as hf_masks
from windkern.hf.causal_lm import CausalLM, check_head_stays, parts_of
from windkern.hf.check import verdict_of
from windkern.hf.head import UnsupportedModelError
from windkern.hf.layout import (
    MASK_BUDGET,
    GroupRows,
    LayoutRules,
    lengths_of,
    make_layout,
    make_rows,
)
from windkern.hf.shared_check import inputs_of, sharing_of
from windkern.ops.logprobs import token_logps
from windkern.ops.sequence import sequence_logps

SHARED_PROMPT = ("auto", "always", "never")
# A layer has about 12 H^2 weights, so a token takes 24 H^2 operations there, and 4 A per other token of its row with
# A = heads x head size. Both are equal at 6 H^2 / A tokens. Attention with a mask runs at half the rate of products.
_BALANCE = 3
Job = Callable[[CausalLM, Tensor], Tensor]
Result = TypeVar("Result")


def layout_rules(
    model: nn.Module,
    *,
    shared_prompt: str = "auto",
    mask_budget: int = MASK_BUDGET,
    row_tokens: int = 0,
    inside: bool = False,
) -> LayoutRules:
    """Return the rules for laying out groups for a model, which `make_layout` takes besides lengths.

    The first call for a model runs it on a few tokens to check whether responses can share a row; see
    `windkern.hf.group_logps`. Under FSDP2 all processes must call it together.

    Args:
        model: as `windkern.hf.run`.
        shared_prompt: "auto" shares rows where that is exact and predicted to cost less; "never" does not share;
            "always" shares at any cost, and raises where that is not exact.
        mask_budget: bytes for the masks of one row (and for the scores that eager attention keeps); longer rows are
            split into rows of fewer responses.
        row_tokens: pack adjacent groups into rows of up to this many tokens.
        inside: whether the caller already runs inside a forward of the model.

    Raises:
        ValueError: `shared_prompt` is none of these, or a number is negative.
        TypeError, UnsupportedModelError: as `run`, or "always" is not possible; the message says why.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)
        >>> layout_rules(LlamaForCausalLM(config)).shared
        True
    """
    check_choice("shared_prompt", shared_prompt, SHARED_PROMPT)
    target = hf_call.find_inside(model) if inside else hf_call.find(model)
    sharing = sharing_of(target) if shared_prompt != "never" else None
    if sharing is None or not sharing.holds:
        if shared_prompt == "always":
            raise UnsupportedModelError(
                f"responses to a prompt cannot share a row in {target.name}, since {sharing.reason}; "
                "shared_prompt='auto' runs each with its own prompt"
            )
        return LayoutRules(shared=False, mask_budget=mask_budget)
    config = hf_masks.text_config(target.base)
    pair_bytes = len(sharing.form.kinds) + 4  # Reason: kernels convert a boolean mask to floats
    if hf_masks.implementation(target.base) == "eager":  # scores and their softmax are kept, layer by layer
        pair_bytes = target.base.dtype.itemsize * (
            len(sharing.form.kinds) + 2 * config.num_attention_heads * config.num_hidden_layers
        )
    return LayoutRules(
        balance=_balance_of(config),
        pair_bytes=pair_bytes,
        mask_budget=mask_budget,
        row_tokens=row_tokens,
        relative=sharing.relative,
        by_cost=shared_prompt == "auto",
    )


def _balance_of(config: Any) -> int:
    """Return the tokens of a row at which attention takes as long as the rest of a layer."""
    hidden = config.hidden_size
    heads, size = (getattr(config, name, None) for name in ("num_attention_heads", "head_dim"))
    known = isinstance(heads, int) and isinstance(size, int)
    return max(1, _BALANCE * hidden * hidden // (heads * size if known else hidden))


def run_rows(model: nn.Module, rows: GroupRows, job: Job, *, padded: bool = False, whole_head: bool = True) -> Tensor:
    """Return job(parts, hidden) for the scored tokens of rows, computed inside the call of the wrapped model.

    Args:
        model: as `windkern.hf.run`.
        rows: from `make_rows`, on the device of the model. Rows with several responses need the rules of this model.
        job: gets the model's parts and hidden states, (M, H) in the order of `rows.targets`; returns a tensor.
        padded: pass (S, R, H) to the job, in the order of `rows.padded()`.
        whole_head: as `run`.

    Raises:
        TypeError, UnsupportedModelError: as `run`, or responses cannot share rows in this model.
    """
    target = hf_call.find(model)
    hf_call.check_gradients(target)
    given, amend, parts = _call_of(target, rows)
    index = rows.padded()[0] if padded else rows.index
    whole_head = whole_head or not parts.takes_pieces
    return hf_call.run(
        target, given, lambda hidden: job(parts, _scored(hidden, index)), amend=amend, whole_head=whole_head
    )


def run_rows_inside(model: nn.Module, rows: GroupRows, job: Callable[[CausalLM, Tensor], Result]) -> Result:
    """Return job(parts, hidden) for code that already runs inside a forward of the model, like `run_inside`.

    Args:
        model: a transformers causal LM, not a wrapper.
        rows, job: as in `run_rows`; the job may return anything.

    Raises:
        TypeError, UnsupportedModelError: as `run_rows`.
    """
    target = hf_call.find_inside(model)
    given, amend, parts = _call_of(target, rows)
    return hf_call.at_head(model.forward, target, amend(given), lambda hidden: job(parts, _scored(hidden, rows.index)))


def _scored(hidden: Tensor, index: Tensor) -> Tensor:
    """Gather hidden states (.., H) from the rows (rows, L, H) at an index of any shape."""
    # Reason: its backward sums the gradients of a shared last token in a fixed order, on a GPU too.
    return nn.functional.embedding(index.to(hidden.device), hidden.flatten(0, -2))


def _call_of(target: hf_call.Target, rows: GroupRows) -> tuple[dict, Callable[[dict], dict], CausalLM]:
    """Return the arguments of the model, a function that changes them inside its wrappers, and its parts."""
    verdict = verdict_of(target)
    form = None
    if rows.is_shared:
        sharing = sharing_of(target)
        if not sharing.holds:
            raise UnsupportedModelError(
                f"rows must hold one response each for {target.name}, since {sharing.reason}; lay them out with "
                "windkern.hf.layout_rules of this model"
            )
        form = sharing.form
    positions = verdict.positions if form is None else hf_call.takes(target.base, "position_ids")
    given, amend = inputs_of(target, rows, form, positions)
    return given, amend, parts_of(target, verdict)


def group_logps(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[Sequence[int]]],
    *,
    temperature: float = 1.0,
    shared_prompt: str = "auto",
    per_token: bool = False,
    mask_budget: int = MASK_BUDGET,
    row_tokens: int = 0,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return the log-prob of each of N responses to each prompt, running the body once on each prompt.

        logps[b, n] = sum_t log p(completion_ids[b][n][t] | prompt_ids[b], completion_ids[b][n][:t])

    A group is one row [prompt, response 1, .., response N] with positions that restart after the prompt and a mask that
    hides the responses from each other (combined with sliding windows and chunks): P + N (R - 1) tokens instead of
    N (P + R). It is exact up to rounding. Rows that would cost more than they save, or whose masks are too large, are
    split into rows of fewer responses, by predicted cost; see `make_layout`.

    The first call for a model runs it on a few tokens in its own dtype to check whether it follows such masks and
    positions: hidden states, and a gradient if nothing is sharded, must agree with rows of one response within
    rounding. They do not for recurrent and hybrid layers, attention without a mask (flash kernels), or models that take
    no positions. Then each response runs with its own prompt, and the log says so once, with the reason.

    Args:
        model: as `windkern.hf.run`: also in DDP, FSDP2, torch.compile, with LoRA, gradient checkpointing, tied heads.
        prompt_ids: B lists of token ids, none empty.
        completion_ids: B lists of N lists of token ids, the end token included. An empty one has log-prob 0.
        temperature: divides the logits last, so that completions drawn at that temperature are scored as drawn.
        shared_prompt: "auto", "never", or "always", which ignores the cost and raises where sharing is not exact.
        per_token: whether to return (B, N, R), R being the longest response, with 0 after the end of a shorter one.
        mask_budget, row_tokens: see `layout_rules`.
        memory_budget, batch_invariant, backend: see `windkern.token_logps`. With `batch_invariant`, the head's part of
            a log-prob depends only on its hidden state, whose rounding depends on the layout.

    Returns:
        (B, N), or (B, N, R), nats, float32 (float64 for a float64 model), on the device of the model. Differentiable
        with respect to every parameter that requires a gradient.

    Raises:
        TypeError, UnsupportedModelError: as `run`, or as `layout_rules` with "always".
        ValueError: a prompt is empty, groups differ in N, the model has no embedding for an id or fails on more tokens
            than it has positions for, or an argument does not fit.
        BackendUnavailableError: the named back end cannot run here.

    Memory:
        The body's own for the tokens it sees, masks of L^2 bytes for a row of L tokens, `windkern.plan` for the scored
        tokens, and a copy of their hidden states.

    Source:
        DPO prefix sharing (arXiv 2410.20305) puts two responses in such a row, prefix grouper (arXiv 2506.05433) many.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)
        >>> model = LlamaForCausalLM(config).eval()
        >>> prompts, completions = [[5, 6, 7], [8, 9]], [[[10, 11], [12]], [[13, 14, 15], [16, 17]]]
        >>> shared = group_logps(model, prompts, completions)
        >>> torch.allclose(shared, group_logps(model, prompts, completions, shared_prompt="never"), atol=1e-5)
        True
    """
    check_choice("shared_prompt", shared_prompt, SHARED_PROMPT)
    check_number("temperature", temperature, above=0)
    check_count("mask_budget", mask_budget)
    groups, count = _check_ids(prompt_ids, completion_ids)
    rules = LayoutRules(shared=False)
    if count > 1 or row_tokens:
        rules = layout_rules(model, shared_prompt=shared_prompt, mask_budget=mask_budget, row_tokens=row_tokens)
    layout = make_layout(lengths_of(prompt_ids, completion_ids), rules)
    rows = make_rows(layout, prompt_ids, completion_ids, fill=prompt_ids[0][0])
    base = hf_call.find(model).base
    hf_call.check_known("ids", rows.input_ids, base)
    rows = rows.to(_device_of(base))
    options: dict[str, Any] = {"memory_budget": memory_budget, "batch_invariant": batch_invariant, "backend": backend}

    def job(parts: CausalLM, hidden: Tensor) -> Tensor:
        states, head = parts.at_temperature(temperature).blocks(hidden)
        check_head_stays(parts)
        targets, bounds = rows.targets.to(hidden.device), rows.cu_seqlens.to(hidden.device)
        if not per_token:
            return sequence_logps(states, head, targets, cu_seqlens=bounds, **options)
        return _spread(token_logps(states, head, targets, **options).logps, bounds, rows.longest_response)

    return run_rows(model, rows, job).to(rows.input_ids.device).unflatten(0, (groups, count))


def _spread(logps: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Spread packed (M,) values over (S, R), padded with 0; R is the length of the longest response."""
    inside = torch.arange(longest, device=bounds.device) < bounds.diff()[:, None]
    return logps.new_zeros(inside.shape).masked_scatter(inside, logps)


def _device_of(base: Any) -> torch.device:
    """Return the device on which a model takes ids."""
    weight = base.get_input_embeddings().weight
    place = getattr(getattr(base, "_hf_hook", None), "execution_device", None)  # of accelerate
    return weight.device if place is None else torch.device(place)


def _check_ids(prompt_ids: Any, completion_ids: Any) -> tuple[int, int]:
    """Check nested lists of ids and return B and N."""
    for name, value in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids)):
        whole = isinstance(value, (list, tuple))
        odd = [each for each in value if not isinstance(each, (list, tuple))] if whole else [value]
        if odd:
            among = " in it" if whole else ""
            raise TypeError(f"{name} must be a list of lists, one for each prompt, got {type(odd[0]).__name__}{among}")
    if not prompt_ids or len(prompt_ids) != len(completion_ids):
        raise ValueError(
            f"completion_ids must hold one list of responses for each prompt, got {len(completion_ids)} for "
            f"{len(prompt_ids)} prompts"
        )
    counts = {len(each) for each in completion_ids}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"completion_ids must hold the same number of responses to each prompt, at least one, got {sorted(counts)}"
        )
    for number, (prompt, responses) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        if not prompt:
            raise ValueError(f"prompt_ids[{number}] is empty, but its last token must predict the response's first")
        for response in responses:
            if not isinstance(response, (list, tuple)):
                raise TypeError(f"completion_ids[{number}] must hold lists of ids, got {type(response).__name__}")
            for token in response:
                check_int(f"completion_ids[{number}]", token)
        for token in prompt:
            check_int(f"prompt_ids[{number}]", token)
    return len(prompt_ids), counts.pop()
