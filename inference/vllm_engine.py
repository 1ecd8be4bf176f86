"""Rollouts from vLLM servers, which live in an environment of their own: token ids in and out over HTTP, and
the policy's weights handed over in a folder that both sides see.
"""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import numpy as np
from torch import nn

from inference import Completion, SamplingParams
from inference.vllm_server import ADAPTER, WEIGHTS, EngineError, HandOver, Server, check_server, write_weights

IN_FLIGHT = 256  # requests to a server at once: about what vLLM decodes side by side
ATTEMPTS = 5  # at one completion: what a server breaks down over so often is no accident
PAUSE_S = 1.0  # between two looks at a server that is gone, or at whether anybody still wants completions
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512, math.inf)  # of adapters, that vLLM may be started for

Row = tuple[int, int]  # of prompt and sample


class Rollout:
    """What is left to sample, and by whom: a server's own prompts first, then what another cannot get done.

    Attributes:
        is_over: all is sampled, or given up.
        gone_since: when servers were lost that are not back yet (monotonic seconds).
        error: the last that a server was lost by.
        began: when (monotonic seconds).
        news: a completion; from a thread that has no more to do None, or what ended it.
    """

    def __init__(self, dealt: dict[Server, list[Row]]) -> None:
        """Begin with the rows that each server is dealt."""
        self.queues = {server: deque(rows) for server, rows in dealt.items()}
        self.unfinished = sum(map(len, dealt.values()))
        self.attempts: Counter[Row] = Counter()
        self.is_over = False
        self.gone_since: dict[Server, float] = {}
        self.error: Exception | None = None
        self.changed = threading.Condition()
        self.began = time.monotonic()
        self.news: SimpleQueue[tuple[Row, Completion] | BaseException | None] = SimpleQueue()

    def next(self, server: Server) -> Row | None:
        """What a server is to do now; waits while all is in hands. None: nothing any more."""
        with self.changed:
            while not self.is_over:
                queue = self.queues[server] or max(self.queues.values(), key=len)
                if queue:
                    return queue.popleft()
                self.changed.wait()
        return None

    def give_back(self, server: Server, row: Row, error: Exception) -> None:
        """Have a row done again, by whoever is first.

        Raises:
            EngineError: it was tried too often.
        """
        with self.changed:
            self.error = error
            self.attempts[row] += 1
            if self.attempts[row] == ATTEMPTS:
                raise EngineError(f"a completion was tried {ATTEMPTS} times, at last: {error}") from error
            self.queues[server].appendleft(row)
            self.changed.notify_all()

    def done(self) -> None:
        """One more row is sampled."""
        with self.changed:
            self.unfinished -= 1
        if not self.unfinished:
            self.end()

    def end(self) -> None:
        """Let everyone go."""
        with self.changed:
            self.is_over = True
            self.changed.notify_all()

    def seconds_gone(self, server: Server) -> float:
        """How long a server has been gone."""
        now = time.monotonic()
        return now - self.gone_since.get(server, now)

    def miss(self, server: Server, error: Exception) -> None:
        """A server is gone: wait a little, or less where something happens."""
        with self.changed:
            self.gone_since.setdefault(server, time.monotonic())
            self.error = error
            if not self.is_over:
                self.changed.wait(PAUSE_S)


