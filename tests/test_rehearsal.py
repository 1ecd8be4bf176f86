"""The dry run: what it tells, that nothing of it stays, and its exit code; each cause planted once."""

from types import SimpleNamespace

import pytest
from quick import lines, quick_grpo, quick_sft, same, weights

import train_grpo
import train_sft
from models import make_accelerator, save_model
from rehearsal import _time, at_the_limit, rows_of_two_parts
from runs.config import RunStopped
from runs.folder import open_run
from tiny import build_tiny


def begin(script, config):
    return script.set_up(config, open_run(config), make_accelerator())


@pytest.mark.parametrize("overlong", ["none", "mask"])
def test_the_longest_sequences_fill_two_parts(overlong, tmp_path):
    settings = {"prompts_per_step": 32, "micro_batch_tokens": 200, "algo": "grpo_lead", "kl_coef": 0.1}
    settings["overlong"] = overlong
    training = begin(train_grpo, quick_grpo(tmp_path, eval_every=0, **settings))
    assert rows_of_two_parts(training) == 2 * (200 // (training.load.prompt + 12))
    longest = at_the_limit(training)
    assert longest.config.prompts_per_step == 4  # 16 completions, 16 rows of 25 tokens
    metrics = train_grpo.train_step(longest)
    assert metrics["rollout/completions"] == 16
    assert metrics["rollout/completion_tokens"] == 12
    assert metrics["rollout/zero_variance_groups"] == 0
    assert metrics["policy/grad_norm"] > 0
    training.scorer.close()


@pytest.mark.parametrize(("done", "exams"), [(0, 5), (25, 3), (30, 3), (89, 1)])
def test_time_and_cost_are_of_what_is_left(done, exams):
    config = SimpleNamespace(
        total_steps=90, eval_every=25, price_per_hour=2.0
    )  # evaluated at 0, 25, 50, 75, 90
    rows = dict(_time(config, done, step_s=60.0, exam_s=600.0))
    minutes = 90 - done + 10 * exams
    told = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes}.0 min"
    assert rows["a step"] == "60.00 s"
    assert rows["time to the end"] == f"{told} for {90 - done} steps and {exams} evaluations"
    assert rows["cost"] == f"{minutes / 30:.2f} at 2 an hour"
    config.price_per_hour, config.eval_every = 0.0, 0
    rows = dict(_time(config, done, step_s=60.0))
    assert rows["time to the end"].endswith(
        f"for {90 - done} steps and 0 evaluations, whose time is not in it"
    )
    assert "--price_per_hour" in rows["cost"]


# ------------------------------------------------------------------------------------------------------------
# Whole dry runs


def rehearse(config, capsys, script=train_grpo):
    """Exit code, and the rows that were printed, by their names."""
    code = script.main(config)
    told = capsys.readouterr().out
    rows = dict(line.strip().split("  ", 1) for line in told.splitlines() if line.startswith("  "))
    return code, told, {name: text.strip() for name, text in rows.items()}


@pytest.fixture
def folder(tmp_path):
    """A random model's folder, with a tokenizer that a test may change first."""

    def save(change=lambda tokenizer: None):
        model, tokenizer = build_tiny(0)
        change(tokenizer)
        model.generation_config.eos_token_id = None
        save_model(tmp_path / "model", model, tokenizer)
        return str(tmp_path / "model")

    return save


@pytest.mark.slow
def test_a_healthy_run_may_begin_and_is_told_what_it_will_take(tmp_path, capsys):
    """Random weights end a completion now and then, and are paid for different characters."""
    config = quick_grpo(tmp_path / "run", max_completion_tokens=150, dry_run=True, price_per_hour=3600.0)
    code, told, rows = rehearse(config, capsys)
    assert code == 0
    assert not (tmp_path / "run").exists()
    assert "preflight:" not in told
    assert "watchdog:" not in told
    assert "step " not in told.replace("a step", "").replace("two steps", "")
    assert "20000 problems, 0 left out over max_prompt_tokens" in told
    assert "16 prompts x 4 samples" in told
    assert rows["accuracy"] == "pass@1 0.0%, pass@4 0.0%"
    assert rows["signal"] == "16 of 16 groups earn different rewards"
    assert rows["<think>"] == "left to the model"
    assert rows["padding"] == "a token of its own"
    ended = 100 - float(rows["truncated"].rstrip("%"))
    assert 20 < ended < 60
    assert rows["EOS"] == f"<|end|> ended {ended:.1f}%; the chat template ends a turn with it"
    assert rows["memory"].endswith("in an update of 16 rows of 13 + 150 tokens")
    assert rows["time to the end"].endswith("for 4 steps and 3 evaluations")
    # A unit of money a second.
    minutes = float(rows["time to the end"].split()[0])
    assert float(rows["cost"].split()[0].replace(",", "")) == pytest.approx(60 * minutes, abs=3.1)
    assert told.endswith("dry run: it can begin\n")


