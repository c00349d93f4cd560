"""Draws and orders that depend on nothing but names and a seed.

Python's `hash` differs from run to run, and the streams of `random` have changed between versions. SHA-256
of a name does neither, so the same bytes give the same rows on every machine.
"""

import hashlib
from collections.abc import Iterable, Sequence

from converters.corpus.texts import Document


class Draws:
    """A stream of draws for one name: SHA-256 of seed, name and a counter."""

    def __init__(self, seed: int, name: str) -> None:
        self._prefix = f"{seed}/{name}/".encode()
        self._n_drawn = 0

    def below(self, bound: int) -> int:
        """A whole number from 0 to `bound` - 1 (0 for a bound below one)."""
        digest = hashlib.sha256(self._prefix + str(self._n_drawn).encode()).digest()
        self._n_drawn += 1
        return int.from_bytes(digest[:8], "little") % max(bound, 1)

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both possible."""
        return low + self.below(high - low + 1)


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """Return the names in the order of their digests."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())


def in_turns(documents: Sequence[Document], seed: int) -> list[Document]:
    """Return all documents, shuffled, so that every prefix holds each language in its share of the whole.

    The language that has had the smallest part of its characters gives the next document.
    """
    by_key = {f"{i}/{document.name}": document for i, document in enumerate(documents)}
    queues: dict[str, list[Document]] = {}
    for key in reversed(shuffled(by_key, seed)):
        queues.setdefault(by_key[key].language, []).append(by_key[key])
    total = {language: sum(len(d.text) for d in queue) or 1 for language, queue in queues.items()}
    given = dict.fromkeys(queues, 0)
    order = []
    for _ in documents:
        turn = min(
            (lang for lang in queues if queues[lang]), key=lambda lang: (given[lang] / total[lang], lang)
        )
        document = queues[turn].pop()
        given[turn] += len(document.text)
        order.append(document)
    return order
