"""`nexus-ray targets inspect`: sizes add up, the example says what the teacher said, damage is exit code 1."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from handmade_sets import OUTPUTS, ROUTERS, Part, Row, make_header, random_parts, save_manifest, write_set
from safetensors.torch import load_file
from transformers import AutoTokenizer

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.cli.main import run_command
from nexus_ray.data.vocabulary import tokenizer_digest
from nexus_ray.errors import ConfigError
from nexus_ray.targets.encoding.encodings import HiddenEncoding, SampledEncoding
from nexus_ray.targets.encoding.routers import RouterEncoding
from nexus_ray.targets.encoding.top_k import TopKEncoding
from nexus_ray.targets.format import Header
from nexus_ray.targets.inspection.example import choose_sequence, decode_example
from nexus_ray.targets.inspection.inspect import PARQUET, by_column, by_source, facts
from nexus_ray.targets.inspection.inspect_text import example_lines, inspect
from nexus_ray.targets.reading.reader import TargetSet

TEXT = "Now is the winter of our discontent made glorious summer by this sun of York"
EXPERTS, LAYERS = 8, (0, 3)


@pytest.fixture(scope="module")
def tiny(tokenizer_directory: Path) -> tuple[Path, str, list[int]]:
    """Directory, digest and tokens of the text."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    return tokenizer_directory, tokenizer_digest(tokenizer), tokenizer.encode(TEXT)


def one_sequence(directory: Path, tiny: tuple[Path, str, list[int]], output, router=None, **changes) -> TargetSet:
    """A set of one sequence of the text; the teacher's logits are `[position, token] = -|token - 10 * position|`."""
    place, digest, ids = tiny
    positions = len(ids) - 1
    values = make_header("none", "none", tokenizer_sha256=digest, vocabulary=4117, sequence_length=len(ids))
    header = Header(**(values.model_dump() | {"output": output, "router": router} | changes))
    row = Row(ids, [False] + [True] * positions)
    logits = -(torch.arange(4117.0) - 10 * torch.arange(float(positions))[:, None]).abs()
    if isinstance(output, TopKEncoding):
        row.output = output.encode(logits)
    elif isinstance(output, SampledEncoding):
        row.output = output.encode(logits, torch.full((positions,), 0.5, dtype=torch.float64))
    elif output is not None:
        states = torch.randn(positions, output.hidden_size, generator=torch.Generator().manual_seed(0))
        row.output = output.encode(states)
    if router is not None:
        stored = torch.arange(0, len(ids), router.every)
        chosen = torch.nn.functional.one_hot(stored % EXPERTS, EXPERTS) * 9.0
        row.router = router.encode(chosen[:, None].expand(-1, len(router.layers), -1).clone())
    write_set(directory, header, [Part("play", [row], output is not None, router is not None)], str(place))
    return TargetSet.open(directory)


