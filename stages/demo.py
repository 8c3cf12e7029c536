"""Stage demo: the generated demo corpus (data/demo/) and miniature checkpoints (models/demo/).

With any other adapter there is nothing to make; the stage then only checks, before anything else runs, that
the corpus folder lies where params.yaml says.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages.corpora.demo.generate import make_corpus, sentences
from stages.engine.devices import pick_workers
from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import empty_folder
from stages.engine.params import Params, load

DATA = Path("data/demo")
MODELS = Path("models/demo")
LAYOUTS = {
    "mer2024": "video-labeled/, video-unlabeled-with-test2noise/, label-disdim.csv, label-transcription.csv and "
               "candidate_20000.csv",
    "mer2023": "train/, test1/, test2/, test3/ and train-label.csv",
    "mer2025": "video/, subtitle_chieng.csv, track1_train_disdim.csv and track_all_candidates.csv",
    "mer2026": "video/, subtitle_chieng.csv, track1_train.csv and track1_track2_candidate.csv",
    "meld": "MELD.Raw and the three archives in it, unpacked",
    "iemocap": "Session1/ to Session5/ of IEMOCAP_full_release",
    "cremad": "VideoFlash/ or AudioWAV/",
    "ravdess": "Actor_01/ and so on",
    "emodb": "wav/",
    "csv": "clips.csv (path,split,label,...) and the clips that it lists",
}


def make_demo(p: Params) -> None:
    """Corpus and checkpoints from demo.seed; the same bytes every time."""
    d = p.demo
    counts = (d.labelled, d.unlabelled, d.test)
    with ThreadPoolExecutor(1) as thread:  # its processes draw clips while this one spends seconds on imports
        corpus = thread.submit(make_corpus, DATA, d.seed, *counts, p.corpus.labels, pick_workers(p.runtime))
        make_checkpoints(d.seed)
        corpus.result()


def make_checkpoints(seed: int) -> None:
    """The miniatures into MODELS. Imports torch and open_clip, which with a real corpus this stage never needs."""
    from stages.corpora.demo.checkpoints import make_baichuan, make_hubert, make_hubert_base
    from stages.corpora.demo.clip_checkpoint import make_clip

    make_hubert(MODELS / "hubert", seed)
    make_hubert_base(MODELS / "hubert_base", seed)
    make_clip(MODELS / "clip", seed)
    make_baichuan(MODELS / "baichuan", seed, sentences())


def check_corpus(p: Params) -> None:
    """Raises PipelineError saying where the corpus must lie and what must be in it."""
    folder = Path(p.corpus.path)
    if not folder.is_dir():
        hint = " (~ is no folder here: write the whole path)" if p.corpus.path.startswith("~") else ""
        hint = hint or (" (that is a file: name the folder that it is in)" if folder.exists() else "")
        raise PipelineError(
            f"corpus.path: found no folder {folder} (in {Path.cwd()}), expected the {p.corpus.adapter} corpus there, "
            f"with {LAYOUTS[p.corpus.adapter]}; put or link it there, or change corpus.path{hint}"
        )


def main() -> None:
    p = load()
    for folder in (DATA, MODELS):
        empty_folder(folder)  # its old files may be links into DVC's cache
    if p.corpus.adapter == "demo":
        make_demo(p)
        return
    check_corpus(p)
    for folder in (DATA, MODELS):
        (folder / "README.txt").write_text(f"Empty, since corpus.adapter is {p.corpus.adapter}, not demo.\n")


if __name__ == "__main__":
    run_stage(main)
