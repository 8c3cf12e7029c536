"""The one reader of tables that users supply: clips.csv, label files, transcripts, the CSVs of imported features.

Nothing is repaired and nothing guessed: a table that csv would read with cells lost, merged or shifted is refused with
the line and what is wrong there. Python's csv alone is too lenient: it takes a quote that is never closed as a cell
that reaches to the end of the file, and its DictReader puts surplus cells aside.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NoReturn

from stages.engine.errors import PipelineError

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Row:
    """One row of a table; every cell without the blanks around it."""

    line: int  # the first one of the row, from 1
    cells: dict[str, str]  # by column, "" where the cell is empty


def read_lines(path: Path, columns: Sequence[str], blank: bool = False) -> tuple[list[str], list[Row]]:
    """(the header's columns, the rows) of a CSV in UTF-8 with at least `columns`, every row with a cell for each of
    those and none beyond the header's; cells that a row lacks at its end are empty. The first of `columns` is filled in
    every row, unless `blank`.

    Raises PipelineError naming the file, the line and the fault.
    """
    text = _decoded(path, columns)
    rows = _cells(path, text)
    header = [column.strip() for column in next(rows, (1, [""]))[1]]
    for column in header:
        if column and header.count(column) > 1:
            _refuse(path, 1, f"column {column!r} occurs twice; remove or rename one of them")
    if not set(columns) <= set(header):
        other = next((name for mark, name in SEPARATORS.items() if len(header) == 1 and mark in header[0]), None)
        hint = f"; its cells are separated by {other}: save it with commas" if other else ""
        hint = hint or ("; the first line must name the columns" if header[0].startswith("sep=") else "")
        raise PipelineError(f"{path}: found columns {header}, expected {list(columns)} in line 1{hint}")
    found = list(rows)
    widths = {len(cells) for _, cells in found}
    surplus = len(widths) == 1 and all(not any(cells[len(header):]) for _, cells in found)  # each line ends in a comma
    return header, [_row(path, line, cells, header, columns, surplus, blank) for line, cells in found]


def read_table(path: Path, columns: Sequence[str], key: str = "name") -> dict[str, dict[str, str]]:
    """Rows of a CSV by their `key`, as read_lines. Raises PipelineError also for a key that occurs twice."""
    table: dict[str, dict[str, str]] = {}
    for row in read_lines(path, [key, *(column for column in columns if column != key)])[1]:
        name = row.cells[key]
        if name in table:
            _refuse(path, row.line, f"{key} {name!r} occurs twice; expected one row a clip")
        table[name] = row.cells
    return table


def _decoded(path: Path, columns: Sequence[str]) -> str:
    """The file's text, each line ended by a plain newline."""
    expected = f"expected a CSV with the columns {list(columns)}" if columns else "expected a CSV"
    if not path.exists():
        raise PipelineError(f"{path}: not found; {expected}")
    if not path.is_file():  # a pipe would be waited for without an end
        raise PipelineError(f"{path}: not a file; {expected}")
    content = path.read_bytes()
    if not content.strip():
        _refuse(path, 1, f"the file is empty; {expected}")
    if content.startswith(UTF16):
        _refuse(path, 1, "not UTF-8 but UTF-16; expected a CSV saved as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(path, content.count(b"\n", 0, error.start) + 1, "not UTF-8; expected a CSV saved as UTF-8")
    for mark, fault in (("\0", "a NUL byte"), ("\r(?!\n)", "a bare carriage return")):
        if found := re.search(mark, text):
            _refuse(path, text.count("\n", 0, found.start()) + 1,
                    f"{fault}; expected plain text whose lines end in \\n or \\r\\n")
    return text.replace("\r\n", "\n")


def _cells(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of every row that is not an empty line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines = text.split("\n")
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                _refuse(path, line, "a quote opens in this row and is never closed; close it, or double it")
            raise PipelineError(f"{path}: after line {line - 1}: {error}; expected a CSV") from None
        if cells is None:
            return
        if any("\n" in cell and _swallows_rows(cell, len(cells)) for cell in cells):
            _refuse(path, line, f"a cell in quotes reaches to line {reader.line_num} and takes whole rows in "
                                f"({lines[line]!r}); close its quote, or double it")
        if len(cells) > 1 or (cells and cells[0].strip()):
            yield line, cells


def _swallows_rows(cell: str, width: int) -> bool:
    """Whether a line within a cell looks like a row: as many commas, and without the blanks that prose has there."""
    return width > 1 and any(line.count(",") >= width - 1 and ", " not in line for line in cell.split("\n")[1:])


def _row(path: Path, line: int, cells: list[str], header: list[str], columns: Sequence[str], surplus: bool,
         blank: bool) -> Row:
    found = {column: cell.strip() for column, cell in zip_longest(header, cells[: len(header)], fillvalue="") if column}
    if columns and not blank and not found.get(columns[0]):
        _refuse(path, line, f"no {columns[0]}; expected one in every row")
    for column, cell in zip(header[1:], cells[1:], strict=False):  # the first may be pandas' index, which has no name
        if cell.strip() and not column:
            _refuse(path, line, f"{cell.strip()!r} is in a column without a name; name it in line 1, or put a cell "
                                f"that holds a comma in double quotes")
    least = max((header.index(column) + 1 for column in columns), default=0)
    if len(cells) < least or (len(cells) > len(header) and not surplus):
        _refuse(path, line, f"{len(cells)} cells, expected {len(header)} as the header has; put a cell that holds a "
                            f"comma in double quotes")
    return Row(line, found)


def _refuse(path: Path, line: int, fault: str) -> NoReturn:
    raise PipelineError(f"{path}: line {line}: {fault}")
