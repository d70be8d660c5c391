"""Sample responses of the current policy, with masks that mark their tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from windkern._checks import check_count, check_flag, check_number
from windkern.hf.positions import positions_of
from windkern.train.data.loading import encode_prompts, padding_id
from windkern.train.data.prompts import shown
from windkern.train.data.turns import response_texts, turn_of
from windkern.train.samplers.shared_cache import UnsharedCacheError, prompt_cache


@dataclass(frozen=True)
class Completions:
    """N responses to each of B prompts, S = B * N sequences, prompt by prompt.

    Prompts are padded on the left and completions on the right, so every completion starts in the same column.
    """

    input_ids: Tensor  # (S, L) int64
    attention_mask: Tensor  # (S, L) bool
    completion_mask: Tensor  # (S, L) bool, up to and including the first end token
    truncated: Tensor  # (S,) bool, no end token within the limit
    texts: tuple[tuple[str, ...], ...]  # B times N, what the tokens say, without special tokens

    @property
    def num_generations(self) -> int:
        return len(self.texts[0])

    @property
    def num_tokens(self) -> int:
        return int(self.completion_mask.sum())

    def groups(self, chosen: Sequence[int]) -> Completions:
        """Return the responses to some of the prompts, without columns that are padding in all of them."""
        return self.responses(chosen, torch.arange(self.num_generations).expand(len(chosen), -1))

    def responses(self, prompts: Sequence[int], chosen: Tensor) -> Completions:
        """Return some responses to some prompts, cut as `groups`: `chosen` (B, K) holds their places among the N."""
        rows = (torch.tensor(prompts)[:, None] * self.num_generations + chosen).flatten()
        used = self.attention_mask[rows].any(0).nonzero().flatten()
        columns = slice(int(used[0]), int(used[-1]) + 1)
        return Completions(
            input_ids=self.input_ids[rows, columns],
            attention_mask=self.attention_mask[rows, columns],
            completion_mask=self.completion_mask[rows, columns],
            truncated=self.truncated[rows],
            texts=tuple(
                tuple(self.texts[k][place] for place in places)
                for k, places in zip(prompts, chosen.tolist(), strict=True)
            ),
        )


class Sampler(Protocol):
    """Anything that answers prompts with the current policy.

    `completions_of_ids` and `completions_of_texts` of `windkern.train.samplers.recorded` make `Completions` from
    token ids and from texts. The trainer also uses these attributes, if a sampler has them:

        update(model)           called with the policy before each iteration, for weights that must follow
        everything(prompt)      `Completions` of every response it can give; `reference` "precomputed" needs it
        keeps_weights: str      who answers, for a sampler without `update` whose weights should follow the policy
        repeats_because: str    the likely cause if all of its responses to each prompt are the same
    """

    def sample(self, prompts: Sequence[str], num_generations: int, seed: int) -> Completions:
        """Return `num_generations` independent responses to each prompt.

        The same seed and weights give the same responses.
        """
        ...


class GumbelNoise(LogitsProcessor):
    """Turns greedy decoding into exact sampling from softmax(logits / temperature).

        argmax_v (z_v + temperature * G_v),  G_v = -log(-log U_v) independent,  is a draw from softmax(z / temperature)

    Reason: with a generator of its own the draws do not depend on what else uses torch's, and on a CPU it takes a
    tenth of the time of torch.multinomial over a large vocabulary. The result of a call is overwritten by the next one:
    a new buffer for each token would cost more than the arithmetic.

    Source: Gumbel-max trick (Gumbel 1954; Maddison, Tarlow, Minka 2014, arXiv 1411.0030).
    """

    def __init__(self, generator: torch.Generator, temperature: float):
        self.generator = generator
        self.temperature = temperature
        self._noise = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._noise.shape != scores.shape:
            self._noise = torch.empty(scores.shape, device=scores.device)
        # Hazard: log 0. Remedy: none needed, U = 0 gives G = -inf, a token that is not drawn; U = 1 does not occur.
        noise = self._noise.uniform_(generator=self.generator).log_().neg_().log_()
        return torch.add(scores, noise, alpha=-self.temperature, out=noise)


def completion_mask(tokens: Tensor, end_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return which generated tokens belong to the response, and which responses were cut off.

    A response ends with its first end token, which belongs to it. Padding is never looked at, since many models pad
    with their end token.

    Args:
        tokens: (S, T) int64, generated tokens.
        end_ids: ids that end a response.

    Returns:
        ((S, T) bool, (S,) bool): mask, and truncated (no end token among the T).

    Example:
        >>> mask, truncated = completion_mask(torch.tensor([[7, 2, 2], [7, 8, 9]]), [2])
        >>> mask.int().tolist(), truncated.tolist()
        ([[1, 1, 0], [1, 1, 1]], [False, True])
    """
    ends = torch.isin(tokens, torch.tensor(sorted(end_ids), dtype=tokens.dtype, device=tokens.device))
    ended_before = ends.cumsum(-1) - ends.long() > 0
    return ~ended_before, ~ends.any(-1)


