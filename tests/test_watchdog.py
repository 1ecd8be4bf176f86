"""Every cause planted once is found, once, with what to change; and a run that learns raises none."""

from types import SimpleNamespace

import pytest

from runs.watchdog import CEILINGS, CHECKS, RUNAWAY, WINDOW, Watchdog

# A step of a run that learns.
HEALTHY = {
    "train/reward": 0.6,
    "train/accuracy": 0.5,
    "train/format_rate": 1.0,
    "rewards/correct": 0.5,
    "rollout/zero_variance_groups": 0.3,
    "rollout/truncated_fraction": 0.05,
    "rollout/duplicate_fraction": 0.4,
    "policy/entropy": 0.5,
    "policy/kl": 0.02,
    "policy/approx_kl": 0.001,
    "rollout/sampler_mismatch_kl": 1e-9,
}


def config(**changes):
    fields = {"learning_rate": 1e-6, "lora_rank": 0, "max_completion_tokens": 64}
    return SimpleNamespace(
        **fields
        | {"updates_per_rollout": 1, "epochs_per_rollout": 1, "replay_groups": 0, "lora_dropout": 0.0}
        | changes
    )


def watch(dog, steps, **changes):
    return [finding for _ in range(steps) for finding in dog.step(HEALTHY | changes)]


def slashed(changes):
    return {name.replace("__", "/"): value for name, value in changes.items()}


PLANTED = {
    "no_signal": ({"rollout__zero_variance_groups": 0.99}, "--rewards"),
    "runaway_length": ({"rollout__truncated_fraction": 0.95}, "--overlong soft"),
    "format_lost": ({"train__format_rate": 0.3}, "--rewards"),
    "duplicates": ({"rollout__duplicate_fraction": 0.9, "rewards__correct": 0.2}, "--temperature 1"),
    "entropy_collapse": ({"policy__entropy": 0.01}, "--entropy_coef"),
    "noise": ({"policy__entropy": 2.0, "train__reward": 0.1}, "--learning_rate"),
    "kl_explosion": ({"policy__kl": 3.0}, "--kl_coef"),
    "large_updates": ({"policy__approx_kl": 0.5}, "--updates_per_rollout"),
    "mismatch": ({"rollout__sampler_mismatch_kl": 0.05}, "environment.json"),
}


def test_every_cause_is_planted():
    assert PLANTED.keys() | {"truncated"} == CHECKS.keys() | CEILINGS.keys()
    assert set(RUNAWAY) <= PLANTED.keys()


@pytest.mark.parametrize("cause", PLANTED)
def test_a_planted_cause_is_found_once_with_its_remedy(cause):
    changes, remedy = PLANTED[cause]
    dog = Watchdog(config())
    assert watch(dog, 3 * WINDOW) == []
    found = watch(dog, 3 * WINDOW, **slashed(changes))
    assert [finding.cause for finding in found] == [cause]
    assert remedy in found[0].text


def test_completions_that_never_ended_are_no_run_away():
    found = watch(Watchdog(config()), 3 * WINDOW, **slashed({"rollout__truncated_fraction": 0.95}))
    assert [finding.cause for finding in found] == ["truncated"]
    assert "--max_completion_tokens 64" in found[0].text


@pytest.mark.parametrize(
    ("right", "told"),
    [(0.0, "cold start"), (1.0, "the problems are solved"), (0.5, "tell completions apart")],
)
def test_no_signal_has_three_reasons(right, told):
    dog = Watchdog(config())
    changes = slashed({"rollout__zero_variance_groups": 1.0, "rewards__correct": right})
    (found,) = watch(dog, WINDOW, **changes)
    assert told in found.text


def test_a_look_at_a_single_rollout_speaks_of_that():
    found = Watchdog(config(), window=1, span="16 prompts").step(
        HEALTHY | {"rollout/truncated_fraction": 1.0, "rollout/zero_variance_groups": 1.0}
    )
    assert {finding.cause for finding in found} == {"truncated", "no_signal"}
    assert all("of 16 prompts" in finding.text for finding in found)


