"""Memory-based certification: the promise, its cases, the ledger it is kept in."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from smoothbook.sigma.distances import exact_squared_distance
from smoothbook.sigma.ledger import Ledger, LedgerError, Receipt
from smoothbook.sigma.memory import RULES, Memory, settle
from smoothkit.types import ABSTAIN

A, B = 0, 1
PLANE = dict(model="toy", shape=(1, 1, 2), check_range=False)


def point(*xy: float) -> np.ndarray:
    return np.array(xy, dtype=np.float32).reshape(1, 1, -1)


def ask(memory: Memory, xy: tuple[float, ...], predicted: int, radius: float) -> tuple[int, float]:
    answer = memory.answer(point(*xy), predicted, radius)
    return answer.predicted, answer.radius


def exactly_below(z: np.ndarray, points: np.ndarray, reach: np.ndarray, exact_reach) -> np.ndarray:
    """Where |z - points[i]| < reach[i]: in rational arithmetic wherever float64 is near a tie."""
    d = np.linalg.norm(z.astype(np.float64) - points, axis=1)
    below = d < reach
    for i in np.flatnonzero(np.abs(d - reach) < 1e-9 * (1 + reach)):
        below[i] = exact_squared_distance(z, points[i]) < exact_reach(i) ** 2
    return below


# --- soundness ---------------------------------------------------------------------------------------


def random_questions(rng: np.random.Generator, n: int, scale: float, dims: int = 2):
    """Half of the questions fall near or into an earlier ball; labels are random and radii exponential."""
    earlier: list[tuple[np.ndarray, float]] = []
    for _ in range(n):
        if earlier and rng.random() < 0.5:
            centre, radius = earlier[rng.integers(len(earlier))]
            direction = rng.normal(size=dims)
            x = centre + direction / np.linalg.norm(direction) * radius * rng.choice([0.3, 0.9, 1 - 1e-7, 1.0, 1.1])
        else:
            x = rng.uniform(0, 10, dims)
        x = x.astype(np.float32)
        predicted = int(rng.integers(-1, 3))
        radius = 0.0 if predicted == ABSTAIN else float(rng.exponential(scale))
        yield x, predicted, radius
        earlier.append((x.astype(np.float64), radius))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [0.5, 50.0])  # radii that could be certified, and absurd ones: it is all the same
def test_no_later_question_inside_a_kept_ball_gets_another_label(rule, scale):
    """The property test of 600 questions, decided in exact arithmetic: soundness does not come from smoothing."""
    memory, rng = Memory(**PLANE, rule=rule), np.random.default_rng(7)
    points, labels, radii = np.zeros((600, 2), np.float32), np.zeros(600, np.int64), np.zeros(600)
    kept = overwritten = 0
    for x, predicted, radius in random_questions(rng, 600, scale):
        answer = memory.answer(x.reshape(1, 1, 2), predicted, radius)
        held = exactly_below(x, points[:kept], radii[:kept], lambda i: Fraction(radii[i]))
        assert set(labels[:kept][held]) <= {answer.predicted}
        overwritten += answer.case == 2
        if answer.predicted != ABSTAIN:
            points[kept], labels[kept], radii[kept] = x, answer.predicted, answer.radius
            kept += 1
    assert len(memory) == kept > 400 and overwritten > 50
    assert memory.overlaps() == []
    for i in range(kept):  # the invariant: balls of different labels are disjoint
        r = Fraction(radii[i])
        overlap = exactly_below(points[i], points[:i], radii[:i] + radii[i], lambda j, r=r: Fraction(radii[j]) + r)
        assert (labels[:i][overlap] == labels[i]).all()


def test_the_promise_holds_in_the_last_bit():
    """Points whose distance is within rounding of the radius: float64 cannot tell, and the answer is still right."""
    rng, undecided = np.random.default_rng(3), 0
    for _ in range(300):
        memory = Memory(model="toy", shape=(1, 1, 48), check_range=False)
        x, y = (rng.uniform(0, 1, 48).astype(np.float32) for _ in range(2))
        d = float(np.sqrt(((x.astype(np.float64) - y) ** 2).sum()))
        radius = float(d * (1 + rng.integers(-2, 3) * 2.0**-53))
        memory.answer(x.reshape(1, 1, 48), A, radius)
        undecided += abs(radius / d - 1) < 1e-15
        held = exact_squared_distance(x, y) < Fraction(radius) ** 2
        answer = memory.answer(y.reshape(1, 1, 48), B, 1.0)
        assert answer.predicted == (A if held else B)
        assert answer.radius <= 1e-12
    assert undecided > 250


def test_distances_are_not_those_of_a_matrix_product():
    """Two images of 3,072 float32 values 0.055 apart: the shortcut is wrong by percents, these are not."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, 3072).astype(np.float32)
    y = (x + rng.normal(0, 0.001, 3072)).astype(np.float32)
    exact = float(exact_squared_distance(x, y)) ** 0.5
    memory = Memory(model="toy", shape=(3, 32, 32), check_range=False)
    memory.answer(x.reshape(3, 32, 32), A, 2 * exact)
    answer = memory.answer(y.reshape(3, 32, 32), B, 1.0)
    assert (answer.predicted, answer.case) == (A, 2)
    assert exact - 1e-9 < answer.radius <= float(Fraction(2 * exact) - Fraction(exact))
    shortcut = torch.cdist(*(torch.from_numpy(v)[None] for v in (x, y)), compute_mode="use_mm_for_euclid_dist")
    assert abs(float(shortcut) / exact - 1) > 0.01


