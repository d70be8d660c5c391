"""A policy: a causal LM that samples responses and scores them, however it is wrapped.

The policy that is trained, its moving average, and the reference share two methods:

    sample(prompts, num_generations, seed) -> Completions      logps(groups, batch_size) -> [(K,) log-probs of a group]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from windkern import hf
from windkern.hf.layout import LayoutRules
from windkern.train.anchor import Anchor
from windkern.train.batches import Batch, collate
from windkern.train.config import WindConfig
from windkern.train.data.loading import padding_id
from windkern.train.groups import Group
from windkern.train.jobs import Job, check_scorable, score_job
from windkern.train.report.progress import Progress, Unobserved
from windkern.train.samplers.sampler import Completions, TransformersSampler
from windkern.train.world import World

Advance = Callable[[int], None]  # called with the number of responses just done


def unheard(count: int) -> None:
    """An `Advance` that does nothing."""


@dataclass(frozen=True)
class PolicySettings:
    """Settings of a policy's samples and log-probs.

    Args:
        max_completion_length: longest response, end token included.
        temperature: divides the logits, of samples and log-probs alike.
        top_p: samples come from the smallest set of tokens with this probability.
        system: system message for the chat template; None leaves it to the template.
        sampling_batch_size: sequences generated at a time.
        shared_prompt: whether the body runs once on a prompt for all its responses, see `windkern.hf.group_logps`.
        options: keyword arguments of the fused ops.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    system: str | None = None
    sampling_batch_size: int = 64
    shared_prompt: str = "auto"
    options: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, config: WindConfig) -> PolicySettings:
        """Return the settings of a run."""
        return cls(
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            system=config.system,
            sampling_batch_size=config.sampling_batch_size,
            shared_prompt=config.shared_prompt,
            options={
                "memory_budget": config.memory_budget,
                "batch_invariant": config.batch_invariant,
                "backend": config.backend,
            },
        )


class AnyPolicy(Protocol):
    """The methods that policies and their stand-ins share."""

    @property
    def sharded(self) -> bool:
        """Whether a forward pass communicates, so that all processes must run it equally often."""
        ...

    @property
    def scores(self) -> bool:
        """Whether `logps` accepts any response."""
        ...

    @property
    def vocabulary(self) -> Mapping[str, int] | None:
        """Ids of its tokens; None where its responses are texts without tokens."""
        ...

    @property
    def gone(self) -> bool:
        """Whether its weights no longer exist, so that it cannot sample."""
        ...

    def sample(self, prompts: Sequence[str], num_generations: int, seed: int) -> Completions:
        """Return `num_generations` independent responses to each prompt.

        The same seed and weights give the same responses.
        """
        ...

    def logps(self, groups: Sequence[Group], batch_size: int, advance: Advance = unheard) -> list[Tensor]:
        """Return (K,) log-probs of each group's responses, nats, on every process.

        Groups are scored in batches of `batch_size` neighbours. `advance` is called with the number of responses just
        scored.
        """
        ...


