"""TRL's trainers with windkern's log-probs against the same trainers with their own."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other libraries' deprecations
    trl = pytest.importorskip("trl", minversion="1.16")
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer
    from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

import tiny_model  # noqa: E402

from windkern import hf  # noqa: E402
from windkern.integrations.trl import FusedHead, UnsupportedTrainerError, use  # noqa: E402
from windkern.kernels import buffers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, transformers and accelerate; ours are tested elsewhere

PAIRS = [
    {"prompt": "the bus was", "chosen": " very good", "rejected": " bad"},
    {"prompt": "rain and", "chosen": " a good day", "rejected": " not so very bad"},
    {"prompt": "so very", "chosen": " good", "rejected": " a bad rain day"},
    {"prompt": "a", "chosen": " day", "rejected": " rain was bad"},
]


def goodness(prompts, completions, **_):
    return tiny_model.goodness(prompts, completions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("model"))


def make(kind: str, folder, output, model=None, peft_config=None, **options):
    """Return a TRL trainer on the tiny model, which is read from its folder like the reference."""
    tokenizer = tiny_model.make_tokenizer(chat=False)
    common = {
        "output_dir": str(output),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        **options,
    }
    data, model = datasets.Dataset.from_list(PAIRS), model or tiny_model.make_model(seed=1)
    if isinstance(model, nn.Module):
        model.config._name_or_path = str(folder)  # where TRL finds the reference
    given = {"model": model, "processing_class": tokenizer, "train_dataset": data, "peft_config": peft_config}
    if kind == "dpo":
        return DPOTrainer(args=DPOConfig(**common), **given)
    if kind == "kto":
        return KTOTrainer(args=KTOConfig(**common), **given)
    sampled = {"num_generations": 2, "max_completion_length": 5, "beta": 0.1, "temperature": 0.7}
    configuration, trainer = (GRPOConfig, GRPOTrainer) if kind == "grpo" else (RLOOConfig, RLOOTrainer)
    return trainer(reward_funcs=goodness, args=configuration(**(common | sampled | options)), **given)


def inputs_of(trainer) -> dict:
    """Return the inputs of the trainer's loss in its first step."""
    trainer.current_gradient_accumulation_steps = 1  # `train` would set this
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    transformers.set_seed(0)
    return trainer._prepare_inputs(batch)


