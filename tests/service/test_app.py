"""The Ray Serve application: what is refused before anything starts, and the real thing on a free port."""

import importlib.util
import json
import math
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml

from nexus_ray.config import save_config
from nexus_ray.errors import ArtefactError, ConfigError, NexusError
from nexus_ray.generation.serving import overlays_of, student_name
from serve.app import _require_free, application, build_app, run_service, stop_service

HELLO = [{"role": "user", "content": "Good morrow, who goes there?"}]
_GENERATED = "nexus_ray_engine_generated_tokens "
BODY = {"model": "bard", "messages": HELLO, "max_tokens": 8, "temperature": 0}


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def run_directory(tmp_path, micro_overlay):
    directory = tmp_path / "bard"
    directory.mkdir()
    (directory / "overlay").symlink_to(micro_overlay)
    return directory


def test_the_student_is_called_after_its_run_unless_named(micro_config, tmp_path):
    assert student_name(micro_config(tmp_path / "bard")) == "bard"
    assert student_name(micro_config(tmp_path / "bard", **{"serve.name": "will"})) == "will"
    with pytest.raises(ConfigError, match="cannot be 'base'"):
        student_name(micro_config(tmp_path / "base"))


def test_further_overlays_have_names_of_their_own(micro_config, run_directory, micro_overlay):
    def overlays(**names):
        return overlays_of(micro_config(run_directory, **{"serve.overlays": names}))

    assert overlays(will=str(micro_overlay)) == {"bard": run_directory / "overlay", "will": micro_overlay}
    for name in ("base", "bard"):
        with pytest.raises(ConfigError, match=f"'{name}' is taken"):
            overlays(**{name: str(micro_overlay)})
    with pytest.raises(ArtefactError, match="for model 'will'"):
        overlays(will="nowhere")


def test_replicas_grow_with_load_when_they_may(micro_config, run_directory):
    fixed = application(micro_config(run_directory, **{"serve.replicas": 2}))._bound_deployment
    assert fixed.num_replicas == 2
    growing = {"serve.replicas": 2, "serve.max_replicas": 5, "serve.target_ongoing_requests": 8}
    deployment = application(micro_config(run_directory, **growing))._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 8)
    with pytest.raises(ConfigError, match="max_replicas"):
        micro_config(run_directory, **{"serve.replicas": 3, "serve.max_replicas": 2})


def test_a_garbled_key_is_refused_before_ray_starts(micro_config, run_directory, monkeypatch):
    monkeypatch.setenv("NEXUS_RAY_API_KEYS", "my-secret")
    with pytest.raises(ConfigError, match="NEXUS_RAY_API_KEYS, line 1"):
        application(micro_config(run_directory))


def test_a_run_without_an_overlay_is_refused_before_ray_starts(micro_config, tmp_path):
    with pytest.raises(ArtefactError, match="nexus-ray run CONFIG"):
        application(micro_config(tmp_path / "bard"))


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{taken.getsockname()[1]}: Address already in use"):
            _require_free("127.0.0.1", taken.getsockname()[1])


def test_a_host_of_another_machine_is_refused():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:8000"):  # an address reserved for documentation
        _require_free("192.0.2.1", 8000)


@pytest.mark.parametrize("args", [{}, {"config": "missing.yaml"}, {"config": "x", "colour": "red"}])
def test_the_builder_refuses_wrong_arguments(args):
    with pytest.raises(ConfigError):
        build_app(args)


def test_the_builder_takes_a_file_and_overrides(micro_config, run_directory, tmp_path):
    save_config(micro_config(run_directory), tmp_path / "config.yaml")
    arguments = {"config": str(tmp_path / "config.yaml"), "overrides": ["serve.replicas=3"]}
    deployment = build_app(arguments)._bound_deployment
    assert deployment.num_replicas == 3
    assert deployment.ray_actor_options["num_cpus"] == 1


def test_the_configuration_file_is_one_that_ray_serve_takes():
    from ray.serve.schema import ServeDeploySchema

    path = Path(__file__).parents[2] / "serve" / "config.yaml"
    [deployed] = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text())).applications
    assert deployed.import_path == "serve.app:build_app"
    assert set(deployed.args) == {"config", "overrides"}


@pytest.mark.ray
def test_the_service_on_ray(ray_session, micro_config, run_directory, port):
    config = micro_config(run_directory, **{"serve.port": port})
    run_service(config, blocking=False)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            check_routes(client)
            check_errors(client)
            check_disconnect(client)
            check_page(client)
            check_openai_client(port)
    finally:
        stop_service()
    _require_free("127.0.0.1", port)


def check_routes(client):
    assert client.get("/healthz").json()["status"] == "ok"
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["base", "bard"]
    contents = {}
    for model in ("base", "bard"):
        answer = client.post("/v1/chat/completions", json=BODY | {"model": model}).json()
        contents[model] = answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] == 8
    assert contents["base"] != contents["bard"]
    with client.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("content", "") for delta in deltas) == contents["bard"]
    [result] = client.post("/v1/perplexity", json={"text": "thou art the king"}).json()["results"]
    for score in result["scores"].values():
        assert math.isclose(score["token_perplexity"], math.exp(score["nats_per_token"]))


