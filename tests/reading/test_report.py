"""Rates and tables from certificates, and Cohen's tables cell by cell from the released logs.

The released logs are read where SMOOTHKIT_DATA says; those tests skip where it is not set.
"""

import csv
import dataclasses
import datetime
import io
import itertools
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from smoothbook.runner.gallery import report_figures
from smoothbook.tables import published
from smoothbook.tables.published import KNOWN_MISPRINTS, cohen_log, cohen_tables
from smoothkit import Smoothed, data, records
from smoothkit.reading import (
    ReportError,
    about_records,
    average_certified_radius,
    certified_accuracy,
    certified_accuracy_interval,
    envelope,
    format_table,
    load_result,
    read_log,
    report,
    write_log,
)
from smoothkit.reading.report import FORMATS
from smoothkit.records import compact, open_record
from smoothkit.types import ABSTAIN, StoppingRule, block_edges


def table(*rows: tuple[int, int, float]) -> pd.DataFrame:
    """Rows of (label, predict, radius); correct follows."""
    frame = pd.DataFrame(rows, columns=["label", "predict", "radius"])
    frame.insert(0, "idx", range(len(frame)))
    return frame.assign(correct=frame["label"] == frame["predict"])


FOUR = table((1, 1, 0.5), (1, 1, 1.0), (1, 2, 3.0), (1, ABSTAIN, 0.0))


# --- rates ---------------------------------------------------------------------------------------------


def test_certified_accuracy_is_over_all_rows_and_radius_at_least_r():
    accuracy = certified_accuracy(FOUR, [0.0, 0.5, np.nextafter(0.5, 1), 1.0, 1.01])
    assert accuracy.tolist() == [0.5, 0.5, 0.25, 0.25, 0.0]


def test_an_abstention_never_counts_even_if_a_table_says_so():
    wrong = table((1, 1, 0.5), (-1, ABSTAIN, 2.0))
    assert wrong["correct"].all()
    assert certified_accuracy(wrong, [0.0]).tolist() == [0.5]
    assert average_certified_radius(wrong) == 0.25


def test_acr_is_the_area_under_the_curve():
    assert average_certified_radius(FOUR) == pytest.approx(1.5 / 4)
    middles = (np.arange(100_000) + 0.5) / 50_000  # on [0, 2]
    assert certified_accuracy(FOUR, middles).mean() * 2 == pytest.approx(average_certified_radius(FOUR), abs=1e-4)


def test_a_prediction_log_has_no_certified_accuracy():
    assert certified_accuracy(FOUR.assign(radius=np.nan), [0.0, 0.5]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("radii", [[-0.1], [np.nan], [np.inf]])
def test_radii_are_checked(radii):
    with pytest.raises(ValueError, match="radii must be finite and at least 0"):
        certified_accuracy(FOUR, radii)


def test_tables_are_checked():
    with pytest.raises(ValueError, match="has no rows"):
        certified_accuracy(FOUR.iloc[:0], [0.0])
    with pytest.raises(ValueError, match="missing: \\['correct'\\]"):
        average_certified_radius(FOUR.drop(columns="correct"))


def test_the_interval_is_clopper_pearson():
    # closed forms: 0 of 10 has the upper end 1 - 0.025 ** (1 / 10), 10 of 10 its mirror
    ten = table(*[(1, 1, 0.5)] * 10)
    assert certified_accuracy_interval(ten, 0.5) == pytest.approx((0.025**0.1, 1.0))
    assert certified_accuracy_interval(ten, 0.6) == pytest.approx((0.0, 1 - 0.025**0.1))
    assert certified_accuracy_interval(ten, 0.6, level=0.9) == pytest.approx((0.0, 1 - 0.05**0.1))
    low, high = certified_accuracy_interval(FOUR, 0.0)
    assert low < 0.5 < high and low + high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="alpha must lie"):
        certified_accuracy_interval(ten, 0.5, level=95)


def test_envelope_says_whose_value_it_is():
    small, large = table((1, 1, 0.4), (1, 1, 0.4)), table((1, 1, 2.0), (1, 2, 2.0))
    frame = envelope({"0.12": small, "0.50": large}, [0.0, 0.4, 0.5, 3.0])
    assert frame["envelope"].tolist() == [1.0, 1.0, 0.5, 0.0]
    assert frame["which"].tolist() == ["0.12", "0.12", "0.50", "0.12"]
    assert "envelope" in frame.attrs["label"]
    with pytest.raises(ValueError, match="at least one table"):
        envelope({}, [0.0])


