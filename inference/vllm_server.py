"""A vLLM server in development mode, and the weights that are handed to it.

A hand-over has a name, with which the server is marked; one that is started again has lost the mark. It is
looked at before and after every completion, so that none counts that other weights had a part in.

Whoever reaches a server in development mode can have it run code: it belongs on this machine, or behind a
wall of your own.
"""

import math
import threading
import time
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from safetensors.torch import save_file
from torch import nn

from inference import Completion
from inference.http import get_json, post, post_json, read_key

LOOK_S = 60.0  # for a server to say how it is
WEIGHTS, ADAPTER = "ponder-weights-", "ponder-adapter-"  # how hand-overs are named


class EngineError(Exception):
    """Servers that cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class HandOver:
    """Weights to sample from.

    Attributes:
        name: no other hand-over of any run has it.
        folder: absolute, with the safetensors of a model or of an adapter.
    """

    name: str
    folder: str

    @property
    def is_adapter(self) -> bool:
        """It stands beside the server's own weights, in the place of none."""
        return self.name.startswith(ADAPTER)

    def fresh_mark(self) -> str:
        """What a server is marked with that has taken them: another each time, so that two equal marks,
        one seen before a completion and one after, leave no room for a restart between.
        """
        return f"{self.name}.{uuid4().hex[:8]}"

    def marks(self, mark: str) -> bool:
        """Is it the mark of a server that has taken these weights?"""
        return mark.startswith(f"{self.name}.")


def write_weights(folder: str, model: nn.Module) -> bool:
    """Write what a server reads: the weights, or of a model under an adapter the adapter alone.

    Returns:
        Whether it is an adapter.
    """
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder)
        return True
    model.save_pretrained(folder, max_shard_size="1TB")  # with several, an index would hide the head's file
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        # One tensor of two names is written once. A server on a CPU keeps a packed copy for the head, and
        # packs again only what is named: it would go on with the head that it began with (vLLM 0.32).
        (name,) = (name for name, module in model.named_modules() if module is head)
        save_file({f"{name}.weight": head.weight.detach()}, Path(folder, "head.safetensors"))
    return False


# ------------------------------------------------------------------------------------------------------------
# One server


class Server:
    """A vLLM server in development mode.

    Attributes:
        url: without a path.
        returning: held by whoever brings it up to date, or waits for it.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        """Name it; nothing is asked yet."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout_s = timeout_s
        self.returning = threading.Lock()
        self._key = read_key()
        self._lock = threading.Lock()
        self._seen = ("", -math.inf)  # the mark on its weights, and when that was asked (monotonic seconds)

    @property
    def is_here(self) -> bool:
        """Nobody outside this machine can reach the address."""
        host = urlsplit(self.url).hostname or ""
        try:
            return host == "localhost" or ip_address(host).is_loopback
        except ValueError:  # a name
            return False

    def get(self, path: str) -> Any:
        """Ask how it is; see `inference.http.get_json`.

        Raises:
            ConnectionError: it is gone.
            EngineError: it cannot say.
        """
        try:
            return get_json(self.url + path, self._key, LOOK_S, attempts=1)
        except ValueError as error:
            raise EngineError(str(error)) from error

    def tell(self, path: str, body: Any = None) -> None:
        """Have it do something; see `inference.http.post_json`."""
        post(self.url + path, body, self._key, self.timeout_s, attempts=1)

    def look(self, since: float) -> str:
        """The mark on its weights at some time from `since` on (monotonic seconds): one look serves all who
        ask meanwhile.

        Raises:
            ConnectionError: it is gone.
        """
        with self._lock:
            if self._seen[1] < since:
                now = time.monotonic()
                self._seen = (self.get("/weight_info")["weight_version"], now)
            return self._seen[0]

    def take(self, handed: HandOver, since: float) -> None:
        """Have it sample from these weights, if it was not seen to from `since` on.

        Raises:
            ConnectionError: it is gone.
            EngineError: it is there and will not have them.
        """
        if any(handed.marks(self.look(moment)) for moment in (since, time.monotonic())):
            return
        try:
            self._load(handed)
        except (ConnectionError, ValueError) as error:
            self.get("/health")
            raise EngineError(
                f"{self.url} is there, but did not take the weights in {handed.folder}: {error}. Does it see "
                "that folder, and serve the model that is trained? Start it again: it may be broken now"
            ) from error
        self.look(time.monotonic())

    def _load(self, handed: HandOver) -> None:
        if handed.is_adapter:
            adapter = {"lora_name": handed.name, "lora_path": handed.folder, "load_inplace": True}
            self.tell("/v1/load_lora_adapter", adapter)
            names = [card["id"] for card in self.get("/v1/models")["data"]]
            for name in names:
                if name.startswith(ADAPTER) and name != handed.name:
                    self.tell("/v1/unload_lora_adapter", {"lora_name": name})
        else:
            # Others' requests are let through to their end; what is cached of prompts is then forgotten.
            self.tell("/pause?mode=wait")
            reload = {"method": "reload_weights", "kwargs": {"weights_path": handed.folder}}
            self.tell("/collective_rpc", reload)
            self.tell("/resume")
        # Last, so that whoever is cut off before here has it all done again.
        self.tell("/update_weight_version", {"new_version": handed.fresh_mark()})

    def complete(self, request: dict[str, Any], handed: HandOver) -> Completion:
        """One completion, of these weights and no others.

        Raises:
            ConnectionError: it is gone, or was, or has other weights; it may be asked again.
            EngineError: it refuses, or answers without what is needed.
        """
        body = {**request, "model": handed.name} if handed.is_adapter else request
        refusal = answer = None
        before = self._seen[0]
        try:
            answer = post_json(self.url + "/v1/completions", body, self._key, self.timeout_s, attempts=1)
        except ValueError as error:
            refusal = error
        if not handed.marks(before) or self.look(time.monotonic()) != before:
            raise ConnectionError(
                f"{self.url} lost the weights that it was given; was it started again, or is it in use twice?"
            )
        if refusal:
            raise EngineError(f"a rollout was refused: {refusal}") from refusal
        return self._read(answer["choices"][0])

    def _read(self, choice: dict[str, Any]) -> Completion:
        token_ids, reason = choice.get("token_ids") or [], choice["finish_reason"]
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if reason not in ("stop", "length"):
            raise ConnectionError(f"{self.url} broke a completion off ({reason})")
        if not token_ids or len(token_ids) != len(logprobs):
            raise EngineError(f"{self.url} answered without tokens or log-probabilities; is it vLLM 0.32?")
        return Completion(token_ids, logprobs, reason)


