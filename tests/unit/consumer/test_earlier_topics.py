"""What a consumer remembers of the topics that it used under other prefixes and names."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from cesar_mqtt.consumer.earlier_topics import EarlierTopics
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.protocol.topics import Topics

CESAR, VOICE, KITCHEN = Topics("cesar", "cesar"), Topics("voice", "cesar"), Topics("cesar", "kitchen")


class FullDisk(Disk):
    def put(self, path: Path, chunks: Iterable[bytes]) -> int:  # noqa: ARG002 - the real one's
        raise OSError(28, "No space left on device")


def test_a_change_is_warned_of_at_each_start_until_the_topics_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "topics.json"
    for topics in (CESAR, CESAR):
        EarlierTopics(path).record(topics)
    assert caplog.records == []
    for _ in range(2):
        caplog.clear()
        EarlierTopics(path).record(VOICE)
        (record,) = caplog.records
        assert "the consumer 'cesar' below cesar/" in record.getMessage()
        assert "discovery remove --all" in record.getMessage()
    EarlierTopics(path).record(KITCHEN)
    assert EarlierTopics(path).others(KITCHEN) == [CESAR, VOICE]
    EarlierTopics(path).remove([CESAR, Topics("never", "used")])
    assert EarlierTopics(path).others(KITCHEN) == [VOICE]
    EarlierTopics(path).record(VOICE)
    assert EarlierTopics(path).others(VOICE) == [KITCHEN], "what is used again is not earlier"


def test_sixteen_changes_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / "topics.json"
    used = [Topics(f"prefix-{number}", "cesar") for number in range(20)]
    for topics in used:
        EarlierTopics(path).record(topics)
    assert EarlierTopics(path).others(used[-1]) == used[4:-1]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"used": [["a"]]}', '{"used": 1}', '{"used": [1]}'])
def test_a_damaged_file_does_not_stop_the_start(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "topics.json"
    path.write_text(content)
    EarlierTopics(path).record(CESAR)
    assert "topics.json cannot be read" in caplog.text
    assert EarlierTopics(path).others(VOICE) == [CESAR]


def test_a_full_disk_does_not_stop_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    EarlierTopics(tmp_path / "topics.json", disk=FullDisk()).record(CESAR)
    assert "topics.json cannot be written (No space left on device)" in caplog.text


def test_jobs_of_the_embedded_broker_follow_to_another_one_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings(*, embedded: bool, jobs: int) -> int:
        caplog.clear()
        EarlierTopics(tmp_path / "topics.json").record(CESAR, embedded=embedded, jobs=jobs)
        return len([record for record in caplog.records if "--data-dir" in record.getMessage()])

    for embedded, jobs, warned in ((False, 3, 0), (True, 3, 0), (True, 3, 0), (False, 3, 1), (False, 3, 0)):
        assert warnings(embedded=embedded, jobs=jobs) == warned
    assert warnings(embedded=True, jobs=0) == warnings(embedded=False, jobs=0) == 0
