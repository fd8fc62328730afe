"""A small OpenAI-compatible server on this machine, for tests of what asks one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def server(
    complete: Callable[[str], str], heard: list[str | None] | None = None, moved_to: str | None = None
) -> Iterator[str]:
    """An OpenAI-compatible server of one model called `tiny`, on a port of this machine; yields its address.

    Args:
        heard: the authorization of every request is added to it.
        moved_to: the list of models is at this server.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.hear()
            self.answer({"data": [{"id": "tiny"}]}, 302 if moved_to else 200)

        def do_POST(self) -> None:
            self.hear()
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if asked["model"] != "tiny":
                self.answer({"error": f"no model {asked['model']}"}, 404)
            elif self.path == "/v1/completions":
                self.answer({"choices": [{"text": complete(asked["prompt"])}]})
            else:
                text = complete(asked["messages"][0]["content"])
                self.answer({"choices": [{"message": {"content": text}}]})

        def hear(self) -> None:
            if heard is not None:
                heard.append(self.headers["Authorization"])

        def answer(self, document: Any, code: int = 200) -> None:
            with suppress(ConnectionError):  # who asked may have gone
                self.send_response(code)
                if moved_to and code == 302:
                    self.send_header("Location", moved_to + self.path)
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())

        def log_message(self, *words: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()
