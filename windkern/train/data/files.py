"""Read the rows of data files: JSON lines, JSON lists, CSV, TSV, Parquet and plain text, compressed by gzip or not.

Every row comes with its place, file and line, for messages about what is in it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from windkern.train.data.prompts import shown
from windkern.train.models import require

Rows = Iterable[tuple[str, object]]  # (place for messages, record)
_Parsed = TypeVar("_Parsed")

HUB = "hub:"
ANSWERS = ("answer", "completion", "response")  # keys of a demonstration's answer
PROMPTS = ("prompt", "messages")
_NESTED = ("messages", "responses", "rewards", "prefs")  # a cell of CSV or TSV holds these as JSON
COLUMNS = ("prompt", *_NESTED, "truncated", *ANSWERS)  # all columns that are read

_LINES = (".jsonl", ".ndjson", ".jsonlines")
_TABLES = {".csv": ",", ".tsv": "\t"}
_TEXTS = (".txt", ".md", "")
READ = ".jsonl, .ndjson, .json, .csv, .tsv or .parquet, each optionally followed by .gz"
_LONGEST_CELL = 2**31 - 1  # csv's own limit is 128 KiB
_MARKS = {  # the longer of two that begin alike comes first
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_BINARY = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
}


def decoded(data: bytes, name: str) -> str:
    """Return the text of a file in UTF-8, with or without a byte-order mark, lines ended by a line feed alone.

    Args:
        data: its bytes.
        name: name of the file, for messages.

    Raises:
        ValueError: the file is not UTF-8; the message says what it is, as far as that can be told.

    Example:
        >>> decoded(b"caf\\xe9", "menu.txt")
        Traceback (most recent call last):
        ValueError: menu.txt must be UTF-8, but byte 3 (line 1) is not; as Windows-1252 it would read 'caf\u00e9'
    """
    if kind := next((kind for mark, kind in _MARKS.items() if data.startswith(mark)), None):
        raise ValueError(f"{name} must be UTF-8, but its byte-order mark is that of {kind}; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if kind := next((kind for begin, kind in _BINARY.items() if data.startswith(begin)), None):
            raise ValueError(f"{name} must be UTF-8 text, but it starts like {kind}") from None
        line = data.count(b"\n", 0, error.start) + 1
        start = max(data.rfind(b"\n", 0, error.start) + 1, error.start - 20)
        near = data[start : error.start + 20].split(b"\n")[0].decode("cp1252", "replace")
        raise ValueError(
            f"{name} must be UTF-8, but byte {error.start} (line {line}) is not; as Windows-1252 it would read {near!r}"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{name}, line {line}: holds a NUL character; if it is UTF-16, save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json(text: str, place: str, hint: str = "") -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg}){hint}") from None
    except RecursionError:
        raise ValueError(f"{place}: nested too deeply to be read") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{place}: {error}") from None


def json_lines(text: str, name: str) -> Iterator[tuple[str, object]]:
    """Yield the rows of JSON lines; empty lines are skipped."""
    # Reason: str.splitlines would also cut at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{name}, line {number}"
            yield place, _json(line, place, '; expected {"prompt": "..."}')


def _json_list(text: str, name: str) -> Rows:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):  # JSON lines in a file named .json
            return json_lines(text, name)
        raise ValueError(f"{name}, line {error.lineno}: not JSON ({error.msg})") from None
    except (RecursionError, ValueError):
        entries = _json(text, name)  # raises with its own message
    if not isinstance(entries, list):
        raise ValueError(
            f"{name} must hold a list, one entry per prompt, got {shown(entries)}; JSON lines end in .jsonl"
        )
    return (
        (f"{name}, entry {number}", {"prompt": entry} if isinstance(entry, (str, list)) else entry)
        for number, entry in enumerate(entries, start=1)
    )


def _check_columns(names: Sequence[str], name: str, where: str) -> None:
    if twice := next((each for each in names if names.count(each) > 1), None):
        raise ValueError(f"{name}: column {twice!r} appears twice")
    if not set(names) & set(PROMPTS):
        raise ValueError(f"{name} must have a column prompt or messages{where}, but has {', '.join(names) or 'none'}")


def _table_rows(text: str, name: str, delimiter: str) -> Iterator[tuple[str, object]]:
    names: list[str] | None = None
    first, limit = 1, csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            place, first = f"{name}, line {first}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if names is None:
                names = [cell.strip() for cell in cells]
                _check_columns(names, name, " in its first line")
                continue
            if len(cells) != len(names):
                raise ValueError(f"{place}: got {len(cells)} cells, but the first line names {len(names)} columns")
            given = {key: cell if cell.strip() else None for key, cell in zip(names, cells, strict=True)}
            row: dict[str, object] = {
                key: cell if cell is None or key not in _NESTED else _json(cell, f"{place}, column {key}")
                for key, cell in given.items()
            }
            yield place, row
    except csv.Error as error:
        raise ValueError(f"{name}, line {first}: not {'CSV' if delimiter == ',' else 'TSV'} ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(data: bytes, name: str) -> Iterator[tuple[str, object]]:
    require("pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        _check_columns(names, name, "")
        number = 0
        for batch in file.iter_batches(columns=[each for each in names if each in COLUMNS]):
            for row in batch.to_pylist():
                yield f"{name}, row {number}", row
                number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: not readable Parquet ({' '.join(str(error).split())})") from None


def _unpacked(path: Path) -> tuple[bytes, str]:
    """Return the bytes of a file, and its ending without .gz, in lower case."""
    name = path.name.lower()
    data = path.read_bytes()
    packed = name.endswith(".gz")
    if packed or data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a complete gzip file: {error}") from None
    return data, Path(name.removesuffix(".gz")).suffix


def file_rows(path: Path, what: str, *, text: bool = False) -> Rows:
    """Return the rows of a file, each a JSON object with its place.

        .jsonl .ndjson .jsonlines    one object per line
        .json                        a list; a string or a list in it stands for {"prompt": ...}
        .csv .tsv                    columns named in the first line; messages, responses, rewards and prefs in JSON
        .parquet                     columns; needs pyarrow
        .txt .md, no ending          {"prompt": line}, where `text` allows it

    Capitals in an ending make no difference, and a file may be compressed by gzip.

    Args:
        path: path of the file.
        what: what the file should hold, for messages.
        text: whether plain text is accepted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the ending or encoding is unknown, or the content does not fit the ending; the message names file
            and line.
        MissingPackageError: the file is Parquet, and pyarrow is not installed.
    """
    name = str(path)
    if path.is_dir():
        raise FileNotFoundError(f"{what} file {name} is a folder; a folder of data files is written {HUB}{name}")
    if not path.is_file():
        raise FileNotFoundError(f"{what} file {name} does not exist; a data set of the hub is written {HUB}NAME")
    data, ending = _unpacked(path)
    if ending == ".parquet":
        return _parquet_rows(data, name)
    if ending not in (*_LINES, ".json", *_TABLES, *(_TEXTS if text else ())):
        plain = "; plain text, one prompt per line, ends in .txt, .md or nothing" if text else ""
        raise ValueError(f"{what} must come from {READ}, or {HUB}NAME, got {name}{plain}")
    content = decoded(data, name)
    if ending in _LINES:
        return json_lines(content, name)
    if ending == ".json":
        return _json_list(content, name)
    if ending in _TABLES:
        return _table_rows(content, name, _TABLES[ending])
    lines = enumerate(content.split("\n"), start=1)
    return ((f"{name}, line {k}", {"prompt": line.strip()}) for k, line in lines if line.strip())


def _hub_rows(source: str) -> Rows:
    parts = re.split(r":(?![^\[]*\])", source.removeprefix(HUB))  # at colons outside a slice such as train[:100]
    name, split, column = (*parts, *[""] * (3 - len(parts)))[:3]
    if not name or len(parts) > 3:
        raise ValueError(f"expected {HUB}NAME, {HUB}NAME:SPLIT or {HUB}NAME:SPLIT:COLUMN, got {source!r}")
    require("datasets")
    import datasets

    try:
        data = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{source} cannot be loaded: {error}") from error
    if not set(data.column_names) & ({column} if column else set(PROMPTS)):
        raise ValueError(
            f"{source} must have the column {column or 'prompt or messages'}, but has {', '.join(data.column_names)}; "
            f"name another one as {HUB}{name}:{split or 'train'}:COLUMN"
        )
    known = (column,) if column else COLUMNS
    return _data_set_rows(data.select_columns([each for each in data.column_names if each in known]), source, column)


def _data_set_rows(data: Any, source: str, column: str) -> Iterator[tuple[str, object]]:
    for number, row in enumerate(data):
        if column and column != "prompt":
            # Reason: a list in a column of another name, such as chosen, is a whole dialogue.
            row = {"messages" if isinstance(row[column], list) else "prompt": row[column]}
        yield f"{source}, row {number}", row


def _refuse_half_characters(record: object) -> None:
    waiting = [record]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = value[error.start].encode("unicode_escape").decode()
                raise ValueError(f"holds {half}, half of a surrogate pair, which is not a character") from None


def parsed(rows: Rows, name: str, what: str, parse: Callable[[object], _Parsed]) -> list[_Parsed]:
    """Return what `parse` makes of each row.

    Raises:
        ValueError: `parse` refuses a row (the message names its place), or there is none at all.
    """
    found = []
    for place, record in rows:
        try:
            _refuse_half_characters(record)
            found.append(parse(record))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        except RecursionError:
            raise ValueError(f"{place}: nested too deeply to be read") from None
    if not found:
        raise ValueError(f"{name} holds no {what}")
    return found


def load(source: str | Path, what: str, parse: Callable[[object], _Parsed], *, text: bool = False) -> list[_Parsed]:
    """Return what `parse` makes of each row of a file, or of a data set of the hub where `source` starts with hub:.

    Raises:
        FileNotFoundError, ValueError, MissingPackageError: as `file_rows` and `parsed`.
        OSError: the data set cannot be loaded.
    """
    name = str(source)
    rows = _hub_rows(name) if name.startswith(HUB) else file_rows(Path(source), what, text=text)
    return parsed(rows, name, what, parse)
