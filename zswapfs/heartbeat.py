"""Tells a worker that hangs from one that has nothing to do."""

from collections.abc import Sequence

PATIENCE = 2
"""Looks at which the same thing must not have moved."""
START_SECONDS = 60.0
"""A worker that does not serve by then hangs, too; the next one has twice the time."""


class Heartbeat:
    """What was seen of one worker, at looks that are ``heartbeat / PATIENCE`` seconds apart.

    It is looks that count, and not the clock: after a pause of the whole machine the worker gets
    the same time again as we do.
    """

    def __init__(self) -> None:
        self._steps: Sequence[int] = ()
        self._waiting = False
        self._at_same: list[int] = []
        self._not_taken = 0

    def hangs(self, steps: Sequence[int], *, waiting: bool) -> bool:
        """Look once; say whether it hangs.

        ``steps`` of each lane, as ``store.lane_steps`` has them; ``waiting``: there are requests
        that no lane has taken. One lane that was at the same request all the time hangs, or all,
        when none took what waited all the time.
        """
        if len(steps) != len(self._steps):
            self._at_same = [0] * len(steps)
        else:
            self._at_same = [
                count + 1 if now == before and now & 1 else 0
                for count, now, before in zip(self._at_same, steps, self._steps, strict=True)
            ]
        is_left = waiting and self._waiting and tuple(steps) == tuple(self._steps)
        self._not_taken = self._not_taken + 1 if is_left else 0
        self._steps, self._waiting = steps, waiting
        return max([self._not_taken, *self._at_same]) >= PATIENCE
