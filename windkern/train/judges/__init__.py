"""Judges: callables, reward and pair models, recorded verdicts; `make_judge` picks one by a run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from windkern.train.config import WindConfig
    from windkern.train.judges.judge import Judge


def make_judge(config: WindConfig) -> Judge | None:
    """Return the judge that `config.judge` names, None if it is None.

    Raises:
        ValueError, OSError: as `windkern.train.judges.named.load_judge`.
    """
    if config.judge is None:
        return None
    from windkern.train.judges.named import load_judge

    settings = dict(config.judge_settings or {})
    if config.judge.startswith("llm:"):  # in the run's folder, so that a resumed run finds them
        settings.setdefault("cache", str(Path(cast(str, config.output_dir)) / "judgements"))
    return load_judge(
        config.judge, strength=config.judge_strength, device=str(config.device), settings=settings or None
    )
