"""Which voices belong to one speaker: clusters of embeddings. No state; any thread may call it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cesar_mqtt.errors import Cancelled

Embedding: TypeAlias = NDArray[np.float32]
"""A voice; shape (192,), of length 1."""
Embeddings: TypeAlias = NDArray[np.float32]
"""Shape (n, 192)."""
Labels: TypeAlias = NDArray[np.int64]
"""The number of the cluster of each embedding, from 0."""

SAME_SPEAKER = 0.45
"""The least cosine of two clusters of much speech for them to be one speaker."""
_NOISE_S = 0.7
"""So many seconds of speech give an embedding that is half noise."""
_CLEAR_S = 1.5
"""Voices of less speech found no cluster; they are given to one."""
_LEAST_SPOKEN_S = 3.0
"""A cluster of less speech is no speaker."""
_MOST_AT_ONCE = 1200
_ROUNDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Voices:
    """What was heard of each speaker of each window.

    Attributes:
        embeddings: of length 1.
        seconds: how much speech each was made of.
        windows: the number of the window of each; two of one window are two speakers.
    """

    embeddings: Embeddings
    seconds: NDArray[np.float32]
    windows: NDArray[np.int64]


def cluster(
    voices: Voices, *, min_speakers: int | None, max_speakers: int | None, should_stop: Callable[[], bool]
) -> Labels:
    """Find the speakers.

    Args:
        voices: what was heard; at least one.
        min_speakers: at least so many, as far as there are voices; None: one.
        max_speakers: at most so many; None: as many as there are.
        should_stop: asked again and again.

    Raises:
        Cancelled: `should_stop` returned True.
    """
    least = max(min_speakers or 1, 1)
    order = np.argsort(-voices.seconds, kind="stable")
    clear = order[: max(least, int((voices.seconds >= _CLEAR_S).sum()))]
    clear.sort()
    sums = voices.embeddings[clear] * voices.seconds[clear, np.newaxis]
    seconds = voices.seconds[clear].astype(np.float64)
    sums, seconds = _condense(sums, seconds, least, should_stop)
    labels = _agglomerate(sums, seconds, SAME_SPEAKER, least=least, most=max_speakers, should_stop=should_stop)
    spoken_s = np.bincount(labels, weights=seconds)
    longest = np.argsort(-spoken_s, kind="stable")
    kept = longest[: max(least, int((spoken_s >= _LEAST_SPOKEN_S).sum()))]
    centres = np.array([sums[labels == label].sum(axis=0) for label in kept])
    return _assign(voices, centres, should_stop)


def _condense(
    sums: Embeddings, seconds: NDArray[np.float64], least: int, should_stop: Callable[[], bool]
) -> tuple[Embeddings, NDArray[np.float64]]:
    """Join what is certainly one voice, block by block, until few enough are left to compare all with all."""
    while len(seconds) > _MOST_AT_ONCE:
        joined: list[Embeddings] = []
        joined_s: list[NDArray[np.float64]] = []
        for first in range(0, len(seconds), _MOST_AT_ONCE):
            part = slice(first, first + _MOST_AT_ONCE)
            half = max(least, len(seconds[part]) // 2)
            labels = _agglomerate(sums[part], seconds[part], 1.0, least=half, most=half, should_stop=should_stop)
            joined.append(np.array([sums[part][labels == label].sum(axis=0) for label in range(labels.max() + 1)]))
            joined_s.append(np.bincount(labels, weights=seconds[part]).astype(np.float64))
        sums, seconds = np.concatenate(joined), np.concatenate(joined_s)
    return sums, seconds


def _agglomerate(
    sums: Embeddings,
    seconds: NDArray[np.float64],
    same: float,
    *,
    least: int,
    most: int | None,
    should_stop: Callable[[], bool],
) -> Labels:
    """Join the two clusters that are most alike, again and again, until no two are alike enough.

    The cosine of two clusters is divided by what noise takes from it: the fewer seconds, the more.
    """
    sums, seconds = sums.copy(), seconds.copy()
    labels = np.arange(len(seconds))
    alive = np.ones(len(seconds), bool)
    units, clarity = _unit(sums), np.sqrt(seconds / (seconds + _NOISE_S))
    scores = (units @ units.T) / np.outer(clarity, clarity)
    np.fill_diagonal(scores, -np.inf)
    nearest = scores.argmax(axis=1)
    best = scores[labels, nearest]
    for left in range(len(seconds), least, -1):
        if should_stop():
            raise Cancelled
        first = int(best.argmax())
        if best[first] < same and (most is None or left <= most):
            break
        second = int(nearest[first])
        sums[first] += sums[second]
        seconds[first] += seconds[second]
        labels[labels == second] = first
        alive[second] = False
        units[first] = _unit(sums[first])
        clarity[first] = np.sqrt(seconds[first] / (seconds[first] + _NOISE_S))
        row = np.where(alive, (units @ units[first]) / (clarity * clarity[first]), -np.inf)
        row[first] = -np.inf
        scores[first], scores[:, first] = row, row
        scores[second], scores[:, second] = -np.inf, -np.inf
        best[second] = -np.inf
        for number in np.flatnonzero(alive & ((nearest == first) | (nearest == second) | (labels == first))):
            nearest[number] = scores[number].argmax()
            best[number] = scores[number, nearest[number]]
        closer = alive & (row > best)
        nearest[closer], best[closer] = first, row[closer]
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _assign(voices: Voices, centres: Embeddings, should_stop: Callable[[], bool]) -> Labels:
    """Give each voice to the speaker that it is most like, and move the speakers there; a few rounds."""
    weighted = voices.embeddings * voices.seconds[:, np.newaxis]
    labels = np.full(len(weighted), -1)
    for _ in range(_ROUNDS):
        if should_stop():
            raise Cancelled
        found = (voices.embeddings @ _unit(centres).T).argmax(axis=1)
        if (found == labels).all():
            break
        labels = found
        for number in range(len(centres)):
            members = labels == number
            if members.any():
                centres[number] = weighted[members].sum(axis=0)
    return labels.astype(np.int64)


def _unit(vectors: Embeddings) -> Embeddings:
    units: Embeddings = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
    return units
