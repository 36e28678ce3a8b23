"""What reaches the Studio's pages and what does not, asked over ASGI without a socket."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from dittocache.studio.access import Access, access_for
from dittocache.studio.safety import SafetyMiddleware

LOCAL = access_for("127.0.0.1", 8080)
OPEN = access_for("0.0.0.0", 8080)
HOST = {"host": "localhost:8080"}
FROM_CHAT = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


async def _page(request: Request) -> Response:
    return PlainTextResponse(f"page {len(await request.body())} {dict(request.query_params)}")


async def _own_policy(request: Request) -> Response:
    return PlainTextResponse("report", headers={"Content-Security-Policy": "sandbox"})


async def _socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


def _client(access: Access, max_body_bytes: int = 100) -> TestClient:
    routes = [
        Route("/", _page, methods=["GET", "POST"]),
        Route("/deep/page", _page),
        Route("/report", _own_policy),
        WebSocketRoute("/socket", _socket),
    ]
    app = SafetyMiddleware(Starlette(routes=routes), access, max_body_bytes)
    return TestClient(app, base_url="http://localhost:8080", follow_redirects=False)


def _socket_opens(client: TestClient, headers: Mapping[str, str]) -> bool:
    try:
        with client.websocket_connect("/socket", headers=dict(headers)) as socket:
            return socket.receive_text() == "hello"
    except WebSocketDisconnect as refused:
        assert refused.code == 1008
        return False


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:8080", "[::1]:8080", "LOCALHOST:8080"])
def test_this_machine_needs_no_token(host: str) -> None:
    assert _client(LOCAL).get("/", headers={"host": host}).text.startswith("page")
    assert _socket_opens(_client(LOCAL), {"host": host})


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.5:8080", ""]
    + ["localhost:80@evil.example", "[::1].evil.example", "[::1", "localhost:x"],
)
def test_a_name_that_a_hostile_name_server_could_give_is_refused(host: str) -> None:
    """DNS rebinding: the page of evil.example, whose name now leads to 127.0.0.1, may not read the Studio."""
    client = _client(LOCAL)
    refused = client.get("/", headers={"host": host})
    assert refused.status_code == 421
    assert "--allow-host" in refused.text
    assert not _socket_opens(client, {"host": host})


def test_a_name_can_be_allowed() -> None:
    access = access_for("127.0.0.1", 8080, names=["Gpu-Box.example"])
    assert _client(access).get("/", headers={"host": "gpu-box.example"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://localhost:9999"},
        {"origin": "null"},
        {"origin": "http://localhost:8080.evil.example"},
        {"origin": "http://[half"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
    ],
)
def test_requests_of_other_sites_are_refused(headers: dict[str, str]) -> None:
    client = _client(LOCAL)
    for method in ("GET", "POST"):
        assert client.request(method, "/", headers=HOST | headers).status_code == 403
    assert not _socket_opens(client, HOST | headers)


def test_requests_of_own_pages_pass() -> None:
    client = _client(LOCAL)
    own = HOST | {"origin": "http://localhost:8080", "sec-fetch-site": "same-origin"}
    assert client.post("/", headers=own).status_code == 200
    assert _socket_opens(client, own)
    assert client.get("/", headers=HOST | {"sec-fetch-site": "none"}).status_code == 200


def test_a_link_from_elsewhere_opens_the_studio_but_sends_nothing_to_it() -> None:
    client = _client(LOCAL)
    assert client.get("/", headers=HOST | FROM_CHAT).status_code == 200
    assert client.post("/", headers=HOST | FROM_CHAT).status_code == 403


def test_other_machines_need_the_token() -> None:
    client = _client(OPEN)
    for headers in (HOST, HOST | {"cookie": f"{OPEN.cookie}=wrong"}, HOST | {"cookie": "=;;\x01"}):
        refused = client.get("/", headers=headers)
        assert refused.status_code == 401
        assert 'name="token"' in refused.text
        assert client.post("/", headers=headers).status_code == 401
        assert not _socket_opens(client, headers)
    assert client.get("/?token=wrong", headers=HOST).status_code == 401
    assert client.get("/?token=%ff%00é", headers=HOST).status_code == 401


def test_the_first_visit_leaves_a_cookie_and_the_address_without_the_token() -> None:
    client = _client(OPEN)
    first = client.get(f"/deep/page?a=1%22%3E&token={OPEN.token}", headers=HOST)
    assert first.status_code == 200
    cookie = first.headers["set-cookie"]
    assert {"httponly", "samesite=strict", "path=/"} <= {part.strip().lower() for part in cookie.split(";")}
    assert OPEN.token is not None and OPEN.token not in first.text
    assert 'content="0; url=/deep/page?a=1%22%3E"' in first.text
    assert client.get("/deep/page").text.startswith("page"), "the cookie lets the second visit in"
    assert _socket_opens(client, HOST | {"cookie": cookie.partition(";")[0]})


def test_signing_in_leads_nowhere_else() -> None:
    page = _client(OPEN).get(f"http://localhost:8080//evil.example/?token={OPEN.token}", headers=HOST).text
    assert re.findall('url=([^"]*)', page) == ["/evil.example/"]


def test_other_machines_may_name_any_address_or_the_machines_own_name() -> None:
    """No name server can give an address of its own as the host name; a name needs to be known."""
    token = f"/?token={OPEN.token}"
    for host, status in (("192.168.1.5:8080", 200), ("[fe80::1]:8080", 200), ("evil.example", 421)):
        assert _client(OPEN).get(token, headers={"host": host}).status_code == status


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused_while_it_arrives(announced: bool) -> None:
    client = _client(LOCAL, max_body_bytes=100)
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(20):
            sent += 10
            yield bytes(10)

    refused = client.post("/", headers=HOST, content=bytes(200) if announced else chunks())
    assert refused.status_code == 413
    assert "one of its folders" in refused.text.replace("\n", " ")
    assert client.post("/", headers=HOST, content=bytes(100)).text.startswith("page 100")
    assert client.post("/", headers=HOST | {"content-length": "-1"}, content=b"").status_code == 413


def test_the_policy_names_no_other_host() -> None:
    for path in ("/", "/missing", "/?token=wrong"):
        policy = _client(LOCAL).get(path, headers=HOST).headers["content-security-policy"]
        words = {word for directive in policy.split(";") for word in directive.split()[1:]}
        assert words <= {"'self'", "'none'", "'unsafe-inline'", "'unsafe-eval'", "data:", "blob:"}
        assert policy.startswith("default-src 'self'")


def test_refusals_carry_the_headers_too_and_a_page_keeps_its_own_policy() -> None:
    for headers in ({"host": "evil.example"}, HOST | {"origin": "http://evil.example"}, HOST):
        answer: Headers = _client(OPEN).get("/", headers=headers).headers  # type: ignore[assignment]
        assert answer["x-content-type-options"] == "nosniff"
        assert answer["x-frame-options"] == "SAMEORIGIN"
        assert answer["referrer-policy"] == "no-referrer"
        assert answer["cross-origin-resource-policy"] == "same-origin"
    assert _client(LOCAL).get("/report", headers=HOST).headers["content-security-policy"] == "sandbox"
