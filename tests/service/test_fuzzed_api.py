"""The interface under schemathesis: whatever is sent, no answer is a 5xx, and refusals have OpenAI's shape."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

_EXAMPLES = 60
_OPERATIONS = (
    "GET /healthz",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/perplexity",
)


@pytest.fixture(scope="module")
def schema(live_and_short):
    return schemathesis.openapi.from_url(f"{live_and_short}/openapi.json")


def operations(schema):
    return {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}


def test_every_operation_is_fuzzed(schema):
    assert set(operations(schema)) == set(_OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("label", _OPERATIONS)
def test_no_request_makes_the_server_fail(schema, label, mode):
    operation = operations(schema)[label]
    if mode == GenerationMode.NEGATIVE and label in ("GET /healthz", "GET /v1/models", "GET /v1/models/{model}"):
        pytest.skip("nothing about such a request can be invalid")
    statuses = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def fuzz(case):
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "bard"  # a random one would end every request before the engine
        response = case.call()
        statuses.add(response.status_code)
        case.validate_response(response, checks=[not_a_server_error])
        if response.status_code >= httpx.codes.BAD_REQUEST:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]

    fuzz()
    if mode == GenerationMode.POSITIVE and "{model}" not in label:
        assert 200 in statuses
    if mode == GenerationMode.NEGATIVE:
        assert statuses <= {400, 404, 405, 406, 415}
