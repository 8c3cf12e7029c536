"""Emotions of new clips, by the trained ensemble.

    mer predict CLIP_OR_FOLDER ... [--out predictions.csv] [--html predictions.html]
    mer predict RECORDING ... --segment vad [--html timeline.html]

One row per clip, or per segment of a recording: the label, its probabilities, every modality's attention and presence,
and what was amiss. Without --out the rows go to the standard output as they are ready. Exit code 1 if no clip could be
read.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from math import isnan
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stages.corpora.folders import NOTHING, escaped, what_is
from stages.engine.errors import PipelineError, run_stage
from stages.engine.manifest import Segment, Source

DECIMALS = 8  # float32 has no more

if TYPE_CHECKING:
    from stages.inference.predictor import Prediction
    from stages.inference.trained import Trained


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("mer predict", description="Emotions of new clips, by the trained ensemble",
                                     allow_abbrev=False)
    parser.add_argument("clips", nargs="+", metavar="CLIP_OR_FOLDER")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write the rows there, whole or not at all")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write them there as a page too, with --segment as a "
                        "line of time")
    parser.add_argument("--segment", metavar="vad|asr|SECONDS", help="cut long recordings, a row per segment: where "
                        "somebody speaks, by sentences of transcribe.checkpoint, or evenly")
    parser.add_argument("--transcript", metavar="TEXT", help="what is said in the one clip")
    parser.add_argument("--transcripts", type=Path, metavar="CSV", help="columns name,transcript; the others are "
                        "recognised if transcribe.checkpoint is set, else they go without")
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="what `mer release` wrote; else the models here")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; else runtime.device of params.yaml")
    return parser.parse_args(arguments)


def load_trained(bundle: Path | None, device: str | None) -> "Trained":
    """The bundle's models or the repository's, to run on `device`. Raises PipelineError."""
    from stages.inference.bundle import open_bundle
    from stages.inference.trained import trained_here

    trained = open_bundle(bundle) if bundle else trained_here()
    return trained.on(device) if device else trained


def words(text: str) -> str:
    """An argument's text where the terminal's encoding is not that of its bytes. Raises PipelineError for no UTF-8."""
    try:
        return os.fsencode(text).decode() if any("\udc80" <= c <= "\udcff" for c in text) else text
    except UnicodeError:
        raise PipelineError("--transcript: found bytes that are no UTF-8; set the terminal's encoding to UTF-8, or "
                            "give the words in a UTF-8 CSV with --transcripts") from None


def given_transcripts(clips: list[Path], text: str | None, table: Path | None) -> dict[Source, str]:
    """The transcripts that the user has, by clip. Raises PipelineError for one text and several clips."""
    from stages.inference.clips import read_transcripts, transcript_of

    if text is not None:
        if len(clips) > 1 or table:
            raise PipelineError(f"--transcript: found {len(clips)} clips{' and --transcripts' if table else ''}, "
                                f"expected one; for several give --transcripts a CSV with the columns name,transcript")
        return {clips[0]: words(text)}
    known = read_transcripts(table) if table else {}
    given: dict[Source, str] = {clip: transcript_of(clip, known) for clip in clips}
    if table and not any(given.values()):
        print(f"warning: {table}: none of its {len(known)} names is a clip's", file=sys.stderr)
    return given


def header(trained: "Trained", segments: bool) -> list[str]:
    labels, modalities = trained.params.corpus.labels, trained.modalities
    return ["clip", *(["start", "end"] if segments else []), "prediction", *(f"prob_{label}" for label in labels),
            "confidence", "votes",
            *(f"attention_{name}" for name in modalities), *(f"present_{name}" for name in modalities),
            "transcript", "ranking", "reason"]


def row(prediction: "Prediction", labels: list[str], segments: bool) -> list[object]:
    """The clip's cells in the header's order; those that need a prediction are empty without one, as are the attention
    scores of a fusion that has none."""
    shown: list[object] = ["", *([""] * (len(labels) + 2 + len(prediction.attention)))]
    if prediction.probabilities is not None:
        probabilities = prediction.probabilities.astype(float).round(DECIMALS).tolist()
        shown = [labels[prediction.probabilities.argmax()], *probabilities, max(probabilities), prediction.votes,
                 *("" if isnan(score) else round(float(score), DECIMALS) for score in prediction.attention)]
    present = ["true" if found else "false" for found in prediction.present]
    clip = prediction.clip
    place: list[object] = [escaped(clip.path), clip.start, clip.end] if isinstance(clip, Segment) else [escaped(clip)]
    if len(place) == 1 and segments:  # a recording that was not cut
        place += ["", ""]
    return [*place, *shown, *present, prediction.transcript, " ".join(prediction.ranking or []),
            prediction.reason]


def check_writable(option: str, path: Path) -> None:
    """What is written at the end can be written: known before hours of work. Raises PipelineError, OSError."""
    from stages.engine.files import require_writable

    kind = what_is(path)
    if kind not in ("", NOTHING, "link to nothing") or path.absolute().is_relative_to("/dev"):
        raise PipelineError(f"{option}: {escaped(path)} is a {kind or 'device'}, expected the name of a file to write")
    require_writable(path)


@contextmanager
def opened(out: Path | None) -> Iterator[IO[Any]]:
    """Where the rows go. Whatever else is printed meanwhile, a ranking provider's estimate, goes to stderr."""
    from stages.engine.files import replacing

    with replacing(out) if out else nullcontext(sys.stdout) as file, redirect_stdout(sys.stderr):
        yield file