# --- results -------------------------------------------------------------------------------------------


@pytest.fixture
def log_path(tmp_path) -> Path:
    path = tmp_path / "sigma_0.50"
    write_log(FOUR, path)
    return path


@pytest.fixture
def record_path(tmp_path) -> Path:
    """A record of three images, n = 1,000: sure and right, sure and wrong, unsure; and one without its votes."""
    identity = records.Identity(
        dataset="made-up",
        split="test",
        subset="all",
        model="made-up",
        fingerprint="0",
        num_classes=2,
        sigma=0.5,
        seed=0,
        noise="float",
        precision="float32",
        stopping_rule=StoppingRule(n0=100, n=1_000, alpha=0.001),
    )
    record = records.create_record(tmp_path / "record", identity, ("a", "b"))
    edges = block_edges(1_000)
    rows = []
    for i, share in enumerate((1.0, 0.0, 0.5, 1.0)):
        for purpose, blocks in ((records.SELECT, [0, 100]), (records.ESTIMATE, edges)):
            for start, stop in itertools.pairwise(blocks):
                if i == 3 and purpose == records.ESTIMATE:
                    continue
                first = round(share * (stop - start))
                counts = (first, stop - start - first)
                rows.append(records.Row(i, str(i), i, "digest", 0, purpose, start, stop, counts))
    record.append(rows, {"device": "none"})
    return tmp_path / "record"


def test_a_log_is_loaded(log_path):
    result = load_result(log_path)
    assert (result.name, result.kind, result.sigma, result.alpha, result.n) == (
        "sigma_0.50",
        "certify",
        0.5,
        None,
        None,
    )
    assert result.alpha_text == "? (claimed 0.001)"
    assert any("too few large radii to tell" in text for text in result.warnings)
    assert len(result.table) == 4


def test_a_log_keeps_its_alpha(log_path):
    assert any("cannot be read at alpha = 0.05" in text for text in load_result(log_path, alpha=0.05).warnings)


def test_a_log_without_sigma(tmp_path):
    write_log(FOUR, tmp_path / "log.tsv")
    assert any("sigma is not known" in text for text in load_result(tmp_path / "log.tsv").warnings)
    assert load_result(tmp_path / "log.tsv", sigma=0.5).sigma == 0.5


def test_a_record_is_loaded(record_path):
    result = load_result(record_path)
    assert (result.kind, result.sigma, result.alpha, result.n) == ("record", 0.5, 0.001, 1_000)
    assert result.table["predict"].tolist() == [0, 1, ABSTAIN]
    assert certified_accuracy(result.table, [0.0, 1.0]).tolist() == pytest.approx([1 / 3, 1 / 3])
    # n_a == n has the closed form sigma * Phi^-1(alpha ** (1 / n)); 2.463263 at n = 1,000 (foundations, section 2.1)
    assert average_certified_radius(result.table) == pytest.approx(0.5 * 2.463263 / 3, abs=1e-6)
    assert result.warnings == ("unfinished: 1 of 4 images lack votes and count in no rate",)


def test_a_record_is_read_at_another_alpha(record_path):
    strict, loose = load_result(record_path, alpha=1e-6), load_result(record_path, alpha=0.05)
    assert (strict.alpha, loose.alpha_text) == (1e-6, "0.05")
    assert strict.table["radius"].iloc[0] < loose.table["radius"].iloc[0]
    with pytest.raises(ValueError, match="did you mean"):
        load_result(record_path, alpha=95)


def test_paths_without_a_result(tmp_path, log_path):
    with pytest.raises(ReportError, match="no such file or folder; name a vote record"):
        load_result(tmp_path / "nothing")
    with pytest.raises(ReportError, match=r"without run.json, so no vote record; name a log in it, such as sigma_0.50"):
        load_result(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="name a vote record"):
        load_result(tmp_path / "empty")
    (tmp_path / "above" / "inner").mkdir(parents=True)
    (tmp_path / "above" / "inner" / "run.json").write_text("{}")
    with pytest.raises(ReportError, match="holds records: name inner"):
        load_result(tmp_path / "above")


def test_a_zip_is_to_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as file:
        file.writestr("run.json", "{}")
    with pytest.raises(ReportError, match="is a zip file; unpack it"):
        load_result(tmp_path / "pack.zip")


# --- reports -------------------------------------------------------------------------------------------


