"""Which modules accelerate is told to make FSDP2 units of."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")
pytest.importorskip("accelerate")

import accelerate
import tiny_model
from distributed_jobs import untied
from torch import nn

from windkern import hf
from windkern.train.sharded import HeadUnit, _name_units

LAYER = "LlamaDecoderLayer"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")


def plugin(policy: str = "TRANSFORMER_BASED_WRAP", names: list[str] | None = None):
    return accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy=policy, transformer_cls_names_to_wrap=names
    )


@pytest.mark.parametrize("names", [None, [LAYER]])
def test_an_untied_head_is_named_beside_the_layers(names):
    model, given = untied(tiny_model.make_model()), plugin(names=names)
    for _ in range(2):  # for the policy, and for a separate reference
        _name_units(given, model)
        assert given.transformer_cls_names_to_wrap == [LAYER, "HeadUnit"]
    assert type(model.lm_head) is HeadUnit and hf.hidden_and_head(model).takes_pieces


def test_a_tied_model_beside_an_untied_one_takes_the_name_away():
    given = plugin()
    _name_units(given, untied(tiny_model.make_model()))
    model = tiny_model.make_model()
    _name_units(given, model)  # accelerate would look for the name and raise
    assert given.transformer_cls_names_to_wrap == [LAYER] and type(model.lm_head) is nn.Linear


def test_heads_with_adapters_and_other_policies_stay_as_they_are():
    import peft

    adapted = peft.get_peft_model(
        untied(tiny_model.make_model()), peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=2)
    )
    given = plugin()
    _name_units(given, adapted)
    assert given.transformer_cls_names_to_wrap is None
    model, unwrapped = untied(tiny_model.make_model()), plugin("NO_WRAP")
    _name_units(unwrapped, model)
    assert unwrapped.transformer_cls_names_to_wrap is None and type(model.lm_head) is nn.Linear
