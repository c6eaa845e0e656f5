"""Schedules: estimate once, or at each super-epoch."""

from __future__ import annotations

from ._library import number

__all__ = ["Schedule"]


class Schedule:
    """Super-epochs of a training run, made by `Schedule.offline` or `Schedule.online`. Epochs are counted from 0.

    >>> schedule = Schedule.online(10, 5)  # the paper's
    >>> [epoch for epoch in range(25) if schedule.ends(epoch)]
    [9, 14, 19, 24]
    """

    def __init__(self, lengths: tuple[int, int] | None) -> None:
        self._lengths = lengths

    @staticmethod
    def offline() -> Schedule:
        """A single super-epoch without end: estimate once, at the start, and keep the weights."""
        return Schedule(None)

    @staticmethod
    def online(warm_up: int, super_epoch: int) -> Schedule:
        """A first super-epoch of `warm_up` epochs, then super-epochs of `super_epoch` epochs. The paper uses 10 and 5.

        `Error` if either is not positive.
        """
        return Schedule((number("warm_up", warm_up, 1, 2**63 - 1), number("super_epoch", super_epoch, 1, 2**63 - 1)))

    def starts(self, epoch: int) -> bool:
        """Whether a super-epoch starts with this epoch: estimate from losses before it. True for epoch 0."""
        epoch = number("epoch", epoch, 0, 2**63 - 1)
        if epoch == 0 or self._lengths is None:
            return epoch == 0
        warm_up, super_epoch = self._lengths
        return epoch >= warm_up and (epoch - warm_up) % super_epoch == 0

    def ends(self, epoch: int) -> bool:
        """Whether a super-epoch ends with this epoch: reweight from gradients after it. Never true offline."""
        return self._lengths is not None and self.starts(number("epoch", epoch, 0, 2**63 - 2) + 1)

    def length(self, epoch: int) -> int | None:
        """Epochs of the super-epoch that contains this epoch, for `gb_estimate`. None offline."""
        epoch = number("epoch", epoch, 0, 2**63 - 1)
        return None if self._lengths is None else self._lengths[epoch >= self._lengths[0]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self._lengths == other._lengths

    def __hash__(self) -> int:
        return hash(self._lengths)

    def __repr__(self) -> str:
        return "Schedule.offline()" if self._lengths is None else "Schedule.online({}, {})".format(*self._lengths)
