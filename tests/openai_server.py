"""A server that speaks the OpenAI completions API, in the manner of others, with an engine of ours behind."""

import json
import threading
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from inference import SamplingParams
from inference.chat import InTurn
from inference.reading import TokenDecoder

PASSED_ON = "{{ messages[0].content }}"


class OpenAIServer(ThreadingHTTPServer):
    """Answers through `engine`.

    Args:
        engine: computes; only its `stream` is used.
        tokenizer: of its model.
        manner: "vllm" takes and tells token ids; "llama.cpp" takes them and tells text; "mlx" takes text,
            tells token ids where it does not stream, and moves thoughts out of its text.
        models: the names that it lists; it serves the first.
        key: asked of every request.
        break_off_after: events of a stream; then the connection is cut.

    Attributes:
        asked: (path, body) of every request.
        steps: tokens computed so far.
        closed: streams that were left before their end.
    """

    daemon_threads = True

    def __init__(
        self, engine, tokenizer, manner="vllm", models=("served",), key=None, break_off_after=None
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine, self.tokenizer, self.manner, self.models = engine, tokenizer, manner, models
        self.key, self.break_off_after = key, break_off_after
        self.asked, self.steps, self.closed, self.turn = [], 0, 0, InTurn()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that is gone is no error."""

    def prompt_ids(self, body):
        """The prompt as this server reads it."""
        if "messages" in body:
            text = body["messages"][0]["content"]
            if body.get("chat_template_kwargs", {}).get("chat_template") != PASSED_ON:
                text = f"a template of its own {text}"
            return self.tokenizer.encode(text, add_special_tokens=False)
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=body.get("add_special_tokens", True))
        return None if self.manner == "mlx" else prompt

    def tokens(self, prompt, body):
        """The engine's tokens; closing them closes its stream."""
        temperature = body["temperature"]
        kept = {name: body[name] for name in ("top_k", "top_p", "min_p") if temperature}
        params = SamplingParams(body["max_tokens"], temperature, **kept)
        with closing(self.engine.stream(prompt, params, (body.get("seed", 0),))) as stream:
            try:
                while True:
                    with self.turn:
                        token = next(stream)
                        self.steps += 1
                    yield token
                    if token.finish_reason:
                        return
            except GeneratorExit:
                self.closed += 1
                raise


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.is_let_in():
            limit = {"max_model_len": 4096} if self.server.manner == "vllm" else {}
            self.say(200, {"data": [{"id": name, **limit} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        if not self.is_let_in():
            return
        prompt = self.server.prompt_ids(body)
        if prompt is None or body["model"] != next(iter(self.server.models), "unlisted"):
            self.say(404, {"error": "text input must be of type `str`"})
        elif "messages" in body and self.server.manner != "mlx":
            self.say(404, {"error": "no such path"})
        else:
            self.complete(prompt, body)

    def is_let_in(self):
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.say(401, {"error": {"message": "Unauthorized"}})
            return False
        return True

    def say(self, status, answer):
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def complete(self, prompt, body):
        with closing(self.server.tokens(prompt, body)) as tokens:
            choices = self.choices(tokens, body)
            if not body.get("stream"):
                self.say(200, self.whole(list(choices), prompt))
                return
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for number, choice in enumerate(choices):
                if number == self.server.break_off_after:
                    return
                self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

    def choices(self, tokens, body):
        """The completion as it grows, a choice a token."""
        decoder, is_thought = TokenDecoder(self.server.tokenizer), False
        is_chat, is_mlx = "messages" in body, self.server.manner == "mlx"
        for token in tokens:
            reason = token.finish_reason
            text = decoder.push(token.token_id) if reason != "stop" else ""
            if reason:
                text += decoder.flush()
            choice = {"index": 0, "text": text, "finish_reason": reason}
            if self.server.manner == "vllm" and body.get("return_token_ids"):
                choice["token_ids"] = [token.token_id]
            if is_mlx:
                choice["id"] = token.token_id if body.get("logprobs") is True else None
                was_thought, is_thought = is_thought, (is_thought or text == "<think>") and text != "</think>"
                if was_thought or is_thought:
                    text = "" if text in ("<think>", "</think>") else text
                    choice["text"] = ""
                if is_chat:
                    delta = {"reasoning": text} if was_thought or is_thought else {"content": text}
                    choice = {"delta": delta if text else {}, "finish_reason": reason}
            yield choice

    def whole(self, choices, prompt):
        choice = {"index": 0, "finish_reason": choices[-1]["finish_reason"]}
        choice["text"] = "".join(part.get("text", "") for part in choices)
        if "token_ids" in choices[0]:
            choice["token_ids"] = [token_id for part in choices for token_id in part["token_ids"]]
        if choices[0].get("id") is not None:
            choice["logprobs"] = {"content": [{"id": part["id"], "logprob": -1.0} for part in choices]}
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}


@contextmanager
def serving(*args, **options):
    """An `OpenAIServer` in a thread of its own, as long as it is needed."""
    server = OpenAIServer(*args, **options)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
