"""A real server of completions for tests, which speaks the OpenAI protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tiny_model import WORDS


class _Listener(ThreadingHTTPServer):
    # Reason: the kernel drops connections beyond the usual 5 that wait and retries them a second later.
    request_queue_size = 128


class Server:
    """A real server on 127.0.0.1 that answers like OpenAI's; `script` has other answers, one entry per request.

    An entry is (status, text, headers), "hang", "drip" (a byte of the answer at a time, without end) or "drip headers".
    `reply` makes an entry from a request (None: the usual answer); `route` does so first, from a path and a request.
    """

    def __init__(
        self,
        most: int = 100,
        reply: Callable[[dict], object] = lambda body: None,
        route: Callable[[str, dict], object] = lambda path, body: None,
    ):
        self.requests: list[tuple[str, dict, str | None]] = []
        self.script: list = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, body, self.headers.get("Authorization")))
                    step = outer.script.pop(0) if outer.script else route(self.path, body) or reply(body)
                if step == "hang":
                    outer.release.wait()
                    return
                if step in ("drip", "drip headers"):
                    self.wfile.write(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if step == "drip" else b""))
                    while not outer.release.wait(0.02):
                        self.wfile.write(b" " if step == "drip" else b"X: y\r\n")
                    return
                self.send(*(step or (200, json.dumps(outer.answer(body, most)), {})))

            def send(self, status, content, headers):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content.encode())), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content.encode())

            def do_GET(self):
                with outer.lock:
                    outer.requests.append((self.path, {}, self.headers.get("Authorization")))
                    step = route(self.path, {})
                self.send(*(step or (404, "", {})))

            def log_message(self, *args):
                """Log nothing."""

        self.release = threading.Event()
        self.server = _Listener(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *args: None  # clients that disconnect are part of the tests
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @staticmethod
    def answer(body: dict, most: int) -> dict:
        words = [WORDS[(body["seed"] + k) % len(WORDS)] for k in range(min(body["n"], most))]
        return {
            "choices": [
                {"message": {"content": f"{word} day"}, "finish_reason": "length" if word == "bad" else "stop"}
                for word in words
            ]
        }

    def close(self):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
