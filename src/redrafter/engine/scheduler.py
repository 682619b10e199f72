"""The decode loop: rows wait, enter free slots, have their prompts read, are decoded step by step, and finish.

Guarantees that every row ends, that a row which fails ends alone, and that slots are reused.  Reads of prompts are
bounded while other rows are being decoded, so that these wait no longer than one such read between two steps.  Does not
know how a step is run, nor who receives the results.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from redrafter.decoding.step import PromptPart
from redrafter.engine.active import ActiveRow
from redrafter.engine.pending import PendingStep
from redrafter.engine.request import Task
from redrafter.engine.results import Event
from redrafter.engine.runner import Runner
from redrafter.engine.slots import Slots

MAX_READ = 8192
"""Prompt tokens in one forward pass, counting padding; limits the memory of activations."""

MAX_LATER_READ = 512
"""The same for text that does not begin with the pass, which needs a dense mask or the kernels."""

MAX_PADDING = 1.25
"""The longest prompt of a forward pass has at most this many times the tokens of the shortest."""

GATHER_SHARE, GATHER_STEPS = 32, 4
"""Prompts are read beside steps once one waits for every 32 rows that are being decoded, or after 4 steps."""

SHRINK_AFTER = 8
"""Steps with few rows after which rows move together, so that later steps compute fewer slots."""


@dataclass
class _Reading:
    """A row whose prompt is being read."""

    active: ActiveRow
    start: int = 0


class Scheduler:
    """Assigns rows to the slots of a runner and cuts steps into events."""

    def __init__(
        self,
        runner: Runner,
        *,
        slots: int | None = None,
        read_tokens: int | None = None,
        ahead: bool = True,
        prefixes: bool = False,
    ):
        """`slots`: the number of rows to decode together; None for all that the runner has room for.

        `read_tokens`: how many prompt tokens are read between two steps of other rows; None for complete prompts.
        `ahead` allows launching a step before the previous one was read, which overwrites the emission of the latter.
        `prefixes`: whether prompts may use keys and values of earlier texts that begin alike.
        """
        self._runner, self._ahead = runner, ahead
        self._budget = MAX_READ if read_tokens is None else read_tokens
        self.waiting: deque[Task] = deque()
        """Rows that have no slot yet, in order."""
        self.active: dict[int, ActiveRow] = {}
        """The row that is being decoded in each slot."""
        self._reading: dict[int, _Reading] = {}
        self.slots = Slots(runner, runner.state.batch if slots is None else slots, prefixes=prefixes)
        """The slots for rows."""
        self._pending: deque[PendingStep] = deque()
        self._gathered = 0  # steps that prompts have waited for others
        self._small = 0  # steps since which fewer slots would suffice
        self.steps = 0
        """Steps so far."""

    @property
    def idle(self) -> bool:
        """Whether no row waits or is being decoded."""
        return not (self.waiting or self._reading or self.active)

    @property
    def running(self) -> int:
        """Rows that have a slot."""
        return len(self.active) + len(self._reading)

    @property
    def used_positions(self) -> int:
        """Cache slots that hold keys and values of running rows."""
        return sum(row.committed for row in self.active.values()) + sum(one.start for one in self._reading.values())

    def add(self, task: Task) -> None:
        """A row joins the end of the queue."""
        self.waiting.append(task)

    def cancel(self, task: Task) -> bool:
        """Removes a row, wherever it is.  Returns whether it was there."""
        if task in self.waiting:
            self.waiting.remove(task)
            return True
        for slot, row in [*self.active.items(), *((slot, one.active) for slot, one in self._reading.items())]:
            if row.task is task:
                self._release(slot)
                return True
        return False

    def step(self) -> list[tuple[Task, Event | Exception]]:
        """Admits rows, reads prompts and returns the results of one step; empty if there was only reading.

        An exception ends its row; the exceptions that this method raises concern all rows.
        """
        if self.active or self._pending:
            self._admit()
        else:
            self.read_prompts()
        limit = 2 if self._ahead and self._runner.launches_ahead else 1
        while len(self._pending) < limit and self.active:
            if self._pending and not self._continues():
                break
            self._pending.append(self._launch())
        if not self._pending:
            return []
        pending = self._pending.popleft()
        result = self._runner.result(pending, waited=limit == 1)
        self.steps += 1
        found: list[tuple[Task, Event | Exception]] = []
        for index, owner in result.owners:
            row: ActiveRow = owner
            if self.active.get(row.slot) is not row:
                continue  # it ended in an earlier step, or was cancelled
            outcome = row.outcome(result, index, self._runner.state.rows.text)
            if isinstance(outcome, Event):
                outcome.step = self.steps
            if isinstance(outcome, Exception) or outcome.finish_reason is not None:
                self._release(row.slot)
            found.append((row.task, outcome))
        return found

    def read_prompts(self) -> None:
        """Admits rows and reads their prompts, without a step."""
        self._admit()
        self._read_alone()

    def abandon(self) -> list[Task]:
        """Ends all rows that have a slot, after an error of the device or the model.  Returns their tasks."""
        rows = [*self.active.values(), *(one.active for one in self._reading.values())]
        self._pending.clear()
        for row in rows:
            self._release(row.slot)
        return [row.task for row in rows]

    def _admit(self) -> None:
        """Gives free slots to waiting rows."""
        entering: dict[int, _Reading] = {}
        while self.slots.free and self.waiting:
            task = self.waiting.popleft()
            task.admitted = time.perf_counter()
            slot, found = self.slots.take(task.row, [*self.active, *self._reading, *entering])
            entering[slot] = _Reading(ActiveRow(task, slot), found)
        if entering:
            self._runner.enter({slot: one.active.task.row for slot, one in entering.items()})
            self._reading |= entering
            self._start_read_rows()

    def _start_read_rows(self) -> None:
        """Rows whose prompts are read begin to be decoded."""
        for slot in [slot for slot, one in self._reading.items() if one.start >= one.active.to_read]:
            row = self.active[slot] = self._reading.pop(slot).active
            self.slots.holds(slot, row.task.row.prompt[: row.to_read])

    def _read_alone(self) -> None:
        """Reads prompts while no row is being decoded: together if their lengths are similar."""
        while self._reading:
            fresh = sorted((one for one in self._reading.values() if not one.start), key=lambda one: one.active.to_read)
            if not fresh:
                self._read([self._part(next(iter(self._reading.values())), MAX_LATER_READ)])
                continue
            shortest = max(1, fresh[0].active.to_read)
            parts: list[PromptPart] = []
            for one in fresh:
                width = min(one.active.to_read, MAX_READ)
                if parts and (width * (len(parts) + 1) > MAX_READ or width > MAX_PADDING * shortest):
                    break
                parts.append(self._part(one, MAX_READ))
            self._read(parts)

    def _part(self, one: _Reading, most: int) -> PromptPart:
        return PromptPart(one.active.slot, one.active.task.row, one.start, min(one.active.to_read, one.start + most))

    def _read(self, parts: list[PromptPart]) -> None:
        parts = [part for part in parts if part.stop > part.start]
        if parts:
            self._runner.read(parts)
        self._have_read(parts)

    def _have_read(self, parts: Iterable[PromptPart]) -> None:
        for part in parts:
            self._reading[part.slot].start = part.stop
        self._start_read_rows()

    def _launch(self) -> PendingStep:
        """Starts a step of all rows that are being decoded, and reads parts of prompts beside or before it."""
        self.slots.end()
        self._move_together()
        parts = self._next_parts()
        if parts and not self._runner.reads_while_decoding:
            for part in parts:
                self._read([part])
            parts = []
        rows = {slot: row.task.row for slot, row in self.active.items()}
        unread = len(self._pending) * (self._runner.length + 1)  # tokens, at most
        committed = unread + max(row.committed for row in self.active.values())
        pending = self._runner.launch(rows, [*self.active.items()], committed, parts)
        self._have_read(parts)
        return pending

    def _next_parts(self) -> list[PromptPart]:
        """What to read now, first come, first served, within the budget.

        Reading beside a step costs much the same for one prompt as for several, so a few steps may pass until others
        wait too.
        """
        together = self._runner.reads_while_decoding and len(self._reading) * GATHER_SHARE < len(self.active)
        if self._reading and together and self._gathered < GATHER_STEPS:
            self._gathered += 1
            return []
        self._gathered = 0
        parts: list[PromptPart] = []
        left = min(self._budget, MAX_LATER_READ) if self._runner.reads_while_decoding else self._budget
        for one in self._reading.values():
            part = self._part(one, min(left, MAX_LATER_READ) if one.start else left)
            parts.append(part)
            left -= part.stop - part.start
            if left <= 0:
                break
        return parts

    def _continues(self) -> bool:
        """Whether some row is still being decoded after all steps that were launched."""
        unread = len(self._pending) * (self._runner.length + 1)
        return any(row.left > unread for row in self.active.values())

    def _release(self, slot: int) -> None:
        """Frees the slot of a row.  What is in its cache stays."""
        row = self.active.pop(slot, None)
        if row is None:
            reading = self._reading.pop(slot)
            text = reading.active.task.row.prompt[: reading.start]
        else:
            text = (row.task.row.prompt + row.written)[: row.committed]
        self.slots.release(slot, text)

    def _move_together(self) -> None:
        """Moves rows from the last slots to free ones if later steps then compute fewer slots."""
        rounded = self._runner.rounded
        occupied = [*self.active, *self._reading]
        if rounded(len(occupied)) >= rounded(1 + max(self.active)):
            self._small = 0
            return
        self._small += 1
        if self._small < SHRINK_AFTER:
            return
        for source in sorted(self.active, reverse=True):
            if source <= self.slots.free[0]:
                break
            row = self.active.pop(source)
            unread = len(self._pending) * (self._runner.length + 1) + self._runner.size
            row.slot = self.slots.move(source, row.committed + unread)
            self.active[row.slot] = row
