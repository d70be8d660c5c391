"""Who answers the training prompts, and with what beside the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from windkern.train.anchor import Anchor
from windkern.train.config import WindConfig
from windkern.train.data.loading import Demonstration
from windkern.train.groups import FitGroup
from windkern.train.rollouts import Rollout, joined, rollouts_of
from windkern.train.samplers.openai import OpenAISampler
from windkern.train.samplers.recorded import RecordedSampler, completions_of_texts
from windkern.train.samplers.sampler import Sampler, TransformersSampler
from windkern.train.seeds import stream


class Responder:
    """Makes the groups a loss wants: N samples of the policy; a demonstration and a sample; a sample of the policy and
    two of its moving average.

    Args:
        config: of the run.
        group: see `windkern.train.objectives.Objective`.
        prompts: training prompts.
        demonstrations: their answers, for group "demonstration".
        tokenizer: of the policy.
        sampler: answers prompts; None takes the policy's own.
        own: makes a sampler of the policy as it is wrapped at the moment.
        warn: told what a person should know, each thing once.
    """

    def __init__(
        self,
        config: WindConfig,
        group: str,
        prompts: Sequence[str],
        demonstrations: Sequence[Demonstration],
        tokenizer,
        sampler: Sampler | None,
        own: Callable[[], TransformersSampler],
        warn: Callable[[str], None] = lambda line: None,
    ):
        self.config, self.group, self.prompts, self.demonstrations = config, group, prompts, demonstrations
        self.tokenizer, self.sampler, self.own, self.warn = tokenizer, sampler, own, warn
        self._said: set[str] = set()
        self.anchor: Anchor | None = None
        if config.reference == "precomputed" and not isinstance(sampler, RecordedSampler):
            raise ValueError(f"args.reference='precomputed' needs a RecordedSampler, got {type(sampler).__name__}")

    def update(self, model) -> None:
        """Let a sampler with weights of its own follow the policy."""
        if hasattr(self.sampler, "update"):
            self.sampler.update(model)
        elif isinstance(self.sampler, OpenAISampler) and self.config.num_iterations > 1:
            self._say(
                "served weights",
                f"the server at {self.sampler.server.url} is never given the new weights, for its sampler has no "
                "update(model): from iteration 2 on the responses come from the initial policy. Their log-probs are "
                + (
                    "right, and trajectory_balance may be fitted to responses of any policy"
                    if self.config.loss == "trajectory_balance"
                    else "those of the current policy, but the loss takes them for its samples (win rates are then "
                    "against the initial one), and no importance weight corrects that; of the losses, only "
                    "trajectory_balance is made for it"
                ),
            )

    def look_at(self, rollouts: Sequence[Rollout]) -> None:
        """Say so where the responses of a whole iteration differ for no prompt."""
        groups = [set(rollout.completions) for rollout in rollouts if len(rollout.completions) > 1]
        if self.group == "demonstration" or not groups or any(len(group) > 1 for group in groups):
            return
        if isinstance(self.sampler, OpenAISampler):
            cause = (
                "the server decodes greedily, because it ignores the temperature, or n and seed (as transformers serve "
                "does where the model's generation_config says do_sample: false)"
            )
        elif isinstance(self.sampler, RecordedSampler):
            cause = "the file has one and the same response to each"
        else:
            cause = "temperature or top_p is too low, or the policy has one response to each left"
        self._say(
            "identical",
            f"all responses to each of the iteration's {len(groups)} prompts are identical, so none wins and nothing "
            f"can be learnt; most likely {cause}",
        )

    def _say(self, what: str, line: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self.warn(line)

    def __call__(self, places: Sequence[int], iteration: int, block: int) -> list[Rollout]:
        """Responses to the prompts at some places; the block's draws depend on its number only."""
        prompts, seed = [self.prompts[place] for place in places], self.config.seed
        count = 1 if self.group == "anchor" else self.config.num_responses
        sampler = self.sampler or self.own()
        own = rollouts_of(sampler.sample(prompts, count, stream(seed, "sample", iteration, block)), places)
        if self.group == "anchor":
            with self.anchor.in_place():
                batch = self.own().sample(prompts, 2, stream(seed, "anchor", iteration, block))
            return joined(own, rollouts_of(batch, places))
        if self.group == "demonstration":
            batch = completions_of_texts(
                self.tokenizer,
                prompts,
                [[self.demonstrations[place].answer] for place in places],
                system=self.config.system if self.tokenizer.chat_template is not None else None,
                max_new_tokens=self.config.max_new_tokens,
            )
            return joined(rollouts_of(batch, places), own)
        return own

    def recorded(self) -> list[FitGroup]:
        """Every recorded response to every prompt, without constants."""
        found = []
        for place, prompt in enumerate(self.prompts):
            (rollout,) = rollouts_of(self.sampler.everything(prompt), [place])
            found.append(FitGroup(place, rollout.prompt_ids, rollout.completions, {}))
        return found