# --- the cases ---------------------------------------------------------------------------------------

# (x, computed class and radius, answer by the rule min(R, R_i - d), answer by the rule R_i - d); section 5.1 of
# the method note, computed there with NumPy
WORKED = [
    ((0, 0), (A, 1.0), (A, 1.0), (A, 1.0), 0),
    ((3, 0), (B, 1.5), (B, 1.5), (B, 1.5), 0),
    ((1.2, 0), (A, 0.8), (A, 0.3), (A, 0.3), 3),
    ((1.8, 0.5), (A, 0.9), (B, 0.2), (B, 0.2), 2),
    ((2.5, 0), (A, 0.25), (B, 0.25), (B, 1.0), 2),
    ((0.6, 0), (A, 2.0), (A, 0.9), (A, 0.9), 3),
    ((0, 0.5), (ABSTAIN, 0.0), (A, 0.5), (A, 0.5), 4),
    ((0, 5), (ABSTAIN, 0.0), (ABSTAIN, 0.0), (ABSTAIN, 0.0), 5),
    ((0, 1.0), (B, 0.5), (B, 0.0), (B, 0.0), 3),  # on the boundary of the first ball, which is open
    ((0, 2.5), (B, 5.0), (B, 1.5), (B, 1.5), 3),
]


@pytest.mark.parametrize("rule", [0, 1])
def test_worked_example(rule):
    memory = Memory(**PLANE, rule=RULES[rule])
    for xy, (predicted, radius), *expected, case in WORKED:
        answer = memory.answer(point(*xy), predicted, radius)
        label, kept = expected[rule]
        assert (answer.predicted, answer.case) == (label, case)
        assert answer.radius == pytest.approx(kept, abs=2e-7)  # 1.2 and 1.8 are no float32 values
        assert (answer.computed, answer.computed_radius) == (predicted, radius)
    assert len(memory) == 9 and memory.overlaps() == []
    x, labels, radii = memory.points.reshape(-1, 2).astype(float), memory.labels, memory.radii
    apart = np.linalg.norm(x[:, None] - x, axis=2) - radii[:, None] - radii
    assert apart[labels[:, None] != labels].min() >= -1e-12


def test_order_decides_radii_and_what_a_look_up_says():
    forward, backward = Memory(**PLANE), Memory(**PLANE)
    assert ask(forward, (3, 0), B, 1.5) == (B, 1.5)
    assert ask(forward, (1.2, 0), A, 0.8) == (A, pytest.approx(0.3, abs=2e-7))
    assert ask(backward, (1.2, 0), A, 0.8) == (A, 0.8)
    assert ask(backward, (3, 0), B, 1.5) == (B, pytest.approx(1.0, abs=2e-7))
    assert forward.look_up(point(1.9, 0))[0] == B and backward.look_up(point(1.9, 0))[0] == A
    assert len(forward) == 2  # a look-up keeps nothing


def test_order_decides_labels():
    forward, backward = Memory(**PLANE), Memory(**PLANE)
    assert ask(forward, (3, 0), B, 1.5) == (B, 1.5)
    assert ask(forward, (1.8, 0.5), A, 0.9) == (B, pytest.approx(0.2, abs=2e-7))
    assert ask(backward, (1.8, 0.5), A, 0.9) == (A, 0.9)
    assert ask(backward, (3, 0), B, 1.5) == (B, pytest.approx(0.4, abs=2e-7))


