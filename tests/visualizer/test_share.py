"""Public links, with a fake of Gradio's tunnel: their viewers may only watch, and the page works without a tunnel."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.request import Request, urlopen

import pytest
from gradio import networking

from visualizer import app
from visualizer.app import Visualizer
from visualizer.classroom import REFUSED

PUBLIC = "https://0123456789abcdef.gradio.live"


@pytest.fixture
def tunnel(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options of the calls to the fake tunnel, which always succeeds."""
    asked: list[dict[str, Any]] = []

    def setup_tunnel(**options: Any) -> str:
        asked.append(options)
        return PUBLIC

    monkeypatch.setattr(networking, "setup_tunnel", setup_tunnel)
    return asked


def command(visualizer: Visualizer, **payload: Any) -> dict[str, Any]:
    """Sends a command like the page."""
    config = json.loads(urlopen(f"{visualizer.url}/config").read())
    page = next(component["id"] for component in config["components"] if component["type"] == "html")
    body = {"session_hash": "x", "component_id": page, "fn_name": "command", "data": payload}
    request = Request(
        f"{visualizer.url}/gradio_api/component_server", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urlopen(request).read())


def test_no_link_without_being_asked(serve: Callable[..., Visualizer], tunnel: list) -> None:
    visualizer = serve()
    assert tunnel == [] and visualizer.public_url == "" and visualizer.presenter == ""
    assert command(visualizer, do="pause")["ok"]


def test_who_comes_through_the_link_only_watches(
    launching: Callable[..., Visualizer], tunnel: list, capsys: pytest.CaptureFixture[str]
) -> None:
    visualizer = launching(share=True)
    assert len(tunnel) == 1 and tunnel[0]["local_port"] == visualizer.blocks.server_port
    assert visualizer.public_url == PUBLIC
    said = capsys.readouterr().out
    assert PUBLIC in said and f"{visualizer.url}/?presenter={visualizer.presenter}" in said
    assert f"{PUBLIC}/?presenter" not in said, "the presenter's page must not use the tunnel"
    for payload in ({"do": "pause"}, {"do": "reset", "token": "guessed"}, {"do": "configure", "model": "tiny"}):
        assert command(visualizer, **payload) == {"ok": False, "message": REFUSED}
    assert command(visualizer, do="pause", token=visualizer.presenter)["ok"]
    # With a public link, not even the presenter may load another model.
    other = command(visualizer, do="configure", model="other", token=visualizer.presenter)
    assert not other["ok"] and "open to other machines" in other["message"]


def test_without_the_internet_the_local_page_goes_on(
    launching: Callable[..., Visualizer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def setup_tunnel(**options: Any) -> str:
        raise RuntimeError("no way out")

    monkeypatch.setattr(networking, "setup_tunnel", setup_tunnel)
    visualizer = launching(share=True)
    said = capsys.readouterr().out
    assert "no public link could be made" in said and visualizer.url in said and visualizer.public_url == ""
    assert urlopen(visualizer.url).status == 200
    assert command(visualizer, do="pause")["message"] == REFUSED, "a page meant for sharing stays restricted"
    assert command(visualizer, do="pause", token=visualizer.presenter)["ok"]


def test_the_address_printed_for_a_network_is_a_number(
    launching: Callable[..., Visualizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    visualizer = launching(host="0.0.0.0", classroom=True)
    host = visualizer.url.removeprefix("http://").rpartition(":")[0]
    socket.inet_aton(host)
    assert host != "0.0.0.0" and urlopen(visualizer.url).status == 200

    def unreachable(self: Any, address: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(app.socket.socket, "connect", unreachable)
    assert app._own_address() == "127.0.0.1"
