"""A finished run of the pipeline, fabricated file by file, for the tests of evaluate and its report."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from stages.engine.store import Row, write_index, write_shard

LABELS = ["neutral", "anger", "happiness", "sadness", "worry", "surprise"]
SEEDS, FOLDS, ROUNDS = 2, 5, 3
COUNTS = {"labelled": 60, "unlabelled": 40, "test": 30}
SENTENCES = ["我今天很高兴", "你为什么不告诉我？", "他走了，再也不会回来。", "没什么，随便吧"]


def fabricate(root: Path, confidence: float = 3.0, frames: bool = True, seed: int = 0) -> Path:
    """Write every file that evaluate reads below root. confidence: how strongly the softmaxes favour the truth."""
    generator = np.random.default_rng(seed)
    for folder in ("data", "models/fusion", "models/self_training", "models/baselines", "reports"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy("params.yaml", root / "params.yaml")
    clips = pd.DataFrame([(f"{split}_{i:03d}", split) for split in ("test", "labelled", "unlabelled")
                          for i in range(COUNTS[split])], columns=["clip_id", "split"])
    actual = np.arange(len(clips)) * 7 % 6
    names = np.array(LABELS)[actual]
    labelled = (clips["split"] == "labelled").to_numpy()
    clips.assign(
        path=clips["clip_id"] + ".mp4", label=np.where(labelled, names, ""), group="", duration="2.0", bytes="1000",
        transcript=[SENTENCES[i % 4] for i in range(len(clips))], digest="0" * 64,
    )[["clip_id", "path", "split", "label", "transcript", "group", "duration", "bytes", "digest"]].to_csv(
        root / "data/manifest.csv", index=False)
    clips.loc[labelled, ["clip_id"]].assign(fold=np.arange(labelled.sum()) % FOLDS).to_csv(
        root / "data/folds.csv", index=False)
    clips.assign(label=names).loc[~labelled, ["clip_id", "label"]].to_csv(root / "data/truth.csv", index=False)
    rankings = [{"transcript": text, "ranking": LABELS[::-1], "clip_ids": clips["clip_id"][i::4].tolist()}
                for i, text in enumerate(SENTENCES)]
    (root / "data/rankings.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rankings))
    (root / "data/modalities.json").write_text(json.dumps({"modalities": [
        {"name": "hubert", "dimension": 4, "statistics": ["mean"], "per_fold": False, "leaky": False},
        {"name": "emovclip", "dimension": 3, "statistics": ["mean"], "per_fold": True, "leaky": False}]}))

    def softmax(classes: np.ndarray, *leading: int) -> np.ndarray:
        logits = generator.normal(size=(*leading, len(classes), 6)) + confidence * np.eye(6)[classes]
        powers = np.exp(logits)
        return (powers / powers.sum(-1, keepdims=True)).astype(np.float32)

    order = pd.concat([clips[labelled], clips[~labelled]])
    for folder in (root / "models/fusion", root / "models/self_training"):
        order.to_csv(folder / "clips.csv", index=False)
        save_file({"out_of_fold_best": softmax(actual[labelled], SEEDS),
                   "out_of_fold_last": softmax(actual[labelled], SEEDS),
                   "out_of_fold": softmax(actual[labelled], SEEDS),
                   "votes": softmax(actual[~labelled], SEEDS, FOLDS)}, folder / "predictions.safetensors")
        (folder / "ensemble.json").write_text(json.dumps({
            "modalities": [{"name": "hubert", "dimension": 4}, {"name": "emovclip", "dimension": 3}],
            "hidden": 8, "dropout": 0.3, "labels": LABELS, "folds": FOLDS, "seeds": SEEDS,
            "epoch": {"chosen": "best"}, "by_group": {"modalities": []}}))
    order.to_csv(root / "models/baselines/clips.csv", index=False)
    majority = np.full(len(clips), 0.5 / 5, np.float32)[:, None] * np.ones(6, np.float32)
    majority[:, 0] = 0.5
    save_file({"majority.out_of_fold": np.stack([majority[labelled]] * SEEDS),
               "majority.others": np.stack([majority[~labelled]] * SEEDS),
               "logistic_regression.out_of_fold": softmax(actual[labelled], SEEDS),
               "logistic_regression.others": softmax(actual[~labelled], SEEDS)},
              root / "models/baselines/predictions.safetensors")
    test = (clips["split"] == "test").to_numpy()
    save_file({"test_probabilities": softmax(actual[test], ROUNDS + 1, SEEDS)},
              root / "models/self_training/rounds.safetensors")
    pd.DataFrame([(round_, s, fold, epoch, 1.8 / (epoch + 1), 1.9 / (epoch + 1), 10.0 * epoch + fold)
                  for round_ in range(2) for s in range(SEEDS) for fold in range(FOLDS) for epoch in range(4)],
                 columns=["round", "seed", "fold", "epoch", "train_loss", "valid_loss", "valid_waf"]).to_csv(
        root / "models/fusion/curves.csv", index=False)
    pd.DataFrame([{"round": r, "waf_best_epoch": 70 + r, "waf_last_epoch": 68 + r, "waf_std": 0.5,
                   "added": 12 * (r > 0), **{f"added_{label}": 2 * (r > 0) for label in LABELS},
                   "mean_confidence": 0.9 if r else None, "pool_left": 70 - 12 * r} for r in range(ROUNDS + 1)]
                 ).to_csv(root / "reports/rounds.csv", index=False)
    pool = clips[~labelled].assign(label=names[~labelled])
    rows = []
    for s in range(SEEDS):
        for i, clip in enumerate(pool.sample(36, random_state=s).itertuples()):
            wrong = i % 9 == 0                      # 4 of 36
            rows.append((1 + i // 12, clip.clip_id, LABELS[(LABELS.index(clip.label) + wrong) % 6],
                         round(0.99 - 0.01 * i, 4), 0, s))
    pd.DataFrame(rows, columns=["round", "clip_id", "label", "confidence", "agreement", "seed"]).to_csv(
        root / "reports/pseudo_labels.csv", index=False)
    pd.DataFrame([("labelled_003", "extract_audio", "false", "no audio stream"),
                  ("test_001", "crop_faces", "true", "truncated <after> 3 frames")],
                 columns=["clip_id", "stage", "present", "reason"]).to_csv(root / "reports/skipped.csv", index=False)
    if frames:
        write_frames(root / "data/frames", clips["clip_id"].tolist(), generator)
    return root


def write_frames(folder: Path, clip_ids: list[str], generator: np.random.Generator) -> None:
    """A frames store: two portrait JPEGs a clip, smooth in colour; the first clip has none."""
    rows = []
    for i, clip_id in enumerate(clip_ids):
        coarse = generator.integers(0, 255, (5, 4, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (224, 280), interpolation=cv2.INTER_CUBIC)
        rows.append(Row(clip_id, None if i == 0 else [cv2.imencode(".jpg", image)[1].tobytes()] * 2))
    write_shard(folder / "shard-00000.h5", "images", rows, {"fingerprint": "fabricated"})
    write_index(folder, ["shard-00000.h5"])
