"""Requests to a server that speaks HTTP and JSON, by the standard library alone.

A request goes to the host that was named and to no other: no redirect is followed and no proxy asked, so that
a key reaches nobody else.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, TypeVar
from urllib.parse import urlsplit

KEY_VARIABLE = "PONDER_API_KEY"  # the environment variable with the key that a server may ask for

CONNECT_S = 10.0  # to be let in; an answer may take longer
LONGEST_PAUSE_S = 8.0  # between two attempts
SHOWN_CHARACTERS = 300  # of what a server said, in a message

Result = TypeVar("Result")


class RefusedError(ValueError):
    """The server will not do what was asked; the message says what it said."""


def read_key() -> str | None:
    """The key in the environment, None where there is none."""
    return os.environ.get(KEY_VARIABLE, "").strip() or None


def get_json(url: str, key: str | None = None, timeout_s: float = 60.0, attempts: int = 5) -> Any:
    """Ask for what is at `url`; see `post_json`."""
    return _decode(url, _whole_answer("GET", url, None, key, timeout_s, attempts))


def post_json(
    url: str, body: Any, key: str | None = None, timeout_s: float = 600.0, attempts: int = 5
) -> Any:
    """Post `body` and return the answer, None where it is empty.

    Args:
        url: of what is asked, scheme and path included.
        body: anything that JSON can hold.
        key: sent as a bearer token; never part of a message.
        timeout_s: for which the server may be silent; where this runs out, nothing is tried again.
        attempts: tries, with longer and longer pauses, where nobody listens, the server breaks off, or it
            answers 429 or 5xx.

    Raises:
        ConnectionError: no whole answer came.
        RefusedError: the server said no, and would say it again.
        ValueError: its answer is no JSON; or no such address or key can be.
    """
    return _decode(url, post(url, body, key, timeout_s, attempts))


def post(url: str, body: Any, key: str | None = None, timeout_s: float = 600.0, attempts: int = 5) -> bytes:
    """Post `body` and return the answer as it came, JSON or not; see `post_json`."""
    return _whole_answer("POST", url, body, key, timeout_s, attempts)


def stream_json(
    url: str, body: Any, key: str | None = None, timeout_s: float = 600.0, attempts: int = 5
) -> Iterator[Any]:
    """Post `body` and yield the answer's server-sent events, one JSON value each, up to `[DONE]`.

    Closing the iterator closes the connection, by which a server sees that it may stop. What has begun is not
    tried again. Arguments and errors are those of `post_json`.
    """
    with ExitStack() as stack:
        response = _patiently(
            lambda: stack.enter_context(_exchange("POST", url, body, key, timeout_s)), url, attempts
        )
        while True:
            try:
                line = response.readline()
            except (OSError, HTTPException) as error:
                raise _broken_off(url, error) from error
            if not line:
                raise _broken_off(url, "the stream has no end")
            field, _, value = line.partition(b":")
            if field != b"data":  # a comment that keeps the connection alive, or the line between two events
                continue
            if value.strip() == b"[DONE]":
                return
            yield _decode(url, value)


# ------------------------------------------------------------------------------------------------------------


class _PassingError(Exception):
    """The server could not answer now."""


def _whole_answer(
    method: str, url: str, body: Any, key: str | None, timeout_s: float, attempts: int
) -> bytes:
    def ask() -> bytes:
        with _exchange(method, url, body, key, timeout_s) as response:
            return response.read()

    return _patiently(ask, url, attempts)


def _patiently(request: Callable[[], Result], url: str, attempts: int) -> Result:
    for attempt in range(1, attempts + 1):
        try:
            return request()
        except TimeoutError as error:
            raise ConnectionError(
                f"{url} was silent for too long; is the server overloaded, and is the address right?"
            ) from error
        except (OSError, HTTPException, _PassingError) as error:
            if attempt == attempts:
                raise ConnectionError(
                    f"{url} gave no answer in {attempts} attempts ({_told(error)}); is the server running, "
                    "and is the address right?"
                ) from error
        time.sleep(min(LONGEST_PAUSE_S, 0.25 * 2**attempt))
    raise ValueError(f"attempts must be >= 1, got {attempts}")


@contextmanager
def _exchange(method: str, url: str, body: Any, key: str | None, timeout_s: float) -> Iterator[HTTPResponse]:
    """Send a request and hand over the answer, which was granted but not yet read."""
    connection, path = _connection(url, timeout_s)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if key:
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"the key holds a character that no key can have; see {KEY_VARIABLE}")
        headers["Authorization"] = f"Bearer {key}"
    with closing(connection):
        connection.connect()
        connection.sock.settimeout(timeout_s)
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        with connection.getresponse() as response:
            if not 200 <= response.status < 300:
                raise _refusal(url, response)
            yield response


def _connection(url: str, timeout_s: float) -> tuple[HTTPConnection, str]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"the port of {url!r} is no number up to 65535") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a server; give one such as http://127.0.0.1:8000/v1")
    make = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return make(parts.hostname, port, timeout=min(CONNECT_S, timeout_s)), path


def _refusal(url: str, response: HTTPResponse) -> Exception:
    said = f"{response.status} {response.reason}: {_shown(response.read())}"
    if response.status == 429 or response.status >= 500:
        return _PassingError(said)
    hint = "the server's log may say more"
    if response.status in (401, 403):
        hint = f"put the server's key into the environment variable {KEY_VARIABLE}"
    elif response.status == 404:
        hint = "is that the address of such a server, up to its /v1?"
    return RefusedError(f"{url} answered {said}; {hint}")


def _decode(url: str, text: bytes) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        raise ValueError(f"{url} answered with something else than JSON: {_shown(text)}") from error


def _shown(text: bytes) -> str:
    """What a server said, on one line and short: its error's message where it keeps to the usual form."""
    said = text.decode("utf-8", errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        error = json.loads(said)["error"]
        said = error["message"] if isinstance(error, dict) else error
    said = "".join(c if c.isprintable() else " " for c in " ".join(str(said).split()))
    return said if len(said) <= SHOWN_CHARACTERS else said[:SHOWN_CHARACTERS] + "…"


def _told(error: object) -> str:
    return str(error) or type(error).__name__


def _broken_off(url: str, why: object) -> ConnectionError:
    return ConnectionError(
        f"{url} broke off in the middle of its answer ({_told(why)}); is the server alive?"
    )