def loss_gradients_metrics(trainer, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, list]]:
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    return loss.detach(), gradients, {name: list(values) for name, values in trainer._metrics["train"].items()}


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys() and any(bool(value.any()) for value in theirs[1].values())
    for name, value in theirs[1].items():
        torch.testing.assert_close(
            ours[1][name], value, rtol=1e-4, atol=1e-6 + 1e-4 * float(value.abs().max()), msg=name
        )
    assert ours[2].keys() == theirs[2].keys() and ours[2]
    for name, values in theirs[2].items():
        assert ours[2][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


CASES = {
    "dpo": ("dpo", {}),
    "dpo, ld_alpha and weights of WPO": ("dpo", {"ld_alpha": 0.5, "use_weighting": True}),
    "dpo, three losses": ("dpo", {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [1.0, 0.5, 0.2]}),
    "grpo": ("grpo", {}),
    "grpo, entropy bonus": ("grpo", {"entropy_coef": 0.1, "top_entropy_quantile": 0.5}),
    "rloo": ("rloo", {}),
    "kto": ("kto", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics_are_trls(case, folder, tmp_path):
    kind, options = CASES[case]
    trainer = make(kind, folder, tmp_path, **options)
    inputs = inputs_of(trainer)
    theirs = loss_gradients_metrics(trainer, inputs)
    with use(trainer) as handle:
        assert len(handle.models) == 2  # policy and reference
        assert_same(loss_gradients_metrics(trainer, inputs), theirs)


def test_reference_log_probs_of_dpo_come_from_windkern_too(folder, tmp_path):
    trainer = make("dpo", folder, tmp_path)
    inputs = inputs_of(trainer)
    theirs = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
    with use(trainer), buffers.recording() as record:
        ours = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    rows = int(inputs["completion_mask"][:, 1:].sum())
    assert record.flops == 2 * rows * 16 * 18  # one product of the scored rows: hidden 16, vocabulary 18


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_whole_run_ends_where_trls_does(kind, folder, tmp_path):
    ends = []
    for ours in (False, True):
        trainer = make(kind, folder, tmp_path / str(ours), seed=3)
        if ours:
            with use(trainer), buffers.recording() as record:
                trainer.train()
            assert record.flops > 0
        else:
            trainer.train()
        ends.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
    start = dict(tiny_model.make_model(seed=1).named_parameters())
    assert any(not torch.equal(value, start[name]) for name, value in ends[0].items())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return out


def wide_model(vocab: int = 4000, **options) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_no_tensor_of_tokens_by_vocabulary_is_made(tmp_path):
    vocab, budget = 4000, 64 << 10
    saved = tmp_path / "wide"
    wide_model(vocab).save_pretrained(saved)
    trainer = make("dpo", saved, tmp_path, model=wide_model(vocab), max_steps=1)
    inputs = inputs_of(trainer)
    rows = int(inputs["completion_mask"][:, 1:].sum())
    with Largest() as theirs:
        loss_gradients_metrics(trainer, inputs)
    with use(trainer, memory_budget=budget), Largest() as ours, buffers.recording() as record:
        loss_gradients_metrics(trainer, inputs)
    parameters = max(value.numel() for value in trainer.model.parameters())
    assert theirs.elements >= rows * vocab  # in TRL, a whole tile of logits is seen
    assert ours.elements <= max(parameters, rows * 16 * 4) < rows * vocab * 1.5
    assert record.peak_bytes <= budget < rows * vocab * 4 / 4 and record.flops > 0


def labelled(vocab: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, vocab, (3, 7), generator=torch.Generator().manual_seed(0))
    attention, labels = torch.ones_like(ids), ids.clone()
    attention[0, :2], labels[:, :3], labels[1, 6] = 0, -100, -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def gemma() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
        final_logit_softcapping=4.0,
        pad_token_id=0,
    )
    return transformers.Gemma2ForCausalLM(config).eval()


FIELDS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
MODELS = {"llama": lambda: wide_model(61), "gemma with its softcap": gemma, "bias": lambda: with_bias(wide_model(61))}


def with_bias(model: nn.Module) -> nn.Module:
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 61))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fields", [FIELDS, ("mean_logits",), ()], ids=["all", "mean", "none"])
def test_every_field_is_trls(name, fields):
    model = MODELS[name]()
    given = labelled(61)
    ours = FusedHead(
        fields, 0.7, FusedCausalLMOutput, {"memory_budget": None, "batch_invariant": False, "backend": "auto"}
    )(model, **given, num_items_in_batch=5)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", *fields))
    theirs = model(**given, num_items_in_batch=5, fused_lm_head=True)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-5, msg=key)


def test_a_batch_without_labels_gives_a_differentiable_zero():
    model, given = wide_model(61), labelled(61)
    given["labels"][:] = -100
    head = FusedHead(
        FIELDS, 1.0, FusedCausalLMOutput, {"memory_budget": None, "batch_invariant": False, "backend": "auto"}
    )
    out = head(model, **given)
    out.loss.backward()
    assert out.loss.item() == 0 and not out.is_top1.any() and not model.lm_head.weight.grad.any()


def test_bfloat16_is_nearer_the_truth_than_trl():
    given, model = labelled(61), wide_model(61)
    model = model.to(torch.bfloat16)
    head = FusedHead((), 1.0, FusedCausalLMOutput, {"memory_budget": None, "batch_invariant": False, "backend": "auto"})
    hidden = model.model(given["input_ids"], given["attention_mask"]).last_hidden_state[:, :-1]
    exact = (hidden.double() @ model.lm_head.weight.double().T).log_softmax(-1)
    labels = given["labels"][:, 1:]
    exact = torch.where(labels >= 0, exact.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1), 0.0)
    ours = head(model, **given).log_probs
    add_fused_lm_head(model)
    theirs = model(**given, fused_lm_head=True).log_probs
    assert (ours - exact).abs().max() < 1e-4 < 1e-3 < (theirs - exact).abs().max()


@pytest.mark.parametrize("adapter", ["made by TRL", "trained before"])
def test_lora_trains_as_under_trl(adapter, folder, tmp_path):
    peft = pytest.importorskip("peft")
    model, configuration = tiny_model.make_model(seed=1), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    if adapter == "made by TRL":
        trainer = make("dpo", folder, tmp_path, model=model, peft_config=configuration)
    else:
        trainer = make("dpo", folder, tmp_path, model=peft.get_peft_model(model, configuration))
    for name, value in trainer.model.named_parameters():
        if "lora_B.default" in name:
            nn.init.normal_(value)
    inputs = inputs_of(trainer)
    theirs = loss_gradients_metrics(trainer, inputs)
    with use(trainer) as handle:
        assert_same(loss_gradients_metrics(trainer, inputs), theirs)
        assert len(handle.models) == 1  # the reference is the same model with another adapter or none