def test_two_rules_on_one_seed_are_pointed_out(record_path, tmp_path):
    """Whoever takes the better claim of two rules that read the same draws errs with up to twice alpha."""
    known = records.open_record(record_path)
    rule = StoppingRule(n0=100, n=100, alpha=0.001)
    other = records.create_record(tmp_path / "other", dataclasses.replace(known.identity, stopping_rule=rule))
    rows = known.rows()
    part = rows[(rows["purpose"] == records.SELECT) | (rows["stop"] <= 100)]
    other.append([records.Row(**row) for row in part.to_dict("records")], {"compute_batch": 1})
    warned = report([record_path, other.path], [0.0]).attrs["warnings"]
    assert any("two rules on one seed share their draws" in text for text in warned)
    assert not any("share their draws" in text for text in report([record_path, record_path], [0.0]).attrs["warnings"])


def test_report_of_a_record_and_a_log(record_path, log_path):
    frame = report([record_path, log_path], [0, 0.25, 1.0])
    assert list(frame.columns) == ["path", "rows", "sigma", "alpha", "0", "0.25", "1", "ACR"]
    assert frame["rows"].tolist() == [3, 4]
    assert frame["alpha"].tolist() == ["0.001", "? (claimed 0.001)"]
    assert frame["0.25"].tolist() == pytest.approx([1 / 3, 0.5])
    assert any(str(log_path) in text and "too few" in text for text in frame.attrs["warnings"])
    assert all("\n" not in text for text in frame.attrs["warnings"])


def test_report_of_a_prediction_log(tmp_path, log_path):
    path = tmp_path / "N_100"
    path.write_text("idx\tlabel\tpredict\tcorrect\ttime\n0\t3\t3\t1\t1\n1\t3\t-1\t0\t1\n2\t3\t3\t1\t1\n3\t3\t4\t0\t1\n")
    frame = report([path, log_path], [0, 0.5])
    assert frame["correct"].tolist() == [0.5, 0.5]
    assert frame["abstain"].tolist() == [0.25, 0.25]
    assert np.isnan(frame["ACR"][0]) and np.isnan(frame["0.5"][0])
    assert frame["ACR"][1] == pytest.approx(0.375)


FRAME = pd.DataFrame(
    {
        "path": ["a_b|c", r"50% \ {x} #1 & $2 ~ ^"],
        "rows": [427, 500],
        "sigma": [0.25, np.nan],
        "0.5": [0.49351, np.nan],
        "ACR": [0.4769999, 1.0],
        "agrees": pd.array([True, pd.NA], dtype="boolean"),
    }
)


def test_the_text_table():
    assert format_table(FRAME, "table").splitlines() == [
        "path                   rows  sigma    0.5    ACR  agrees",
        "a_b|c                   427   0.25  0.494  0.476  yes",
        r"50% \ {x} #1 & $2 ~ ^   500                1.000",
    ]


def test_the_csv_table_keeps_accuracies_and_rounds_radii_down():
    rows = list(csv.reader(io.StringIO(format_table(FRAME, "csv"))))
    assert rows[0] == list(FRAME.columns)
    assert rows[1] == ["a_b|c", "427", "0.25", "0.49351", "0.476999", "yes"]
    assert rows[2][2:4] == ["", ""]


def test_the_markdown_table_escapes_bars():
    lines = format_table(FRAME, "markdown").splitlines()
    assert lines[1].split("|")[1:-1] == [" " + "-" * 22 + " ", " ---: ", " ----: ", " ----: ", " ----: ", " ------ "]
    assert lines[2].startswith(r"| a_b\|c ") and len({len(line) for line in lines}) == 1


def test_the_latex_table_escapes():
    text = format_table(FRAME, "latex")
    assert text.startswith("\\begin{tabular}{lrrrrl}\n\\hline\n") and text.endswith("\\end{tabular}\n")
    assert r"a\_b|c & 427 & 0.25 & 0.494 & 0.476 & yes \\" in text
    escaped = r"50\% \textbackslash{} \{x\} \#1 \& \$2 \textasciitilde{} \textasciicircum{} & 500 &  &  & 1.000 &  \\"
    assert escaped in text


@pytest.mark.parametrize("fmt", FORMATS)
def test_no_format_rounds_a_radius_up(fmt):
    text = format_table(pd.DataFrame({"ACR": [0.9999999]}), fmt)
    assert "1.0" not in text and "0.999" in text


