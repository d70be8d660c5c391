"""Jobs of the processes in tests/hf/test_tensor_parallel.py, see tests/distributed_tools.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from sharding_jobs import assert_raises
from torch import Tensor, nn

import windkern as wk
from windkern import hf
from windkern.shard import Shard

KINDS = ("untied", "tied")
PROMPTS, COMPLETIONS = [[5, 6, 7], [8, 9]], [[[10, 11], [12, 1]], [[13, 14, 15], [16, 1]]]


def make_model(kind: str):
    """Make a model that two processes can share: two key-value heads, 19 rows of the head, unevenly sharded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=kind == "tied",
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def sequences() -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids, attention mask and completion mask of three rows, one padded on the left."""
    ids = torch.randint(2, 18, (3, 8), generator=torch.Generator().manual_seed(1))
    attention, completion = torch.ones_like(ids), torch.zeros_like(ids)
    attention[1, :2] = 0
    completion[:, 3:] = 1
    return ids, attention, completion


def steps(model: nn.Module, count: int = 2) -> dict:
    """Return the log-probs and all gradients of steps of SGD."""
    trained = dict(model.named_parameters())
    found: dict[str, object] = {"logps": []}
    for _ in range(count):
        model.zero_grad()
        logps = hf.sequence_logps(model, *sequences())
        logps.square().mean().backward()
        with torch.no_grad():
            for value in trained.values():
                value.sub_(0.001 * value.grad)  # larger steps magnify rounding
        found["logps"].append(logps.tolist())
    found["grads"] = {name: whole(value.grad).tolist() for name, value in trained.items()}
    with torch.no_grad():
        found["groups"] = hf.group_logps(model, PROMPTS, COMPLETIONS).tolist()
    return found


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def load(folder: Path, kind: str):
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    return LlamaForCausalLM.from_pretrained(folder / kind, distributed_config=DistributedConfig(tp_plan="auto")).eval()


def taken_apart(model: nn.Module) -> list[float]:
    """Return the log-probs of a loop over hidden states, with the head sharded as `vocab_parallel` does."""
    ids, attention, completion = sequences()
    parts = hf.hidden_and_head(model)
    assert isinstance(parts.head.weight, Shard) and parts.head.weight.cut == hf.hidden_and_head(model).head.weight.cut
    assert parts.head.weight.local.shape[0] < parts.head.weight.cut.vocab_size == 19
    targets = hf.completion_targets(ids, completion)
    return wk.sequence_logps(parts.hidden(ids, attention), parts.head, targets).tolist()


def refusals(model: nn.Module) -> None:
    import peft

    from windkern.train.jobs import check_scorable

    assert_raises(ValueError, "tensor parallelism has split", lambda: check_scorable(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=2))
    words = "leave the head out of target_modules"
    assert_raises(hf.UnsupportedModelError, words, lambda: hf.sequence_logps(adapted, *sequences()))


def tensor_parallel(folder: Path) -> dict:
    """With the plan of transformers alone, and then as accelerate prepares such a model."""
    from accelerate import Accelerator
    from accelerate.utils import ParallelismConfig

    # accelerate takes a ParallelismConfig on GPUs only; the code after that line is the same for a CPU.
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    found = {}
    for kind in KINDS:
        model = load(folder, kind)
        weight = model.get_output_embeddings().weight
        found[kind] = {"placements": str(weight.placements), "apart": taken_apart(model), **steps(model)}
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(tp_size=dist.get_world_size()))
    model = accelerator.prepare(load(folder, "untied"))
    found["accelerate"] = {"apart": taken_apart(model), **steps(model)}
    refusals(load(folder, "untied"))
    return found
