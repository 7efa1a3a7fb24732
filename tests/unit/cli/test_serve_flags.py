"""The flags of `serve` that may stand without a value."""

import pytest
import typer.main

from cesar_mqtt.cli.app import app


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        ([], None),
        (["--web"], "127.0.0.1:8188"),
        (["--web", "--model", "base"], "127.0.0.1:8188"),
        (["--web", "0.0.0.0:80", "--model", "base"], "0.0.0.0:80"),
        (["--web=[::1]:80"], "[::1]:80"),
        (["--model", "base", "--web"], "127.0.0.1:8188"),
    ],
)
def test_the_page_has_a_default_address(arguments: list[str], address: str | None) -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    assert serve.make_context("serve", list(arguments)).params["web"] == address
