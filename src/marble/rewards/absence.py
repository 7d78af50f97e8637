"""Rewards that have stopped answering: counted, and the end of a run that would go on without them."""

from __future__ import annotations

from collections.abc import Sequence

from marble.rewards.base import RewardTable


class Absence:
    """How many updates in a row each reward has given no score for, though it should have."""

    def __init__(self, limit: int) -> None:
        """A reward absent for `limit` updates or more is lost."""
        self.limit = limit
        self.updates: dict[str, int] = {}
        self._silent: set[str] = set()  # in the epoch counted last

    def count(self, table: RewardTable, updates: int) -> None:
        """Take note of an epoch's table, from which `updates` were made; one score brings a reward back."""
        self._silent = set(table.silent)
        for name, wanted, missing in zip(table.names, table.wanted.sum(dim=0), table.missing, strict=True):
            if missing < wanted:
                self.updates.pop(name, None)
            elif wanted:
                self.updates[name] = self.updates.get(name, 0) + updates

    @property
    def lost(self) -> list[str]:
        """Rewards to stop for: asked in the last epoch, too."""
        return [name for name, updates in self.updates.items() if updates >= self.limit and name in self._silent]

    def message(self, names: Sequence[str], updates: int) -> str:
        """What to tell the user when the run stops for `names`, saved after `updates`."""
        return (
            f"rewards: no score of {', '.join(names)} "
            + (f"in {self.limit} updates in a row or more (missing_limit)" if self.lost else "in a whole epoch")
            + f"; the run has stopped, saved after update {updates}; mend it, then go on with marble train --resume"
        )
