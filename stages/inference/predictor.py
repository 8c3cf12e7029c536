"""New clips through the pipeline's own parts: decoding, encoders, pooling and the trained ensemble of fold models."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stages.encoders.assembly import encode_work
from stages.engine.devices import pick_device, pick_workers
from stages.engine.encoding import Encode
from stages.engine.errors import PipelineError
from stages.engine.inputs import identity, row_inputs
from stages.engine.manifest import Source
from stages.engine.store import Row
from stages.engine.work import Input
from stages.engine.workers import Workers
from stages.evaluation.calibration import tempered
from stages.fusion.ensemble import Ensemble, load_ensemble
from stages.fusion.features import GROUP_MINIMUM, Inputs, Modality, group_statistics
from stages.inference.clips import digest_of, name_of
from stages.inference.media import Decoding, media_functions
from stages.inference.texts import Texts, find_texts
from stages.inference.trained import Trained


@dataclass(frozen=True)
class Prediction:
    """What is known of one clip. Class order as Ensemble.label_names, modality order as its architecture's."""

    clip: Source
    probabilities: np.ndarray | None  # (L,) mean of all softmaxes, under the temperature; None where nothing is present
    votes: int  # models that call it as the mean does
    attention: np.ndarray  # (modalities,) mean of the models' raw attention scores
    present: tuple[bool, ...]  # by modality
    transcript: str
    ranking: list[str] | None
    reason: str  # what is absent or partial, and why


def predict(trained: Trained, clips: Sequence[Source], given: Mapping[Source, str]) -> Iterator[Prediction]:
    """Every clip's prediction, in order, each chunk of clips as soon as it is through; `given` are transcripts. Models
    with modalities that are standardised by group predict when all clips are through: see `grouped`.

    Raises PipelineError for what is wrong with the models or the machine; a clip that can't be used is a Prediction.
    """
    p = trained.params
    device = pick_device(p.runtime.device)
    functions = media_functions(p, trained.media)
    workers = Workers(pick_workers(p.runtime), p.runtime.clip_timeout_seconds)
    try:
        decoding = Decoding(clips, functions, workers)  # begins here, while the models are loaded
        texts = find_texts(trained, clips, given, workers)
        ensemble, temperature = load_ensemble(trained.ensemble), trained.temperature()
        encoders = open_encoders(trained, device)
        found: list[Encoded] = []  # of ensembles with groups all clips, whose common mean is known at the end
        for part, media in decoding:
            features = {}
            for name, encoder in encoders.items():
                medium = p.extractors[name].input
                features[name] = encoder.rows(
                    row_inputs(medium, media[medium], p.audio.sample_rate) if medium in media
                    else [Input(name_of(clip), texts.item(clip, medium), b"") for clip in part]
                )
            said = [reasons({name: rows[i].reason for name, rows in {**media, **features}.items()})
                    for i in range(len(part))]
            pooled = {name: [replace(row, values=None) for row in rows] for name, rows in features.items()}
            found.append(Encoded(part, pooled, said))
            if not ensemble.groups:
                yield from fuse(ensemble, temperature, [found.pop()], texts, device)
        yield from fuse(ensemble, temperature, found, texts, device)
    finally:
        workers.close()


@dataclass(frozen=True)
class Encoded:
    """A chunk of clips as encoders leave it."""

    clips: Sequence[Source]
    features: Mapping[str, Sequence[Row]]  # by modality, a row for each clip
    reasons: Sequence[str]  # what is amiss with each clip


def no_prediction(trained: Trained, clip: Source, reason: str) -> Prediction:
    """What is said of a clip that is not even decoded."""
    count = len(trained.modalities)
    return Prediction(clip, None, 0, np.zeros(count), (False,) * count, "", None, reason)


def open_encoders(trained: Trained, device: str) -> dict[str, Encode]:
    """The encoder of every modality, on the device. Raises PipelineError naming the modality whose encoder fails."""
    encoders = {}
    for name in trained.modalities:
        encoders[name] = encode_work(name, trained.params.extractors[name], identity, trained.params.runtime)
        try:
            encoders[name].open(device)
        except PipelineError as error:
            raise PipelineError(f"modality {name}: {error}") from None
    return encoders


# ---------------------------------------------------------------- the fusion