class Policy:
    """A causal LM and its tokenizer.

    Args:
        model: a transformers causal LM, or a PEFT model around one; not wrapped yet.
        tokenizer: the model's tokenizer.
        settings: settings of samples and log-probs.
        world: the processes; may be given later, before the first call.
        observer: told how far sampling is.

    Attributes:
        model: the model as given.
        wrapped: runs the forward and backward passes: `model`, or accelerate's wrapper around it.
        sharded: see `AnyPolicy`; whoever shards the model (FSDP2, DeepSpeed) sets it.
        average: the moving average of its weights, once `follow` has been called.

    Raises:
        UnsupportedModelError: see `windkern.hf.hidden_and_head`.
        ValueError: ZeRO-3 has sharded the model.
    """

    scores, gone = True, False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        settings: PolicySettings,
        world: World | None = None,
        observer: Progress | None = None,
    ):
        check_scorable(model)
        self.model = self.wrapped = model
        self.tokenizer, self.settings, self.world = tokenizer, settings, world
        self.observer = observer or Unobserved()
        self.fill = padding_id(tokenizer)
        self.sharded = False
        self._rules: LayoutRules | None = None
        self.anchor: Anchor | None = None

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """See `AnyPolicy`."""
        return self.tokenizer.get_vocab()

    def sample(self, prompts: Sequence[str], num_generations: int, seed: int) -> Completions:
        """See `AnyPolicy.sample`."""
        settings = self.settings
        sampler = TransformersSampler(
            self.world.accelerator.unwrap_model(self.wrapped),
            self.tokenizer,
            max_completion_length=settings.max_completion_length,
            temperature=settings.temperature,
            top_p=settings.top_p,
            system=settings.system if self.tokenizer.chat_template is not None else None,
            batch_size=settings.sampling_batch_size,
            synced=self.sharded,
            under_way=lambda done: self.observer.under_way(done * self.world.size),
        )
        return sampler.sample(prompts, num_generations, seed)

    @property
    def rules(self) -> LayoutRules:
        """Rules by which scoring and fitting lay out groups in rows. All ranks inspect the model once."""
        if self._rules is None:
            model = self.wrapped if self.sharded else self.model
            with self.world.accelerator.autocast():
                found = hf.layout_rules(model, shared_prompt=self.settings.shared_prompt)
            self._rules = self.world.agree(found)
        return self._rules

    def batch(self, groups: Sequence[Group]) -> Batch:
        """Lay out groups in rows for the model."""
        return collate(groups, self.fill, self.rules)

    def run(self, model: nn.Module, batch: Batch, job: Job) -> Tensor:
        """Return what `job` makes of (S, R, H) hidden states of responses and the head, inside a call of `model`."""
        return hf.run_rows(model, batch.rows, job, padded=True, whole_head=False)

    @torch.no_grad()
    def logps(self, groups: Sequence[Group], batch_size: int, advance: Advance = unheard) -> list[Tensor]:
        """See `AnyPolicy.logps`."""
        parts = [list(groups[first : first + batch_size]) for first in range(0, len(groups), batch_size)]
        accelerator = self.world.accelerator
        # Hazard: DDP broadcasts buffers in every forward, and processes do not score equally often. Remedy: bypass DDP.
        model = (self.wrapped if self.sharded else self.model).eval()
        rules = self.rules  # Reason: all processes must agree on them, and some have no work below

        def work(part: list[Group]) -> list[list[float]]:
            batch = collate(part, self.fill, rules).to(cast(Any, self.model).device)
            with accelerator.autocast():
                job = score_job(batch.targets.flatten(0, 1), self.settings.temperature, self.settings.options)
                return self.run(model, batch, job).view(batch.shape).float().tolist()

        def done(batches: Sequence[list[Group]]) -> None:
            advance(sum(len(group.completions) for part in batches for group in part))

        rows = [row for part in self.world.share(parts, work, together=self.sharded, done=done) for row in part]
        return [torch.tensor(row) for row in rows]

    def follow(self, rate: float) -> Anchor:
        """Start a moving average from the current trained weights; `rate` as for `Anchor`."""
        self.anchor = Anchor(self.world.accelerator.unwrap_model(self.wrapped), rate)
        return self.anchor

    @property
    def average(self) -> PolicyView:
        """The policy with the moving average of its weights in place; call `follow` first."""
        return PolicyView(self, self.anchor.in_place)


class PolicyView:
    """A policy with other weights in place: its moving average, or its base without the adapter.

    Args:
        policy: its model takes the other weights.
        weights: returns a context manager inside which the model has them.
    """

    scores, gone = True, False

    def __init__(self, policy: Policy, weights: Callable[[], AbstractContextManager[None]]):
        self.policy, self.weights = policy, weights

    @property
    def sharded(self) -> bool:
        """See `AnyPolicy`."""
        return self.policy.sharded

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """See `AnyPolicy`."""
        return self.policy.vocabulary

    def sample(self, prompts: Sequence[str], num_generations: int, seed: int) -> Completions:
        """See `AnyPolicy.sample`."""
        with self.weights():
            return self.policy.sample(prompts, num_generations, seed)

    def logps(self, groups: Sequence[Group], batch_size: int, advance: Advance = unheard) -> list[Tensor]:
        """See `AnyPolicy.logps`."""
        with self.weights():
            return self.policy.logps(groups, batch_size, advance)
