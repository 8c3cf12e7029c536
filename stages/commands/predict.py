"""Emotions of new clips, by the trained ensemble.

    mer predict CLIP_OR_FOLDER ... [--out predictions.csv]

One row per clip: the label, its probabilities, every modality's attention and presence, and what was amiss. Without
--out the rows go to the standard output as they are ready. Exit code 1 if no clip could be read.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stages.corpora.folders import escaped
from stages.engine.errors import PipelineError, run_stage

DECIMALS = 8  # float32 has no more

if TYPE_CHECKING:
    from stages.inference.predictor import Prediction
    from stages.inference.trained import Trained


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("mer predict", description="Emotions of new clips, by the trained ensemble",
                                     allow_abbrev=False)
    parser.add_argument("clips", nargs="+", metavar="CLIP_OR_FOLDER")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write the rows there, whole or not at all")
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


def given_transcripts(clips: list[Path], text: str | None, table: Path | None) -> dict[Path, str]:
    """The transcripts that the user has, by clip. Raises PipelineError for one text and several clips."""
    from stages.inference.clips import read_transcripts, transcript_of

    if text is not None:
        if len(clips) > 1 or table:
            raise PipelineError(f"--transcript: found {len(clips)} clips{' and --transcripts' if table else ''}, "
                                f"expected one; for several give --transcripts a CSV with the columns name,transcript")
        return {clips[0]: text}
    known = read_transcripts(table) if table else {}
    given = {clip: transcript_of(clip, known) for clip in clips}
    if table and not any(given.values()):
        print(f"warning: {table}: none of its {len(known)} names is a clip's", file=sys.stderr)
    return given


def header(trained: "Trained") -> list[str]:
    labels, modalities = trained.params.corpus.labels, trained.modalities
    return ["clip", "prediction", *(f"prob_{label}" for label in labels), "confidence", "votes",
            *(f"attention_{name}" for name in modalities), *(f"present_{name}" for name in modalities),
            "transcript", "ranking", "reason"]


def row(prediction: "Prediction", labels: list[str]) -> list[object]:
    """The clip's cells in the header's order; those that need a prediction are empty without one."""
    shown: list[object] = ["", *([""] * (len(labels) + 2 + len(prediction.attention)))]
    if prediction.probabilities is not None:
        probabilities = prediction.probabilities.astype(float).round(DECIMALS).tolist()
        shown = [labels[prediction.probabilities.argmax()], *probabilities, max(probabilities), prediction.votes,
                 *prediction.attention.astype(float).round(DECIMALS).tolist()]
    present = ["true" if found else "false" for found in prediction.present]
    return [escaped(prediction.clip), *shown, *present, prediction.transcript, " ".join(prediction.ranking or []),
            prediction.reason]


@contextmanager
def opened(out: Path | None) -> Iterator[IO[Any]]:
    """Where the rows go. Whatever else is printed meanwhile, a ranking provider's estimate, goes to stderr."""
    from stages.engine.files import replacing

    with replacing(out) if out else nullcontext(sys.stdout) as file, redirect_stdout(sys.stderr):
        yield file


def main(arguments: Sequence[str]) -> None:
    asked = parse(arguments)
    from tqdm import tqdm

    from stages.inference.clips import find_clips

    if asked.out and asked.out.is_dir():
        raise PipelineError(f"--out: {asked.out} is a folder, expected the name of a CSV to write")
    clips = find_clips(asked.clips)
    given = given_transcripts(clips, asked.transcript, asked.transcripts)
    trained = load_trained(asked.bundle, asked.device)
    from stages.inference.predictor import predict

    unread = 0
    with opened(asked.out) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header(trained))
        predictions = tqdm(predict(trained, clips, given), "predict", len(clips), unit="clip", mininterval=1,
                           disable=len(clips) == 1)
        for prediction in predictions:
            if prediction.probabilities is None:
                unread += 1
                tqdm.write(f"warning: {prediction.clip}: {prediction.reason}", file=sys.stderr)
            writer.writerow(row(prediction, trained.params.corpus.labels))
            file.flush()
    if unread == len(clips):
        raise PipelineError(f"predict: none of the {len(clips)} clips could be read")
    if unread:
        print(f"predict: {unread} of {len(clips)} clips could not be read", file=sys.stderr)


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
