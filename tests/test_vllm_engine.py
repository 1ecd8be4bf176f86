"""Rollouts from servers: against scripted ones in threads, which die, forget and refuse."""

import copy
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quick import lines, quick_grpo
from safetensors import safe_open
from scripted_vllm import ScriptedVLLM

from inference import SamplingParams, vllm_engine
from inference.engine import stop_token_ids
from inference.vllm_engine import VLLMEngine
from inference.vllm_server import EngineError, Server, write_weights
from models import add_adapter, save_model
from runs.config import RunStopped
from runs.signals import StepStopped
from train_grpo import GRPOConfig, look_back
from train_grpo import main as train_grpo

ROOT = Path(__file__).parent.parent
PARAMS = SamplingParams(max_completion_tokens=8, temperature=0.7)
PROMPTS = [[5, 6], [7, 8, 9], [4], [5, 5, 5, 5]]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(vllm_engine, "PAUSE_S", 0.02)


@pytest.fixture
def serve():
    servers = []

    def start(**settings):
        servers.append(ScriptedVLLM(**settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def model(tiny):
    return copy.deepcopy(tiny[0])


@pytest.fixture
def connect(model, tiny, tmp_path):
    """Makes an engine over servers; its model's weights are the number 1."""
    set_weights(model, 1)

    def connect(*servers, context=64, timeout_s=5.0, **options):
        urls = ",".join(server.url for server in servers)
        stop = stop_token_ids(model, tiny[1])
        return VLLMEngine(urls, model, stop, tmp_path, context, timeout_s, **options)

    return connect


def set_weights(model, number):
    with torch.no_grad():
        model.model.norm.weight[0] = number


def texts(groups):
    return [[completion.token_ids for completion in group] for group in groups]


def weights_used(groups):
    return {completion.token_ids[0] for group in groups for completion in group}


# ------------------------------------------------------------------------------------------------------------
# Sampling


def test_completions_are_of_the_weights_pushed_last(serve, connect, model):
    server = serve()
    engine = connect(server)
    for number in (1, 2, 3):
        set_weights(model, number)
        engine.push_weights(model)
        groups = engine.generate(PROMPTS, 3, PARAMS, (0, number))
        assert weights_used(groups) == {number}
        assert [[c.token_ids[2] for c in group] for group in groups] == [[len(p)] * 3 for p in PROMPTS]
        assert groups[0][0].logprobs == [-0.5] * 3
        assert groups[0][0].finish_reason == "stop"
    for request in server.completions():
        assert request["temperature"] == 0.7
        assert request["max_tokens"] == 8
        assert (request["stop_token_ids"], request["ignore_eos"]) == ([1], True)
        # Whatever the model's generation config says, nothing is cut off or punished.
        assert (request["top_k"], request["top_p"], request["min_p"]) == (0, 1.0, 0.0)
        assert request["repetition_penalty"] == 1.0


def test_seeds_belong_to_prompt_and_sample_whoever_asks(serve, connect, model):
    engine = connect(serve(), serve())
    engine.push_weights(model)
    whole = texts(engine.generate(PROMPTS, 2, PARAMS, (7, 1)))
    shares = [texts(engine.generate(PROMPTS[i : i + 2], 2, PARAMS, (7, 1), first_prompt=i)) for i in (0, 2)]
    assert whole == shares[0] + shares[1]
    seeds = {tuple(ids[1:2]) for group in whole for ids in group}
    assert len(seeds) > 4
    assert texts(engine.generate(PROMPTS, 2, PARAMS, (7, 2))) != whole


def test_prompts_are_dealt_to_all_servers_a_group_to_one(serve, connect, model):
    servers = [serve(), serve()]
    everyone = threading.Barrier(16, timeout=5)  # all are asked for at once, so nobody helps another out
    for server in servers:
        server.before_completion = lambda request: everyone.wait()
    engine = connect(*servers)
    engine.push_weights(model)
    engine.generate(PROMPTS, 4, PARAMS, (0,))
    for server, theirs in zip(servers, (PROMPTS[::2], PROMPTS[1::2]), strict=True):
        asked = [request["prompt"] for request in server.completions()]
        assert sorted(asked) == sorted(4 * theirs)


def test_no_server_is_asked_for_more_at_once_than_it_decodes(serve, connect, model, monkeypatch):
    monkeypatch.setattr(vllm_engine, "IN_FLIGHT", 3)
    server = serve()
    full = threading.Barrier(3, timeout=5)

    def hold(request):
        full.wait()  # until three are there
        time.sleep(0.05)  # for a fourth to come

    server.before_completion = hold
    engine = connect(server)
    engine.push_weights(model)
    groups = engine.generate(PROMPTS, 3, PARAMS, (0,))
    assert weights_used(groups) == {1}
    assert server.most_in_flight == 3


def test_a_completion_is_told_while_others_are_sampled(serve, connect, model):
    server = serve()
    seen = threading.Event()
    held = []

    def hold(request):
        if request["prompt"] == PROMPTS[0]:
            held.append(seen.wait(5))

    server.before_completion = hold
    told = []

    def tell(prompt, sample, completion):
        assert threading.current_thread() is threading.main_thread()
        told.append((prompt, sample, completion.token_ids))
        seen.set()

    engine = connect(server)
    engine.push_weights(model)
    groups = engine.generate(PROMPTS[:2], 1, PARAMS, (0,), on_completion=tell)
    assert held == [True]
    assert told == [(1, 0, groups[1][0].token_ids), (0, 0, groups[0][0].token_ids)]


# ------------------------------------------------------------------------------------------------------------
# Servers that die, and come back


def test_whoever_is_told_to_stop_waits_for_no_completion(serve, connect, model):
    server, release, waited = serve(), threading.Event(), []
    engine = connect(server)
    engine.push_weights(model)
    server.before_completion = lambda request: waited.append(release.wait(60))

    def check():
        if server.in_flight:
            raise StepStopped

    engine.check = check
    with pytest.raises(StepStopped):
        engine.generate(PROMPTS, 2, PARAMS, (0, 0))
    assert waited == []
    release.set()


def test_a_server_that_dies_and_comes_back_loses_nothing(serve, connect, model):
    server = serve()
    engine = connect(server)
    engine.push_weights(model)
    foreseen = texts(engine.generate(PROMPTS, 4, PARAMS, (3,)))
    asked = []

    def die(request):
        asked.append(request)
        if len(asked) == 6:
            server.stop()
            threading.Timer(0.2, server.start).start()

    server.before_completion = die
    told = []
    groups = engine.generate(
        PROMPTS, 4, PARAMS, (3,), on_completion=lambda prompt, sample, _: told.append((prompt, sample))
    )
    assert texts(groups) == foreseen
    assert sorted(told) == [(prompt, sample) for prompt in range(4) for sample in range(4)]
    assert server.paths().count("/collective_rpc") == 2  # and once for all who waited


def restart(server):
    server.forget()


def restart_and_be_seen_to_by_another_process(server):
    mark = server.mark
    server.forget()
    server.mark = mark.partition(".")[0] + ".another"


@pytest.mark.parametrize("happens", [restart, restart_and_be_seen_to_by_another_process])
@pytest.mark.parametrize("when", ["before_completion", "after_completion"])
def test_nothing_counts_that_a_restarted_server_sampled_from_other_weights(
    serve, connect, model, happens, when
):
    server = serve()
    engine = connect(server)
    engine.push_weights(model)
    foreseen = texts(engine.generate(PROMPTS[:1], 1, PARAMS, (0,)))
    once = iter([happens])
    setattr(server, when, lambda request: next(once, lambda server: None)(server))
    if happens is restart:
        assert texts(engine.generate(PROMPTS[:1], 1, PARAMS, (0,))) == foreseen
    else:
        # The mark says that these weights are in: it is believed, but not of what was begun before.
        engine.generate(PROMPTS[:1], 1, PARAMS, (0,))
    assert len(server.completions()) == 3


def test_the_living_do_the_work_of_the_dead(serve, connect, model):
    living, dying = serve(), serve()
    engine = connect(living, dying, timeout_s=60.0)
    engine.push_weights(model)
    dying.before_completion = lambda request: dying.stop()
    groups = engine.generate(PROMPTS, 4, PARAMS, (0,))
    assert weights_used(groups) == {1}
    assert len(living.completions()) == 16


def test_a_server_that_was_gone_gets_the_weights_when_it_is_back(serve, connect, model):
    living, gone = serve(), serve()
    engine = connect(living, gone)
    engine.push_weights(model)
    gone.stop()
    set_weights(model, 2)
    engine.push_weights(model)  # does not wait
    gone.start()
    is_back = threading.Event()
    gone.before_completion = lambda request: is_back.set()
    living.before_completion = lambda request: is_back.wait(5)  # lest it does the work of both
    groups = engine.generate(PROMPTS, 4, PARAMS, (0,))
    assert weights_used(groups) == {2}
    assert gone.completions()


def test_a_server_that_stays_away_ends_the_rollout(serve, connect, model):
    server = serve()
    engine = connect(server)
    engine.push_weights(model)
    engine.timeout_s = 0.3
    server.before_completion = lambda request: server.stop()
    with pytest.raises(EngineError, match=rf"no server was back within 0.3 s: {server.url}.*refused"):
        engine.generate(PROMPTS, 2, PARAMS, (0,))


def test_a_request_that_always_breaks_a_server_is_given_up(serve, connect, model):
    server = serve()
    engine = connect(server)
    engine.push_weights(model)
    server.before_completion = lambda request: server.forget()
    with pytest.raises(EngineError, match=r"tried 5 times, at last: .* lost the weights"):
        engine.generate(PROMPTS[:1], 1, PARAMS, (0,))


def test_a_refusal_ends_the_rollout_at_once(serve, connect, model):
    server = serve()
    engine = connect(server)
    engine.push_weights(model)
    with pytest.raises(EngineError, match=r"refused: .*400 Bad Request: Token id is out of vocabulary"):
        engine.generate([[5], [9999]], 2, PARAMS, (0,))


# ------------------------------------------------------------------------------------------------------------
# Weights


def test_only_what_was_handed_over_last_is_kept_on_disk(serve, connect, model, tmp_path):
    server = serve()
    engine = connect(server)
    for number in (1, 2):
        set_weights(model, number)
        engine.push_weights(model)
        (folder,) = tmp_path.iterdir()
    assert [body["kwargs"]["weights_path"] for path, body in server.asked if path == "/collective_rpc"][
        1
    ] == str(folder)
    del engine


def test_a_server_takes_weights_while_it_is_paused(serve, connect, model):
    server = serve()
    connect(server).push_weights(model)
    calls = [
        path for path, _ in server.asked if not path.startswith(("/health", "/server", "/v1", "/weight"))
    ]
    assert calls == ["/pause?mode=wait", "/collective_rpc", "/resume", "/update_weight_version"]


def test_a_tied_head_is_named_in_what_is_written(model, random_model, tmp_path):
    """A server on a CPU takes a head anew only where it is named."""

    def named(model, folder):
        assert not write_weights(str(folder), model)
        found = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no dict
        assert not list(folder.glob("*.index.json"))
        return found

    tied = named(model, tmp_path / "tied")
    assert torch.equal(tied["lm_head.weight"], tied["model.embed_tokens.weight"])
    untied = named(random_model("llama"), tmp_path / "untied")
    assert untied.keys() == dict(random_model("llama").named_parameters()).keys()
    assert tied.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()


@pytest.fixture
def adapted(model, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(folder, model, tiny[1])
    model.name_or_path = str(folder)
    return add_adapter(model, rank=4, seed=0)


def test_an_adapter_is_loaded_under_a_new_name_and_the_old_one_unloaded(serve, adapted, tmp_path):
    server = serve(lora_rank=8)
    engine = VLLMEngine(server.url, adapted, [1], tmp_path, 64, 5.0)
    names = []
    for _ in range(2):
        engine.push_weights(adapted)
        engine.generate(PROMPTS[:1], 1, PARAMS, (0,))
        (name,) = server.adapters
        names.append(name)
        assert server.completions()[-1]["model"] == name
        assert [file.name for file in Path(server.adapters[name]).glob("*.safetensors")] == [
            "adapter_model.safetensors"
        ]
    assert names[0] != names[1]
    assert "/collective_rpc" not in server.paths()
    # Started again, it knows no adapter: the refusal is no end.
    server.forget()
    engine.generate(PROMPTS[:1], 1, PARAMS, (0,))
    assert list(server.adapters) == names[1:]


def test_weights_that_a_server_will_not_have_are_told_with_their_folder(serve, connect, model, tmp_path):
    server = serve()
    server.takes_weights = False
    with pytest.raises(EngineError, match=rf"did not take the weights in {tmp_path}.*size mismatch"):
        connect(server).push_weights(model)


def test_one_process_hands_over_and_all_know_or_fail(serve, connect, model, tmp_path):
    server = serve()
    shared = []

    def from_main(told):
        shared.append(told)
        return shared[0]

    main, other = (connect(server, is_main=is_main, share=from_main) for is_main in (True, False))
    main.push_weights(model)
    other.push_weights(model)
    assert len(list(tmp_path.iterdir())) == 1
    assert server.paths().count("/collective_rpc") == 1
    server.forget()  # the other process sees to it as well
    assert weights_used(other.generate(PROMPTS, 2, PARAMS, (0,))) == {1}
    shared.clear()
    server.takes_weights = False
    for engine in (main, other):
        with pytest.raises(EngineError, match="size mismatch"):
            engine.push_weights(model)


# ------------------------------------------------------------------------------------------------------------
# At the door


@pytest.mark.parametrize(
    ("settings", "context", "message"),
    [
        ({"vocabulary": 640}, 64, r"serves scripted, whose vocabulary is not the policy's of 320 tokens"),
        ({"vocabulary": 256}, 64, r"serves scripted, whose vocabulary is not the policy's of 320 tokens"),
        ({"logprobs_mode": "raw_logprobs"}, 64, r"tells raw_logprobs.*--logprobs-mode processed_logprobs"),
        ({"max_model_len": 63}, 64, r"holds 63 tokens.*max_completion_tokens is 64"),
    ],
)
def test_a_server_that_could_not_sample_for_the_policy_is_refused(serve, connect, settings, context, message):
    with pytest.raises(ValueError, match=rf"engine_url: http.*{message}.*make vllm-server MODEL="):
        connect(serve(**settings), context=context)


def test_a_server_that_is_not_there_or_not_in_development_mode_is_refused(serve, connect):
    server = serve()
    server.is_developing = False
    with pytest.raises(ValueError, match=r"development mode, VLLM_SERVER_DEV_MODE=1 .*404"):
        connect(serve(), server)
    server.stop()
    with pytest.raises(ValueError, match=rf"engine_url: {server.url}.*is the server running"):
        connect(serve(), server)


@pytest.mark.parametrize(
    ("rank", "changes", "message"),
    [
        (0, {}, "takes adapters up to rank 0, and lora_rank is 4: it needs --enable-lora"),
        (2, {}, "takes adapters up to rank 2"),
        (8, {"may_load": False}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (8, {"mark": "ponder-weights-0123.4"}, "has the weights of another run"),
    ],
)
def test_a_server_that_could_not_load_the_adapter_is_refused(
    serve, adapted, tmp_path, rank, changes, message
):
    server = serve(lora_rank=rank)
    vars(server).update(changes)
    with pytest.raises(ValueError, match=rf"{message}.*LORA_RANK=8 starts one"):
        VLLMEngine(server.url, adapted, [1], tmp_path, 64, 5.0)


@pytest.mark.parametrize(
    ("url", "is_here"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost:8000/v1", True),
        ("http://[::1]:8000", True),
        ("http://198.51.100.7:8000", False),
        ("http://localhost.example:8000", False),
    ],
)
def test_a_server_that_others_may_reach_is_told(url, is_here):
    server = Server(url, 1.0)
    assert server.is_here == is_here
    told = VLLMEngine.told.fget(SimpleNamespace(servers=[server]))
    assert ("wall it off" in told) != is_here


def test_an_engine_and_its_address_belong_together():
    with pytest.raises(ValueError, match=r"engine 'vllm' needs engine_url.*make vllm-server"):
        GRPOConfig(engine="vllm")
    with pytest.raises(ValueError, match=r"engine_url 'http://x' .*--engine vllm"):
        GRPOConfig(engine_url="http://x")


# ------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize(("engine", "is_trusted"), [("torch", True), ("vllm", False)])
def test_a_servers_log_probabilities_are_not_taken_for_the_trainers(engine, is_trusted):
    config = GRPOConfig(engine=engine, engine_url="http://x" if engine == "vllm" else None, kl_coef=0.0)
    accelerator = SimpleNamespace(mixed_precision="no")
    batch = SimpleNamespace(tensors={"sampling_logprobs": torch.zeros(1)})
    look_back(SimpleNamespace(config=config, accelerator=accelerator, reference=None), batch)
    assert ("old_logprobs" in batch.tensors) == is_trusted


@pytest.mark.slow
def test_a_run_whose_server_stays_away_is_saved_and_goes_on(serve, tmp_path, tiny):
    save_model(tmp_path / "model", *tiny)
    server = serve()
    options = {"engine": "vllm", "engine_url": server.url, "engine_timeout_s": 2.0, "max_prompt_tokens": 64}
    options |= {"model": str(tmp_path / "model"), "save_every": 1, "kl_coef": 0.0}
    config = quick_grpo(tmp_path / "run", **options)
    asked = []

    def die(request):
        asked.append(request)
        if len(asked) == 36:  # in the third of steps of 16
            server.stop()

    server.before_completion = die
    with pytest.raises(RunStopped, match=r"no server was back .*; 2 steps are saved"):
        train_grpo(config)
    server.start()
    assert train_grpo(config) == 0
    told = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in told] == [1, 2, 3, 4]
    assert all(row["time/push_s"] > 0 for row in told)
    gc.collect()
    assert not list((tmp_path / "run").glob(".weights-*"))


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_leaves_its_server_with_what_it_does(serve, tmp_path, tiny):
    save_model(tmp_path / "model", *tiny)
    server, release, waited = serve(), threading.Event(), []
    options = {"engine": "vllm", "engine_url": server.url, "max_prompt_tokens": 64, "eval_every": 0}
    options |= {"model": str(tmp_path / "model"), "kl_coef": 0.0, "save_every": 9}
    config = quick_grpo(tmp_path / "run", **options)
    asked = []

    def hold(request):
        asked.append(request)
        if len(asked) > 20:  # in the second of steps of 16
            if len(asked) == 21:
                os.kill(os.getpid(), signal.SIGTERM)
            waited.append(release.wait(60))

    server.before_completion = hold
    assert train_grpo(config) == 143
    assert waited == []
    server.before_completion = lambda request: None
    release.set()
    assert train_grpo(config) == 0
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_processes_ask_for_what_one_would_whatever_dies(serve, tmp_path, tiny):
    """Each asks for its share, the main one hands over; both find the server gone, and both wait for it."""
    save_model(tmp_path / "model", *tiny)
    server = serve()
    settings = {"engine": "vllm", "engine_url": server.url, "model": str(tmp_path / "model")}
    settings |= {"kl_coef": 0.0, "total_steps": 2, "eval_every": 0, "max_prompt_tokens": 64}
    train_grpo(quick_grpo(tmp_path / "one", **settings))
    pushes = server.paths().count("/collective_rpc")
    assert pushes == 2

    asked = []

    def die(request):
        asked.append(request)
        if len(asked) == 20:  # in the second of steps of 16
            server.stop()
            threading.Timer(0.5, server.start).start()

    server.before_completion = die
    settings |= {"prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 12}
    settings |= {"rewards": "{unique_characters: 1.0}", "output": tmp_path / "two"}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29518"]
        + [
            "train_grpo.py",
            *(word for name, value in settings.items() for word in (f"--{name}", str(value))),
        ],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=240,
    )
    one, two = (lines(tmp_path / name / "rollouts.jsonl") for name in ("one", "two"))
    assert len(one) == 32
    assert [row["completion"] for row in one] == [row["completion"] for row in two]
    # Two steps, and after the restart by one process, or by both at once.
    assert server.paths().count("/collective_rpc") - pushes in (3, 4)
