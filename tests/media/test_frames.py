"""The cache of frames."""

from media.frames import FrameCache


def test_frame_cache_is_bounded_and_drops_the_oldest():
    cache = FrameCache(100)
    for name in "abc":
        cache.put((name,), name, 40)
    assert cache.get(("a",)) is None and cache.get(("b",)) == "b"
    cache.put(("d",), "d", 40)
    assert cache.get(("c",)) is None and cache.get(("b",)) == "b" and cache.n_bytes == 80
    cache.put(("b",), "B", 60)
    assert cache.get(("b",)) == "B" and cache.n_bytes == 100
    cache.put(("e",), "e", 101)
    assert cache.get(("e",)) is None and cache.n_bytes == 100