def predictions_of(
    trained: "Trained", clips: Sequence[Source], given: Mapping[Source, str], reasons: Mapping[Source, str]
) -> Iterator["Prediction"]:
    """Every clip's prediction, in order; those that have a reason against it get none."""
    from stages.inference.predictor import no_prediction, predict

    todo = [clip for clip in clips if clip not in reasons]
    found = predict(trained, todo, given) if todo else iter(())
    for clip in clips:
        yield no_prediction(trained, clip, reasons[clip]) if clip in reasons else next(found)


def main(arguments: Sequence[str]) -> None:
    asked = parse(arguments)
    from tqdm import tqdm

    from stages.inference.clips import find_clips, name_of

    if asked.segment and (asked.transcript is not None or asked.transcripts):
        raise PipelineError("--segment: can't tell which words of --transcript or --transcripts are said in which "
                            "segment; leave them out: transcribe.checkpoint recognises them")
    files = find_clips(asked.clips)
    given = given_transcripts(files, asked.transcript, asked.transcripts)
    for option, path in (("--out", asked.out), ("--html", asked.html)):
        if path:
            check_writable(option, path)
    trained = load_trained(asked.bundle, asked.device)
    clips: list[Source] = [*files]
    reasons: dict[Source, str] = {}
    if asked.segment:
        from stages.inference.recordings import check_way, cut

        check_way(asked.segment, trained.params)
        found = cut(files, asked.segment, trained.params)
        clips, given, reasons = found.pieces, found.texts, found.reasons
    labels, segments = trained.params.corpus.labels, bool(asked.segment)
    shown: list[Prediction] = []
    unread = 0
    with opened(asked.out) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header(trained, segments))
        predictions = tqdm(predictions_of(trained, clips, given, reasons), "predict", len(clips), unit="clip",
                           mininterval=1, disable=len(clips) == 1)
        for prediction in predictions:
            if prediction.probabilities is None:
                unread += 1
                tqdm.write(f"warning: {escaped(name_of(prediction.clip))}: {prediction.reason}", file=sys.stderr)
            writer.writerow(row(prediction, labels, segments))
            file.flush()
            if asked.html:
                shown.append(prediction)
    if asked.html:
        from stages.engine.files import replacing
        from stages.inference.timeline import render_timeline

        with replacing(asked.html) as page:
            page.write(render_timeline(shown, labels))
    if unread == len(clips):
        raise PipelineError(f"predict: none of the {len(clips)} clips could be read")
    if unread:
        print(f"predict: {unread} of {len(clips)} clips could not be read", file=sys.stderr)


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
