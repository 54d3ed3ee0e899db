"""The figures of sweeps of 1, 8 and 64 trials, and their page: what is drawn and said, and that it can be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests import sweeps
from tests.sweeps import sweep, trial
from tests.unit.test_figures import labels, laid_out, panels
from tests.unit.test_report import Page, call
from treelora_ray.tracking import figures
from treelora_ray.tracking.figure_data import Data
from treelora_ray.tracking.report import one_sweep
from treelora_ray.tracking.sweep_data import figure_data, front
from treelora_ray.tracking.sweep_report import searched, sentence, shown, sweep_page, write_sweep_report
from treelora_ray.training.errors import RunError

Drawn = tuple[int, dict[str, Any], dict[str, Data], dict[str, Figure]]

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module", params=[8, 24, 64])
def drawn(request: pytest.FixtureRequest) -> Drawn:
    made = sweeps.drawn(request.param)
    data = figure_data(made)
    return request.param, made, data, laid_out(figures.draw(data))


@pytest.fixture(scope="module")
def whole() -> str:
    return sweep_page(sweeps.drawn(24))


def texts(figure: Figure) -> Iterator[Text]:
    for axis in figure.axes:
        yield from (each for each in axis.texts if each.get_text())


def main_axis(figure: Figure) -> Axes:
    (axis,) = panels(figure)
    return axis


def test_every_figure_has_its_title_and_says_which_way_is_better(drawn: Drawn) -> None:
    _, _, data, figure = drawn
    for name, each in figure.items():
        assert each.get_suptitle().replace("\n", " ") == data[name]["title"]
        said = [*(axis.get_ylabel() for axis in each.axes), each.get_supxlabel(), main_axis(each).get_xlabel()]
        assert any("is better" in words for words in said) or name == "sweep_importance"


def test_the_front_is_ringed_and_the_rest_is_not(drawn: Drawn) -> None:
    _, made, data, figure = drawn
    scatter, rings, *_ = main_axis(figure["sweep_front"]).collections
    assert np.shape(scatter.get_offsets()) == (len(data["sweep_front"]["points"]), 2)
    assert np.shape(rings.get_offsets()) == (len(front(made)), 2)
    expected = [(p["seconds"], p["val_op"]) for p in data["sweep_front"]["points"] if p["front"]]
    np.testing.assert_allclose(np.asarray(rings.get_offsets()), expected)
    assert np.asarray(scatter.get_array(), np.float64).tolist() == [
        p["forgetting"] for p in data["sweep_front"]["points"]
    ]


def test_names_of_points_do_not_lie_on_each_other(drawn: Drawn) -> None:
    figure = drawn[3]["sweep_front"]
    boxes = [text.get_window_extent() for text in texts(figure)]
    assert len(boxes) >= min(3, len(front(drawn[1])))
    for number, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[number + 1 :])


def test_importances_are_bars_the_longest_first(drawn: Drawn) -> None:
    count, _, data, figure = drawn
    axis = main_axis(figure["sweep_importance"])
    widths = [bar.get_width() for bar in axis.patches]  # type: ignore[attr-defined]
    assert widths == sorted(widths, reverse=True)
    assert labels(axis) == [bar["parameter"] for bar in data["sweep_importance"]["bars"]]
    assert data["sweep_importance"]["bars"][0]["parameter"] == "train.lr"
    assert data["sweep_importance"]["bars"][0]["sure"] == (count > 8)


def test_stopped_trials_end_visibly(drawn: Drawn) -> None:
    _, made, data, figure = drawn
    marks = [line for line in main_axis(figure["sweep_curves"]).lines if line.get_marker() in ("x", "X")]
    ended = [each for each in made["trials"] if each["state"] in ("stopped", "failed")]
    at = sorted(tuple(np.asarray(line.get_xydata())[0].tolist()) for line in marks)
    assert at == sorted((each["percent"], each["val_op"]) for each in ended)
    legend = {text.get_text() for each in legends(figure["sweep_curves"]) for text in each.get_texts()}
    assert {"failed"} <= legend
    assert ("stopped early" in legend) == any(each["state"] == "stopped" for each in made["trials"])
    best = data["sweep_curves"]["lines"][0]
    assert f"trial {best['trial']}, {best['value'][-1]:.1f}" in legend


def legends(figure: Figure) -> list[Any]:
    beside = [axis.get_legend() for axis in figure.axes]
    return [each for each in (*figure.legends, *beside) if each is not None]


def test_everything_lies_within_its_figure(drawn: Drawn) -> None:
    for name, figure in drawn[3].items():
        canvas = figure.bbox
        for artist in [*texts(figure), *legends(figure)]:
            box = artist.get_window_extent()
            assert box.x0 > canvas.x0 - 2, name
            assert box.x1 < canvas.x1 + 2, name


def test_the_same_sweep_gives_the_same_bytes() -> None:
    pages = {sweep_page(sweeps.drawn(8)) for _ in range(2)}
    assert len(pages) == 1


# -- the page


def test_a_page_stands_alone(whole: str) -> None:
    page = Page(whole)
    assert not re.search(r"https?:", re.sub(r"data:[^\"]*", "", whole))
    for name in ("script", "link", "iframe"):
        assert not page.all(name)
    assert "@import" not in whole
    assert "url(" not in whole
    images = page.all("img")
    assert len(images) == 4
    assert all(str(each["src"]).startswith("data:image/svg+xml;base64,") for each in images)
    assert all(len(str(each["alt"])) > 60 for each in images)
    ids = [each["id"] for _, each in page.elements if "id" in each]
    assert [link["href"] for link in page.all("a")] == [f"#{each}" for each in ids]


def test_a_page_says_what_was_found(whole: str) -> None:
    made = sweeps.drawn(24)
    text = Page(whole).text
    best = max((each for each in made["trials"] if each["state"] == "finished"), key=lambda each: each["val_op"])
    for words in (
        "Of 24 trials:", "stopped early", "1 failed", f"Trial {best['id']} is best on one seed", "adjusted R²",
        "standard deviation over the seeds 0, 1, 2", "On test rows, which nothing was chosen by, once",
        "The best again, on further seeds", "told from chance (p < 0.05)", "NonFiniteError: the loss is nan",
        "0.0001 to 0.01, on a log scale", "one of similar, previous, fresh", "2 to 12, whole numbers",
        "train.steps: 60", "higher is better, on validation rows cut from training rows", "2.60.0",
    ):  # fmt: skip
        assert words in text, words
    for each in made["trials"]:
        assert each["id"] in text


def test_one_trial_is_a_page() -> None:
    found = sweep([trial(0, {"train.lr": 0.001}, [80.0, 75.0], tasks=2)])
    text = Page(sweep_page(found)).text
    assert "Of 1 trial: 1 came to the end. Trial 0000 is best on one seed, with val_op 75.0." in text
    assert "1 trials have a score: what mattered is told from" in text


def test_a_sweep_whose_trials_all_failed_says_why() -> None:
    trials = [trial(n, {"train.lr": 0.1}, [], "failed", error=f"ValueError: <{n}>") for n in range(3)]
    page = Page(sweep_page(sweep(trials)))
    assert "Of 3 trials: 3 failed. None has a score at the end of the stream yet." in page.text
    assert "The first to fail: ValueError: <0>" in page.text
    assert not page.all("img")


def test_a_sweep_that_has_just_begun_is_a_page() -> None:
    waiting = [trial(n, {"train.lr": 0.1}, [], "waiting") for n in range(2)]
    assert "Of 2 trials: 2 not begun." in sentence(sweep(waiting))
    assert Page(sweep_page(sweep(waiting))).text
    assert "none has begun" in sentence({**sweep([]), "asked": 4})


def test_a_constant_parameter_is_named_and_not_drawn() -> None:
    values = [{"train.lr": 10 ** -(n / 4), "method.lambda": 0.1} for n in range(8)]
    found = sweep([trial(n, at, [60.0 + n] * 12) for n, at in enumerate(values)])
    assert "method.lambda is the same in all trials with a score." in Page(sweep_page(found)).text
    assert [axis["name"] for axis in figure_data(found)["sweep_parallel"]["axes"]] == ["train.lr"]


@pytest.mark.parametrize("metric", ["forgetting", "seconds"])
def test_a_metric_of_which_less_is_better_ranks_the_least_first(metric: str) -> None:
    found = {**sweeps.drawn(24), "metric": metric, "mode": "min"}
    done = [each for each in found["trials"] if each["state"] == "finished"]
    least = min(done, key=lambda each: each[metric])
    assert f"Trial {least['id']} is best on one seed, with {metric} {least[metric]:.1f}" in sentence(found)
    figure = laid_out(figures.draw(figure_data(found)))["sweep_curves"]
    assert "lower is better" in main_axis(figure).get_ylabel()


def test_one_task_cannot_be_forgotten() -> None:
    trials = [trial(n, {"train.lr": 0.01 * (n + 1)}, [70.0 + n], tasks=1) for n in range(3)]
    found = sweep(trials)
    assert all(each["forgetting"] is None for each in trials)
    assert front(found) == ["0002"]
    assert Page(sweep_page(found)).text
    laid_out(figures.draw(figure_data(found)))


def test_whatever_a_sweep_is_called_is_text() -> None:
    evil = "<script>alert(1)</script>"
    found = json.loads(json.dumps(sweeps.drawn(8)).replace('"sweep-treelora-quickstart"', json.dumps(evil)))
    found["trials"][0]["parameters"]["method.start"] = found["parameters"]["method.start"]["values"][0] = evil
    page = sweep_page(found)
    assert evil not in page
    assert not Page(page).all("script")


def test_the_command_line_reports_a_sweep_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(sweeps.drawn(8)))
    assert call("report", str(tmp_path)) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text() == sweep_page(sweeps.drawn(8))
    assert call("figures", str(tmp_path), "--output", str(tmp_path / "drawn")) == 0
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir())[:2] == ["sweep_curves.png", "sweep_curves.svg"]
    assert call("report", str(tmp_path), str(tmp_path)) == 2
    assert "is a sweep, whose page already compares its trials: give it alone" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text(json.dumps(sweep([])))
    assert call("figures", str(tmp_path)) == 2
    assert "has nothing to show yet" in capsys.readouterr().err


def test_a_page_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(sweeps.drawn(8)))
    assert write_sweep_report(tmp_path, tmp_path / "a" / "b.html") == tmp_path / "a" / "b.html"
    assert one_sweep([str(tmp_path)]) == tmp_path
    assert one_sweep([str(tmp_path / "a")]) is None
    with pytest.raises(RunError):
        one_sweep([str(tmp_path), str(tmp_path / "a")])


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"kind": "uniform", "low": 0, "high": 0.5}, "0 to 0.5"),
        ({"kind": "lograndint", "low": 1, "high": 64}, "1 to 64, whole numbers on a log scale"),
        ({"kind": "choice", "values": [["q", "v"], None]}, "one of [q, v], None"),
        ({"kind": "quniform", "low": 0, "high": 1}, "0 to 1, quniform"),
    ],
)
def test_what_was_searched_is_said_in_words(found: Any, words: str) -> None:
    assert searched(found) == words
    assert shown(0.000123456) == "0.0001235"
