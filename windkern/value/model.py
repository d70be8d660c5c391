"""A small value model on top of a frozen base: the logits of both heads are added, the base is never trained."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from windkern import hf
from windkern._checks import check_shape, check_tensor, shape_of
from windkern.ops.sequence import sequence_logps
from windkern.train.models import load_model

DESCRIPTION = "windkern_value.json"


def _tuple(blocks: Any) -> tuple[Tensor, ...]:
    return tuple(blocks) if isinstance(blocks, (tuple, list)) else (blocks,)


def _check_pair(base: hf.CausalLM, value: hf.CausalLM) -> None:
    for name, parts in (("base", base), ("value", value)):
        if parts.head.softcap is not None:
            raise hf.UnsupportedModelError(
                f"{name} caps its logits at {parts.head.softcap}; capped logits of one model plus logits of "
                "another are not one product of blocks. Use models without final_logit_softcapping"
            )
    if base.weight.shape[0] != value.weight.shape[0]:
        raise ValueError(
            f"base and value must have the same vocabulary, got heads of {base.weight.shape[0]} and "
            f"{value.weight.shape[0]} entries; if they share a tokenizer and one head is padded, "
            "resize_token_embeddings makes them equal"
        )
    if base.weight.device != value.weight.device:
        raise ValueError(f"base is on {base.weight.device} but value is on {value.weight.device}; move one")


class ValueModel(nn.Module):
    """A frozen base and a value model that shifts its logits; only the value model is trained.

        log p(y_t | ...) = log softmax(z_base + z_value)[y_t],   z = the model's own logits, its scale included

    Neither the logits nor one matrix of both heads is ever made: the heads are two blocks of one walk over the
    vocabulary, which adds both products in one float32 slab. Nothing penalises the size of z_value; a penalty on
    mean(z_value^2) would need the two products separately.

    A value model trained on one base can be put on another base with the same tokenizer (`from_pretrained`). The caller
    must know that the tokenizers agree: two heads of one size can mean different tokens.

    Args:
        base: transformers causal LM. It is frozen (requires_grad of its parameters becomes False) and stays in eval
            mode.
        value: a smaller transformers causal LM (a PreTrainedModel, not wrapped by PEFT) with as many vocabulary
            entries, on the same device; of the same dtype, except under autocast.
        memory_budget, backend: see `windkern.token_logps`.

    Raises:
        TypeError: `value` is not a PreTrainedModel.
        ValueError: vocabulary sizes or devices differ, or the two share parameters, which would freeze the value model.
        UnsupportedModelError: see `windkern.hf.hidden_and_head`; or a model caps its logits.

    Memory:
        A forward holds the activations of the value model and what `windkern.plan` gives for the scored tokens; the
        base is run without a graph.

    Source:
        Inverse value learning (arXiv 2410.21027): the residual connection, in which the value model sees tokens only
        and its logits are added. The walk by blocks is ours.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> base = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_key_value_heads=2, **sizes))
        >>> value = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_key_value_heads=2, **sizes))
        >>> model = ValueModel(base, value)
        >>> ids = torch.tensor([[4, 5, 6], [7, 8, 9]])
        >>> mask, answer = torch.ones_like(ids), torch.tensor([[0, 1, 1], [0, 0, 1]])
        >>> model(ids, mask, answer).sum().backward()
        >>> base.lm_head.weight.grad is None, value.lm_head.weight.grad is None
        (True, False)
    """

    def __init__(
        self, base: nn.Module, value: PreTrainedModel, *, memory_budget: int | None = None, backend: str = "auto"
    ):
        super().__init__()
        if not isinstance(value, PreTrainedModel):
            raise TypeError(
                f"value must be a transformers PreTrainedModel, got {type(value).__name__}; merge adapters first"
            )
        _check_pair(hf.hidden_and_head(base), hf.hidden_and_head(value))
        if {id(each) for each in base.parameters()} & {id(each) for each in value.parameters()}:
            raise ValueError(
                "base and value must not share parameters: the base's are frozen, the value model's are not"
            )
        self.base: Any = base.requires_grad_(False)
        self.value = value
        self.memory_budget, self.backend = memory_budget, backend
        self.train(value.training)

    def train(self, mode: bool = True) -> ValueModel:
        """Set the value model's mode; the base stays in eval mode, since it is not trained."""
        super().train(mode)
        self.base.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def generation_config(self):
        return self.base.generation_config

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the value model's activations in the backward pass; the base keeps none."""
        self.value.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Same as `activation_checkpointing_enable`, by its name in transformers before 5.24."""
        self.value.gradient_checkpointing_enable(**options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        """Return the log-prob of each completion under base and value model together.

            logps[s] = sum_t completion_mask[s, t] * log softmax(z_base + z_value)[s, t - 1, input_ids[s, t]]

        Differentiable with respect to the value model's parameters only.

        Args:
            input_ids: (S, L) int64 or int32, prompt and completion, padded on either side.
            attention_mask: (S, L) bool or 0 and 1; 0 for padding.
            completion_mask: (S, L) bool or 0 and 1; 1 for the tokens to score (the end token included). Never 1 in the
                first column, nor where attention_mask is 0.

        Returns:
            (S,) nats, float32 (float64 for float64 models).

        Raises:
            TypeError: dtypes do not fit.
            ValueError: shapes, devices or values do not fit.
        """
        targets = hf.completion_targets(input_ids, completion_mask)
        check_shape("attention_mask", check_tensor("attention_mask", attention_mask), shape_of(input_ids))
        attended = attention_mask.bool()
        if input_ids.device.type == "cpu" and bool((completion_mask.bool() & ~attended).any()):
            raise ValueError("completion_mask must be 0 wherever attention_mask is 0, got a scored padding token")
        base, value = hf.hidden_and_head(self.base), hf.hidden_and_head(self.value)
        # Reason: the walk scales the sum as the base scales its own logits, so the base's hidden states stay untouched.
        ratio = value.head.scale / base.head.scale
        with torch.no_grad():
            base_hidden, base_head = base.blocks(base.hidden(input_ids, attended))
        hidden = value.hidden(input_ids, attended)
        own_hidden, own_head = value.blocks(hidden if ratio == 1 else hidden * ratio)
        if base.weight.dtype != value.weight.dtype and not torch.is_autocast_enabled(input_ids.device.type):
            raise TypeError(
                f"base is {base.weight.dtype} and value is {value.weight.dtype}; outside autocast (bf16=True of "
                "TrainingArguments) both must have one dtype"
            )
        biases = [] if base.bias is None else [base.bias.detach()]
        biases += [] if value.bias is None else [value.bias * ratio]
        both = dataclasses.replace(
            base_head,
            weight=(*(each.detach() for each in _tuple(base_head.weight)), *_tuple(own_head.weight)),
            bias=sum(biases[1:], biases[0]) if biases else None,
        )
        return sequence_logps(
            (*_tuple(base_hidden), *_tuple(own_hidden)),
            both,
            targets,
            memory_budget=self.memory_budget,
            backend=self.backend,
        )

    @torch.no_grad()
    def base_logps(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        """Return the log-prob of each completion under the base alone: the reference of WIND, DPO and the like.

        Arguments, result and errors are those of `forward`; the result is not differentiable.
        """
        return hf.sequence_logps(
            self.base,
            input_ids,
            attention_mask,
            completion_mask,
            memory_budget=self.memory_budget,
            backend=self.backend,
        )

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Generate with `base.generate` from softmax(z_base + z_value); the value model keeps its own cache.

        `windkern.train.samplers.sampler.TransformersSampler` takes this object as its model. Temperature, top-k and
        top-p act on the sum. Processors that transformers makes from the generation config, such as a repetition
        penalty, see the base's logits alone; those in `logits_processor` see the sum.

        Args:
            input_ids: (S, P) int64, prompts padded on the left.
            attention_mask: (S, P) bool or 0 and 1; 0 for padding.
            options: options of `base.generate`. Sampling and greedy decoding work; beams and assisted decoding do not.

        Returns:
            What `base.generate` returns: (S, P + T) int64 unless asked for more.

        Raises:
            ValueError: `attention_mask` does not fit or attends to nothing in some row's last column.
            RuntimeError: decoding does not extend all sequences by one token in each step.
        """
        check_shape("attention_mask", check_tensor("attention_mask", attention_mask), shape_of(input_ids))
        if not bool(attention_mask[:, -1:].all()):
            raise ValueError("attention_mask must be 1 in the last column: prompts are padded on the left")
        configured = options.get("generation_config") or self.generation_config
        beams = options.get("num_beams", configured.num_beams)
        if (beams or 1) > 1:
            raise ValueError(f"num_beams must be 1, got {beams}: the value model's cache does not follow beams")
        added = ValueLogits(self.value, attention_mask)
        given = options.pop("logits_processor", None) or []
        was_training = self.training
        self.eval()
        try:
            return self.base.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=LogitsProcessorList([added, *given]),
                **options,
            )
        finally:
            self.train(was_training)

    def save_pretrained(self, folder: str | Path, *, base_name: str | None = None) -> None:
        """Write the value model alone, in the form transformers reads, and a file that names its base.

        Args:
            folder: created if it does not exist.
            base_name: folder or hub id of the base; None: where transformers loaded it from.
        """
        folder = Path(folder)
        self.value.save_pretrained(folder)
        content = {
            "base": base_name or getattr(self.base.config, "_name_or_path", "") or None,
            "vocab_size": hf.hidden_and_head(self.base).weight.shape[0],
        }
        (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base: nn.Module | str | None = None,
        *,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> ValueModel:
        """Load a value model and put it on a base, in eval mode.

        Args:
            folder: what `save_pretrained` wrote.
            base: a model, or the folder or hub id of one, with the same tokenizer; None: the one it was trained on.
            dtype: dtype of the value model, and of a base that is loaded by name. None: that of a base given as a
                model, else what the value model was saved in.
            options: memory_budget, backend.

        Raises:
            FileNotFoundError: the folder holds no value model.
            ValueError: the vocabulary sizes differ, or `base` is None and the folder does not name one.
            OSError: a base given by name cannot be read.
        """
        file = Path(folder) / DESCRIPTION
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no value model: {DESCRIPTION} is missing")
        base = json.loads(file.read_text(encoding="utf-8"))["base"] if base is None else base
        if base is None:
            raise ValueError(f"base must be given: {file} does not name one")
        if dtype is None and isinstance(base, nn.Module):
            dtype = next(base.parameters()).dtype
        value = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if dtype is None else dtype)
        loaded: Any = load_model(base, dtype=value.dtype)[0] if isinstance(base, str) else base
        return cls(loaded, value.to(loaded.device).eval(), **options)


