"""Jobs that run in each process of tests/train/test_distributed.py, see tests/distributed_tools.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import windkern as wk

VOCAB, WIDTH, ROWS, STEPS = 11, 6, 4, 5


class Toy(nn.Module):
    """A body and a separate head, as in a causal LM."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (ROWS, STEPS, WIDTH) and targets (ROWS, STEPS) of all ranks together."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, STEPS, WIDTH, generator=random), torch.randint(VOCAB, (ROWS, STEPS), generator=random)


def plain_loss(toy: Toy, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with wk.sharding.gathered(toy.head.weight) as weight:
        return -wk.token_logps(toy.body(inputs), weight, targets).logps.mean()


def gathered(folder: Path) -> dict:
    """Run one backward of a plain loop over this rank's half of the batch; the head is whole only in `gathered`."""
    from torch.distributed.fsdp import fully_shard

    toy = Toy()
    fully_shard(toy.body)
    fully_shard(toy.head)
    rank, world = dist.get_rank(), dist.get_world_size()
    inputs, targets = (part.chunk(world)[rank] for part in batch())
    loss = plain_loss(toy, inputs, targets)
    loss.backward()
    return {
        "loss": float(loss.detach()),
        "sharded": toy.head.weight.to_local().shape[0] < VOCAB,
        "grads": {name: p.grad.full_tensor().tolist() for name, p in toy.named_parameters()},
    }


def uneven(folder: Path) -> dict:
    """Return log-probs and gradients where one rank scores tokens and the other none, for a streamed and whole head."""
    from windkern import hf
    from windkern.train.jobs import score_job

    found = {}
    for way in ("streamed", "whole"):
        model = _wrap("fsdp2, own unit of the head", _model_of("own unit"))
        ids, attention, completion = _sequences(0)
        targets = hf.completion_targets(ids, completion)
        if dist.get_rank():
            targets.fill_(hf.IGNORE_INDEX)
        job, seen = score_job(targets, 1.0, {}), []

        def watched(parts, hidden, job=job, seen=seen):
            seen.append(parts.in_pieces)
            return job(parts, hidden)

        logps = hf.run(model, ids, attention, watched, whole_head=way == "whole")
        logps.square().sum().backward()
        grads = {name: value.grad.full_tensor().tolist() for name, value in model.named_parameters()}
        found[way] = {"in_pieces": seen[0], "logps": logps.tolist(), "grads": grads}
    return found


def _let_fsdp_run_on_a_cpu() -> None:
    """Make accelerate enable FSDP on a CPU; its code after that check is the same as for GPUs."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    init = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **given):
        init(self, *args, fsdp_plugin=fsdp_plugin, **given)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = patched


FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
TRAINER = {
    "num_iterations": 2,
    "steps_per_iteration": 3,
    "num_generations": 3,
    "sampling_batch_size": 6,  # three blocks of two prompts: two processes cannot share them evenly
    "per_device_eval_batch_size": 1,  # nor three held-out prompts
    "learning_rate": 0.02,
    "optim": "adamw_torch",
    "adam_epsilon": 0.01,  # otherwise AdamW turns the rounding of a zero gradient into a step
    "save_strategy": "no",
    "eval_strategy": "epoch",
}
HELDOUT = ("rain and", "a day and", "the bus and")


def untied(model):
    """Return the model with its own parameter for the head."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def make_run(folder: Path, changes: dict, modules: list[str] | None = None, half: bool = False, own_head: bool = False):
    """Return a WindTrainer, for one process or several.

    Args:
        modules: the modules with adapters; if given, the base is the reference.
        half: whether the base is in bfloat16.
        own_head: whether the heads of policy and reference are untied.
    """
    import tiny_model
    from trainer_cases import PROMPTS, lora, make_trainer

    model, given = tiny_model.make_model(), {}
    model = model.bfloat16() if half else model
    if own_head:
        model, given = untied(model), {"ref_model": untied(tiny_model.make_model()) if modules is None else None}
    if modules is not None:
        changes = {**changes, "reference": "adapter"}
        given["peft_config"] = lora(target_modules=modules)
    settings = {**TRAINER, **changes}
    return make_trainer(folder, model=model, heldout=HELDOUT, prompts=PROMPTS[:7], given=given, **settings)


def report_of(run) -> dict:
    """Return the logs of a run, and its last samples."""
    logged = {
        name: [entry[name] for entry in run.state.log_history if name in entry]
        for name in ("loss", "kl_old", "kl_ref", "eval_win_rate", "eval_kl")
    }
    return {**logged, "texts": [list(group.texts) for group in run.iterations.current.groups]}


def trainer(folder: Path, runs: str) -> dict:
    """Run WindTrainers one after the other, by name: kind, changes, resume, and arguments of make_run."""
    _let_fsdp_run_on_a_cpu()
    return {name: _train(folder / name, **settings) for name, settings in json.loads(runs).items()}


def _settings(kind: str) -> dict:
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # of the previous run
    return {"per_device_train_batch_size": 1, "ddp_backend": "gloo"} | (FSDP if kind == "fsdp2" else {})


def _train(folder: Path, kind: str, changes: dict, resume: bool = False, joined: bool = False, **more) -> dict:
    """Train; `joined` leaves the head in one unit with the last norm, which is accelerate's default."""
    from windkern.train import jobs, sharded

    ways = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("streamed", "gathered"):
            way = getattr(jobs, name)
            patch.setattr(jobs, name, lambda head, name=name, way=way: (ways.append(name), way(head))[1])
        if joined:
            patch.setattr(sharded, "_name_units", lambda plugin, model: None)
        run = make_run(folder, _settings(kind) | changes, **more)
        run.train(resume_from_checkpoint=resume)
        run.save_model()
    return {"wrapped": type(run.model_wrapped).__name__, "heads": sorted(set(ways)), **report_of(run)}


def spoiled(folder: Path) -> dict:
    """Train while the last rank's loss of step 2 is NaN, by kind of wrapper; see `_spoiled`."""
    _let_fsdp_run_on_a_cpu()
    return {kind: _spoiled(folder / f"spoiled-{kind}", kind) for kind in ("ddp", "fsdp2")}


def _spoiled(folder: Path, kind: str) -> dict:
    """Return the error of this rank, the steps taken, and whether its weights are those that step 2 began with."""
    run = make_run(folder, _settings(kind) | {"num_iterations": 1, "eval_strategy": "no"})
    inner, before, error = run.policy.run, [], ""

    def parts() -> list[torch.Tensor]:
        return [getattr(each, "to_local", lambda each=each: each)().detach().clone() for each in run.model.parameters()]

    def spoilt(*given):
        last = run.state.global_step == 1
        if last:
            before[:] = parts()
        result = inner(*given)
        return result * torch.nan if last and dist.get_rank() == dist.get_world_size() - 1 else result

    run.policy.run = spoilt
    try:
        run.train()
    except FloatingPointError as caught:
        error = str(caught)
    same = [torch.equal(one, other) for one, other in zip(before, parts(), strict=True)]
    return {"error": error, "steps": run.state.global_step, "same": all(same)}


def everything(folder: Path, runs: str) -> dict:
    """Run all jobs above in one launch, because a launch takes longer than they do."""
    alone = {"gathered": gathered(folder), "uneven": uneven(folder), "spoiled": spoiled(folder)}
    return {**alone, "runs": trainer(folder, runs)}


# Wrappers of the model in the job `wrapped`, and the allowed difference from one process.
WRAPPED = {
    "ddp": 1e-4,
    "ddp, adapters": 1e-4,
    "ddp of torch.compile": 1e-4,
    "fsdp1": 1e-4,
    "fsdp2": 1e-4,
    "fsdp2, adapters": 1e-4,
    "fsdp2, own unit of the head": 1e-4,
    "fsdp2, bfloat16": 0.05,
}
WRAPPED_STEPS = 3


def _model_of(kind: str):
    import tiny_model

    model = tiny_model.make_model()
    if "own unit" in kind:
        model = untied(model)  # a unit shares no parameters
    if "adapters" in kind:
        import peft

        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2)).eval()
    return model


