"""The transport, against a real server in a thread."""

import json
import socket
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from visitor import free_port

from inference import http
from inference.http import get_json, post, post_json, stream_json


class Server(ThreadingHTTPServer):
    """Answers by `reply(handler, body)`, and remembers what was asked."""

    def __init__(self, reply):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.server.asked.append((self.path, dict(self.headers), json.loads(body or "null")))
                reply(self, json.loads(body or "null"))

            do_GET = do_POST

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


def say(handler, status, text, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(text.encode())


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        server = Server(reply)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(http, "LONGEST_PAUSE_S", 0.01)


def test_what_is_posted_arrives_and_what_is_answered_comes_back(serve):
    server = serve(lambda handler, body: say(handler, 200, json.dumps({"got": body})))
    assert post_json(f"{server.url}/x?a=1", {"ü": [1, None]}, key="secret") == {"got": {"ü": [1, None]}}
    ((path, headers, _),) = server.asked
    assert path == "/v1/x?a=1"
    assert headers["Authorization"] == "Bearer secret"
    assert get_json(f"{server.url}/models") == {"got": None}
    assert "Authorization" not in server.asked[1][1]


def test_an_empty_answer_is_none(serve):
    server = serve(lambda handler, body: say(handler, 200, ""))
    assert get_json(f"{server.url}/health") is None


def test_an_answer_that_need_be_no_json_comes_as_it_is(serve):
    server = serve(lambda handler, body: say(handler, 200, f"Success: {body}"))
    assert post(server.url, [1]) == b"Success: [1]"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_cannot_answer_now_is_asked_again(serve, status):
    def reply(handler, body):
        say(handler, 200 if len(server.asked) == 3 else status, "[1]")

    server = serve(reply)
    assert post_json(server.url, {}) == [1]
    server.asked.clear()
    with pytest.raises(
        ConnectionError, match=rf"{server.url} gave no answer in 2 attempts \({status} .*running"
    ):
        post_json(server.url, {}, attempts=2)
    assert len(server.asked) == 2


def test_a_server_that_comes_up_late_is_waited_for(monkeypatch):
    monkeypatch.setattr(http, "LONGEST_PAUSE_S", 0.1)
    port = free_port()
    with pytest.raises(ConnectionError, match=rf"127.0.0.1:{port}/v1 gave no answer in 1 attempts .*refused"):
        get_json(f"http://127.0.0.1:{port}/v1", attempts=1)
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(get_json(f"http://127.0.0.1:{port}/v1", attempts=50))
    )
    asking.start()
    time.sleep(0.2)
    with socket.create_server(("127.0.0.1", port)) as listener:
        peer, _ = listener.accept()
        with peer:
            peer.recv(1000)
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n7")
            asking.join()
    assert answers == [7]


def test_a_server_that_dies_while_it_answers_is_told(serve):
    def reply(handler, body):
        say(handler, 200, '{"half":', **{"Content-Length": "100"})

    server = serve(reply)
    with pytest.raises(ConnectionError, match="no answer in 2 attempts"):
        post_json(server.url, {}, attempts=2)
    assert len(server.asked) == 2


def test_a_silent_server_is_given_up_and_not_asked_again(serve):
    over = threading.Event()
    server = serve(lambda handler, body: over.wait(5))
    try:
        with pytest.raises(ConnectionError, match="silent for too long"):
            post_json(server.url, {}, timeout_s=0.1)
    finally:
        over.set()
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, '{"error": {"message": "top_k\\u001b[2J is odd"}}', r"400 Bad Request: top_k \[2J is odd; "),
        (400, '{"error": "Unhappy"}', r"400 Bad Request: Unhappy; "),
        (401, "no", r"401 Unauthorized: no; .*PONDER_API_KEY"),
        (404, "<html>", r"404 Not Found: <html>; .*up to its /v1"),
        (302, "", r"302 Found"),
        (200, "<html>hello", r"something else than JSON: <html>hello"),
        (400, "x" * 10_000, r"400 Bad Request: x{300}…;"),
    ],
)
def test_a_refusal_is_told_at_once_with_what_was_said(serve, status, body, message):
    server = serve(lambda handler, _: say(handler, status, body, Location="http://198.51.100.7/"))
    for ask in (post_json, lambda *args, **options: next(stream_json(*args, **options))):
        if status == 200 and ask is not post_json:
            continue
        server.asked.clear()
        with pytest.raises(ValueError, match=rf"{server.url} answered.*{message}") as refusal:
            ask(server.url, {}, key="secret")
        assert "secret" not in str(refusal.value)
        assert len(server.asked) == 1


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match=url):
        post_json(url, {})


def test_a_key_that_no_header_can_hold_is_refused_unseen():
    for key in ("two\nlines", "schlüssel"):
        with pytest.raises(ValueError, match="PONDER_API_KEY") as refusal:
            post_json("http://127.0.0.1:9/v1", {}, key=key)
        assert key.split()[0] not in str(refusal.value)


# ------------------------------------------------------------------------------------------------------------
# Streams


def send_events(handler, events, is_chunked):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    if is_chunked:
        handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for event in events:
        data = event.encode()
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if is_chunked else data)


@pytest.mark.parametrize("is_chunked", [True, False])
def test_events_come_one_by_one_whatever_stands_between(serve, is_chunked):
    events = [": keep\n\n", 'event: x\r\ndata: {"a": 1}\r\n\r\n', 'data:[2,"ü"]\n', "\n", "data: [DONE]\n\n"]
    server = serve(lambda handler, body: send_events(handler, [*events, "data: 3\n\n"], is_chunked))
    assert list(stream_json(server.url, {})) == [{"a": 1}, [2, "ü"]]


def test_an_event_is_there_before_the_next_is_sent(serve):
    seen = threading.Event()

    def events():
        yield "data: 1\n\n"
        assert seen.wait(5)
        yield "data: 2\n\ndata: [DONE]\n\n"

    server = serve(lambda handler, body: send_events(handler, events(), True))
    with closing(stream_json(server.url, {})) as stream:
        assert next(stream) == 1
        seen.set()
        assert list(stream) == [2]


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_stream_that_breaks_off_is_told_and_not_begun_again(serve, is_chunked):
    server = serve(lambda handler, body: send_events(handler, ["data: 1\n\n"], is_chunked))
    stream = stream_json(server.url, {})
    assert next(stream) == 1
    with pytest.raises(ConnectionError, match=rf"{server.url} broke off in the middle"):
        next(stream)
    assert len(server.asked) == 1


def test_a_stream_is_asked_for_again_until_it_begins(serve):
    def reply(handler, body):
        if len(server.asked) < 3:
            return say(handler, 503, "")
        return send_events(handler, ["data: 1\n\n", "data: [DONE]\n\n"], True)

    server = serve(reply)
    assert list(stream_json(server.url, {})) == [1]


def test_closing_a_stream_closes_the_connection(serve):
    gone = threading.Event()

    def events():
        try:
            while True:
                yield "data: 1\n\n"
                time.sleep(0.005)
        finally:
            gone.set()

    def reply(handler, body):
        with closing(events()) as endless:
            try:
                send_events(handler, endless, True)
            except OSError:
                handler.close_connection = True

    server = serve(reply)
    stream = stream_json(server.url, {})
    assert next(stream) == 1
    assert not gone.is_set()
    stream.close()
    assert gone.wait(2)
