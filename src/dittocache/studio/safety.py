"""What every request to the Studio passes before any page sees it.

request -> addressed to us? -> from our own pages? -> token known? -> not too large? -> page, with headers that
                                                                                    let it load from here alone
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dittocache.studio.access import TOKEN_PARAMETER, Access
from dittocache.studio.uploads import MAX_UPLOAD_BYTES

MAX_BODY_BYTES = MAX_UPLOAD_BYTES + 64 * 1024  # a form's own lines around the file
_POLICY_VIOLATED = 1008  # closes a websocket

# Vue compiles its templates in the browser and NiceGUI starts itself with a script in the page: both need their
# 'unsafe-...'. No directive names another host, so that nothing of a page can come from elsewhere, or go there.
PAGE_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "frame-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class SafetyMiddleware:
    """ASGI middleware around all of the Studio, websockets included.

    Args:
        app: what answers the requests that are let through.
        access: who may reach it.
        max_body_bytes: of a request; larger ones are refused while they arrive.
    """

    def __init__(self, app: ASGIApp, access: Access, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._access = access
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        send = _with_headers(send)
        headers = Headers(scope=scope)
        refusal = self._wrong_address(headers) or _foreign_page(scope, headers) or self._unknown_visitor(scope, headers)
        if refusal is None:
            await _Sized(self._app, self._max_body_bytes)(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()  # the handshake, which must be read before it can be answered
            await send({"type": "websocket.close", "code": _POLICY_VIOLATED, "reason": ""})
        else:
            await refusal(scope, receive, send)

    def _wrong_address(self, headers: Headers) -> Response | None:
        found = headers.getlist("host")
        if len(found) == 1 and self._access.answers_to(found[0]):
            return None
        return PlainTextResponse(
            f"The Studio does not answer to the host name {', '.join(found) or '(none)'!r}, so that no other site can "
            "reach it by a name of its own. Open the address that the terminal shows, or start the Studio with "
            "--allow-host NAME.\n",
            status_code=421,
        )

    def _unknown_visitor(self, scope: Scope, headers: Headers) -> Response | None:
        access = self._access
        if access.accepts(_cookie(headers, access.cookie)):
            return None
        query = QueryParams(scope["query_string"])
        given = query.get(TOKEN_PARAMETER)
        if not access.accepts(given):
            return _sign_in(wrong=given is not None)
        kept = [(name, value) for name, value in query.multi_items() if name != TOKEN_PARAMETER]
        response = _go_on(scope["path"], kept)
        response.set_cookie(access.cookie, given or "", path="/", httponly=True, samesite="strict")
        return response


class _Sized:
    """Passes a request on, and answers in the app's place where its body is longer than it may be."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if not (announced.isascii() and announced.isdigit()) or int(announced) > self._limit:
            await self._refusal()(scope, receive, send)
            return
        read, too_long, answered = 0, False, False

        async def counted() -> Message:
            nonlocal read, too_long
            message = await receive()
            read += len(message.get("body", b""))
            too_long = too_long or read > self._limit
            return {"type": "http.disconnect"} if too_long else message

        async def unless_too_long(message: Message) -> None:
            nonlocal answered
            if answered or not too_long:
                answered = True
                await send(message)

        try:
            await self._app(scope, counted, unless_too_long)
        except Exception:
            if not too_long:
                raise
        if too_long and not answered:
            await self._refusal()(scope, receive, send)

    def _refusal(self) -> Response:
        limit = f"{self._limit / 2**20:.0f} MiB"
        return PlainTextResponse(
            f"The request is larger than {limit}, the most that the Studio takes at once. Copy large files into one of "
            "its folders instead.\n",
            status_code=413,
            headers={"Connection": "close"},
        )


def _foreign_page(scope: Scope, headers: Headers) -> Response | None:
    """A refusal where a page of another site, or of another port of this machine, asked for it."""
    origin = headers.get("origin")
    if origin is not None and _authority(origin) != headers.get("host", "").strip().lower():
        return _cross_site(f"the page at {origin}")
    site = headers.get("sec-fetch-site", "same-origin")
    # Following a link to the Studio is no harm: it shows a page and changes nothing.
    followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    if site in ("same-origin", "none") or (followed and scope.get("method") == "GET"):
        return None
    return _cross_site("a page of another site")


def _authority(origin: str) -> str:
    """`host:port` of an `Origin` header; the usual port is left out, as in `Host`; empty for `null`."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _cross_site(who: str) -> Response:
    return PlainTextResponse(
        f"The Studio takes requests of its own pages only; this one came from {who}. Open the Studio in a tab of its "
        "own.\n",
        status_code=403,
    )


def _cookie(headers: Headers, name: str) -> str | None:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return None
    return None if found is None else found.value


def _go_on(path: str, query: list[tuple[str, str]]) -> Response:
    """A page that leads to the same address without the token.

    Not a redirect: of a chain that began on another site, the browser would hold the strict cookie back.
    """
    target = "/" + path.lstrip("/\\") + (f"?{urlencode(query)}" if query else "")
    safe = html.escape(target, quote=True)
    head = f'<meta http-equiv="refresh" content="0; url={safe}">'
    return _small_page(head, f'<p>Signed in. <a href="{safe}">Go on to the Studio</a></p>', 200)


def _sign_in(wrong: bool) -> Response:
    found = "That token is not the one of this Studio." if wrong else "This Studio can be reached from other machines."
    form = (
        f"<p>{found} Open the address that its terminal shows, or enter the token from there. A Studio that was "
        'started again has a new one.</p><form action="/"><label>Token <input name="token" type="password" '
        'autocomplete="off" autofocus required></label> <button>Sign in</button></form>'
    )
    return _small_page("", form, 401)


def _small_page(head: str, body: str, status: int) -> Response:
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>dittocache Studio</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark">{head}</head><body style="font: 1rem system-ui; margin: 3rem auto; max-width: 40rem; '
        f'padding: 0 1rem">{body}</body></html>'
    )
    return HTMLResponse(page, status, headers={"Cache-Control": "no-store"})


def _with_headers(send: Send) -> Send:
    """`send` that adds the safety headers to every answer; one that says its own policy keeps it."""

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sender
