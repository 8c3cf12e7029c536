"""Feature files that you have already, made into a folder of its own where `dvc repro` starts at the fusion.

    mer import-features meld \\
        hubert=/features/chinese-hubert-large-UTT clip=/features/clip-vit-large-patch14-FRA --labels meld.csv
    cd meld && dvc repro

Features: per modality NAME=FOLDER, one .npy per clip (stages/commands/npy.py). Labels: a CSV with the columns name and
label (or discrete, as MER has it) and optionally split (train or test; without it all are train; unlabelled is known
too), transcript (or chinese) and group (speaker or dialogue: clips of one group never straddle folds). --test takes
the test clips from a second CSV, where the label may be empty. The labels that occur are the classes, in alphabetical
order, unless the folder's params.yaml gives them.

The folder gets params.yaml (what the fusion needs of the repository's, kept if it is there), dvc.yaml (the
repository's stages from split_folds on), data/ and features/. A clip without a file counts as absent from that
modality and stands in reports/skipped.csv. Run the command again after a change of the files or of the code.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from stages.commands.npy import feature_files, write_features
from stages.corpora.duplicates import find_duplicates, report_duplicates
from stages.corpora.folders import MEDIA
from stages.corpora.labels import read_labels
from stages.corpora.layout import Entry, shown
from stages.corpora.tables import read_lines, read_table
from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import replacing, write_rows
from stages.engine.manifest import Clip, Split, write_manifest
from stages.engine.params import load_fusion
from stages.engine.store import Store
from stages.engine.yaml_file import read_yaml

ROOT = Path(__file__).resolve().parents[2]
SPLITS: dict[str, Split] = {"train": "labelled", "labelled": "labelled", "test": "test", "unlabelled": "unlabelled"}
ORDER = ("labelled", "test", "unlabelled")
STAGES = ("split_folds", "gather_features", "pretrain_fusion", "train_fusion", "baselines", "nested_cv", "self_train",
          "evaluate")
WRITTEN = ("data/manifest.csv", "data/truth.csv", "data/duplicates.csv", "features")
SECTIONS = ("folds", "fusion", "pretraining", "nested_cv", "self_training", "evaluate")
TAKEN = {"data", "features", "models", "reports", "stages", "tests"}  # the repository's own, or hidden from DVC
IGNORED = "/.cache/\n/data/\n/features/\n"


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    folder: Path
    features: dict[str, Path]  # modality -> folder of .npy files
    labels: Path
    test: Path | None
    unlisted: str  # error | unlabelled | ignore
    max_missing: float
    keep_frames: bool


# ---------------------------------------------------------------- labels


def read_entries(request: Request, classes: Sequence[str] | None) -> list[Entry]:
    """The clips of the label files, and those that only have features where `unlisted` says so; in manifest order.

    Raises PipelineError for a bad row, and for features of clips that no label file names.
    """
    found = {name for folder in request.features.values() for name in feature_files(folder)}
    rows = _without_extensions(_label_file(request.labels, "labelled"), found)
    if request.test is not None:
        test = _without_extensions(_label_file(request.test, "test"), found)
        if twice := sorted({row.name for row in rows} & {row.name for row in test}):
            raise PipelineError(f"{request.test}: {len(twice)} names that {request.labels} has too: {shown(twice)}")
        rows += test
    labels = read_labels(request.labels, {row.where: row.label for row in rows}, classes)
    entries = [_entry(row, labels[row.where]) for row in rows]
    listed = {entry.clip_id for entry in entries}
    unlisted = sorted(found - listed)
    if unlisted and request.unlisted == "error":
        raise PipelineError(f"{request.labels}: lacks {len(unlisted)} clips that have features: {shown(unlisted)}; "
                            f"take them as unlabelled clips (--unlisted unlabelled) or leave them out "
                            f"(--unlisted ignore)")
    if request.unlisted == "unlabelled":
        entries += [Entry(name, "", "unlabelled") for name in unlisted]
    if not any(entry.split == "labelled" for entry in entries):
        raise PipelineError(f"{request.labels}: no clips to train on; expected some with a label and split train")
    return sorted(entries, key=lambda entry: (ORDER.index(entry.split), entry.clip_id))


@dataclass(frozen=True)
class LabelRow:
    """One row of a label file."""

    where: str  # as errors name it
    name: str
    label: str
    split: Split  # of the file, for rows that name none
    cells: Mapping[str, str]


def _label_file(path: Path, split: Split) -> list[LabelRow]:
    header, _ = read_lines(path, ("name",))
    columns = [name for name in ("label", "discrete") if name in header]
    if not columns and split == "labelled":
        raise PipelineError(f"{path}: found columns {header}, expected name and label")
    if len(columns) > 1:
        raise PipelineError(f"{path}: line 1: found both columns label and discrete; remove or rename one of them")
    return [LabelRow(f"{path}: {name}", name, row[columns[0]] if columns else "", split, row)
            for name, row in read_table(path, ("name",)).items()]


def _without_extensions(rows: list[LabelRow], files: Collection[str]) -> list[LabelRow]:
    """The rows whose names are those of clip files (a.mp4) by the names that the features have (a).

    Raises PipelineError where two rows so become one clip.
    """
    def bare(name: str) -> str:
        clip = Path(name)
        return clip.stem if name not in files and clip.stem in files and clip.suffix.lower() in MEDIA else name

    counts = Counter(bare(row.name) for row in rows)
    for row in rows:
        if counts[bare(row.name)] > 1:
            raise PipelineError(f"{row.where}: the clip {bare(row.name)} occurs twice, with and without an extension")
    return [replace(row, name=bare(row.name)) for row in rows]


def _entry(row: LabelRow, label: str) -> Entry:
    if not row.name.isprintable():
        raise PipelineError(f"{row.where!r}: not a clip's name")
    split, asked = row.split, row.cells.get("split")
    if asked:
        if asked.casefold() not in SPLITS:
            raise PipelineError(f"{row.where}: found split {asked!r}, expected train, test or unlabelled (folds for "
                                f"validation are cut from train: call such rows train, or leave them out)")
        split = SPLITS[asked.casefold()]
    if split == "labelled" and not label:
        raise PipelineError(f"{row.where}: a clip to train on without a label; give it one, or the split unlabelled")
    transcript = row.cells.get("transcript") or row.cells.get("chinese", "")
    return Entry(row.name, "", split, label, transcript, row.cells.get("group", ""))


# ---------------------------------------------------------------- the folder's files


def write_data(request: Request, entries: list[Entry], target: Path) -> None:
    """features/<name>/, data/manifest.csv and data/truth.csv below target.

    Raises PipelineError for a bad file, and where more than max_missing of the clips have no file in a modality.
    """
    clip_ids = [entry.clip_id for entry in entries]
    absent: list[set[str]] = []
    for name, folder in request.features.items():
        files = feature_files(folder)
        missing = [clip_id for clip_id in clip_ids if clip_id not in files]
        if len(missing) > request.max_missing * len(clip_ids):
            raise PipelineError(f"{folder}: {len(missing)} of {len(clip_ids)} clips have no file ({shown(missing)}), "
                                f"more than --max-missing {request.max_missing} allows; the folder has "
                                f"{shown([path.name for path in files.values()])}")
        absent.append(set(write_features(target / "features" / name, name, clip_ids, files,
                                         request.keep_frames)))
        if absent[-1]:
            print(f"import-features: {len(absent[-1])} of {len(clip_ids)} clips are absent from {name}")
    if everywhere := sorted(set.intersection(*absent)):
        print(f"warning: import-features: {len(everywhere)} clips are absent from every modality, and can only be "
              f"guessed: {shown(everywhere)}", file=sys.stderr)
    clips = [Clip(e.clip_id, "", e.split, e.label if e.split == "labelled" else "", e.transcript, e.group, None, 0, "")
             for e in entries]
    write_manifest(clips, target / "data/manifest.csv")
    truth = [(e.clip_id, e.label) for e in entries if e.split != "labelled" and e.label]
    write_rows(target / "data/truth.csv", ["clip_id", "label"], truth)
    stores = [Store(target / "features" / name) for name in request.features]
    content = zip(*(store.digests for store in stores), strict=True)
    compared = [clip if clip.clip_id in everywhere else replace(clip, digest=b"".join(digests).hex())
                for clip, digests in zip(clips, content, strict=True)]
    report_duplicates(request.labels, find_duplicates(compared, dict(truth)), target / "data/duplicates.csv")


def make_params(values: Any, classes: Sequence[str], modalities: Sequence[str], unlabelled: bool) -> CommentedMap:
    """The folder's params.yaml from the repository's: the sections that count, with their comments."""
    made = CommentedMap(corpus=CommentedMap(adapter="features", labels=_in_one_line(classes)))
    made.update({section: values[section] for section in SECTIONS})
    made["fusion"]["modalities"] = _in_one_line(modalities)
    made["fusion"].yaml_add_eol_comment("folders in features/", "modalities")
    made["self_training"]["voices"] = _in_one_line([])  # there are no rankings
    if isinstance(made["self_training"]["threshold"], dict):  # by the repository's labels
        made["self_training"]["threshold"] = 0
    if not unlabelled:
        made["self_training"]["rounds"] = 0
        made["self_training"].yaml_add_eol_comment("off: no unlabelled clips were imported [paper: 10]", "rounds")
    made["runtime"] = CommentedMap(device="auto")
    made.yaml_set_comment_before_after_key(SECTIONS[0], before="\n")
    return made


def _in_one_line(names: Sequence[str]) -> CommentedSeq:
    sequence = CommentedSeq(names)
    sequence.fa.set_flow_style()
    return sequence


def make_pipeline(values: Any, up: str) -> dict[str, Any]:
    """The folder's dvc.yaml from the repository's: the stages from split_folds on, without what they would read of
    stages that there are none of. up: the way from the folder to the repository's root."""
    stages = {name: values["stages"][name] for name in STAGES}
    made = set(WRITTEN) | {_path(out) for stage in stages.values() for kind in ("outs", "metrics", "plots")
                           for out in stage.get(kind, [])}
    for stage in stages.values():
        stage["cmd"] = f"PYTHONPATH={up} {stage['cmd']}"
        code = [f"{up}/{dep}" for dep in stage["deps"] if dep.startswith("stages/")]
        stage["deps"] = code + [dep for dep in stage["deps"] if dep in made]
    plots = [plot for plot in values["plots"] if all(set(shown["y"]) <= made for shown in plot.values())]
    return {"stages": stages, "plots": plots}


def _path(out: str | Mapping[str, Any]) -> str:
    return out if isinstance(out, str) else next(iter(out))


def check_folder(folder: Path) -> None:
    """Raises PipelineError for a folder outside the repository, or one that this command did not make."""
    absolute = folder.resolve()
    inside = absolute.relative_to(ROOT).parts if absolute.is_relative_to(ROOT) else ()
    if not inside or inside[0] in TAKEN or inside[0].startswith("."):
        raise PipelineError(f"{folder}: expected a new folder in {ROOT}, other than {', '.join(sorted(TAKEN))}")
    if absolute.exists() and any(absolute.iterdir()) and not (absolute / "params.yaml").exists():
        raise PipelineError(f"{folder}: holds files that this command did not make; expected a new or empty folder")


def own_classes(params: Path) -> list[str] | None:
    """corpus.labels of an earlier import's params.yaml. Raises PipelineError where it is another's."""
    if not params.exists():
        return None
    corpus = load_fusion(params).corpus
    if corpus.adapter != "features":
        raise PipelineError(f"{params}: corpus.adapter: found {corpus.adapter}, expected a folder of imported features")
    return corpus.labels


def import_features(request: Request) -> None:
    """Write the whole folder; its data and features are replaced when everything has been read."""
    check_folder(request.folder)
    own = request.folder / "params.yaml"
    classes = own_classes(own)
    entries = read_entries(request, classes)
    found = sorted({entry.label for entry in entries if entry.label})
    if len(found) < 2:
        raise PipelineError(f"{request.labels}: found the classes {found}, expected two or more")
    round_trip = YAML()  # keeps comments
    round_trip.width = 4096
    request.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=request.folder, prefix=".import-") as temporary:
        write_data(request, entries, Path(temporary))
        shutil.rmtree(request.folder / "features", ignore_errors=True)
        for name in WRITTEN:
            (request.folder / name).parent.mkdir(exist_ok=True)
            os.replace(Path(temporary) / name, request.folder / name)
    if classes is None:
        unlabelled = any(entry.split == "unlabelled" for entry in entries)
        values = round_trip.load(ROOT / "params.yaml")
        with replacing(own) as file:
            round_trip.dump(make_params(values, found, list(request.features), unlabelled), file)
    up = os.path.relpath(ROOT, request.folder.resolve())
    with replacing(request.folder / "dvc.yaml") as file:
        file.write("# Made of the repository's dvc.yaml by mer import-features: run it again, don't edit.\n")
        round_trip.dump(make_pipeline(read_yaml(ROOT / "dvc.yaml"), up), file)
    (request.folder / ".gitignore").write_text(IGNORED)
    p = load_fusion(own)
    counts = ", ".join(f"{sum(entry.split == split for entry in entries)} {split}" for split in ORDER)
    print(f"import-features: {counts} clips; classes {', '.join(p.corpus.labels)}; the fusion uses "
          f"{', '.join(p.fusion.modalities)} ({own})\nNow: cd {request.folder} && dvc repro")


# ---------------------------------------------------------------- the command line


def parse(arguments: Sequence[str]) -> Request:
    parser = argparse.ArgumentParser("mer import-features", allow_abbrev=False,
                                     description="Feature files and labels into a folder where dvc repro starts at the "
                                                 "fusion")
    parser.add_argument("folder", type=Path, help="the folder to make, in the repository")
    parser.add_argument("features", nargs="+", metavar="NAME=FOLDER", help="a modality and its folder of .npy files")
    parser.add_argument("--labels", type=Path, required=True, help="CSV: name,label[,split][,transcript][,group]")
    parser.add_argument("--test", type=Path, help="CSV of the test clips: name[,label]")
    parser.add_argument("--unlisted", choices=("error", "unlabelled", "ignore"), default="error",
                        help="clips that have features but no row in a CSV (error)")
    parser.add_argument("--max-missing", type=float, default=0.1, metavar="SHARE",
                        help="of the clips that may lack a file in a modality (0.1)")
    parser.add_argument("--keep-frames", action="store_true",
                        help="of files of shape (frames, C) keep the frames too, for fusion.architecture: frames")
    values = parser.parse_args(arguments)
    features: dict[str, Path] = {}
    for pair in values.features:
        name, _, folder = pair.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or not folder or name == "emovclip" or name in features:
            raise PipelineError(f"{pair}: expected NAME=FOLDER with a name of its own in small letters, digits and _, "
                                f"and not emovclip, whose features are made per fold")
        features[name] = Path(folder)
    return Request(values.folder, features, values.labels, values.test, values.unlisted, values.max_missing,
                   values.keep_frames)


def main(arguments: Sequence[str]) -> None:
    import_features(parse(arguments))


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
