"""Give TRL's trainers windkern's log-probs: `with use(trainer): trainer.train()`.

TRL 1.16 gives the models of its trainers a forward that takes `fused_lm_head=True` and returns log-probs instead of
logits. `use` puts windkern's in front of it, on the objects of one trainer; nothing of TRL is edited or subclassed.
Nothing here imports TRL before `use` is called.
"""

from __future__ import annotations

import functools
import importlib
import types
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from windkern import hf
from windkern._checks import check_choice, check_number
from windkern.head import Head
from windkern.integrations.trl_rows import SharedBatch, shared_batch
from windkern.kernels import buffers
from windkern.ops.inputs import Blocks, Inputs, prepare
from windkern.ops.logprobs import row_logps
from windkern.sharding.whole import gathered

# Fields that each trainer reads besides log_probs; those that only its metrics read are computed without a gradient.
FIELDS = {
    "DPOTrainer": ("entropy", "mean_logits", "is_top1"),
    "KTOTrainer": ("entropy", "mean_logits"),
    "GRPOTrainer": ("entropy",),
    "RLOOTrainer": ("entropy",),
}
_ALL_FIELDS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
_PASSED = ("input_ids", "attention_mask", "position_ids")  # to the model's own forward
_WITHOUT_EFFECT = ("use_cache", "return_dict", "logits_to_keep")
_SLAB_BYTES = 32 << 20  # of the logits of a metric that needs its own pass

_in_use: weakref.WeakSet = weakref.WeakSet()  # models


class UnsupportedTrainerError(ValueError):
    """A trainer has an option that `use` cannot serve; the message says which and what would do."""


@dataclass
class Handle(AbstractContextManager):
    """The handle that `use` returns: leave the block or call `remove` to give the trainer its own log-probs back."""

    models: list[nn.Module] = field(default_factory=list)
    _enabled: bool = True
    _own: list[tuple[nn.Module, Callable, Callable]] = field(default_factory=list)  # model, its forward, ours

    @property
    def enabled(self) -> bool:
        return self._enabled

    def remove(self) -> None:
        """Undo `use`; a second call does nothing."""
        self._enabled = False
        for model, forward, ours in self._own:
            # Reason: accelerate may have wrapped ours since; the wrapper stays and ours passes everything on.
            if model.forward is ours:
                model.forward = forward
            _in_use.discard(model)
        self._own.clear()

    def __exit__(self, *error: object) -> None:
        self.remove()


def use(
    trainer: Any,
    *,
    shared_prompt: str = "auto",
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Handle:
    """Make a TRL trainer compute its log-probs with windkern, until the handle is removed or its block is left.

        per_token_logps = windkern.token_logps(decoder(ids), lm_head.weight, labels, entropy=True)

    This covers policy and reference, training and evaluation. Losses, metrics, sampling and everything else stay TRL's.
    Values and gradients are those of TRL's own path within rounding; in bfloat16 they are closer to the truth, because
    TRL rounds its logits to bfloat16 and windkern does not. A head among PEFT's `modules_to_save` is supported; TRL's
    trainers themselves refuse a model with LoRA on its head.

    Args:
        trainer: a `trl.DPOTrainer`, `GRPOTrainer`, `RLOOTrainer` or `KTOTrainer`, or an instance of a subclass of one;
            already constructed. With `precompute_ref_log_probs=True`, TRL has computed those by then.
        shared_prompt: whether rows of a batch with the same prompt (chosen and rejected, generations of one prompt) run
            the body once on it: "auto" where it is exact and costs less, "never", or "always", which raises where it is
            not exact; see `windkern.hf.group_logps`.
        memory_budget, batch_invariant, backend: see `windkern.token_logps`.

    Returns:
        Handle, also a context manager; `handle.models` are the models whose forward was replaced.

    Raises:
        ImportError: TRL is not installed, or is a release whose models have no fused head (supported: 1.16).
        TypeError: `trainer` is none of these trainers.
        UnsupportedTrainerError: `cast_lm_head_to_fp32=True` (needless here: logits are float32 anyway), a loss on the
            router of a mixture of experts (`router_aux_loss_coef`), DeepSpeed ZeRO-3, or `use` was called before.
            During training: inputs with images, packed or pre-shifted labels.
        UnsupportedModelError: a model that `windkern.hf.hidden_and_head` refuses, such as one with prompt-learning
            PEFT, or with DoRA on its head.

    Memory:
        `windkern.plan` of the scored tokens with entropy. TRL 1.16 holds tiles of up to 4096 tokens x 32768 columns
        and computes every logit twice. Mean logits of a model with a softcap (a metric of DPO and KTO) and the weights
        of WPO take one more product, 32 MiB at a time.

    Source:
        `windkern.token_logps`.

    Example:
        >>> trainer = DPOTrainer("Qwen/Qwen3-0.6B", train_dataset=pairs)  # doctest: +SKIP
        >>> with use(trainer):  # doctest: +SKIP
        ...     trainer.train()
    """
    fields = _fields_of(trainer)
    output = _output_class()
    _check_options(trainer)
    temperature = check_number("trainer.temperature", getattr(trainer, "temperature", 1.0), above=0)
    unwrap = trainer.accelerator.unwrap_model
    policy = unwrap(trainer.model, keep_fp32_wrapper=True)
    reference = getattr(trainer, "ref_model", None)
    wanted = [(policy, fields)]
    if reference is not None:
        wanted.append((unwrap(reference, keep_fp32_wrapper=True), ()))
    handle = Handle()
    check_choice("shared_prompt", shared_prompt, hf.SHARED_PROMPT)
    options = {"memory_budget": memory_budget, "batch_invariant": batch_invariant, "backend": backend}
    try:
        for model, names in wanted:
            _replace(handle, model, names, temperature, output, trainer.accelerator.autocast, options, shared_prompt)
    except BaseException:
        handle.remove()
        raise
    return handle


def _fields_of(trainer: Any) -> tuple[str, ...]:
    known = [each.__name__ for each in type(trainer).__mro__ if each.__module__.split(".")[0] == "trl"]
    name = next((name for name in known if name in FIELDS), None)
    if name is None:
        raise TypeError(f"trainer must be one of trl's {', '.join(FIELDS)}, got {type(trainer).__name__}")
    weighted = name == "DPOTrainer" and trainer.use_weighting
    return (*FIELDS[name], "log_sum_sq_probs") if weighted else FIELDS[name]


def _output_class() -> type:
    """Return TRL's result of a fused head, whose fields tell whether this TRL is the one supported here."""
    try:
        utils = importlib.import_module("trl.trainer.utils")
    except ImportError as error:
        raise ImportError("windkern.integrations.trl needs TRL: python -m pip install 'trl>=1.16,<1.17'") from error
    output = getattr(utils, "FusedCausalLMOutput", None)
    needed = {"loss", "log_probs", "label_mask", "aux_loss", *_ALL_FIELDS}
    if output is None or set(output.__dataclass_fields__) != needed:
        version = importlib.import_module("trl").__version__
        raise ImportError(
            f"windkern.integrations.trl supports the fused head of TRL 1.16, but {version} has another; "
            "python -m pip install 'trl>=1.16,<1.17'"
        )
    return output


def _check_options(trainer: Any) -> None:
    if getattr(trainer.args, "cast_lm_head_to_fp32", False):
        raise UnsupportedTrainerError(
            "cast_lm_head_to_fp32=True is not supported; leave it out: windkern never rounds logits, whatever the "
            "dtype of the head"
        )
    if getattr(trainer, "aux_loss_enabled", False):
        raise UnsupportedTrainerError(
            "the load-balancing loss of a mixture of experts is not supported; set router_aux_loss_coef=0.0"
        )
    if any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()):
        raise UnsupportedTrainerError(
            "DeepSpeed ZeRO-3 is not supported: it frees the gathered head before backward; use ZeRO-2 or FSDP2"
        )


