"""Where log pi_ref comes from: a second model, the adapter as it was, or a table made before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from windkern._files import ANEW, DamagedRecordError, read_json, write_json
from windkern.losses import LOSSES
from windkern.train.anchor import Anchor
from windkern.train.config import WindConfig
from windkern.train.fused_head import FusedHead, score_job
from windkern.train.groups import Batch, FitGroup
from windkern.train.scoring import Scorer
from windkern.train.sharded import shard_frozen


class Reference(Protocol):
    """pi_ref of a run."""

    def score(self, batch: Batch, groups: list[FitGroup]) -> Tensor:
        """(B, K) log-probs under pi_ref, nats."""
        ...

    def sampling(self) -> Iterator[nn.Module]:
        """A context manager that yields a model which generates as pi_ref does."""
        ...


class ModelReference:
    """A frozen second model.

    Args:
        model: causal LM; its parameters are frozen here.
        temperature: of its log-probs.
        options: of the fused ops.
        accelerator: with FSDP2; the model is cut in pieces as the policy is. None leaves it whole.

    Raises:
        UnsupportedModelError: see `windkern.hf.hidden_and_head`.
    """

    def __init__(self, model: nn.Module, temperature: float, options: dict, accelerator: Accelerator | None = None):
        model = model.eval().requires_grad_(False)
        self.head = FusedHead(model)
        self.model = model if accelerator is None else shard_frozen(accelerator, model)
        self.temperature, self.options = temperature, options

    @torch.no_grad()
    def score(self, batch: Batch, groups: list[FitGroup]) -> Tensor:
        job = score_job(batch.targets, self.temperature, self.options)
        return self.head(self.model, batch.input_ids, batch.attention_mask, job).view(batch.shape)

    @contextmanager
    def sampling(self) -> Iterator[nn.Module]:
        yield self.model


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    """A PEFT model's `disable_adapter`, with requires_grad as it was.

    Hazard: PEFT turns requires_grad off and later on again, and a forward of FSDP2 in between puts other parameters in
    their places; the sharded ones would stay frozen. Remedy: turn it on again before any forward.
    """
    trained = [value for value in model.parameters() if value.requires_grad]
    with model.disable_adapter():
        for value in trained:
            value.requires_grad_(True)
        yield


class AdapterReference:
    """The policy as it was when the run began, by its adapter.

    An adapter that begins with the run is left out: its base is the reference. One that the policy came with (a second
    stage) is kept as it was, so that the reference is the first stage's policy, and not the bare base.

    Args:
        model: the PEFT model, unwrapped, at its start.
        scorer: scores a batch with the policy as it is at that moment.
        new: whether the adapter begins with the run.

    Memory:
        Of an adapter that is kept: 4 bytes a trained parameter, and while it is in place a copy of these parameters.
    """

    def __init__(self, model: nn.Module, scorer: Scorer, *, new: bool):
        self.model, self.scorer = model, scorer
        self._start = None if new else Anchor(model, rate=1.0)  # which is never updated

    def _in_place(self) -> AbstractContextManager[None]:
        return _without_adapter(self.model) if self._start is None else self._start.in_place()

    def score(self, batch: Batch, groups: list[FitGroup]) -> Tensor:
        with self._in_place():
            return self.scorer.score_batch(batch)

    @contextmanager
    def sampling(self) -> Iterator[nn.Module]:
        with self._in_place():
            yield self.model


class PrecomputedReference:
    """Log-probs of known responses, scored with the policy before its first step and kept in a file.

    Args:
        path: of the file, JSON.
        model: generates the responses that evaluations compare with, before the first step.
    """

    def __init__(self, path: Path, model: nn.Module):
        self.path, self.model = path, model
        self._table: dict[tuple[int, tuple[int, ...]], float] = {}

    def load(self) -> bool:
        """Read the file; False where there is none.

        Raises:
            DamagedRecordError: it holds something else.
        """
        content = read_json(self.path)
        if content is None:
            return False
        try:
            self._table = {(place, tuple(tokens)): float(logp) for place, tokens, logp in content}
        except (TypeError, ValueError) as error:
            raise DamagedRecordError(self.path, error, ANEW) from error
        return True

    def save(self, groups: list[FitGroup], logps: list[Tensor], *, write: bool) -> None:
        """Keep the (K,) log-probs of groups; on the disk, too, where `write` says so."""
        self._table = {
            (group.place, tokens): logp
            for group, row in zip(groups, logps, strict=True)
            for tokens, logp in zip(group.completions, row.tolist(), strict=True)
        }
        if write:
            write_json(self.path, [[place, list(tokens), logp] for (place, tokens), logp in self._table.items()])

    def score(self, batch: Batch, groups: list[FitGroup]) -> Tensor:
        rows = [[self._found(group.place, tokens) for tokens in group.completions] for group in groups]
        return torch.tensor(rows, device=batch.input_ids.device)

    def _found(self, place: int, tokens: tuple[int, ...]) -> float:
        if (place, tokens) not in self._table:
            raise ValueError(
                f"{self.path} has no log-prob for a response to prompt {place}; the recorded responses have changed "
                "since the run began"
            )
        return self._table[place, tokens]

    @contextmanager
    def sampling(self) -> Iterator[nn.Module]:
        yield self.model


def needs_reference(config: WindConfig) -> bool:
    """Whether the loss, or the choice of prompts, asks for log pi_ref."""
    return "ref_logps" in LOSSES[config.loss].inputs or config.focus == "hardest"


def make_reference(
    config: WindConfig,
    policy: nn.Module,
    model: nn.Module | None,
    scorer: Scorer,
    accelerator: Accelerator | None = None,
    *,
    new_adapter: bool = True,
    sharded: bool = False,
) -> Reference | None:
    """The reference that `config.reference` names; None where there is none and none is needed.

    Args:
        config: of the run.
        policy: at its start.
        model: of the reference, where there is one.
        scorer: of the run.
        accelerator: with FSDP2.
        new_adapter: whether the policy's adapter begins with the run.
        sharded: whether the policy is going to be cut in pieces.

    Raises:
        ValueError: a model is missing, or given where none is wanted; it shares parameters with the policy; the policy
            has no adapter to leave out, or trains parameters of its base beside it, or is going to be cut in pieces and
            came with an adapter.
    """
    if config.reference != "model" and model is not None:
        raise ValueError(f"reference must be None with args.reference={config.reference!r}, got a model")
    if config.reference == "adapter":
        if not hasattr(policy, "disable_adapter"):
            raise ValueError(
                "args.reference='adapter' needs a PEFT model: pass peft_config, or a model with an adapter made by "
                "PeftModel.from_pretrained(base, folder, is_trainable=True)"
            )
        if trained := _trained_base(policy):
            raise ValueError(
                f"args.reference='adapter' needs a base that stays, but {len(trained)} of its own parameters are "
                f"trained, e.g. {trained[0]}; use bias='none' and freeze them, or pass a second model with "
                "args.reference='model'"
            )
        if sharded and not new_adapter:
            raise ValueError(
                "args.reference='adapter' keeps the adapter that the policy came with as it was, which FSDP and "
                "DeepSpeed would cut in pieces; merge it first (adapter: merge, or model.merge_and_unload()), or pass "
                "a second model with args.reference='model'"
            )
        return AdapterReference(policy, scorer, new=new_adapter)
    if config.reference == "precomputed":
        return PrecomputedReference(Path(config.output_dir) / "ref_logps.json", policy)
    if model is None and needs_reference(config):
        raise ValueError(
            f"reference must be given for loss={config.loss!r}: a second model, or args.reference='adapter' with LoRA"
        )
    if model is None:
        return None
    if model is policy:
        raise ValueError("reference must be another object than model, or it would move with it; load it twice")
    if shared := {id(value) for value in policy.parameters()} & {id(value) for value in model.parameters()}:
        raise ValueError(
            f"reference must have parameters of its own, but {len(shared)} are model's, too (PEFT changes the base "
            "it wraps in place); load it twice, or with LoRA take args.reference='adapter' and no reference"
        )
    return ModelReference(model.to(config.device), config.temperature, scorer.options, accelerator)


def _trained_base(policy: nn.Module) -> list[str]:
    """Names of trained parameters that belong to no adapter, so that switching the adapters off leaves them on."""
    adapters = set(policy.peft_config)
    named = policy.named_parameters()
    return [name for name, value in named if value.requires_grad and not adapters & set(name.split("."))]
