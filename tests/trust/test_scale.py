"""The driver of a large run: linear in the images, and small."""

from results import read
from simulate_scale import run


def test_memory_grows_no_faster_than_the_images():
    _, large = run([500, 5_000])
    assert large["driver MB"] < 60  # some of it is what the first run of anything takes
    assert large["record bytes an image"] < 100


def test_the_kept_result():
    rows = read("scale")["rows"]
    assert rows[-1]["images"] >= 1_000_000
    before, last = rows[-2:]
    assert last["driver us an image"] < 1.5 * before["driver us an image"]
    assert last["driver MB"] < 1.5 * before["driver MB"] * last["images"] / before["images"]
