"""Serves the page until Ctrl-C."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from infra.demo import catalogue
from infra.demo.page import STYLE, build, theme
from infra.demo.studio import Studio
from tasks.drawing import given
from tasks.runtime.errors import StageError


def serve(model: str | None, host: str, port: int) -> None:
    """Serve the page until the process is interrupted.

    Raises:
        StageError: if there is no model, or if the port is in use.
    """
    with running(model, host, port) as address:
        print(f"demo: {address} ; Ctrl-C ends it", flush=True)
        threading.Event().wait()


@contextmanager
def running(model: str | None, host: str, port: int | None) -> Iterator[str]:
    """Serve the page inside the block and yield its address; without a port, a free one from 7860 on is taken.

    Raises:
        StageError: if there is no model, or if the port is in use.
    """
    entries = catalogue.entries(model)
    studio = Studio(frozenset(entry.name for entry in entries))
    studio.open(entries[0].name)
    blocks = build(studio, entries)
    blocks.queue(max_size=16, api_open=False)
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=False,
            show_error=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            max_file_size=given.MAX_BYTES,
            theme=theme(),
            css=STYLE,
        )
    except OSError:
        remedy = "name another one: make demo PORT=" + str((port or 0) + 1)
        raise StageError(f"port {port} of {host} cannot be used; {remedy}") from None
    try:
        yield address.rstrip("/")
    finally:
        for stop in list(studio.stops.values()):
            stop.set()
        # An open page keeps a connection, which would delay the end by 10 s; cutting it is an error in uvicorn's log.
        log, level = logging.getLogger("uvicorn.error"), logging.getLogger("uvicorn.error").level
        log.setLevel(logging.CRITICAL)
        blocks.server.force_exit = True
        blocks.close(verbose=False)
        log.setLevel(level)
