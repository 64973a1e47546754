"""A cache of what was read from video files: resized frames and packet tables."""

from __future__ import annotations

import threading
from collections import OrderedDict


class FrameCache:
    """The most recently used resized frames and packet tables, up to `max_bytes`; it can be shared between threads."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.n_bytes = max_bytes, 0
        self.items: OrderedDict[tuple, tuple[object, int]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: tuple):
        """What is kept under a key, or None."""
        with self.lock:
            if key not in self.items:
                return None
            self.items.move_to_end(key)
            return self.items[key][0]

    def put(self, key: tuple, value: object, n_bytes: int) -> None:
        """Keep a value, in place of those least recently used. One larger than the whole cache is not kept."""
        with self.lock:
            if key in self.items:
                self.n_bytes -= self.items.pop(key)[1]
            if n_bytes <= self.max_bytes:
                self.items[key] = (value, n_bytes)
                self.n_bytes += n_bytes
            while self.n_bytes > self.max_bytes:
                self.n_bytes -= self.items.popitem(last=False)[1][1]
