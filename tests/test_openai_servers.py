"""What the environment may do to the connection with a server: nothing that wasn't asked for, and no riddles."""

import pytest
from fault_server import KEY, Handler, answers, asking, free, running


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
    assert answers(asking(server.url, key_variable="TEST_KEY"), [free(1)])
    assert len(sent) == 3 and all(each["authorization"] == f"Bearer {KEY}" for each in sent)
    assert "private" not in str(sent) and sent[-1]["content-type"] == "application/json"
    server.key = None
    assert answers(asking(server.url), [free(1)])
    assert "private" not in str(sent) and KEY not in str(sent[3:])


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SSL_CERT_FILE", "/not/there"), ("SSL_CERT_FILE", "/dev/null"), ("ALL_PROXY", f"what://me:{KEY}@127.0.0.1")],
)
def test_settings_that_no_connection_can_be_made_with_are_named(start, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"check the variables .*{variable}") as caught:
        asking(start().url)
    assert KEY not in str(caught.value)


def test_what_broke_the_connection_is_said():
    with pytest.raises(ConnectionError, match="can't be reached: is the server running.*refused"):
        asking("http://127.0.0.1:9/v1", retries=0)
