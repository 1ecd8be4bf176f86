"""The table of docs/troubleshooting.md: what it says is printed is, and every row is somebody's test."""

import ast
import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest

from evaluate import EvaluateConfig
from export import ExportConfig
from rewards.scorer import DEADLINE_S
from runs.watchdog import CEILINGS, CHECKS, RUNAWAY
from train_grpo import GRPOConfig
from train_sft import SFTConfig

ROOT = Path(__file__).parent.parent
TABLE = (ROOT / "docs/troubleshooting.md").read_text()

# Each row's symptom, and a test that plants it: of which module, and its name.
PLANTED = {
    "will it fit, learn, end in time?": "rehearsal.a_healthy_run_may_begin_and_is_told_what_it_will_take",
    "too little memory is free": "preflight.memory_is_told_where_it_does_not_suffice",
    "the model has no chat template": "preflight.a_template_of_ours_is_told",
    "the template opens the thought": "preflight.a_template_that_opens_the_thought_is_told",
    "the template closes the thought at once": "preflight.a_template_that_closes_the_thought_is_told",
    "padding is the EOS": "preflight.padding_with_the_eos_is_told",
    "the EOS is not what ends a turn": "preflight.an_eos_that_the_template_never_writes_is_told",
    "prompts over the limit": "preflight.prompts_over_the_limit_are_left_out_and_counted",
    "golds that nobody can read": "preflight.golds_that_cannot_be_read_are_left_out_counted_and_listed",
    "the first updates are not finite": "rehearsal.weights_that_are_no_numbers_are_hopeless",
    "the loss is 0.0": "console.a_loss_of_nothing_is_explained",
    "nothing is learned, all answers wrong": "faults.a_run_that_learns_nothing_says_why_once",
    "nothing more is learned": "watchdog.no_signal_has_three_reasons",
    "rewards do not differ": "watchdog.no_signal_has_three_reasons",
    "completions never end, or no longer": "watchdog.completions_that_never_ended_are_no_run_away",
    "the form was there and went": "watchdog.a_planted_cause_is_found_once_with_its_remedy",
    "all samples are alike": "watchdog.a_planted_cause_is_found_once_with_its_remedy",
    "completions turn to noise": "watchdog.a_planted_cause_is_found_once_with_its_remedy",
    "rewards up, accuracy down": "watchdog.rewards_that_rise_while_held_out_accuracy_falls_are_hacking",
    "nothing happens, or all breaks at once": "watchdog.a_learning_rate_far_off_is_told_at_once",
    "sampler and trainer differ": "watchdog.a_planted_cause_is_found_once_with_its_remedy",
    "a rollout server is gone": "vllm_engine.a_run_whose_server_stays_away_is_saved_and_goes_on",
    "NaN": "faults.an_update_that_is_not_finite_is_left_out_and_kept_for_inspection",
    "it diverged": "faults.a_run_that_diverged_goes_back_at_half_the_rate_and_in_the_end_stops",
    "a full disk, a folder that became read-only": (
        "faults.a_disk_that_is_full_and_then_read_only_costs_checkpoints_and_not_the_run"
    ),
    "stopped by Ctrl-C or SIGTERM": "scripts.ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on",
    "data that cannot be used": "data.a_bad_file_is_told_where_it_is_bad",
    "a folder that lacks what a model needs": "models.a_folder_without_a_tokenizer_or_weights_is_told",
    "a folder that cannot be written": (
        "faults.a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded"
    ),
    "a reward function hangs": (
        "rewards.a_function_that_hangs_leaves_its_group_undecided_and_the_rest_alone"
    ),
    "a reward function fails": (
        "scripts.a_broken_reward_stops_the_run_with_a_checkpoint_that_goes_on_once_it_is_mended"
    ),
    "a judge (`judge:URL`) is gone": "rewards.a_judge_that_is_down_stops_the_run_with_its_name",
    "many answers are undecided": "console.undecided_answers_are_told_where_there_are_any",
    "out of memory": "batches.a_single_sequence_that_does_not_fit_stops_the_run_with_the_remedy",
    "the folder is taken": "lock.a_folder_that_a_living_run_writes_is_refused",
    "other settings in the same folder": "scripts.another_configuration_in_the_same_folder_is_refused",
    "a checkpoint of other settings": (
        "folder.resume_from_a_checkpoint_of_another_configuration_is_refused_with_the_difference"
    ),
    "a checkpoint of an older Ponder": "run.a_checkpoint_of_another_version_is_refused",
    "a checkpoint of something else": "training.a_checkpoint_of_another_model_is_refused",
    "a tokenizer that is not the model's": "models.a_tokenizer_larger_than_the_embedding_is_refused",
    "a model with code of its own": "models.code_of_a_model_runs_only_where_it_is_trusted",
    "no GPU where one was asked for": "models.gpus_that_are_asked_for_have_to_be_there",
    "a damaged checkpoint": "checkpoint.damage_is_named_told_and_passed_over",
    "an export is refused": "export.an_export_that_lost_the_training_is_refused",
    "a chat template that neither takes our system prompt as a message nor before the question": (
        "prompts.a_template_that_takes_no_system_prompt_at_all_is_refused"
    ),
}


