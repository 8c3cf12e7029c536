"""Adapters of published corpora on small fabricated trees, and EMO-DB itself where it lies beside the repository."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from test_corpus import Repository, table
from test_folders import touch, write_sound

from stages.corpora import cremad, emodb, iemocap, meld, mer2026, ravdess
from stages.corpora.layout import Entry
from stages.corpora.published import held_out
from stages.corpus import ADAPTERS
from stages.engine.errors import PipelineError
from stages.engine.manifest import read_manifest
from stages.engine.params import Corpus
from stages.planning.requirements import LAYOUTS

EMODB = next((folder for parent in Path(__file__).parents if (folder := parent / "shared/real/emodb").exists()), None)
LABELS = ["neutral", "anger", "happiness", "sadness"]
ALL = [*LABELS, "fear", "disgust", "surprise", "boredom", "calm", "joy", "excitement", "frustration"]


def make_emodb(root: Path) -> None:
    for name in ("03a01Fa", "03a01Nc", "08b10Wb", "09a02Lb", "10a05Td", "11b03Ta", "11b09Na"):
        touch(root / f"wav/{name}.wav")
    touch(root / "wav/03a01Xa.wav")
    touch(root / "erkennung.txt")


def make_cremad(root: Path) -> None:
    for name in ("1001_DFA_ANG_XX", "1001_IEO_NEU_XX", "1002_IEO_HAP_HI", "1040_ITH_SAD_X", "1091_WSI_FEA_XX"):
        touch(root / f"AudioWAV/{name}.wav")
        touch(root / f"AudioMP3/{name}.mp3")
    touch(root / "VideoFlash/1001_DFA_ANG_XX.flv")
    touch(root / "processedResults/summaryTable.csv")


def make_ravdess(root: Path) -> None:
    for name in ("01-01-05-01-01-01-01.mp4", "02-01-05-01-01-01-01.mp4", "03-01-05-01-01-01-01.wav",
                 "03-01-01-01-02-01-02.wav", "03-01-02-01-02-01-02.wav", "02-01-04-02-01-01-03.mp4",
                 "03-02-03-01-01-01-02.wav", "03-01-03-01-01-01-04.wav"):
        touch(root / f"Actor_{name[18:20]}" / name)


def make_meld(root: Path) -> None:
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
    times = '8,21,"00:16:16,059","00:16:21,731"'
    root.mkdir(exist_ok=True)
    (root / "train").mkdir()
    table(root / "train/train_sent_emo.csv", header, f'1,"also I was, well",Chandler,neutral,neutral,0,0,{times}',
          f"2,Oh my God!,Joey,joy,positive,0,1,{times}", f"3,No!,Joey,anger,negative,125,3,{times}")
    table(root / "dev_sent_emo.csv", header, f"1,Hm.,Phoebe,sadness,negative,0,0,{times}")
    table(root / "test_sent_emo.csv", header, f"1,What?,Mark,surprise,positive,0,0,{times}",
          f"2,Ok,Mark,neutral,positive,0,1,{times}")
    for path in ("train/train_splits/dia0_utt0", "train/train_splits/dia0_utt1", "dev/dev_splits_complete/dia0_utt0",
                 "test/output_repeated_splits_test/dia0_utt0", "test/output_repeated_splits_test/dia0_utt1",
                 "test/output_repeated_splits_test/final_videos_testdia0_utt0"):
        touch(root / f"{path}.mp4")


def make_iemocap(root: Path, videos: bool = True) -> None:
    turns = {"Ses01F_impro01": ["Ses01F_impro01_F000\tneu", "Ses01F_impro01_M000\texc", "Ses01F_impro01_M001\txxx"],
             "Ses01M_script01_1b": ["Ses01M_script01_1b_F003\tang"], "Ses05F_impro04": ["Ses05F_impro04_M002\tsad"]}
    for dialogue, rated in turns.items():
        session = root / f"Session{dialogue[4]}"
        for folder in ("EmoEvaluation", "transcriptions"):
            (session / "dialog" / folder).mkdir(parents=True, exist_ok=True)
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
        for i, turn in enumerate(rated):
            lines += [f"[{6.2901 + i:.4f} - {8.2357 + i:.4f}]\t{turn}\t[2.5000, 2.5000, 2.5000]",
                      "C-E2:\tNeutral;\t()", ""]
            touch(session / f"sentences/wav/{dialogue}/{turn.split()[0]}.wav")
        table(session / f"dialog/EmoEvaluation/{dialogue}.txt", *lines)
        table(session / f"dialog/transcriptions/{dialogue}.txt",
              *(f"{turn.split()[0]} [006.2901-008.2357]: Excuse me, {i}." for i, turn in enumerate(rated)))
        touch(session / f"dialog/EmoEvaluation/._{dialogue}.txt")
        if videos:
            touch(session / f"dialog/avi/DivX/{dialogue}.avi")


def make_mer2026(root: Path) -> None:
    for name in "abc":
        touch(root / f"video/{name}.mp4")
    table(root / "track1_train.csv", "name,discrete", "a,worried")
    table(root / "track1_track2_candidate.csv", "name", "b")
    table(root / "subtitle_chieng.csv", "name,chinese,english", "b,啊,ah")


# how to make it, clip_id -> (split, label, group) with four labels and more, what is said
CORPORA: dict[str, tuple[Callable[[Path], None], dict[str, tuple[str, str, str]], list[str]]] = {
    "emodb": (make_emodb, {
        "03a01Fa": ("labelled", "happiness", "speaker-03"), "03a01Nc": ("labelled", "neutral", "speaker-03"),
        "08b10Wb": ("labelled", "anger", "speaker-08"), "10a05Td": ("labelled", "sadness", "speaker-10"),
        "11b03Ta": ("test", "sadness", "speaker-11"), "11b09Na": ("test", "neutral", "speaker-11")},
        ["7 clips; left out: 1 file of another kind (erkennung.txt), 1 file whose name is not the corpus's (wav/03a01X",
         "left out for emotions that corpus.labels does not have: 1 boredom"]),
    "cremad": (make_cremad, {
        "1001_DFA_ANG_XX": ("labelled", "anger", "speaker-1001"),
        "1001_IEO_NEU_XX": ("labelled", "neutral", "speaker-1001"),
        "1002_IEO_HAP_HI": ("labelled", "happiness", "speaker-1002"),
        "1040_ITH_SAD_X": ("labelled", "sadness", "speaker-1040")},
        ["5 clips; left out: 1 file of another kind", "6 files that a clip has besides (AudioMP3/", "1 fear"]),
    "ravdess": (make_ravdess, {
        "01-01-05-01-01-01-01": ("labelled", "anger", "speaker-01"),
        "03-01-01-01-02-01-02": ("labelled", "neutral", "speaker-02"),
        "02-01-04-02-01-01-03": ("labelled", "sadness", "speaker-03"),
        "03-01-03-01-01-01-04": ("test", "happiness", "speaker-04")},
        ["2 files of a take without its sound or picture", "1 song (Actor_02/03-02-03", "1 calm"]),
    "meld": (make_meld, {
        "train_dia0_utt0": ("labelled", "neutral", "Chandler"), "train_dia0_utt1": ("labelled", "happiness", "Joey"),
        "dev_dia0_utt0": ("labelled", "sadness", "Phoebe"), "test_dia0_utt1": ("test", "neutral", "Mark")},
        ["1 utterances without a file are left out: 'train: dia125_utt3.mp4'", "1 surprise"]),
    "iemocap": (make_iemocap, {
        "Ses01F_impro01_F000": ("labelled", "neutral", "Ses01F"),
        "Ses01F_impro01_M000": ("labelled", "happiness", "Ses01M"),
        "Ses01M_script01_1b_F003": ("labelled", "anger", "Ses01F"),
        "Ses05F_impro04_M002": ("test", "sadness", "Ses05M")}, ["does not have: 1 xxx"]),
    "mer2026": (make_mer2026, {"a": ("labelled", "worry", ""), "b": ("test", "", ""), "c": ("unlabelled", "", "")}, []),
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_published_corpus_is_read_as_its_documentation_says(name: str, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    make, expected, said = CORPORA[name]
    make(tmp_path)
    labels = [*LABELS, "worry"] if name == "mer2026" else LABELS
    found = ADAPTERS[name](tmp_path, labels)
    assert {entry.clip_id: (entry.split, entry.label, entry.group) for entry in found} == expected
    assert all((tmp_path / entry.path).is_file() for entry in found)
    warning = capsys.readouterr().err
    assert all(line in warning for line in said) and bool(said) == bool(warning)


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("wrong", ["empty", "another", "above"])
def test_another_folder_is_one_line(name: str, wrong: str, tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    root.mkdir()
    if wrong != "empty":
        touch(root / "video-labeled/a.mp4")
        touch(root / "readme.txt")
    with pytest.raises(PipelineError) as caught:
        ADAPTERS[name](tmp_path if wrong == "above" else root, LABELS)
    assert str(tmp_path) in str(caught.value) and "expected" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in CORPORA if name != "mer2026"])
def test_labels_that_the_corpus_does_not_have_are_refused(name: str, tmp_path: Path) -> None:
    CORPORA[name][0](tmp_path)
    with pytest.raises(PipelineError, match=r"corpus\.labels: found \['drunk', 'sober'\], but the clips in .* are \d"):
        ADAPTERS[name](tmp_path, ["drunk", "sober"])


def by_name(entries: list[Entry]) -> dict[str, Entry]:
    return {entry.clip_id: entry for entry in entries}


def test_emotions_of_their_own_are_kept_where_the_labels_have_them(tmp_path: Path) -> None:
    for name in CORPORA:
        CORPORA[name][0](tmp_path / name) if name != "mer2026" else None
    assert by_name(meld.read(tmp_path / "meld", ALL))["train_dia0_utt1"].label == "joy"
    assert by_name(iemocap.read(tmp_path / "iemocap", ALL))["Ses01F_impro01_M000"].label == "excitement"
    assert by_name(ravdess.read(tmp_path / "ravdess", ALL))["03-01-02-01-02-01-02"].label == "calm"
    assert by_name(emodb.read(tmp_path / "emodb", ["Angry", "Bored"]))["09a02Lb"].label == "Bored"


def test_iemocaps_turns_are_segments_of_the_videos_or_files_of_sound(tmp_path: Path) -> None:
    make_iemocap(tmp_path / "full")
    make_iemocap(tmp_path / "sound", videos=False)
    segment = by_name(iemocap.read(tmp_path / "full", LABELS))["Ses01F_impro01_M000"]
    assert segment.path == "Session1/dialog/avi/DivX/Ses01F_impro01.avi" and segment.transcript == "Excuse me, 1."
    assert (segment.start, segment.end) == (7.2901, 9.2357)
    sound = by_name(iemocap.read(tmp_path / "sound", LABELS))["Ses01M_script01_1b_F003"]
    assert sound.path == "Session1/sentences/wav/Ses01M_script01_1b/Ses01M_script01_1b_F003.wav"
    assert sound.start is sound.end is None
    (tmp_path / "sound" / sound.path).unlink()
    with pytest.raises(PipelineError, match=r"_F003\.wav: a name of no file; expected the turn's sound there"):
        iemocap.read(tmp_path / "sound", LABELS)


def test_the_fullest_file_of_a_clip_counts(tmp_path: Path) -> None:
    make_cremad(tmp_path)
    paths = {entry.clip_id: entry.path for entry in cremad.read(tmp_path, LABELS)}
    assert paths["1001_DFA_ANG_XX"] == "VideoFlash/1001_DFA_ANG_XX.flv"
    assert paths["1002_IEO_HAP_HI"] == "AudioWAV/1002_IEO_HAP_HI.wav"


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, []), (2, [1]), (4, [3]), (5, [4]), (10, [4, 9]),
                                                 (24, [4, 9, 14, 19])])
def test_every_fifth_speaker_is_held_out(count: int, expected: list[int]) -> None:
    assert held_out({f"{i:02d}" for i in range(count)}) == {f"{i:02d}" for i in expected}


def test_mer2026_reads_transcripts_and_names_what_is_missing(tmp_path: Path) -> None:
    make_mer2026(tmp_path)
    assert by_name(mer2026.read(tmp_path, ["worry"]))["b"].transcript == "啊"
    (tmp_path / "track1_track2_candidate.csv").unlink()
    with pytest.raises(PipelineError, match=r"track1_track2_candidate\.csv: not found"):
        mer2026.read(tmp_path, ["worry"])


def test_every_adapter_can_be_asked_for_and_has_its_layout_described() -> None:
    assert set(ADAPTERS) == set(get_args(Corpus.model_fields["adapter"].annotation)) == {"demo", *LAYOUTS}


def test_the_stage_reads_a_corpus_of_segments(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    make_iemocap(root, videos=False)
    for path in root.rglob("*.wav"):
        write_sound(path)
    Repository(tmp_path, adapter="iemocap", path="corpus", truth=None, labels=LABELS).run("corpus")
    clips = read_manifest(tmp_path / "data/manifest.csv")
    assert [(clip.clip_id, clip.label, clip.group) for clip in clips] == [
        ("Ses01F_impro01_F000", "neutral", "Ses01F"), ("Ses01F_impro01_M000", "happiness", "Ses01M"),
        ("Ses01M_script01_1b_F003", "anger", "Ses01F"), ("Ses05F_impro04_M002", "", "Ses05M")]
    assert (tmp_path / "data/truth.csv").read_text() == "clip_id,label\nSes05F_impro04_M002,sadness\n"


@pytest.mark.skipif(EMODB is None, reason="shared/real/emodb: the real EMO-DB is not beside the repository")
def test_the_real_emodb() -> None:
    assert EMODB is not None
    found = emodb.read(EMODB, ALL)
    assert Counter(entry.label for entry in found) == {"anger": 127, "boredom": 81, "disgust": 46, "fear": 69,
                                                       "happiness": 71, "sadness": 62, "neutral": 79}
    assert {entry.group for entry in found if entry.split == "test"} == {"speaker-11", "speaker-16"}
    assert {entry.label for entry in found if entry.split == "test"} == {entry.label for entry in found}
    own = {entry.clip_id: (entry.label, entry.group) for entry in ADAPTERS["csv"](EMODB, ALL)}
    assert {entry.clip_id: (entry.label, entry.group) for entry in found} == own  # as its publisher's table has them
