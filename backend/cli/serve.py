"""`python -m backend serve|run`: the service, until it is asked to stop."""

import gc
import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from backend.errors import StartRefusedError

# Everything heavier is imported by the command that needs it, so that `--help` answers at once.
if TYPE_CHECKING:
    import socket

    import uvicorn
    from starlette.types import ASGIApp

    from backend.adapters.http.tls import Certificate
    from backend.settings import Settings

_SHUTDOWN_SECONDS: Final = 5
_HOST: Final = "127.0.0.1"
_PORT: Final = 8000

Host = Annotated[str, typer.Option(help="The address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="The TCP port to listen on; 0 takes a free one.")]
TlsCert = Annotated[
    Path | None,
    typer.Option(dir_okay=False, help="Serve by TLS: the certificate with its chain, in PEM."),
]
TlsKey = Annotated[Path | None, typer.Option(dir_okay=False, help="The certificate's private key, in PEM.")]
UnixSocket = Annotated[
    Path | None,
    typer.Option(dir_okay=False, help="Listen on a UNIX socket here, in place of an address and a port."),
]


def serve(
    host: Host = _HOST,
    port: Port = _PORT,
    unix_socket: UnixSocket = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Run the service."""
    from backend.adapters.http.unix_socket import listening_at
    from backend.settings import load_settings

    if unix_socket is not None and (host, port) != (_HOST, _PORT):
        raise StartRefusedError("--unix-socket takes the place of --host and --port; leave those out")
    if (tls_cert is None) != (tls_key is None):
        raise StartRefusedError("--tls-cert and --tls-key belong together; give both, or neither")
    if tls_cert is not None and unix_socket is not None:
        raise StartRefusedError("--unix-socket has no TLS; leave --tls-cert and --tls-key out")
    settings = load_settings()
    with _listener(host, port) if unix_socket is None else listening_at(unix_socket) as listener:
        _serve(settings, listener, tls=None if tls_cert is None or tls_key is None else (tls_cert, tls_key))


def run(port: Port = _PORT) -> None:
    """Make a hub under the state directory if there is none, bring it up and run the service (`make run`)."""
    from backend.cli.quickstart import prepare, try_it
    from backend.settings import load_settings

    settings = load_settings()
    # First of all: where nothing can be served, nothing is made.
    with _listener(_HOST, port) as listener:
        settings = prepare(settings, typer.echo)
        commands = try_it(f"http://127.0.0.1:{listener.getsockname()[1]}", settings.state_directory)
        _serve(settings, listener, f"\nTo try it, in another terminal:\n{commands}\n")


def _listener(host: str, port: int) -> "socket.socket":
    """Listen before anything else is done; raise StartRefusedError.

    Two processes may bind the same address as long as neither listens. Clients that connect before the
    service is ready wait for it.
    """
    import socket

    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as exc:
        raise StartRefusedError(
            f"{host} is no address of this host ({exc.strerror}); choose another --host"
        ) from exc
    # At `::` for IPv4 as well.
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address, family=family, dualstack_ipv6=both)
    except OSError as exc:
        reason = os.strerror(exc.errno or 0)
        raise StartRefusedError(
            f"{host} port {port} can't be listened on ({reason}); stop what holds it, or choose another one "
            "with --port (with make: PORT=8001)"
        ) from exc


def _serve(
    settings: "Settings", listener: "socket.socket", hint: str = "", tls: tuple[Path, Path] | None = None
) -> None:
    # Off until the service has started: it makes objects for thousands of peers, and all of them stay.
    gc.disable()
    from backend.adapters.http.http_protocol import answering_when_cancelled
    from backend.adapters.http.tls import Certificate
    from backend.adapters.logs import configure_logging
    from backend.composition import running_service
    from backend.main import create_app

    configure_logging(settings.log_level)
    certificate = None if tls is None else Certificate(*tls)
    # uvicorn handles both while it runs, and raises them again when it has shut down: status 0, no failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    # Outside of uvicorn's lifespan, which would log a refused start as a traceback.
    with running_service(settings) as service:
        app = answering_when_cancelled(create_app(settings, service))
        server = _server(settings, app, listener, certificate)
        # Frozen: the garbage collector never looks at the objects of the start again.
        gc.freeze()
        gc.enable()
        name = listener.getsockname()
        where = {"socket": name} if isinstance(name, str) else {"host": name[0], "port": name[1]}
        logging.getLogger(__name__).info("serving", extra=where | ({} if tls is None else {"tls": tls[0]}))
        for notice in service.access.notices:
            typer.echo(f"WARNING: {notice}", err=True)
        if hint:
            typer.echo(hint)
        server.run(sockets=[listener])


def _server(
    settings: "Settings", app: "ASGIApp", listener: "socket.socket", certificate: "Certificate | None"
) -> "uvicorn.Server":
    import uvicorn

    from backend.adapters.http.connections import Connections, divide_descriptors, raise_descriptor_limit
    from backend.adapters.http.http_protocol import BoundedProtocol
    from backend.adapters.http.tls import TlsServer

    backlog, most = divide_descriptors(raise_descriptor_limit())
    connections = Connections.within(
        most,
        settings.wireguard_max_connections,
        settings.wireguard_max_connections_per_source,
    )
    http = partial(BoundedProtocol, connections=connections, proxies=settings.wireguard_trusted_proxies)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        # Called as the class would be.
        http=cast("type[BoundedProtocol]", http),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=settings.log_level,
        access_log=settings.access_log,
        proxy_headers=False,
        server_header=False,
        backlog=backlog,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    if certificate is None:
        return uvicorn.Server(config)
    return TlsServer(config, listener, connections, certificate)
