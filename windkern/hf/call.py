"""Call a causal LM through its wrappers up to its head, where a job replaces the head's product.

Nothing here imports transformers, accelerate, peft or torch.distributed: wrappers are recognized by their attributes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from windkern.hf.head import UnsupportedModelError, linear_of
from windkern.hf.positions import positions_of
from windkern.hf.units import in_pieces, is_own_unit

_compiled_decoders: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # torch.compile's wrapper -> a forward
Result = TypeVar("Result")
_CALLED_AS_IT_IS = "windkern.hf.sequence_logps takes the wrapped model and runs inside its call"


@dataclass(frozen=True)
class Target:
    """A causal LM, and the modules to call so that the hooks of all its wrappers fire."""

    wrappers: tuple[nn.Module, ...]  # outermost first, without torch.compile's
    base: Any  # the transformers model
    compiled: tuple[nn.Module, ...]  # wrappers of torch.compile
    places: tuple[tuple[nn.Module, str, nn.Module], ...]  # (holder, attribute, member of `compiled`)
    inside: bool = False  # the model's call has begun and its hooks have fired, so call its forward

    @property
    def name(self) -> str:
        return type(self.base).__name__

    @property
    def head(self) -> nn.Module:
        return _head_of(self.base)

    @property
    def chain(self) -> tuple[nn.Module, ...]:
        return (*self.wrappers, self.base)

    @property
    def reducers(self) -> tuple[nn.Module, ...]:
        """Wrappers whose forward arranges the reduction of gradients, like DDP's and unlike PEFT's."""
        return tuple(each for each in self.wrappers if not _is_peft(each))

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 gathers parameters in the call of the model itself."""
        fsdp = sys.modules.get("torch.distributed.fsdp")
        return fsdp is not None and any(isinstance(each, fsdp.FSDPModule) for each in self.chain)

    @property
    def device(self) -> torch.device:
        """The device on which the head computes."""
        linear = linear_of(self.head)
        place = getattr(getattr(linear, "_hf_hook", None), "execution_device", None)  # of accelerate
        return torch.device("cpu" if place is None else place) if linear.weight.is_meta else linear.weight.device

    @property
    def is_offloaded(self) -> bool:
        return any(each.is_meta for each in self.base.parameters())


def _head_of(base: Any) -> Any:
    """Return the model's head, or that of the causal LM inside it if the model names none (NemotronH Omni)."""
    found = base.get_output_embeddings()
    if found is None:
        parts = [each for each in base.children() if hasattr(type(each), "get_output_embeddings")]
        heads = [head for head in (each.get_output_embeddings() for each in parts) if head is not None]
        found = heads[0] if len(heads) == 1 else None
    return found


def _is_peft(module: nn.Module) -> bool:
    return hasattr(type(module), "active_peft_config")


def find(model: object) -> Target:
    """Look through DDP, FSDP, torch.compile, PEFT and other wrappers for the transformers model.

    Raises:
        TypeError: `model` is not a torch module.
        UnsupportedModelError: no transformers model was found, it is an encoder-decoder, or a wrapper is not supported.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers causal LM (a torch module), got {type(model).__name__}")
    current: Any = model
    holder: tuple[nn.Module, str] | None = None
    wrappers: list[nn.Module] = []
    compiled: list[nn.Module] = []
    places: list[tuple[nn.Module, str, nn.Module]] = []
    while not (hasattr(type(current), "get_output_embeddings") and hasattr(current, "config")):
        inner = current._modules.get("_orig_mod")
        if inner is not None:
            compiled.append(current)
            places += [] if holder is None else [(*holder, current)]
            current = inner
            continue
        wrappers.append(current)
        if _is_peft(current):
            _check_peft(current)
            current, holder = current.get_base_model(), (current.base_model, "model")
            continue
        if isinstance(current, nn.DataParallel):
            raise UnsupportedModelError(
                "model is wrapped in DataParallel, which copies it for each call; use DistributedDataParallel"
            )
        name = next((name for name in ("module", "_fsdp_wrapped_module") if name in current._modules), None)
        if name is None:
            raise UnsupportedModelError(
                "model must be a transformers causal LM, "
                f"got {type(current).__name__} without get_output_embeddings and config"
            )
        current, holder = current._modules[name], (current, name)
    if _head_of(current) is None:
        raise UnsupportedModelError(
            f"{type(current).__name__} has no output embeddings; load it with AutoModelForCausalLM, not AutoModel"
        )
    if getattr(current.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(current).__name__} is an encoder-decoder; only decoder-only models are supported"
        )
    return Target(tuple(wrappers), current, tuple(compiled), tuple(places))


def find_inside(model: nn.Module) -> Target:
    """Return the target for code that already runs inside the forward of a transformers model."""
    return dataclasses.replace(find(model), inside=True)


def _check_peft(model: nn.Module) -> None:
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise UnsupportedModelError(
            "model uses prompt-learning PEFT, which changes the input; use adapters inside the layers, such as LoRA"
        )


def check_apart(target: Target) -> None:
    """Raise unless hidden states and head may be used outside the model's own call.

    Raises:
        UnsupportedModelError: a wrapper reduces gradients in its call, or FSDP2 shards the head outside it.
    """
    if target.reducers:
        raise UnsupportedModelError(
            f"model is wrapped in {type(target.reducers[0]).__name__}, and hidden states taken outside its call would "
            f"bypass its work, such as the reduction of gradients; {_CALLED_AS_IT_IS}"
        )
    if target.is_sharded:
        raise UnsupportedModelError(
            f"{target.name} is sharded by FSDP2, and its head is whole only inside the model's call; {_CALLED_AS_IT_IS}"
            " (in your own loop over hidden states, use windkern.sharding.gathered)"
        )


def check_gradients(target: Target) -> None:
    """Raise if gradients are enabled and trained weights are copied in for each forward.

    Raises:
        UnsupportedModelError: accelerate has offloaded trained weights, and gradients are enabled.
    """
    if not (torch.is_grad_enabled() and target.is_offloaded):
        return
    if any(each.is_meta and each.requires_grad for each in target.base.parameters()):
        raise UnsupportedModelError(
            f"weights of {target.name} are offloaded, so their gradients would go to copies that live for one forward; "
            "score under torch.no_grad(), freeze the offloaded weights, or load the whole model to train it"
        )


@contextmanager
def replaced_forward(module: nn.Module, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace the module's innermost forward by `make(forward)` while the context is open."""
    # Reason: a hook of accelerate moves weights and inputs, and then calls the forward that it stores under this name.
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    own, theirs = module.__dict__.get(name), getattr(module, name)
    module.__dict__[name] = make(theirs)
    try:
        yield
    finally:
        if own is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = own


