# mypy: ignore-errors
"""Home Assistant as its own process, started as its command `hass` starts it. The argument is the configuration folder.

Without the integrations that it sets up by default, such as its pages: they need many more packages. Each line of the
standard output is a JSON list: what happened, and to what.
"""

import asyncio
import json
import sys

from homeassistant import bootstrap, runner
from homeassistant.core import callback

bootstrap.DEFAULT_INTEGRATIONS = set()
bootstrap.CRITICAL_INTEGRATIONS = set()
SHOWN = {"sensor.cesar_last_transcript", "sensor.cesar_last_error", "binary_sensor.cesar_connection"}


def tell(*what):
    sys.stdout.write(f"{json.dumps(what)}\n")
    sys.stdout.flush()


@callback
def on_triggered(event):
    tell("triggered", event.data["name"])


@callback
def on_called(event):
    if (event.data["domain"], event.data["service"]) == ("persistent_notification", "create"):
        tell("notification", event.data["service_data"].get("notification_id"))


@callback
def on_changed(event):
    if event.data["entity_id"] in SHOWN and event.data["new_state"] is not None:
        tell("state", event.data["entity_id"], event.data["new_state"].state)


@callback
def on_told(event):
    tell("blueprint", event.data["of"])


async def main(folder):
    hass = await bootstrap.async_setup_hass(runner.RuntimeConfig(config_dir=folder, skip_pip=True, log_no_color=True))
    # Automations wait for their triggers only once it has started.
    hass.services.async_register(
        "notify", "mobile_app_telephone", callback(lambda call: tell("phone", call.data["message"]))
    )
    for event_type, listener in (
        ("automation_triggered", on_triggered),
        ("call_service", on_called),
        ("state_changed", on_changed),
        ("told", on_told),
    ):
        hass.bus.async_listen(event_type, listener)
    return await hass.async_run()


sys.exit(asyncio.run(main(sys.argv[1])))
