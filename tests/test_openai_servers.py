"""What the environment may do to the connection with a server: nothing that wasn't asked for, and no riddles."""

import pytest
from fault_server import KEY, Handler, answers, free, running

from atp_utils.engines.openai_engine import OpenAIEngine


@pytest.fixture
def start(monkeypatch):
    with running(monkeypatch) as make:
        yield make


def test_no_server_gets_what_the_environment_holds_for_another(start, monkeypatch):
    headers = "X-Secret: private\nAuthorization: Bearer private\ncontent-type: private\nuser-agent: private\nprivate"
    for name, value in (
        ("OPENAI_CUSTOM_HEADERS", headers),
        *((f"OPENAI_{name}", "private") for name in ("ORG_ID", "PROJECT_ID", "API_KEY", "ADMIN_KEY", "WEBHOOK_SECRET")),
        ("OPENAI_BASE_URL", "http://127.0.0.1:9/private"),
    ):
        monkeypatch.setenv(name, value)
    sent = []
    for name in ("do_GET", "do_POST"):
        answer = getattr(Handler, name)
        monkeypatch.setattr(
            Handler,
            name,
            lambda self, a=answer: sent.append({k.lower(): v for k, v in self.headers.items()}) or a(self),
        )
    server = start()
    server.key = KEY
    assert answers(OpenAIEngine("toy", server.url, key_variable="TEST_KEY"), [free(1)])
    assert len(sent) == 2 and all(each["authorization"] == f"Bearer {KEY}" for each in sent)
    assert "private" not in str(sent) and sent[1]["content-type"] == "application/json"
    server.key = None
    assert answers(OpenAIEngine("toy", server.url), [free(1)])
    assert "private" not in str(sent) and KEY not in str(sent[2:])


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_certificates_that_are_not_there_are_named(start, monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=f"{variable} names {tmp_path / 'gone'}, which isn't there"):
        OpenAIEngine("toy", start().url)


def test_settings_that_no_connection_can_be_made_with_are_named(start, monkeypatch, tmp_path):
    (tmp_path / "empty.pem").write_text("")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="check the variables .*SSL_CERT_FILE"):
        patch.setenv("SSL_CERT_FILE", str(tmp_path / "empty.pem"))
        OpenAIEngine("toy", start().url)
    monkeypatch.setenv("ALL_PROXY", f"what://me:{KEY}@127.0.0.1")
    with pytest.raises(ValueError, match="check the variables .*ALL_PROXY") as caught:
        OpenAIEngine("toy", start().url)
    assert KEY not in str(caught.value)


def test_what_broke_the_connection_is_said():
    with pytest.raises(ConnectionError, match="can't be reached .*refused.*: is the server running"):
        OpenAIEngine("toy", "http://127.0.0.1:9/v1", retries=0)
