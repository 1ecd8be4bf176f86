"""More tokens for a better answer: several samples, beams, a second look, a thought of the length one wants.

    model = load_chat_model("outputs/grpo/final")
    found = majority_vote(Query(model.engine, model.tokenizer, "12 + 34 + 56 = ?"), n=8)
    print(found.answer, found.score, found.tokens)

Torch-free, over any engine. A scorer sees the question and the candidates, and never a gold answer.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

import prompts
from inference import Engine, FinishReason, NextToken, SamplingParams, StreamedToken
from inference.reading import ThoughtSplitter, TokenDecoder
from rewards.verify import same_answers


@dataclass(frozen=True)
class Candidate:
    """One completion, read.

    Attributes:
        text: the prefilled `<think>` included.
        reasoning: the thought; None where there is none.
        answer: None where there is none.
        token_ids: of the completion.
        logprob: mean log-probability of the sampled tokens under the distribution they were drawn from; of
            beams and greedy answers under the model's own.
        self_certainty: see `inference.Completion`.
        stop_reason: see `inference.Completion.finish_reason`.
        score: what the search gave it, higher is better.
    """

    text: str
    reasoning: str | None
    answer: str | None
    token_ids: list[int]
    logprob: float
    self_certainty: float | None
    stop_reason: FinishReason
    score: float = 0.0


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: of the candidates.
        candidates: all, in the order in which they were sampled; beams from the best on.
        tokens: spent: all that were sampled, whether they came to stand in a candidate or not.
    """

    best: Candidate
    candidates: list[Candidate]
    tokens: int

    @property
    def answer(self) -> str | None:
        """The best candidate's."""
        return self.best.answer

    @property
    def reasoning(self) -> str | None:
        """The best candidate's."""
        return self.best.reasoning

    @property
    def score(self) -> float:
        """The best candidate's."""
        return self.best.score

    @property
    def stop_reason(self) -> FinishReason:
        """The best candidate's."""
        return self.best.stop_reason


Question = str | list[prompts.Message]
# One finite number a candidate, higher is better.
Scorer = Callable[[Question, Sequence[Candidate]], Sequence[float]]


def read_answer(text: str) -> str | None:
    """The text of the last `<answer>` block; without one, all that stands outside the thought."""
    parsed = prompts.parse_completion(text)
    return (parsed.answer or parsed.answer_text.strip()) or None


@dataclass(frozen=True)
class Query:
    """A question to a model, and how it is asked.

    Attributes:
        engine: answers.
        tokenizer: of its model.
        question: or a whole conversation.
        params: how to sample.
        seed: same seed, same result.
        read: takes the answer from a completion's text; `rewards.verify.final_answer` knows more forms.
    """

    engine: Engine
    tokenizer: Any
    question: Question
    params: SamplingParams = SamplingParams()
    seed: Sequence[int] = (0,)
    read: Callable[[str], str | None] = read_answer

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        return prompts.render_prompt(self.tokenizer, self.question)

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's tokens."""
        return prompts.encode_prompt(self.tokenizer, self.question)

    def sample(self, n: int) -> list[Candidate]:
        """Candidates, not scored yet.

        Raises:
            ValueError: none are asked for, or several that would all be the same.
        """
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}")
        if n > 1 and self.params.temperature == 0:
            raise ValueError(f"temperature must be above 0 for {n} samples, which would all be the same at 0")
        params = replace(self.params, self_certainty=True)
        [group] = self.engine.generate([self.prompt_ids], n, params, self.seed)
        return [
            self.candidate(c.token_ids, fmean(c.logprobs), c.finish_reason, c.self_certainty) for c in group
        ]

    def candidate(
        self,
        token_ids: list[int],
        logprob: float,
        stop_reason: FinishReason,
        self_certainty: float | None = None,
    ) -> Candidate:
        """Read a completion."""
        decoded = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        text = prompts.completion_prefix(self.prompt) + decoded
        reasoning = prompts.parse_completion(text).thought
        return Candidate(text, reasoning, self.read(text), token_ids, logprob, self_certainty, stop_reason)


# ------------------------------------------------------------------------------------------------------------
# Scorers


