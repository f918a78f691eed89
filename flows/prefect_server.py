"""Prefect's server with SQLite transactions that wait for one another; `infra/serve.procfile` starts it.

    python -m flows.prefect_server --host 127.0.0.1 --port 4200

Prefect 3.8.8 begins transactions that read and then write as DEFERRED. If another transaction writes in between, SQLite
refuses the write at once ("database is locked") instead of waiting. The server tries the evaluation of an automation
four times without a pause, then drops the event, so that on a busy machine notifications and the detection of crashed
runs are lost (PrefectHQ/prefect #18934). An IMMEDIATE transaction waits up to 60 s for its turn. PostgreSQL is not
concerned.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.server.database.configurations import AioSqliteConfiguration
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


@asynccontextmanager
async def begin_immediately(
    _: AioSqliteConfiguration,
    session: AsyncSession,
    with_for_update: bool = False,  # noqa: ARG001 - the signature of the method that it replaces
) -> AsyncGenerator[AsyncSessionTransaction, None]:
    """Begin a transaction that waits for others; replaces `AioSqliteConfiguration.begin_transaction`."""
    from prefect.server.database.configurations import SQLITE_BEGIN_MODE

    token = SQLITE_BEGIN_MODE.set("IMMEDIATE")
    try:
        async with session.begin() as transaction:
            yield transaction
    finally:
        SQLITE_BEGIN_MODE.reset(token)


def main() -> None:
    """Run `prefect server start` with the arguments of this process."""
    parser = argparse.ArgumentParser(prog="python -m flows.prefect_server", description=__doc__)
    parser.epilog = "All options are those of `prefect server start`."
    parser.parse_known_args()
    from prefect.cli import app
    from prefect.server.database.configurations import AioSqliteConfiguration

    AioSqliteConfiguration.begin_transaction = begin_immediately
    sys.argv[1:1] = ["server", "start"]
    app()


if __name__ == "__main__":
    main()
