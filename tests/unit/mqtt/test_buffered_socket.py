"""The buffered socket on a real socket, and the wakeup pipe."""

import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from cesar_mqtt.mqtt.buffered_socket import BufferedSocket, WakeupPipe
from cesar_mqtt.mqtt.codec import MalformedPacketError, frame
from tests.conftest import PATIENCE_S


@pytest.fixture
def ends() -> Iterator[tuple[BufferedSocket, socket.socket]]:
    """A buffered socket, and the broker's end of the connection."""
    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_connection(door.getsockname()) as near:
        far, _ = door.accept()
        with far:
            far.settimeout(PATIENCE_S)
            near.settimeout(0)
            yield BufferedSocket(near), far


def arrive(buffered: BufferedSocket) -> None:
    """Wait for data from the broker, and read it."""
    assert select.select([buffered], [], [], PATIENCE_S)[0]
    buffered.fill()


def test_buffered_data_is_written_together(ends: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, broker = ends
    assert [buffered.send(b"abc"), buffered.send(bytearray(b"def"))] == [3, 3]
    assert buffered.has_unsent
    assert not select.select([broker], [], [], 0)[0]
    buffered.flush()
    assert not buffered.has_unsent
    assert broker.recv(100) == b"abcdef"


def test_data_that_the_network_does_not_accept_yet_stays_buffered(ends: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, broker = ends
    sent = bytes(range(256)) * 100_000
    buffered.send(sent)
    buffered.flush()
    assert buffered.has_unsent
    came = bytearray()
    while len(came) < len(sent):
        came += broker.recv(1 << 20)
        buffered.flush()
    assert came == sent
    assert not buffered.has_unsent


def test_a_disconnect_waits_until_all_else_is_written(ends: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, broker = ends
    buffered.send(bytes(30_000_000))
    with pytest.raises(BlockingIOError):
        buffered.send(b"\xe0\x00")
    came = bytearray()
    while len(came) < 30_000_000:
        came += broker.recv(1 << 20)
        buffered.flush()
    assert buffered.send(b"\xe0\x00") == 2
    broker.sendall(b"data that is not read any more")
    closing = threading.Thread(target=buffered.close)
    closing.start()
    assert broker.recv(100) == b"\xe0\x00"
    assert broker.recv(100) == b"", "a reset would have discarded it"
    broker.close()
    closing.join(PATIENCE_S)


def test_packets_are_complete_however_they_arrive(ends: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, broker = ends
    whole = [(0x30, b"a" * size) for size in (0, 1, 127, 128, 300)]
    stream = b"".join(frame(first, body) for first, body in whole)
    came = []
    for at in range(0, len(stream), 7):
        broker.sendall(stream[at : at + 7])
        arrive(buffered)
        while (packet := buffered.next_packet()) is not None:
            came.append(packet)
    assert came == whole


def test_many_packets_are_read_at_once(ends: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, broker = ends
    broker.sendall(frame(0x40, b"\0\1") * 100)
    arrive(buffered)
    assert [buffered.next_packet() for _ in range(100)] == [(0x40, b"\0\1")] * 100
    assert buffered.next_packet() is None


def test_paho_receives_only_the_forwarded_packets(ends: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, _ = ends
    with pytest.raises(BlockingIOError):
        buffered.recv(1)
    buffered.forward_to_paho(0x20, b"\0\0\0")
    assert [buffered.recv(1), buffered.recv(1), buffered.recv(100)] == [b"\x20", b"\x03", b"\0\0\0"]
    with pytest.raises(BlockingIOError):
        buffered.recv(1)


def test_the_end_follows_the_packets_before_it(ends: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, broker = ends
    broker.sendall(frame(0xE0, b"\x8e"))
    arrive(buffered)
    broker.close()
    arrive(buffered)
    assert buffered.ended
    assert buffered.next_packet() == (0xE0, b"\x8e")
    assert buffered.recv(1) == b""


def test_after_a_reset_the_last_packets_are_still_read(ends: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, broker = ends
    broker.sendall(frame(0xE0, b"\x8e"))
    broker.close()
    for _ in range(100):  # the first is answered with a reset, the next one meets it
        buffered.send(b"x")
        buffered.flush()
        if buffered.ended:
            break
        select.select([], [], [], 0.01)
    assert buffered.ended
    assert not buffered.has_unsent
    assert buffered.next_packet() == (0xE0, b"\x8e")


def test_bytes_that_are_no_packet_are_malformed(ends: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, broker = ends
    broker.sendall(b"\x30\xff\xff\xff\xff\xff")
    arrive(buffered)
    with pytest.raises(MalformedPacketError):
        buffered.next_packet()


def test_small_packets_are_not_delayed(ends: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, _ = ends
    with socket.socket(fileno=os.dup(buffered.fileno())) as twin:
        assert twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_several_wake_ups_count_as_one_until_the_pipe_is_drained() -> None:
    pipe = WakeupPipe()
    ringers = [threading.Thread(target=pipe.wake) for _ in range(8)]
    for ringer in ringers:
        ringer.start()
    for ringer in ringers:
        ringer.join()
    assert select.select([pipe], [], [], PATIENCE_S)[0]
    pipe.drain()
    assert not select.select([pipe], [], [], 0)[0]
    pipe.wake()
    assert select.select([pipe], [], [], 0)[0]
    pipe.close()
    pipe.wake()
    pipe.close()