def test_an_unknown_format():
    with pytest.raises(ValueError, match="fmt must be one of table, csv, markdown, latex, got 'html'"):
        format_table(FRAME, "html")


# --- Cohen's tables ------------------------------------------------------------------------------------

# three digits as counted from the released logs when the project began, independently of this package
COUNTED = {
    ("cifar10", 0.12): (0.814, 0.586, 0, 0, 0, 0, 0),
    ("cifar10", 0.25): (0.748, 0.600, 0.428, 0.266, 0, 0, 0),
    ("cifar10", 0.50): (0.652, 0.546, 0.414, 0.320, 0.234, 0.152, 0.094),
    ("cifar10", 1.00): (0.472, 0.392, 0.340, 0.278, 0.216, 0.174, 0.140),
    ("imagenet", 0.25): (0.667, 0.494, 0, 0, 0, 0, 0),
    ("imagenet", 0.50): (0.572, 0.458, 0.372, 0.286, 0, 0, 0),
    ("imagenet", 1.00): (0.436, 0.378, 0.326, 0.260, 0.194, 0.148, 0.122),
}


@pytest.fixture(scope="module")
def cells(cohen) -> pd.DataFrame:
    return cohen_tables(cohen).set_index(["dataset", "sigma"])


@pytest.mark.parametrize("key", COUNTED)
def test_cohens_tables_cell_by_cell(cells, key):
    mine = cells.loc[key]
    assert mine["measured"].tolist() == pytest.approx(COUNTED[key], abs=0.0005)
    assert set(mine["rows"]) == {427 if key == ("imagenet", 0.25) else 500}
    published = mine["published"].notna()
    assert published.sum() == (6 if key[0] == "cifar10" else 7)
    assert mine.loc[published, "agrees"].tolist() == [True] * published.sum()
    assert mine.loc[~published, "agrees"].isna().all()


def test_a_wrong_cell_would_be_seen(cohen, monkeypatch):
    # the misprint of the README at sigma 0.50, radius 1.0: 0.38 for 0.37
    wrong = {"imagenet": {0.5: "0.57 0.46 0.38 0.29 0.00 0.00 0.00"}}
    monkeypatch.setattr(published, "COHEN_PUBLISHED", wrong)
    assert cohen_tables(cohen)["agrees"].tolist() == [True, True, False, True, True, True, True]


@pytest.mark.parametrize(
    ("dataset", "trained", "sigma", "split", "accuracy"),
    [
        ("cifar10", 0.12, 0.5, "test", 0.118),
        ("cifar10", 0.25, 0.5, "test", 0.334),
        ("cifar10", 1.00, 0.5, "test", 0.436),
        ("imagenet", 0.25, 0.5, "test", 0.008),
        ("imagenet", 1.00, 0.5, "test", 0.168),
        ("imagenet", 0.50, 0.5, "train", 0.622),
    ],
)
def test_trained_at_one_sigma_certified_at_another(cohen, dataset, trained, sigma, split, accuracy):
    log = read_log(cohen_log(cohen, dataset, trained=trained, sigma=sigma, split=split))
    assert certified_accuracy(log.table, [0.0])[0] == pytest.approx(accuracy, abs=0.0005)


@pytest.mark.parametrize(
    ("dataset", "sigma", "acr"),
    [
        ("cifar10", 0.12, 0.270),
        ("cifar10", 0.25, 0.429),
        ("cifar10", 0.50, 0.538),
        ("cifar10", 1.00, 0.542),
        ("imagenet", 0.25, 0.477),
        ("imagenet", 0.50, 0.733),
        ("imagenet", 1.00, 0.875),
    ],
)
def test_acr_of_the_released_logs(cohen, dataset, sigma, acr):
    log = read_log(cohen_log(cohen, dataset, trained=sigma, sigma=sigma))
    assert average_certified_radius(log.table) == pytest.approx(acr, abs=0.0005)


@pytest.mark.parametrize(
    ("n", "correct", "abstain"),
    [(100, 0.660, 0.092), (1_000, 0.680, 0.032), (10_000, 0.690, 0.010), (100_000, 0.692, 0.004)],
)
def test_predict_rows(cohen, n, correct, abstain):
    frame = report([cohen / f"predict/imagenet/resnet50/noise_0.25/test/N_{n}"], [0.0])
    assert (frame["correct"][0], frame["abstain"][0]) == pytest.approx((correct, abstain))
    assert frame.attrs["warnings"] == []