def _replace(
    handle: Handle,
    model: nn.Module,
    fields: tuple[str, ...],
    temperature: float,
    output: type,
    autocast: Any,
    options: Mapping[str, Any],
    shared_prompt: str,
) -> None:
    """Put our forward in front of the one TRL gave the model (for a PEFT model, its base model)."""
    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    if base in _in_use:
        raise UnsupportedTrainerError(f"this {type(base).__name__} is in use already; remove the first handle first")
    theirs = base.forward
    hf.hidden_and_head(model)  # refuses what it cannot serve, before anything has been replaced
    head = FusedHead(fields, temperature, output, options, shared_prompt)

    @functools.wraps(type(base).forward)  # `generate` checks its arguments against this signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **given: Any) -> Any:
        if not (fused_lm_head and handle.enabled):
            return theirs(*args, **({"fused_lm_head": True} if fused_lm_head else {}), **given)
        with autocast():
            return head(self, *args, **given)

    ours = types.MethodType(forward, base)
    base.forward = ours
    _in_use.add(base)
    handle.models.append(base)
    handle._own.append((base, theirs, ours))


@dataclass(frozen=True)
class FusedHead:
    """The forward that a TRL trainer calls with `fused_lm_head=True`: decoder, then log-probs and their statistics.

    Args:
        fields: fields of TRL's `FusedCausalLMOutput` to fill besides `log_probs`.
        temperature: divides the logits.
        output: TRL's `FusedCausalLMOutput`.
        options: memory_budget, batch_invariant, backend of `windkern.token_logps`.
        shared_prompt: as in `use`.

    Raises:
        ValueError: there is no field of a name.
        UnsupportedTrainerError: when called: an input that is not passed on to the decoder.
    """

    fields: tuple[str, ...]
    temperature: float
    output: type
    options: Mapping[str, Any]
    shared_prompt: str = "never"

    def __post_init__(self) -> None:
        for name in self.fields:
            check_choice("fields", name, _ALL_FIELDS)

    def __call__(
        self, model: nn.Module, *, labels: Tensor | None = None, num_items_in_batch: Any = None, **given: Any
    ) -> Any:
        given = {name: value for name, value in given.items() if value is not None and name not in _WITHOUT_EFFECT}
        refused = sorted(name for name, value in given.items() if name not in _PASSED and value is not False)
        if refused or labels is None:
            what = f"model inputs {', '.join(refused)}" if refused else "a call without labels"
            raise UnsupportedTrainerError(f"{what} not supported; windkern passes on {', '.join(_PASSED)} and labels")

        def job(parts: hf.CausalLM, hidden: Tensor) -> Any:
            cut = hidden[:, :-1] if shared is None else hidden  # (S, L - 1, H), or (M, H) of scored tokens
            states, head = parts.at_temperature(self.temperature).blocks(cut)
            with gathered(head) as whole:
                place = None if shared is None else shared.place
                return self._score(states, whole, labels[:, 1:], num_items_in_batch, place)

        given = {name: given[name] for name in _PASSED if name in given}
        shared = self._shared(model, given, labels)
        return hf.run_inside(model, given, job) if shared is None else hf.run_rows_inside(model, shared.rows, job)

    def _shared(self, model: nn.Module, given: Mapping[str, Tensor], labels: Tensor) -> SharedBatch | None:
        """Return the batch with a row for each prompt, if prompts repeat and rows may share them."""
        if self.shared_prompt == "never" or set(given) != {"input_ids", "attention_mask"}:
            return None
        # Hazard: processes of a sharded model must inspect it together. Remedy: all do so in their first call.
        rules = hf.layout_rules(model, shared_prompt=self.shared_prompt, inside=True)
        return shared_batch(given["input_ids"], given["attention_mask"], labels, rules) if rules.shared else None

    def _score(self, hidden: Blocks, head: Head, labels: Tensor, items: Any, place: Tensor | None) -> Any:
        """Return fields for labels (S, L - 1), from all hidden states or those of scored tokens at `place` (M,)."""
        device = cast(Tensor, head.weight[0] if isinstance(head.weight, tuple) else head.weight).device
        targets = labels if place is None else labels.flatten()[place.to(labels.device)]

        def spread(values: Tensor) -> Tensor:
            values = inputs.scatter(values)
            if place is None:
                return values
            return values.new_zeros(labels.numel()).scatter(0, place.to(values.device), values).view(labels.shape)

        inputs = prepare(
            hidden,
            head,
            targets.to(device),
            bias=None,
            scale=1.0,
            softcap=None,
            temperature=1.0,
            ignore_index=hf.IGNORE_INDEX,
            max_scored=None,
            backend=self.options["backend"],
            entropy="entropy" in self.fields,
            batch_invariant=self.options["batch_invariant"],
        )
        logps, lse, entropy, stats = row_logps(
            inputs,
            entropy="entropy" in self.fields,
            memory_budget=self.options["memory_budget"],
            batch_invariant=self.options["batch_invariant"],
        )
        found: dict[str, Tensor] = {}
        if "entropy" in self.fields:
            found["entropy"] = spread(entropy)
        if "is_top1" in self.fields:
            top = stats[2, : inputs.num_rows] >= stats[0, : inputs.num_rows]
            found["is_top1"] = spread((top & (inputs.targets >= 0)).long()).bool()
        for name, values in _without_gradient(inputs, lse, self.fields).items():
            found[name] = spread(torch.where(inputs.targets >= 0, values, 0.0))
        log_probs, mask = spread(logps), labels != hf.IGNORE_INDEX
        count = mask.sum().clamp(min=1) if items is None else items
        return self.output(loss=-log_probs.sum() / count, log_probs=log_probs, label_mask=mask, **found)


