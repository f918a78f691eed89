"""Aspect-ratio buckets: pictures that are not square keep their shape, and a batch holds pictures of one shape.

A *form* is (height, width) in pixels. The square of `image.size` is always the first; the others have about its area
and sides that codec and network can halve (Podell et al. 2023, section 2.3). Every picture goes to the nearest form.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.training.batches import Batch, Batches

Form: TypeAlias = "tuple[int, int]"

SQUARE = 0
"""The number of its bucket."""


def forms(size: int, ratios: Sequence[float], multiple: int) -> list[Form]:
    """The square, then for each of `ratios` (width / height) the form of that shape and the square's area, as near as
    sides that are multiples of `multiple` come; each form once."""
    found = [(size, size)]
    for ratio in ratios:
        stretch = math.sqrt(max(ratio, 1 / ratio))
        shorter = multiple * max(1, round(size / stretch / multiple))
        longer = multiple * max(1, round(size * size / shorter / multiple))
        found.append((shorter, longer) if ratio > 1 else (longer, shorter))
    return list(dict.fromkeys(found))


def nearest(height: int, width: int, among: Sequence[Form]) -> int:
    """Which of the forms has the shape nearest to that of a picture; of two that are as near, the first."""
    shape = math.log(width / height)
    return min(range(len(among)), key=lambda number: abs(shape - math.log(among[number][1] / among[number][0])))


class Schedule:
    """From which bucket each step draws: a function of the step, of how many images a bucket has, and of the seed.

    Each bucket is one endless sequence of its own shuffled epochs, cut into batches. In an epoch of the whole, a bucket
    has its turns as soon as its images fill a batch, in shuffled order with the others'; what is left over begins its
    first batch of the next epoch. So no picture is drawn again before every other one of its bucket was.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int) -> None:
        self.counts, self.batch_size, self.seed = list(counts), batch_size, seed
        self._epoch, self._order = -1, list[int]()

    def at(self, step: int) -> tuple[int, int]:
        """The bucket of 0-based `step`, and how many batches were drawn from it before."""
        epoch = self._epoch_of(step)
        order = self._order_of(epoch)
        place = step - self._steps_before(epoch)
        bucket = order[place]
        return bucket, self._turns_before(bucket, epoch) + order[:place].count(bucket)

    def _turns_before(self, bucket: int, epoch: int) -> int:
        return self.counts[bucket] * epoch // self.batch_size

    def _steps_before(self, epoch: int) -> int:
        return sum(self._turns_before(bucket, epoch) for bucket in range(len(self.counts)))

    def _epoch_of(self, step: int) -> int:
        """The last epoch that begins at `step` or before; one that is too small for a batch has no step."""
        earliest = step * self.batch_size // sum(self.counts)
        latest = earliest + (len(self.counts) * self.batch_size) // sum(self.counts) + 1
        return earliest + bisect.bisect_right(range(earliest, latest + 1), step, key=self._steps_before) - 1

    def _order_of(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            buckets = range(len(self.counts))
            turns = [self._turns_before(bucket, epoch + 1) - self._turns_before(bucket, epoch) for bucket in buckets]
            self._epoch, self._order = epoch, [bucket for bucket in buckets for _ in range(turns[bucket])]
            random.Random(f"{self.seed}/buckets/{epoch}").shuffle(self._order)
        return self._order


class Bucketed:
    """`Batches` of several buckets as one: a step draws from one of them, in all of its parts and processes.

    `shape` is that of the square, by which samples are drawn.
    """

    def __init__(self, buckets: Sequence[Batches], shape: tuple[int, ...], seed: int) -> None:
        first = buckets[0]
        self.buckets, self.shape, self.size, self.where = buckets, shape, first.size, first.where
        whole = first.size * first.parts * first.processes
        self.schedule = Schedule([batches.store.count for batches in buckets], whole, seed)

    def draw(self, step: int, part: int = 0) -> Batch:
        """The batch of `step` (0-based) and `part`; the same arguments give the same tensors."""
        bucket, turn = self.schedule.at(step)
        return self.buckets[bucket].draw(turn, part)

    def conditions(self, count: int) -> Tensor | None:
        """Conditions to draw `count` samples by, as those of the fullest bucket."""
        return max(self.buckets, key=lambda batches: batches.store.count).conditions(count)
