"""Signals become a question asked between steps."""

from __future__ import annotations

import os
import signal

import pytest

from dittocache.training import interrupt
from dittocache.training.interrupt import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_the_loop_to_stop_and_the_handler_comes_back(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with stop_on_signals() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop()
    assert signal.getsignal(number) is former


def test_the_same_interrupt_from_terminal_and_launcher_is_one_request() -> None:
    with stop_on_signals() as should_stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()


def test_a_second_interrupt_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "SAME_REQUEST_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
