"""Work that is worth nothing once the client has left."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

Result = TypeVar("Result")


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client of `request` leaves.

    The request's body must have been read before: a disconnect is noticed by receiving what comes after it.

    Raises:
        ClientDisconnect: the client left first.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