def test_one_bad_step_is_no_finding():
    dog = Watchdog(config())
    watch(dog, WINDOW)
    for changes, _ in PLANTED.values():
        if "policy__kl" not in changes and "policy__approx_kl" not in changes:
            assert watch(dog, 1, **slashed(changes)) == []
            watch(dog, WINDOW)


def test_solved_problems_may_be_answered_without_entropy_and_alike():
    dog = Watchdog(config())
    watch(dog, WINDOW)
    solved = {"policy__entropy": 0.001, "rollout__duplicate_fraction": 0.95, "rewards__correct": 0.97}
    assert watch(dog, WINDOW, **slashed(solved)) == []


@pytest.mark.parametrize("knob", [{"updates_per_rollout": 4}, {"replay_groups": 2}, {"lora_dropout": 0.1}])
def test_a_policy_that_has_moved_is_no_mismatch(knob):
    dog = Watchdog(config(**knob))
    assert watch(dog, WINDOW, **slashed({"rollout__sampler_mismatch_kl": 0.05})) == []


def test_rewards_that_rise_while_held_out_accuracy_falls_are_hacking():
    def evaluation(accuracy):
        return {"accuracy_strict": accuracy, "ci95": [accuracy - 0.05, accuracy + 0.05]}

    dog = Watchdog(config())
    watch(dog, WINDOW)
    assert dog.evaluation(evaluation(0.5)) == []
    watch(dog, WINDOW, **slashed({"train__reward": 0.9}))
    assert dog.evaluation(evaluation(0.45)) == []  # by chance
    (found,) = dog.evaluation(evaluation(0.3))
    assert found.cause == "reward_hacking"
    assert "--rewards" in found.text
    assert dog.evaluation(evaluation(0.3)) == []
    falling = Watchdog(config())
    watch(falling, WINDOW)
    falling.evaluation(evaluation(0.5))
    watch(falling, WINDOW, **slashed({"train__reward": 0.2}))
    assert falling.evaluation(evaluation(0.3)) == []  # both fall: that is no hacking


def test_a_model_that_breaks_after_the_first_evaluation_is_not_hacking():
    dog = Watchdog(config())
    dog.evaluation({"accuracy_strict": 0.6, "ci95": [0.55, 0.65]})  # before the first step
    watch(dog, WINDOW, **slashed({"train__reward": 0.6}))
    watch(dog, WINDOW, **slashed({"train__reward": 0.05}))
    assert dog.evaluation({"accuracy_strict": 0.05, "ci95": [0.02, 0.1]}) == []


def test_a_resumed_run_tells_nothing_twice():
    first, told = Watchdog(config()), []
    for step in range(3 * WINDOW):
        changes = {} if step < WINDOW else slashed(PLANTED["runaway_length"][0])
        found = first.step(HEALTHY | changes)
        row = {"step": step, **HEALTHY, **changes}
        told.append(row | ({"watchdog": [vars(finding) for finding in found]} if found else {}))
    evaluation = {"step": 5, "accuracy_strict": 0.5, "ci95": [0.4, 0.6]}
    second = Watchdog(config())
    second.replay(told, [evaluation])
    assert second.told == {"runaway_length"}
    assert watch(second, WINDOW, **slashed(PLANTED["runaway_length"][0])) == []
    assert second.best[0] == 0.5


@pytest.mark.parametrize(
    ("rate", "rank", "parameters", "told"),
    [
        (1e-6, 16, 1_000_000, "--learning_rate 1e-5"),
        (1e-5, 16, 1_000_000, None),
        (1e-4, 0, 500_000_000, "--learning_rate 1e-6"),
        (1e-6, 0, 500_000_000, None),
        (4e-4, 0, 400_000, None),
    ],
)
def test_a_learning_rate_far_off_is_told_at_once(rate, rank, parameters, told):
    found = Watchdog(config(learning_rate=rate, lora_rank=rank)).start(parameters)
    assert [told in finding.text for finding in found] == ([True] if told else [])


def test_metrics_that_a_script_does_not_have_are_not_looked_at():
    dog = Watchdog(SimpleNamespace(learning_rate=1e-3, lora_rank=0))
    assert [f for _ in range(3 * WINDOW) for f in dog.step({"policy/loss": 5.0})] == []