class VLLMEngine:
    """Samples rollouts from vLLM servers; see `inference.Engine.generate`.

    Attributes:
        pushed_s: seconds that the last hand-over took.
        check: called with every completion, and every second in which none comes; raises where nobody wants
            the rest any more.
    """

    def __init__(
        self,
        urls: str,
        model: nn.Module,
        stop_token_ids: Sequence[int],
        folder: Path,
        context: int,
        timeout_s: float,
        is_main: bool = True,
        share: Callable[[Any], Any] = lambda given: given,
    ) -> None:
        """Get to know the servers.

        Args:
            urls: one or more addresses, separated by commas. A key is read from the environment
                (`http.KEY_VARIABLE`).
            model: that trains, as it is served at first.
            stop_token_ids: that end a completion.
            folder: seen by the servers under the same name; weights are handed over in it.
            context: tokens of the longest prompt and completion together.
            timeout_s: how long a server may be gone, or silent over one request.
            is_main: of several processes, the one that hands the weights over.
            share: gives every process what the main one has; all call it together.

        Raises:
            ValueError: a server that is not there, or could not sample for this model.
        """
        self.servers = [Server(url.strip(), timeout_s) for url in urls.split(",")]
        self.stop_token_ids, self.folder, self.timeout_s = list(stop_token_ids), folder, timeout_s
        self.is_main, self.share = is_main, share
        self.pushed_s = 0.0
        self.check: Callable[[], None] = lambda: None
        self._handed: HandOver | None = None
        self._kept: TemporaryDirectory | None = None
        vocabulary = model.get_input_embeddings().weight.shape[0]
        adapters = getattr(model, "peft_config", {})
        rank = max((adapter.r for adapter in adapters.values()), default=0)
        launch = f"make vllm-server MODEL={model.name_or_path or '…'}"
        launch += f" LORA_RANK={min(r for r in MAX_RANKS if r >= rank)}" if rank else ""
        for server in self.servers:
            try:
                check_server(server, vocabulary, context, rank)
            except (ConnectionError, EngineError) as error:
                raise ValueError(f"engine_url: {error} ({launch} starts one)") from error

    @property
    def told(self) -> str:
        """Where it samples, and what to beware of."""
        away = [server.url for server in self.servers if not server.is_here]
        told = "rollouts from " + ", ".join(server.url for server in self.servers)
        if away:
            told += f"; {', '.join(away)} in development mode runs code for whoever reaches it: wall it off"
        return told

    def push_weights(self, model: nn.Module) -> None:
        """Hand the weights over as they are now; every process calls it, and returns when that is done.

        A server that is gone gets them when it is back.

        Raises:
            EngineError: in every process, where the weights could not be written or a server will not have
                them.
        """
        began = time.perf_counter()
        told: HandOver | str | None = None
        if self.is_main:
            try:
                told = self._hand_over(model)
            except (EngineError, OSError) as error:
                told = str(error)
        told = self.share(told)
        if isinstance(told, str):
            raise EngineError(told)
        self._handed = told
        self.pushed_s = time.perf_counter() - began

    def _hand_over(self, model: nn.Module) -> HandOver:
        kept = TemporaryDirectory(prefix=".weights-", dir=self.folder.resolve())
        is_adapter = write_weights(kept.name, model)
        handed = HandOver((ADAPTER if is_adapter else WEIGHTS) + uuid4().hex[:12], kept.name)

        def offer(server: Server) -> None:
            try:
                server.take(handed, time.monotonic())
            except ConnectionError:
                return  # it is waited for when a completion is wanted

        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(offer, self.servers))
        if self._kept:
            self._kept.cleanup()
        self._kept = kept
        return handed

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: Sequence[int],
        first_prompt: int = 0,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample `n` completions of each prompt, from the weights handed over last.

        The same seed gives a server the same random numbers; whether that is the same text depends on what
        it computes beside it, as sums in vLLM do.

        Raises:
            EngineError: no server is left, and none came back in time; or one refuses.
        """
        dealt: dict[Server, list[Row]] = {server: [] for server in self.servers}
        for prompt in range(len(prompts)):
            server = self.servers[(first_prompt + prompt) % len(self.servers)]
            dealt[server] += [(prompt, sample) for sample in range(n)]
        rollout = Rollout(dealt)
        results: list[list[Completion | None]] = [[None] * n for _ in prompts]

        def request(row: Row) -> dict[str, Any]:
            return self._request(prompts[row[0]], params, (*seed, first_prompt + row[0], row[1]))

        working = min(IN_FLIGHT, math.ceil(len(prompts) * n / len(self.servers))) * len(self.servers)
        try:
            for server in islice(cycle(self.servers), working):
                # Where this is left early, nobody waits for what a server still does: neither does the
                # process to end.
                threading.Thread(target=self._work, args=(server, rollout, request), daemon=True).start()
            for (prompt, sample), completion in self._news(rollout, working):
                results[prompt][sample] = completion
                if on_completion:
                    on_completion(prompt, sample, completion)
        finally:
            rollout.end()
        if rollout.unfinished:
            raise EngineError(f"no server was back within {self.timeout_s:g} s: {rollout.error}")
        return results

    def _work(self, server: Server, rollout: Rollout, request: Callable[[Row], dict[str, Any]]) -> None:
        """Have a server sample one row after the other."""
        since = rollout.began
        try:
            while self._is_ready(server, rollout, since) and (row := rollout.next(server)):
                try:
                    completion = server.complete(request(row), self._handed)
                except ConnectionError as error:
                    since = time.monotonic()
                    rollout.give_back(server, row, error)
                else:
                    rollout.news.put((row, completion))
                    rollout.done()
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits for it
            rollout.news.put(error)
        else:
            rollout.news.put(None)

    def _news(self, rollout: Rollout, working: int) -> Iterator[tuple[Row, Completion]]:
        """What threads have sampled, until so many have no more to do."""
        while working:
            self.check()
            try:
                new = rollout.news.get(timeout=PAUSE_S)
            except Empty:
                continue
            if isinstance(new, BaseException):
                raise new
            if new is None:
                working -= 1
            else:
                yield new

    def _is_ready(self, server: Server, rollout: Rollout, since: float) -> bool:
        """Has a server the weights handed over last? Waits for one that is gone; False where that takes too
        long, or is no longer needed.
        """
        with server.returning:
            while not rollout.is_over and rollout.seconds_gone(server) <= self.timeout_s:
                try:
                    server.take(self._handed, since)
                except ConnectionError as error:
                    rollout.miss(server, error)
                else:
                    rollout.gone_since.pop(server, None)
                    return True
        return False

    def _request(self, prompt: Sequence[int], params: SamplingParams, key: tuple[int, ...]) -> dict[str, Any]:
        return {
            "prompt": list(prompt),
            "max_tokens": params.max_completion_tokens,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition_penalty": 1.0,  # which it would else take from the model's generation config
            "seed": int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1),
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": True,  # of its own: those above are the policy's
            "logprobs": 0,
            "return_token_ids": True,
        }