class _HeadReachedError(Exception):
    """Ends the model's forward after the call of its head, and carries the result of that call."""


def at_head(
    forward: Callable,
    target: Target,
    given: Mapping[str, object],
    job: Callable[[Tensor], Result],
    *,
    whole_head: bool = True,
) -> Result:
    """Return job(hidden), run as the head's forward inside forward(**given), which ends there.

    Code after the head would need logits, so an exception ends the forward there. The last hook of the head raises it,
    after the hooks of all modules that compute have fired.

    Args:
        whole_head: if False and the head is its own FSDP2 unit, run the job before FSDP2 gathers it.

    Raises:
        UnsupportedModelError: the forward never calls the head.
        ValueError: the forward fails before its head on more tokens than the model has positions for.
    """
    head, begun = target.head, False

    def start(hidden: Tensor) -> Result:
        nonlocal begun
        begun = True
        return job(hidden)

    def stop(module: nn.Module, args: object, output: object) -> None:
        raise _HeadReachedError(output)

    def stop_before(module: Any, args: tuple) -> None:
        # Reason: earlier code may have left the head gathered, and bits must not depend on that.
        module.reshard()
        if in_pieces(module):
            raise _HeadReachedError(start(args[0]))

    with replaced_forward(head, lambda theirs: lambda hidden, *args, **options: start(hidden)):
        handles = [head.register_forward_hook(stop)]
        if not whole_head and is_own_unit(head):
            handles.append(head.register_forward_pre_hook(stop_before, prepend=True))
        try:
            forward(**given)
        except _HeadReachedError as reached:
            return reached.args[0]
        except (IndexError, RuntimeError) as error:
            if not begun and not isinstance(error, torch.OutOfMemoryError):
                _explain_length(target, given, error)
            raise
        finally:
            for handle in handles:
                handle.remove()
    raise never_called(head)


def _explain_length(target: Target, given: Mapping[str, object], error: Exception) -> None:
    """Raise if a forward has failed on more tokens than the model has positions for.

    Reason: only a failure tells. Rotary positions go on beyond the number in the configuration, and a table of
    positions can be that of images.

    Raises:
        ValueError: there are more.
    """
    ids, most = given.get("input_ids", given.get("inputs_embeds")), positions_of(target.base)
    if isinstance(ids, Tensor) and most is not None and ids.shape[1] > most:
        raise ValueError(
            f"a row of {ids.shape[1]} tokens, padding included, is longer than the {most} positions of {target.name}, "
            f"whose forward failed ({type(error).__name__}: {error}); pass shorter rows"
        ) from error


def never_called(head: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model's forward does not call its head, the {type(head).__qualname__} of get_output_embeddings(); "
        "compute hidden states yourself and call windkern.sequence_logps"
    )


def call(target: Target, given: Mapping[str, object], inside: Callable[..., object], *, check: bool = False) -> object:
    """Call the model through its wrappers, with `inside(theirs, **given)` in place of its base model's forward.

    Args:
        given: keyword arguments of the call.
        inside: gets the forward it replaces, and the arguments as the wrappers pass them on.
        check: bypass DDP, because nothing is trained and processes may reach the check at different times.

    Returns:
        The result of `inside`, as the wrappers return it.

    Raises:
        UnsupportedModelError: a wrapper does not call the model.
    """
    outer = target.chain[0]
    if check and isinstance(outer, nn.parallel.DistributedDataParallel):
        outer = target.chain[1]
    seen: list[object] = []

    def make(theirs: Callable) -> Callable:
        def forward(*args: object, **received: object) -> object:
            # Reason: PEFT passes None for each argument it knows, and not every model takes all of them.
            seen.append(inside(theirs, *args, **{name: each for name, each in received.items() if each is not None}))
            return seen[-1]

        return forward

    with _without_compile(target), replaced_forward(target.base, make):
        out = (target.base.forward if target.inside else outer)(**given)
    if not seen:
        raise UnsupportedModelError(f"{type(outer).__name__} does not call the {target.name} inside it")
    # Reason: FSDP2 can be set to round the output of a model, and expects the gradient of its inputs.
    return seen[-1] if target.inside or (target.is_sharded and not target.reducers) else out