def mean_logprob(question: Question, candidates: Sequence[Candidate]) -> list[float]:
    """How likely the model found its own words: the mean log-probability of the sampled tokens."""
    return [candidate.logprob for candidate in candidates]


def self_certainty(question: Question, candidates: Sequence[Candidate]) -> list[float]:
    """How far the model was from not knowing what to say, token by token; see `inference.Completion`.

    Raises:
        ValueError: the engine does not measure it.

    Source: arXiv 2502.18581.
    """
    values = [candidate.self_certainty for candidate in candidates]
    if None in values:
        raise ValueError("self_certainty was not measured: this engine does not; use mean_logprob")
    return values


def _scored(query: Query, candidates: Sequence[Candidate], score: Scorer) -> list[Candidate]:
    """Candidates with their scores; a scorer that breaks its promise is a bug, and stops the search."""
    values = list(score(query.question, candidates))
    if len(values) != len(candidates) or not all(map(math.isfinite, values)):
        raise ValueError(f"the scorer must give {len(candidates)} finite numbers, got {values}")
    return [replace(c, score=float(value)) for c, value in zip(candidates, values, strict=True)]


def _rank(candidate: Candidate) -> tuple[bool, float]:
    """By score; whoever gives no answer stands behind all who do."""
    return candidate.answer is not None, candidate.score


def _result(candidates: list[Candidate]) -> SearchResult:
    """The best of samples, the first of equals."""
    tokens = sum(len(candidate.token_ids) for candidate in candidates)
    return SearchResult(max(candidates, key=_rank), candidates, tokens)


# ------------------------------------------------------------------------------------------------------------
# Several samples


def best_of_n(query: Query, n: int = 8, score: Scorer = mean_logprob) -> SearchResult:
    """Sample `n` candidates and take the one with the highest score among those that give an answer."""
    return _result(_scored(query, query.sample(n), score))


def majority_vote(
    query: Query,
    n: int = 8,
    same: Callable[[str, str], bool] = same_answers,
    weight: Scorer | None = None,
) -> SearchResult:
    """Sample `n` candidates and take the answer that most of them give.

    A candidate's score is the share of the votes that its answer got, of all votes, so a candidate without an
    answer votes against every answer. Between equal shares the answer that came first wins.

    Args:
        query: what is asked.
        n: voters.
        same: do two answers say the same? By itself 1/2 is 0.5; `operator.eq` compares texts.
        weight: what each vote counts, never negative; None counts all alike.

    Source: arXiv 2203.11171.
    """
    voters = _scored(query, query.sample(n), weight or (lambda question, candidates: [1.0] * n))
    if any(voter.score < 0 for voter in voters):
        raise ValueError(f"weights must be >= 0, got {[voter.score for voter in voters]}")
    total = sum(voter.score for voter in voters) or 1.0
    shares = [0.0] * n
    for group in group_answers([voter.answer for voter in voters], same):
        for place in group:
            shares[place] = sum(voters[i].score for i in group) / total
    return _result([replace(v, score=share) for v, share in zip(voters, shares, strict=True)])


