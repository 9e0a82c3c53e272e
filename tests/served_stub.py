"""A server on the loopback that speaks each dialect from given numbers, faults included."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch

OWNERS = {"vllm": "vllm", "sglang": "sglang", "openai": "organization-owner"}


def of_model(model) -> Callable[[list[int]], np.ndarray]:
    """ln q of every token at every place of a sequence [L, V]; the first row predicts nothing."""

    def logprobs_LV(ids):
        with torch.no_grad():
            logits_LV = model(input_ids=torch.tensor([ids])).logits[0].double()
        found_LV = logits_LV.log_softmax(-1).numpy()
        return np.concatenate([np.full_like(found_LV[:1], np.nan), found_LV[:-1]])

    return logprobs_LV


class Stub:
    """A language model's server, as a context manager.

    Args:
        logprobs: Gives ln q [L, V] of a sequence.
        text: Gives a token's text.
        dialect: Which server it plays.
        faults: What goes wrong, one entry per question, in turn; None for nothing.
        models: Names of the models that it lists.
        cap: Longest list that it gives; a longer one is refused.
        key: The key that it wants.
        hold: Called before each answer with the number of the question.
    """

    def __init__(
        self,
        logprobs,
        text,
        *,
        dialect="vllm",
        faults=(),
        models=("teacher",),
        cap=20,
        key=None,
        hold=None,
        silently_cap=None,
    ):
        self.logprobs, self.text, self.dialect = logprobs, text, dialect
        self.faults, self.models, self.cap, self.key = list(faults), models, cap, key
        self.hold, self.silently_cap = hold, silently_cap
        self.asked: list[dict] = []
        self.headers: list[dict] = []
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()

    def __enter__(self) -> Stub:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                stub.headers.append(dict(self.headers))
                owner = OWNERS[stub.dialect]
                listed = [{"id": name, "owned_by": owner} for name in stub.models]
                known = self.path == "/v1/models"
                stub.send(self, 200 if known else 404, {"object": "list", "data": listed})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    number = len(stub.asked)
                    stub.asked.append(body)
                    stub.headers.append(dict(self.headers))
                    fault = stub.faults.pop(0) if stub.faults else None
                    stub.at_once += 1
                    stub.most_at_once = max(stub.most_at_once, stub.at_once)
                try:
                    if stub.hold is not None:
                        stub.hold(number)
                    stub.answer(self, body, fault)
                finally:
                    with stub.lock:
                        stub.at_once -= 1

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        # A client that was killed, or has gone on its own, is no fault of the server's.
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @staticmethod
    def send(handler, status, body, *, headers=(), short=0):
        """Send JSON; `short` bytes of it are promised and left out."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        for name, value in headers:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content[: len(content) - short])
        handler.close_connection = True

    def answer(self, handler, body, fault) -> None:
        if self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
            self.send(handler, 401, {"error": f"bad key {handler.headers.get('Authorization')}"})
        elif fault == "cut":
            handler.connection.close()
        elif fault == "429":
            self.send(handler, 429, {"error": "slow down"}, headers=[("Retry-After", "3")])
        elif fault == "503":
            self.send(handler, 503, {"error": "busy"})
        elif fault == "redirect":
            self.send(handler, 302, {}, headers=[("Location", "http://example.invalid/")])
        elif self.k_of(body) > self.cap:
            said = f"Requested prompt logprobs of {self.k_of(body)}, which is greater than max"
            self.send(handler, 400, {"error": {"message": f"{said} allowed: {self.cap}"}})
        else:
            said = {"vllm": self.vllm, "sglang": self.sglang, "openai": self.openai}[self.dialect](
                body, fault
            )
            content = json.dumps(said).encode()
            if fault == "torn":
                content = content[: len(content) // 2]
            self.send(handler, 200, content, short=20 if fault == "short" else 0)

    @staticmethod
    def k_of(body) -> int:
        return body.get("prompt_logprobs") or body.get("top_logprobs_num") or body.get("logprobs")

    def places(self, body, ids, fault) -> list:
        """Per token of the sequence: its own ln q, and its likeliest tokens with theirs."""
        k = min(self.k_of(body), self.silently_cap or 10**9)
        table_LV = self.logprobs(ids)
        found = [(None, [])]
        for place in range(1, len(ids)):
            row_V = table_LV[place].copy()
            if fault == "nan":
                row_V[:] = np.nan
            top = np.argsort(-row_V, kind="stable")[:k]
            listed = [(int(i), float(row_V[i])) for i in top]
            if fault == "sentinel":
                listed = [*listed[:-1], (listed[-1][0], -9999.0)]
            found.append((float(row_V[ids[place]]), listed))
        return found[:-1] if fault == "lacking" else found

    def vllm(self, body, fault):
        ids = body["prompt"]
        lists: list[dict | None] = []
        for token, (own, listed) in zip(ids, self.places(body, ids, fault)):
            if own is None:
                lists.append(None)
                continue
            entries = dict(listed) | ({token: own} if token not in dict(listed) else {})
            lists.append(
                {
                    str(i): {"logprob": value, "rank": rank + 1, "decoded_token": self.text(i)}
                    for rank, (i, value) in enumerate(entries.items())
                }
            )
        if fault == "doubled":
            lists = lists + lists
        return {"choices": [{"text": "x", "prompt_logprobs": lists}]}

    def sglang(self, body, fault):
        ids, start = body["input_ids"], body["logprob_start_len"]
        found = self.places(body, ids, fault)
        own = [[value, token, self.text(token)] for token, (value, _) in zip(ids, found)][start:]
        own[0][0] = None
        tops = [[[v, i, self.text(i)] for i, v in listed] for _, listed in found][start:]
        tops[0] = None
        meta = {"prompt_tokens": len(ids), "input_token_logprobs": own, "input_top_logprobs": tops}
        return {"text": "x", "meta_info": meta}

    def openai(self, body, fault):
        ids = body["prompt"]
        found = self.places(body, ids, fault)
        lists = {
            "tokens": [self.text(token) for token in ids[: len(found)]] + ["x"],
            "token_logprobs": [own for own, _ in found] + [-1.0],
            "top_logprobs": [
                {self.text(i): value for i, value in listed} if listed else None
                for _, listed in found
            ]
            + [{"x": -1.0}],
        }
        if fault == "lacking":
            lists = {name: values[:-1] for name, values in lists.items()}
        return {"choices": [{"text": "x", "logprobs": lists}]}
