"""Sequence classifiers as judges: incomplete checkpoints are refused, and logits do not depend on the batch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from windkern._checks import check_count
from windkern.hf.positions import position_tables, positions_of
from windkern.train.models import quantized, require

# Relative difference of logits in a padded batch and alone; several times that of sums in another order.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_log = logging.getLogger(__name__)


def load_classifier(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quantization: Mapping[str, object] | None = None,
) -> Any:
    """Return (model in eval mode, tokenizer) of a sequence classifier, from a folder or the hub.

    The folder may hold a PEFT adapter of one; its base may be any model, if the adapter has the head.

    Args:
        name: folder or hub id.
        dtype: dtype of the weights that are not quantised.
        device: device of the model.
        quantization: arguments of `transformers.BitsAndBytesConfig`, such as {"load_in_8bit": True}. None loads the
            weights unchanged; they may be quantised already.

    Raises:
        MissingPackageError: transformers is not installed, or bitsandbytes is not and `quantization` needs it.
        ValueError: weights of the model are not in the checkpoint, such as the head of a causal LM, or weights of the
            checkpoint are not in the model; the message names them.
        OSError: the folder or the hub id cannot be read (transformers says why).
    """
    require("transformers")
    import transformers
    from transformers.utils import find_adapter_config_file

    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    adapter = find_adapter_config_file(name)
    base = name if adapter is None else json.loads(Path(adapter).read_text("utf-8"))["base_model_name_or_path"]
    options = {}
    if quantization is not None:
        require("bitsandbytes")
        options = quantized(quantization, device)
    model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, dtype=dtype, output_loading_info=True, **options
    )
    missing, unused = set(found["missing_keys"]), set(found["unexpected_keys"])
    if adapter is not None:
        loaded, unused = (
            model.load_adapter(name),
            set(),
        )  # unused in the base: its own head, which the adapter's replaces
        replaced = {key for key in missing if hasattr(model.get_submodule(key.rpartition(".")[0]), "modules_to_save")}
        missing = (missing - replaced) | set(getattr(loaded, "missing_keys", ()))
    check_whole(name, type(model).__name__, missing, unused)
    return (model.to(device) if quantization is None else model).eval(), tokenizer


def check_whole(name: str, kind: str, missing: set[str], unused: set[str]) -> None:
    """Raise unless a checkpoint has all weights of a judge, and no others.

    Args:
        name: name of the checkpoint.
        kind: class of the model.
        missing, unused: names of weights that the checkpoint lacks, and of those that the model does not have.

    Raises:
        ValueError: there are such weights; the message names some.
    """
    faults = []
    if missing:
        faults.append(f"{_some(missing)} would be random, because the checkpoint lacks them")
    if unused:
        faults.append(f"{_some(unused)} of the checkpoint would not be used")
    if faults:
        raise ValueError(
            f"{name} is not a judge: as {kind}, {' and '.join(faults)}. A judge must be a checkpoint of a trained "
            "sequence classifier; if it is right all the same, load it in Python and pass it to ModelReward or "
            "ModelPreference"
        )


def _some(names: set[str], most: int = 3) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


class Classifier:
    """Computes logits of a sequence classifier for many texts, in batches of similar length.

    A text's logits do not depend on its batch: texts are padded on the right, with the id that the model's
    configuration takes for padding, whatever the tokenizer's is. The first padded batch is checked against one of its
    texts alone; where they differ, and where the configuration names no padding id, texts are read one by one.

    Args:
        model: any AutoModelForSequenceClassification; it is read in eval mode.
        tokenizer: its tokenizer.
        batch_size: texts at a time.
        max_length: longer texts are cut to this many tokens, on the side the tokenizer's `truncation_side` names; the
            log says how many. None: texts longer than the model's positions are refused.

    Raises:
        ValueError: a number is out of range, or `max_length` is more than the model has positions for; when reading, a
            text is longer than them and `max_length` is None.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 16, max_length: int | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.padding = _padding_of(model)
        self.batch_size = 1 if self.padding is None else check_count("batch_size", batch_size, least=1)
        self.max_length = None if max_length is None else check_count("max_length", max_length, least=1)
        self.positions = positions_of(model)
        # Reason: a model without a table can go beyond its positions, if not well, and the user has asked for it.
        most = self.positions if self.positions is not None and position_tables(model) else max_length
        if max_length is not None and most is not None and max_length > most:
            raise ValueError(f"max_length must be at most the model's {most} positions, got {max_length}")
        self.read, self.cut = 0, 0  # texts
        self._said, self._checked = 0, False

    @property
    def num_labels(self) -> int:
        return self.model.config.num_labels

    def encode(self, text: str, second: str | None = None, *, special: bool = True) -> dict[str, list[int]]:
        """Return the model inputs of a text or of a pair of texts."""
        found = dict(self.tokenizer(text, second, add_special_tokens=special, verbose=False))
        length, self.read = len(found["input_ids"]), self.read + 1
        if self.max_length is not None and length > self.max_length:
            self.cut += 1
            found = dict(
                self.tokenizer(text, second, add_special_tokens=special, truncation=True, max_length=self.max_length)
            )
        elif self.max_length is None and self.positions is not None and length > self.positions:
            raise ValueError(
                f"a text of {length} tokens is longer than the {self.positions} positions of the judge's "
                f"{type(self.model).__name__}: let max_length cut it (in a settings file judge_settings: "
                f"{{max_length: {self.positions}}}), or make max_completion_length smaller"
            )
        return found

    def __call__(self, encoded: Sequence[dict[str, list[int]]]) -> Tensor:
        """Return (S, labels) float32 logits, on the CPU."""
        if self.cut >= 2 * self._said and self.cut:
            self._said = self.cut
            _log.warning(
                "%d of the judge's %d texts so far were longer than max_length = %d tokens and were cut",
                self.cut,
                self.read,
                self.max_length,
            )
        order = sorted(range(len(encoded)), key=lambda k: len(encoded[k]["input_ids"]))
        logits = torch.empty(len(encoded), self.num_labels)
        was_training = self.model.training
        self.model.eval()
        try:
            while order:
                chosen, order = order[: self.batch_size], order[self.batch_size :]
                logits[chosen] = self._batch([encoded[k] for k in chosen])
        finally:
            self.model.train(was_training)
        return logits

    def _batch(self, rows: list[dict[str, list[int]]]) -> Tensor:
        """Return the logits of rows that are sorted by length."""
        logits = self._forward(rows)
        if self._checked or len(rows[0]["input_ids"]) == len(rows[-1]["input_ids"]):
            return logits
        self._checked = True
        alone, bound = self._forward(rows[:1]), _ROUNDING.get(self.model.dtype, _ROUNDING[torch.bfloat16])
        if torch.allclose(logits[:1], alone, rtol=bound, atol=bound):
            return logits
        self.batch_size = 1
        _log.warning(
            "%s gives a padded text other logits than the text alone (%s, not %s), so texts are read one by one",
            type(self.model).__name__,
            logits[0].tolist(),
            alone[0].tolist(),
        )
        return torch.cat([self._forward([row]) for row in rows])

    @torch.no_grad()
    def _forward(self, rows: list[dict[str, list[int]]]) -> Tensor:
        batch = {
            name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True)
            for name in rows[0]
            if name != "attention_mask"
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (S, L)
        if self.padding is not None:
            batch["input_ids"] = batch["input_ids"].masked_fill(~mask, self.padding)
        batch["attention_mask"] = mask.long()
        return self.model(**{name: ids.to(self.model.device) for name, ids in batch.items()}).logits.float().cpu()


def _padding_of(model: Any) -> int | None:
    """Return the model's padding id; None if it does not name one, or has no embedding for it."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    found = getattr(config, "pad_token_id", None)
    return found if found is not None and 0 <= found < model.get_input_embeddings().weight.shape[0] else None
