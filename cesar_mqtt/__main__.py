"""The entry point of the command `cesar-mqtt` and of `python -m cesar_mqtt`."""

from collections.abc import Callable

from cesar_mqtt.cli.interrupt import run_interruptibly


def main() -> None:
    """Run the command line and leave with its exit code."""
    raise SystemExit(run_interruptibly(_load))


def _load() -> Callable[[], int]:
    from cesar_mqtt.cli.app import run  # noqa: PLC0415 - takes tenths of a second

    return run


if __name__ == "__main__":
    main()