def test_report_of_the_short_log(cohen):
    frame = report([cohen_log(cohen, "imagenet", trained=0.25, sigma=0.25)], [0, 0.5, 1.0])
    assert frame["alpha"][0] == "0.01 (claimed 0.001)"
    assert frame[["0", "0.5", "1"]].loc[0].tolist() == pytest.approx([285 / 427, 211 / 427, 0])
    warnings = "\n".join(frame.attrs["warnings"])
    assert "427 rows; indices in steps of 100 end at 42600" in warnings
    assert "largest radii fit alpha = 0.01, not 0.001" in warnings
    result = load_result(cohen_log(cohen, "imagenet", trained=0.25, sigma=0.25))
    assert (result.alpha, result.n, result.sigma) == (0.01, 100_000, 0.25)


def test_cohen_tables_without_logs(tmp_path):
    with pytest.raises(ReportError, match="has no folder certify"):
        cohen_tables(tmp_path)


def test_misprints_say_where_and_what():
    assert len(KNOWN_MISPRINTS) == 5
    for misprint in KNOWN_MISPRINTS:
        assert misprint.where and misprint.printed and misprint.logs_say


def test_what_the_misprints_say_of_the_logs(cohen):
    half = read_log(cohen_log(cohen, "imagenet", trained=0.5, sigma=0.5)).table
    one = read_log(cohen_log(cohen, "imagenet", trained=1.0, sigma=1.0)).table
    assert certified_accuracy(half, [1.0, 1.5]).tolist() == pytest.approx([0.372, 0.286])
    assert half["radius"].max() < 2.0
    assert certified_accuracy(one, [0.0, 2.0]).tolist() == pytest.approx([0.436, 0.194])


# --- figures of records, and what their captions say ---


def kept_record(name):
    return ROOT / "data" / "records" / name


def test_a_caption_says_what_was_certified_how():
    one, other = (open_record(kept_record(f"digits-vit-{s}-sigma-{s}")) for s in ("0.25", "0.50"))
    alone = about_records([one])
    for part in (
        "digits test (all)",
        "starter:digits-vit-0.25",
        "σ = 0.25",
        "n0 = 100",
        "n = 10,000",
        "α = 0.001",
        "grid:256 noise",
    ):
        assert part in alone
    assert alone.endswith("; record digits-vit-0.25-sigma-0.25")
    both = about_records([one, other], alpha=0.05)
    assert both.startswith("digits test (all), n0 = 100, n = 10,000, α = 0.05, grid:256 noise; records ")
    assert both.count("n0 =") == 1 and "digits-vit-0.50-sigma-0.50 (starter:digits-vit-0.50, σ = 0.5)" in both


def test_a_caption_says_when_the_votes_were_drawn(tmp_path):
    images = data.load("digits", subset="first:1")
    record = Smoothed(lambda x: x.flatten(1)[:, :10], 0.25, model_id="mine").sample(
        images, n0=10, n=20, alpha=0.1, out=tmp_path / "r", progress=False
    )
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    yesterday = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)).date().isoformat()
    assert f"sampled {record.sampled()[:10]}" in about_records([record]) and record.sampled()[:10] in (today, yesterday)
    assert compact(record, tmp_path / "kept").sampled() == record.sampled()


def test_figures_of_records_are_on_one_page(tmp_path):
    paths = [kept_record(f"digits-vit-{s}-sigma-0.25") for s in ("0.25", "clean")]
    index = report_figures(paths, tmp_path / "out", alpha=0.01)
    page, figures = index.read_text(), index.parent / "figures"
    assert {p.suffix for p in figures.glob("certified-accuracy-print.*")} == {".svg", ".pdf", ".png", ".csv", ".json"}
    points = pd.read_csv(figures / "certified-accuracy.csv")
    assert set(points["curve"]) == {p.name for p in paths}  # one sigma twice: by name
    assert "α = 0.01" in page and "http://" not in page.replace("http://www.w3.org", "")
    with pytest.raises(ReportError, match="is named twice"):
        report_figures([paths[0], paths[0]], tmp_path / "out")


def test_figures_need_radii(tmp_path):
    log = tmp_path / "predictions"
    log.write_text("idx\tlabel\tpredict\tcorrect\ttime\n0\t1\t1\t1\t0:00:01\n")
    with pytest.raises(ReportError, match="predictions holds predictions without radii"):
        report_figures([log], tmp_path / "out")
