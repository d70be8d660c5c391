"""One reader for prompts, demonstrations and records: the same rows from any format, and errors with a location."""

from __future__ import annotations

import csv
import doctest
import gzip
import io
import json

import pytest

pytest.importorskip("transformers")

from windkern import _files
from windkern._files import to_json
from windkern.train.data import files
from windkern.train.data.loading import load_demonstrations, load_prompts
from windkern.train.data.records import Recorded, load_records, save_records

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Why, and\n"how"?'}]
ROWS = [{"prompt": 'Why, and\n"how"?', "messages": None}, {"prompt": None, "messages": TALK}]
WANTED = ['Why, and\n"how"?', 'system: Be brief.\n\nuser: Why, and\n"how"?']
RECORDS = [
    Recorded("rain, and", ("a b", "c\n"), rewards=(1.0, -0.5)),
    Recorded("day", ("x", "y"), rewards=(0.0, 2.0)),
]


@pytest.mark.parametrize("module", [files, _files], ids=lambda module: module.__name__)
def test_docstring_examples_run(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def as_table(rows, delimiter: str) -> bytes:
    text, names = io.StringIO(), list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {name: json.dumps(value) if isinstance(value, (list, tuple)) else value for name, value in row.items()}
        )
    return text.getvalue().encode()


def as_bytes(rows, ending: str) -> bytes:
    if ending == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        held = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), held)
        return held.getvalue()
    if ending in (".csv", ".tsv"):
        return as_table(rows, {".csv": ",", ".tsv": "\t"}[ending])
    if ending == ".json":
        return json.dumps(rows, indent=1).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".jsonlines", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_holds_the_same(tmp_path, ending, packed):
    for name, rows in (("prompts", ROWS), ("records", [vars(record) for record in RECORDS])):
        data = as_bytes(rows, ending)
        path = tmp_path / (name + ending.upper() + (".Gz" if packed else ""))
        path.write_bytes(gzip.compress(data) if packed else data)
        if name == "prompts":
            assert load_prompts(path) == WANTED
        else:
            assert load_records(path) == RECORDS  # the space around texts included


def test_demonstrations_come_from_tables_too(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("\ufeffid,prompt,answer\r\n\r\n7,rain,good day\r\n", encoding="utf-8", newline="")
    assert load_demonstrations(path) == [("rain", "good day")]


def test_a_cell_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "p.csv").write_text("prompt\n" + "rain " * 100_000 + "\n")
    assert len(load_prompts(tmp_path / "p.csv")[0]) == 500_000 and csv.field_size_limit() == limit


def test_plain_text_has_its_endings(tmp_path):
    for name in ("p.txt", "p.MD", "p", "p.txt.gz"):
        data = b"rain\r\n\r\nday\rbus"
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        assert load_prompts(tmp_path / name) == ["rain", "day", "bus"]


def test_json_lines_may_be_called_json(tmp_path):
    (tmp_path / "p.json").write_text('{"prompt": "rain"}\n\n{"prompt": "day"}\n')
    assert load_prompts(tmp_path / "p.json") == ["rain", "day"]


