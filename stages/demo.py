"""Stage demo: the generated demo corpus (data/demo/) and miniature checkpoints (models/demo/).

With any other adapter there is nothing to make.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages.corpora.demo.generate import make_corpus, sentences
from stages.engine.devices import pick_workers
from stages.engine.errors import run_stage
from stages.engine.files import empty_folder
from stages.engine.params import Params, load

DATA = Path("data/demo")
MODELS = Path("models/demo")


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


def main() -> None:
    p = load()
    for folder in (DATA, MODELS):
        empty_folder(folder)  # its old files may be links into DVC's cache
    if p.corpus.adapter == "demo":
        make_demo(p)
        return
    for folder in (DATA, MODELS):
        (folder / "README.txt").write_text(f"Empty, since corpus.adapter is {p.corpus.adapter}, not demo.\n")


if __name__ == "__main__":
    run_stage(main)