def test_whoever_asks_first_can_plant_a_label():
    memory = Memory(**PLANE)
    assert ask(memory, (0.9, 0), B, 1.0) == (B, 1.0)
    assert ask(memory, (0, 0), A, 1.0) == (B, pytest.approx(0.1, abs=2e-7))


def test_a_fresh_memory_promises_nothing_about_a_perturbed_image():
    """x + delta inside the ball that x would get: asked first, it keeps its own label and x's ball shrinks."""
    memory = Memory(**PLANE)
    assert ask(memory, (0.5, 0), B, 0.2) == (B, 0.2)
    assert ask(memory, (0, 0), A, 1.0) == (A, pytest.approx(0.3))


def test_within_a_question_the_order_of_the_entries_does_not_matter():
    rng = np.random.default_rng(1)
    memory = Memory(**PLANE)
    for x, predicted, radius in random_questions(rng, 200, 0.7):
        memory.answer(x.reshape(1, 1, 2), predicted, radius)
    points, labels, radii = memory.points.reshape(-1, 2), memory.labels, memory.radii
    for x, predicted, radius in random_questions(rng, 50, 0.7):
        shuffled = rng.permutation(len(labels))
        for rule in RULES:
            answers = {
                settle(x, predicted, radius, points[o], labels[o], radii[o], rule=rule)
                for o in (np.arange(len(labels)), shuffled, shuffled[::-1])
            }
            assert len(answers) == 1


def test_the_filter_changes_nothing():
    """All entries at once, without the norm filter, give what the memory gives."""
    rng = np.random.default_rng(5)
    memory = Memory(model="toy", shape=(3, 4, 4), check_range=False)
    for x, predicted, radius in random_questions(rng, 250, 2.0, dims=48):
        entries = memory.points.reshape(-1, 48), memory.labels, memory.radii
        expected = settle(x, predicted, radius, *entries)
        assert memory.answer(x.reshape(3, 4, 4), predicted, radius) == expected


def test_same_image_again():
    memory = Memory(**PLANE)
    assert ask(memory, (0, 0), A, 1.0) == (A, 1.0)
    assert ask(memory, (0, 0), A, 0.5) == (A, 0.5)
    assert ask(memory, (0, 0), B, 2.0) == (A, 1.0)
    assert ask(memory, (0, 0), ABSTAIN, 0.0) == (A, 1.0)


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "predicted", "radius", "message"),
    [
        (point(0.5, 1.5), A, 1.0, r"must lie in \[0, 1\], got values from 0.5 to 1.5"),
        (point(0.5, -0.1), A, 1.0, r"must lie in \[0, 1\]"),
        (point(0.5, np.nan), A, 1.0, "NaN"),
        (point(0.5, 0.5, 0.5), A, 1.0, r"shape \(1, 1, 3\), and this memory is of images \(1, 1, 2\)"),
        (np.zeros((1, 1, 2), dtype=np.uint8), A, 1.0, "divide by 255"),
        (point(0, 0), -2, 1.0, "class of at least 0, or ABSTAIN"),
        (point(0, 0), True, 1.0, "class of at least 0"),
        (point(0, 0), A, -0.1, "finite and at least 0"),
        (point(0, 0), A, np.inf, "finite"),
        (point(0, 0), ABSTAIN, 0.5, "must be 0 where the prediction is ABSTAIN"),
    ],
)
def test_bad_questions_keep_nothing(image, predicted, radius, message, tmp_path):
    with Memory(tmp_path / "m", model="toy", shape=(1, 1, 2)) as memory:
        memory.answer(point(0.25, 0.25), A, 0.1)
        before = memory.receipt
        with pytest.raises(ValueError, match=message):
            memory.answer_all([point(0.75, 0.75), image], [B, predicted], [0.1, radius])
        assert len(memory) == 1 and memory.receipt == before
        memory.answer(torch.full((1, 1, 2), 0.75), B, 0.1)
    assert len(Memory(tmp_path / "m", model="toy", shape=(1, 1, 2))) == 2


