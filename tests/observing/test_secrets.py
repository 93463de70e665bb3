"""What is told to everybody holds no keys and no passwords, and still says what happened."""

from __future__ import annotations

import pytest

from nexus_ray.observing.secrets import hiding

ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "HF_TOKEN": "hf_abcdefghij",
    "AZURE_STORAGE_ACCOUNT_KEY": "YWNjb3VudCBrZXk=",
    "PGPASSWORD": "correcthorse",
    "TOKENIZERS_PARALLELISM": "false_or_true",
}


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("MLflow gets no more: http://bob:hunter2@tracker:5000/api", "hunter2"),
        ("train.trackers.mlflow.tracking_uri=http://tracker/team", "tracker/team"),
        ("GET https://s3/x?X-Amz-Signature=f00ba5&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE/eu", "f00ba5"),
        ("key AKIAIOSFODNN7EXAMPLE is not allowed", "AKIAIOSFODNN7EXAMPLE"),
        ("Authorization: Bearer eyJhbGciOi", "eyJhbGciOi"),
        ("storage said wJalrXUtnFEMI/K7MDENG is wrong", "wJalrXUtnFEMI"),
        ("login with hf_abcdefghij failed", "hf_abcdefghij"),
        ('{"password": "hunter2"}', "hunter2"),
        ("api_key=abc123", "abc123"),
        ('{"token": "t0p-5ecret"}', "t0p-5ecret"),
        ("AccountName=me;AccountKey=YWJjZGVm;EndpointSuffix=core", "YWJjZGVm"),
        ("GET https://me.blob.core/x?sv=2024&sig=f00ba5%3D", "f00ba5"),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ("storage said YWNjb3VudCBrZXk= is wrong", "YWNjb3VudCBrZXk"),
        ("login with correcthorse failed", "correcthorse"),
        ("http://tracker.internal/run is down", "tracker.internal"),
    ],
)
def test_secrets_are_taken_out_wherever_they_stand(text: str, gone: str):
    hide = hiding(["http://tracker.internal/run"], ENVIRONMENT)
    told = hide({"argv": ["nexus-ray", text], "message": text})
    assert gone not in str(told)
    assert "***" in told["message"]


@pytest.mark.parametrize(
    "text",
    [
        "perplexity per token: 5.3, 81 tokens/s",
        "train.optimiser.learning_rate=3e-4",
        "s3://bucket/run: no such token in the vocabulary",
        "https://host/path?page=2",
        "basic statistics of the design=2",
        "TOKENIZERS_PARALLELISM was false_or_true",
        "data.sources.a.train=a.jsonl",
    ],
)
def test_what_is_no_secret_stays_as_it_is(text: str):
    assert hiding((), ENVIRONMENT)(text) == text


def test_numbers_and_none_pass_through():
    assert hiding((), {})({"a": 1, "b": None, "c": [1.5, True]}) == {"a": 1, "b": None, "c": [1.5, True]}
