"""Where a Studio listens without a token, and what a token is."""

from __future__ import annotations

import hmac

import pytest

from dittocache.studio.access import access_for


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1", "localhost", "LocalHost"])
def test_only_this_machine_connects_without_a_token(host: str) -> None:
    access = access_for(host, 8080)
    assert access.token is None
    assert "token" not in access.url
    assert access.accepts(None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "10.0.0.1", "gpu-box", "", "localhost.example"])
def test_any_other_address_needs_a_new_token(host: str) -> None:
    first, second = access_for(host, 8080), access_for(host, 8080)
    assert first.token is not None and second.token is not None
    assert first.token != second.token
    assert len(first.token) >= 43  # 32 random bytes
    assert first.url.endswith(f"?token={first.token}")
    assert first.token not in repr(first), "a log of the settings must not hold it"
    assert first.accepts(first.token)
    for wrong in (None, "", first.token[:-1], first.token + "x", second.token, "\udcff", "é"):
        assert not first.accepts(wrong)


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    constant_time = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return constant_time(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    access = access_for("0.0.0.0", 8080)
    assert not access.accepts("guess")
    assert compared == [(b"guess", (access.token or "").encode())]


def test_two_studios_on_one_machine_keep_their_cookies_apart() -> None:
    assert access_for("0.0.0.0", 8080).cookie != access_for("0.0.0.0", 8081).cookie


@pytest.mark.parametrize(("host", "start"), [("127.0.0.1", "http://127.0.0.1:80/"), ("::1", "http://[::1]:80/")])
def test_the_address_to_open(host: str, start: str) -> None:
    assert access_for(host, 80).url == start
