"""A real vLLM: served log-probs against the trainer's, stale and restarted servers, judging; `make test-vllm`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import tiny_model  # noqa: E402
import tiny_pairrm  # noqa: E402
from real_server import EXECUTABLE, RealServer  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from windkern.commands.cli import main  # noqa: E402
from windkern.train.data.loading import demo_prompts  # noqa: E402
from windkern.train.judges.judge import vader_judge  # noqa: E402
from windkern.train.judges.llm import LanguageModelJudge  # noqa: E402
from windkern.train.models import load_policy, packaged_model_dir  # noqa: E402
from windkern.train.samplers.following import Probe, token_logps  # noqa: E402
from windkern.train.samplers.sampler import TransformersSampler  # noqa: E402
from windkern.train.samplers.served import ServedSampler  # noqa: E402
from windkern.train.samplers.server import Server, ServerError  # noqa: E402
from windkern.train.samplers.vllm import Vllm  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not EXECUTABLE, reason="WINDKERN_VLLM names no vllm; make test-vllm sets one up"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft uses it
]
BOUND = 1e-3  # nats per token, float32 on both sides
ALIKE = 0.15  # difference in win rate of two runs with different draws, after three iterations
PROMPTS = demo_prompts("train")[:4]
HELD_OUT = demo_prompts("train")[4:20]
JUDGE = vader_judge(4.0)
FIGURES: dict[str, object] = {}


@pytest.fixture(autouse=True)
def figures():
    """Keep what is measured in the file that WINDKERN_VLLM_FIGURES names."""
    FIGURES["machine"] = {"cpu": cpu_name(), "torch": torch.__version__, "vllm": vllm_version()}
    yield
    if path := os.environ.get("WINDKERN_VLLM_FIGURES"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(FIGURES, indent=2) + "\n")


def cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text()
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "?")


def vllm_version() -> str:
    site = Path(EXECUTABLE).parent.parent / "lib"
    found = [path.name for path in site.glob("python*/site-packages/vllm-*.dist-info")]
    return found[0].removeprefix("vllm-").removesuffix(".dist-info") if found else "?"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = RealServer(packaged_model_dir(), tmp_path_factory.mktemp("vllm") / "log")
    yield made
    made.close()


def policy():
    model, tokenizer = load_policy("smollm2-135m-instruct", dtype=torch.float32)
    torch.manual_seed(0)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**settings)), tokenizer


def sampler_of(server, tokenizer, folder, engine=Vllm, **options) -> ServedSampler:
    reached = Server(server.url, timeout=600.0, attempts=8)
    return ServedSampler(engine(reached), tokenizer, folder=folder, **({"max_completion_length": 16} | options))


def moved(model, step: float = 0.01) -> None:
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += step * torch.randn(value.shape, generator=made)


def run(folder, model, tokenizer, sampler):
    """Run three iterations of WIND with an adapter; return the mean rewards of the iterations' samples and, for each
    held-out prompt, the probability that a response of the policy beats one of the base."""
    from windkern.train.config import WindConfig
    from windkern.train.trainer import WindTrainer

    config = WindConfig(
        output_dir=str(folder),
        num_iterations=3,
        steps_per_iteration=2,
        per_device_train_batch_size=2,
        num_generations=4,
        max_completion_length=16,
        sampling_batch_size=16,
        learning_rate=1e-3,
        reference="adapter",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="no",
    )
    trainer = WindTrainer(
        model,
        config,
        train_dataset=PROMPTS,
        judge=JUDGE,
        sampler=sampler,
        processing_class=tokenizer,
    )
    trainer.train()
    return [record.train_reward for record in trainer.history], win_rates(model, tokenizer)


def win_rates(model, tokenizer) -> list[float]:
    drawn = TransformersSampler(model, tokenizer, max_completion_length=16)
    ours = drawn.sample(HELD_OUT, 4, seed=7).texts
    with model.disable_adapter():
        theirs = drawn.sample(HELD_OUT, 4, seed=8).texts
    prefs = JUDGE.judge(HELD_OUT, [[*one, *other] for one, other in zip(ours, theirs, strict=True)]).prefs
    return prefs[:, :4, 4:].mean((1, 2)).tolist()


def test_wind_with_an_adapter_is_sampled_by_vllm(server, tmp_path):
    model, tokenizer = policy()
    gaps: list[list[float]] = []
    sampler = sampler_of(server, tokenizer, tmp_path / "served")

    def compare(prompt, drawn) -> None:
        ours = token_logps(model, [Probe(list(prompt), list(each.ids), None) for each in drawn])
        theirs = [each.logps for each in drawn]
        gaps.append(
            [abs(a - b) for row, served in zip(ours, theirs, strict=True) for a, b in zip(row, served, strict=True)]
        )

    sampler.listener = compare
    rewards, rates = run(tmp_path / "vllm", model, tokenizer, sampler)
    flat = [gap for row in gaps for gap in row]
    FIGURES["lora"] = {
        "model": "SmolLM2-135M-Instruct, float32, LoRA rank 8 on all linear layers",
        "iterations": len(rewards),
        "tokens compared": len(flat),
        "largest difference, nats": max(flat),
        "mean difference, nats": statistics.fmean(flat),
        "mean reward of the samples": rewards,
        "win rates of held-out prompts": rates,
    }
    assert len(rewards) == 3 and len(gaps) == 3 * len(PROMPTS) and max(flat) < BOUND


def test_the_same_run_without_vllm_learns_alike(tmp_path):
    """Different draws from the same policies, so different steps: the final win rates agree within a stated bound."""
    model, tokenizer = policy()
    rewards, rates = run(tmp_path / "own", model, tokenizer, None)
    FIGURES["in process"] = {"mean reward of the samples": rewards, "win rates of held-out prompts": rates}
    if "lora" not in FIGURES:
        pytest.skip("needs the run of test_wind_with_an_adapter_is_sampled_by_vllm beside it")
    theirs = FIGURES["lora"]["win rates of held-out prompts"]
    differences = [a - b for a, b in zip(theirs, rates, strict=True)]
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    FIGURES["vllm beside in process"] = {
        "win rates against the base": [statistics.fmean(theirs), statistics.fmean(rates)],
        "95 % interval of the difference (16 prompts)": [mean - 2.13 * error, mean + 2.13 * error],
    }
    assert abs(mean) < ALIKE


def test_an_adapter_that_is_not_the_new_one_is_noticed(server, tmp_path):
    """vLLM itself is made to serve the previous adapter under the new name."""

    class Stale(Vllm):
        before = None

        async def push(self, client, policy, *, adapter):
            kept, self.before = self.before or policy.folder, policy.folder
            copied = policy.folder.with_name("kept")
            if not copied.exists():
                copied.symlink_to(kept)
            await super().push(client, policy._replace(folder=copied.resolve()), adapter=adapter)

    model, tokenizer = policy()
    sampler = sampler_of(server, tokenizer, tmp_path, engine=Stale)
    moved(model)
    sampler.update(model)
    sampler.sample(PROMPTS[:2], 4, seed=0)
    moved(model)
    with pytest.raises(ServerError, match="but still serves the previous policy"):
        sampler.update(model)


def test_a_language_model_on_vllm_judges(server, tmp_path):
    judge = LanguageModelJudge(server.url, model="base", cache=tmp_path, timeout=300.0)
    prefs = judge.judge(["What is the capital of France?"], [["Paris.", "I like trains.", "Paris."]]).prefs
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert [each["how"] for each in kept] == ["logprobs"] * 2
    assert torch.equal(prefs + prefs.mT, torch.ones(1, 3, 3)) and prefs[0, 0, 2] == 0.5
    FIGURES["judge"] = {"chances of SmolLM2-135M as judge": sorted(each["chance"] for each in kept)}


def test_a_vllm_that_was_started_again_gets_its_adapter(server, tmp_path):
    model, tokenizer = policy()
    sampler = sampler_of(server, tokenizer, tmp_path)
    moved(model)
    sampler.update(model)
    before = sampler.sample(PROMPTS[:2], 2, seed=0).texts
    sampler.received.clear()
    server.close()
    server.start()
    assert sampler.sample(PROMPTS[:2], 2, seed=0).texts == before


def test_whole_weights_that_vllm_takes_in_part_are_noticed(server, tmp_path):
    """On a CPU, vLLM 0.32 continues with its packed copy of a tied head. (Last, since it leaves the server broken.)"""
    model, tokenizer = load_policy("smollm2-135m-instruct", dtype=torch.float32)
    sampler = sampler_of(server, tokenizer, tmp_path)
    sampler.update(model)
    with torch.no_grad():
        made = torch.Generator().manual_seed(0)
        for value in model.parameters():
            value += 0.05 * value.std() * torch.randn(value.shape, generator=made)
    with pytest.raises(ServerError, match=r"has not taken all of it|still serves the previous policy"):
        sampler.update(model)


def test_vllms_own_engine_sends_weights_over_a_group_that_is_mocked():
    """vLLM's class and checks in its own environment; there is no GPU and no NCCL."""
    tests = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    command = [str(Path(EXECUTABLE).with_name("python")), str(tests / "real_vllm" / "transfer_job.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    sent = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    joining = ["/get_world_size", "/init_weight_transfer_engine"]
    assert found == {"versions": ["policy-0", "policy-1"], "paths": [*joining, *sent, "/weight_info", *sent]}


# Tiny models: an untied head, and the paper's recipe.


def save_tiny_llama(folder: Path, **changes) -> None:
    """Save a model with sizes that vLLM's attention on a CPU supports."""
    config = tiny_model.make_model().config.to_dict() | {"hidden_size": 64, "head_dim": 32, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config | {"max_position_embeddings": 256} | changes)).save_pretrained(folder)
    tiny_model.make_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Start a server of a tiny Llama whose head is not tied to its embeddings, without adapters."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder / "model", tie_word_embeddings=False)
    made = RealServer(folder / "model", folder / "log", adapters=False)
    yield made
    made.close()


def test_whole_weights_follow_from_disk_where_the_head_is_not_tied(tiny, tmp_path):
    model, tokenizer = load_policy(str(tiny.model), dtype=torch.float32)
    sampler = sampler_of(tiny, tokenizer, tmp_path)
    gaps: list[float] = []

    def compare(prompt, drawn) -> None:
        ours = token_logps(model, [Probe(list(prompt), list(each.ids), None) for each in drawn])
        gaps.extend(
            abs(a - b) for row, each in zip(ours, drawn, strict=True) for a, b in zip(row, each.logps, strict=True)
        )

    sampler.listener = compare
    for seed in range(3):
        sampler.update(model)
        sampler.sample(["the bus was", "rain"], 4, seed=seed)
        moved(model, 0.1)
    assert sampler.follower.policy.name.startswith("policy-0003-") and max(gaps) < BOUND
    FIGURES["whole weights"] = {"updates": 3, "tokens compared": len(gaps), "largest difference, nats": max(gaps)}


def test_a_run_that_was_killed_asks_only_for_what_it_lacks(tiny, tmp_path):
    """Killed between two answers of a call: another process finds the answers that arrived."""
    prompts = ["the bus was", "rain", "a day", "so very", "not the", "good bus"]
    script = (
        "import sys; from test_vllm import *\n"
        "class Known: url = sys.argv[1]\n"
        "tokenizer = load_policy(sys.argv[2], dtype=torch.float32)[1]\n"
        f"sampler_of(Known, tokenizer, Path(sys.argv[3]), tokens=1).sample({prompts!r}, 2, seed=0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", script, tiny.url, str(tiny.model), str(tmp_path)]
    child = subprocess.Popen(command, env=environment)
    received = tmp_path / "received"
    while len(list(received.glob("*.json"))) < 2 and child.poll() is None:
        time.sleep(0.001)
    child.kill()
    child.wait()
    kept = len(list(received.glob("*.json")))
    assert 2 <= kept < len(prompts)
    sampler = sampler_of(tiny, load_policy(str(tiny.model), dtype=torch.float32)[1], tmp_path)
    asked, post = [], sampler.server.post

    async def counted(client, path, body, **given):
        asked.append(path)
        return await post(client, path, body, **given)

    sampler.server.post = counted
    assert sampler.sample(prompts, 2, seed=0).num_generations == 2
    assert asked.count("/completions") == len(prompts) - kept
    FIGURES["killed"] = {"of 6 answers kept": kept, "asked for after the kill": asked.count("/completions")}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`", "ignore:`.*gradient_checkpointing", "ignore:Model has")
def test_the_papers_recipe_runs_with_a_tiny_llama(tmp_path):
    """Policy, judge and prompts are tiny and random, and vLLM runs on this CPU."""
    save_tiny_llama(tmp_path / "model")
    tiny_pairrm.make_pairrm().save_pretrained(tmp_path / "judge")
    tiny_pairrm.make_tokenizer().save_pretrained(tmp_path / "judge")
    for name, end in (("train", "was"), ("heldout", "and")):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{word} {end}" for word in tiny_model.WORDS[:4]))
    made = RealServer(tmp_path / "model", tmp_path / "log")
    given = {
        "model": tmp_path / "model",
        "dtype": "float32",
        "train_dataset": tmp_path / "train.txt",
        "eval_dataset": tmp_path / "heldout.txt",
        "judge": f"pairrm:{tmp_path / 'judge'}",
        "judge_settings": "{dtype: float32}",
        "sampler": f"vllm:{made.url}",
        "peft.r": 4,
        "max_completion_length": 8,
        "max_prompt_length": 64,
        "steps_per_iteration": 1,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": "false",
        "learning_rate": 0.02,
        "use_cpu": "true",
    }
    overrides = [f"{key}={value}" for key, value in given.items()]
    try:
        command = ["train", "--config", "wind_llama3_8b", "--output-dir", str(tmp_path / "out"), "--override"]
        assert main([*command, *overrides]) == 0
    finally:
        made.close()
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["history"]) == 3 and (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert len(list((tmp_path / "out" / "completions").glob("*.parquet"))) == 3
    FIGURES["recipe"] = {"iterations of wind_llama3_8b with a tiny Llama": len(result["history"])}
