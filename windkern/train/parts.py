"""Parts of a run made from its settings: the policy's sampler, dropout switch, clean output folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from windkern.train.config import WindConfig
from windkern.train.data.loading import Demonstration
from windkern.train.preconditions import Room
from windkern.train.samplers.sampler import TransformersSampler

Note = Callable[[str], None]
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_DROPOUT = ("dropout", "pdrop", "layerdrop")


def transformers_sampler(
    model: nn.Module,
    tokenizer,
    config: WindConfig,
    *,
    synced: bool = False,
    under_way: Callable[[float], None] = lambda responses: None,
) -> TransformersSampler:
    """A sampler of a model with the settings of a run."""
    return TransformersSampler(
        model,
        tokenizer,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        system=config.system if tokenizer.chat_template is not None else None,
        batch_size=config.sampling_batch_size,
        synced=synced,
        under_way=under_way,
    )


def fitting(
    room: Room, prompts: Sequence, heldout: Sequence[str], note: Note
) -> tuple[list[str], list[Demonstration], list[str]]:
    """Training prompts, the demonstrations they are from if they are any, and held-out prompts, as far as they fit.

    Raises:
        ValueError: as `Room.fit`.
    """
    texts = [each.prompt if isinstance(each, Demonstration) else each for each in prompts]
    kept = room.fit("train_prompts", texts, note)
    shown = [prompts[k]._replace(prompt=prompt) for k, prompt in kept if isinstance(prompts[k], Demonstration)]
    return [prompt for _, prompt in kept], shown, [prompt for _, prompt in room.fit("eval_prompts", heldout, note)]


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, those of attention and of the configuration included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Reason: Starcoder2 and Bloom draw with a number of the module, Falcon with one of the configuration.
        for owner in (module, getattr(module, "config", module)):
            for name, value in list(vars(owner).items()):
                if isinstance(value, float) and any(word in name for word in _DROPOUT):
                    setattr(owner, name, 0.0)


def check_prompts(prompts: Sequence[str], heldout: Sequence[str]) -> None:
    """Raise unless there are training prompts, all are strings, and none of them is held out.

    Raises:
        TypeError: a prompt is no string (a `ChatPrompt` is one).
        ValueError: no training prompts, or some are in both lists.
    """
    if not prompts:
        raise ValueError("train_prompts must hold at least one prompt, got none")
    for name, entries in (("train_prompts", prompts), ("eval_prompts", heldout)):
        for place, entry in enumerate(entries):
            if not isinstance(entry, str):
                hint = (
                    "; make messages one by windkern.train.data.prompts.ChatPrompt" if isinstance(entry, list) else ""
                )
                raise TypeError(f"{name}[{place}] must be a string, got {type(entry).__name__}{hint}")
    if shared := set(prompts) & set(heldout):
        raise ValueError(
            f"{len(shared)} held-out prompts are also training prompts, e.g. {min(shared)!r}; "
            "leave them out of one of the lists"
        )


def with_adapter(model: nn.Module, peft_config, seed: int) -> nn.Module:
    """A model with a new adapter on top, which starts as the seed says.

    Raises:
        ValueError: the model has an adapter already; PEFT would put the new one in its place.
    """
    from peft import get_peft_model
    from transformers import set_seed

    if held := getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        names = ", ".join(held) if isinstance(held, dict) else "default"
        raise ValueError(
            f"peft_config makes a new adapter, but model has one ({names}), which it would take the place of. To train "
            "that one further, leave peft_config out and load it by PeftModel.from_pretrained(base, folder, "
            "is_trainable=True); to start a new one on top, merge it first: PeftModel.from_pretrained(base, "
            "folder).merge_and_unload()"
        )
    set_seed(seed)  # the adapter starts at random; transformers seeds only later
    return get_peft_model(model, peft_config)


def starts_as_base(peft_config) -> bool:
    """Whether a model with a new adapter, switched off, is the model it was put on.

    PiSSA and its like take from the base what they put into the adapter.
    """
    start = getattr(peft_config, "init_lora_weights", True)
    return not (isinstance(start, str) and start.lower().startswith(_MOVES_BASE))


def check_evaluation(config: WindConfig, heldout: Sequence[str], note: Note) -> None:
    """Raise where an evaluation is asked for and there is nothing to evaluate on; `note` says what one prompt lacks.

    Raises:
        ValueError: eval_strategy, or what depends on it, without held-out prompts.
    """
    if not heldout and (config.eval_strategy != "no" or config.eval_on_start):
        raise ValueError(
            f"eval_prompts must be given for eval_strategy={str(config.eval_strategy.value)!r}, eval_on_start="
            f"{config.eval_on_start}: an evaluation compares with the reference on held-out prompts"
        )
    if len(heldout) == 1:
        note("eval_prompts holds one prompt: means over prompts get no standard error, and no interval")


def not_finite(config: WindConfig, step: int, loss: float) -> FloatingPointError:
    """The error for a loss that is no number, which names what may be to blame."""
    given = {"eta": config.eta, "beta": config.beta, **(config.loss_settings or {})}
    numbers = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    if step == 1:  # no weight has moved
        return FloatingPointError(
            f"the loss of step 1 is {loss}, before any weight has moved: the numbers of the loss ({numbers}) or the "
            "judge's rewards are too large for it"
        )
    return FloatingPointError(
        f"the loss of step {step} is {loss}; lower learning_rate={config.learning_rate!r}, or the numbers of the loss "
        f"({numbers})"
    )


def check_unused(output_dir: Path, *, overwrite: bool) -> list[Path]:
    """The checkpoints of an earlier run, which may be deleted.

    Raises:
        ValueError: there are some, and `overwrite` is False.
    """
    found = sorted(output_dir.glob("checkpoint-*"))
    if found and not overwrite:
        raise ValueError(
            f"{output_dir} holds checkpoints of an earlier run ({found[-1].name}); resume it (--resume), or take "
            "another output_dir, or set overwrite to true to delete them"
        )
    return found


def demonstrations_of(prompts: Sequence, wanted: bool) -> list[Demonstration]:
    """The prompts as demonstrations, none where the loss wants none.

    Raises:
        ValueError: some are demonstrations and some are not, or none is and the loss wants them.
    """
    found = [each for each in prompts if isinstance(each, Demonstration)]
    if (wanted or found) and len(found) != len(prompts):
        raise ValueError(
            f"train_prompts must all be Demonstrations (prompt, answer) for loss='spin', got {len(found)} of "
            f"{len(prompts)}"
        )
    return found
