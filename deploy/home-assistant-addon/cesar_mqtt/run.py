# ruff: noqa: INP001 - a program, not a package
"""Translates the add-on's options, and the Supervisor's broker, into settings, then executes `cesar-mqtt`.

    run.py serve|health

Standard library only, so that errors of the set-up can be shown.
"""

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OPTIONS = Path("/data/options.json")
PASSWORD = Path("/tmp/broker-password")  # noqa: S108 - private to the container
DRAIN_S = 240
INGRESS_PORT = 8188
"""`ingress_port` of config.yaml."""
INGRESS_PROXY = "172.30.32.2"
"""Home Assistant's ingress: the only address that may use the page."""
_WAIT_S = 10.0


class SetUpError(Exception):
    """The add-on cannot start; the message has the advice."""


def main() -> None:
    """Execute `cesar-mqtt` in place of this process."""
    try:
        options = json.loads(OPTIONS.read_text())
        environ = {**os.environ, **settings(options, broker(options, os.environ), PASSWORD)}
    except SetUpError as exc:
        sys.exit(f"cesar-mqtt: {exc}")
    os.execvpe("cesar-mqtt", ["cesar-mqtt", *sys.argv[1:]], environ)  # noqa: S606, S607 - both are ours


def broker(options: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return URL, user name and password of the broker in the options, else of the Supervisor's.

    Raises:
        SetUpError: neither has one.
    """
    if options.get("broker_url"):
        return {"url": options["broker_url"], "username": None, "password": options.get("broker_password")}
    request = urllib.request.Request(  # noqa: S310 - fixed
        f"{environ.get('SUPERVISOR', 'http://supervisor')}/services/mqtt",
        headers={"Authorization": f"Bearer {environ.get('SUPERVISOR_TOKEN', '')}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_WAIT_S) as answer:  # noqa: S310 - as above
            service = json.load(answer)["data"]
    except (urllib.error.URLError, KeyError, ValueError) as exc:
        raise SetUpError(f"no MQTT broker is known ({exc}): install the Mosquitto add-on, or set broker_url") from exc
    scheme = "mqtts" if service.get("ssl") else "mqtt"
    return {
        "url": f"{scheme}://{service['host']}:{service['port']}",
        "username": service.get("username") or None,
        "password": service.get("password") or None,
    }


def settings(options: Mapping[str, Any], found: Mapping[str, Any], password_file: Path) -> dict[str, str]:
    """Return the settings as environment variables; the password is written to a file with mode 0600."""
    variables = {
        "CESAR_BROKER__URL": found["url"],
        "CESAR_BROKER__USERNAME": found["username"] or "",
        "CESAR_CONSUMER__NAME": options["name"],
        "CESAR_TOPIC_PREFIX": options["topic_prefix"],
        "CESAR_MODELS__DEFAULT": options["model"],
        "CESAR_MODELS__DOWNLOAD": json.dumps(options["download_models"]),
        "CESAR_AUDIO__DIRECTORIES": json.dumps(options["audio_directories"]),
        "CESAR_AUDIO__ALLOWED_HOSTS": json.dumps(options["allowed_hosts"]),
        "CESAR_WORKER__DRAIN_TIMEOUT": str(DRAIN_S),
        "CESAR_LOG__LEVEL": options["log_level"],
        "CESAR_WEB__LISTEN": f"0.0.0.0:{INGRESS_PORT}",
        "CESAR_WEB__TRUSTED_PROXIES": INGRESS_PROXY,
        "CESAR_WEB__URL": "homeassistant://hassio/ingress/local_cesar_mqtt",
    }
    if found["password"]:
        password_file.touch(mode=0o600)
        password_file.write_text(f"{found['password']}\n")
        variables["CESAR_BROKER__PASSWORD_FILE"] = str(password_file)
    return variables


if __name__ == "__main__":
    main()
