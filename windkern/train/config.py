"""WindConfig: what determines a run, on top of transformers.TrainingArguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from windkern.train import tried  # noqa: F401

# isort: split
from transformers import TrainingArguments

from windkern._checks import check_choice, check_count, check_number
from windkern.losses import LOSSES, Loss
from windkern.train.data.prompts import without_user
from windkern.train.focus import MODES
from windkern.train.inherited import check_inherited
from windkern.train.samplers.kinds import kind_of

REFERENCES = ("model", "adapter", "precomputed")
SHARED_PROMPT = ("auto", "always", "never")
LONG_PROMPTS = ("refuse", "drop", "cut")
EVALUATED = ("win_rate", "reward", "kl")
_FIXED = ", ".join(f"{name} {loss.group.sampled}" for name, loss in LOSSES.items() if loss.group.sampled)
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that look at an evaluation


def _names(fits: Callable[[Loss], object]) -> str:
    """Return the names of the trainable losses that fit, for messages."""
    return ", ".join(name for name, loss in LOSSES.items() if loss.separable and fits(loss))


_REPLAYABLE = _names(lambda loss: loss.replayable)
_ANCHORED = _names(lambda loss: loss.group.kind == "anchor")


def setting(default: Any, help: str, **options: object) -> Any:
    """Return a field of a dataclass of settings, with its help.

    Args:
        default: default of the field.
        help: meaning, unit, range, and the origin of the default.
        options: `choices`, if the field has any.
    """
    return field(default=default, metadata={"help": help, **options})


def check_one_gpu(count: int) -> None:
    """Raise where transformers would spread batches over several GPUs of one process (DataParallel).

    Raises:
        ValueError: this process sees more than one GPU.
    """
    if count > 1:
        raise ValueError(
            f"one process sees {count} GPUs; start one for each by torchrun (--nproc_per_node={count}) or accelerate "
            "launch, or set CUDA_VISIBLE_DEVICES"
        )


def check_output_dir(path: object) -> None:
    """Raise where `output_dir` is an empty string, with which a run would write into the current directory.

    Raises:
        ValueError: it is.
    """
    if isinstance(path, str) and not path.strip():
        raise ValueError(f"output_dir must be the path of a folder, such as runs/mine, got {path!r}")


@dataclass
class WindConfig(TrainingArguments):
    """Settings of a `WindTrainer` run, in addition to those of `transformers.TrainingArguments`.

    Of the inherited ones, `per_device_train_batch_size` and `per_device_eval_batch_size` count prompts: all responses
    to a prompt go through the model together. An outer iteration samples and judges

        prompts_per_iteration = steps_per_iteration * gradient_accumulation_steps * per_device_train_batch_size
                                * processes / passes_per_iteration

    prompts, and the run takes num_iterations * steps_per_iteration optimizer steps; one "epoch" in logs is one outer
    iteration. `num_train_epochs` and `max_steps` follow from that and cannot be set. `save_strategy` and
    `eval_strategy` "epoch" mean after each iteration. Every field's meaning, unit, range and the origin of its default
    is in its help: `windkern train --fields`.

    Raises:
        ValueError, TypeError: a field is out of range, or fields contradict each other; the message names them; or
            one process sees several GPUs.

    Example:
        >>> config = WindConfig(output_dir="run", num_iterations=2, steps_per_iteration=4, report_to="none")
        >>> config.total_steps, config.loss_arguments
        (8, {'eta': 4.0, 'beta': 0.05, 'objective': 'square'})
    """

    loss: str = setting(
        "wind",
        "Loss to fit, a separable one of windkern.losses.LOSSES. `windkern losses` lists them, and `windkern losses "
        "NAME` says which responses a loss takes. Default: the loss of the paper that this package implements.",
    )
    loss_kwargs: dict | None = setting(
        None,
        "Arguments of the loss by name, such as {eta: 4, beta: 0.05, objective: square}; `windkern losses NAME` "
        "explains them. eta is a step size: after a perfect fit of wind, eta / (1 + eta * beta) nats separate a "
        "certain winner from a certain loser; beta weighs the KL to the reference. An argument that is left out "
        "has the loss's own default, else that of the table of losses (ours). The exact update converges whatever the "
        "preferences up to eta = 4 * beta; the default eta is larger, since an iteration's few steps stay far from a "
        "perfect fit.",
    )
    num_iterations: int = setting(
        3, "Outer iterations: freeze the policy, sample, judge, fit. At least 1. Default: as SPPO's runs."
    )
    steps_per_iteration: int = setting(
        32, "Optimizer steps in each outer iteration. At least 1. Default: ours, small enough to stay near the policy."
    )
    passes_per_iteration: int = setting(
        1, "Passes over an iteration's responses; divides steps_per_iteration. Default: one, as SPPO."
    )
    num_generations: int | None = setting(
        None,
        f"Responses sampled for each prompt, at least 2. None: 5 as SPPO, or as many as the loss needs ({_FIXED}).",
    )
    fit_responses: int | None = setting(
        None,
        "Number of sampled responses that are fitted: those with the highest and lowest win rates against all; at "
        "least 2. A response costs less to sample than to fit, and the extremes carry most of the signal. None: all.",
    )
    reset_optimizer: bool = setting(
        False,
        "Whether the optimizer's moments are reset at the start of each iteration, which is a new regression. Default: "
        "no, as transformers.",
    )
    sampler: str = setting(
        "transformers",
        "Source of responses: transformers (the policy's own generate), batched (transformers' continuous batching: "
        "fast, but the same seed need not give the same responses), vllm:URL or sglang:URL (a server that is given the "
        "weights before each iteration, see docs/vllm.md), openai:URL (a server that speaks the OpenAI protocol, for a "
        "policy that stays as it is), or recorded:FILE (JSON lines). A server's key is read from the environment "
        "variable OPENAI_API_KEY. Default: the one that always works.",
    )
    sampler_settings: dict | None = setting(
        None,
        "Keyword arguments of a sampler that is a server: model (name of the base model there), folder (for weights; "
        "trainer and server must see it under the same name), transfer (folder, or nccl for whole weights, with "
        "address, HOST or HOST:PORT of this process, for servers elsewhere), tokens (in flight at once), timeout "
        "(seconds), attempts, and concurrency for openai. None: the server's only model (policy for openai), "
        "output_dir/served, a folder, 131072 tokens, 600 s (120 s for openai), 8 attempts (4).",
    )
    temperature: float = setting(
        1.0,
        "Divides the logits of samples and log-probs alike; positive. Default 1: the theory is about the unchanged "
        "policy.",
    )
    top_p: float = setting(
        1.0,
        "Samples come from the smallest set of tokens with this probability; in (0, 1]. Below 1 they do not come from "
        "the policy whose log-probs are fitted. Default 1: the theory needs it.",
    )
    max_completion_length: int = setting(
        512, "Longest response, in tokens, end token included; at least 1. Default: ours."
    )
    max_prompt_length: int | None = setting(
        None,
        "Longest prompt, in tokens, chat template included; at least 1. None: what max_completion_length leaves of the "
        "model's positions (max_position_embeddings), which is the limit in any case.",
    )
    long_prompts: str = setting(
        "refuse",
        "Treatment of longer prompts, for training and held out: refuse (an error names the first), drop (they are "
        "left out) or cut (the oldest messages, then the beginning of the text). A notice at the start says how many. "
        "Default: no prompt changes silently.",
        choices=LONG_PROMPTS,
    )
    system: str | None = setting(None, "System message for the chat template. None: the template's own.")
    chat_template_kwargs: dict | None = setting(
        None,
        "Further arguments of the chat template by name, such as {enable_thinking: false} for Qwen3. None: no more.",
    )
    sampling_batch_size: int = setting(
        64, "Sequences generated and judged at a time on a device; at most this many are lost in a kill. Default: ours."
    )
    mask_truncated_completions: bool = setting(
        False,
        "Whether responses that reach max_completion_length without an end token are left out of the fit; they are "
        "still judged, and others can beat them. Default no: they are scored as prefixes, which is unbiased for a "
        "judge that reads what was written.",
    )
    judge: str | None = setting(
        None,
        "Judge that says which response wins: vader, MODULE:FUNCTION (prompts, responses -> numbers), "
        "reward-model:NAME, pair-model:NAME, pairrm:NAME, llm:URL or recorded:FILE, see docs/judges.md. None: the "
        "judge given to the trainer.",
    )
    judge_strength: float = setting(
        1.0,
        "Strength of the Bradley-Terry link, per unit of reward; positive. Default 1: what reward models are trained "
        "with.",
    )
    judge_settings: dict | None = setting(
        None,
        "Keyword arguments of a judge that is a model: label (which of its logits), max_length (tokens; longer texts "
        "are cut, and counted), batch_size, dtype, device, quantization, and template for pair-model; for "
        "llm: model, rubric, template, labels, max_tokens and others, see docs/judges.md. None: one label, 16 texts at "
        "a time, float32 beside the policy, and a text longer than the model's positions is an error.",
    )
    log_completions: bool = setting(
        False,
        "Whether each iteration's responses and verdicts are written to completions/completions_NNNNN.parquet in "
        "output_dir, and shown as a table by wandb and trackio where report_to names them. Default no, as TRL.",
    )
    reference: str = setting(
        "model",
        "Source of log pi_ref: model (a frozen second model), adapter (the policy without its LoRA adapter) or "
        "precomputed (scored once, before the first step; needs sampler=recorded:FILE). Default: works with any model.",
        choices=REFERENCES,
    )
    shared_prompt: str = setting(
        "auto",
        "Whether the body runs once on a prompt for all its responses in scoring and fitting: auto (if a check at the "
        "start finds that the model computes the same, and it costs less), always (an error if the model does not) or "
        "never. Default: it is exact and saves time.",
        choices=SHARED_PROMPT,
    )
    focus: str = setting(
        "uniform",
        "Choice of the prompts to answer and judge: uniform (all in turn) or hardest (those with the largest estimated "
        "exploitability, arXiv 2502.08924). Default: uniform, the distribution of the data set.",
        choices=MODES,
    )
    focus_uniform_share: float = setting(
        0.25,
        "Share of an iteration's prompts that focus=hardest draws uniformly, for metrics; in (0, 1]. Default: ours.",
    )
    replay: bool = setting(
        False,
        "Whether groups are also drawn from responses of earlier iterations, as in TBA; for losses that may learn from "
        f"any policy's samples ({_REPLAYABLE}).",
    )
    replay_capacity: int = setting(
        100, "Newest responses kept for each prompt, at least num_generations. Default: as TBA's code."
    )
    replay_on_policy_prob: float = setting(
        0.5, "Share of groups made of this iteration's responses; in [0, 1]. Default: TBA's for TL;DR."
    )
    replay_inverse_temperature: float = setting(
        1.0,
        "Replayed responses are drawn with probability proportional to exp(this * reward), or the win rate where the "
        "loss takes no rewards; not negative. Default: ours.",
    )
    anchor_rate: float = setting(
        0.02,
        "Rate of the moving average of the weights, anchor += rate * (policy - anchor), for losses that sample from it "
        f"({_ANCHORED}); in (0, 1].",
    )
    memory_budget: int | None = setting(
        None,
        "Bytes that a fused op may allocate besides outputs and gradients. None: 2.5 GiB on a GPU, 384 MiB on a CPU.",
    )
    backend: str = setting("auto", "Row kernels: auto, torch, cpp, triton or cuda. Default: the fastest that can run.")
    batch_invariant: bool = setting(
        False, "Whether a row's log-prob is bitwise independent of its neighbours. This costs time; default no."
    )
    master_weights: bool = setting(
        True,
        "Whether trainable 16-bit weights get float32 copies that AdamW steps; 4 more bytes per parameter. Default "
        "yes: a bfloat16 weight cannot take steps below 1/256 of itself.",
    )
    disable_dropout: bool = setting(
        True, "Whether dropout is off in training. Default yes: policies must differ by their weights only."
    )
    eval_responses: int = setting(1, "Responses of the policy to each held-out prompt in an evaluation. Default: ours.")
    reference_responses: int = setting(
        2, "Responses of the reference to each held-out prompt, drawn once for all comparisons. Default: ours."
    )
    overwrite: bool = setting(
        False, "Whether a run that does not resume deletes an earlier run's checkpoints in output_dir. Default no."
    )
    # Inherited, with defaults that suit this trainer.
    per_device_train_batch_size: int = setting(
        1, "Prompts on a device at a time, each with all its fitted responses. Default 1: groups are large."
    )
    per_device_eval_batch_size: int = setting(4, "Held-out prompts scored on a device at a time. Default: ours.")
    learning_rate: float = setting(5e-7, "Initial learning rate. Default: SPPO's for 8B models; LoRA needs about 1e-5.")
    lr_scheduler_type: str = setting("constant", "Learning-rate schedule over the run. Default: ours.")
    logging_steps: float = setting(1, "Steps between log lines. Default 1: steps are long.")
    save_strategy: str = setting("epoch", "When to save: no, steps, epoch (after each iteration). Default: epoch.")
    save_total_limit: int | None = setting(2, "Checkpoints kept. Default 2: one to fall back to.")
    ddp_find_unused_parameters: bool | None = setting(
        False, "Whether DDP looks for parameters without gradient. Default no: every trained parameter gets one."
    )
    remove_unused_columns: bool = setting(False, "Must be False: batches have no columns.")
    dataloader_pin_memory: bool = setting(
        False, "Whether batches are pinned for copies to a GPU. Default no: they are small."
    )

    def __post_init__(self) -> None:
        self._check()
        self.num_train_epochs, self.max_steps = float(self.num_iterations), -1
        # Reason: if it is unset, TrainingArguments derives it from the log level of transformers.
        self.disable_tqdm = bool(self.disable_tqdm)
        super().__post_init__()
        check_one_gpu(self.n_gpu)
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"accelerator_config.{name} must be off: every process makes its own batches, of "
                    "per_device_train_batch_size prompts"
                )

    def _check(self) -> None:
        check_output_dir(self.output_dir)
        if self.max_steps != -1 or self.num_train_epochs not in (3.0, float(self.num_iterations)):
            raise ValueError(
                "max_steps follows from num_iterations * steps_per_iteration and num_train_epochs from "
                f"num_iterations; leave them out, got max_steps={self.max_steps}, "
                f"num_train_epochs={self.num_train_epochs}"
            )
        for name in ("num_iterations", "steps_per_iteration", "passes_per_iteration", "max_completion_length"):
            setattr(self, name, check_count(name, getattr(self, name), least=1))
        for name in ("sampling_batch_size", "eval_responses", "reference_responses"):
            setattr(self, name, check_count(name, getattr(self, name), least=1))
        if self.steps_per_iteration % self.passes_per_iteration:
            raise ValueError(
                f"passes_per_iteration must divide steps_per_iteration = {self.steps_per_iteration}, "
                f"got {self.passes_per_iteration}"
            )
        for name in ("temperature", "judge_strength", "top_p", "focus_uniform_share", "anchor_rate"):
            check_number(name, getattr(self, name), above=0)
        for name in ("top_p", "focus_uniform_share", "anchor_rate", "replay_on_policy_prob"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")
        for name in ("replay_on_policy_prob", "replay_inverse_temperature"):
            check_number(name, getattr(self, name), least=0)
        check_choice("long_prompts", self.long_prompts, LONG_PROMPTS)
        if self.max_prompt_length is not None:
            check_count("max_prompt_length", self.max_prompt_length, least=1)
        if self.long_prompts == "cut" and (kind_of(self.sampler).known or (self.judge or "").startswith("recorded:")):
            raise ValueError(
                "long_prompts must be refuse or drop with recorded:FILE, which holds complete prompts, got 'cut'"
            )
        for name in ("loss_kwargs", "sampler_settings", "judge_settings", "chat_template_kwargs"):
            if not isinstance(value := getattr(self, name), (dict, type(None))):
                raise TypeError(f"{name} must be a dict of arguments by name, or None, got {type(value).__name__}")
        check_choice("reference", self.reference, REFERENCES)
        check_choice("shared_prompt", self.shared_prompt, SHARED_PROMPT)
        check_choice("focus", self.focus, MODES)
        self._check_loss()
        self._check_responses()
        if self.reference == "precomputed" and not kind_of(self.sampler).known:
            raise ValueError(
                "reference='precomputed' needs responses that are known beforehand, sampler=recorded:FILE, "
                f"got sampler={without_user(self.sampler)!r}"
            )
        if self.top_p < 1 and not kind_of(self.sampler).any_top_p:
            raise ValueError(
                f"top_p must be 1 with sampler={without_user(self.sampler)!r}, which supports no other value, "
                f"got {self.top_p}"
            )
        check_inherited(self)
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        asks = self.load_best_model_at_end or self.save_strategy == "best" or self.lr_scheduler_type in _BY_METRIC
        if asks and metric not in EVALUATED:
            raise ValueError(
                f"metric_for_best_model must be one of {', '.join(EVALUATED)} for load_best_model_at_end, "
                f"save_strategy='best' and lr_scheduler_type {' and '.join(_BY_METRIC)}, got "
                f"{self.metric_for_best_model!r}"
            )
        if metric == "kl" and self.greater_is_better is None:
            self.greater_is_better = False

    def _check_loss(self) -> None:
        if self.loss in LOSSES and not LOSSES[self.loss].separable:
            raise ValueError(
                f"loss must be a sum over groups of responses, got {self.loss!r}, which couples the batch or weighs "
                "tokens; train with it in TRL, inside windkern.integrations.trl.use(trainer)"
            )
        names = [name for name, loss in LOSSES.items() if loss.separable]
        check_choice("loss", self.loss, names)
        arguments = self.loss_arguments
        if self.focus == "hardest" and not self.entry.pull(arguments):
            raise ValueError(
                "focus='hardest' needs a loss with a pull to the reference, whose exploitability it estimates "
                f"({_names(lambda loss: loss.pull(loss.arguments()))}), got loss={self.loss!r} with {arguments}"
            )
        if self.replay and not self.entry.replayable:
            raise ValueError(
                f"replay=True needs a loss that is valid for responses of any policy ({_REPLAYABLE}), "
                f"got loss={self.loss!r}"
            )

    def _check_responses(self) -> None:
        fixed = self.entry.group.sampled
        if self.num_generations is None:
            self.num_generations = fixed or 5
        self.num_generations = check_count("num_generations", self.num_generations, least=fixed or 2)
        if fixed and self.num_generations != fixed:
            raise ValueError(f"num_generations must be {fixed} for loss={self.loss!r}, got {self.num_generations}")
        if self.fit_responses is not None:
            self.fit_responses = check_count("fit_responses", self.fit_responses, least=2)
            if self.fit_responses > self.num_generations:
                raise ValueError(
                    f"fit_responses must be at most num_generations = {self.num_generations}, got {self.fit_responses}"
                )
            if not self.entry.against_all(self.loss_arguments):
                raise ValueError(
                    f"fit_responses must be None for loss={self.loss!r} with {self.loss_arguments}, whose target is "
                    "not a win rate against all responses"
                )
        if self.replay:
            self.replay_capacity = check_count("replay_capacity", self.replay_capacity, least=self.num_generations)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.num_iterations * self.steps_per_iteration

    def prompts_per_step(self, processes: int) -> int:
        """Return the number of prompts whose responses an optimizer step fits, on all processes together."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes

    @property
    def entry(self) -> Loss:
        """The entry of the loss in the table of losses."""
        return LOSSES[self.loss]

    @property
    def loss_arguments(self) -> dict[str, object]:
        """All arguments of the loss except its tensors: `loss_kwargs` and defaults."""
        return self.entry.arguments(self.loss_kwargs)

    def own_settings(self) -> dict:
        """Return the fields declared here and their values, for reports, with all arguments of the loss."""
        own = WindConfig.__annotations__
        found = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name in own}
        return found | {"loss_kwargs": self.loss_arguments}
