"""Task files of lm-eval over local data: perplexity of texts, and questions with choices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

_ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
process_results: !function {name}.count
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
_COUNT = """
import re

def count(doc, results):
    words, size = len(re.split(r"\\s+", doc["text"])), len(doc["text"].encode("utf-8"))
    amounts = {"word_perplexity": words, "byte_perplexity": size, "bits_per_byte": size}
    return {metric: (results[0], amount) for metric, amount in amounts.items()}
"""
_CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_rolling_task(directory: Path, name: str, texts: Sequence[str]) -> None:
    """A task named `name` that scores each text on its own, and counts words and bytes as wikitext does."""
    _write(directory, name, _ROLLING, [{"text": text} for text in texts])
    (directory / f"{name}.py").write_text(_COUNT)


def write_choice_task(directory: Path, name: str, questions: Sequence[tuple[str, Sequence[str], int]]) -> None:
    """A task of (question, choices, number of the right one)."""
    rows = [{"question": text, "choices": list(choices), "answer": answer} for text, choices, answer in questions]
    _write(directory, name, _CHOICES, rows)


def _write(directory: Path, name: str, template: str, rows: Sequence[dict[str, object]]) -> None:
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / f"{name}.yaml").write_text(template.format(name=name, data=data))