def check_errors(client):
    unknown = client.post("/v1/chat/completions", json=BODY | {"model": "gpt-5"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    invalid = client.post("/v1/chat/completions", json=BODY | {"temperature": 9})
    assert (invalid.status_code, invalid.json()["error"]["param"]) == (400, "temperature")


def check_disconnect(client):
    """An abandoned answer, streamed or not, does not keep the next one waiting until it would have ended."""
    long, seconds = long_answer(client)
    with client.stream("POST", "/v1/chat/completions", json=long | {"stream": True}) as response:
        next(response.iter_lines())
    assert client.post("/v1/chat/completions", json=BODY).elapsed.total_seconds() < seconds / 2
    with pytest.raises(httpx.ReadTimeout):
        client.post(
            "/v1/chat/completions", json=long, timeout=min(seconds / 5, 0.2)
        )  # of a machine that may have been busy
    assert client.post("/v1/chat/completions", json=BODY).elapsed.total_seconds() < seconds / 2


def long_answer(client):
    """(request, seconds) of an answer of 512 tokens; the template prints the day, so a prompt gives others tomorrow."""
    for word in ("Good", "morrow", "king", "night", "sorrow", "peace", "commerce", "budget"):
        long = BODY | {"max_tokens": 512, "messages": [{"role": "user", "content": word}]}
        whole = client.post("/v1/chat/completions", json=long)
        if whole.json()["usage"]["completion_tokens"] == 512:
            return long, whole.elapsed.total_seconds()
    raise AssertionError("every prompt ended early")


def check_page(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    module = client.get("/web/main.js")
    assert module.headers["content-type"].startswith("text/javascript")
    assert client.get("/web/main.js", headers={"If-None-Match": module.headers["etag"]}).status_code == 304
    assert client.get("/web/..%2fapp.py").json()["error"]["code"] == "not_found"


def check_openai_client(port):
    if importlib.util.find_spec("openai") is None:
        return
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["base", "bard"]
    whole = client.chat.completions.create(model="bard", messages=HELLO, max_tokens=8, temperature=0)
    stream = client.chat.completions.create(model="bard", messages=HELLO, max_tokens=8, temperature=0, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == whole.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="'base', 'bard'"):
        client.chat.completions.create(model="gpt-5", messages=HELLO)


@pytest.mark.ray
def test_a_replica_that_cannot_start_says_why(ray_session, micro_config, run_directory, micro_overlay, port):
    (run_directory / "overlay").unlink()
    (run_directory / "overlay").mkdir()
    (run_directory / "overlay" / "overlay_config.json").write_text("{")
    with pytest.raises(NexusError, match=r"did not start.*overlay"):
        run_service(micro_config(run_directory, **{"serve.port": port}), blocking=False)
    _require_free("127.0.0.1", port)


@pytest.mark.ray
def test_serve_deploy_exchanges_overlays_without_losing_a_request(
    ray_session, micro_config, run_directory, micro_overlay, port, tmp_path
):
    """What `serve deploy` sends, given to Ray Serve's controller as its dashboard does."""
    save_config(micro_config(run_directory), tmp_path / "config.yaml")
    one = {"bard": str(run_directory / "overlay")}
    try:
        deploy(tmp_path / "config.yaml", port, one)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            wait_for_models(client, ["base", "bard"])
            two = one | {"will": str(micro_overlay)}
            check_exchange(client, lambda: deploy(tmp_path / "config.yaml", port, two))
            (tmp_path / "overlay_config.json").write_text("{")
            check_refusal(client, lambda: deploy(tmp_path / "config.yaml", port, two | {"bad": str(tmp_path)}))
    finally:
        stop_service()


def deploy(config, port, overlays):
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    application = {
        "name": "nexus-ray",
        "route_prefix": "/",
        "import_path": "serve.app:build_app",
        "args": {"config": str(config)},
        "deployments": [{"name": "chat", "user_config": {"overlays": overlays}}],
    }
    http = {"host": "127.0.0.1", "port": port}
    schema = ServeDeploySchema.model_validate({"http_options": http, "applications": [application]})
    _get_global_client().deploy_apps(schema)


def wait_for_models(client, expected):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        answer = client.get("/v1/models")
        if answer.status_code == 200 and [card["id"] for card in answer.json()["data"]] == expected:
            return
        time.sleep(0.2)
    raise AssertionError(answer.text)


def generated(client):
    [line] = [line for line in client.get("/metrics").text.splitlines() if line.startswith(_GENERATED)]
    return float(line.split()[1])


def check_exchange(client, exchange):
    """The replica that runs takes the new overlay, and every request meanwhile is answered."""
    statuses, ended = [], threading.Event()

    def ask():
        while not ended.is_set():
            statuses.append(client.post("/v1/chat/completions", json=BODY).status_code)

    before = generated(client)
    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    exchange()
    wait_for_models(client, ["base", "bard", "will"])
    ended.set()
    for asker in askers:
        asker.join()
    assert len(statuses) > 3
    assert set(statuses) == {200}
    assert generated(client) > before, "the replica was replaced"


def check_refusal(client, exchange):
    """A damaged overlay does not take the service down: the old ones stay, and an operator can see why."""
    exchange()
    deadline = time.monotonic() + 60
    while "problem" not in (health := client.get("/healthz").json()):
        assert time.monotonic() < deadline, health
        time.sleep(0.2)
    assert "overlay_config.json cannot be read" in health["problem"]
    assert health["models"] == ["base", "bard", "will"]
    assert client.post("/v1/chat/completions", json=BODY).status_code == 200
