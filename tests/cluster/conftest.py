"""A single server and a cluster; none of them outlives its test."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster.servers import NatsServer, cluster, single, start_all


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    server = single(tmp_path / "server")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def three_servers(tmp_path: Path) -> Iterator[Sequence[NatsServer]]:
    servers = cluster(tmp_path)
    try:
        start_all(servers)
        yield servers
    finally:
        for server in servers:
            server.kill()