def _sequences(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return four rows of token ids, attention and completion masks, one padded on the left."""
    ids = torch.randint(2, 18, (4, 9), generator=torch.Generator().manual_seed(step))
    attention, completion = torch.ones_like(ids), torch.zeros_like(ids)
    attention[2, :2] = 0
    completion[:, 4:] = 1
    return ids, attention, completion


def _trained(model: nn.Module) -> dict[str, list]:
    found = {}
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return _trained(model.module)
    for name, value in model.named_parameters():
        if value.requires_grad:
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name.replace("module.", "").replace("_orig_mod.", "")] = whole.detach().tolist()
    return found


def plain_steps(kind: str) -> dict:
    """Run the steps of `wrapped` in one process, through the model's own logits."""
    model = _model_of(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    seen = []
    for step in range(WRAPPED_STEPS):
        ids, attention, completion = _sequences(step)
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits[:, :-1]
        tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        logps = torch.where(completion[:, 1:].bool(), tokens, 0.0).sum(-1)
        (-logps.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(logps.tolist())
    return {"logps": seen, "weights": _trained(model)}


def _wrap(kind: str, model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if kind.startswith("ddp"):
        inner = torch.compile(model, backend="eager") if "compile" in kind else model
        return nn.parallel.DistributedDataParallel(inner)
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)
    options = {"mp_policy": low} if "bfloat16" in kind else {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    units = [*base.model.layers, *([base.lm_head] if "own unit" in kind else []), model]
    for unit in units:
        fully_shard(unit, **options)
    return model


def wrapped(folder: Path) -> dict:
    """Run steps of a plain loop over `hf.sequence_logps`, each rank with half of the rows, by kind of wrapper."""
    return {kind: _wrapped_steps(kind) for kind in WRAPPED}


def _wrapped_steps(kind: str) -> dict:
    from windkern import hf

    rank, world = dist.get_rank(), dist.get_world_size()
    model = _wrap(kind, _model_of(kind))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    seen = []
    for step in range(WRAPPED_STEPS):
        mine = (part.chunk(world)[rank] for part in _sequences(step))
        logps = hf.sequence_logps(model, *mine)
        (-logps.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        both = [torch.empty_like(logps) for _ in range(world)]
        dist.all_gather(both, logps.detach())
        seen.append(torch.cat(both).tolist())
    try:
        hf.hidden_and_head(model)
        apart = ""
    except hf.UnsupportedModelError as error:
        apart = str(error)
    return {"logps": seen, "weights": _trained(model), "apart": apart}


GROUPED = {name: WRAPPED[name] for name in ("ddp", "fsdp1", "fsdp2, adapters", "fsdp2, own unit of the head")}


def _groups(step: int, rank: int) -> tuple[list, list]:
    """Return a prompt and three responses, whose lengths depend on the rank."""
    random = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(2, 18, (40,), generator=random).tolist()
    size = 6 + 2 * rank
    return [ids[:size]], [[ids[10:14], ids[20 : 23 + rank], ids[30:32]]]


def grouped(folder: Path) -> dict:
    """Run steps of a loop over `hf.group_logps`, each process with its own group, by kind of wrapper."""
    return {kind: grouped_steps(kind, _wrap(kind, _model_of(kind)), [dist.get_rank()], "always") for kind in GROUPED}


def grouped_steps(kind: str, model: nn.Module | None, ranks: list[int], shared_prompt: str) -> dict:
    """Run steps on the groups of `ranks`, with `model`, or with a new one without a wrapper."""
    from windkern import hf

    model = _model_of(kind) if model is None else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(WRAPPED_STEPS):
        parts = [_groups(step, rank) for rank in ranks]
        given = [[part[which][0] for part in parts] for which in (0, 1)]
        logps = hf.group_logps(model, *given, shared_prompt=shared_prompt)
        (-logps.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"logps": logps.tolist(), "weights": _trained(model)}
