"""The report of runs in all states: whole HTML that needs nothing, with the numbers of the run's files."""

import dataclasses
import io
import re
import shutil
import subprocess

import pytest
from PIL import Image
from typer.testing import CliRunner

from dbtrain.cli import app
from dbtrain.evaluation.text.kept_texts import KeptText, keep_text
from dbtrain.report.facts import gather
from dbtrain.report.page import page
from dbtrain.report.verdict import judge
from dbtrain.run.run import Run
from dbtrain.shards.extension import Extension, Lengths
from dbtrain.shards.merged_directory import MergedDirectory
from dbtrain.shards.storage.lock import RunLock
from dbtrain.telemetry.events import COORDINATOR, EventLog
from tests.unit.report.reader import Reader
from tests.unit.report.runs import BEGAN, ablation, evaluated, failed, finished, measured, sampled, steps, swept
from tests.unit.small_runs import settled

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def read(run):
    facts = gather(run)
    text = page(facts)
    reader = Reader(text)
    assert len(reader.ids) == len(set(reader.ids)) and set(reader.refers) <= set(reader.ids)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in reader.tags}
    loads = [attrs.get("src") or attrs.get("xlink:href") or attrs.get("href") for _, attrs in reader.tags]
    assert all(each.startswith(("#", "data:")) for each in loads if each)
    assert not re.search(r"url\((?!#)|@import", text)
    return reader, judge(facts), text


@pytest.fixture
def whole(tmp_path):
    """A run with everything that a report can show but samples."""
    run = finished(tmp_path)
    evaluated(run)
    measured(run)
    ablation(run)
    return run


def test_a_finished_run_shows_the_numbers_of_its_files(whole):
    reader, verdict, _ = read(whole)
    losses = {tuple(row[:3]) for row in reader.rows if row[-1:] == ["boundary"] or len(row) == 5}
    for point in whole.store.read_json("losses.json"):
        assert (f"{point['level']:.4g}", str(point["block"]), f"{point['loss']:.5f}") in losses
    assert ["mean over the chain", "81.25", "75.00"] in reader.rows and ["class 0", "50.00", "-"] in reader.rows
    curve = [row for row in reader.rows if row[:1] == ["block 1"] and len(row) == 4]
    assert ["block 1", "2", "0.1250", "0.2250"] in curve
    attempts = [row for row in reader.rows if len(row) == 9]
    assert [row[7] for row in attempts[1:]] == ["done", "lost", "done"] and "SIGKILL" in attempts[2][8]
    assert [row[2] for row in attempts[1:]] == 3 * ["node#3f9a (10.0.0.7)"]
    assert ["paper", "2", "77", "1"] in reader.rows
    assert verdict.headline.startswith("Done. 81.25 % accuracy")
    sentence = "vit of 3 layers, cut into 2 blocks, each of which learns alone on its own slice of the noise: 2 steps"
    assert any(text.startswith(f"{sentence} of 8 samples of the data set digits") for text in reader.text)


