"""The entry point of the command `cesar-mqtt` and of `python -m cesar_mqtt`."""

from cesar_mqtt.cli.app import run


def main() -> None:
    """Run the command line and leave with its exit code."""
    raise SystemExit(run())


if __name__ == "__main__":
    main()
