"""Completions of a run for a person to read: as they came, and those that say most."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from runs.figures import count
from runs.page import safe
from runs.records import read_ends, read_rows

SAMPLES = 4  # shown of the first step and of the last
PICKED = 3  # shown of each kind
TEXT_LIMIT = 4000  # characters shown of a completion


def show_samples(path: Path) -> str:
    """Completions of the first step and of the last, side by side, and those of the end that stand out.

    Args:
        path: of `rollouts.jsonl`; its ends are read.
    """
    head, tail = read_ends(path)
    if not head or not tail:
        return ""
    first = [row for row in head if row["step"] == head[0]["step"]]
    last = [row for row in tail if row["step"] == tail[-1]["step"]]
    columns = [first, last] if first[0]["step"] != last[0]["step"] else [first]
    shown = "".join(
        column(f"Step {rows[0]['step']}", map(_rollout, _one_a_group(rows)[:SAMPLES])) for rows in columns
    )
    steps = f"step {tail[0]['step']} to {tail[-1]['step']}"
    picked = "".join(column(title, map(_rollout, rows[:PICKED]), note) for title, rows, note in _picks(tail))
    return (
        "<h2>Completions</h2><p>One completion from each of a few groups, not picked by what it earned.</p>"
        f'<div class="pair">{shown}</div>'
        f"<h2>Completions that stand out</h2><p>Among the last {len(tail)}, {safe(steps)}.</p>"
        f'<div class="pair">{picked}</div>'
    )


def show_canaries(path: Path) -> str:
    """How the same problems were answered as the run went on.

    Args:
        path: of `canaries.jsonl`.
    """
    rows = read_rows(path)[0] if path.is_file() else []
    questions: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        questions.setdefault(row["question"], []).append(row)
    told = "".join(_canary(question, answers) for question, answers in questions.items())
    return f"<h2>The same problems through time</h2>{told}" if told else ""


def _canary(question: str, answers: Sequence[dict[str, Any]]) -> str:
    return beside(question, [article(row, [], f"Step {row['step']}") for row in answers])


def beside(question: str, articles: Sequence[str]) -> str:
    """Several completions of one problem, in one row, which scrolls where they are many."""
    return f'<p class="question">{safe(shorten(question))}</p><div class="beside">{"".join(articles)}</div>'


def article(row: dict[str, Any], facts: Sequence[str], title: str = "") -> str:
    """A completion as a card.

    Args:
        row: has `completion` and `correct`, and `question` unless there is a title.
        facts: told under it, after the verdict.
        title: above it, where the question stands elsewhere.
    """
    verdict = {True: "correct", False: "wrong"}.get(row["correct"], "undecided")
    over = f"<h3>{safe(title)}</h3>" if title else f'<p class="question">{safe(shorten(row["question"]))}</p>'
    under = f" {safe(shorten(' · '.join(facts)))}" if facts else ""
    return (
        f"<article>{over}<pre>{safe(shorten(row['completion']))}</pre>"
        f'<p><b class="{verdict}">{verdict}</b>{under}</p></article>'
    )


def _picks(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]], str]]:
    """Title, completions and a note of each kind that stands out, one completion a group."""

    def by(
        measure: Callable[[dict[str, Any]], float], among: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        return _one_a_group(sorted(among, key=measure, reverse=True))

    learned = [row for row in rows if row["advantage"] is not None]
    fooled = [row for row in learned if row["correct"] is False and row["advantage"] > 0]
    share = f"{count(len(fooled), 'completion')}: wrong by the strict judge, yet above the mean of its group."
    return [
        ("Best paid", by(lambda row: row["reward"], rows), ""),
        ("Worst paid", by(lambda row: -row["reward"], rows), ""),
        ("Most surprising", by(lambda row: abs(row["advantage"]), learned), "Furthest from its group."),
        ("Rewarded, and wrong", by(lambda row: row["reward"], fooled), share),
    ]


def column(title: str, articles: Iterable[str], note: str = "") -> str:
    """Completions of a kind under each other, to stand beside those of another."""
    told = f"<p>{safe(note)}</p>" if note else ""
    return f"<div><h3>{safe(title)}</h3>{told}{''.join(articles)}</div>"


def _one_a_group(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[Any, dict[str, Any]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["group"]), row)
    return list(groups.values())


def _rollout(row: dict[str, Any]) -> str:
    extracted = "nothing" if row["extracted"] is None else row["extracted"]
    parts = ", ".join(f"{name} {'–' if v is None else f'{v:g}'}" for name, v in row["rewards"].items())
    facts = [f"answer {extracted}", f"expected {row['gold']}", f"reward {row['reward']:.3g} ({parts})"]
    advantage = row["advantage"]
    facts.append("not learned from" if advantage is None else f"advantage {advantage:+.2f}")
    facts.append(count(row["tokens"], "token"))
    facts += ["cut off"] if row["finish_reason"] == "length" else []
    return article(row, facts)


def shorten(told: str) -> str:
    """A text of a model, or what is left of it where it is long."""
    if len(told) <= TEXT_LIMIT:
        return told
    half = TEXT_LIMIT // 2
    return f"{told[:half]}\n[… {len(told) - 2 * half} characters left out …]\n{told[-half:]}"
