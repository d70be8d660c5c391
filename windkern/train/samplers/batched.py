"""Sample with transformers' continuous batching, in this process: fast, but not reproducible bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from windkern._checks import check_count, check_number
from windkern.train.data.loading import opened_prompts, padding_id
from windkern.train.data.turns import encode_opened, turn_of
from windkern.train.samplers.recorded import completions_of_ids
from windkern.train.samplers.sampler import Completions

_PAGE = 64  # tokens


class BatchedSampler:
    """Samples with `model.generate_batch`, which reads a prompt once for all its responses.

    Nothing cuts the distribution. The rest of a batch changes the last bits of a response's probabilities, and so may
    change its tokens: one seed gives equal responses only under equal circumstances, and a killed run may draw other
    responses when it is resumed. (Responses on disk are not drawn again.)

    Args:
        tokenizer: tokenizer of the policy.
        max_completion_length: longest response, end token included.
        temperature: divides the logits; positive.
        system: system message for the chat template, None for the template's own.
        batch_size: sequences in flight at once; sets the size of the cache.

    Raises:
        ValueError: a number is out of range. When updating: the policy does not name an end token, or is sharded. When
            sampling: `update` was not called, or transformers gave up a response.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_completion_length: int,
        temperature: float = 1.0,
        system: str | None = None,
        batch_size: int = 64,
    ):
        self.tokenizer, self.system = tokenizer, system
        self.max_completion_length = check_count("max_completion_length", max_completion_length, least=1)
        self.temperature = check_number("temperature", temperature, above=0)
        self.batch_size = check_count("batch_size", batch_size, least=1)
        self.model: Any | None = None
        self.ends = set(turn_of(tokenizer).ends)

    def update(self, model: nn.Module) -> None:
        """Set the policy. Each call of `sample` uses the weights it has at that time."""
        if any(hasattr(value, "full_tensor") or hasattr(value, "ds_id") for value in model.parameters()):
            raise ValueError("sampler: batched needs a whole model in every process, but this one is sharded")
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.ends |= set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}
        if not self.ends:
            raise ValueError("neither model.generation_config nor the tokenizer names an end token (eos_token_id)")
        self.model = model

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], num_generations: int, seed: int) -> Completions:
        """Draw `num_generations` responses to each prompt."""
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        check_count("num_generations", num_generations, least=1)
        if self.model is None:
            raise ValueError("update(model) must be called before sample, so that there is a policy to sample from")
        opened = encode_opened(self.tokenizer, opened_prompts(self.tokenizer, prompts, system=self.system))
        settings = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_completion_length,
            num_return_sequences=num_generations,
            eos_token_id=sorted(self.ends),
            pad_token_id=padding_id(self.tokenizer),
        )
        longest = max(map(len, opened)) + self.max_completion_length
        # Reason: by default the cache takes most of the memory; on a CPU, most of the machine's.
        batching = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=(-(-longest // _PAGE) + 1) * self.batch_size,
            max_batch_tokens=max(longest, self.batch_size),
            max_requests_per_batch=self.batch_size,
            seed=seed % 2**31,
        )
        was_training = self.model.training
        self.model.eval()
        try:
            found = self.model.generate_batch(
                inputs=opened, generation_config=settings, continuous_batching_config=batching, progress_bar=False
            )
        finally:
            self.model.train(was_training)
        groups = self._groups(opened, list(found.values()), num_generations)
        return completions_of_ids(
            self.tokenizer,
            prompts,
            groups,
            system=self.system,
            max_completion_length=self.max_completion_length,
            truncated=[[row[-1] not in self.ends for row in group] for group in groups],
        )

    def _groups(self, opened: Sequence[list[int]], found: Sequence, count: int) -> list[list[list[int]]]:
        """Return the responses of each prompt; equal prompts take theirs in order."""
        waiting: dict[tuple[int, ...], list[list[int]]] = {}
        for each in found:
            if each.error is not None or not each.generated_tokens:
                raise ValueError(f"transformers gave up a response: {each.error or 'it has no tokens'}")
            waiting.setdefault(tuple(each.prompt_ids), []).append(list(each.generated_tokens))
        groups = []
        for ids in opened:
            mine = waiting.get(tuple(ids), [])
            if len(mine) < count:
                raise ValueError(f"transformers gave {len(mine)} responses to a prompt, but {count} were wanted")
            groups.append(mine[:count])
            waiting[tuple(ids)] = mine[count:]
        return groups
