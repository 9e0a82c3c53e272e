"""A connection to the one server that a command names: requests, repetitions, and their bounds.

Nothing here reads proxies from the environment, follows a redirection or asks for another host
than the URL's. A request is repeated after a passing fault: the server is busy (429, 5xx), the
connection was cut, or the answer ended early. Anything else is refused with the server's words."""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from diagnostics.core.errors import DiagnosticsError

log = logging.getLogger("diagnostics")
PASSING = (408, 425, 429, 500, 502, 503, 504, 529)
"""Answers after which the same request may succeed."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the first repetition, which double at each, and the most of them."""
SAID = 300
"""Characters of a server's own words that an error shows."""
SMALL = 4 * 2**20
"""Bytes that an answer without lists may have."""


class PassingFault(Exception):
    """A fault after which the same request may succeed; `wait` is what the server asked for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class Stopped(Exception):
    """The command ends, so that no request is repeated any more."""


@dataclass(frozen=True)
class Address:
    """Where a server is, as `--url` says it."""

    secure: bool
    host: str
    port: int | None
    path: str
    """Path of the interface, such as `/v1`, without a slash at its end."""

    @property
    def shown(self) -> str:
        """Host and port for messages."""
        return self.host + (f":{self.port}" if self.port else "")

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_address(url: str) -> Address:
    """Read the URL of a server.

    Raises:
        DiagnosticsError: It is no http or https URL of a host, or holds a name and a password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if "@" in parts.netloc:
        raise DiagnosticsError(
            "The URL of the server holds a name or a password. Leave it out, put the key into an"
            " environment variable, and name that with --api-key-env."
        )
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise DiagnosticsError(
            f"--url takes the address of a server, as http://localhost:8000/v1; got {url[:80]!r}."
        )
    return Address(parts.scheme == "https", host, port, parts.path.rstrip("/"))


