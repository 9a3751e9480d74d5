from pathlib import Path

import pytest
import tiny_models
from hypothesis import settings

from atp_utils import models
from atp_utils.engines.transformers_engine import TransformersEngine
from atp_utils.evolution.requests import Request
from atp_utils.scenarios.role_play.items import make_items, read_environments
from atp_utils.support import files
from atp_utils.support.manifest import made_by

# Minutes each, in processes of their own: they start first, so that no core waits for them at the end.
LONGEST = ("test_pipeline", "test_paper_profile", "test_reproduce")

# For `make soak`.
settings.register_profile("soak", max_examples=5000, deadline=None)


def pytest_addoption(parser):
    parser.addoption("--counts", help="JSON file for what each test recorded by record_property, and its seconds")


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("counts"):
        ended = [report for name in ("passed", "failed", "skipped") for report in terminalreporter.stats.get(name, [])]
        ended = sorted((report for report in ended if report.when == "call"), key=lambda report: report.nodeid)
        counts = {
            report.nodeid: dict(report.user_properties)
            | {"outcome": report.outcome, "seconds": round(report.duration, 1)}
            for report in ended
        }
        files.write_json(Path(config.getoption("counts")), {"tests": counts} | made_by())


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def environments():
    return read_environments()


@pytest.fixture(scope="session")
def splits(environments):
    return make_items(environments)


@pytest.fixture
def item(splits):
    return splits[1][0]


@pytest.fixture(scope="session")
def embedded():
    models.locate(models.EMBEDDED)
    return models.EMBEDDED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny random model of each of the paper's families."""
    folder = tmp_path_factory.mktemp("tiny")
    return {family: str(tiny_models.build(family, folder / family)) for family in tiny_models.FAMILIES}


@pytest.fixture
def engine(embedded):
    return TransformersEngine(embedded)


@pytest.fixture
def ask():
    """A forced choice between two answers about a subject, after any number of earlier turns."""

    def make(subject: str, *turns: str, seed: int = 0, options=('{"choice": "Yes"}', '{"choice": "No"}')):
        messages = [{"role": "user", "content": f"Do you like {subject}?"}]
        for said, heard in zip(turns[::2], turns[1::2], strict=True):
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": heard}]
        return Request(f"test/{subject}/{len(turns)}/{seed}", messages, seed, options)

    return make
