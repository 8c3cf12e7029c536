"""Everything that a run will need and this repository does not make, looked at before the first clip is decoded:
the corpus, checkpoints, binaries, keys.

A published checkpoint counts as there when the machine's cache has it or the hub answers for it; nothing is fetched.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from stages.engine.errors import PipelineError, one_line
from stages.engine.fingerprint import checkpoint_files
from stages.engine.inputs import TEXTS
from stages.engine.params import Params
from stages.planning.needs import PROMPTS, left_out, made_here, media_read, trains_prompts

WEIGHTS = {".safetensors", ".bin"}
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


def missing(p: Params) -> list[str]:
    """A line for each thing that the run needs and that is not there."""
    return [*_corpus(p), *_checkpoints(p), *_detector(p), *_ranker(p)]


def _corpus(p: Params) -> Iterator[str]:
    if p.corpus.adapter == "demo":
        return
    folder = Path(p.corpus.path)
    if not folder.is_dir():
        hint = " (~ is no folder here: write the whole path)" if p.corpus.path.startswith("~") else ""
        hint = hint or (" (that is a file: name the folder that it is in)" if folder.exists() else "")
        yield (f"corpus.path: found no folder {folder} (in {Path.cwd()}), expected the {p.corpus.adapter} corpus "
               f"there, with {LAYOUTS[p.corpus.adapter]}; put or link it there, or change corpus.path{hint}")
    if p.corpus.truth is not None and not Path(p.corpus.truth).is_file():
        yield f"corpus.truth: found no file {p.corpus.truth}; expected a CSV with name,discrete, or null"


def _checkpoints(p: Params) -> Iterator[str]:
    needed: dict[str, tuple[str, str | None]] = {}  # param -> what it names, its revision
    for name in p.fusion.modalities:
        row = p.extractors[name]
        needed |= {f"extractors.{name}.{key}": (found, row.options.get("revision")) for key, found in row.loads.items()}
    if trains_prompts(p):
        needed["emovclip.checkpoint"] = p.emovclip.checkpoint, p.emovclip.revision
    if media_read(p) & set(TEXTS) and p.transcribe.checkpoint:
        needed["transcribe.checkpoint"] = p.transcribe.checkpoint, p.transcribe.revision
    if "rankings.jsonl" in media_read(p):
        voices = {"": p.rankings} | {f"providers.{name}.": p.rankings.voice(name) for name in p.rankings.providers}
        needed |= {f"rankings.{name}model": (voice.model, voice.revision) for name, voice in voices.items()
                   if voice.provider == "transformers"}
    faults = {named: checkpoint_fault(p, *named) for named in dict.fromkeys(needed.values())}
    for fault in dict.fromkeys(filter(None, faults.values())):  # several params may name the same
        keys = [f"{key} ({named[0]})" for key, named in needed.items() if faults[named] == fault]
        yield f"{', '.join(keys)}: {fault}"


def checkpoint_fault(p: Params, checkpoint: str, revision: str | None) -> str:
    """Why the checkpoint can't be had, "" where it can."""
    folder = Path(checkpoint)
    if made_here(p, checkpoint):
        return ""
    if folder.is_relative_to("models/demo"):
        return ("of the demo, and removed for other values of corpus.adapter; expected a folder of yours or a "
                "published checkpoint (presets/mer2024.yaml names the paper's)")
    if folder.is_dir():
        held = any(path.suffix in WEIGHTS for path in checkpoint_files(folder))
        return "" if held else "no weights in that folder; expected .safetensors or .bin files"
    try:
        repository = _repository(checkpoint)
    except PipelineError as error:
        return str(error)
    return _hub_fault(repository, revision)


def _repository(checkpoint: str) -> str:
    """The hub's name for a published checkpoint: owner/name, hf-hub:owner/name or open_clip's MODEL / TAG."""
    name, separator, tag = checkpoint.partition(" / ")
    if separator:
        import open_clip

        source = open_clip.get_pretrained_cfg(name, tag)
        repository = str(source.get("hf_hub", "")).rpartition("/")[0] if source else ""
        if not repository:
            raise PipelineError("open_clip has no such model with that tag on the hub")
        return repository
    repository = checkpoint.removeprefix("hf-hub:")
    if not re.fullmatch(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+", repository):
        raise PipelineError("no such folder, nor the name of a published checkpoint (owner/name)")
    return repository


def _hub_fault(repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, snapshot_download

    try:
        snapshot_download(repository, revision=revision, local_files_only=True)
        return ""
    except Exception:  # not in the cache: errors of the hub's client share no base class
        pass
    try:
        HfApi().model_info(repository, revision=revision, timeout=30)
    except Exception as error:
        at = f" at revision {revision}" if revision else ""
        return f"no such folder, and the hub does not give it{at}: {one_line(error)}"
    return ""


def _detector(p: Params) -> Iterator[str]:
    if "faces" in media_read(p) and p.faces.detector == "openface":
        from stages.media.openface import find_binary

        try:
            find_binary(p.faces.openface_binary)
        except PipelineError as error:
            yield str(error)


def _ranker(p: Params) -> Iterator[str]:
    if "rankings.jsonl" not in media_read(p):
        return
    for r in [p.rankings, *map(p.rankings.voice, p.rankings.providers)]:
        if r.provider == "lexicon" and importlib.util.find_spec("cntext") is None:
            yield "rankings.provider: lexicon needs the package cntext, which is not installed: run make"
        if r.provider == "openai" and r.base_url is None and not os.environ.get(r.api_key_env, "").strip():
            yield "rankings.api_key_env: no key in the environment variable that it names; expected one, or a base_url"


def row_left_out(p: Params, name: str) -> str | None:
    """Why the row's features are not made; None where they are, as those that fusion.modalities names always are.

    Other rows are made where their input is and what they load: nobody waits for the rest.
    """
    if name in p.fusion.modalities:
        return None
    row, left = p.extractors[name], left_out(p)
    if row.input != "transcripts.csv" and left[row.input]:  # the corpus's own words are always there
        return left[row.input]
    for checkpoint in row.loads.values():
        if checkpoint == PROMPTS and left["emovclip"]:
            return left["emovclip"]
        if fault := checkpoint_fault(p, checkpoint, row.options.get("revision")):
            return f"fusion.modalities does not name it, and its {checkpoint} is missing: {fault}"
    return None