class Server:
    """Asks one server, and repeats what failed in passing.

    Args:
        address: Where it is.
        key: Sent as a bearer token; None sends none.
        timeout: Seconds that a connection may be silent.
        retries: How often a request is repeated.
        stop: Set when the command ends.
        wait: Waits for some seconds; `stop.wait` where not given.
    """

    def __init__(
        self,
        address: Address,
        *,
        key: str | None = None,
        timeout: float = 600.0,
        retries: int = 6,
        stop: threading.Event | None = None,
        wait: Callable[[float], Any] | None = None,
    ):
        self.address, self.timeout, self.retries = address, timeout, retries
        self.stop = stop or threading.Event()
        self.wait = wait or self.stop.wait
        self._key = key
        self.repeated = 0
        """Requests that were repeated."""
        if key is not None and not address.secure and not address.is_loopback:
            log.warning(
                "the key goes to %s over http, where others can read it; use https", address.shown
            )

    def get(self, path: str) -> Any:
        """The JSON at a path, asked for once: a server that is not there is refused at once."""
        try:
            return self._once("GET", path, None, SMALL)
        except PassingFault as fault:
            raise DiagnosticsError(
                f"The server at {self.address.shown} gives no answer to {path} ({fault}). Start it,"
                " or mend --url."
            ) from fault

    def post(
        self,
        path: str,
        body: dict[str, Any],
        *,
        most: int,
        read: Callable[[Any], Any],
        what: str,
    ) -> Any:
        """Send a question until an answer can be read.

        Args:
            path: Path on the server.
            body: The question, as JSON.
            most: Bytes that the answer may have.
            read: Reads the answer; it raises `PassingFault` for a half one.
            what: What is asked about, for messages.

        Returns:
            What `read` returns.

        Raises:
            DiagnosticsError: The server refuses, or fails at every repetition.
            Stopped: The command ends.
        """
        for attempt in range(self.retries + 1):
            if self.stop.is_set():
                raise Stopped
            try:
                return read(self._once("POST", path, body, most))
            except PassingFault as fault:
                if attempt == self.retries:
                    raise DiagnosticsError(
                        f"The server at {self.address.shown} failed {attempt + 1} times at {what}:"
                        f" {fault}. What was answered is kept; give the same command again when the"
                        " server is well, or ask for less at once with --concurrency."
                    ) from fault
                self.repeated += 1
                self.wait(pause(attempt, fault.wait))
        raise AssertionError("a loop that returns or raises")

    def _once(self, method: str, path: str, body: dict[str, Any] | None, most: int) -> Any:
        """Send one request and return its JSON."""
        status, headers, content = self._exchange(method, path, body, most)
        said = content[: 4 * SAID].decode("utf-8", "replace")
        if status in PASSING:
            raise PassingFault(
                self._without_key(f"{status} {said[:SAID]}".strip()), _asked(headers)
            )
        if status != 200:
            raise self._refusal(status, path, said)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise PassingFault(
                f"an answer of {len(content)} bytes that ends early or is no JSON"
            ) from error

    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None, most: int
    ) -> tuple[int, Any, bytes]:
        """Status, headers and content of the answer to one request."""
        address = self.address
        kind = http.client.HTTPSConnection if address.secure else http.client.HTTPConnection
        connection = kind(address.host, address.port, timeout=self.timeout)
        headers = {"Accept": "application/json"}
        headers |= {"Content-Type": "application/json"} if body is not None else {}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key is not None else {}
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, headers)
            with connection.getresponse() as response:
                found = response.read(most + 1)
            promised = response.getheader("Content-Length") or ""
        except ssl.SSLCertVerificationError as error:
            raise DiagnosticsError(
                f"The certificate of {address.shown} cannot be trusted ({error.verify_message})."
                " Give the server one that this machine knows."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise PassingFault(f"{type(error).__name__}: {str(error)[:SAID]}") from error
        finally:
            connection.close()
        if len(found) > most:
            raise DiagnosticsError(
                f"The server at {address.shown} answered with more than {most:,} bytes, which is"
                " no answer to what was asked. Name the server of a language model with --url."
            )
        if promised.isdecimal() and len(found) < int(promised):
            raise PassingFault(f"{len(found)} of {int(promised)} bytes, then the connection ended")
        return response.status, response.headers, found

    def _refusal(self, status: int, path: str, said: str) -> DiagnosticsError:
        remedy = "Mend what it names"
        if status in (401, 403):
            remedy = "Put the server's key into an environment variable and name it: --api-key-env"
        elif status == 404:
            remedy = "Name the server's own address with --url, or the other --dialect"
        elif 300 <= status < 400:
            remedy = "It points elsewhere, and nothing is sent there. Name the final address: --url"
        elif "logprob" in said.lower():
            remedy = CAP
        elif "context length" in said.lower() or "max_model_len" in said.lower():
            remedy = "Start the server with a longer window (vLLM: --max-model-len)"
        return DiagnosticsError(
            self._without_key(
                f"The server at {self.address.shown} refused {path} with {status}"
                f" ({' '.join(said.split())[:SAID] or 'no reason given'}). {remedy}."
            )
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "(the key)") if self._key else text


CAP = (
    "A server lists at most as many tokens as it was started for: vLLM 20 unless it was started"
    " with `vllm serve MODEL --max-logprobs K`, OpenAI's completions 5. Start it with a higher"
    " number, or ask for fewer with --top-logprobs"
)
"""What to do about the longest list that a server gives."""


def pause(attempt: int, asked: float | None) -> float:
    """Seconds before a repetition: what the server asked for, or twice as long as the last one."""
    usual = FIRST_WAIT * 2**attempt
    return min(usual if asked is None else max(usual, asked), LONGEST_WAIT)


def _asked(headers: Any) -> float | None:
    """Seconds of a Retry-After header; None where there are none."""
    text = (headers.get("Retry-After") or "").strip()
    return float(text) if text.isdecimal() and len(text) < 10 else None