def check_server(server: Server, vocabulary: int, context: int, lora_rank: int) -> None:
    """Refuse a server that could not sample for the policy, before anything is trained.

    Args:
        server: asked by requests of one token.
        vocabulary: rows of the policy's embedding.
        context: tokens of the longest prompt and completion together.
        lora_rank: of the policy's adapter, 0 for none.

    Raises:
        ConnectionError: it does not answer.
        EngineError: it is no vLLM in development mode, or not set up or loaded for this policy.
    """
    server.get("/health")
    try:
        told, mark = server.get("/server_info?config_format=json"), server.look(time.monotonic())
        settings, adapters = told["vllm_config"]["model_config"], told["vllm_config"]["lora_config"]
    except (EngineError, KeyError, TypeError) as error:
        raise EngineError(
            f"{server.url} is not vLLM 0.32 in development mode, VLLM_SERVER_DEV_MODE=1 ({error})"
        ) from error
    may_load = told["vllm_env"].get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    most = (adapters or {}).get("max_lora_rank", 0)

    def refuse_if(is_so: object, fault: str) -> None:
        if is_so:
            raise EngineError(f"{server.url} {fault}")

    refuse_if(
        settings["logprobs_mode"] != "processed_logprobs",
        f"tells {settings['logprobs_mode']}, in which the temperature is missing: it needs --logprobs-mode "
        "processed_logprobs",
    )
    refuse_if(
        settings["max_model_len"] < context,
        f"holds {settings['max_model_len']} tokens (--max-model-len), and max_prompt_tokens + "
        f"max_completion_tokens is {context}: give less, or more there",
    )
    refuse_if(
        lora_rank > most,
        f"takes adapters up to rank {most}, and lora_rank is {lora_rank}: it needs --enable-lora and a "
        "--max-lora-rank as large",
    )
    refuse_if(lora_rank and not may_load, "loads no adapters: it needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
    refuse_if(
        lora_rank and mark.startswith(WEIGHTS),
        "has the weights of another run, and an adapter needs those that it is trained on: start it again",
    )
    refuse_if(
        not _knows(server, vocabulary - 1) or _knows(server, vocabulary),
        f"serves {settings['model']}, whose vocabulary is not the policy's of {vocabulary} tokens: give it "
        "the model that is trained",
    )


def _knows(server: Server, token_id: int) -> bool:
    """Is a token in the server's vocabulary?"""
    try:
        server.tell("/v1/completions", {"prompt": [token_id], "max_tokens": 1})
    except ValueError:
        return False
    return True
