"""Tables that users supply: what is refused, with which line; what is read as it stands."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.commands.import_features import _label_file
from stages.corpora import csv_file
from stages.corpora.layout import label_column, transcript_column
from stages.corpora.tables import read_lines, read_table
from stages.engine.errors import PipelineError
from stages.inference.clips import read_transcripts

COLUMNS = ("name", "label", "transcript")
HEADER = b"name,label,transcript\n"

REFUSED: dict[str, tuple[bytes, str]] = {
    "an unquoted comma": (HEADER + b"a,sad,hm\nb,sad,No, I will not\n", "line 3: 4 cells, expected 3"),
    "an unquoted comma in the last row": (HEADER + b"a,sad,Well,\nb,sad,hm\n", "line 2: 4 cells, expected 3"),
    "a cell below no name": (b"name,label,transcript,\na,sad,No, I will not\n",
                             "line 2: 'I will not' is in a column without a name"),
    "a row that is cut off": (HEADER + b"a,sad,hm\nb,sad\n", "line 3: 2 cells, expected 3"),
    "a line break outside quotes": (HEADER + b"a,sad,I will\nnot\n", "line 3: 1 cells, expected 3"),
    "an open quote": (HEADER + b'a,sad,"oh no\nb,sad,hm\nc,sad,hm\n', "line 2: a quote opens in this row"),
    "an open quote in the last row": (HEADER + b'a,sad,hm\nb,sad,"hm', "line 3: a quote opens in this row"),
    "two open quotes": (HEADER + b'a,sad,"oh no\nb,sad,hm\nc,sad,"well\n', "after line 1: ',' expected after '\"'"),
    "an open quote that a later one closes": (HEADER + b'a,sad,"oh no\nb,sad,hm\nc,sad,"\nd,sad,hm\n',
                                              "line 2: a cell in quotes reaches to line 4 and takes whole rows in"),
    "text after a quote": (HEADER + b'a,sad,"No" he said\n', "after line 1: ',' expected after '\"'"),
    "a column twice": (b"name,label,label\na,sad,joy\n", "line 1: column 'label' occurs twice"),
    "a column twice, one with a blank": (b"name,label, label\na,sad,joy\n", "line 1: column 'label' occurs twice"),
    "old Macs' line ends": (b"name,label,transcript\ra,sad,hm\rb,sad,hm\r", "line 1: a bare carriage return"),
    "one bare carriage return": (HEADER + b"a,sad,oh\rno\nb,sad,hm\n", "line 2: a bare carriage return"),
    "a NUL": (HEADER + b"a,sad,hm\n\0b,sad,hm\n", "line 3: a NUL byte"),
    "GBK": (HEADER + b"a,sad,hm\nb,sad,\xc4\xe3\xba\xc3\n", "line 3: not UTF-8; expected a CSV saved as UTF-8"),
    "Latin-1": ("name,label,transcript\na,sad,café\n".encode("latin-1"), "line 2: not UTF-8"),
    "UTF-16": ("name,label,transcript\na,sad,hm\n".encode("utf-16"), "line 1: not UTF-8 but UTF-16"),
    "UTF-32": ("name,label,transcript\na,sad,hm\n".encode("utf-32-be"), "line 1: a NUL byte"),
    "semicolons": (b"name;label;transcript\na;sad;hm\n", "found columns ['name;label;transcript']"),
    "tabs": (b"name\tlabel\ttranscript\na\tsad\thm\n", "its cells are separated by tabs: save it with commas"),
    "Excel's sep line": (b"sep=,\nname,label,transcript\na,sad,hm\n", "the first line must name the columns"),
    "no header": (b"a,sad,hm\nb,sad,hm\n", "found columns ['a', 'sad', 'hm'], expected ['name', 'label'"),
    "capitals in the header": (b"Name,Label,Transcript\na,sad,hm\n", "found columns ['Name', 'Label', "),
    "an empty file": (b"", "line 1: the file is empty; expected a CSV with the columns ['name', 'label'"),
    "blanks alone": (b" \n\n", "line 1: the file is empty"),
    "no name": (HEADER + b"a,sad,hm\n,sad,hm\n", "line 3: no name; expected one in every row"),
    "Excel's line of commas": (HEADER + b"a,sad,hm\n,,\n", "line 3: no name"),
    "a name twice": (HEADER + b"a,sad,hm\nb,sad,hm\n a ,joy,hm\n", "line 4: name 'a' occurs twice"),
    "a cell without an end": (HEADER + b"a,sad," + b"x" * 200_000 + b"\n", "after line 1: field larger than"),
}

READ: dict[str, tuple[bytes, dict[str, str]]] = {
    "as Excel saves it": (b"\xef\xbb\xbfname,label,transcript\r\na,sad,hm\r\n", {"a": "hm"}),
    "a quoted comma": (HEADER + b'a,sad,"No, I will not"\n', {"a": "No, I will not"}),
    "a doubled quote": (HEADER + b'a,sad,"She said ""no"", twice"\n', {"a": 'She said "no", twice'}),
    "a quote within a cell": (HEADER + b'a,sad,6" of snow\n', {"a": '6" of snow'}),
    "a quoted line break": (HEADER + b'a,sad,"Oh.\nNo, no, no."\nb,sad,hm\n', {"a": "Oh.\nNo, no, no.", "b": "hm"}),
    "an empty line": (HEADER + b"a,sad,hm\n\n  \nb,sad,hm\n", {"a": "hm", "b": "hm"}),
    "blanks around everything": (b" name , label, transcript\n a , sad, hm \n", {"a": "hm"}),
    "another order, and an index": (b",transcript,name,label\n0,hm,a,sad\n1,oh,b,sad\n", {"a": "hm", "b": "oh"}),
    "a comma at the end of every line": (b"name,label,transcript,\na,sad,hm,\n", {"a": "hm"}),
    "a comma at the end of every row": (HEADER + b"a,sad,hm,\nb,sad,hm,\n", {"a": "hm", "b": "hm"}),
    "optional cells left off": (b"name,label,transcript,group,start\na,sad,hm\nb,sad,oh,s1\n", {"a": "hm", "b": "oh"}),
    "no row": (HEADER, {}),
    "no newline at the end": (HEADER + "a,sad,我".encode(), {"a": "我"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_faulty_table_is_refused_with_its_line(tmp_path: Path, case: str) -> None:
    content, expected = REFUSED[case]
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(PipelineError) as caught:
        read_table(path, COLUMNS)
    assert str(caught.value).startswith(f"{path}: ") and expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", READ)
def test_a_sound_table_is_read_as_it_stands(tmp_path: Path, case: str) -> None:
    content, expected = READ[case]
    (tmp_path / "table.csv").write_bytes(content)
    assert {name: row["transcript"] for name, row in read_table(tmp_path / "table.csv", COLUMNS).items()} == expected


def test_rows_know_their_lines(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(HEADER + b'\na,sad,"Oh.\nNo."\n\na,joy,hm\n')
    header, rows = read_lines(tmp_path / "table.csv", COLUMNS)
    assert header == list(COLUMNS) and [(row.line, row.cells["label"]) for row in rows] == [(3, "sad"), (6, "joy")]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "link.csv").symlink_to("gone.csv")
    for name, fault in {"pipe.csv": "not a file", "folder.csv": "not a file", "link.csv": "not found"}.items():
        with pytest.raises(PipelineError, match=f"{name}: {fault}"):
            read_table(tmp_path / name, COLUMNS)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "clips.csv": ("path,split,label,transcript", lambda path: csv_file.read(path.parent, ["sad"])),
    "MER's labels": ("name,discrete,valence,arousal", lambda path: label_column(path, ["sad"])),
    "MER's transcripts": ("name,chinese,english,german", transcript_column),
    "the labels of imported features": ("name,label,split,transcript",
                                        lambda path: _label_file(path, "labelled")),
    "predict's transcripts": ("clip_id,transcript,source,model", read_transcripts),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("rows", "fault"), [("a,b,c,d, e", "line 2: 5 cells, expected 4"),
                                             ('a,b,c,"d', "line 2: a quote opens in this row"),
                                             ("a,b,c,d\re,f,g,h", "line 2: a bare carriage return")])
def test_every_table_of_a_user_is_read_strictly(tmp_path: Path, reader: str, rows: str, fault: str) -> None:
    header, read = READERS[reader]
    (tmp_path / "clips.csv").write_bytes(f"{header}\n{rows}\n".encode())
    with pytest.raises(PipelineError, match=f"clips.csv: {fault}"):
        read(tmp_path / "clips.csv")