def test_a_page_can_be_read_without_seeing_it(whole):
    reader, _, text = read(whole)
    assert text.startswith("<!doctype html>") and ("html", {"lang": "en"}) in reader.tags
    levels = [int(tag[1]) for tag, _ in reader.headings]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    assert {"header", "main", "footer", "section"} <= {tag for tag, _ in reader.tags}
    figures = [attrs for tag, attrs in reader.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(figures) >= 6 and all(attrs["aria-labelledby"] for attrs in figures)
    assert sum(tag == "table" for tag, _ in reader.tags) >= len(figures)
    assert "prefers-color-scheme: dark" in text and "#0101" not in text and "#0202" not in text


def test_the_verdict_names_faults_and_the_block_that_is_behind(whole):
    _, verdict, _ = read(whole)
    said = {remark.about: remark for remark in verdict.remarks}
    assert said["Faults"].text.startswith(
        "1 of 3 attempts ended in a fault. Block 1 after step 1 (1 step was done again): "
    )
    assert "SIGKILL" in said["Faults"].text and said["Faults"].text.endswith("and all blocks finished.")
    assert "Block 1 is behind block 0" in said["Blocks"].text and said["Blocks"].tone == "warn"
    assert said["Training"].tone == "good"


@pytest.mark.parametrize(
    ("theirs", "word", "tone"), [(0.9, "worse than", "warn"), (0.6, "better than", "good"), (0.8, "level with", "good")]
)
def test_the_result_is_judged_beside_end_to_end(tmp_path, theirs, word, tone):
    run, other = finished(tmp_path), finished(tmp_path, name="toy-end-to-end")
    evaluated(run)
    evaluated(other, {"test": {"mean": theirs}})
    reader, verdict, _ = read(run)
    assert f"81.25 % accuracy: {word} end to end ({100 * theirs:.2f})" in verdict.headline and verdict.tone == tone
    assert ["end to end", "300.0M", "0:06", "0:10"] in [row[:4] for row in reader.rows]


@pytest.mark.parametrize(
    ("score", "words", "tone"),
    [
        (0.13, "13.00 % accuracy: no better than guessing (10.00).", "bad"),
        (0.14, "(guessing: 10.00), compared", "warn"),
    ],
)
def test_a_result_that_guessing_may_give_is_said_to_be_one(tmp_path, score, words, tone):
    """Of 359 samples, guessing one of ten has a standard error of 1.58 %."""
    run = finished(tmp_path)
    evaluated(run, {"test": {"mean": score}})
    verdict = read(run)[1]
    assert words in verdict.headline and verdict.tone == tone
    evaluated(finished(tmp_path, name="toy-end-to-end"), {"test": {"mean": score}})
    assert ("no better than guessing" in read(run)[1].headline) == (tone == "bad"), "level with what guesses too"


def test_drawn_samples_are_judged_by_their_score_and_not_by_a_control(tmp_path):
    """evaluation.json is written in alphabetical order, in which a control may come first."""
    run = finished(tmp_path)
    scores = {"first": 9.0, "heun_24": 2.5, "scrambled_class": 8.0, "shuffled_blocks": 7.0, "training_images": 1.0}
    evaluated(run, {"test": scores}, metric="frechet_classifier", better="lower")
    _, verdict, text = read(run)
    assert verdict.headline.startswith("Done. 2.5000 Frechet classifier distance") and "heun_24" in text


def test_a_run_that_was_not_begun_says_what_to_do(tmp_path):
    reader, verdict, _ = read(Run.at(settled(tmp_path).url))
    assert verdict.headline.startswith("Not finished.") and verdict.tone == "warn"
    assert {"dbtrain sweep RUN", "dbtrain eval RUN", "dbtrain losses RUN", "dbtrain resume RUN"} <= set(reader.text)


def test_samples_are_shown_and_texts_escaped(tmp_path):
    run = finished(tmp_path)
    picture = io.BytesIO()
    Image.new("L", (4, 4)).save(picture, format="PNG")
    run.store.write("samples.png", picture.getvalue())
    reader, _, _ = read(run)
    assert [attrs["alt"] for tag, attrs in reader.tags if tag == "img"] and ("h2", "Samples") in reader.headings
    run.store.remove("samples.png")
    for number in range(10):
        keep_text(run, KeptText("Once <i>", f"upon {number} & so on", 1.0, number))
    reader, _, text = read(run)
    rows = [row for row in reader.rows if row[:1] == ["Once <i>"]]
    assert [row[3] for row in rows] == [str(n) for n in range(9, 1, -1)] and "<i>" not in text


def test_a_failed_run_says_why_and_lets_no_error_write_html(tmp_path):
    run = Run.at(settled(tmp_path).url)
    evil = '<script>alert("1")</script> & <b>bold</b>'
    failed(run, 1, evil)
    steps(run, 1, 1, [(1, 2.0), (2, float("nan")), (3, float("inf"))], end="crashed", error=evil)
    reader, verdict, text = read(run)
    assert verdict.headline.startswith("Failed.") and verdict.tone == "bad"
    assert "nan" not in re.sub(r"<[^>]*>", "", text).lower().split() and 'points="nan' not in text
    assert "<script" not in text and "<b>bold" not in text and any(evil in part for part in reader.text)


def test_damaged_files_are_told_on_the_page(tmp_path):
    run = finished(tmp_path)
    evaluated(run, {"test": "high"})
    run.store.write("losses.json", b"[{")
    with (run.block(0).attempt(1).path / "events.jsonl").open("ab") as events:
        events.write(b'{"t": 1, "event": "st')
    _, verdict, _ = read(run)
    told = [remark.text for remark in verdict.remarks if remark.about == "Unreadable"]
    assert len(told) == 2 and any("evaluation.json" in t and "dbtrain eval" in t for t in told)
    assert verdict.headline.startswith("Done. Nobody has measured")


def test_results_of_another_model_are_not_those_of_the_run(tmp_path, monkeypatch):
    run = finished(tmp_path)
    monkeypatch.setattr(MergedDirectory, "weights_hash", "of now")

    def all_of(weights):
        evaluated(run, weights=weights)
        measured(run, weights=weights)
        sampled(run, weights=weights)
        swept(run, weights)
        run.store.remove("texts.json")
        keep_text(run, KeptText("Once", "upon a time", 1.0, 0, weights=weights))

    def shown():
        reader, verdict, _ = read(run)
        left = [remark.text for remark in verdict.remarks if remark.about == "Left out"]
        titles = {text for _, text in reader.headings}
        kept = [
            title for title in ("Quality", "Loss by noise level", "Samples", "Inside the layers") if title in titles
        ]
        assert not [remark for remark in verdict.remarks if remark.about == "Unreadable"]
        return kept, left, verdict.headline

    everything = ["Quality", "Loss by noise level", "Samples", "Inside the layers"]
    all_of("of before")
    assert shown()[:2] == (everything, []), "nothing is merged that they could differ from"
    run.merged.write_json("config.json", {})
    kept, left, headline = shown()
    assert kept == [] and headline.startswith("Done. Nobody has measured")
    names = ("evaluation.json", "losses.json", "samples.png", "texts.json", "sweep.json")
    assert len(left) == 1 and all(f"toy/{name}" in left[0] for name in names) and "another model" in left[0]
    assert left[0].endswith(
        "dbtrain eval RUN, dbtrain losses RUN, dbtrain sample RUN, dbtrain generate RUN --keep, dbtrain sweep RUN."
    )
    for same in ("of now", ""):  # files of before name no model
        all_of(same)
        assert shown()[:2] == (everything, [])


def test_who_denoised_what_is_shown_of_the_samples(tmp_path):
    run = finished(tmp_path)
    sampled(run, guidance=2.0)
    reader, _, _ = read(run)
    rows = [row for row in reader.rows if len(row) == 5 and row[0].startswith("block")]
    assert rows[1:] == [["block 0", "2.36643", "20", "3", "10"], ["block 1", "0.5", "2.36643", "1", "4"]]
    assert {"block 0: 3", "block 1: 1"} <= {text.strip() for text in reader.text}
    sampled(run, text=False)
    reader, _, _ = read(run)
    assert ("h2", "Samples") in reader.headings and ("h2", "Who denoised what") not in reader.headings


def test_samples_that_say_what_cannot_be_are_told_and_not_shown(tmp_path):
    run = finished(tmp_path)
    for wrong in ({"level_name": "$\\x"}, {"edges": (20.0, float("nan"), 0.5)}, {"steps": ((float("inf"), 0),)}):
        sampled(run, **wrong)
        told = [remark.text for remark in read(run)[1].remarks if remark.about == "Unreadable"]
        assert len(told) == 1 and "says wrongly how it was drawn" in told[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"no picture",
        lambda data: data[:-20],
        lambda data: data.replace(b"x" * 9, b"x" * 8 + b"y"),
    ],
)
def test_samples_that_are_no_whole_picture_are_told_and_not_shown(tmp_path, change):
    run = finished(tmp_path)
    sampled(run, weights="x" * 9)
    run.store.write("samples.png", change(run.store.read("samples.png")))
    reader, verdict, _ = read(run)
    told = [remark.text for remark in verdict.remarks if remark.about == "Unreadable"]
    assert len(told) == 1 and "samples.png is no whole PNG" in told[0] and "dbtrain sample" in told[0]
    assert not [tag for tag, _ in reader.tags if tag == "img"]


