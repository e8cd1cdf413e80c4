"""TERM and INT drain, a second one stops now: with one worker and with several."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import pytest

from site_of_mcpctl import Shop, Site, eventually, in_background

MakeSite = Callable[..., Site]
both = pytest.mark.parametrize("workers", ["1", "2"])


def refuses(at: Site) -> bool:
    """Whether nobody takes a new connection any more."""
    try:
        socket.create_connection(("127.0.0.1", urlsplit(at.url).port or 0), 5).close()
    except (ConnectionRefusedError, ConnectionResetError):  # the other, where the socket is closed meanwhile
        return True
    return False


@both
def test_a_call_of_two_seconds_ends_with_its_answer_and_nobody_new_is_let_in(
    make_site: MakeSite, newest_shop: Shop, workers: str
) -> None:
    at = make_site(newest_shop).start("--workers", workers)
    process = at.process
    assert process is not None
    with at.client(at.token()[1]) as a:
        running = in_background(a.rows, "select pg_sleep(2)::text, 'whole'")
        eventually(lambda: newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses(at), 1.5)
        assert process.poll() is None
        assert running.result()[0][1] == "whole"
        assert time.monotonic() - begun > 1
    assert process.wait(10) == -signal.SIGTERM
    (line,) = [line for line in at.audit() if line["event"] == "tool.called"]
    assert line["outcome"] == "ok"
    eventually(lambda: not newest_shop.backends(), 3)


@both
def test_a_ctrl_c_of_the_terminal_which_all_processes_get_drains_too(
    make_site: MakeSite, newest_shop: Shop, workers: str
) -> None:
    at = make_site(newest_shop).start("--workers", workers, before=("setsid",))
    process = at.process
    assert process is not None
    with at.client(at.token()[1]) as a:
        running = in_background(a.rows, "select pg_sleep(1.5)::text, 'whole'")
        eventually(lambda: newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        os.killpg(process.pid, signal.SIGINT)
        assert running.result()[0][1] == "whole"
    assert process.wait(10) == 130


@both
def test_a_second_signal_stops_now(make_site: MakeSite, newest_shop: Shop, workers: str) -> None:
    at = make_site(newest_shop).start("--workers", workers)
    process = at.process
    assert process is not None
    with at.client(at.token()[1]) as a:
        running = in_background(lambda: a.call("query_database", {"query": "select pg_sleep(20)"}))
        eventually(lambda: newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses(at), 3)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
        assert time.monotonic() - begun < 3  # and not the five seconds of a drain
        try:
            assert "stop" in running.result().text
        except httpx.HTTPError:
            pass  # the connection was closed
    eventually(lambda: not newest_shop.backends(), 3)
    assert at.audit()[-1]["event"] == "server.stopped"
    (line,) = [line for line in at.audit() if line["event"] == "tool.called"]
    assert "server" in line["reason"]


@both
def test_what_does_not_end_in_time_is_cut_and_told(make_site: MakeSite, newest_shop: Shop, workers: str) -> None:
    at = make_site(newest_shop).start("--workers", workers)
    process = at.process
    assert process is not None
    with at.client(at.token()[1]) as a:
        running = in_background(lambda: a.call("query_database", {"query": "select pg_sleep(20)"}))
        eventually(lambda: newest_shop.backends("query ~ 'pg_sleep' and state = 'active'"))
        process.send_signal(signal.SIGTERM)
        answer = running.result(15)
        assert answer.status_code == 503
        assert "the server stops" in answer.text
    assert process.wait(10) == -signal.SIGTERM
    eventually(lambda: not newest_shop.backends(), 3)
