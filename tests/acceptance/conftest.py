"""Consumers and clients for the acceptance tests; none of them outlives its test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.harness import Bus, Consumer


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Consumer]]:
    """Start consumers; none of them outlives the test."""
    consumers: list[Consumer] = []

    def start(*flags: str, name: str = "consumer", **options: Any) -> Consumer:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        consumers.append(Consumer(folder, *flags, **options))
        return consumers[-1]

    yield start
    for consumer in consumers:
        if consumer.process.poll() is None:
            consumer.kill()


@pytest.fixture
def join() -> Iterator[Callable[..., Bus]]:
    """Connect to a broker as everybody else."""
    buses: list[Bus] = []

    def connect(port: int, **options: Any) -> Bus:
        buses.append(Bus(port, **options))
        return buses[-1]

    yield connect
    for bus in buses:
        bus.close()
