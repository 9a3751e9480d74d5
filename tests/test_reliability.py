"""docs/reliability.md shows what `make soak` counted."""

import json

import pandas as pd

from atp_utils import ROOT


def table(counts):
    """A row for each test of the soak, as the document has it: what it counted, how it ended and how long it took."""
    rows = []
    for name, found in counts["tests"].items():
        told = "; ".join(f"{what} {value}" for what, value in found.items() if what not in ("outcome", "seconds"))
        file, test = name.removeprefix("tests/test_").split(".py::test_")
        rows.append([file.replace("_", " "), test.replace("_", " "), told, found["outcome"], round(found["seconds"])])
    return pd.DataFrame(rows, columns=["file", "test", "counted", "outcome", "seconds"]).to_markdown(index=False)


def test_the_document_has_the_soaks_figures():
    counts = json.loads((ROOT / "docs/reliability.json").read_text())
    text = (ROOT / "docs/reliability.md").read_text()
    assert table(counts) in text and f"{counts['processor']}, {counts['cores']} cores" in text
    assert {found["outcome"] for found in counts["tests"].values()} <= {"passed", "skipped"}