def test_bad_settings():
    with pytest.raises(ValueError, match="rule must be one of"):
        Memory(model="toy", shape=(1, 1, 2), rule="largest")
    with pytest.raises(ValueError, match="at least one value"):
        Memory(model="toy", shape=(0, 2, 2))


# --- on disk -----------------------------------------------------------------------------------------

KEPT = dict(model="toy", shape=(1, 1, 2))


def filled(folder, n: int = 20) -> Receipt:
    rng = np.random.default_rng(0)
    with Memory(folder, **KEPT) as memory:
        for _ in range(n):
            memory.answer(rng.uniform(0, 1, (1, 1, 2)).astype(np.float32), int(rng.integers(2)), 0.05)
        return memory.receipt


def test_a_memory_survives_a_restart(tmp_path):
    """Answers across restarts, and in batches, are those of one memory that never stopped."""
    questions = list(random_questions(np.random.default_rng(2), 120, 0.5))
    steady = Memory(**PLANE)
    expected = [steady.answer(x.reshape(1, 1, 2), c, r) for x, c, r in questions]
    answers = []
    for low in range(0, 120, 30):
        with Memory(tmp_path / "m", **PLANE) as memory:
            x, c, r = zip(*questions[low : low + 30], strict=True)
            answers += memory.answer_all([v.reshape(1, 1, 2) for v in x], c, r)
    assert answers == expected
    with Memory(tmp_path / "m", **PLANE) as memory:
        assert memory.receipt == steady.receipt and np.array_equal(memory.radii, steady.radii)


def test_other_models_and_shapes_are_refused(tmp_path):
    filled(tmp_path / "m", 2)
    with pytest.raises(LedgerError, match="model 'toy' instead of 'other'"):
        Memory(tmp_path / "m", model="other", shape=(1, 1, 2))
    with pytest.raises(LedgerError, match=r"shape \[1, 1, 2\] instead of \[1, 2, 1\]"):
        Memory(tmp_path / "m", model="toy", shape=(1, 2, 1))
    with pytest.raises(LedgerError, match="rule"):
        Memory(tmp_path / "m", **KEPT, rule="inside the kept ball")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    with pytest.raises(LedgerError, match=r"holds no ledger\.json"):
        Memory(tmp_path / "else", **KEPT)


def test_a_second_writer_is_refused(tmp_path):
    folder = tmp_path / "m"
    with Memory(folder, **KEPT) as memory:
        with pytest.raises(LedgerError, match="open elsewhere"):
            Memory(folder, **KEPT)
        code = f"from smoothbook.sigma.memory import Memory\nMemory({str(folder)!r}, model='toy', shape=(1, 1, 2))"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode and "open elsewhere" in other.stderr
        memory.answer(point(0.5, 0.5), A, 0.1)  # and nothing was lost
    assert len(Memory(folder, **KEPT)) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_copy_of_the_process_cannot_write(tmp_path):
    def write(pipe):
        try:
            memory.answer(point(0.1, 0.1), B, 0.1)
            pipe.send("wrote")
        except LedgerError as error:
            pipe.send(str(error))

    with Memory(tmp_path / "m", **KEPT) as memory:
        memory.answer(point(0.5, 0.5), A, 0.1)
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=write, args=(there,))
        child.start()
        child.join(30)
        assert "opened by another process" in here.recv()
        memory.answer(point(0.9, 0.9), B, 0.1)
    assert len(Memory(tmp_path / "m", **KEPT)) == 2


def test_lost_and_edited_entries_are_found(tmp_path):
    folder = tmp_path / "m"
    receipt = filled(folder)
    good = (folder / "entries.bin").read_bytes()
    step = len(good) // 20

    def damaged(entries: bytes) -> str:
        (folder / "entries.bin").write_bytes(entries)
        with pytest.raises(LedgerError) as error:
            Memory(folder, **KEPT)
        return str(error.value)

    edited = bytearray(good)
    edited[5 * step + 8] ^= 1  # the last bit of a radius
    assert "entry 5" in damaged(bytes(edited)) and "was changed" in damaged(bytes(edited))
    assert "entry 3" in damaged(good[: 3 * step] + good[4 * step :] + good[:step])
    assert "has lost entries: 19 are there, and 20 were" in damaged(good[:-step])
    assert "has lost entries" in damaged(b"")
    (folder / "entries.bin").write_bytes(good)
    head = (folder / "head.json").read_text()
    (folder / "head.json").write_text(json.dumps({"entries": 20, "digest": "00"}))
    with pytest.raises(LedgerError, match=r"does not end as its head\.json says"):
        Memory(folder, **KEPT)
    (folder / "head.json").unlink()
    with pytest.raises(LedgerError, match="incomplete"):
        Memory(folder, **KEPT)
    (folder / "head.json").write_text(head)
    with Memory(folder, **KEPT, receipt=receipt) as memory:
        assert len(memory) == 20


