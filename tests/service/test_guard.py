"""What stands around the routes: API keys, limits of size and time, the access log, metrics, health."""

import asyncio
import hashlib
import json
import logging
import time

import pytest
from asking import BODY, HELLO, chat, error_of, events
from fastapi.testclient import TestClient

from nexus_ray.cli.main import run_command
from nexus_ray.errors import ConfigError, NexusError
from serve.api import build_api
from serve.guard.keys import VARIABLE, KeyFile, keys_of_environment, new_key, parse_keys
from serve.service import Service


def client_of(service, **options):
    return TestClient(build_api(service, **options), raise_server_exceptions=False)


@pytest.fixture
def keys(tmp_path):
    """(KeyFile, its path, the key of "ann")."""
    key, line = new_key("ann")
    (tmp_path / "keys").write_text(f"# who may ask\n{line}\n")
    return KeyFile(tmp_path / "keys", {}), tmp_path / "keys", key


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_a_key_opens_the_routes_and_nothing_else_does(service, keys):
    guard, _, key = keys
    with client_of(service, keys=guard) as client:
        assert client.get("/v1/models", headers=bearer(key)).status_code == 200
        for headers in (
            {},
            bearer("wrong"),
            bearer(key[:-1]),
            bearer(key + "x"),
            bearer(hashlib.sha256(key.encode()).hexdigest()),
            {"Authorization": key},
            {"Authorization": "Bearer "},
            {"Authorization": f"Basic {key}"},
        ):
            response = client.get("/v1/models", headers=headers)
            error = error_of(response, 401)
            assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
            assert response.headers["www-authenticate"] == "Bearer"
            assert "bard" not in response.text
        assert client.post("/v1/chat/completions", json=BODY).status_code == 401
        assert client.get("/v1/nothing").status_code == 401  # what there is stays hidden too
        assert client.get("/healthz").status_code == 200


def test_keys_hold_where_the_application_is_mounted_below_others(service, keys):
    guard, _, key = keys
    client = TestClient(build_api(service, keys=guard), root_path="/nexus", raise_server_exceptions=False)
    assert client.get("/nexus/v1/models").status_code == 401
    assert client.get("/nexus/v1/models", headers=bearer(key)).status_code == 200
    assert client.get("/nexus/healthz").status_code == 200


def test_a_withdrawn_key_no_longer_opens(service, keys):
    guard, path, key = keys
    other, line = new_key("bob")
    with client_of(service, keys=guard) as client:
        path.write_text(line + "\n\n")
        assert client.get("/v1/models", headers=bearer(key)).status_code == 401
        assert client.get("/v1/models", headers=bearer(other)).status_code == 200
        path.write_text("garbled\n")
        assert client.get("/v1/models", headers=bearer(other)).status_code == 401
        path.unlink()
        assert client.get("/v1/models", headers=bearer(other)).status_code == 401
        path.write_text(line)
        assert client.get("/v1/models", headers=bearer(other)).status_code == 200


def test_only_hashes_are_kept():
    key, line = new_key("ann")
    assert key not in line
    assert parse_keys([line], "x") == {hashlib.sha256(key.encode()).hexdigest(): "ann"}
    assert new_key("ann")[0] != key


def test_keys_of_the_environment(monkeypatch, service):
    (one, first), (_, second) = new_key("ann"), new_key("bob")
    monkeypatch.setenv(VARIABLE, f"{first},{second}")
    guard = KeyFile(None, keys_of_environment())
    assert guard.required
    assert guard.owner(one) == "ann"
    monkeypatch.delenv(VARIABLE)
    assert not KeyFile(None, keys_of_environment()).required


@pytest.mark.parametrize("line", ["nr-secret-key", "ann:nr-secret", "ann:" + "G" * 64, "a b:" + "0" * 64])
def test_a_garbled_key_file_is_refused_without_showing_what_may_be_a_key(tmp_path, line):
    (tmp_path / "keys").write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match=r"keys, line 2: not of the form") as refused:
        KeyFile(tmp_path / "keys", {})
    assert line not in str(refused.value)


