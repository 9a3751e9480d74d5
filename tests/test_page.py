"""The report in one file: whole, and readable in a browser and on a telephone."""

import html
import re
import shutil
import subprocess

import pytest

from atp_utils import resolve
from atp_utils.analysis import page, plots

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]  # fmt: skip
# A frame as wide as a telephone, which then says what a reader would see.
WRAPPER = """<!doctype html><meta charset="utf-8"><iframe width="390" height="800" srcdoc="{page}"
onload="const d = this.contentDocument, shown = [...d.images].filter(i => i.naturalWidth).length;
document.body.append('missing=' + (d.images.length - shown) + ' images=' + d.images.length
+ ' width=' + d.documentElement.scrollWidth)"></iframe>"""


@pytest.fixture(scope="module")
def text():
    plots.set_style()
    return page.page(resolve("data/results"))


def test_it_holds_every_run_and_fetches_nothing(text):
    manifests = list(resolve("data/results").glob("**/evolution/**/manifest.json"))
    assert text.count("<details>") == len(manifests) > 0
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*", text) and "<script" not in text
    for title in ("What was asked, and what came out", "The paper&#39;s tables and figures", "Primary contrast"):
        assert title in text


def test_every_picture_is_described(text):
    pictures = re.findall(r"<img [^>]*>", text)
    assert pictures and all(re.search(r'alt="[^"]{20,}"', picture) for picture in pictures)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_nothing_is_missing_and_a_telephone_is_wide_enough(text, tmp_path):
    (tmp_path / "frame.html").write_text(WRAPPER.format(page=html.escape(text)), encoding="utf-8")
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    shown = subprocess.run([*command, f"file://{tmp_path / 'frame.html'}"], capture_output=True, text=True, timeout=300)
    seen = re.search(r"missing=(\d+) images=(\d+) width=(\d+)", shown.stdout.rpartition("</iframe>")[2])
    assert seen, shown.stderr[-2000:]
    missing, images, width = map(int, seen.groups())
    assert missing == 0 and images == text.count("<img ") and width <= 390
    assert "CONSOLE" not in shown.stderr


def test_names_from_replies_are_no_markup(tmp_path):
    source = resolve("data/results/quick/evolution/collusion/smollm2-135m/standard/base")
    shutil.copytree(source, tmp_path / "<b>run</b>")
    made = page.page(tmp_path)
    assert "<b>run" not in made and "&lt;b&gt;run" in made


def test_results_that_are_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["page", str(tmp_path), str(tmp_path / "out.html")])
    assert page.main() == 2 and "no complete run" in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()