def test_a_receipt_finds_a_memory_that_was_put_back(tmp_path):
    before = filled(tmp_path / "m", 3)
    shutil.copytree(tmp_path / "m", tmp_path / "old")
    with Memory(tmp_path / "m", **KEPT) as memory:
        memory.answer(point(0.99, 0.99), A, 0.01)
        receipt = memory.receipt
    with pytest.raises(LedgerError, match="has 3 entries, and the receipt is for 4"):
        Memory(tmp_path / "old", **KEPT, receipt=receipt)
    with Memory(tmp_path / "old", **KEPT) as memory:
        memory.answer(point(0.01, 0.99), A, 0.01)
    with pytest.raises(LedgerError, match="held something else"):
        Memory(tmp_path / "old", **KEPT, receipt=receipt)
    assert len(Memory(tmp_path / "m", **KEPT, receipt=before)) == 4  # an older receipt is as good


def test_a_torn_entry_is_cut_off_and_a_whole_one_kept(tmp_path):
    """A process killed between writing an entry and saying so; nobody was told of the entry."""
    folder = tmp_path / "m"
    filled(folder, 3)
    head = (folder / "head.json").read_text()
    with Memory(folder, **KEPT) as memory:
        memory.answer(point(0.99, 0.99), A, 0.01)
    entries = (folder / "entries.bin").read_bytes()
    (folder / "head.json").write_text(head)
    with Memory(folder, **KEPT) as memory:
        assert len(memory) == 4
    (folder / "head.json").write_text(head)
    (folder / "entries.bin").write_bytes(entries[:-5])
    with pytest.warns(UserWarning, match="torn entry"):
        memory = Memory(folder, **KEPT)
    assert len(memory) == 3
    memory.answer(point(0.01, 0.01), A, 0.01)
    memory.close()
    assert len(Memory(folder, **KEPT)) == 4


def test_a_killed_writer_loses_nothing_it_answered(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from smoothbook.sigma.memory import Memory\n"
        "memory, rng = Memory(sys.argv[1], model='toy', shape=(1, 1, 2)), np.random.default_rng(0)\n"
        "while True:\n"
        "    answer = memory.answer(rng.uniform(0, 1, (1, 1, 2)).astype(np.float32), int(rng.integers(2)), 0.02)\n"
        "    print(answer.predicted, answer.radius, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "m")], stdout=subprocess.PIPE, text=True)
    told = [process.stdout.readline().split() for _ in range(40)]
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    told += [line.split() for line in process.stdout.read().splitlines() if line.count(" ") == 1]
    process.wait()
    with Memory(tmp_path / "m", **KEPT) as memory:
        assert len(memory) >= len(told) - 1  # the last line may be cut
        for (label, radius), kept, r in zip(told[:-1], memory.labels, memory.radii, strict=False):
            assert int(label) == kept and float(radius) == r


def test_failed_writes_lose_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    filled(folder, 3)
    memory = Memory(folder, **KEPT)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        memory.answer(point(0.5, 0.5), A, 0.1)
    monkeypatch.undo()
    assert len(memory) == 3
    with pytest.raises(LedgerError, match="is closed"):
        memory.answer(point(0.5, 0.5), A, 0.1)
    assert len(Memory(folder, **KEPT)) >= 3


def test_entries_of_another_size():
    with pytest.raises(ValueError, match="entries must have 3 bytes"):
        Ledger(None, {}, size=3).append([b"four"])


def test_a_memory_of_many_images_is_quick():
    """600 images of CIFAR's size, smooth as photographs are, by the filter."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 1, (600, 3, 8, 8)).astype(np.float32))
    images = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear").numpy()
    memory = Memory(model="toy", shape=(3, 32, 32))
    began = time.process_time()
    answers = memory.answer_all(list(images), rng.integers(0, 10, 600).tolist(), rng.uniform(0, 1, 600).tolist())
    assert {a.case for a in answers} == {0} and time.process_time() - began < 10