def test_a_missing_key_file_and_a_bad_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        KeyFile(tmp_path / "none", {})
    with pytest.raises(ConfigError, match="cannot be called"):
        new_key("a b")


def test_without_keys_nobody_is_asked(client):
    assert client.get("/v1/models", headers=bearer("anything")).status_code == 200


def test_a_large_body_is_refused_by_its_announced_and_by_its_true_size(service):
    long = json.dumps(BODY | {"messages": [{"role": "user", "content": "x" * 3000}]}).encode()
    json_type = {"Content-Type": "application/json"}
    with client_of(service, max_body_bytes=2048) as client:
        announced = client.post("/v1/chat/completions", content=long, headers=json_type)
        chunked = client.post(
            "/v1/chat/completions", content=iter([long[:1000], long[1000:2000], long[2000:]]), headers=json_type
        )
        for response in (announced, chunked):
            assert error_of(response, 413)["code"] == "request_too_large"
        assert chat(client).status_code == 200


@pytest.mark.parametrize("content", [b"\xff\xfe{", b'{"model": "\xff"}', b'{"model": "bard", "messages": "\xc3"}'])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/perplexity"])
def test_invalid_utf8_is_refused(client, path, content):
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert error_of(response, 400)["type"] == "invalid_request_error"


def test_an_answer_that_takes_too_long_is_ended(assistant):
    with client_of(Service(assistant, 32, timeout=0.05)) as client:
        error = error_of(chat(client, max_tokens=400), 504)
        assert error["code"] == "timeout"
        streamed = events(chat(client, max_tokens=400, stream=True))
        assert streamed[-1]["error"]["code"] == "timeout"
    assert assistant.engine.state().running == 0


@pytest.fixture
def log(caplog):
    """A function that returns the lines of the access log so far."""
    caplog.set_level(logging.INFO, "nexus_ray.serve.access")
    return lambda: [json.loads(record.message) for record in caplog.records if record.name.endswith("access")]


def test_the_access_log_tells_who_asked_for_what_but_not_the_text(service, keys, log):
    guard, _, key = keys
    with client_of(service, keys=guard) as client:
        answer = client.post("/v1/chat/completions", json=BODY, headers=bearer(key) | {"x-request-id": "abc-1"})
        client.post("/v1/chat/completions", json=BODY | {"stream": True}, headers=bearer(key))
        client.post("/v1/chat/completions", json=BODY, headers=bearer("wrong"))
        client.get("/healthz")
    assert answer.headers["x-request-id"] == "abc-1"
    whole, streamed, refused = log()
    assert (whole["id"], whole["client"], whole["status"], whole["model"]) == ("abc-1", "ann", 200, "bard")
    assert (whole["method"], whole["path"]) == ("POST", "/v1/chat/completions")
    assert {name: whole[name] for name in answer.json()["usage"]} == answer.json()["usage"]
    assert streamed["first_piece_seconds"] <= streamed["seconds"]
    assert streamed["completion_tokens"] == 12
    assert (refused["status"], refused["client"]) == (401, None)
    assert "morrow" not in json.dumps(log())
    assert "wrong" not in json.dumps(log())


def test_the_access_log_tells_the_text_when_asked(service, log):
    with client_of(service, log_text=True) as client:
        content = chat(client).json()["choices"][0]["message"]["content"]
        chat(client, stream=True)
        client.post("/v1/completions", json={"model": "bard", "prompt": "thou art", "max_tokens": 2})
    whole, streamed, completed = log()
    assert whole["given"] == {"messages": HELLO}
    assert whole["answer"] == streamed["answer"] == content
    assert completed["given"] == {"prompt": "thou art"}


def test_a_request_id_that_could_forge_a_log_line_is_replaced(client):
    answer = client.get("/v1/models", headers={"x-request-id": "a b\\n{}"})
    assert answer.headers["x-request-id"].isalnum()