def group_answers(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[list[int]]:
    """The places of answers that say the same, in the order of their first appearance; None is no answer."""
    groups: list[list[int]] = []
    for place, answer in enumerate(answers):
        if answer is None:
            continue
        for group in groups:
            if same(answer, answers[group[0]]):
                group.append(place)
                break
        else:
            groups.append([place])
    return groups


CHECK = "Check your solution step by step. Correct it if it is wrong. Then give the final answer again."


def self_correct(query: Query, score: Scorer = mean_logprob, check: str = CHECK) -> SearchResult:
    """Answer, let the model check its answer, and keep the better of the two by the scorer.

    Args:
        query: what is asked.
        score: sees the question as it was asked at first.
        check: what the model is told after its first completion.
    """
    [first] = query.sample(1)
    asked = query.question
    conversation = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    conversation = [
        *conversation,
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": check},
    ]
    [second] = replace(query, question=conversation, seed=(*query.seed, 1)).sample(1)
    return _result(_scored(query, [first, second], score))


# ------------------------------------------------------------------------------------------------------------
# Beams


class _Beam(NamedTuple):
    """The beginning of a completion, its log-probability, and whether it ends with an EOS."""

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    stops: bool = False

    def grown(self, token: NextToken) -> "_Beam":
        return _Beam((*self.token_ids, token.token_id), self.logprob + token.logprob, token.stops)

    def score(self, length_power: float) -> float:
        return self.logprob / len(self.token_ids) ** length_power


def beam_search(query: Query, width: int = 4, length_power: float = 1.0) -> SearchResult:
    """Grow the `width` likeliest beginnings side by side; a width of 1 is greedy.

    Deterministic, under the model's own distribution: of the parameters `max_completion_tokens` alone counts.
    A score is the log-probability over the length to the `length_power`. The search is over when `width`
    beams have ended and none that still grows scores higher as it stands, or at the limit, where what is cut
    competes with what has ended.

    Args:
        query: what is asked; its engine is an `inference.BranchingEngine`.
        width: beams.
        length_power: 0 prefers short completions, 1 compares means.

    Raises:
        ValueError: the engine cannot branch, or not so wide.
    """
    if width < 1:
        raise ValueError(f"width must be >= 1, got {width}")
    if not hasattr(query.engine, "branch"):
        name = type(query.engine).__name__
        raise ValueError(f"beam_search needs an engine that can branch, and {name} cannot; use best_of_n")
    beams, tokens = _grow_beams(query, width, length_power)
    candidates = []
    for beam in beams:
        reason = "stop" if beam.stops else "length"
        candidate = query.candidate(list(beam.token_ids), beam.score(1), reason)
        candidates.append(replace(candidate, score=beam.score(length_power)))
    candidates.sort(key=_rank, reverse=True)
    return SearchResult(candidates[0], candidates, tokens)


def _grow_beams(query: Query, width: int, length_power: float) -> tuple[list[_Beam], int]:
    """The beams, and how many tokens were chosen for them and for those that were given up."""

    def best(beams: list[_Beam]) -> list[_Beam]:
        return sorted(beams, key=lambda beam: -beam.score(length_power))[:width]

    limit = query.params.max_completion_tokens
    live, ended, tokens = [_Beam()], [], 0
    with closing(query.engine.branch(query.prompt_ids, width, limit)) as steps:
        likeliest = next(steps)
        while True:
            rows = enumerate(zip(live, likeliest, strict=True))
            grown = [(row, beam.grown(token)) for row, (beam, following) in rows for token in following]
            grown.sort(key=lambda pair: -pair[1].logprob)
            stopped = [beam for _, beam in grown[:width] if beam.stops]
            kept = [pair for pair in grown if not pair[1].stops][:width]
            live, ended = [beam for _, beam in kept], best(ended + stopped)
            tokens += len(stopped)
            if not live or (len(ended) == width and best(ended + live) == ended):
                return ended, tokens
            tokens += len(live)
            if len(live[0].token_ids) == limit:
                return ended + live, tokens
            likeliest = steps.send([(row, beam.token_ids[-1]) for row, beam in kept])


# ------------------------------------------------------------------------------------------------------------
# The length of a thought

WAIT = "\nWait"


def budget(
    query: Query, thinking_tokens: int | None = None, waits: int = 0, score: Scorer = mean_logprob
) -> SearchResult:
    """One completion whose thought has the length that one wants; see `budget_stream`.

    Words that were put in the model's mouth are no tokens spent, and have no part in `logprob`.
    """
    heard = _Listening(query.engine)
    completion = list(budget_stream(replace(query, engine=heard), thinking_tokens, waits))
    token_ids = [token.token_id for token in completion]
    logprob = fmean(token.logprob for token in heard.tokens) if heard.tokens else 0.0
    candidate = query.candidate(token_ids, logprob, completion[-1].finish_reason)
    [candidate] = _scored(query, [candidate], score)
    return SearchResult(candidate, [candidate], len(heard.tokens))


class _Listening:
    """An engine whose streamed tokens are kept."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: list[StreamedToken] = []

    def stream(self, *asked: Any) -> Iterator[StreamedToken]:
        with closing(self.engine.stream(*asked)) as tokens:
            for token in tokens:
                self.tokens.append(token)
                yield token


def budget_stream(
    query: Query, thinking_tokens: int | None = None, waits: int = 0
) -> Iterator[StreamedToken]:
    """A completion whose thought has the length that one wants, token by token, as `Engine.stream` gives one.

    A thought of `thinking_tokens` is closed. So many times as `waits` says, a thought that the model closes
    goes on with "Wait" in place of the tag. What is put in the model's mouth is `forced`, and counts towards
    `max_completion_tokens`; where nothing is, the completion is the one that `stream` gives. Closing the
    iterator stops the computation.

    Args:
        query: what is asked.
        thinking_tokens: of a thought at most, without its tags; None for any number.
        waits: how often the model has to think on.

    Source: budget forcing, arXiv 2501.19393, section 3.1.
    """
    if waits < 0 or (thinking_tokens is not None and thinking_tokens < 0):
        raise ValueError(f"thinking_tokens and waits must be >= 0, got {thinking_tokens} and {waits}")
    limit, prompt_ids = query.params.max_completion_tokens, query.prompt_ids
    thought = _Thought(query, math.inf if thinking_tokens is None else thinking_tokens, waits)
    for part in itertools.count():
        params = replace(query.params, max_completion_tokens=limit - len(thought.token_ids))
        seed = (*query.seed, part) if part else query.seed
        with closing(query.engine.stream([*prompt_ids, *thought.token_ids], params, seed)) as tokens:
            words = yield from thought.follow(tokens)
        forced = query.tokenizer.encode(words, add_special_tokens=False)
        room = limit - len(thought.token_ids)
        for place, token_id in enumerate(forced[:room], start=1):
            reason = "length" if place == room else None
            yield thought.took(StreamedToken(token_id, 0.0, reason, forced=True))
        if not words or len(forced) >= room:
            return


class _Thought:
    """Follows a completion through its tokens, and says when words have to be put into its thought."""

    def __init__(self, query: Query, most: float, waits: int) -> None:
        self.tokenizer, self.prefix = query.tokenizer, prompts.completion_prefix(query.prompt)
        self.most, self.waits = most, waits
        self.token_ids: list[int] = []  # of the completion so far
        self._read_again()

    def _read_again(self) -> None:
        """Read the completion from its beginning."""
        self.decoder, self.splitter, self.length = TokenDecoder(self.tokenizer), ThoughtSplitter(), 0
        self.splitter.feed(self.prefix)
        for token_id in self.token_ids:
            self._read(token_id)

    def _read(self, token_id: int) -> None:
        self.length += self.splitter.thinking
        self.splitter.feed(self.decoder.push(token_id))

    def follow(self, tokens: Iterator[StreamedToken]) -> Generator[StreamedToken, None, str]:
        """Yield what is streamed; return the words that have to follow it, empty at the end."""
        held: list[StreamedToken] = []  # may turn out to be the tag for which "Wait" is put
        while not (self.splitter.thinking and self.length >= self.most):
            token = next(tokens)
            was_thinking = self.splitter.thinking
            self._read(token.token_id)
            held.append(token)
            may_wait = self.waits and was_thinking and not token.finish_reason
            if may_wait and not self.splitter.thinking:
                return self._wait()
            if not (may_wait and self.splitter.held):
                yield from self._let_go(held)
            if token.finish_reason:
                return ""
        yield from self._let_go(held)
        return prompts.THINK_CLOSE.removeprefix(self.splitter.held)

    def took(self, token: StreamedToken) -> StreamedToken:
        """Take in what is forced."""
        self.token_ids.append(token.token_id)
        self._read(token.token_id)
        return token

    def _let_go(self, held: list[StreamedToken]) -> Iterator[StreamedToken]:
        while held:
            token = held.pop(0)
            self.token_ids.append(token.token_id)
            yield token

    def _wait(self) -> str:
        """What stands in place of a tag: words that its first token may have brought along, and "Wait"."""
        self.waits -= 1
        thought = self.splitter.thought
        self._read_again()
        return thought.removeprefix(self.splitter.thought) + WAIT