@contextlib.contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Make `generate` use only the settings it is given.

    Hazard: transformers fills unset fields from model.generation_config: suppressed or forced tokens, biases, stop
    strings. Remedy: model.generation_config is empty while it generates.
    """
    owners = [module for module in model.modules() if "generation_config" in vars(module)]  # below wrappers and PEFT
    kept = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in zip(owners, kept, strict=True):
            owner.generation_config = config


class TransformersSampler:
    """Samples from a transformers model with `generate`, running a prompt once for all of its responses.

    Nothing cuts the distribution (no top-k, top-p, repetition penalty or forbidden tokens, whatever the model's
    generation_config says): the samples must come from the policy whose log-probs are fitted. A response ends with any
    end token of the model's generation_config, the tokenizer's own, or the one the chat template ends a turn with. A
    temperature other than 1 is part of that policy, so score with the same one.

    The keys and values of a prompt are computed once and copied to its responses, which changes logits by rounding
    alone. A model whose cache is more than keys and values (recurrent layers, a compressed cache) runs the prompt for
    each response.

    Args:
        model: causal LM; each call uses the weights it has at that time.
        tokenizer: its tokenizer.
        max_completion_length: longest response, end token included.
        temperature: divides the logits; positive.
        top_p: samples come from the smallest set of tokens with this probability. Below 1 they are no longer samples
            of the policy.
        system: system message for the chat template, None for the template's own.
        batch_size: sequences generated at a time.
        synced: whether a forward of the model communicates (a sharded model), so that all processes must run equally
            many.
        shared_prompt: whether a prompt runs once; False runs it for each response. Either way the same seed gives the
            same tokens; between the two ways rounding may decide otherwise.
        under_way: called after each token with the number of responses that the tokens of this call amount to.

    Raises:
        ValueError: a number is out of range, or neither the model nor the tokenizer names an end token; when sampling,
            a prompt and a response of `max_completion_length` exceed the model's positions.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_completion_length: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        system: str | None = None,
        batch_size: int = 64,
        synced: bool = False,
        shared_prompt: bool = True,
        under_way: Callable[[float], None] = lambda responses: None,
    ):
        self.model, self.tokenizer, self.system, self.under_way = model, tokenizer, system, under_way
        self.max_completion_length = check_count("max_completion_length", max_completion_length, least=1)
        self.temperature = check_number("temperature", temperature, above=0)
        self.top_p = check_number("top_p", top_p, above=0)
        if top_p > 1:
            raise ValueError(f"top_p must be at most 1, got {top_p!r}")
        self.batch_size = check_count("batch_size", batch_size, least=1)
        self.synced = synced
        self.shared_prompt = check_flag("shared_prompt", shared_prompt)
        self._expands = True  # until a cache is seen that cannot be copied row by row
        self.turn = turn_of(tokenizer)
        ends = model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
        # Reason: when it trains, transformers adds the tokenizer's to the policy's, but never to the reference's.
        self.end_ids = sorted((ends | set(self.turn.ends)) - {None})
        if not self.end_ids:
            raise ValueError("neither model.generation_config nor the tokenizer names an end token (eos_token_id)")

    def sample(self, prompts: Sequence[str], num_generations: int, seed: int) -> Completions:
        check_count("num_generations", num_generations, least=1)
        encoded = encode_prompts(self.tokenizer, prompts, system=self.system)
        self._check_positions(prompts, encoded.attention_mask.sum(1))
        device = self.model.device
        ids = encoded.input_ids.repeat_interleave(num_generations, 0)  # (S, P)
        mask = encoded.attention_mask.repeat_interleave(num_generations, 0)
        owner = torch.arange(len(prompts)).repeat_interleave(num_generations)
        generator = torch.Generator(device).manual_seed(seed)
        batches = zip(*(each.split(self.batch_size) for each in (ids, mask, owner)), strict=True)
        parts = [
            self._generate(ids, mask, owner, generator, number * self.batch_size)
            for number, (ids, mask, owner) in enumerate(batches)
        ]
        width = max(part.shape[1] for part in parts)
        fill = self.end_ids[0]
        tokens = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])
        own, truncated = completion_mask(tokens, self.end_ids)
        rows = [row[keep].tolist() for row, keep in zip(tokens, own, strict=True)]
        asked = [row[seen.bool()].tolist() for row, seen in zip(*encoded, strict=True)]
        groups = [rows[first : first + num_generations] for first in range(0, len(rows), num_generations)]
        return Completions(
            input_ids=torch.cat([ids, tokens], 1),
            attention_mask=torch.cat([mask.bool(), own], 1),
            completion_mask=torch.cat([torch.zeros_like(mask, dtype=torch.bool), own], 1),
            truncated=truncated,
            texts=response_texts(self.tokenizer, self.turn, asked, groups),
        )

    def _check_positions(self, prompts: Sequence[str], lengths: Tensor) -> None:
        """Raise if a prompt and its response exceed the model's positions.

        Reason: beyond them a model raises IndexError, or writes what it was not trained for.
        """
        most, longest = positions_of(self.model), int(lengths.argmax())
        if most is not None and int(lengths.max()) + self.max_completion_length > most:
            raise ValueError(
                f"the prompt {shown(prompts[longest])} has {int(lengths.max())} tokens and the response up to "
                f"max_completion_length = {self.max_completion_length}, but {type(self.model).__name__} has {most} "
                "positions: make max_completion_length smaller, or leave the prompt out"
            )

    @torch.no_grad()
    def _generate(self, ids: Tensor, mask: Tensor, owner: Tensor, generator: torch.Generator, done: int) -> Tensor:
        """Return (S, T) generated tokens on the CPU for (S, P) prompts, T at most max_completion_length.

        Tokens after the end token are arbitrary. `owner` (S,) says which prompt a row belongs to.
        """
        settings = GenerationConfig(
            do_sample=False,  # GumbelNoise draws
            num_beams=1,
            max_new_tokens=self.max_completion_length,
            min_new_tokens=0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=self.end_ids,
            pad_token_id=padding_id(self.tokenizer),
            use_cache=True,
        )
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        was_training = self.model.training
        self.model.eval()
        try:
            with _own_settings(self.model):
                seen = self._seen(ids, mask, owner, settings)
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([*self._processors(generator), self._teller(ids, done)]),
                    synced_gpus=self.synced,
                    **seen,
                )
        finally:
            self.model.train(was_training)
        return out[:, ids.shape[1] :].cpu()

    def _seen(self, ids: Tensor, mask: Tensor, owner: Tensor, settings: GenerationConfig) -> Mapping[str, object]:
        """Return the prompts' cache, as an argument of `generate`."""
        if not (self.shared_prompt and self._expands):
            return {}
        try:
            return prompt_cache(self.model, ids, mask, owner, settings, synced=self.synced)
        except UnsharedCacheError:
            self._expands = False
            return {}

    def _teller(self, ids: Tensor, done: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a logits processor that changes nothing and reports how far the rows after `done` earlier ones are."""
        rows, opened = ids.shape

        def tell(input_ids: Tensor, scores: Tensor) -> Tensor:
            self.under_way(done + rows * min(1.0, (input_ids.shape[1] - opened + 1) / self.max_completion_length))
            return scores

        return tell

    def _processors(self, generator: torch.Generator) -> LogitsProcessorList:
        if self.top_p == 1:
            return LogitsProcessorList([GumbelNoise(generator, self.temperature)])
        return LogitsProcessorList(
            [TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p), GumbelNoise(generator, 1.0)]
        )
