"""Labels as people write them: what is one class, what is none, and what is said about it."""

from pathlib import Path

import pytest

from stages.corpora import csv_file
from stages.corpora.labels import known_label, read_labels
from stages.engine.errors import PipelineError

LABELS = ["neutral", "anger", "happiness", "sadness", "worry", "surprise"]


def read(values: list[str], labels: list[str] | None = None) -> list[str]:
    return list(read_labels(Path("l.csv"), {f"l.csv: c{i}": value for i, value in enumerate(values)}, labels).values())


# the values, the classes they become without and with corpus.labels (None: refused), what is said
MERGED: dict[str, tuple[list[str], list[str], list[str] | None, str]] = {
    "case": (["happy", "Happy", "happy", "sad"], ["happy", "happy", "happy", "sad"],
             ["happiness", "happiness", "happiness", "sadness"], "'Happy' (1), 'happy' (2)"),
    "capitals are more": (["SAD", "SAD", "sad", "Joy", "Joy"], ["SAD", "SAD", "SAD", "Joy", "Joy"], None,
                          "merged as 'SAD': 'SAD' (2), 'sad' (1)"),
    "blanks": (["so  sad", "so sad", "ok", "ok"], ["so sad", "so sad", "ok", "ok"], None, "merged as 'so sad'"),
    "full width": (["ＳＡＤ", "sad", "sad", "anger", "anger"], ["sad", "sad", "sad", "anger", "anger"],
                   ["sadness", "sadness", "sadness", "anger", "anger"], "'sad' (2), 'ＳＡＤ' (1)"),
    "two spellings": (["angry", "anger", "anger", "sad", "sad"], ["anger", "anger", "anger", "sad", "sad"],
                      ["anger", "anger", "anger", "sadness", "sadness"], "merged as 'anger': 'anger' (2), 'angry' (1)"),
    "sharp s": (["groß", "GROSS", "GROSS", "na ja", "na ja"], ["GROSS", "GROSS", "GROSS", "na ja", "na ja"], None,
                "'groß' (1)"),
    "numbers with gaps": (["1.0", "1", "0", "0.0"], ["1", "1", "0", "0"], None, "merged as '1'"),
}
DOUBTFUL: dict[str, tuple[list[str], str]] = {
    "IEMOCAP's xxx": (["ang", "sad", "xxx", "xxx", "ang", "sad"], "looks like no class: 'xxx' (2)"),
    "oth": (["ang", "ang", "oth", "oth"], "looks like no class: 'oth' (2)"),
    "None of Python": (["a", "a", "None", "None"], "looks like no class: 'None' (2)"),
    "a question mark": (["a", "a", "?", "?"], "looks like no class: '?' (2)"),
    "a slip of the pen": (["happy", "happy", "sad", "sad", "hapy"], "looks like no class: 'hapy' (1)"),
    "unknown": (["a", "a", "Unknown", "Unknown"], "looks like no class: 'Unknown' (2)"),
    "numbers": (["0", "1", "1", "0"], "the classes are numbers (0, 1)"),
}
SCALES: dict[str, list[str]] = {
    "MOSEI": ["-1.0", "0.3333333", "2.6666667", "0", "1.0"],
    "valence": ["3.5", "2", "4", "1"],
    "tenths": [f"{i / 10}" for i in range(24)],
    "an index": [str(i) for i in range(24)],
    "signed": ["-0.5", "+0.5"],
    "infinite": ["inf", "1", "2"],
    "exponents": ["1e-3", "2e-3", "1e-3"],
}


@pytest.mark.parametrize("case", MERGED)
def test_spellings_of_one_class_are_merged_and_listed(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    values, inferred, known, said = MERGED[case]
    assert read(values) == inferred
    warning = capsys.readouterr().err
    assert warning.startswith("warning: l.csv: merged as") and said in warning and warning.count("\n") == 1
    if known is None:
        with pytest.raises(PipelineError, match="expected one of corpus.labels"):
            read(values, LABELS)
    else:
        assert read(values, LABELS) == known
        assert "merged as" in capsys.readouterr().err


@pytest.mark.parametrize("case", DOUBTFUL)
def test_what_looks_like_no_class_is_said(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    values, said = DOUBTFUL[case]
    assert read(values) == values
    assert said in capsys.readouterr().err
    with pytest.raises(PipelineError, match=r"l\.csv: c\d+: found label .*, expected one of corpus\.labels"):
        read(values, LABELS)


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("case", SCALES)
def test_a_scale_is_refused_in_a_sentence(case: str, labels: list[str] | None) -> None:
    with pytest.raises(PipelineError, match=r"l\.csv: the labels are numbers on a scale .* does no regression; make"):
        read(SCALES[case], labels)


@pytest.mark.parametrize("nothing", ["nan", "NaN", "NULL", "<NA>", "N/A", "#N/A", "NaT"])
def test_no_label_is_no_class(nothing: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert read(["sad", nothing, "joy", "sad", "joy"]) == ["sad", "", "joy", "sad", "joy"]
    assert capsys.readouterr().err == f"warning: l.csv: taken as no label: {nothing!r} (1)\n"
    assert read(["sad", nothing, "", "sad"], LABELS) == ["sadness", "", "", "sadness"]
    assert read([nothing, "x"], [nothing.lower(), "x"]) == [nothing.lower(), "x"]  # declared is declared


def test_sound_labels_are_read_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert read(["happy", "", "worried", "happy", "worried"], LABELS) == [
        "happiness", "", "worry", "happiness", "worry"]
    assert read(["happy", "", "neutral", "neutral", "happy"]) == ["happy", "", "neutral", "neutral", "happy"]
    assert read(["2", "1"], ["1", "2", "3"]) == ["2", "1"]
    assert read([]) == []
    assert capsys.readouterr().err == ""


def test_either_spelling_may_be_the_declared_one() -> None:
    assert known_label("anger", ["angry", "sad"], "x") == "angry"
    assert known_label("Happy", ["happy", "happiness"], "x") == "happy"
    assert known_label("1.0", ["0", "1"], "x") == "1"


def test_a_corpus_is_read_by_the_same_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.wav").touch()
    table = tmp_path / "clips.csv"
    table.write_text("path,split,label\na.wav,labelled,Joy\nb.wav,labelled,JOY\nc.wav,labelled,fear\nd.wav,test,nan\n")
    assert [entry.label for entry in csv_file.read(tmp_path, ["joy", "fear"])] == ["joy", "joy", "fear", ""]
    assert "merged as 'joy': 'JOY' (1), 'Joy' (1); taken as no label: 'nan' (1)" in capsys.readouterr().err
    table.write_text("path,split,label\na.wav,labelled,joy\nb.wav,labelled,xxx\n")
    with pytest.raises(PipelineError, match=r"clips\.csv: line 3: b\.wav: found label 'xxx'"):
        csv_file.read(tmp_path, ["joy", "fear"])
    table.write_text("path,split,label\na.wav,labelled,0.5\nb.wav,labelled,-1.2\n")
    with pytest.raises(PipelineError, match=r"clips\.csv: the labels are numbers on a scale"):
        csv_file.read(tmp_path, ["joy", "fear"])