def fuse(
    ensemble: Ensemble, temperature: float, parts: Sequence[Encoded], texts: Texts, device: str
) -> Iterator[Prediction]:
    """The ensemble's predictions for chunks of clips, which are all that a new group consists of."""
    clips, said = ([x for part in parts for x in getattr(part, key)] for key in ("clips", "reasons"))
    if not clips:
        return
    names = ensemble.architecture.modalities
    features = {name: [row for part in parts for row in part.features[name]] for name in names}
    inputs = fusion_inputs(ensemble, [name_of(clip) for clip in clips], features, device)
    if ensemble.groups:
        ensemble, inputs = grouped(ensemble, inputs, clips)
    softmax, scores = ensemble.predict_with_attention(inputs, np.arange(len(clips)))
    mean, attention = softmax.mean(dim=1).mean(dim=0), scores.mean(dim=(0, 1)).numpy()
    votes = (softmax.argmax(dim=-1) == mean.argmax(dim=-1)).sum(dim=(0, 1)).tolist()
    probabilities = tempered(mean.numpy(), temperature)
    present = inputs.present.cpu().numpy()
    for i, clip in enumerate(clips):
        usable = bool(present[i].any())
        yield Prediction(
            clip,
            probabilities[i] if usable else None,
            votes[i] if usable else 0,
            attention[i],
            tuple(present[i].tolist()),
            texts.transcript(clip),
            texts.ranking(clip),
            said[i],
        )


def reasons(by_source: Mapping[str, str]) -> str:
    """`audio, frames: what is wrong with them; baichuan: no transcript`; sources with the same reason are joined."""
    sources: dict[str, list[str]] = {}
    for source, reason in by_source.items():
        if reason:
            sources.setdefault(reason, []).append(source)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in sources.items())


def fusion_inputs(
    ensemble: Ensemble, clip_ids: list[str], features: Mapping[str, Sequence[Row]], device: str
) -> Inputs:
    """The clips' pooled features as the fusion takes them. Raises PipelineError for features of another dimension."""
    count = len(clip_ids)
    modalities = tuple(_modality(ensemble, name, features[name], device) for name in ensemble.architecture.modalities)
    nowhere = np.full(count, -1)
    return Inputs(clip_ids, np.full(count, "test"), nowhere, nowhere, ensemble.label_names, modalities)


def grouped(ensemble: Ensemble, inputs: Inputs, clips: Sequence[Source]) -> tuple[Ensemble, Inputs]:
    """Every clip's group: the corpus's own clips, known by what they hold, are in the group that they were trained in;
    all others make one further group [choice], whose mean and deviation the ensemble is given, and stderr tells of.
    """
    new = ensemble.group_count
    present = inputs.present.any(dim=1).tolist()
    numbers = np.array([ensemble.members.get(digest_of(clip), new) if here else -1
                        for clip, here in zip(clips, present, strict=True)])
    inputs = replace(inputs, groups=np.where(numbers == new, 0, -1))
    found = group_statistics(inputs, list(ensemble.groups))
    statistics = {}
    for name, own in ensemble.groups.items():
        mean, scale = found.get(name) or (torch.zeros_like(t[:, :1]) for t in own)  # a scale of 0: by the fold
        statistics[name] = (torch.cat([own[0], mean.cpu()], dim=1), torch.cat([own[1], scale.cpu()], dim=1))
    if count := int((numbers == new).sum()):
        names = ", ".join(ensemble.groups)
        print(f"predict: {count} clips that the corpus does not have count as one group, by whose mean and deviation "
              f"{names} are standardised: give those of one group (one speaker, as the corpus has it) at a time"
              if found else
              f"warning: predict: {count} clips that the corpus does not have are too few for a mean of their own: "
              f"{names} are standardised by the training part, which the models know little of; give {GROUP_MINIMUM} "
              f"or more of one group (one speaker, as the corpus has it) at a time", file=sys.stderr)
    return replace(ensemble, groups=statistics), replace(inputs, groups=numbers)


def _modality(ensemble: Ensemble, name: str, rows: Sequence[Row], device: str) -> Modality:
    """Centred and scaled by the folds' own statistics, which keeps float32's digits for what tells clips apart."""
    mean, scale = ensemble.statistics[name]  # (F, D)
    present = torch.tensor([row.present for row in rows])
    found = [_vector(row) for row in rows if row.present]
    folds, dimension = mean.shape
    if found and len(found[0]) not in (dimension, folds * dimension):  # the latter: an encoder that is trained per fold
        raise PipelineError(f"modality {name}: the encoder gives {len(found[0])} features, but the models were trained "
                            f"on {dimension}; params.yaml or the checkpoint changed since: run dvc repro")
    groups = len(found[0]) // dimension if found else 1
    raw = torch.from_numpy(np.stack(found)).unflatten(1, (groups, dimension)).transpose(0, 1) if found else None
    centre, spread = (t if groups > 1 else t.mean(dim=0, keepdim=True) for t in (mean, scale))
    matrix = torch.zeros(groups, len(rows), dimension)
    if raw is not None:
        matrix[:, present] = (raw - centre[:, None]) / spread[:, None]
    on_device: list[Tensor] = [tensor.to(device) for tensor in (matrix, centre, spread, present)]
    return Modality(name, *on_device)


def _vector(row: Row) -> np.ndarray:
    """Mean, and variance where the modality has one, as the fusion's columns stand."""
    return np.concatenate([statistic for statistic in (row.mean, row.var) if statistic is not None])
