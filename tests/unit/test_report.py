"""Reports: pages that stand alone, escape what they are told, and lie where they should."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import results
from treelora_ray.api import Run
from treelora_ray.cli import main
from treelora_ray.tracking import report
from treelora_ray.tracking.compare import Value
from treelora_ray.tracking.page import VOID, heat, page, table, tag
from treelora_ray.tracking.report import beside, open_run, value, write_report
from treelora_ray.tracking.report_run import sentence, start_of
from treelora_ray.training.errors import RunError

NAN = np.nan
TWO = [[80.0, NAN], [70.0, 60.0]]


class Page(HTMLParser):
    """Elements with their attributes, the text, and every tag closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


def made(folder: Path, found: dict[str, Any] | None = None, **config: Any) -> Run:
    return Run(results.write_run(folder, found or results.result(["a", "b"], TWO), **config))


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code if isinstance(ended.value.code, int) else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a run with all there is to see."""
    run = made(tmp_path_factory.mktemp("runs") / "all", results.small())
    results.journal(run.folder / "journal.jsonl", 3)
    return write_report([run], run.folder / "report.html").read_text()


def test_a_page_stands_alone(whole: str) -> None:
    page = Page(whole)
    assert not re.search(r"https?:", re.sub(r"data:[^\"]*", "", whole))
    assert not page.all("script")
    assert not page.all("link")
    assert "@import" not in whole
    assert "url(" not in whole
    for image in page.all("img"):
        source = image["src"] or ""
        assert source.startswith("data:image/svg+xml;base64,")
        drawn = base64.b64decode(source.partition(",")[2]).decode()
        assert not re.search(r'(?:href|src)="(?!#|data:)', drawn)


def test_every_figure_of_the_run_is_there_with_words_for_those_who_do_not_see_it(whole: str) -> None:
    page = Page(whole)
    images = page.all("img")
    assert len(images) == 9
    assert all(len(image["alt"] or "") > 60 for image in images)
    assert len(page.all("figcaption")) == 9


def test_tables_scroll_and_say_what_they_are(whole: str) -> None:
    page = Page(whole)
    regions = [each for each in page.all("div") if each.get("class") == "scroll"]
    assert len(regions) == len(page.all("table")) == len(page.all("caption")) > 4
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in regions)
    assert all(each.get("scope") in ("row", "col") for each in page.all("th"))
    ids = [each["id"] for _, each in page.elements if "id" in each]
    assert len(ids) == len(set(ids))
    assert [link["href"] for link in page.all("a")] == [f"#{each}" for each in ids]


def test_a_page_says_what_must_be_known_to_compare_it(whole: str) -> None:
    text = Page(whole).text
    for words in (
        "seed", "global batch", "budget", "steps made", "learning rate", "ce_scope", "routing", "label_match", "rank 8",
        "a task starts from", "layer by layer from related tasks", "start-up is not recorded", "trainable parameters",
        "bytes stored a task", "peak memory", "512 MiB", "torch", "2.13.0", "python", "commit", "not recorded",
        "positive is forgetting", "lower is better", "higher is better", "name: all",
        "90 training steps; 12 probe rounds, 0 queries and passes over 195 rows beside them. Counted as steps: 111",
    ):  # fmt: skip
        assert words in text, words
    assert "light dark" in whole
    assert "prefers-color-scheme: dark" in whole


def test_a_page_says_what_was_taken_from_another_run(tmp_path: Path) -> None:
    found = results.small()
    found["records"][0]["effort"]["reused"] = {"probe_rounds": 4, "pass_rows": 65, "seconds": 1.25}
    found["records"][1]["effort"]["reused"] = {"pass_rows": 5, "seconds": 0.25}
    text = Page(write_report([made(tmp_path / "r", found)], tmp_path / "report.html").read_text()).text
    assert "Counted as steps: 111. Of these, 4 rounds and 70 rows were taken from another run" in text
    assert "they had taken 1.5 s that are not in this run's times" in text


def test_the_scores_stand_in_a_table(whole: str) -> None:
    assert [cell["style"] for cell in Page(whole).all("td") if cell.get("class") == "heat"] == [
        f"--share: {score:.2f}" for score in (0.8, 0.85, 0.6, 0.7, 0.66, 0.9)
    ]


def test_whatever_a_task_or_run_is_called_is_text(tmp_path: Path) -> None:
    evil = "<b>bold</b>\" onload='x' & <script>alert(1)</script>"
    found = json.loads(json.dumps(results.small()).replace('"one"', json.dumps(evil)))
    run = made(tmp_path / "run", found)
    for written in (
        write_report([run], tmp_path / "one.html"),
        write_report([run, made(tmp_path / "other", found, seed=1)], tmp_path / "two.html"),
    ):
        page = Page(written.read_text())
        assert evil in page.text
        assert not page.all("b")
        assert not page.all("script")
        assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [
        made(tmp_path / f"r{seed}", results.result(["a", "b"], [[80, NAN], [70 + 2 * seed, 60]]), seed=seed)
        for seed in range(3)
    ]
    runs.append(made(tmp_path / "s", method={"name": "seqlora"}))
    page = Page(write_report(runs, tmp_path / "report.html").read_text())
    assert "4 runs compared" in page.text
    assert "66.0 ± 1.0" in page.text  # op of 65, 66, 67
    assert "0, 1, 2 (3)" in page.text
    assert "Fewer than 3 seeds stand behind some rows" in page.text
    assert len(page.all("img")) == 1
    assert "method.name" in page.text
    for name in ("Run r0", "Run s"):
        assert name in page.text


def test_runs_of_other_tasks_are_said_not_to_be_comparable(tmp_path: Path) -> None:
    runs = [made(tmp_path / "one"), made(tmp_path / "other", results.result(["x", "y"], TWO), train={"lr": 0.1})]
    page = Page(write_report(runs, tmp_path / "report.html").read_text())
    assert "no task in common: nothing of them can be compared" in page.text
    assert not page.all("img")
    assert "standard deviation" not in page.text


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [made(tmp_path / place / "r", seed=seed) for seed, place in enumerate(("here", "there"))]
    text = Page(write_report(runs, tmp_path / "report.html").read_text()).text
    assert "Run here/r" in text
    assert "Run there/r" in text


# -- words


def test_one_sentence_says_what_the_numbers_say() -> None:
    lost = results.result(["a", "b"], TWO)
    assert sentence("seqlora", lost) == (
        "After 2 tasks, seqlora scores 65.0% on average. Right after learning it scored 70.0%; each earlier task has "
        "lost 10.0 points on average since."
    )
    gained = results.result(["a", "b"], [[80, NAN], [85, 60]])
    assert "earlier tasks have gained 5.0 points each" in sentence("x", gained)
    kept = results.result(["a", "b"], [[80, NAN], [79.8, 60]])
    assert "it has forgotten practically nothing" in sentence("x", kept)
    assert sentence("x", results.result(["a"], [[80]])) == "After 1 task, x scores 80.0% on average."
    assert sentence("x", results.small()).endswith("2 of 6 layers of its tasks leaned on an earlier task.")


@pytest.mark.parametrize(
    ("method", "start"),
    [
        ({"name": "treelora", "mode": "treelora", "start": None}, "layer by layer from related tasks, else fresh"),
        ({"name": "treelora", "mode": "paper", "start": None}, "the task before"),
        ({"name": "treelora", "mode": "treelora", "start": None, "guide": {"observe": "query"}}, "the task before"),
        ({"name": "treelora", "mode": "treelora", "start": "fresh"}, "fresh"),
        ({"name": "seqlora", "variant": "continue"}, "the task before"),
        ({"name": "seqlora", "variant": "merge_new"}, "fresh, on weights with the tasks before folded in"),
        ({"name": "inflora"}, "fresh, on weights with the tasks before folded in"),
        ({"name": "slao"}, "the task before, with the rows of its A made orthonormal"),
        ({"name": "independent"}, "fresh"),
        ({"name": "sd-lora"}, "fresh, beside the directions of the tasks before"),
        ({"name": "l2p"}, "none: the pool of prompts of the task before"),
        ({"name": "hide-lora", "start": "previous"}, "the task before"),
        ({"name": "of somebody else"}, "not recorded"),
    ],
)
def test_where_a_task_starts_from_is_said(method: dict[str, Any], start: str) -> None:
    assert start_of(method) == start


def test_numbers_have_a_deviation_where_there_are_several_seeds() -> None:
    assert value(Value(66.04, 1.26, 3)) == "66.0 ± 1.3"
    assert value(Value(66.04, None, 1)) == "66.0"
    assert value(Value(1200, 3.0, 3), "{:,.0f}", spread=False) == "1,200"
    assert value(None) == "–"


def test_elements_escape_what_is_inside_and_what_they_are_told() -> None:
    assert tag("p", "a < b & c", class_='x"y') == '<p class="x&quot;y">a &lt; b &amp; c</p>'
    assert tag("p", tag("b", 1), aria_label="no", id=None) == '<p aria-label="no"><b>1</b></p>'
    assert heat("120", 1.2) == '<td class="heat" style="--share: 1.00">120</td>'
    assert Page(page("<t>", table("<c>", ["<x>"], [("<r>", ["<v>"])]))).text.split() == ["<t>", "<c><x><r><v>"]


# -- the command line


def test_the_commands_write_beside_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path / "run")
    assert call("report", str(run.folder)) == 0
    assert f"written to {run.folder / 'report.html'}" in capsys.readouterr().out
    Page((run.folder / "report.html").read_text())
    assert call("figures", str(run.folder)) == 0
    assert "8 files written" in capsys.readouterr().out
    assert sorted(path.name for path in (run.folder / "figures").iterdir()) == sorted(
        f"{name}.{kind}" for name in ("scores", "course", "forgetting", "times") for kind in ("png", "svg")
    )


def test_the_commands_write_where_they_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = made(tmp_path / "one"), made(tmp_path / "other", seed=1)
    assert call("report", str(one.folder), "--output", str(tmp_path / "new" / "x.html")) == 0
    assert (tmp_path / "new" / "x.html").is_file()
    assert call("figures", str(one.folder), "--output", str(tmp_path / "drawn")) == 0
    assert (tmp_path / "drawn" / "scores.png").is_file()
    monkeypatch.chdir(tmp_path)
    assert call("report", str(one.folder), str(other.folder)) == 0
    assert "written to report.html" in capsys.readouterr().out
    assert "2 runs compared" in (tmp_path / "report.html").read_text()


def test_a_run_that_is_not_there_is_answered_with_its_neighbours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first-run", "second-run", "other"):
        made(tmp_path / name)
    assert call("report", str(tmp_path / "secnod-run")) == 2
    assert f"is no run: it has no config.yaml; did you mean {tmp_path / 'second-run'}" in capsys.readouterr().err
    assert call("figures", str(tmp_path)) == 2
    assert f"is a folder of runs: name one, such as {tmp_path / 'first-run'}" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"did you mean .*first-run, .*other, .*second-run"):
        open_run(str(tmp_path / "zzz"))
    with pytest.raises(RunError, match=r"is no run: it has no config\.yaml; give the folder that `train` made"):
        open_run(str(tmp_path / "nothing" / "here"))


def test_a_run_that_has_learnt_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path / "run")
    (run.folder / "result.json").unlink()
    assert call("report", str(run.folder)) == 2
    assert "has learnt no task yet" in capsys.readouterr().err


def test_of_a_run_in_a_store_files_are_written_here(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    assert beside([run], "report.html") == run.folder / "report.html"
    assert beside([run, run], "report.html") == Path("report.html")
    run.address = "s3://bucket/runs/run"
    assert beside([run], "figures") == Path("figures")


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path / "run")
    target = write_report([run], tmp_path / "report.html")
    before = target.read_bytes()

    def broken(_: Run) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "one_run", broken)
    with pytest.raises(OSError, match="No space left"):
        write_report([run], target)
    assert target.read_bytes() == before
