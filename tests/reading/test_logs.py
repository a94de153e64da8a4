"""Logs of every dialect, damaged ones, and the alpha their radii fit.

The fixtures are made here, row by row; none is copied from anybody's log. The released logs of Cohen et al. 2019 are
read where SMOOTHKIT_DATA says, and those tests skip where it is not set.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from smoothkit.certify import bounds
from smoothkit.reading import LogError, consistent_alphas, infer_alpha, read_log, write_log
from smoothkit.reading.logs import Problem
from smoothkit.types import ABSTAIN, round_down

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
PLAIN = (HEADER, "0\t3\t3\t0.4321\t1\t1.5", "1\t5\t-1\t0.0\t0\t2.5", "2\t7\t2\t0.1234\t0\t3.5")


@pytest.fixture
def write(tmp_path):
    def write(*lines: str, name: str = "made-up", end: str = "\n") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(lines) + end, encoding="utf-8")
        return path

    return write


def whats(log) -> str:
    return "\n".join(map(str, log.problems))


# --- dialects ------------------------------------------------------------------------------------------

# dialect, kind, lines; each says: image 0 class 3 with radius 0.4321, image 1 abstains, image 2 wrong with 0.1234
DIALECTS = {
    "cohen": ("certify", PLAIN),
    "cohen-predict": (
        "predict",
        (
            "idx\tlabel\tpredict\tcorrect\ttime",
            "0\t3\t3\t1\t0:00:01.5",
            "1\t5\t-1\t0\t0:00:02.5",
            "2\t7\t2\t0\t0:00:03.5",
        ),
    ),
    "smoothadv-predict": (
        "predict",
        (
            "idx\tlabel\tpredict\tbasePredict\tcorrect\ttime",
            "0\t3\t3\t3\t1\t0:00:01.5",
            "1\t5\t-1\t4\t0\t0:00:02.5",
            "2\t7\t2\t7\t0\t0:00:03.5",
        ),
    ),
    "data-dependent": (
        "certify",
        (
            "idx\tlabel\tpredict\tradius\tcorrect\tsigma\ttime",
            "0\t3\t3\t0.4321\t1\t0.13\t0:00:01.5",
            "1\t5\t-1\t0.0\t0\t0.12\t0:00:02.5",
            "2\t7\t2\t0.1234\t0\t0.11\t0:00:03.5",
        ),
    ),
    "lora-denoising": (
        "certify",
        (
            "idx\tlabel\tpredict\tradius\tcorrect_num\tcorrect\ttime",
            "0\t3\t3\t0.4321\t1\tTrue\t0:00:01.5",
            "1\t5\t-1\t0.0\t1\tFalse\t0:00:02.5",
            "2\t7\t2\t0.1234\t1\tFalse\t0:00:03.5",
        ),
    ),
    "multi-scale": (
        "certify",
        (
            "idx\tlabel\tpredict\tradius\tr_neg\tcorrect\tpred_uc\tcorr_uc\tstage\ttime",
            "0\t3\t3\t0.4321\t-1e+02\t1\t3\t1\t0\t0:00:01.5",
            "1\t5\t-1\t0.0\t-1e+02\t0\t5\t1\t2\t0:00:02.5",
            "2\t7\t2\t0.1234\t-0.55\t0\t2\t0\t1\t0:00:03.5",
        ),
    ),
    "adaptive-sampling": (
        "certify",
        (
            "idx\tlabel\tpredict\tradius proved\tcorrect\tlevels_needed\testimated_pr\ttime",
            "0\t3\t3\t0.4321\t1\t1\t0.99\t0:00:01.5",
            "1\t5\t-1\t0.0\t0\t3\t0.5\t0:00:02.5",
            "2\t7\t2\t0.1234\t0\t2\t0.7\t0:00:03.5",
        ),
    ),
    "adaptive-smoothing": (
        "certify",
        (
            "idx \t label \t predict \t l2_radius \t prob_lb \t correct \t time",
            "0 \t 3 \t 3 \t 0.4321 \t 0.97 \t 1 \t 1.5",
            "1 \t 5 \t -1 \t -0.0312 \t 0.45 \t 0 \t 2.5",
            "2 \t 7 \t 2 \t 0.1234 \t 0.6 \t 0 \t 3.5",
        ),
    ),
    "hydra": (
        "certify",
        (
            HEADER.replace("idx", "original_idx"),
            "0\t3\t3\t0.4321\t1\t0:00:01.5",
            "1\t5\t-2\t0.0\t1\t0:00:02.5",
            "2\t7\t2\t0.1234\t1\t0:00:03.5",
        ),
    ),
    "hydra-csv": (
        "certify",
        (
            "image_id,original_label,predicted_class,epsilon_value,total_time,prediction_status",
            "0,3,3,0.4321,0:00:01.5,3",
            "1,5,-1,0.0,0:00:02.5,-1",
            "2,7,2,0.1234,0:00:03.5,2",
        ),
    ),
    "running-correct": (
        "certify",
        (HEADER, "0\t3\t3\t0.4321\t1\t0:00:01.5", "1\t5\t-1\t0.0\t1\t0:00:02.5", "2\t7\t2\t0.1234\t1\t0:00:03.5"),
    ),
    "input-specific-sampling": (
        "certify",
        (
            "idx\tlabel\tpredict\tradius\tcorrect\tpA\tsamplesize\ttime",
            "0\t3\t3\t0.4321\t1\t0.97\t900\t0:00:01.5",
            "1\t5\t-1\t0.0\t0\t0.45\t100\t0:00:02.5",
            "2\t7\t2\t0.1234\t0\t0.6\t400\t0:00:03.5",
            "",
            "mean size of the samples: 466.7",
            "radius: 0.14 on average",
        ),
    ),
    "vision-api": (
        "certify",
        (
            "idx\tcorrect\tradius\tlabel\tpredict",
            "0\tTrue\t0.4321\t3\t3",
            "1\tFalse\t0.0\t5\t-1",
            "2\tFalse\t0.1234\t7\t2",
        ),
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_table(write, dialect):
    kind, lines = DIALECTS[dialect]
    log = read_log(write(*lines))
    assert (log.dialect, log.kind) == (dialect, kind)
    assert log.table["idx"].tolist() == [0, 1, 2]
    assert log.table["label"].tolist() == [3, 5, 7]
    assert log.table["predict"].tolist() == [3, ABSTAIN, 2]
    assert log.table["correct"].tolist() == [True, False, False]
    if kind == "certify":
        assert log.table["radius"].tolist() == [0.4321, 0.0, 0.1234]
    else:
        assert log.table["radius"].isna().all()
    seconds = log.table["seconds"].tolist()
    assert np.isnan(seconds).all() if dialect == "vision-api" else seconds == [1.5, 2.5, 3.5]
    dtypes = log.table.dtypes
    assert [str(dtypes[c]) for c in ("idx", "label", "predict", "radius", "correct", "seconds")] == [
        *["int64"] * 3,
        "float64",
        "bool",
        "float64",
    ]


@pytest.mark.parametrize(
    ("dialect", "extra"),
    [
        ("smoothadv-predict", {"basePredict": [3, 4, 7]}),
        ("data-dependent", {"sigma": [0.13, 0.12, 0.11]}),
        ("lora-denoising", {"correct_num": [1, 1, 1]}),
        ("multi-scale", {"r_neg": [-100.0, -100.0, -0.55], "stage": [0, 2, 1], "corr_uc": [1, 1, 0]}),
        ("adaptive-sampling", {"levels_needed": [1, 3, 2], "estimated_pr": [0.99, 0.5, 0.7]}),
        ("adaptive-smoothing", {"prob_lb": [0.97, 0.45, 0.6]}),
        ("input-specific-sampling", {"pA": [0.97, 0.45, 0.6], "samplesize": [900, 100, 400]}),
        ("hydra", {"predict_code": [3, -2, 2]}),
        ("hydra-csv", {"prediction_status": [3, -1, 2]}),
    ],
)
def test_other_columns_are_kept_under_their_names(write, dialect, extra):
    table = read_log(write(*DIALECTS[dialect][1])).table
    for name, values in extra.items():
        assert table[name].tolist() == values


@pytest.mark.parametrize("dialect", ["cohen", "cohen-predict", "smoothadv-predict", "data-dependent", "lora-denoising"])
def test_sound_dialects_raise_no_problem(write, dialect):
    assert read_log(write(*DIALECTS[dialect][1])).problems == ()


@pytest.mark.parametrize(
    ("dialect", "row", "what"),
    [
        ("hydra", 3, "code below -1"),
        ("adaptive-smoothing", 3, "negative radius on an abstention"),
        ("input-specific-sampling", 6, "2 lines of text below the rows"),
        ("adaptive-sampling", 1, "not the largest"),
        ("running-correct", 2, r"running total \(up to 1\)"),
    ],
)
def test_what_a_dialect_does_otherwise_is_said(write, dialect, row, what):
    log = read_log(write(*DIALECTS[dialect][1]))
    assert re.search(what, next(problem.what for problem in log.problems if problem.row == row))
    assert all(problem.severity == "warning" for problem in log.problems)


@pytest.mark.parametrize(
    "change", [lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n"), lambda t: "\n\n" + t + "\n"]
)
def test_byte_order_marks_line_ends_and_blank_lines_do_no_harm(tmp_path, change):
    path = tmp_path / "log"
    path.write_bytes(change("\n".join(PLAIN) + "\n").encode())
    log = read_log(path)
    assert log.problems == ()
    assert len(log.table) == 3


def test_long_runs_print_days(write):
    log = read_log(write(HEADER, "0\t3\t3\t0.4321\t1\t1 day, 0:00:14.25", "1\t3\t3\t0.1234\t1\tsoon"))
    assert log.table["seconds"].tolist()[0] == 86_414.25
    assert np.isnan(log.table["seconds"].tolist()[1])
    assert "time is neither" in whats(log)


def test_class_names_are_numbered(write):
    log = read_log(write("idx\tcorrect\tradius\tlabel\tpredict", "0\tTrue\t0.4321\towl\towl", "1\tFalse\t0.0\tcat\t-1"))
    assert log.table["label"].tolist() == [1, 0]
    assert log.table["predict"].tolist() == [1, ABSTAIN]
    assert log.table["label_name"].tolist() == ["owl", "cat"]
    assert "alphabetical" in whats(log)


# --- sigma ---------------------------------------------------------------------------------------------


def test_sigma_and_how_it_is_known(write):
    path = write(*PLAIN, name="sigma_0.25")
    assert (read_log(path).sigma, read_log(path).sigma_source) == (0.25, "file name")
    assert (read_log(path, sigma=0.5).sigma, read_log(path, sigma=0.5).sigma_source) == (0.5, "argument")
    assert read_log(write(*PLAIN, name="log.tsv")).sigma is None
    constant = ("idx\tlabel\tpredict\tradius\tcorrect\tsigma\ttime", "0\t3\t3\t0.4321\t1\t0.12\t1.5")
    assert (read_log(write(*constant)).sigma, read_log(write(*constant)).sigma_source) == (0.12, "column")
    assert read_log(write(*DIALECTS["data-dependent"][1])).sigma is None  # one sigma an image
    with pytest.raises(ValueError, match=r"did you mean 0\.251"):
        read_log(path, sigma=64)


# --- damage --------------------------------------------------------------------------------------------


def test_correct_is_recomputed_and_a_disagreement_names_the_row(write):
    log = read_log(write(HEADER, "0\t3\t3\t0.4321\t0\t1", "1\t5\t5\t0.1234\t1\t1", "2\t5\t4\t0.2345\t1\t1"))
    assert log.table["correct"].tolist() == [True, True, False]
    assert [p.row for p in log.problems] == [2]
    assert "correct disagrees with label and predict; recomputed (2 rows: lines 2, 4)" in whats(log)


def test_an_abstention_labelled_minus_one_is_not_correct(write):
    assert read_log(write(HEADER, "0\t-1\t-1\t0.0\t0\t1")).table["correct"].tolist() == [False]


def test_a_running_total_is_not_read_by_parity(write):
    # two in three are right: the parity of the total would make it one in three
    rows, total = [], 0
    for i in range(30):
        right = i % 3 != 2
        total += right
        rows.append(f"{i}\t1\t{1 if right else 0}\t0.4321\t{total}\t1.0")
    log = read_log(write(HEADER, *rows))
    assert log.table["correct"].mean() == pytest.approx(2 / 3)
    assert log.dialect == "running-correct"
    assert "running total (up to 20), not 0/1" in whats(log)
    rows[9] = rows[9].replace("\t1\t1\t", "\t1\t0\t")
    assert "line 11: the running total moves otherwise than label and predict" in whats(read_log(write(HEADER, *rows)))


@pytest.mark.parametrize(
    ("row", "predict", "what"),
    [
        ("1\t5\t-1\t-0.25\t0\t1", ABSTAIN, "line 3: a negative radius on an abstention, set to 0"),
        ("1\t5\t-1\t0.7312\t0\t1", ABSTAIN, "line 3: a positive radius on an abstention, set to 0"),
        ("1\t5\t5\t-0.2512\t0\t1", ABSTAIN, "line 3: a negative radius beside a class, read as abstain"),
        ("1\t5\t-2\t0.7312\t0\t1", ABSTAIN, "line 3: a code below -1 instead of a class"),
    ],
)
def test_a_row_that_claims_nothing_gets_radius_zero(write, row, predict, what):
    log = read_log(write(HEADER, "0\t3\t3\t0.4321\t1\t1", row))
    assert log.table["radius"].tolist() == [0.4321, 0.0]
    assert log.table["predict"].tolist() == [3, predict]
    assert not log.table["correct"].iloc[1]
    assert what in whats(log)


def test_duplicate_indices_are_named_and_kept(write):
    log = read_log(write(*PLAIN, "0\t3\t3\t0.4321\t1\t1.5", "2\t7\t2\t0.1234\t0\t3.5"))
    assert len(log.table) == 5
    assert log.problems[0].row == 2
    assert "2 indices more than once, 2 rows too many" in whats(log)
    assert "lines 2, 4, 5, 6" in whats(log)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("1\t5\t5\t0.2", "4 fields where the header has 6"),
        ("1\t5\t5\t0.2\t1\t1.0\t9", "7 fields where the header has 6"),
        ("1\t5\tfive\t0.2\t1\t1.0", "predict is 'five', not a whole number"),
        ("1.5\t5\t5\t0.2\t1\t1.0", "idx is '1.5', not a whole number"),
        ("1\t5\t5\tnan\t1\t1.0", "radius is 'nan', not a finite number"),
        ("1\t5\t5\tinf\t1\t1.0", "radius is 'inf', not a finite number"),
        ("1\t5\t5\t\t1\t1.0", "radius is '', not a finite number"),
    ],
)
def test_a_row_that_does_not_parse_is_named_and_the_rest_kept(write, row, what):
    log = read_log(write(PLAIN[0], PLAIN[1], row, PLAIN[2]))
    assert log.problems == (Problem(3, f"{what}; row left out of every rate", "error"),)
    assert log.table["idx"].tolist() == [0, 1]


def test_a_log_cut_off_inside_a_row(write):
    log = read_log(write(*PLAIN, "3\t7\t2\t0.", end=""))
    assert [(p.row, p.severity) for p in log.problems] == [(5, "error")]
    assert len(log.table) == 3


def test_joined_logs_repeat_their_header(write):
    log = read_log(write(*PLAIN, HEADER, "3\t7\t7\t0.4321\t1\t1.5"))
    assert len(log.table) == 4
    assert "line 5: the header line again" in whats(log)


@pytest.mark.parametrize(
    ("radii", "count"),
    [(["1.0", "0.25", "0.421"], 2), (["0.421", "0.978", "0.0125"], 0), (["0.250", "1.500", "1.234"], 2)],
)
def test_three_digits_may_have_been_rounded_up(write, radii, count):
    log = read_log(write(HEADER, *(f"{i}\t3\t3\t{r}\t1\t1" for i, r in enumerate(radii))))
    assert "may have been rounded up" in whats(log)
    assert f"{count} row{'' if count == 1 else 's'} exactly on a multiple of 0.25" in whats(log)


def test_more_digits_are_not_suspected(write):
    log = read_log(write(HEADER, "0\t3\t3\t0.250000\t1\t1", "1\t3\t3\t0.000012\t1\t1"))
    assert log.problems == ()


def grid(count: int, step: int, *, start: int = 0, without: tuple[int, ...] = ()) -> list[str]:
    indices = [start + step * i for i in range(count)]
    return [HEADER, *(f"{i}\t3\t3\t0.4321\t1\t1" for i in indices if i not in without)]


@pytest.mark.parametrize(
    ("count", "step", "what"),
    [
        (
            427,
            100,
            "427 rows; indices in steps of 100 end at 42600; over 50,000 images they would go on to 49900 (500 rows)",
        ),
        (
            250,
            20,
            "250 rows; indices in steps of 20 end at 4980; over 10,000 images they would go on to 9980 (500 rows)",
        ),
        (500, 100, None),
        (500, 20, None),
        (513, 2500, None),  # every 2,500th of the ImageNet training images
        (300, 1, None),  # the first so many: a choice, not a loss
        (5, 100, None),  # too few to speak of a spacing
    ],
)
def test_a_regular_grid_that_stops_early(write, count, step, what):
    log = read_log(write(*grid(count, step)))
    assert whats(log) == ("" if what is None else f"line {count + 1}: {what}")


def test_the_path_tells_how_long_the_grid_should_be(write):
    assert read_log(write(*grid(500, 20), name="cifar10")).problems == ()
    assert "over 50,000 images" in whats(read_log(write(*grid(500, 20), name="imagenet")))


def test_gaps_in_a_regular_grid(write):
    log = read_log(write(*grid(500, 20, without=(40, 60))))
    assert "498 rows; indices in steps of 20 leave out 2 of 500 (first 40)" in whats(log)


def test_expected_rows(write):
    path = write(*grid(427, 100))
    assert "427 rows where 500 were expected" in whats(read_log(path, expected_rows=500))
    assert read_log(path, expected_rows=427).problems == ()


# --- not a log -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"\n \n", r"is empty \(3 bytes\)"),
        (b"\xef\xbb\xbf ", r"is empty \(4 bytes\)"),
        (b"\x1c", r"is empty \(1 bytes\)"),
        (b"PK\x03\x04\x00\x00", r"holds binary data \(starts with b'PK"),
        (b"\xff\xfe\xfa\xfb", "holds binary data"),
        (b"Dear reader, this is prose.\nIt goes on.\n", "not a certification log: its first line, 'Dear reader"),
        (b"epoch\tloss\n1\t0.5\n", "no column idx, label, predict; expected a header such as"),
        (b"0\t3\t3\t0.4\t1\t1.5\n", "no header, the first line is a row; put 'idx label predict radius correct time'"),
        (b"idx\tlabel\tpredict\tradius\tcorrect\ttime\n", "a header and no row that could be read"),
        (b"idx\tlabel\tpredict\n1\t2\n", "no row that could be read; line 2: 2 fields where the header has 3"),
        (b"o 12 0.931 0.975\no 13 0.5 0.6\n", "double-sampling log"),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(tmp_path, content, match):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(LogError, match=match) as caught:
        read_log(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_damaged_file_is_read_or_refused_but_never_breaks(tmp_path, dialect):
    # 200 files a dialect with a few bytes cut out, doubled or overwritten, at seed 0
    random = np.random.default_rng(0)
    whole = ("\n".join(DIALECTS[dialect][1]) + "\n").encode()
    path = tmp_path / "file"
    for _ in range(200):
        raw = bytearray(whole)
        for _ in range(random.integers(1, 6)):
            at, length = random.integers(len(raw)), random.integers(1, 12)
            swaps = [b"", raw[at : at + length] * 2, b"\t", b"-", b"1e99", b"\n", b":::", b"nan", b"\xff"]
            raw[at : at + length] = swaps[random.integers(len(swaps))]
            raw = raw or bytearray(b" ")
        path.write_bytes(raw)
        try:
            log = read_log(path)
        except LogError as error:
            assert "\n" not in str(error)
            continue
        assert len(log.table) and (log.kind == "predict" or np.isfinite(log.table["radius"]).all())
        assert not log.table.loc[log.table["predict"] == ABSTAIN, "correct"].any()


def test_absurd_indices_cost_nothing(write):
    rows = [f"{i}\t3\t3\t0.4321\t1\t1" for i in [*range(0, 40, 2), 2**52]]
    assert "leave out" in whats(read_log(write(HEADER, *rows)))
    with pytest.raises(LogError, match="not a whole number"):
        read_log(write(HEADER, "1e300\t3\t3\t0.4321\t1\t1"))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(LogError, match="no such file"):
        read_log(tmp_path / "nothing")
    with pytest.raises(LogError, match="is a folder, not a log"):
        read_log(tmp_path)


# --- alpha ---------------------------------------------------------------------------------------------


def simulated(alpha: float, sigma: float, n: int, *, digits: str = ".3g", images: int = 300) -> pd.DataFrame:
    """A table as a log printed by somebody: vote counts near n, at seed 0."""
    k = n - np.random.default_rng(0).geometric(0.02, images) + 1
    radii = bounds.radius(bounds.clopper_pearson_lower(k, n, alpha), sigma)
    return pd.DataFrame({"predict": 1, "radius": [float(format(r, digits)) for r in radii]})


@pytest.mark.parametrize("alpha", [0.0001, 0.001, 0.01, 0.05])
@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5, 1.0])
def test_the_alpha_of_simulated_logs_is_found(alpha, sigma):
    finding = infer_alpha(simulated(alpha, sigma, 100_000), sigma, claimed=alpha)
    assert alpha in finding.consistent
    # at sigma 0.5 the largest radii, above 1, have two decimals: few of them differ and other alphas fit by chance
    assert len(finding.consistent) == 1 or sigma == 0.5
    assert finding.alpha == alpha
    assert f"fit alpha = {alpha:g}" in finding.sentence


def test_several_alphas_that_fit_are_all_named():
    finding = infer_alpha(simulated(0.0001, 0.5, 100_000), 0.5)
    assert finding.consistent == (0.0001, 0.02, 0.05)
    assert finding.alpha is None
    assert finding.text == "0.0001 or 0.02 or 0.05 (claimed 0.001)"


@pytest.mark.parametrize("digits", [".6f", ".4f", ".17g"])
def test_finer_digits_tell_as_well(digits):
    assert infer_alpha(simulated(0.01, 0.5, 100_000, digits=digits), 0.5).consistent == (0.01,)


def test_another_n():
    assert infer_alpha(simulated(0.001, 0.25, 1_000), 0.25, n=1_000).consistent == (0.001,)
    wrong = infer_alpha(simulated(0.001, 0.25, 100_000), 0.25, n=20_000)
    assert wrong.consistent == () and wrong.alpha is None
    assert "fit no alpha tried at n = 20,000" in wrong.sentence


def test_a_log_written_here_still_tells_its_alpha(tmp_path):
    table = simulated(0.001, 0.5, 100_000, digits=".17g").assign(label=1, idx=range(300))
    write_log(table, tmp_path / "log")
    assert infer_alpha(read_log(tmp_path / "log").table, 0.5).consistent == (0.001,)


def test_consistent_alphas_counts_a_hand_made_case():
    # at alpha 0.01 and n = 100,000 unanimous votes print 0.978 at sigma 0.25; at 0.001 the cap is 0.953
    table = consistent_alphas(np.array([0.978, 0.978, 0.3, 0.0]), 0.25, candidates=(0.001, 0.01)).set_index("alpha")
    assert table["resolvable"].tolist() == [2, 2]
    assert table["fit"].to_dict() == {0.001: 0, 0.01: 2}
    assert table["fraction"].to_dict() == {0.001: 0.0, 0.01: 1.0}
    assert table.loc[0.001, "cap"] == pytest.approx(0.25 * 3.811457, abs=1e-6)


@pytest.mark.parametrize("radii", [[], [0.3, 0.2], [0.978] * 50])
def test_too_few_large_radii(radii):
    finding = infer_alpha(pd.DataFrame({"predict": [1] * len(radii), "radius": np.array(radii, dtype=float)}), 0.25)
    assert finding.alpha is None
    assert "too few large radii to tell" in finding.sentence
    assert finding.text == "? (claimed 0.001)"


def test_alpha_and_sigma_are_checked():
    empty = pd.DataFrame({"predict": [], "radius": []})
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\)"):
        infer_alpha(empty, 0.25, claimed=95)
    with pytest.raises(ValueError, match="sigma must be"):
        consistent_alphas(np.array([0.5]), 0.0)


# 12 released test logs and what their large radii fit: certify/DATASET/MODEL/noise_TRAINED/test/sigma_CERTIFIED
RELEASED = [
    ("cifar10/resnet110", "0.12", "0.12", (0.001,)),
    ("cifar10/resnet110", "0.12", "0.50", ()),
    ("cifar10/resnet110", "0.25", "0.25", (0.01,)),
    ("cifar10/resnet110", "0.25", "0.50", ()),
    ("cifar10/resnet110", "0.50", "0.50", (0.01,)),
    ("cifar10/resnet110", "1.00", "0.50", (0.001, 0.1)),
    ("cifar10/resnet110", "1.00", "1.00", ()),
    ("imagenet/resnet50", "0.25", "0.25", (0.01,)),
    ("imagenet/resnet50", "0.25", "0.50", (0.01,)),
    ("imagenet/resnet50", "0.50", "0.50", (0.01,)),
    ("imagenet/resnet50", "1.00", "0.50", (0.01,)),
    ("imagenet/resnet50", "1.00", "1.00", (0.01,)),
]


@pytest.mark.parametrize(("model", "trained", "sigma", "alphas"), RELEASED)
def test_the_alpha_of_the_released_logs(cohen, model, trained, sigma, alphas):
    log = read_log(cohen / "certify" / model / f"noise_{trained}" / "test" / f"sigma_{sigma}")
    finding = infer_alpha(log.table, log.sigma)
    assert finding.consistent == alphas
    assert finding.alpha == (alphas[0] if alphas else None)
    if not alphas:
        assert "too few large radii to tell" in finding.sentence


def test_the_finding_in_words(cohen):
    log = read_log(cohen / "certify/imagenet/resnet50/noise_0.25/test/sigma_0.25")
    sentence = infer_alpha(log.table, log.sigma).sentence
    assert sentence.startswith("largest radii fit alpha = 0.01, not 0.001: 0.978 at sigma 0.25 is above the cap 0.953")
    assert len(log.table) == 427
    assert "427 rows; indices in steps of 100 end at 42600" in whats(log)


def test_released_logs_have_no_row_to_mend(cohen):
    files = [*cohen.glob("certify/**/sigma_*"), *cohen.glob("predict/**/N_*")]
    assert len(files) == 17
    for path in files:
        log = read_log(path)
        assert log.dialect == ("cohen" if log.kind == "certify" else "cohen-predict")
        mended = [p.what for p in log.problems if "rounded up" not in p.what]
        assert len(mended) == (len(log.table) == 427), f"{path}: {mended}"
        assert log.table["seconds"].gt(0).all()


# --- writing -------------------------------------------------------------------------------------------


def test_round_trip_without_a_warning(tmp_path):
    random = np.random.default_rng(1)
    predict = random.integers(-1, 10, 500)
    table = pd.DataFrame(
        {
            "idx": np.arange(500) * 20,
            "label": random.integers(0, 10, 500),
            "predict": predict,
            "radius": np.where(predict == ABSTAIN, 0.0, random.random(500) * 2),
            "seconds": random.random(500).round(3),
        }
    )
    write_log(table, tmp_path / "sigma_0.50")
    log = read_log(tmp_path / "sigma_0.50")
    assert log.problems == () and log.dialect == "cohen" and log.sigma == 0.5
    for name in ("idx", "label", "predict", "seconds"):
        assert log.table[name].tolist() == table[name].tolist()
    lost = table["radius"] - log.table["radius"]
    assert (lost >= 0).all() and (lost < 1e-6).all()
    assert log.table["correct"].tolist() == (table["predict"] == table["label"]).tolist()
    write_log(log.table, tmp_path / "again")
    assert (tmp_path / "again").read_text() == (tmp_path / "sigma_0.50").read_text()


def test_the_six_columns_as_written(tmp_path):
    table = pd.DataFrame({"idx": [0, 20], "label": [3, 5], "predict": [3, -1], "radius": [0.99999999, 0.7]})
    write_log(table, tmp_path / "log")
    assert (tmp_path / "log").read_text().splitlines() == [
        HEADER,
        "0\t3\t3\t0.999999\t1\tnan",
        "20\t5\t-1\t0.0\t0\tnan",
    ]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.9996, 3, "0.999"), (0.5, 3, "0.500"), (0.123456, 6, "0.123456"), (1e-9, 6, "0.000000"), (2.0, 0, "2")],
)
def test_round_down(value, digits, text):
    assert round_down(value, digits) == text


@pytest.mark.parametrize("radius", [-0.1, np.nan, np.inf])
def test_write_log_refuses_radii_that_are_none(tmp_path, radius):
    table = pd.DataFrame({"idx": [0], "label": [3], "predict": [3], "radius": [radius]})
    with pytest.raises(ValueError, match="radius must be finite and at least 0"):
        write_log(table, tmp_path / "log")
    with pytest.raises(ValueError, match="missing: predict"):
        write_log(table.drop(columns="predict"), tmp_path / "log")
