"""Batches of several aspect-ratio buckets: each step draws from one bucket, so a batch has one resolution."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.networks.control_maps import resized

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.training.batches import Batch, Batches


class Schedule:
    """The bucket of each step, as a function of the step, the number of images per bucket, and the seed.

    Each bucket is an endless sequence of its own shuffled epochs, cut into batches. In each epoch of the whole data set
    a bucket has as many steps as its images fill batches; the steps of all buckets are shuffled, and the images that
    remain begin the bucket's first batch of the next epoch. So no image is drawn again before all others of its bucket.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int) -> None:
        self.counts, self.batch_size, self.seed = list(counts), batch_size, seed
        self._epoch, self._order = -1, list[int]()

    def at(self, step: int) -> tuple[int, int]:
        """Return the bucket of 0-based `step`, and the number of batches drawn from it before."""
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
        """Return the last epoch that begins at or before `step`; epochs without a full batch have no step."""
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
    """`Batches` of several buckets as one: all parts and processes of a step draw from the same bucket.

    `shape` is the shape of a square input, in which sample images are drawn.
    """

    def __init__(self, buckets: Sequence[Batches], shape: tuple[int, ...], seed: int) -> None:
        first = buckets[0]
        self.buckets, self.shape, self.size, self.where = buckets, shape, first.size, first.where
        whole = first.size * first.config.parts * first.config.processes
        self.schedule = Schedule([batches.store.count for batches in buckets], whole, seed)

    def draw(self, step: int, part: int = 0) -> Batch:
        """Draw the batch of `step` (0-based) and `part`; equal arguments return equal tensors."""
        bucket, turn = self.schedule.at(step)
        return self.buckets[bucket].draw(turn, part)

    def conditions(self, count: int) -> Tensor | None:
        """Return conditions for `count` sample images, from the bucket with the most images."""
        return self._largest.conditions(count)

    def controls(self, count: int) -> Tensor | None:
        """Return the control maps of the same images, resized to the square of sample images."""
        maps, factor = self._largest.controls(count), self.buckets[0].conditioning.control_factor or 1
        return None if maps is None else resized(maps, self.shape[-2] * factor, self.shape[-1] * factor)

    @property
    def _largest(self) -> Batches:
        return max(self.buckets, key=lambda batches: batches.store.count)