def test_a_branch_has_a_row_before_it_has_begun(tmp_path):
    reader, verdict, _ = read(Run.at(settled(tmp_path, init={"branch": {"steps": 2}}, blocks=3).url))
    assert [row[0] for row in reader.rows[1:5]] == ["branch", "block 0", "block 1", "block 2"]
    assert "4 of 4 are not done" in verdict.remarks[0].text


def test_an_end_to_end_run_has_no_noise_to_show(tmp_path):
    run = Run.at(settled(tmp_path, method="end_to_end", blocks=1).url)
    reader, _, _ = read(run)
    assert "Noise and its slices" not in {text for _, text in reader.headings}
    assert "dbtrain losses RUN" not in reader.text


def test_sixty_four_blocks_fit_on_a_page(tmp_path):
    model = {"arch": "vit", "depth": 64, "dim": 12, "heads": 2, "patch": 4}
    run = Run.at(settled(tmp_path, blocks=64, model=model).url)
    for block in range(64):
        steps(run, block, 1, [(1, 2.0), (2, 1.0 + block / 64)], end="" if block % 9 else "done")
    reader, _, text = read(run)
    assert sum(row[0] == "block 63" for row in reader.rows if row) >= 3 and len(text) < 3_000_000
    assert "color-mix" in text


def test_attempts_whose_workers_never_spoke_have_their_rows(tmp_path):
    """From what the command wrote of them: a death in the start, one that a stop came before, and one that waits."""
    run = finished(tmp_path)
    log = records(run, 1, 3, BEGAN + 40)
    log.emit("placed")
    log.emit("died", error="Worker unexpectedly exits with a connection error code 2.")
    steps(run, 1, 4, [(2, 0.125)], began=BEGAN + 60)
    records(run, 0, 2, BEGAN + 50).emit("end", outcome="stopped", reason="stopped before its workers started")
    records(run, 0, 3, BEGAN + 70).emit("placed")
    reader, verdict, _ = read(run)
    rows = {tuple(row[:2]): row[2:] for row in reader.rows if len(row) == 9}
    assert rows["block 1", "3"][:6] == ["-", "0:40", "0:42", "-", "0", "lost"] and "SIGKILL" in rows["block 1", "3"][6]
    assert rows["block 0", "2"][5:] == ["stopped", "stopped before its workers started"]
    assert rows["block 0", "3"][5:] == ["lost", "the command that placed it ended before its workers had started"]
    said = next(remark.text for remark in verdict.remarks if remark.about == "Faults")
    assert said.startswith("3 of 7 attempts ended in a fault. ") and "block 1 before its workers had started" in said
    run.block(0).store.write_json("state.json", {"block": 0, "phase": "placed", "since": BEGAN, "error": None})
    (run.block(0).store.path / "step_00000002/COMMIT.json").unlink()
    with RunLock(run.store, "dbtrain train"):
        reader, _, _ = read(run)
    assert ["block 0", "3", "-", "1:10", "1:10", "-", "0", "placed", ""] in reader.rows