class TestDescription:
    def test_sources_add_up_to_the_manifest(self, tmp_path):
        parts = random_parts(make_header())
        manifest = write_set(tmp_path, make_header(), parts)
        totals = by_source(manifest)
        assert [row.source for row in totals] == ["play", "prose", "text"]
        assert [row.shards for row in totals] == [2, 1, 1]
        assert [row.sequences for row in totals] == [8, 4, 2]
        play = [sequence for part in parts if part.source == "play" for sequence in part.sequences]
        assert totals[0].tokens == sum(len(sequence.input_ids) for sequence in play)
        assert totals[0].targets == sum(sequence.num_targets for sequence in play)
        assert sum(row.bytes for row in totals) == sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))
        assert [(row.output, row.router) for row in totals] == [(True, True), (True, False), (False, False)]

    def test_columns_add_up_to_the_files(self, tmp_path):
        parts = random_parts(make_header())
        write_set(tmp_path, make_header(), parts)
        sizes = {size.name: size for size in by_column(TargetSet.open(tmp_path))}
        assert sum(size.bytes for size in sizes.values()) == sum(p.stat().st_size for p in tmp_path.glob("*.parquet"))
        assert list(sizes)[-1] == PARQUET
        routed = [sequence for part in parts if part.router for sequence in part.sequences]
        scales = sum(sequence.router["router_scale"].numel() for sequence in routed)
        assert scales < sizes["router_scale"].bytes < scales + 1000
        assert sizes["router_scale"].tokens == sum(len(sequence.input_ids) for sequence in routed)
        assert sizes["input_ids"].tokens == sum(len(s.input_ids) for p in parts for s in p.sequences)

    @pytest.mark.parametrize("router", ROUTERS)
    @pytest.mark.parametrize("output", OUTPUTS)
    def test_every_kind_of_set_is_described_and_decoded(self, tmp_path, output, router):
        header = make_header(output, router)
        write_set(tmp_path, header, random_parts(header, masked=True))
        lines = [part for part in inspect(str(tmp_path)) if isinstance(part, str)]
        assert f"  output targets  {header.output.mode if header.output else 'none'}" in "\n".join(lines)
        assert any(line.endswith("every checksum fits") for line in lines)
        assert any(line.startswith("sequence 0 of play") for line in lines)

    @pytest.mark.parametrize(
        ("output", "router", "words"),
        [
            ("topk", "none", "the 5 most likely tokens and the mass of the rest"),
            ("sampled", "none", "7 draws, temperature 1"),
            ("float8", "none", "24 numbers in float8"),
            ("none", "logits", "all 8 experts; layers 0-2; every position"),
            (
                "none",
                "selected",
                "the 2 selected of 8 experts and the mass of the rest, temperature 1; layers 0, 2",
            ),
        ],
    )
    def test_encodings_are_told_in_words(self, tmp_path, output, router, words):
        header = make_header(output, router)
        assert words in " ".join(facts(write_set(tmp_path, header, random_parts(header))).values())

    def test_rows_that_could_not_be_read_are_named(self, tmp_path):
        manifest = write_set(tmp_path, make_header(), random_parts(make_header()))
        first = manifest.files[0].model_copy(update={"unreadable": 3, "unreadable_example": "play.jsonl:7: no text"})
        save_manifest(tmp_path, manifest.model_copy(update={"files": (first, *manifest.files[1:])}))
        assert "play: 3 rows could not be read, first play.jsonl:7: no text" in list(inspect(str(tmp_path)))

    def test_an_empty_set_is_described_too(self, tmp_path):
        write_set(tmp_path, make_header(), [])
        assert "0 shards, 0 bytes: every checksum fits" in list(inspect(str(tmp_path)))


class TestExample:
    def test_top_k_shows_the_likely_tokens_the_rest_and_the_next_token(self, tmp_path, tiny):
        ids = tiny[2]
        targets = one_sequence(tmp_path, tiny, TopKEncoding(k=64, vocabulary=4117, value_bits=8))
        example = decode_example(targets, 0)
        decode = AutoTokenizer.from_pretrained(tiny[0]).decode
        assert (example.tokens, example.targets, example.notes) == (len(ids), len(ids) - 1, ())
        assert TEXT in example.beginning.replace('"', "'")
        for place in example.places:
            centre = 10 * (place.position - 1)
            exact = (-(torch.arange(4117.0) - centre).abs()).softmax(0)
            assert place.token == repr(decode([ids[place.position]]))
            assert place.before.strip("'\"").endswith(decode(ids[: place.position])[-10:])
            assert place.likely[0].name == repr(decode([centre])) or "�" in decode([centre])
            assert [o.probability for o in place.likely] == pytest.approx(exact.topk(5).values.tolist(), rel=0.05)
            assert place.rest == pytest.approx(1 - float(exact.topk(5).values.sum()), abs=0.02)
            kept = abs(ids[place.position] - centre) < 32
            assert (place.chance is not None) == kept

    def test_draws_are_shown_with_their_counts(self, tmp_path, tiny):
        example = decode_example(one_sequence(tmp_path, tiny, SampledEncoding(draws=12, vocabulary=4117)), 0)
        for place in example.places:
            counts = [outcome.draws for outcome in place.likely]
            assert sum(counts) == 12
            assert counts == sorted(counts, reverse=True)
            exact = (-(torch.arange(4117.0) - 10 * (place.position - 1)).abs()).softmax(0)
            assert place.entropy == pytest.approx(float(torch.special.entr(exact).sum()), rel=1e-3)
        line = next(line for line in example_lines(example) if "teacher" in line)
        assert " x " in line
        assert "nats" in line

    def test_hidden_states_become_probabilities_with_the_models_own_head(self, tmp_path, tiny):
        head = load_file(tiny[0] / "model.safetensors")["lm_head.weight"]
        encoding = HiddenEncoding(hidden_size=head.shape[1])
        targets = one_sequence(tmp_path, tiny, encoding, base_fingerprint=fingerprint(tiny[0]))
        example = decode_example(targets, 0)
        states = targets.read(np.array([0])).output.hidden
        for place in example.places:
            exact = (states[place.position - 1].double() @ head.double().T).softmax(0)
            assert [o.probability for o in place.likely] == pytest.approx(exact.topk(5).values.tolist(), rel=0.05)
            assert place.chance == pytest.approx(float(exact[tiny[2][place.position]]), rel=0.05)

    @pytest.mark.parametrize(
        ("directory", "reason"), [("tiny", "is another one"), ("missing", "there is no model at missing")]
    )
    def test_hidden_states_without_their_model_say_so(self, tmp_path, tiny, directory, reason):
        targets = one_sequence(tmp_path, tiny, HiddenEncoding(hidden_size=8))
        example = decode_example(targets, 0, tiny[0] if directory == "tiny" else Path(directory))
        assert all(place.likely == () for place in example.places)
        assert any("need the LM head" in note and reason in note for note in example.notes)

    @pytest.mark.parametrize("every", [1, 3])
    @pytest.mark.parametrize("mode", ["logits", "selected"])
    def test_routers_show_the_experts_at_the_last_stored_position(self, tmp_path, tiny, mode, every):
        router = RouterEncoding(
            mode=mode, layers=LAYERS, every=every, experts=EXPERTS, experts_per_token=2, temperature=1.0
        )
        example = decode_example(one_sequence(tmp_path, tiny, None, router), 0)
        for place in example.places:
            assert [routing.layer for routing in place.routing] == list(LAYERS)
            for routing in place.routing:
                assert routing.position == (place.position - 1) // every * every
                assert routing.experts[0].name == str(routing.position % EXPERTS)
                assert routing.experts[0].probability > 0.99

    @pytest.mark.parametrize(
        ("place", "reason"), [("missing", "there is no tokenizer at missing"), ("other", "is not the one the set was")]
    )
    def test_without_its_tokenizer_ids_are_shown_and_why(self, tmp_path, tiny, place, reason):
        header = make_header("topk", "none")
        write_set(tmp_path, header, random_parts(header))
        example = decode_example(TargetSet.open(tmp_path), 0, tiny[0] if place == "other" else Path(place))
        assert any(reason in note for note in example.notes)
        assert example.beginning.replace(" ", "").isdigit()

    def test_the_first_sequence_with_targets_is_shown_by_default(self, tmp_path):
        parts = random_parts(make_header())
        write_set(tmp_path, make_header(), [parts[3], parts[0]])
        assert choose_sequence(TargetSet.open(tmp_path)) == 2

    @pytest.mark.parametrize("number", [-1, 14])
    def test_there_is_no_sequence_beyond_the_last(self, tmp_path, number):
        write_set(tmp_path, make_header(), random_parts(make_header()))
        with pytest.raises(ConfigError, match=f"has no sequence {number}; the last is 13"):
            decode_example(TargetSet.open(tmp_path), number)


