"""What a step of GRPO hands on: to the next one, and, where the run is stopped in its middle, to itself.

All of it is in `run.memory`, as plain values and tensors that a checkpoint can hold.
"""

from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import gather_object

from data import Problem
from inference import Completion
from rewards import Scores
from rollouts import Group, RolloutBatch, collate
from runs.config import UserError
from runs.folder import Run


@dataclass
class StepInHand:
    """A step between its rollout and its end.

    Attributes:
        groups: all that this process sampled.
        fresh: those of them that are learned from.
        batch: laid out, with replayed groups behind.
        updates: what those done so far told.
        seconds: that each phase took so far, by metric.
    """

    groups: list[Group]
    fresh: list[Group]
    batch: RolloutBatch
    updates: list[dict[str, Any]]
    seconds: dict[str, float]


def put_down_step(training: Any, hand: StepInHand) -> None:
    """Keep a step that the run is stopped in, of every process, for `take_up_step`."""
    state = {
        "groups": [group_state(group) for group in hand.groups],
        "fresh": [index for group in hand.fresh for index, g in enumerate(hand.groups) if g is group],
        "tensors": hand.batch.tensors | {"advantages": hand.batch.advantages},
        "updates": hand.updates,
        "seconds": hand.seconds,
    }
    training.run.memory["in_hand"] = gather_object([state])


def take_up_step(training: Any) -> StepInHand | None:
    """The step that the run was stopped in, None where it was between two."""
    states = training.run.memory.pop("in_hand", None)
    if states is None:
        return None
    state = states[training.accelerator.process_index]
    groups = [restore_group(group) for group in state["groups"]]
    fresh = [groups[index] for index in state["fresh"]]
    batch = collate_step(training, fresh)
    batch.tensors = dict(state["tensors"])
    batch.advantages = batch.tensors.pop("advantages")
    return StepInHand(groups, fresh, batch, state["updates"], state["seconds"])


def collate_step(training: Any, fresh: list[Group]) -> RolloutBatch:
    """What a process learns from: its own groups, and its share of those of the steps before."""
    config, accelerator = training.config, training.accelerator
    replayed = training.run.memory["replay"][accelerator.process_index :: accelerator.num_processes]
    learned = fresh + [restore_group(state) for state in replayed]
    return collate(learned, training.tokenizer.pad_token_id, config.overlong == "mask")


def group_state(group: Group) -> dict[str, Any]:
    """A group as plain values, without its problem's columns: what a checkpoint can hold."""
    return {
        "number": group.number,
        "answer_style": group.answer_style,
        "question": group.problem.question,
        "gold": group.problem.gold,
        "prompt_ids": list(group.prompt_ids),
        "completions": [asdict(completion) for completion in group.completions],
        "texts": group.texts,
        "scores": asdict(group.scores),
    }


def restore_group(state: dict[str, Any]) -> Group:
    """The group of a `group_state`."""
    completions = [Completion(**completion) for completion in state["completions"]]
    scores = Scores(**state["scores"])
    problem = Problem(state["question"], state["gold"])
    of_prompt = (state["number"], problem, state["prompt_ids"])
    return Group(*of_prompt, completions, state["texts"], scores, state["answer_style"])


# ------------------------------------------------------------------------------------------------------------
# Between steps


def take_over(run: Run, config: Any, critic: Any, reference: Any) -> None:
    """Begin `run.memory`, or take up what a checkpoint kept of it."""
    restored = run.memory
    run.memory = {
        "kl_coef": restored.get("kl_coef", config.kl_coef),
        "replay": restored.get("replay", []),
        "budget": restored.get("budget"),
        "sampler": restored.get("sampler"),
    }
    if in_hand := restored.get("in_hand"):
        if len(in_hand) != run.accelerator.num_processes:
            raise UserError(
                f"resume: the checkpoint was left in the middle of a step of {len(in_hand)} processes; go on "
                f"with as many, got {run.accelerator.num_processes}"
            )
        run.memory["in_hand"] = in_hand
    moving = {"critic": critic, "reference": reference if config.ref_sync_steps else None}
    for name, module in moving.items():
        if module is not None:
            if name in restored:
                module.load_state_dict(restored[name])
            run.memory[name] = module.state_dict()  # the module's own tensors, so as they are when saved


def hand_over(training: Any, metrics: dict[str, float], fresh: list[Group]) -> None:
    """Get the coefficient, the reference and the replay ready for the next step."""
    config, run = training.config, training.run
    run.memory |= {"budget": training.micro_batches.memory, "sampler": training.engine.memory}
    if config.kl_target and "policy/kl" in metrics:
        # As in 1909.08593, section 2.2: proportional, and never in a hurry.
        error = min(max(metrics["policy/kl"] / config.kl_target - 1, -0.2), 0.2)
        run.memory["kl_coef"] *= 1 + 0.1 * error
    if config.ref_sync_steps and run.step % config.ref_sync_steps == 0:
        with run.weights.whole() as model:
            training.reference.model.load_state_dict(model.state_dict())
    if config.replay_groups:
        latest = gather_object([group_state(group) for group in fresh if group.has_signal])
        run.memory["replay"] = (latest + run.memory["replay"])[: config.replay_groups]