def records(run, block, attempt, when):
    """The log in which a command tells of an attempt."""
    clock = iter(when + 2.0 * n for n in range(9))
    return EventLog(run.block(block).attempt(attempt), COORDINATOR, clock=lambda: next(clock))


def test_an_extension_is_on_the_time_line(tmp_path):
    run = finished(tmp_path)
    grown = Extension(1_790_000_015.0, "0.2.0", Lengths(2), Lengths(4), ())
    config = {**run.manifest.config, "training": {**run.manifest.config["training"], "steps": 4}}
    run.record(dataclasses.replace(run.manifest, config=config, extensions=(grown,)))
    reader, verdict, _ = read(Run.at(run.store.url))
    assert "extended" in [text.strip() for text in reader.text]
    assert verdict.headline.startswith("Not finished.")


def test_the_command_writes_the_page_and_refuses_in_one_line(tmp_path):
    run, runner = finished(tmp_path), CliRunner()
    done = runner.invoke(app, ["report", run.store.url])
    assert done.exit_code == 0 and run.store.read_text("report.html").startswith("<!doctype html>")
    assert "Done." in done.output and "report.html" in done.output
    elsewhere = tmp_path / "page.html"
    assert runner.invoke(app, ["report", run.store.url, "--to", str(elsewhere)]).exit_code == 0 and elsewhere.exists()
    for wrong in (
        [run.store.url, "--to", str(tmp_path / "no" / "page.html")],
        [str(tmp_path / "nowhere")],
        [str(tmp_path)],
    ):
        refused = runner.invoke(app, ["report", *wrong])
        assert refused.exit_code != 0 and refused.exception.__class__ is SystemExit
    run.store.write("run.json", b"{}")
    assert runner.invoke(app, ["report", run.store.url]).exit_code == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)")
def test_a_browser_shows_it_in_light_and_in_dark(whole, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page(gather(whole)))
    means = {}
    for scheme, options in {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}.items():
        picture = tmp_path / f"{scheme}.png"
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,2400", *options]
        command += [f"--user-data-dir={tmp_path / scheme}", f"--screenshot={picture}", file.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(picture) as image:
            colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
            grey = image.convert("L")
            means[scheme] = sum(i * n for i, n in enumerate(grey.histogram())) / (grey.width * grey.height)
        assert len(colours) > 100, "an empty page has one colour"
    assert means["light"] > 200 and means["dark"] < 60
