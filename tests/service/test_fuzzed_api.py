"""The interface under schemathesis: whatever is sent, no answer is a 5xx, and refusals have OpenAI's shape."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
_ORDINARY = {
    "POST /v1/chat/completions": {"model": "bard", "messages": [{"role": "user", "content": "Who is there?"}]},
    "POST /v1/completions": {"model": "bard", "prompt": "Who is there?"},
    "POST /v1/perplexity": {"model": "bard", "text": "Who is there?"},
}


def within_the_rules(body):
    """The generated body, held to the rules that no JSON schema states, so that most of it reaches the engine."""
    for place, message in enumerate(body.get("messages", ())):
        message["content"] = message.get("content") or "Who is there?"
        if message["role"] == "tool" or (place and message["role"] in ("system", "developer")):
            message["role"] = "user"
        message.pop("tool_calls", None)
    if body.get("models"):
        del body["model"]
        body["models"] = ["base", "bard"]
    if body.get("texts"):
        body.pop("text", None)
    elif "prompt" not in body and "messages" not in body:
        body["text"] = body.get("text") or "Who is there?"
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    for field in ("sequence_length", "stride", "max_tokens", "max_completion_tokens", "best_of"):
        body.pop(field, None)
    return body


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

    @given(case=operation.as_strategy(generation_mode=mode), mend=st.booleans())
    @settings(max_examples=_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def fuzz(case, mend):
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = "bard"  # a random one would end every request before the engine
            case.body = within_the_rules(case.body) if mend else case.body
        response = case.call()
        statuses.add(response.status_code)
        case.validate_response(response, checks=[not_a_server_error])
        if response.status_code >= httpx.codes.BAD_REQUEST:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]

    fuzz()
    if label in _ORDINARY:
        assert operation.Case(body=_ORDINARY[label], media_type="application/json").call().status_code == httpx.codes.OK
    if mode == GenerationMode.NEGATIVE:
        assert statuses <= {400, 404, 405, 406, 415}