@pytest.mark.slow
def test_no_signal_is_hopeless_and_hardly_an_end_is_told(tmp_path, capsys):
    config = quick_grpo(tmp_path / "run", rewards={"correct": 1.0}, dry_run=True)
    code, told, rows = rehearse(config, capsys)
    assert code == 1
    assert rows["signal"] == "0 of 16 groups earn different rewards"
    assert (
        "preflight: no_signal: in 100% of the groups of 16 prompts x 4 samples all rewards were equal" in told
    )
    assert "Begin with a cold start" in told
    assert "preflight: truncated: 95% of the completions of 16 prompts x 4 samples ran into" in told
    assert "--max_completion_tokens 12" in told
    assert told.endswith("dry run: the run would learn nothing (no_signal)\n")


@pytest.mark.slow
def test_an_eos_that_is_never_sampled_is_found_with_its_cause(tmp_path, capsys, folder):
    def never_ends(tokenizer):
        tokenizer.eos_token = "<|system|>"

    # Of so few random tokens none is the one in 320.
    settings = {"model": folder(never_ends), "max_completion_tokens": 2, "dry_run": True}
    code, told, rows = rehearse(quick_grpo(tmp_path / "run", **settings), capsys)
    assert code == 1
    assert "preflight: eos_unreachable: the chat template ends a turn with '<|end|>'" in told
    assert rows["EOS"] == "<|system|> ended 0.0%; the chat template does not end a turn with it"
    assert told.endswith("dry run: the run would learn nothing (truncated)\n")


@pytest.mark.slow
def test_a_prefilled_thought_is_told_at_every_start(tmp_path, capsys, folder):
    def opens(tokenizer):
        tokenizer.chat_template += "{%- if add_generation_prompt -%}<think>{%- endif -%}"

    model = folder(opens)
    _, told, rows = rehearse(quick_grpo(tmp_path / "run", model=model, dry_run=True), capsys)
    assert rows["<think>"] == "opened by the chat template"
    assert train_grpo.main(quick_grpo(tmp_path / "run", model=model, total_steps=1, eval_every=0)) == 0
    for output in (told, capsys.readouterr().out):
        assert output.count("preflight: prefilled_think: the chat template opens <think> itself") == 1


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_hopeless(tmp_path, capsys):
    model, tokenizer = build_tiny(0)
    model.model.norm.weight.data[0] = float("inf")
    save_model(tmp_path / "model", model, tokenizer)
    config = quick_sft(tmp_path / "run", model=str(tmp_path / "model"), dry_run=True)
    code, told, _ = rehearse(config, capsys, train_sft)
    assert code == 1
    assert "preflight: not_finite: 2 updates" in told


@pytest.mark.slow
def test_a_dry_run_of_a_run_that_was_stopped_rehearses_what_is_left_and_touches_nothing(tmp_path, capsys):
    config = quick_grpo(tmp_path / "run", total_steps=2)
    assert train_grpo.main(config) == 0
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    capsys.readouterr()
    more = quick_grpo(tmp_path / "run", total_steps=6, eval_every=0)
    code, told, rows = rehearse(quick_grpo(tmp_path / "run", total_steps=6, dry_run=True), capsys)
    assert "going on from" in told
    assert rows["time to the end"].endswith("for 4 steps and 2 evaluations")
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((tmp_path / "run").rglob("*"))) == len(list(before)) + 4  # and its folders
    assert train_grpo.main(more) == 0  # it goes on as if nothing had been
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 6
    assert train_grpo.main(quick_grpo(tmp_path / "whole", total_steps=6)) == 0
    assert same(weights(tmp_path / "run" / "final"), weights(tmp_path / "whole" / "final"))
    assert code == 0


@pytest.mark.slow
def test_a_broken_reward_ends_a_dry_run_by_name(tmp_path):
    (tmp_path / "mine.py").write_text("def broken(completions):\n    raise ZeroDivisionError('no')\n")
    config = quick_grpo(tmp_path / "run", rewards={f"{tmp_path}/mine.py:broken": 1.0}, dry_run=True)
    with pytest.raises(RunStopped, match=r"mine.py:broken.*ZeroDivisionError"):
        train_grpo.main(config)


@pytest.mark.slow
def test_a_cold_start_is_rehearsed_where_it_comes_first(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = train_grpo.GRPOConfig(dry_run=True, price_per_hour=1.0)
    code, told, rows = rehearse(config, capsys)
    assert code == 0
    assert "running the cold start first" in told
    assert "700 steps" in rows["time to the end"]
    assert "at 1 an hour" in rows["cost"]
    assert "can be rehearsed once it is there" in told
    assert not list(tmp_path.iterdir())
