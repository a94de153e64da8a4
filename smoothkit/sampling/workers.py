"""Units of work on other processes and machines: any `concurrent.futures.Executor`, and the model sent once to each worker.

A unit is done by a function `work(shared, unit)`. `shared`, which holds the model, travels to a worker that does not have
it yet and is kept there; Dask is asked to do this itself. Results come back with their unit, in whatever order, and are
merged by key: an engine may do a unit twice when a worker dies, and it must not matter.
"""

import collections
import concurrent.futures
import multiprocessing
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor
from typing import Any, TypeVar

IN_FLIGHT = 128  # units handed over at a time: what the driver must hold
KEPT = 2  # runs whose shared part a worker keeps

Unit, Result = TypeVar("Unit"), TypeVar("Result")
_kept: "collections.OrderedDict[str, Any]" = collections.OrderedDict()
_one_at_a_time = threading.Lock()  # networks that are made ready once are not made for several threads


class WorkersLost(OSError):
    """The executor gave up; what came back before is kept."""


class _Missing:
    """What a worker answers that does not have the shared part yet."""


def spread(
    executor: Executor,
    work: Callable[[Any, Unit], Result],
    shared: Any,
    units: Iterable[Unit],
    *,
    sent: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Unit, Result]]:
    """Do all units on an executor; yields (unit, result) as they are done.

    Parameters
    ----------
    work : a function of a module, work(shared, unit)
    shared : what every unit needs; it goes to a worker once
    units : read as they are needed, so they may be many
    sent : called whenever `shared` is handed over

    Raises
    ------
    WorkersLost
        If the pool broke, or lost too many workers over some units, when all others are done.
    Exception
        What `work` raised.
    """
    pool = _pool_of(executor)(executor, work, shared, sent)
    units, pending, given_up = iter(units), {}, 0
    try:
        while True:
            while len(pending) < IN_FLIGHT and (unit := next(units, None)) is not None:
                pending[pool.submit(unit)] = unit
            if not pending:
                break
            done, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                unit = pending.pop(future)
                error = future.exception()
                if isinstance(error, pool.gave_up):
                    given_up += 1
                elif error is not None:
                    raise error
                elif isinstance(future.result(), _Missing):
                    pending[pool.submit(unit, send=True)] = unit
                else:
                    yield unit, future.result()
    except BrokenExecutor as error:
        raise WorkersLost(
            f"the pool of workers broke ({error or 'a worker died'}); what came back is kept: run again, with a new pool"
        ) from None
    finally:
        for future in pending:
            future.cancel()
    if given_up:
        raise WorkersLost(
            f"{given_up} units were given up because workers died of them; the others are kept: run again"
        )


def _pool_of(executor: Executor) -> "type[_Pool]":
    distributed = sys.modules.get("distributed")  # an executor of Dask's exists only where it is imported
    of_dask = distributed is not None and isinstance(executor, distributed.cfexecutor.ClientExecutor)
    return _DaskPool if of_dask else _Pool


class _Pool:
    """Hands units to any executor: the first takes the shared part along, and whoever lacks it asks for it."""

    gave_up: tuple[type[BaseException], ...] = ()  # errors of a unit that several workers died of

    def __init__(self, executor: Executor, work: Callable, shared: Any, sent: Callable[[], None]) -> None:
        self.executor, self.work, self.shared, self.sent = executor, work, shared, sent
        self.token, self._first = secrets.token_hex(8), True

    def submit(self, unit: Any, *, send: bool = False) -> concurrent.futures.Future:
        send, self._first = send or self._first, False
        if send:
            self.sent()
        return self.executor.submit(_do_kept, self.work, self.token, unit, self.shared if send else None)


class _DaskPool(_Pool):
    """Dask brings the shared part to every worker itself, and to later ones."""

    def __init__(self, executor: Executor, work: Callable, shared: Any, sent: Callable[[], None]) -> None:
        import distributed  # an extra; whoever made this executor has it

        super().__init__(executor, work, shared, sent)
        self.gave_up = (distributed.KilledWorker,)
        self.shared = executor._client.scatter(shared, broadcast=True, hash=False)
        sent()

    def submit(self, unit: Any, *, send: bool = False) -> concurrent.futures.Future:
        return self.executor.submit(_do, self.work, self.shared, unit)


def _do(work: Callable, shared: Any, unit: Any) -> Any:
    with _one_at_a_time:
        return work(shared, unit)


def _do_kept(work: Callable, token: str, unit: Any, shared: Any) -> Any:
    if shared is not None:
        _kept[token] = shared
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    if token not in _kept:
        return _Missing()
    return _do(work, _kept[token], unit)


# --- one process for each GPU of this machine ----------------------------------------------------------


def gpu_pool(devices: int) -> Executor:
    """A pool with one process for each of the first `devices` GPUs, which sees no other.

    Raises
    ------
    ValueError
        If there is none.
    """
    if devices < 1:
        raise ValueError("devices='all' needs a CUDA device and found none; leave it out to use the CPU")
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    numbers = context.Queue()
    for number in _visible(devices):
        numbers.put(number)
    return concurrent.futures.ProcessPoolExecutor(devices, context, _see_one, (numbers,))


def _visible(devices: int) -> list[str]:
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    return known.split(",")[:devices] if known else [str(i) for i in range(devices)]


def _see_one(numbers) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = numbers.get()
