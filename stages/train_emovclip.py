"""Stage train_emovclip: prompts for the frozen CLIP [paper 3.2], per fold on its training part, in models/emovclip/.

With emovclip.scope: all one set of prompts sees every labelled clip, validation parts too (metrics then say leaky).
Every epoch writes its state to .cache/parts/train_emovclip/<fingerprint>/; a killed run goes on from there.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.engine.devices import NARROW, free_bytes, pick_device, pick_workers, set_threads
from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import empty_folder, file_digest, write_json, write_rows, write_tensors
from stages.engine.fingerprint import PARTS, checkpoint_digest, stage_fingerprint
from stages.engine.manifest import read_folds, read_manifest
from stages.engine.params import EmoVCLIP, Params, load
from stages.engine.plan import left_out
from stages.engine.store import Store

if TYPE_CHECKING:
    from stages.encoders.clip import Images
    from stages.encoders.emovclip_training import Trainer

OUT = Path("models/emovclip")
CACHE_BYTES = 2 << 30  # decoded frames that are kept; a larger corpus is decoded anew each epoch
CURVES = ("fold", "epoch", "train_loss", "valid_waf")


class Frames:
    """Labelled clips' frames, decoded to the tower's size: once where they fit in memory, else whenever asked for."""

    def __init__(self, store: Store, clip_ids: Sequence[str], images: "Images"):
        self._store, self._clip_ids, self._images = store, clip_ids, images
        self.counts = np.array([len(store.read_items(clip_id, "frame")) for clip_id in clip_ids])
        height, width = images.size
        fits = int(self.counts.sum()) * height * width * 3 < CACHE_BYTES
        self._decoded: dict[int, np.ndarray] | None = {} if fits else None

    def __call__(self, row: int, indices: np.ndarray) -> np.ndarray:
        """uint8 (len(indices), H, W, 3). Thread-safe."""
        if self._decoded is None:
            jpegs = self._store.read(self._clip_ids[row])
            return self._images.decode([jpegs[i] for i in indices])
        if row not in self._decoded:
            self._decoded[row] = self._images.decode(self._store.read(self._clip_ids[row]))
        return self._decoded[row][indices]


def resume(trainer: "Trainer", path: Path) -> list[list[float]]:
    """Continue from the last finished epoch, if there is one; returns the curve so far."""
    from safetensors import safe_open

    if not path.exists():
        return []
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["values"])
        trainer.restore({name: file.get_tensor(name) for name in file.keys()}, values["state"])  # noqa: SIM118  no dict
    return values["curve"]


def keep(trainer: "Trainer", path: Path, curve: list[list[float]]) -> None:
    """Write the finished epoch: tensors, and the curve beside them in the same file, so both or neither are new."""
    tensors, state = trainer.state()
    write_tensors(path, tensors, {"values": json.dumps({"state": state, "curve": curve})})


def train_one(trainer: "Trainer", valid: Any, path: Path, title: str) -> list[list[float]]:
    """Train to the last epoch; the curve is [epoch, loss, validation WAF in percent or nan] per epoch."""
    from tqdm import tqdm

    from stages.evaluation.metrics import waf

    curve = resume(trainer, path)
    classes = len(trainer.token_ids)
    with tqdm(total=trainer.recipe.epochs, initial=trainer.epoch, desc=title, unit="epoch", mininterval=1) as bar:
        while trainer.epoch < trainer.recipe.epochs:
            loss = trainer.run_epoch()
            score = float(waf(valid.labels, trainer.predict(valid).argmax(1), classes)) if len(valid) else float("nan")
            curve.append([trainer.epoch, loss, score])
            keep(trainer, path, curve)
            bar.update(1)
    return curve


def trained_for(e: EmoVCLIP, folds: int) -> dict[str, Any]:
    """What the prompts belong to, `folds` files of them: the encoder refuses them for another checkpoint.

    code: of the towers; dvc.yaml's extract can't name it for EmoVCLIP's row alone, so it tells that row of a change.
    """
    return {**e.model_dump(include={"checkpoint", "revision", "dtype", "scope", "prompts", "depth"}),
            "digest": checkpoint_digest(e.checkpoint).hex(), "folds": folds,
            "code": file_digest(Path(__file__).parent / "encoders/clip.py")}


def train_all(p: Params, device: str) -> list[list[float]]:
    """Every fold's prompts into OUT; returns the rows of curves.csv."""
    from open_clip import get_tokenizer

    from stages.encoders.clip import Images
    from stages.encoders.emovclip import TRAINED, PromptedCLIP, initial_prompts, label_tokens, load_promptable
    from stages.encoders.emovclip_training import Clips, Recipe, Trainer, training_bytes

    e = p.emovclip
    store, folds = Store("data/frames"), read_folds()
    shown = dict(zip(store.clip_ids, store.present, strict=True))
    clips = [clip for clip in read_manifest() if clip.split == "labelled" and shown[clip.clip_id]]
    if not clips:
        raise PipelineError("data/frames: no labelled clip has frames; EmoVCLIP can't be trained")
    labels = np.array([p.corpus.labels.index(clip.label) for clip in clips])
    fold_of = np.array([folds[clip.clip_id] for clip in clips])
    model, name = load_promptable(e.checkpoint, e.revision, e.dtype, device)
    set_threads(model.visual.output_dim < NARROW)
    chosen = p.runtime.gradient_checkpointing
    if chosen is True or (chosen == "auto" and training_bytes(model, e.batch_size * e.frames) > free_bytes(device)):
        model.set_grad_checkpointing(True)
    images = Images(model.visual)
    tokens = label_tokens(get_tokenizer(name), e.template, p.corpus.labels, e.prompts)
    clip = PromptedCLIP(model, initial_prompts(model, tokens, e.prompts, e.depth, e.seed))
    frames = Frames(store, [c.clip_id for c in clips], images)

    def subset(rows: np.ndarray) -> Clips:
        return Clips(lambda row, indices: frames(int(rows[row]), indices), frames.counts[rows], labels[rows])

    content = [store.digest, Path("data/folds.csv").read_text(), *(f"{c.clip_id} {c.label}" for c in clips)]
    digest = hashlib.blake2b("\n".join(content).encode(), digest_size=16).digest()
    state = PARTS / "train_emovclip" / stage_fingerprint("train_emovclip", checkpoint_digest(e.checkpoint) + digest)
    count = 1 if e.scope == "all" else int(fold_of.max()) + 1
    rows: list[list[float]] = []
    with ThreadPoolExecutor(pick_workers(p.runtime)) as threads:
        for fold in [None] if e.scope == "all" else range(count):
            part = "all" if fold is None else f"fold-{fold}"
            inside = fold_of == (-1 if fold is None else fold)
            clip.prompts = initial_prompts(model, tokens, e.prompts, e.depth, e.seed).to(device)
            if e.prompts:
                recipe = Recipe(e.frames, e.epochs, e.batch_size, e.learning_rate, e.warmup_epochs, e.weight_decay,
                                e.label_smoothing, (e.seed, 0 if fold is None else fold))
                trainer = Trainer(clip, images, tokens, subset(np.flatnonzero(~inside)), recipe, threads)
                valid = subset(np.flatnonzero(inside))
                curve = train_one(trainer, valid, state / f"{part}.safetensors", f"train_emovclip {part}")
                rows += [[-1 if fold is None else fold, *point] for point in curve]
            write_tensors(OUT / f"{part}.safetensors", dict(clip.prompts.named_parameters()))
    write_json(OUT / TRAINED, trained_for(e, count))
    shutil.rmtree(state, ignore_errors=True)  # the outs are complete, and only resuming needs the states
    return rows


def main() -> None:
    p = load()
    device = pick_device(p.runtime.device)
    empty_folder(OUT)
    if reason := left_out("emovclip"):
        write_rows(OUT / "curves.csv", CURVES, [])
        print(f"train_emovclip: {OUT} has no prompts: {reason}")
        return
    write_rows(OUT / "curves.csv", CURVES, train_all(p, device))


if __name__ == "__main__":
    run_stage(main)
