"""Benchmark a trained model by lm_eval: `python -m windkern.train.evaluation.harness FOLDER --tasks gsm8k,mmlu`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from windkern._files import to_json
from windkern.train.models import MissingPackageError, adapter_of, require

TASKS = ("gsm8k", "hellaswag", "mmlu")  # the tasks that the WIND paper reports
SHOTS = {"gsm8k": 5, "hellaswag": 10, "mmlu": 5}  # as on the Open LLM Leaderboard, which SPPO reports
FILE = "lm_eval.json"


def model_arguments(name: str, dtype: str) -> str:
    """Return lm_eval's model_args for a folder or hub id of a model or an adapter.

    Example:
        >>> model_arguments("smollm2-135m-instruct", "auto")
        'pretrained=smollm2-135m-instruct,dtype=auto'
    """
    held = adapter_of(name)
    named = f"pretrained={name}" if held is None else f"pretrained={held.base_model_name_or_path},peft={name}"
    return f"{named},dtype={dtype}"


def benchmark(
    name: str,
    tasks: Sequence[str] = TASKS,
    *,
    dtype: str = "auto",
    shots: Mapping[str, int] = SHOTS,
    limit: int | None = None,
    batch_size: int | str = "auto",
    device: str | None = None,
) -> dict[str, dict[str, float]]:
    """Return the results of lm_eval's tasks for a model, by task and metric.

    Args:
        name: folder or hub id of a model, or of an adapter, which is put on its base.
        tasks: names of lm_eval's tasks.
        dtype: dtype of the weights, as transformers names it.
        shots: examples before each question, by task; other tasks keep their own number.
        limit: questions of each task, from the first; None: all.
        batch_size, device: as lm_eval takes them.

    Raises:
        MissingPackageError: lm_eval is not installed.
        ValueError: `tasks` is empty.
    """
    if not tasks:
        raise ValueError(f"tasks must name at least one task of lm_eval, such as {TASKS[0]}, got none")
    try:
        require("lm_eval")
    except MissingPackageError as error:
        raise MissingPackageError(f"{error} (or windkern[lm_eval])") from None
    import lm_eval  # type: ignore[import-not-found]  # in a separate extra

    results: dict[str, dict[str, float]] = {}
    for task in tasks:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=model_arguments(name, dtype),
            tasks=[task],
            num_fewshot=shots.get(task),
            limit=limit,
            batch_size=batch_size,
            device=device,
            apply_chat_template=False,
        )
        numbers = found["results"][task]
        results[task] = {key: value for key, value in numbers.items() if isinstance(value, (int, float))}
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the results of a model, and write them into its folder if it has one."""
    parser = argparse.ArgumentParser(prog="python -m windkern.train.evaluation.harness", description=__doc__)
    parser.add_argument("model", help="folder or hub id of a model or an adapter")
    parser.add_argument("--tasks", default=",".join(TASKS), help="tasks of lm_eval, joined by commas")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights")
    parser.add_argument("--limit", type=int, default=None, help="questions of each task; all without it")
    parser.add_argument("--batch-size", default="auto", help="as lm_eval takes it")
    parser.add_argument("--device", default=None, help="as lm_eval takes it")
    given = parser.parse_args(arguments)
    results = benchmark(
        given.model,
        [task for task in given.tasks.split(",") if task],
        dtype=given.dtype,
        limit=given.limit,
        batch_size=int(given.batch_size) if given.batch_size.isdigit() else given.batch_size,
        device=given.device,
    )
    print(json.dumps(results, indent=2))
    if Path(given.model).is_dir():
        (Path(given.model) / FILE).write_text(to_json(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
