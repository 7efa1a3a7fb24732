"""Cesar on a message bus: jobs come in over MQTT, transcripts go out as retained status messages."""

from importlib.metadata import version

__version__ = version("cesar-mqtt")
