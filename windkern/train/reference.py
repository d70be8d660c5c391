"""Make the reference policy: a second model, the policy without its adapter, or a table of its log-probs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from windkern._files import ANEW, DamagedRecordError, read_json, write_json
from windkern.train.anchor import Anchor
from windkern.train.config import WindConfig
from windkern.train.groups import Group
from windkern.train.policy import Advance, AnyPolicy, Policy, PolicyView, unheard
from windkern.train.samplers.sampler import Completions
from windkern.train.sharded import shard_frozen


@contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """Disable a PEFT model's adapter and leave requires_grad as it was.

    Hazard: PEFT turns requires_grad off and later on again, and an FSDP2 forward in between replaces the parameters;
    the sharded ones would stay frozen. Remedy: turn it on again before any forward.
    """
    trained = [value for value in model.parameters() if value.requires_grad]
    with model.disable_adapter():
        for value in trained:
            value.requires_grad_(True)
        yield


class RecordedLogps:
    """Log-probs of known responses, scored with the policy before its first step and kept in a file.

    Args:
        path: JSON file of the table.
        policy: scores the responses; before its first step it also samples those that evaluations compare with.
    """

    scores = False

    def __init__(self, path: Path, policy: Policy):
        self.path, self.policy = path, policy
        self.gone = False  # whether a step has been taken, so that the policy is no longer the reference
        self._table: dict[tuple[int, tuple[int, ...]], float] = {}

    @property
    def sharded(self) -> bool:
        """See `AnyPolicy`; the policy samples."""
        return self.policy.sharded

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """See `AnyPolicy`."""
        return self.policy.vocabulary

    def load(self) -> bool:
        """Read the file, and return whether there is one.

        Raises:
            DamagedRecordError: the file does not hold such a table.
        """
        content = read_json(self.path)
        if content is None:
            return False
        try:
            self._table = {(place, tuple(tokens)): float(logp) for place, tokens, logp in content}
        except (TypeError, ValueError) as error:
            raise DamagedRecordError(self.path, error, ANEW) from error
        return True

    def record(self, groups: Sequence[Group], advance: Advance) -> None:
        """Score groups with the current policy, and store the results."""
        rows = self.policy.logps(groups, 1, advance)
        self._table = {
            (group.place, tokens): logp
            for group, row in zip(groups, rows, strict=True)
            for tokens, logp in zip(group.completions, row.tolist(), strict=True)
        }
        if self.policy.world.is_main:
            write_json(self.path, [[place, list(tokens), logp] for (place, tokens), logp in self._table.items()])

    def logps(self, groups: Sequence[Group], batch_size: int, advance: Advance = unheard) -> list[Tensor]:
        """See `AnyPolicy.logps`.

        Raises:
            ValueError: a response has not been recorded.
        """
        found = [torch.tensor([self._found(group.place, tokens) for tokens in group.completions]) for group in groups]
        advance(sum(len(group.completions) for group in groups))
        return found

    def _found(self, place: int, tokens: tuple[int, ...]) -> float:
        if (place, tokens) not in self._table:
            raise ValueError(
                f"{self.path} has no log-prob for a response to prompt {place}; the recorded responses have changed "
                "since the run began"
            )
        return self._table[place, tokens]

    def sample(self, prompts: Sequence[str], num_generations: int, seed: int) -> Completions:
        """Sample from the current policy, which is the reference until the first step."""
        return self.policy.sample(prompts, num_generations, seed)


def needs_reference(config: WindConfig) -> bool:
    """Return whether the loss, or the choice of prompts, needs log pi_ref."""
    return "ref_logps" in config.entry.names or config.focus == "hardest"


def make_reference(
    config: WindConfig, policy: Policy, model: nn.Module | None, *, new_adapter: bool = True, fsdp: bool = False
) -> AnyPolicy | None:
    """Return the reference that `config.reference` names; None if no model is given and none is needed.

    A new adapter is switched off: its base is the reference. An adapter that the policy came with (a second stage) is
    kept as it was, so that the reference is the first stage's policy and not the bare base. The copy takes 4 bytes per
    trained parameter, and, while it is in place, another copy in the parameters' own dtype.

    Args:
        config: settings of the run.
        policy: the policy before its first step.
        model: the reference, or None; its parameters are frozen here.
        new_adapter: whether the policy's adapter is new in this run.
        fsdp: whether FSDP2 shards the reference, as it does the policy.

    Raises:
        ValueError: a model is missing, or given where none is wanted; it shares parameters with the policy; the policy
            has no adapter to switch off, or trains parameters of its base beside it, or is sharded and came with an
            adapter.
        UnsupportedModelError: see `windkern.hf.hidden_and_head`.
    """
    if config.reference != "model" and model is not None:
        raise ValueError(f"ref_model must be None with args.reference={config.reference!r}, got a model")
    if config.reference == "adapter":
        return _adapter_reference(policy, new_adapter)
    if config.reference == "precomputed":
        return RecordedLogps(Path(config.output_dir) / "ref_logps.json", policy)
    if model is None and needs_reference(config):
        raise ValueError(
            f"ref_model must be given for loss={config.loss!r}: a second model, or args.reference='adapter' with LoRA"
        )
    if model is None:
        return None
    if model is policy.model:
        raise ValueError("ref_model must not be model itself, which is trained; load the model twice")
    if shared := {id(value) for value in policy.model.parameters()} & {id(value) for value in model.parameters()}:
        raise ValueError(
            f"ref_model must have its own parameters, but shares {len(shared)} with model (PEFT changes the base "
            "it wraps in place); load it twice, or with LoRA use args.reference='adapter' and no ref_model"
        )
    frozen = model.to(config.device).eval().requires_grad_(False)
    reference = Policy(frozen, policy.tokenizer, policy.settings, policy.world, policy.observer)
    reference.sharded = policy.sharded
    if fsdp:
        reference.model = reference.wrapped = shard_frozen(policy.world.accelerator, frozen)
    return reference


def _adapter_reference(policy: Policy, new_adapter: bool) -> PolicyView:
    model = policy.model
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            "args.reference='adapter' needs a PEFT model: pass peft_config, or a model with an adapter made by "
            "PeftModel.from_pretrained(base, folder, is_trainable=True)"
        )
    if trained := _trained_base(model):
        raise ValueError(
            f"args.reference='adapter' needs a frozen base, but {len(trained)} of its parameters are "
            f"trained, e.g. {trained[0]}; use bias='none' and freeze them, or pass a second model with "
            "args.reference='model'"
        )
    if policy.sharded and not new_adapter:
        raise ValueError(
            "args.reference='adapter' keeps a copy of the adapter that the policy came with, which FSDP and "
            "DeepSpeed would shard; merge it first (adapter: merge, or model.merge_and_unload()), or pass "
            "a second model with args.reference='model'"
        )
    if new_adapter:
        return PolicyView(policy, functools.partial(_without_adapter, model))
    return PolicyView(policy, Anchor(model, rate=1.0).in_place)  # never updated


def _trained_base(policy: Any) -> list[str]:
    """Return the names of trained parameters outside the adapters, which stay on when the adapters are off."""
    adapters = set(policy.peft_config)
    named = policy.named_parameters()
    return [name for name, value in named if value.requires_grad and not adapters & set(name.split("."))]