def rows():
    """The cells of the table: symptom, what is printed, what to do."""
    lines = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def code(cell):
    """What stands between backquotes."""
    return [text.replace("\\|", "|") for text in re.findall(r"`([^`]+)`", cell)]


@cache
def printed_texts():
    """All that each of the project's own files could print, without figures."""
    texts = []
    for file in ROOT.glob("**/*.py"):
        if file.relative_to(ROOT).parts[0] in ("tests", ".venv", ".venv-vllm", "benchmarks"):
            continue
        words = []
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.append(node.value)
        texts.append(" ".join(words))
    return texts


def test_every_row_has_its_test():
    assert [row[0] for row in rows()] == list(PLANTED)
    for name in PLANTED.values():
        file, _, test = name.partition(".")
        tree = ast.parse((ROOT / "tests" / f"test_{file}.py").read_text())
        assert f"test_{test}" in {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
        }, name


def test_a_function_hangs_as_long_as_the_table_says():
    assert re.findall(r"took longer than (\d+) s", TABLE) == [f"{DEADLINE_S:g}"]


def test_every_cause_of_watchdog_and_preflight_has_a_row_and_no_other():
    told = {text for row in rows() for text in code(row[1])}
    watched = {re.match(r"watchdog: (\w+)", text)[1] for text in told if text.startswith("watchdog: ")}
    assert watched == {*CHECKS, *CEILINGS, "learning_rate", "reward_hacking"}
    assert set(RUNAWAY) <= {text.removeprefix("watchdog: ") for text in told}
    looked_at = {re.match(r"preflight: (\w+)", text)[1] for text in told if text.startswith("preflight: ")}
    source = "".join((ROOT / name).read_text() for name in ("preflight.py", "rehearsal.py"))
    findings = set(re.findall(r'found\["(\w+)"\]|Finding\("(\w+)"', source))
    assert looked_at == {cause for pair in findings for cause in pair if cause}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_prints_what_is_printed_and_names_flags_that_exist(row):
    flags = {word for cell in row for text in code(cell) for word in re.findall(r"--(\w+)", text)}
    configs = (SFTConfig, GRPOConfig, EvaluateConfig, ExportConfig)
    assert flags <= {field.name for config in configs for field in dataclasses.fields(config)}
    for text in code(row[1]):
        # What a run fills in: figures, names, paths, and what stands in brackets.
        for piece in re.split(
            r"…|(?:watchdog|preflight): \w+|--\w+ ?\w*|\S*\d\S*|'[^']*'|\([^)]*\)?|loss -", text
        ):
            words = piece.split()
            assert any(all(word.strip(";:,") in text for word in words) for text in printed_texts()), piece
