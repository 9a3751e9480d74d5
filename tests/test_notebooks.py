"""What makes a notebook readable: its opening, prose before code, short cells, figures that are read back."""

import json
import re

import nbformat
import pytest

from atp_utils import ROOT

BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Notebooks that read figures back: what is seen, and what that can't say.
READ_BACK = ("02", "03", "04", "05", "06", "07", "08", "09", "10")
DRAWS = re.compile(r"gallery\.draw\(|plt\.show\(")
each = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)


def cells_of(path):
    """(kind, source, cell) of each cell."""
    return [(cell["cell_type"], "".join(cell["source"]), cell) for cell in json.loads(path.read_text())["cells"]]


def is_parameters(cell):
    return "parameters" in cell["metadata"].get("tags", [])


@each
def test_the_file_is_valid_and_names_the_usual_kernel(path):
    book = json.loads(path.read_text())
    nbformat.validate(book)
    assert book["metadata"]["kernelspec"]["name"] == "python3" and (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    identities = [cell["id"] for cell in book["cells"]]
    assert len(set(identities)) == len(identities)
    assert not {"papermill", "jupytext"} & set(book["metadata"]), "execute with `make notebooks`"


@each
def test_the_opening_says_what_is_asked_and_what_the_paper_says(path):
    kinds, texts = zip(*[(kind, text) for kind, text, _ in cells_of(path)[:4]], strict=True)
    assert set(kinds) == {"markdown"}
    asked, paper, place, contents = texts
    assert re.match(rf"# {int(path.stem[:2])}\. [^\n]+\n\n\*[^*]+\?\*\n", asked)
    assert paper.startswith("**What the paper says.**")
    assert "Section " in paper and "https://arxiv.org/abs/2510.04860" in paper
    assert all(f"**{word}**" in place.lower() for word in ("reads", "writes", "takes"))
    assert re.search(r"\*\*takes\*\* [^;,]*(second|minute)", place.replace("\n", " "))
    assert contents.startswith("**Contents**")


@each
def test_contents_link_to_every_heading(path):
    cells = cells_of(path)
    linked = re.findall(r"- \[([^]]+)\]\(#([^)]+)\)", cells[3][1])
    headings = [text for kind, source, _ in cells[1:] if kind == "markdown"
                for text in re.findall(r"^#+ (.+)$", source, flags=re.M)]  # fmt: skip
    # JupyterLab and nbconvert make a heading's anchor alike, by hyphens, as long as it has no other signs.
    assert [name for name, _ in linked] == headings and len(set(headings)) == len(headings)
    assert all(anchor == name.replace(" ", "-") and re.fullmatch(r"[\w,-]+", anchor) for name, anchor in linked)


@each
def test_two_cells_of_prose_for_each_of_code(path):
    kinds = [kind for kind, *_ in cells_of(path)]
    assert kinds.count("markdown") >= 2 * kinds.count("code")
    assert all(len(source) > 75 for kind, source, _ in cells_of(path) if kind == "markdown"), "a heading is no prose"


@each
def test_cells_are_short(path):
    code = [(source, cell) for kind, source, cell in cells_of(path) if kind == "code"]
    assert sum(is_parameters(cell) for _, cell in code) == 1
    assert all(len(source.splitlines()) <= 15 for source, cell in code if not is_parameters(cell))
    assert not any(source.endswith(";") for source, _ in code), "nbval sees what a semicolon hides"
    after = [is_parameters(cell) for _, cell in code].index(True) + 1
    assert len(code[after][0].splitlines()) <= 8, "setup"


@each
def test_outputs_are_whole_and_of_nowhere(path):
    for kind, source, cell in cells_of(path):
        outputs = json.dumps(cell.get("outputs", []))
        assert kind == "markdown" or cell["execution_count"] is not None, "execute with `make notebooks`"
        assert '"output_type": "error"' not in outputs and '"stderr"' not in outputs, source
        assert "execution" not in cell["metadata"], "times of execution: run make notebooks"
        assert str(ROOT.parent) + "/" not in outputs and "/site-packages/" not in outputs, source


@pytest.mark.parametrize("path", [path for path in BOOKS if path.stem[:2] in READ_BACK], ids=lambda path: path.stem)
def test_every_figure_is_read_back_with_computed_numbers(path):
    cells = cells_of(path)
    code = [place for place, (kind, source, _) in enumerate(cells) if kind == "code"]
    drawn = [place for place in code if DRAWS.search(cells[place][1])]
    assert drawn
    for place in drawn:
        source = cells[place][1]
        following = source if "for " in source and "gallery.draw" in source else cells[code[code.index(place) + 1]][1]
        assert re.search(r"Markdown\([^\n]*reading\.", following), source
        if following != source:
            after = "\n".join(text for kind, text, _ in cells[code[code.index(place) + 1] + 1 :] if kind == "markdown")
            assert after.startswith(("**What it can't say.**", "**How sure.**"))
    for kind, source, cell in cells:
        if kind == "code" and "reading." in source and not DRAWS.search(source):
            [output] = cell["outputs"]
            assert "".join(output["data"]["text/markdown"]).strip()


def test_the_algorithms_stand_beside_their_code():
    for book, episode in (("04", "role_play"), ("05", "tool_use"), ("06", "collusion")):
        [path] = [path for path in BOOKS if path.stem.startswith(book)]
        cells = cells_of(path)
        [place] = [
            i for i, (kind, text, _) in enumerate(cells) if kind == "markdown" and text.startswith("## Algorithm")
        ]
        assert re.findall(r"^(\d)\.", cells[place][1], flags=re.M) in (list("12345"), list("1234"))
        shown = json.dumps(cells[place + 2][2]["outputs"])
        assert "getsource(episodes.episode)" in cells[place + 2][1] and "def episode(" in shown and episode in shown
