"""Reading ahead of who uses what is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(read: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """``read`` of every item in the order of ``items``, in ``workers`` threads ahead of the caller.

    At most ``workers + 1`` results wait for it. 0 workers read when they are asked. Threads, as
    decoding releases Python's lock.
    """
    if workers == 0:
        yield from map(read, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="image-reader")
    ahead: deque[Future[R]] = deque()
    try:
        for item in items:
            if len(ahead) > workers:
                yield ahead.popleft().result()
            ahead.append(pool.submit(read, item))
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
