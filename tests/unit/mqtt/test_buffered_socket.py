"""The cable between paho and a real socket, and the bell."""

import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from cesar_mqtt.mqtt.buffered_socket import BufferedSocket, WakeupPipe
from cesar_mqtt.mqtt.codec import UnreadablePacketError, frame

_WAIT_S = 10.0


@pytest.fixture
def ends() -> Iterator[tuple[BufferedSocket, socket.socket]]:
    """A cable, and the broker's end of it."""
    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_connection(door.getsockname()) as near:
        far, _ = door.accept()
        with far:
            far.settimeout(_WAIT_S)
            near.settimeout(0)
            yield BufferedSocket(near), far


def arrive(cable: BufferedSocket) -> None:
    """Let what the broker sent be read."""
    assert select.select([cable], [], [], _WAIT_S)[0]
    cable.fill()


def test_what_is_sent_goes_out_at_once_and_together(ends: tuple[BufferedSocket, socket.socket]) -> None:
    cable, broker = ends
    assert [cable.send(b"abc"), cable.send(bytearray(b"def"))] == [3, 3]
    assert cable.unsent
    assert not select.select([broker], [], [], 0)[0]
    cable.flush()
    assert not cable.unsent
    assert broker.recv(100) == b"abcdef"


def test_what_the_network_does_not_take_yet_is_kept(ends: tuple[BufferedSocket, socket.socket]) -> None:
    cable, broker = ends
    sent = bytes(range(256)) * 100_000
    cable.send(sent)
    cable.flush()
    assert cable.unsent
    came = bytearray()
    while len(came) < len(sent):
        came += broker.recv(1 << 20)
        cable.flush()
    assert came == sent
    assert not cable.unsent


def test_a_disconnect_waits_until_all_else_is_written(ends: tuple[BufferedSocket, socket.socket]) -> None:
    cable, broker = ends
    cable.send(bytes(30_000_000))
    with pytest.raises(BlockingIOError):
        cable.send(b"\xe0\x00")
    came = bytearray()
    while len(came) < 30_000_000:
        came += broker.recv(1 << 20)
        cable.flush()
    assert cable.send(b"\xe0\x00") == 2
    broker.sendall(b"what nobody reads any more")
    closing = threading.Thread(target=cable.close)
    closing.start()
    assert broker.recv(100) == b"\xe0\x00"
    assert broker.recv(100) == b"", "no reset, which would have taken it away"
    broker.close()
    closing.join(_WAIT_S)


def test_packets_come_out_whole_however_they_come_in(ends: tuple[BufferedSocket, socket.socket]) -> None:
    cable, broker = ends
    whole = [(0x30, b"a" * size) for size in (0, 1, 127, 128, 300)]
    stream = b"".join(frame(first, body) for first, body in whole)
    came = []
    for at in range(0, len(stream), 7):
        broker.sendall(stream[at : at + 7])
        arrive(cable)
        while (packet := cable.next_packet()) is not None:
            came.append(packet)
    assert came == whole


def test_many_packets_are_read_at_once(ends: tuple[BufferedSocket, socket.socket]) -> None:
    cable, broker = ends
    broker.sendall(frame(0x40, b"\0\1") * 100)
    arrive(cable)
    assert [cable.next_packet() for _ in range(100)] == [(0x40, b"\0\1")] * 100
    assert cable.next_packet() is None


def test_paho_receives_what_it_is_given_and_no_more(ends: tuple[BufferedSocket, socket.socket]) -> None:
    cable, _ = ends
    with pytest.raises(BlockingIOError):
        cable.recv(1)
    cable.give(0x20, b"\0\0\0")
    assert [cable.recv(1), cable.recv(1), cable.recv(100)] == [b"\x20", b"\x03", b"\0\0\0"]
    with pytest.raises(BlockingIOError):
        cable.recv(1)


def test_the_end_is_told_after_what_came_before(ends: tuple[BufferedSocket, socket.socket]) -> None:
    cable, broker = ends
    broker.sendall(frame(0xE0, b"\x8e"))
    arrive(cable)
    broker.close()
    arrive(cable)
    assert cable.ended
    assert cable.next_packet() == (0xE0, b"\x8e")
    assert cable.recv(1) == b""


def test_a_broken_line_is_an_end_and_its_last_words_are_read(ends: tuple[BufferedSocket, socket.socket]) -> None:
    cable, broker = ends
    broker.sendall(frame(0xE0, b"\x8e"))
    broker.close()
    for _ in range(100):  # the first is answered with a reset, the next one meets it
        cable.send(b"x")
        cable.flush()
        if cable.ended:
            break
        select.select([], [], [], 0.01)
    assert cable.ended
    assert not cable.unsent
    assert cable.next_packet() == (0xE0, b"\x8e")


def test_what_is_no_packet_is_unreadable(ends: tuple[BufferedSocket, socket.socket]) -> None:
    cable, broker = ends
    broker.sendall(b"\x30\xff\xff\xff\xff\xff")
    arrive(cable)
    with pytest.raises(UnreadablePacketError):
        cable.next_packet()


def test_small_packets_are_not_held_back(ends: tuple[BufferedSocket, socket.socket]) -> None:
    cable, _ = ends
    with socket.socket(fileno=os.dup(cable.fileno())) as twin:
        assert twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_a_bell_rings_once_until_it_is_heard() -> None:
    bell = WakeupPipe()
    ringers = [threading.Thread(target=bell.ring) for _ in range(8)]
    for ringer in ringers:
        ringer.start()
    for ringer in ringers:
        ringer.join()
    assert select.select([bell], [], [], _WAIT_S)[0]
    bell.hush()
    assert not select.select([bell], [], [], 0)[0]
    bell.ring()
    assert select.select([bell], [], [], 0)[0]
    bell.close()
    bell.ring()
    bell.close()
