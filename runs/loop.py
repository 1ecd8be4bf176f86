"""The loop of a run, whatever it learns from: step, evaluate, save; and begin again where it diverged."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from memory import release_memory
from runs.config import RunStopped
from runs.folder import Run, Start
from runs.signals import StepStopped, stop_on_signal


@dataclass(frozen=True)
class Work:
    """What a loop needs of a script.

    Attributes:
        run: where it stands.
        step: does one step, and raises `StepStopped` where it left it in the middle.
        evaluate: on held-out problems.
        evaluates_first: a model that can do something already.
    """

    run: Run
    step: Callable[[], None]
    evaluate: Callable[[], None]
    evaluates_first: bool


def train(set_up: Callable[[Start], AbstractContextManager[Work]], start: Start) -> int:
    """Train until done, or told to stop; returns the exit code.

    Args:
        set_up: loads everything and goes on from a start; called again where the run has diverged.
        start: the first.

    Raises:
        RunStopped: the run cannot go on.
    """
    while True:
        with set_up(start) as work:
            train_on(work)
            if work.run.stop.agreed or not work.run.diverged:
                return work.run.finish()
            start = work.run.roll_back()
        work.run.accelerator.free_memory()
        del work
        release_memory()


def train_on(work: Work) -> None:
    """Step, evaluate and save until the run is done, told to stop, or has diverged.

    Raises:
        RunStopped: the run cannot go on; what is saved of it is told.
    """
    run, config, stop = work.run, work.run.config, work.run.stop
    with stop_on_signal(stop):
        try:
            evaluate_if_due(work)
            while run.step < config.total_steps and not stop.agreed and not run.enough:
                work.step()
                if run.diverged:
                    stop.agree()  # then what went wrong is not saved, and the same command goes back
                    return
                evaluate_if_due(work)
                is_last = run.step == config.total_steps or run.enough
                if stop.agree() or run.step % config.save_every == 0 or is_last:
                    run.checkpoint()
        except StepStopped:
            stop.agree()
            run.checkpoint()
        except RunStopped as error:
            raise RunStopped(f"{error}; {run.tell_saved()}") from error


def evaluate_if_due(work: Work) -> None:
    """Evaluate where a run stands, once: also where it was stopped while it did."""
    run, config = work.run, work.run.config
    if not config.eval_every or run.evaluated_step == run.step:
        return
    is_due = run.step % config.eval_every == 0 if run.step else work.evaluates_first
    if is_due or run.step == config.total_steps:
        work.evaluate()