class ValueLogits(LogitsProcessor):
    """Adds the value model's logits to the base's while the base generates.

    Args:
        value: causal LM in eval mode.
        attention_mask: (S, P) mask of the prompts, padded on the left. Each may be answered several times in a row.

    Raises:
        RuntimeError: when called, sequences are not one token longer than the last time.
    """

    def __init__(self, value: PreTrainedModel, attention_mask: Tensor):
        self.value, self._mask = value, attention_mask.long()
        self._cache, self._seen = None, 0
        self._accepted = inspect.signature(value.forward).parameters
        self._cache_name = "cache" if "cache" in self._accepted else "past_key_values"  # before transformers 5.24

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows, length = input_ids.shape
        if self._seen == 0:
            self._mask = self._mask.repeat_interleave(rows // self._mask.shape[0], 0)
        else:
            self._mask = torch.cat([self._mask, self._mask.new_ones(rows, 1)], 1)
        if self._mask.shape != input_ids.shape:
            raise RuntimeError(
                f"sequences of {self._seen} tokens grew to {length}: generate with plain sampling or greedy decoding"
            )
        options: dict[str, object] = {"logits_to_keep": 1} if "logits_to_keep" in self._accepted else {}
        if "position_ids" in self._accepted:
            options["position_ids"] = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, self._seen :]
        out = self.value(
            input_ids=input_ids[:, self._seen :],
            attention_mask=self._mask,
            use_cache=True,
            **{self._cache_name: self._cache},
            **options,
        )
        self._cache, self._seen = getattr(out, self._cache_name), length
        return scores + out.logits[:, -1].to(scores.dtype)
