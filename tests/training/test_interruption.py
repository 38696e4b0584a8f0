"""Signals: the first is a request, its echoes are nothing, and who asks again means at once."""

from __future__ import annotations

import os
import signal
import time
from unittest import mock

import pytest

from decovae.training.interruption import AGAIN, REQUESTS, stop_requests


@pytest.mark.parametrize("number", REQUESTS)
def test_the_first_signal_is_noted_and_handlers_come_back(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in REQUESTS]
    with stop_requests(announce=True) as request:
        assert not request
        os.kill(os.getpid(), number)
        assert request.signal_number == number
    assert [signal.getsignal(each) for each in REQUESTS] == before
    assert "with a checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize("launched", [False, True])
def test_what_a_second_ctrl_c_does_is_said_only_where_it_does_it(
    launched: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """torchrun does not pass on the second."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    with stop_requests(announce=True):
        os.kill(os.getpid(), signal.SIGINT)
    assert ("once more" in capfd.readouterr().err) is not launched


def test_a_volley_is_one_request() -> None:
    """What torchrun, a terminal and a scheduler send together does not cut a checkpoint short."""
    with stop_requests(announce=False) as request:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
    assert request.signal_number == signal.SIGUSR1


@pytest.mark.parametrize(("number", "patience"), AGAIN.items())
def test_who_asks_again_later_means_at_once(number: int, patience: float) -> None:
    def at_once(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(number, at_once)
    try:
        with mock.patch.object(time, "monotonic") as clock, stop_requests(announce=False) as request:
            clock.return_value = 100.0
            os.kill(os.getpid(), signal.SIGUSR1)
            clock.return_value = 100.0 + patience / 2
            os.kill(os.getpid(), number)
            clock.return_value = 100.0 + patience * 2
            os.kill(os.getpid(), signal.SIGUSR1)  # a scheduler's warning never does
            with pytest.raises(InterruptedError):
                os.kill(os.getpid(), number)
        assert request
    finally:
        signal.signal(number, before)
