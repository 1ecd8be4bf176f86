"""A server that speaks as vLLM does in development mode, and samples what a test can foresee.

Its weights are one number, the first of the final norm; a completion is [that number, the seed's remainder,
the prompt's length]. Started again it has 0 for it, and no mark.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors.torch import load_file

PRIME = 251


def expected(weights: int, seed: int, prompt: list[int]) -> list[int]:
    """What is sampled."""
    return [weights, seed % PRIME, len(prompt)]


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that wait to be taken; the default of 5 makes others wait a second


class ScriptedVLLM:
    """Listens on a port of this machine, which it keeps when it is started again.

    Attributes:
        asked: path and body of every request, since the beginning.
        before_completion: called with every request for one before it is answered; a test's way in.
        after_completion: called with it when the answer is worked out but not yet sent.
    """

    def __init__(self, vocabulary: int = 320, lora_rank: int = 0, **settings: Any) -> None:
        self.vocabulary, self.lora_rank = vocabulary, lora_rank
        self.settings = {"logprobs_mode": "processed_logprobs", "max_model_len": 512, "model": "scripted"}
        self.settings |= settings
        self.may_load, self.is_developing, self.takes_weights = True, True, True
        self.asked: list[tuple[str, Any]] = []
        self.before_completion: Callable[[dict], None] = lambda request: None
        self.after_completion: Callable[[dict], None] = lambda request: None
        self.in_flight = self.most_in_flight = 0
        self._port = 0
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.forget()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def paths(self) -> list[str]:
        return [urlsplit(path).path for path, _ in self.asked]

    def completions(self) -> list[dict[str, Any]]:
        return [body for path, body in self.asked if path == "/v1/completions" and "seed" in body]

    def forget(self) -> None:
        self.mark, self.weights, self.adapters = "default", 0, {}

    def start(self) -> None:
        self.forget()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
                status, answer = owner._answer(self.path, body)
                if self.server is owner._server:  # else it has died in the meantime
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(answer.encode())

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self._server = self._listen(Handler)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def _listen(self, handler: type) -> Listener:
        """Take the port, again where it had one: another program may have it for a moment."""
        for _ in range(50):
            with suppress(OSError):
                return Listener(("127.0.0.1", self._port), handler)
            time.sleep(0.1)
        return Listener(("127.0.0.1", self._port), handler)

    def stop(self) -> None:
        """Die: whoever waits for an answer gets none."""
        server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()

    def _answer(self, path: str, body: Any) -> tuple[int, str]:
        self.asked.append((path, body))
        route = urlsplit(path).path
        if not self.is_developing and not route.startswith(("/v1", "/health")):
            return 404, '{"detail": "Not Found"}'
        if route == "/v1/completions":
            return self._complete(body)
        if route == "/server_info":
            lora = {"max_lora_rank": self.lora_rank} if self.lora_rank else None
            told = {"vllm_config": {"model_config": self.settings, "lora_config": lora}}
            return 200, json.dumps(told | {"vllm_env": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": self.may_load}})
        if route == "/weight_info":
            return 200, json.dumps({"weight_version": self.mark})
        if route == "/update_weight_version":
            self.mark = body["new_version"]
        elif route == "/collective_rpc":
            if not self.takes_weights:
                return 500, '{"error": {"message": "size mismatch"}}'
            self.weights = read_weights(body["kwargs"]["weights_path"])
        elif route == "/v1/models":
            return 200, json.dumps({"data": [{"id": name} for name in ("scripted", *self.adapters)]})
        elif route == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = body["lora_path"]
            return 200, "Success: added"
        elif route == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return 200, "Success: removed"
        return 200, ""

    def _complete(self, body: dict[str, Any]) -> tuple[int, str]:
        if max(body["prompt"]) >= self.vocabulary:
            return 400, '{"error": {"message": "Token id is out of vocabulary"}}'
        if "seed" not in body:
            return 200, "{}"
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.before_completion(body)
        try:
            if body.get("model", "scripted") not in ("scripted", *self.adapters):
                return 404, '{"error": {"message": "The model does not exist"}}'
            token_ids = expected(self.weights, body["seed"], body["prompt"])
            choice = {
                "token_ids": token_ids,
                "finish_reason": "stop",
                "logprobs": {"token_logprobs": [-0.5] * 3},
            }
            self.after_completion(body)
            return 200, json.dumps({"choices": [choice]})
        finally:
            with self._lock:
                self.in_flight -= 1


def read_weights(folder: str) -> int:
    """The number in a folder that was handed over."""
    return int(load_file(Path(folder, "model.safetensors"))["model.norm.weight"][0])
