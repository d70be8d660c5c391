"""Log-probs of transformers' causal LMs from hidden states and heads, without the logits.

Nothing here imports transformers: a model is asked for its decoder, its head and its configuration.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from windkern._checks import check_integer, check_same_device, check_shape, check_tensor, shape_of
from windkern.head import Head
from windkern.hf import call as hf_call
from windkern.hf.check import Verdict, verdict_of
from windkern.hf.head import UnsupportedModelError, blocks, linear_of
from windkern.hf.tensor_parallel import is_cut, rows_of
from windkern.hf.units import in_pieces
from windkern.ops.inputs import Blocks
from windkern.ops.sequence import sequence_logps as _sequence_logps
from windkern.transform import LogitTransform

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

IGNORE_INDEX = -100
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """The parts of a causal LM for the fused ops: `logits = transform(hidden(ids, mask) @ weight.T + bias)`.

    In a head that PEFT changed, each LoRA adapter adds a block of a few columns; `blocks` returns them all.
    """

    hidden: Callable[[Tensor, Tensor], Tensor]  # input_ids (S, L), attention_mask (S, L) -> (S, L, H)
    lm_head: nn.Module  # the module that the model calls on hidden states: an nn.Linear, or PEFT's layer around one
    transform: LogitTransform
    masked: Tensor | None = None  # (V,) bool, columns to which the model assigns no probability
    columns: int | None = None  # V, if the head has more rows than the model returns logits

    @property
    def weight(self) -> Tensor:
        """(V, H), the head's current parameter, without adapters."""
        return linear_of(self.lm_head).weight

    @property
    def bias(self) -> Tensor | None:
        """(V,), the head's current parameter, with -inf in columns that the model masks."""
        linear = linear_of(self.lm_head)
        bias = linear.bias if self.columns is None or linear.bias is None else linear.bias[: self.columns]
        if self.masked is None:
            return bias
        bias = linear.weight.new_zeros(self.masked.shape) if bias is None else bias
        return bias.masked_fill(self.masked.to(bias.device), -torch.inf)

    @property
    def takes_pieces(self) -> bool:
        """Whether the head's rows are exactly those of the logits, so that it can be sharded over ranks."""
        return self.masked is None and self.columns is None

    @property
    def in_pieces(self) -> bool:
        """Whether this rank holds only a part of the head, its own FSDP2 unit, for `windkern.sharding.streamed`."""
        return self.takes_pieces and in_pieces(self.lm_head)

    @property
    def head(self) -> Head:
        """The head without adapters, with its current parameters.

        If tensor parallelism has sharded it, its weight is `windkern.sharding.vocab_parallel` of this rank's rows.

        Raises:
            UnsupportedModelError: the head is sharded, and the model masks columns of its logits or cuts them off.
        """
        if is_cut(self.weight) and not self.takes_pieces:
            raise UnsupportedModelError(
                "the model masks columns of its logits or cuts them off, and tensor parallelism has sharded its head, "
                "so no rank can tell which rows those are; leave the head out of the tensor-parallel plan"
            )
        weight = rows_of(linear_of(self.lm_head)) if self.columns is None else self.weight[: self.columns]
        return Head(weight, self.bias, **dataclasses.asdict(self.transform))

    def blocks(self, hidden: Tensor) -> tuple[Blocks, Head]:
        """Return `hidden` and `weight` for the fused ops, with the adapters in their current state.

            logits = transform(sum_k hidden[k] @ head.weight[k].T + head.bias)
            with LoRA on the head: hidden = (h, s * (dropout(h) @ A.T), ...), head.weight = (W, B, ...)

        In training mode, each call draws the dropout of the adapters once, in PEFT's order.

        Args:
            hidden: (..., H), the decoder's output.

        Returns:
            (hidden, head). For a plain head, for `modules_to_save` and if adapters are disabled or merged, hidden and
            head.weight are tensors. Otherwise they are tuples with one more block of r columns for each active adapter.
            Gradients reach W, A and B. Outside autocast the blocks of adapters are cast to the dtype of W, and the ops
            cast `hidden` to it.

        Raises:
            UnsupportedModelError: an active adapter is DoRA or another variant, or has a bias (`lora_bias`).

        Memory:
            r elements per token and adapter, and a copy of B (V, r) if its dtype differs from that of W.
        """
        states, weights = blocks(self.lm_head, hidden)
        if isinstance(weights, Tensor) and self.columns is None:
            return states, self.head
        if self.columns is not None:
            cut = slice(self.columns)
            weights = weights[cut] if isinstance(weights, Tensor) else tuple(each[cut] for each in weights)
        whole = weights if isinstance(weights, Tensor) else tuple(weights)
        return states, dataclasses.replace(self.head, weight=whole)

    def at_temperature(self, temperature: float) -> CausalLM:
        """Return the same model with this temperature, whose log-probs are those of a sampler at the temperature."""
        return dataclasses.replace(self, transform=dataclasses.replace(self.transform, temperature=temperature))


