"""Many clients at once, over real sockets."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx

from tests.harness.requests import NO_TLS, PROVISION
from tests.harness.service import ServiceProcess


async def post_all(
    service: ServiceProcess, bodies: Iterator[dict[str, Any]], clients: int
) -> list[httpx.Response]:
    """Send the bodies over as many keep-alive connections, each as soon as its last answer is in."""
    answers: list[httpx.Response] = []

    async def client() -> None:
        async with httpx.AsyncClient(
            base_url=service.url, auth=service.local_admin, timeout=60.0, trust_env=False, verify=NO_TLS
        ) as session:
            for body in bodies:
                answers.append(await session.post(PROVISION, json=body))  # noqa: PERF401 - as they come

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers
