"""How many speakers there are, and which pieces of speech are whose, by voice. No state; any thread may call it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cesar_mqtt.threads import until_stopped

Embedding: TypeAlias = NDArray[np.float32]
"""A voice; shape (192,), of length 1."""
Embeddings: TypeAlias = NDArray[np.float32]
"""Shape (n, 192)."""
Likeness: TypeAlias = NDArray[np.float32]
"""How much each piece of speech speaks for each speaker; shape (pieces, speakers)."""
Labels: TypeAlias = NDArray[np.intp]
"""A speaker, from 0, for each piece of speech."""

# Measured on 13 voices in pairs and larger groups, clean, in noise and in the band of a telephone, and on four more
# that chose nothing but `_NARROW_MORE`. Two clusters of one speaker have a cosine of 0.64 or more, 0.69 where both are
# long; those of two have up to 0.42. In the band of a telephone all voices are more alike: 20 s of one speaker have
# 0.84 or more, of two similar women up to 0.70; a reader who acts is split from 0.73 on.
_SAME_SPEAKER = 0.65
"""The cosine from which two long clusters are one speaker."""
_NARROW_MORE = 0.07
"""So much more is needed where both are in the band of a telephone."""
_SAME_SHORT = 0.35
"""So much less is enough for a very short one."""
_SHORT_S = 4.0
_NOISE_S = 0.7
"""So many seconds of speech give an embedding that is half noise."""
_CLEAR_S = 0.6
"""Shorter pieces do not found clusters; they are given to one."""
_LEAST_SPOKEN_S, _LEAST_MORE, _LEAST_SHARE = 4.0, 0.004, 0.12
"""A cluster of less speech is no speaker, but what was left over of several: so many seconds, with more for each second
of all speech, but no larger share of it than the last. What is left over grows with the length."""
_SURE_SHARE, _OTHER_SPEAKER = 0.03, 0.5
"""Nor is one that has a smaller share and is as much like a larger one: of many hours even a mood has minutes."""
_MOST_AT_ONCE = 800
"""Clusters that are compared all with all: 2.5 MB."""
_MORE_CUTS = 8
"""How many more clusters than speakers are tried, when short ones are among them."""
_WEIGHT = 10.0
_CHANGE = 2.0
"""What a change of speaker costs within what the segmentation takes for one: a second of speech weighs about 5."""


@dataclass(frozen=True, slots=True, eq=False)
class Voices:
    """Pieces of speech, in order of time.

    Attributes:
        embeddings: of length 1.
        seconds: the length of each piece, without what was added of its surroundings for the embedding.
        narrow: how sure it is that each piece was heard through the band of a telephone, from 0 to 1.
    """

    embeddings: Embeddings
    seconds: NDArray[np.float64]
    narrow: NDArray[np.float64]

    def centres(self, labels: Labels, before: Embeddings) -> Embeddings:
        """The mean voice of each speaker, of length 1; `before` for those that have no piece."""
        sums = np.zeros_like(before)
        np.add.at(sums, labels, self.embeddings * self.seconds[:, np.newaxis].astype(np.float32))
        return unit(np.where(sums.any(axis=1, keepdims=True), sums, before))

    def likeness(self, centres: Embeddings) -> Likeness:
        weights = _WEIGHT * np.sqrt(self.seconds[:, np.newaxis])
        found: Likeness = ((self.embeddings @ centres.T) * weights).astype(np.float32)
        return found


def find_speakers(
    voices: Voices, *, min_speakers: int | None, max_speakers: int | None, should_stop: Callable[[], bool]
) -> Embeddings:
    """Find the speakers, and return the mean voice of each.

    Args:
        voices: at least one.
        min_speakers: at least so many, as far as there are pieces; None: one.
        max_speakers: at most so many; None: as many as there are.
        should_stop: asked again and again.

    Raises:
        Cancelled: `should_stop` returned True.
    """
    least = max(min_speakers or 1, 1)
    clear = voices.seconds >= _CLEAR_S
    if clear.sum() <= least:
        clear[:] = True
    seconds = voices.seconds[clear]
    sums = voices.embeddings[clear] * seconds[:, np.newaxis].astype(np.float32)
    clusters = _condense(_Clusters(sums, seconds, voices.narrow[clear] * seconds), least, should_stop)
    found = clusters.joined(_agglomerate(clusters, least=1, most=None, should_stop=should_stop))
    for more in range(_MORE_CUTS if len(found.speakers()) < least else 0):
        count = min(least + more, len(clusters))
        found = clusters.joined(_agglomerate(clusters, least=count, most=count, should_stop=should_stop))
        if len(found.speakers()) >= least or count == len(clusters):
            break
    found = found.only(found.speakers(least=least))
    if max_speakers is not None and len(found) > max_speakers:
        found = found.joined(_agglomerate(found, least=max_speakers, most=max_speakers, should_stop=should_stop))
    return unit(found.sums)


def best_path(likeness: Likeness) -> Labels:
    """Return the most probable speaker of each of several pieces in order of time, where changes are rare."""
    pieces, speakers = likeness.shape
    came_from = np.zeros((pieces, speakers), np.intp)
    total = likeness[0]
    for piece in range(1, pieces):
        best = int(total.argmax())
        changed = total[best] - _CHANGE
        came_from[piece] = np.where(total >= changed, np.arange(speakers), best)
        total = np.maximum(total, changed) + likeness[piece]
    path = np.empty(pieces, np.intp)
    path[-1] = total.argmax()
    for piece in range(pieces - 1, 0, -1):
        path[piece - 1] = came_from[piece, path[piece]]
    return path


def unit(vectors: Embeddings) -> Embeddings:
    units: Embeddings = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-9))
    return units.astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class _Clusters:
    """Pieces of speech that were joined.

    Attributes:
        sums: of their embeddings, each times its seconds.
        seconds: of speech.
        narrow_s: how many of them were heard through the band of a telephone.
    """

    sums: Embeddings
    seconds: NDArray[np.float64]
    narrow_s: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.seconds)

    def only(self, kept: Labels | slice) -> "_Clusters":
        return _Clusters(self.sums[kept], self.seconds[kept], self.narrow_s[kept])

    def joined(self, labels: Labels) -> "_Clusters":
        """One cluster for each label."""
        sums = np.zeros((int(labels.max()) + 1, self.sums.shape[1]), np.float32)
        np.add.at(sums, labels, self.sums)
        seconds, narrow_s = (
            np.bincount(labels, weights=values).astype(np.float64) for values in (self.seconds, self.narrow_s)
        )
        return _Clusters(sums, seconds, narrow_s)

    def speakers(self, *, least: int = 1) -> Labels:
        """The numbers of those that are speakers and not what was left over, and in any case of the `least` largest."""
        total_s = float(self.seconds.sum())
        enough_s = min(_LEAST_SPOKEN_S + _LEAST_MORE * total_s, _LEAST_SHARE * total_s)
        order = np.argsort(-self.seconds, kind="stable")
        units, narrow = unit(self.sums), self.narrow_s / self.seconds
        found: list[int] = []
        for number in order.tolist():
            alike = units[found] @ units[number] - _NARROW_MORE * np.minimum(narrow[found], narrow[number])
            differs = self.seconds[number] >= _SURE_SHARE * total_s or not (alike >= _OTHER_SPEAKER).any()
            if len(found) < least or (self.seconds[number] >= enough_s and differs):
                found.append(number)
        return np.array(found, np.intp)


def _condense(clusters: _Clusters, least: int, should_stop: Callable[[], bool]) -> _Clusters:
    """Join what is certainly one voice, block by block, until few enough are left to compare all with all."""
    while len(clusters) > _MOST_AT_ONCE:
        blocks = []
        for first in range(0, len(clusters), _MOST_AT_ONCE):
            block = clusters.only(slice(first, first + _MOST_AT_ONCE))
            half = max(least, len(block) // 2)
            blocks.append(block.joined(_agglomerate(block, least=half, most=half, should_stop=should_stop)))
        clusters = _Clusters(
            np.concatenate([block.sums for block in blocks]),
            np.concatenate([block.seconds for block in blocks]),
            np.concatenate([block.narrow_s for block in blocks]),
        )
    return clusters


def _agglomerate(clusters: _Clusters, *, least: int, most: int | None, should_stop: Callable[[], bool]) -> Labels:
    """Join the two clusters that are most alike, again and again.

    Until `least` are left; before that when no two are alike enough, unless there are more than `most`.
    """
    sums, seconds, narrow_s = clusters.sums.copy(), clusters.seconds.copy(), clusters.narrow_s.copy()
    labels = np.arange(len(seconds))
    alive = np.ones(len(seconds), bool)
    units = unit(sums)

    def excess(number: int) -> NDArray[np.float32]:
        """By how much the cosine with each other cluster exceeds what one speaker needs.

        It is divided by what noise takes from it: the fewer seconds, the more.
        """
        clarity = np.sqrt(seconds / (seconds + _NOISE_S))
        narrow = narrow_s / seconds
        needed = _SAME_SPEAKER - _SAME_SHORT * np.exp(-np.minimum(seconds, seconds[number]) / _SHORT_S)
        needed += _NARROW_MORE * np.minimum(narrow, narrow[number])
        found: NDArray[np.float32] = ((units @ units[number]) / (clarity * clarity[number]) - needed).astype(np.float32)
        found[~alive] = -np.inf
        found[number] = -np.inf
        return found

    table = np.array([excess(number) for number in until_stopped(range(len(seconds)), should_stop)])
    for left in until_stopped(range(len(seconds), least, -1), should_stop):
        first, second = divmod(int(table.argmax()), len(seconds))
        if table[first, second] < 0 and (most is None or left <= most):
            break
        sums[first] += sums[second]
        seconds[first] += seconds[second]
        narrow_s[first] += narrow_s[second]
        units[first] = unit(sums[first])
        labels[labels == second] = first
        alive[second] = False
        table[second] = table[:, second] = -np.inf
        table[first] = table[:, first] = excess(first)
    return np.unique(labels, return_inverse=True)[1]