def parts_of(target: hf_call.Target, verdict: Verdict) -> CausalLM:
    def hidden(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return hf_call.hidden_states(target, input_ids, attention_mask, positions=verdict.positions)

    return CausalLM(hidden, target.head, verdict.transform, verdict.masked, verdict.columns)


def hidden_and_head(model: nn.Module) -> CausalLM:
    """Take a transformers causal LM apart into hidden states, head weight, bias and logit transform.

        model(ids, mask).logits == transform(hidden(ids, mask) @ weight.T + bias)

    Hidden states are the input that the model's own forward passes to its head, so they include anything between
    decoder and head (a dense layer with activation and norm, a scale, a cast). The first call runs the model on 9
    tokens, to check what its head returns and how the model transforms that. The check is repeated when the head, its
    dtype or adapters, autocast or a number of the configuration has changed. When an adapter is first seen on the head,
    its block is compared with the head's own output, with random numbers as its weights.

    Args:
        model: a decoder-only transformers model with a plain nn.Linear head, or a PEFT model around one: adapters of
            any kind inside the layers, LoRA or `modules_to_save` on the head. Its scale and softcap must be among the
            numbers of its configuration. Columns that it masks get a bias of -inf; `blocks` leaves out those that it
            cuts off. `sequence_logps` and `run` also take a model in DDP or FSDP.

    Returns:
        CausalLM(hidden, lm_head, ...). Its properties head, weight and bias are the model's own parameters, so
        gradients reach them, and a tied embedding gets both of its gradients. The fused ops need its method blocks if
        LoRA is on the head.

    Raises:
        TypeError: `model` is not a torch module.
        UnsupportedModelError: no plain head or several, an encoder-decoder, prompt-learning PEFT, another adapter on
            the head (DoRA, `lora_bias`, IA3, ...), a wrapper whose call does more than pass on (DDP, FSDP2, ...), or
            logits that are not a known transform of the head's product (the message gives the numbers).

    Warns:
        UserWarning: the model's own logits depend on later tokens.

    Memory:
        The check holds logits of 2 * 9 tokens, and 8192 rows of the weight in float32 or float64.

    Source:
        The check is ours; the place of the head follows the convention of transformers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> parts = hidden_and_head(LlamaForCausalLM(config))
        >>> tuple(parts.head.weight.shape), parts.head.bias is None, parts.head.softcap is None
        ((32, 16), True, True)
    """
    target = hf_call.find(model)
    hf_call.check_apart(target)
    hf_call.check_gradients(target)
    return parts_of(target, verdict_of(target))


def run(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    job: Callable[[CausalLM, Tensor], Tensor],
    *,
    whole_head: bool = True,
) -> Tensor:
    """Return job(parts, hidden), computed inside the call of the wrapped model.

    In that call DDP, FSDP2 and DeepSpeed prepare the backward, and only there are parameters whole. The job replaces
    the product of the head, and the forward ends after it, so logits are never computed.

    Args:
        model: as `hidden_and_head`, or wrapped in DDP, FSDP, a DeepSpeed engine, torch.compile, by
            `Accelerator.prepare`, or in another module that passes `input_ids`, `attention_mask` and `position_ids` on
            and returns the model's output. If torch.compile wraps the model, only its decoder is compiled here.
        input_ids: (S, L) int64 or int32, padded on either side.
        attention_mask: (S, L) bool or 0 and 1; 0 for padding.
        job: gets the model's parts and its hidden states (S, L, H), on the device of the head; returns a tensor.
            Pass constants in its closure: FSDP2 rounds floating arguments of a call to its mixed precision.
        whole_head: if True, FSDP2 gathers the head first. If False, the job also accepts a head that is its own FSDP2
            unit and still sharded: if `parts.in_pieces`, pass `windkern.sharding.streamed(parts.lm_head)` to the ops.

    Raises:
        TypeError, UnsupportedModelError: as `hidden_and_head`.
        ValueError: the model has no embedding for an id (looked at on a CPU), or fails on more tokens than it has
            positions for.

    Warns:
        UserWarning: as `hidden_and_head`; or rows are padded on the left, which changes the model's hidden states.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).eval()
        >>> ids = torch.tensor([[4, 5, 6]])
        >>> run(model, ids, torch.ones_like(ids), lambda parts, hidden: hidden @ parts.weight.T).shape
        torch.Size([1, 3, 32])
    """
    target = hf_call.find(model)
    hf_call.check_gradients(target)
    hf_call.check_known("input_ids", input_ids, target.base)
    verdict = verdict_of(target)
    if not verdict.left_padding and not bool(attention_mask[:, 0].all()):
        warnings.warn(
            f"hidden states of {target.name} change with padding on the left, and so do log-probs, as with its own "
            "logits; pad on the right",
            stacklevel=3,
        )
    parts = parts_of(target, verdict)
    given = hf_call.inputs(target.base, input_ids, attention_mask, positions=verdict.positions)
    whole_head = whole_head or not parts.takes_pieces
    return hf_call.run(target, given, lambda hidden: job(parts, hidden), whole_head=whole_head)


def run_inside(model: nn.Module, given: Mapping[str, object], job: Callable[[CausalLM, Tensor], Result]) -> Result:
    """Return job(parts, hidden) for code that already runs inside a forward of the model.

    Args:
        model: a transformers causal LM, not a wrapper.
        given: keyword arguments of its forward.
        job: as in `run`, but it may return anything.

    Raises:
        TypeError, UnsupportedModelError: as `hidden_and_head`.
    """
    target = hf_call.find_inside(model)
    parts = parts_of(target, verdict_of(target))
    given = {**given, **({"use_cache": False} if hf_call.takes(model, "use_cache") else {})}
    return hf_call.at_head(model.forward, target, given, lambda hidden: job(parts, hidden))


def completion_targets(input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Return targets aligned with hidden states: position t scores token t + 1 if it belongs to the completion.

        targets[s, t] = input_ids[s, t + 1] where completion_mask[s, t + 1], else -100; the last column is -100

    Args:
        input_ids: (S, L) int64 or int32, prompt and completion, padded on either side.
        completion_mask: (S, L) bool, or integers 0 and 1; 1 for the tokens to score (the end token included).

    Returns:
        (S, L) int64.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: shapes or devices do not fit, or the first column is scored, which has no token before it.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> completion_targets(ids, torch.tensor([[0, 0, 1, 1]]))
        tensor([[-100,    7,    8, -100]])
    """
    check_shape("input_ids", check_integer("input_ids", input_ids), ("S", "L"))
    mask = _as_bool("completion_mask", completion_mask, input_ids)
    if input_ids.device.type == "cpu" and input_ids.shape[1] and bool(mask[:, 0].any()):
        raise ValueError("completion_mask must be 0 in the first column, because no token before it predicts its token")
    targets = torch.full_like(input_ids, IGNORE_INDEX, dtype=torch.int64)
    targets[:, :-1] = torch.where(mask[:, 1:], input_ids[:, 1:].long(), IGNORE_INDEX)
    return targets


def _as_bool(name: str, mask: object, input_ids: Tensor) -> Tensor:
    tensor = check_tensor(name, mask)
    if tensor.dtype not in (torch.bool, torch.int64, torch.int32):
        raise TypeError(f"{name} must be bool, int64 or int32, got {tensor.dtype}")
    check_shape(name, tensor, shape_of(input_ids))
    check_same_device(name, tensor, "input_ids", input_ids)
    return tensor.bool()


def check_head_stays(parts: CausalLM) -> None:
    """Raise if the head that a job uses will be freed before its backward.

    Raises:
        UnsupportedModelError: DeepSpeed ZeRO-3 has gathered it, and gradients are enabled.
    """
    if torch.is_grad_enabled() and any(hasattr(each, "ds_id") for each in (parts.weight, parts.bias)):
        raise UnsupportedModelError(
            "DeepSpeed ZeRO-3 frees the gathered head before its backward; score under torch.no_grad(), compute "
            "the loss inside the call by windkern.hf.run and windkern.fused_loss, or use ZeRO-2 or FSDP2"
        )


def sequence_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    normalize: str = "sum",
    max_scored: int | None = None,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return the log-prob of each completion under a transformers causal LM, without the logits.

        logps[s] = sum_t completion_mask[s, t] * log p(input_ids[s, t] | input_ids[s, :t])

    The result is differentiable with respect to every parameter that requires a gradient. Under torch.no_grad, only one
    slab of the vocabulary exists at a time.

    Args:
        model: as `run`: also wrapped in DDP, FSDP2, torch.compile or by `Accelerator.prepare`, on several devices or,
            without gradients, offloaded.
        input_ids: (S, L) int64 or int32, prompt and completion, padded on either side.
        attention_mask: (S, L) bool or 0 and 1; 0 for padding.
        completion_mask: (S, L) bool or 0 and 1; 1 for the tokens to score (the end token included). Never 1 in the
            first column, nor where attention_mask is 0.
        temperature: divides the logits last, so that completions drawn at that temperature are scored as drawn.
        normalize, max_scored, memory_budget, batch_invariant, backend: see `windkern.sequence_logps`.

    Returns:
        (S,) nats, float32 (float64 for a float64 model).

    Raises:
        TypeError, UnsupportedModelError: as `run`, or weights would lose their gradients (offloaded, ZeRO-3); a mask
            or `input_ids` has a dtype that does not fit.
        ValueError: shapes, devices or values do not fit.
        BackendUnavailableError: the named back end cannot run here.

    Memory:
        The decoder's own, and that of `windkern.plan` for the scored tokens.

    Source:
        `windkern.sequence_logps`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).eval()
        >>> ids = torch.tensor([[0, 4, 5, 6], [7, 8, 9, 10]])
        >>> attention, completion = torch.ones_like(ids), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
        >>> attention[0, 0] = 0
        >>> sequence_logps(model, ids, attention, completion).shape
        torch.Size([2])
    """
    targets = completion_targets(input_ids, completion_mask)
    if not input_ids.numel():
        raise ValueError(f"input_ids must hold one token at least, got shape {shape_of(input_ids)}")
    attended = _as_bool("attention_mask", attention_mask, input_ids)
    if input_ids.device.type == "cpu" and bool((completion_mask.bool() & ~attended).any()):
        raise ValueError("completion_mask must be 0 wherever attention_mask is 0, got a scored padding token")

    def job(parts: CausalLM, hidden: Tensor) -> Tensor:
        parts = parts.at_temperature(temperature)
        states, head = parts.blocks(hidden)
        check_head_stays(parts)
        return _sequence_logps(
            states,
            head,
            targets.to(hidden.device),
            normalize=normalize,
            max_scored=max_scored,
            memory_budget=memory_budget,
            batch_invariant=batch_invariant,
            backend=backend,
        )

    return run(model, input_ids, attended, job).to(input_ids.device)