@torch.no_grad()
def _without_gradient(inputs: Inputs, lse: Tensor, fields: tuple[str, ...]) -> dict[str, Tensor]:
    """Return (M,) mean of the transformed logits and log(sum of p^2), as far as they are asked for.

    mean_v (sum_k h_k . w_kv + b_v) = sum_k h_k . mean w_k + mean b      without a softcap: no pass over the vocabulary
    """
    wanted = [name for name in ("mean_logits", "log_sum_sq_probs") if name in fields]
    if not wanted:
        return {}
    rows, vocab = inputs.num_rows, inputs.weight[0].shape[0]
    hidden = [block if inputs.rows is None else block.index_select(0, inputs.rows) for block in inputs.hidden]
    hidden = [block.to(inputs.operand) for block in hidden]
    pairs = list(zip(hidden, inputs.weight, strict=True))  # (M, H_k), (V, H_k)
    bias, transform = inputs.bias, inputs.transform
    if wanted == ["mean_logits"] and transform.softcap is None:
        means = (torch.mv(block.to(lse.dtype), weight.mean(0, dtype=lse.dtype)) for block, weight in pairs)
        mean = functools.reduce(torch.add, means)
        if bias is not None:
            mean += bias.mean(dtype=lse.dtype)
        return {"mean_logits": transform.slope_at_zero * mean}
    total, squares = torch.zeros_like(lse), torch.zeros_like(lse)
    width = min(vocab, max(1, _SLAB_BYTES // (lse.element_size() * max(1, rows))))
    for start in range(0, vocab, width):
        part = slice(start, start + width)
        products = (nn.functional.linear(block, weight[part].to(block.dtype)).to(lse.dtype) for block, weight in pairs)
        z = functools.reduce(torch.add, products)
        z = buffers.track("slab", z if bias is None else z + bias[part])
        z.mul_(transform.scale)
        if transform.softcap is not None:
            z.div_(transform.softcap).tanh_().mul_(transform.softcap)
        z.div_(transform.temperature)
        total += z.sum(-1)
        squares += z.sub_(lse[:, None]).mul_(2).exp_().sum(-1)  # p^2 <= 1
    found = {"mean_logits": total / vocab, "log_sum_sq_probs": squares.log()}
    return {name: found[name] for name in wanted}