def metrics_of(client):
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_count_requests_and_tokens(client):
    usage = chat(client).json()["usage"]
    chat(client, stream=True)
    chat(client, temperature=9)
    client.get("/v1/nothing/at/all")
    found = metrics_of(client)
    assert found['nexus_ray_requests_total{route="/v1/chat/completions",status="200"}'] == 2
    assert found['nexus_ray_requests_total{route="/v1/chat/completions",status="400"}'] == 1
    assert found['nexus_ray_requests_total{route="other",status="404"}'] == 1
    assert found['nexus_ray_tokens_total{kind="prompt",model="bard"}'] == 2 * usage["prompt_tokens"]
    assert found['nexus_ray_tokens_total{kind="completion",model="bard"}'] == 24
    assert found["nexus_ray_first_piece_seconds_count"] == 1
    assert found["nexus_ray_requests_in_flight"] == 1  # the one that asks
    assert found["nexus_ray_engine_running"] == 0


def test_metrics_count_what_the_engine_reads_and_scores(client):
    before = metrics_of(client)
    usage = chat(client).json()["usage"]
    scored = client.post("/v1/perplexity", json={"model": "bard", "text": "king and servant"}).json()
    after = metrics_of(client)
    read, judged = (f"nexus_ray_engine_{kind}_tokens" for kind in ("prompt", "scored"))
    assert after[read] - before[read] == usage["prompt_tokens"]
    assert after[judged] - before[judged] == scored["results"][0]["scores"]["bard"]["tokens"]


def test_health_is_the_engine_s(client, assistant, monkeypatch):
    health = client.get("/healthz").json()
    assert (health["status"], health["models"]) == ("ok", ["base", "bard"])

    def stuck():
        raise NexusError("a forward pass has been running for 400 s")

    monkeypatch.setattr(assistant.engine, "check", stuck)
    assert "forward pass" in error_of(client.get("/healthz"), 503)["message"]


async def ask_and_leave(service, path, body, *, stream=False):
    """An ASGI client that disconnects after the first event (or, without streaming, during the answer)."""
    gone = asyncio.Event()
    incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if incoming:
            return incoming.pop(0)
        if stream:
            await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.body":
            gone.set()

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-type", b"application/json")]}
    scope |= {"query_string": b"", "http_version": "1.1", "raw_path": path.encode(), "root_path": ""}
    scope |= {"scheme": "http", "client": ("test", 1), "server": ("test", 80), "asgi": {"version": "3.0"}}
    await build_api(service)(scope, receive, send)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_generation(service, assistant, stream):
    before = assistant.engine.state().generated_tokens
    body = BODY | {"stream": stream, "max_tokens": 400}
    asyncio.run(ask_and_leave(service, "/v1/chat/completions", body, stream=stream))
    assert assistant.engine.state().running == 0
    assert assistant.engine.state().generated_tokens - before < 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/perplexity", {"texts": ["king and servant " * 400] * 8, "stride": 1}),
        (
            "/v1/completions",
            {"model": "bard", "prompt": ["king and servant " * 40] * 8, "echo": True, "logprobs": 1, "max_tokens": 0},
        ),
    ],
    ids=["perplexity", "echo"],
)
def test_a_client_that_goes_away_ends_its_scoring(service, assistant, log, path, body):
    before = assistant.engine.state().scored_tokens
    asyncio.run(ask_and_leave(service, path, body))
    patience = time.monotonic() + 30
    while assistant.engine.state().scoring and time.monotonic() < patience:
        time.sleep(0.02)
    assert assistant.engine.state().scoring == 0
    everything = sum(len(assistant.codec.encode(text)) for text in body.get("texts") or body["prompt"])
    assert assistant.engine.state().scored_tokens - before < everything / 2
    [line] = log()
    assert line["status"] == 499


def test_the_command_makes_a_key_that_opens(tmp_path, service, capsys):
    path = tmp_path / "keys"
    keys = {}
    for name in ("ann", "bob"):
        assert run_command(["api-key", name, "--file", str(path)]) == 0
        keys[name] = capsys.readouterr().out.split(": ", 1)[1].split()[0]
    with client_of(service, keys=KeyFile(path, {})) as client:
        for key in keys.values():
            assert client.get("/v1/models", headers=bearer(key)).status_code == 200
    assert not any(key in path.read_text() for key in keys.values())
