"""A real S3 server (moto) on the loopback, which can be told to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.waiting import PATIENCE

Fault = Callable[[dict[str, Any]], str | None]
"""Given a request's WSGI environment: None to serve it, or ``503``, ``403``, ``hang``, ``cut`` or ``flip``."""

_DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_SLOW = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"


class S3Server:
    """``options`` open it with fsspec; ``fault`` is asked before every request; ``requests`` lists what was asked."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str]] = []
        self._hung: dict[str, threading.Event] = {}
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.options: dict[str, Any] = {
            "key": "test",
            "secret": "test",
            "client_kwargs": {
                "endpoint_url": f"http://127.0.0.1:{self._server.server_port}",
                "region_name": "us-east-1",
            },
            "config_kwargs": {"retries": {"max_attempts": 0}, "read_timeout": PATIENCE, "connect_timeout": PATIENCE},
        }

    @property
    def impatient(self) -> dict[str, Any]:
        """``options`` of a client that gives up an answer after a second."""
        return {**self.options, "config_kwargs": {**self.options["config_kwargs"], "read_timeout": 1}}

    def close(self) -> None:
        self._server.shutdown()

    def bucket(self, name: str) -> str:
        """The address of a new bucket."""
        import boto3

        endpoint = self.options["client_kwargs"]["endpoint_url"]
        boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        ).create_bucket(Bucket=name)
        return f"s3://{name}"

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        self.requests.append((environ["REQUEST_METHOD"], path))
        if path in self._hung:
            self._hung[path].set()
        fault = self.fault(environ) if self.fault else None
        if fault == "403":
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [_DENIED]
        if fault == "503":
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [_SLOW]
        if fault == "hang":  # until it is asked again: then the client has given this one up
            self._hung[path] = threading.Event()
            self._hung[path].wait(PATIENCE)
        body = self._app(environ, start_response)
        return [_changed(b"".join(body), fault)] if fault in ("cut", "flip") else body


def _changed(body: bytes, fault: str) -> bytes:
    if fault == "cut":
        return body[: len(body) // 2]
    return body[:-1] + bytes([body[-1] ^ 1]) if body else body