def test_mixed_precision_of_accelerate_is_kept(folder, tmp_path):
    trainer = make("dpo", folder, tmp_path, bf16=True)
    inputs = inputs_of(trainer)
    with use(trainer):
        out = trainer.ref_model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["input_ids"],
            fused_lm_head=True,
        )
        assert out.log_probs.dtype == torch.float32
        given = (inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])
        prepared = hf.sequence_logps(trainer.ref_model, *given)  # accelerate's autocast is in its forward
        plain = hf.sequence_logps(transformers.AutoModelForCausalLM.from_pretrained(folder), *given)
        layer = next(module for module in trainer.ref_model.modules() if isinstance(module, nn.Linear))
        dtypes = []
        with layer.register_forward_hook(lambda module, given, output: dtypes.append(output.dtype)):
            ours = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, inputs))
    assert set(dtypes) == {torch.bfloat16}  # under autocast
    for other in (prepared, plain):  # rows of other lengths, whose products round otherwise on some processors
        torch.testing.assert_close(ours, other, rtol=0.05, atol=0.05)


def test_leaving_gives_the_trainer_its_own_back(folder, tmp_path):
    trainer = make("dpo", folder, tmp_path)
    before = trainer.model.forward
    handle = use(trainer)
    assert trainer.model.forward is not before and handle.enabled
    with pytest.raises(UnsupportedTrainerError, match="in use already"):
        use(trainer)
    ids = torch.tensor([[6, 7, 8]])
    assert trainer.model(input_ids=ids).logits.shape == (1, 3, 18)  # without fused_lm_head nothing changes
    assert trainer.model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] >= 4
    handle.remove()
    handle.remove()
    assert trainer.model.forward == before and not handle.enabled
    with use(trainer), buffers.recording() as record:
        trainer.compute_loss(trainer.model, dict(inputs_of(trainer)))
    assert record.flops > 0


def test_what_is_not_supported_says_so(folder, tmp_path):
    with pytest.raises(TypeError, match=r"one of trl's DPOTrainer, .*, got Linear"):
        use(nn.Linear(2, 2))
    trainer = make("grpo", folder, tmp_path)
    trainer.args.cast_lm_head_to_fp32 = True
    with pytest.raises(UnsupportedTrainerError, match="never rounds logits"):
        use(trainer)
    trainer.args.cast_lm_head_to_fp32 = False
    trainer.aux_loss_enabled = True
    with pytest.raises(UnsupportedTrainerError, match=r"router_aux_loss_coef=0\.0"):
        use(trainer)
    trainer.aux_loss_enabled = False
    next(trainer.model.parameters()).ds_id = 1
    with pytest.raises(UnsupportedTrainerError, match="ZeRO-3"):
        use(trainer)
    del next(trainer.model.parameters()).ds_id
    trainer.ref_model.lm_head = nn.Sequential(trainer.ref_model.lm_head)
    before = trainer.model.forward
    with pytest.raises(hf.UnsupportedModelError, match="not a plain"):
        use(trainer)
    assert trainer.model.forward == before  # no patch is left behind


def test_inputs_the_decoder_would_not_get_are_refused():
    head = FusedHead((), 1.0, FusedCausalLMOutput, {"memory_budget": None, "batch_invariant": False, "backend": "auto"})
    with pytest.raises(UnsupportedTrainerError, match="model inputs pixel_values, shift_labels not supported"):
        head(wide_model(61), **labelled(61), pixel_values=torch.ones(1), shift_labels=torch.ones(1), cache=None)
    with pytest.raises(UnsupportedTrainerError, match="a call without labels"):
        head(wide_model(61), input_ids=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"fields must be one of .* did you mean 'entropy'"):
        FusedHead(("entropies",), 1.0, FusedCausalLMOutput, {})


def test_another_trl_is_refused(monkeypatch, folder, tmp_path):
    trainer = make("dpo", folder, tmp_path)
    monkeypatch.delattr("trl.trainer.utils.FusedCausalLMOutput")
    with pytest.raises(ImportError, match=r"supports the fused head of TRL 1\.16"):
        use(trainer)