class TestCommand:
    def test_it_prints_tables_checksums_and_an_example(self, tmp_path, tiny, capsys):
        one_sequence(tmp_path, tiny, TopKEncoding(k=16, vocabulary=4117))
        size = (tmp_path / "a.parquet").stat().st_size
        assert run_command(["targets", "inspect", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert f"1 shards, {size:,} bytes: every checksum fits" in shown
        assert all(word in shown for word in ("play", "input_ids", "top_ids", "teacher: ", "the 16 most likely"))

    def test_a_flipped_byte_is_1_with_the_file_and_the_bytes(self, tmp_path, capsys):
        write_set(tmp_path, make_header(), random_parts(make_header()))
        path = tmp_path / "b.parquet"
        content = bytearray(path.read_bytes())
        content[200] ^= 4
        path.write_bytes(content)
        assert run_command(["targets", "inspect", str(tmp_path)]) == 1
        assert f"b.parquet is damaged: bytes 0 to {len(content):,}" in capsys.readouterr().err.replace("\n", " ")

    def test_checksums_can_be_left_out(self, tmp_path, capsys):
        write_set(tmp_path, make_header(), random_parts(make_header()))
        assert run_command(["targets", "inspect", str(tmp_path), "--no-verify", "--sequence", "13"]) == 0
        shown = capsys.readouterr().out
        assert "checksums were not compared" in shown
        assert "sequence 13 of text" in shown

    def test_a_uri_is_a_place(self, tmp_path, capsys):
        write_set(tmp_path, make_header(), random_parts(make_header()))
        memory = fsspec.filesystem("memory")
        memory.put(f"{tmp_path}/", "/inspected/set", recursive=True)
        assert run_command(["targets", "inspect", "memory://inspected/set"]) == 0
        assert "memory://inspected/set" in capsys.readouterr().out
        memory.rm("/inspected", recursive=True)

    def test_a_sequence_that_is_not_there_is_2(self, tmp_path, capsys):
        write_set(tmp_path, make_header(), random_parts(make_header()))
        assert run_command(["targets", "inspect", str(tmp_path), "--sequence", "99"]) == 2
        assert "has no sequence 99" in capsys.readouterr().err