def run(
    target: Target,
    given: Mapping[str, object],
    job: Callable[[Tensor], Tensor],
    *,
    check: bool = False,
    amend: Callable[[dict[str, object]], dict[str, object]] = dict,
    whole_head: bool = True,
) -> Tensor:
    """Return job(hidden), run inside the model's call, so that gradients flow as in any forward of the model.

    Args:
        given, check: see `call`.
        amend: maps the arguments that the wrappers pass on to those for the model itself.
        whole_head: see `at_head`.

    Raises:
        UnsupportedModelError: the model or a wrapper does not reach the head.
    """

    def inside(theirs: Callable, *args: object, **received: object) -> object:
        return at_head(functools.partial(theirs, *args), target, amend(received), job, whole_head=whole_head)

    out = call(target, given, inside, check=check)
    if not isinstance(out, Tensor):
        raise UnsupportedModelError(
            f"{type(target.chain[0]).__name__} must return the output of the model inside it, got {type(out).__name__}"
        )
    return out


@contextmanager
def _without_compile(target: Target) -> Iterator[None]:
    """Compile only the decoder while the context is open, with the settings of torch.compile's wrapper of the model.

    Hazard: a job that changes from call to call would be compiled each time. Remedy: bypass the wrapper of the model.
    """
    with ExitStack() as stack:
        for module, name, wrapper in target.places:
            module._modules[name] = wrapper._modules["_orig_mod"]
            stack.callback(module._modules.__setitem__, name, wrapper)
        for module in (*target.chain, target.head):
            compiled = module.__dict__.get("_compiled_call_impl")
            if compiled is not None:
                module.__dict__["_compiled_call_impl"] = None
                stack.callback(module.__dict__.__setitem__, "_compiled_call_impl", compiled)
        decoder = decoder_of(target.base)
        if target.compiled and decoder is not None and not hasattr(decoder, "_hf_hook"):
            last: Any = target.compiled[-1]
            if last not in _compiled_decoders:
                _compiled_decoders[last] = last.dynamo_ctx(decoder.forward)
            stack.enter_context(replaced_forward(decoder, lambda theirs: _compiled_decoders[last]))
        yield


def decoder_of(base: nn.Module) -> nn.Module | None:
    """Return the part of a model that transformers calls its base model, or None if the model names none."""
    prefix = getattr(base, "base_model_prefix", "")
    found = base._modules.get(prefix)
    return found if found is not None and found is not _head_of(base) else None


@functools.lru_cache(maxsize=64)
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def takes(base: nn.Module, name: str) -> bool:
    """Return whether the model takes an argument of this name, or passes it on to its decoder."""
    if name in _parameters(type(base).forward):
        return True
    decoder = decoder_of(base)
    accepted = decoder is not None and name in _parameters(type(decoder).forward)
    return accepted and "kwargs" in _parameters(type(base).forward)


def check_known(name: str, ids: Tensor, base: Any) -> None:
    """Raise if the model has no embedding for an id. Only ids on a CPU are looked at: a GPU would make Python wait.

    Raises:
        ValueError: an id is negative, or not below the number of the model's embeddings.
    """
    try:
        embeddings = base.get_input_embeddings()
    except NotImplementedError:  # the model reads ids in a way of its own
        return
    if ids.device.type != "cpu" or not ids.numel() or not isinstance(embeddings, nn.Embedding):
        return
    known = embeddings.num_embeddings
    low, high = (int(each) for each in ids.aminmax())
    if low < 0 or high >= known:
        raise ValueError(
            f"{name} must be in [0, {known}), as many as {type(base).__name__} has embeddings, got "
            f"{low if low < 0 else high} (padding too needs an id of the vocabulary)"
        )


def inputs(base: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, positions: bool) -> dict[str, object]:
    """Return the arguments of one forward without a cache.

    Args:
        positions: count positions from the first token that is not padding.
    """
    given: dict[str, object] = {"input_ids": input_ids, "attention_mask": attention_mask.long()}
    if takes(base, "use_cache"):
        given["use_cache"] = False
    if positions:
        # Hazard: with left padding, a learned position table would see different positions than in generation.
        given["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return given


def hidden_states(
    target: Target, input_ids: Tensor, attention_mask: Tensor, *, positions: bool, check: bool = False
) -> Tensor:
    """Return the input of the head, (S, L, H)."""
    given = inputs(target.base, input_ids, attention_mask, positions=positions)
    return run(target, given, lambda hidden: hidden, check=check)
