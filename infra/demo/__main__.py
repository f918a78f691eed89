"""`make demo`: a page on 127.0.0.1 that draws with the trained model or a registered one.

    python -m infra.demo [--model MODEL] [--port PORT]

gradio is an optional extra: `make install EXTRA=demo`.
"""

from __future__ import annotations

import argparse
import ipaddress
import signal
import sys
from importlib.util import find_spec

HOST, PORT = "127.0.0.1", 7860


def main() -> None:
    """Run the command line."""
    given = _parser().parse_args()
    if not is_loopback(given.host):
        if not given.allow_remote:
            sys.exit(
                f"demo: error: with --host {given.host} other machines reach the page, which has no passwords; add "
                "--allow-remote if that is meant"
            )
        print(f"demo: warning: other machines can reach this page through {given.host}; it has no passwords")
    if find_spec("gradio") is None:
        sys.exit("demo: error: the package gradio is not installed; run 'make install EXTRA=demo'")

    from tasks.runtime.stage import limit_openmp_spin

    limit_openmp_spin()
    from infra.demo import environment

    environment.prepare()
    from tasks.params import ParamsError
    from tasks.params.redaction import redacted
    from tasks.runtime.errors import StageError

    print("demo: loading", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # both end it as Ctrl-C does: temporary files are removed
        signal.signal(number, signal.default_int_handler)
    try:
        from infra.demo.server import serve

        serve(given.model, given.host, given.port)
    except (StageError, ParamsError) as error:
        sys.exit(f"demo: error: {redacted(str(error))}")
    except KeyboardInterrupt:
        print("\ndemo: ended")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infra.demo", description="Serve a page that draws with the trained model or a registered one."
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="what is chosen first: a folder in diffusers' layout, models:/NAME@ALIAS or models:/NAME/VERSION",
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}")
    parser.add_argument("--host", default=HOST, help=f"address to listen on; default {HOST}")
    parser.add_argument("--allow-remote", action="store_true", help="allow a --host that other machines can reach")
    return parser


if __name__ == "__main__":
    main()