PLACES = [
    ("p.csv", b"Why?\nHow?\n", r"p\.csv must have a column prompt or messages in its first line, but has Why\?"),
    ("p.csv", b"prompt;answer\na;b\n", "but has prompt;answer"),
    ("p.csv", b"prompt\n", "p.csv holds no prompts"),
    ("p.csv", b"", "p.csv holds no prompts"),
    ("p.csv", b'prompt,id\n"a\nb",1\nc,d,2\n', "p.csv, line 4: got 3 cells, but the first line names 2 columns"),
    ("p.csv", b'prompt\n"a\nb', "p.csv, line 2: not CSV"),
    ("p.tsv", b'prompt\tid\na\t"b"c\n', "p.tsv, line 2: not TSV"),
    ("p.csv", b"prompt,prompt\na,b\n", "column 'prompt' appears twice"),
    ("p.csv", b"messages\nrain\n", "p.csv, line 2, column messages: not JSON"),
    ("p.csv", b"prompt,id\n ,1\n", "p.csv, line 2: expected an object with a non-empty string"),
    (
        "p.yaml",
        b"- rain\n",
        r"prompts must come from \.jsonl, .* or hub:NAME, got .*p\.yaml; plain text.* ends in \.txt",
    ),
    ("p.jsonl.bz2", b"BZh91AY&SY", r"prompts must come from .*p\.jsonl\.bz2"),
    ("p.parquet", b"PAR1\x15\x04\xff", "p.parquet: not readable Parquet"),
    ("p.jsonl.gz", b"\x1f\x8b\x08\x08\xff", "p.jsonl.gz is not a complete gzip file"),
    ("p.jsonl.gz", gzip.compress(b'{"prompt": "rain"}', mtime=0)[:-6], "p.jsonl.gz is not a complete gzip file"),
    ("p.jsonl.gz", b'{"prompt": "rain"}', "p.jsonl.gz is not a complete gzip file"),
    ("p.csv", b"PK\x03\x04\x14\xff", "p.csv must be UTF-8 text, but it starts like a zip archive or a spreadsheet"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}', r"p\.jsonl must be UTF-8, .*line 2.*Windows-1252.*café"),
    ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), "p.jsonl must be UTF-8, but its byte-order mark is that of UTF-16"),
    ("p.txt", "rain".encode("utf-32"), "byte-order mark is that of UTF-32"),
    ("p.txt", "a\nrain".encode("utf-16-le"), "p.txt, line 1: holds a NUL character; if it is UTF-16"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "a\\ud800b"}', r"p\.jsonl, line 2: holds \\ud800, half of a surrogate"),
    ("p.json", b'["a", "\\udc01"]', r"p\.json, entry 2: holds \\udc01, half of"),
    ("p.csv", b'prompt,messages\n,"[{""role"": ""user"", ""content"": ""\\ud800""}]"', r"line 2: holds \\ud800"),
    ("p.jsonl", b'{"prompt": "a"}\n' + b"[" * 100_000, "p.jsonl, line 2: nested too deeply"),
    ("p.json", b"[" * 100_000, "p.json: nested too deeply"),
    ("p.jsonl", b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "p.jsonl, line 1: Exceeds the limit"),
    ("p.json", b"[" + b"9" * 5000 + b"]", "p.json: Exceeds the limit"),
]


@pytest.mark.parametrize(("name", "data", "message"), PLACES)
def test_what_is_wrong_has_its_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name)


def test_records_have_their_places_too(tmp_path):
    path = tmp_path / "r.tsv"
    path.write_text('prompt\tresponses\trewards\nrain\t"[""a""]"\t[1]\nday\t"[""b""]"\t[1, 2]\n')
    with pytest.raises(ValueError, match=r'r\.tsv, line 3: "rewards" must be a list of 1 finite numbers'):
        load_records(path)
    (tmp_path / "r.txt").write_text("rain")
    with pytest.raises(ValueError, match=r"recorded responses must come from .*r\.txt$"):
        load_records(tmp_path / "r.txt")
    with pytest.raises(FileNotFoundError, match="is a folder; a folder of data files is written hub:"):
        load_records(tmp_path)


def strict(text: str) -> object:
    def refuse(word):
        raise ValueError(word)

    text.encode()
    return json.loads(text, parse_constant=refuse)


def test_what_is_written_is_valid_json(tmp_path):
    odd = {"a": [float("nan"), -float("inf"), 1.5], "b\ud800": ("x\udc00", "\ud83d\ude00", "é"), "c": None}
    assert strict(to_json(odd)) == {"a": [None, None, 1.5], "b\ufffd": ["x\ufffd", "\U0001f600", "é"], "c": None}
    save_records(tmp_path / "r.jsonl", [Recorded("p\ud800", ("a\udc00",))])
    assert load_records(tmp_path / "r.jsonl") == [Recorded("p\ufffd", ("a\ufffd",))]
