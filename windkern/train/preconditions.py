"""Check model, tokenizer, prompt lengths and reporting before anything is sampled."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import IntervalStrategy, TrainingArguments
from transformers.integrations import integration_utils

from windkern._checks import FLOATS, check_choice
from windkern.hf.positions import positions_of
from windkern.train.config import WindConfig
from windkern.train.data.datasets import PromptSets, check_prompts
from windkern.train.data.loading import encode_prompts, padding_id
from windkern.train.data.prompts import SYSTEM_ROLES, ChatPrompt
from windkern.train.models import MissingPackageError

_AT_A_TIME = 512  # prompts encoded
_FINDERS = {"azure_ml": "is_azureml_available", "comet_ml": "is_comet_available", "flyte": "is_flytekit_available"}
_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_reporting(args: TrainingArguments) -> None:
    """Raise unless every integration in `report_to` is known to transformers and installed.

    Raises:
        ValueError: an integration is not known.
        MissingPackageError: its package is not installed; the message has the command that installs it.
    """
    for name in args.report_to:
        if name == "no":
            raise ValueError("report_to must be none to report nowhere, got 'no'")
        check_choice("report_to", name, ["none", "all", *integration_utils.INTEGRATION_TO_CALLBACK])
        available = getattr(integration_utils, _FINDERS.get(name, f"is_{name}_available"), None)
        if available is not None and not available():
            package = _PACKAGES.get(name, name)
            raise MissingPackageError(
                f"report_to {name} needs a package that is not installed; run: python -m pip install {package}"
            )


def check_evaluation(config: WindConfig, heldout: Sequence[str], note: Callable[[str], None]) -> None:
    """Raise if an evaluation is asked for without held-out prompts. `note` is called if there is only one prompt.

    Raises:
        ValueError: eval_strategy or eval_on_start needs held-out prompts, and there are none.
    """
    if not heldout and (config.eval_strategy != "no" or config.eval_on_start):
        raise ValueError(
            f"eval_dataset must be given for eval_strategy={IntervalStrategy(config.eval_strategy).value!r}, "
            f"eval_on_start={config.eval_on_start}: an evaluation compares with the reference on held-out prompts"
        )
    if len(heldout) == 1:
        note("eval_dataset holds one prompt: means over prompts get no standard error, and no interval")


def check_tokenizer(tokenizer: object) -> None:
    """Raise unless `processing_class` is a tokenizer.

    Raises:
        TypeError: it is None, or a processor of several kinds of data.
    """
    if not (callable(tokenizer) and hasattr(tokenizer, "eos_token_id") and hasattr(tokenizer, "chat_template")):
        raise TypeError(f"processing_class must be a tokenizer of transformers, got {type(tokenizer).__name__}")


def check_model(model: nn.Module) -> None:
    """Raise unless a model can be trained: something in it is trainable, and its weights are finite and not float64.

    Raises:
        ValueError: nothing is trainable, or a weight is not finite; the message names the first such weight.
    """
    if not isinstance(model, nn.Module):
        return  # `check_scorable` reports it
    parameters = dict(model.named_parameters())
    if not any(value.requires_grad for value in parameters.values()):
        hint = ""
        if hasattr(model, "peft_config") or any("lora_" in name for name in parameters):
            hint = (
                "; an adapter is loaded for inference by default, so pass is_trainable=True: "
                "PeftModel.from_pretrained(base, folder, is_trainable=True)"
            )
        raise ValueError(f"model must have a parameter to train, but none requires a gradient{hint}")
    for name, value in parameters.items():
        if value.dtype == torch.float64:
            raise ValueError(
                f"model must be float32, bfloat16 or float16, but {name} is float64, and log-probs are kept in float32 "
                "from one step to the next; model.float() makes it so"
            )
        if not value.numel() or value.is_meta or value.dtype not in FLOATS or hasattr(value, "to_local"):
            continue
        low, high = torch.aminmax(value.detach())
        # Reason: a bias of -inf masks an entry of the vocabulary.
        if low.isnan() or (value.dim() > 1 and (low.isinf() or high.isinf())):
            raise ValueError(f"the weights of the model are not finite: {name} holds {low.item()} and {high.item()}")


def _rows(model: Any) -> int | None:
    weight = getattr(model.get_input_embeddings(), "weight", None)
    shape: tuple[int, ...] = getattr(weight, "ds_shape", getattr(weight, "shape", ()))
    return shape[0] if len(shape) == 2 else None


@dataclass
class Room:
    """Limits the length of prompts, and drops, cuts or refuses longer ones.

    Args:
        config: settings of the run.
        model: its positions hold prompt and response together.
        tokenizer: the model's tokenizer.

    Raises:
        ValueError: max_completion_length alone fills the positions of the model, or the tokenizer pads with a token
            that the model does not have.
    """

    config: WindConfig
    model: nn.Module
    tokenizer: Any

    def __post_init__(self) -> None:
        config, positions = self.config, positions_of(self.model)
        self.limit, self.why = config.max_prompt_length, "max_prompt_length"
        if positions is not None:
            room = positions - config.max_completion_length
            if room < 1:
                raise ValueError(
                    f"max_completion_length must leave room for a prompt in the {positions} positions of the model "
                    f"(max_position_embeddings), got {config.max_completion_length}"
                )
            if self.limit is None or room < self.limit:
                self.limit = room
                left = f"max_completion_length = {config.max_completion_length}"
                self.why = f"the {positions} positions of the model minus {left}"
        self.system = config.system if self.tokenizer.chat_template is not None else None
        self.rows = _rows(self.model)
        for name, value in (("padding", padding_id(self.tokenizer)), ("end", self.tokenizer.eos_token_id)):
            self._check_tokens(f"the tokenizer's {name} token", -1 if value is None else value)

    def _check_tokens(self, where: str, highest: int) -> None:
        if self.rows is not None and highest >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise ValueError(
                f"{where} has the id {highest} ({token!r}), but the model has embeddings for {self.rows} tokens only; "
                "its tokenizer must be that of the model, or call model.resize_token_embeddings(len(tokenizer)) and "
                "save both"
            )

    def fit(self, name: str, prompts: Sequence[str], note: Callable[[str], None]) -> list[tuple[int, str]]:
        """Return the prompts that fit, cut ones included, each with its place in the list.

        Args:
            name: name of the setting, for messages.
            prompts: strings or `ChatPrompt`s.
            note: called if prompts were cut or left out.

        Raises:
            ValueError: a prompt is too long and long_prompts is refuse; no prompt is left; a prompt cannot be cut far
                enough; or a prompt has a token that the model does not have.
        """
        kept, longer = [], 0
        for first in range(0, len(prompts), _AT_A_TIME):
            part = list(prompts[first : first + _AT_A_TIME])
            encoded = encode_prompts(self.tokenizer, part, system=self.system)
            lengths = encoded.attention_mask.sum(1).tolist()
            highest = encoded.input_ids.masked_fill(encoded.attention_mask == 0, 0).max(1).values.tolist()
            for k, (prompt, length) in enumerate(zip(part, lengths, strict=True), start=first):
                self._check_tokens(f"{name}[{k}] ({_short(prompt)})", highest[k - first])
                if self.limit is None or length <= self.limit:
                    kept.append((k, prompt))
                    continue
                longer += 1
                if self.config.long_prompts == "refuse":
                    raise ValueError(
                        f"{name}[{k}] has {length} tokens, but only {self.limit} fit ({self.why}): {_short(prompt)}; "
                        "set long_prompts to drop or cut, or lower max_completion_length"
                    )
                if self.config.long_prompts == "cut":
                    kept.append((k, self._cut(prompt, f"{name}[{k}]")))
        if longer:
            done = "their beginnings are cut off" if self.config.long_prompts == "cut" else "they are left out"
            note(f"{longer} of {len(prompts)} {name} have more than {self.limit} tokens ({self.why}): {done}")
        if not kept and prompts:
            raise ValueError(f"all {len(prompts)} {name} have more than {self.limit} tokens ({self.why})")
        return kept

    def fit_all(self, given: PromptSets, note: Callable[[str], None]) -> PromptSets:
        """Return the prompts of a run that fit, see `fit`.

        Raises:
            ValueError: as `fit`, or a training prompt and a held-out one are the same once they are cut.
        """
        kept = self.fit("train_dataset", given.train, note)
        heldout = [prompt for _, prompt in self.fit("eval_dataset", given.heldout, note)]
        try:
            check_prompts([prompt for _, prompt in kept], heldout)
        except ValueError as error:  # they were different before their beginnings were cut off
            raise ValueError(f"long_prompts='cut' to {self.limit} tokens ({self.why}): {error}") from error
        answers = [given.demonstrations[k]._replace(prompt=prompt) for k, prompt in kept if given.demonstrations]
        return PromptSets([prompt for _, prompt in kept], answers, heldout)

    def _fits(self, prompt: str) -> bool:
        return encode_prompts(self.tokenizer, [prompt], system=self.system).input_ids.shape[1] <= self.limit

    def _cut(self, prompt: str, where: str) -> str:
        """Return the prompt without its oldest messages and, if needed, without the beginning of the last one."""
        if not isinstance(prompt, ChatPrompt):
            return self._cut_text(prompt, lambda text: text, where)
        system = [message for message in prompt.messages if message["role"] in SYSTEM_ROLES]
        turns = [message for message in prompt.messages if message["role"] not in SYSTEM_ROLES]
        for first in range(1, len(turns)):
            if turns[first]["role"] == "user" and self._fits(shorter := ChatPrompt([*system, *turns[first:]])):
                return shorter
        last = prompt.messages[-1]
        before = system if last in turns else []
        return self._cut_text(last["content"], lambda text: ChatPrompt([*before, {**last, "content": text}]), where)

    def _cut_text(self, text: str, prompt_of: Callable[[str], str], where: str) -> str:
        words = [match.start() for match in re.finditer(r"\S+", text)]
        starts = words if self._fits(prompt_of(text[words[-1] :])) else range(words[-1], len(text.rstrip()))
        low, high = 0, len(starts) - 1  # the first that fits lies between
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(prompt_of(text[starts[middle] :])) else (middle + 1, high)
        shorter = prompt_of(text[starts[low] :])
        if not self._fits(shorter):
            raise ValueError(
                f"{where} cannot be cut to {self.limit} tokens ({self.why}): the chat template, the system message and "
                "one character take more"
            )
        return shorter


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")
