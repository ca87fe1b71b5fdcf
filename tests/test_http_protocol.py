"""What BoundedProtocol and TlsServer use of uvicorn's internals; pyproject.toml pins its minor version."""

import asyncio
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import httptools
import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from backend.adapters.http.http_protocol import BoundedProtocol
from backend.adapters.http.tls import TlsServer

# Each method that a class of ours overrides, with its arguments; uvicorn or the parser calls it.
OVERRIDDEN = {
    HttpToolsProtocol: {
        "__init__": ["config", "server_state", "app_state", "_loop"],
        "connection_made": ["transport"],
        "connection_lost": ["exc"],
        "eof_received": [],
        "shutdown": [],
        "data_received": ["data"],
        "on_headers_complete": [],
        "on_body": ["body"],
        "on_message_complete": [],
        "on_response_complete": [],
        "_start_asgi_task": ["cycle", "app"],
        "send_400_response": ["msg"],
    },
    FlowControl: {"__init__": ["transport"], "pause_reading": [], "resume_reading": []},
    uvicorn.Server: {"__init__": ["config"], "startup": ["sockets"], "shutdown": ["sockets"]},
}
# Each attribute that ours read or write.
ATTRIBUTES = {
    "HttpToolsProtocol": {
        *("config", "server_state", "loop", "transport", "flow", "server", "client"),
        *("pipeline", "scope", "headers", "cycle", "url"),
    },
    "RequestResponseCycle": {
        *("scope", "disconnected", "keep_alive", "message_event"),
        *("more_body", "response_started", "response_complete"),
    },
    "FlowControl": {"read_paused"},
    "ServerState": {"connections", "default_headers"},
    "Server": {"config", "server_state"},
}


@pytest.fixture
def made() -> dict[str, object]:
    """Return one of each of uvicorn's objects that ours work on, by its class's name."""

    async def app(scope: object, receive: object, send: object) -> None:
        pass

    async def make() -> list[object]:
        config = uvicorn.Config(app, http=HttpToolsProtocol, ws="none", log_config=None)
        protocol = HttpToolsProtocol(config, ServerState(), {}, asyncio.get_running_loop())
        # It makes the scope and the URL of a request.
        protocol.on_message_begin()
        arguments: dict[str, Any] = dict.fromkeys(inspect.signature(RequestResponseCycle).parameters)
        transport: Any = None
        return [
            *(protocol, RequestResponseCycle(**arguments), FlowControl(transport)),
            *(ServerState(), uvicorn.Server(config)),
        ]

    return {type(each).__name__: each for each in asyncio.run(make())}


def test_the_installed_uvicorn_is_the_pinned_one() -> None:
    pyproject = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    (pinned,) = (name for name in pyproject["project"]["dependencies"] if name.startswith("uvicorn"))
    match = re.fullmatch(r"uvicorn>=0\.(\d+),<0\.(\d+)", pinned)
    assert match, (
        f"{pinned} is no pin of one minor version of uvicorn, whose internals our protocol overrides"
    )
    assert uvicorn.__version__.startswith(f"0.{match[1]}."), (
        f"{pinned}, but {uvicorn.__version__} is installed"
    )
    assert int(match[2]) == int(match[1]) + 1


@pytest.mark.parametrize("owner", OVERRIDDEN, ids=lambda owner: str(owner.__name__))
def test_uvicorn_has_the_methods_that_we_override(owner: type) -> None:
    for name, arguments in OVERRIDDEN[owner].items():
        method = getattr(owner, name, None)
        assert method is not None, f"uvicorn has no {owner.__name__}.{name} any more, which we override"
        found = [argument for argument in inspect.signature(method).parameters if argument != "self"]
        assert found == arguments, (
            f"uvicorn's {owner.__name__}.{name} takes {found}, where we override it with {arguments}"
        )


@pytest.mark.parametrize("ours", [BoundedProtocol, TlsServer])
def test_the_list_of_overridden_methods_is_complete(ours: type) -> None:
    base = ours.__mro__[1]
    overridden = {
        name for name, value in vars(ours).items() if inspect.isfunction(value) and hasattr(base, name)
    }
    assert overridden == set(OVERRIDDEN[base]), f"{ours.__name__} overrides other methods than listed here"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_uvicorn_has_the_attributes_that_we_use(made: dict[str, object], name: str) -> None:
    missing = ATTRIBUTES[name] - vars(made[name]).keys()
    assert not missing, f"uvicorn's {name} has no {', '.join(sorted(missing))} any more, which our code uses"


def test_uvicorn_has_a_line_for_each_status_that_we_answer_with() -> None:
    for status in (408, 429, 431, 503):
        assert STATUS_LINE[status].startswith(b"HTTP/1.1 %d " % status), (
            f"uvicorn's STATUS_LINE has no whole line for {status}, which BoundedProtocol writes"
        )


def test_an_error_in_a_callback_of_the_parser_reaches_uvicorn_as_a_parser_error() -> None:
    class Refusing:
        def on_headers_complete(self) -> None:
            raise ValueError

    # BoundedProtocol refuses a head so, and uvicorn then calls send_400_response.
    with pytest.raises(httptools.HttpParserError):
        httptools.HttpRequestParser(Refusing()).feed_data(b"GET / HTTP/1.1\r\n\r\n")
