"""params.yaml, checked whole: every key known, every value of the right type and range.

Every stage loads the whole file, so that a mistake in `fusion` is reported before hours of extraction.
There are no defaults and no coercion: what a stage sees is what the file, and so DVC, says.
YAML 1.2 through ruamel.yaml as DVC reads it (`off` is a string, 1e-4 a number).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from stages.engine.errors import PipelineError
from stages.engine.yaml_file import describe, read_yaml

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Dtype = Literal["float32", "bfloat16", "float16"]
Quality = Annotated[int, Field(ge=1, le=100)]
Standardize = Literal["none", "fold", "group"]
P = TypeVar("P", bound=BaseModel)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Labels(Section):
    """What is known of any corpus, of clips or of feature files."""

    adapter: str
    labels: Annotated[list[str], Field(min_length=2)]

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"corpus.labels: found {self.labels}, expected distinct labels")
        return self


class Corpus(Labels):
    adapter: Literal["demo", "mer2023", "mer2024", "mer2025", "mer2026", "meld", "iemocap", "cremad", "ravdess",
                     "emodb", "csv"]
    path: str
    truth: str | None
    max_bad_fraction: Fraction
    shard_size: Positive


class ImportedCorpus(Labels):
    adapter: Literal["features"]


class Demo(Section):
    seed: NonNegative
    labelled: Annotated[int, Field(ge=60)]
    unlabelled: Annotated[int, Field(ge=30)]
    test: Annotated[int, Field(ge=30)]


class Folds(Section):
    count: Literal["groups"] | Annotated[int, Field(ge=2)]
    seed: NonNegative


class Audio(Section):
    sample_rate: Annotated[int, Field(ge=8000, le=192000)]


class Transcribe(Section):
    checkpoint: str | None
    revision: str | None
    language: str | None
    dtype: Dtype


class Frames(Section):
    per_clip: Positive | None
    short_side: Annotated[int, Field(ge=16)]
    quality: Quality


class Faces(Section):
    detector: Literal["centerface", "openface"]
    openface_binary: str | None
    stride: Positive
    detect_every: Positive
    size: Annotated[int, Field(ge=16)]
    min_confidence: Fraction
    quality: Quality


class Price(Section):
    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class Rankings(Section):
    """One voice, and in `providers` further ones: what differs from the first, by name."""

    provider: Literal["lexicon", "openai", "transformers"]
    input: Literal["transcript", "clip"]
    model: str
    revision: str | None
    base_url: Annotated[str, Field(pattern=r"^https?://[^/@]+(/[^@]*)?$")] | None  # no user:key@, which logs would show
    api_key_env: str
    batch: bool
    reasoning_effort: str | None
    max_output_tokens: Annotated[int, Field(ge=50)]
    prompt_version: Literal["v1"]
    max_cost_usd: Annotated[float, Field(ge=0)]
    price_per_million: Price
    dtype: Dtype
    frames: Positive
    frame_side: Annotated[int, Field(ge=16)]
    max_clip_mb: PositiveFloat
    providers: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], dict[str, Any]]

    @model_validator(mode="after")
    def _voices_are_whole(self) -> Self:
        if self.provider == "lexicon" and self.input == "clip":
            raise ValueError("rankings.input: found 'clip', expected 'transcript' for provider lexicon")
        for name, changes in self.providers.items():
            if name == "ranking":
                raise ValueError("rankings.providers.ranking: the name is taken by the first voice; choose another")
            for key in changes:
                if key in ("providers", "max_cost_usd"):
                    raise ValueError(f"rankings.providers.{name}.{key}: holds for all voices; set rankings.{key}")
            try:
                self.voice(name)
            except ValidationError as error:
                raise ValueError(f"rankings.providers.{name}.{describe(error)}") from None
        return self

    def voice(self, name: str) -> "Rankings":
        """A further voice as if it were alone."""
        return Rankings.model_validate(self.model_dump() | {"providers": {}} | self.providers[name])


class Extractor(BaseModel):
    """One row of `extractors`. What is not named here belongs to the encoder's own Config."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    encoder: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    input: Literal["audio", "faces", "frames", "transcripts.csv", "rankings.jsonl"]
    depends_on: str
    keep_frames: bool

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def loads(self) -> dict[str, str]:
        """The options that name what the encoder loads: a folder, or something published."""
        return {key: value for key in ("checkpoint", "prompts") if isinstance(value := self.options.get(key), str)}


class EmoVCLIP(Section):
    checkpoint: str
    revision: str | None
    dtype: Dtype
    scope: Literal["fold", "all"]
    prompts: NonNegative
    depth: Positive
    template: Annotated[str, Field(pattern=r"\{label\}")]
    frames: Positive
    epochs: Positive
    batch_size: Positive
    learning_rate: PositiveFloat
    warmup_epochs: NonNegative
    weight_decay: Annotated[float, Field(ge=0)]
    label_smoothing: Probability
    seed: NonNegative


class Fusion(Section):
    modalities: Annotated[list[str], Field(min_length=1)]
    architecture: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    standardize: Standardize | dict[str, Standardize]
    modality_dropout: Probability
    keep_one: bool
    segments: Annotated[int, Field(ge=2)]
    hidden: Positive
    dropout: Probability
    epochs: Positive
    epoch: Literal["best", "common", "last"]
    batch_size: Positive
    learning_rate: PositiveFloat
    optimizer: Literal["adam", "adamw"]
    weight_decay: Annotated[float, Field(ge=0)]
    class_weights: Literal["none", "balanced"]
    label_smoothing: Probability
    feature_noise: Annotated[float, Field(ge=0)]
    mixup: Annotated[float, Field(ge=0)]
    seeds: Annotated[list[NonNegative], Field(min_length=1)]

    def standardized_by(self, modality: str) -> Standardize:
        """What `standardize` says of one modality; in a mapping those that it does not name are by fold."""
        return self.standardize if isinstance(self.standardize, str) else self.standardize.get(modality, "fold")

    @property
    def by_group(self) -> list[str]:
        """Modalities in which validation and test clips are standardised among themselves: that is transductive."""
        return [name for name in self.modalities if self.standardized_by(name) == "group"]


class Pretraining(Section):
    method: Literal["off", "contrastive"]
    epochs: Positive
    temperature: PositiveFloat
    batch_size: Annotated[int, Field(ge=2)]
    learning_rate: PositiveFloat


class NestedCV(Section):
    run: bool


class SelfTraining(Section):
    rounds: NonNegative
    k: Positive
    voters: Literal["ensemble", "fold"]
    pool: Literal["accumulate", "redraw"]
    threshold: Annotated[
        Annotated[Fraction, Tag("[number]")] | Annotated[dict[str, Fraction], Tag("[by label]")],
        Discriminator(lambda value: "[by label]" if isinstance(value, dict) else "[number]"),
    ]
    agreement: NonNegative
    voices: list[str]
    include_test: Literal["auto"] | bool
    select: Literal["last", "best_cv"]

    @model_validator(mode="after")
    def _rounds_are_chosen_by_what_is_known(self) -> Self:
        if self.select == "best_cv" and self.voters == "ensemble":
            raise ValueError("self_training.select: found 'best_cv', expected 'last' with self_training.voters: "
                             "ensemble, whose cross-validation has seen its validation clips' labels; set voters: fold")
        if len(set(self.voices)) != len(self.voices):
            raise ValueError(f"self_training.voices: found {self.voices}, expected each name once")
        return self

    def threshold_of(self, label: str) -> float:
        return self.threshold.get(label, 0.0) if isinstance(self.threshold, dict) else self.threshold


class Evaluate(Section):
    bootstrap: Positive
    seed: NonNegative
    missing: Literal["report", "off"]
    calibrate: Literal["none", "temperature"]


class Device(Section):
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


class Runtime(Device):
    workers: Literal["auto"] | Positive
    executor: Literal["local", "ray"]
    ray_address: Annotated[str, Field(pattern=r"^(auto|[^\s:/]+:\d+)$")]
    ray_gpus_per_task: PositiveFloat
    batch_memory_mb: Literal["auto"] | Positive
    gradient_checkpointing: Literal["auto"] | bool
    clip_timeout_seconds: PositiveFloat
    keep_parts: bool

    @model_validator(mode="after")
    def _shares_are_of_one_gpu(self) -> Self:
        share = self.ray_gpus_per_task
        if share > 1 and share % 1:
            raise ValueError(f"runtime.ray_gpus_per_task: found {share}, expected at most 1, or whole GPUs")
        return self


class FusionParams(Section):
    """What the stages from split_folds on read."""

    corpus: Labels
    folds: Folds
    fusion: Fusion
    pretraining: Pretraining
    nested_cv: NestedCV
    self_training: SelfTraining
    evaluate: Evaluate
    runtime: Device

    @model_validator(mode="after")
    def _modalities_are_distinct(self) -> Self:
        if len(set(self.fusion.modalities)) != len(self.fusion.modalities):
            raise ValueError(f"fusion.modalities: found {self.fusion.modalities}, expected each name once")
        return self

    @model_validator(mode="after")
    def _self_training_fits(self) -> Self:
        p, modalities = self.self_training, len(self.fusion.modalities)
        if p.agreement > modalities + len(p.voices):
            raise ValueError(f"self_training.agreement: found {p.agreement}, expected at most the number of "
                             f"fusion.modalities ({modalities}) and self_training.voices ({len(p.voices)}) together")
        for label in p.threshold if isinstance(p.threshold, dict) else ():
            if label not in self.corpus.labels:
                raise ValueError(f"self_training.threshold: found {label!r}, expected some of corpus.labels "
                                 f"{self.corpus.labels}")
        return self

    @property
    def transductive(self) -> bool:
        """Whether test clips, without their labels, may get pseudo-labels. auto: in MER's challenges alone, which give
        the test clips out to be used so."""
        include = self.self_training.include_test
        included = self.corpus.adapter.startswith("mer") if include == "auto" else include
        return included and self.self_training.rounds > 0

    @model_validator(mode="after")
    def _standardized_modalities_exist(self) -> Self:
        known = sorted(self.known_modalities())
        named = self.fusion.standardize if isinstance(self.fusion.standardize, dict) else {}
        for name in named:
            if name not in known:
                raise ValueError(f"fusion.standardize: found {name!r}, expected some of {known}")
        return self

    def known_modalities(self) -> Iterable[str]:
        return self.fusion.modalities


class ImportedParams(FusionParams):
    """The whole params.yaml of a folder that stages.commands.import_features made."""

    corpus: ImportedCorpus

    @model_validator(mode="after")
    def _there_are_no_voices(self) -> Self:
        if self.self_training.voices:
            raise ValueError(f"self_training.voices: found {self.self_training.voices}, expected []: a folder of "
                             f"imported features has no rankings")
        return self


class Params(FusionParams):
    """The whole params.yaml of the repository."""

    corpus: Corpus
    demo: Demo
    audio: Audio
    transcribe: Transcribe
    frames: Frames
    faces: Faces
    rankings: Rankings
    extractors: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Extractor]
    emovclip: EmoVCLIP
    runtime: Runtime

    @model_validator(mode="after")
    def _modalities_exist(self) -> Self:
        for name in self.fusion.modalities:
            if name not in self.extractors:
                raise ValueError(f"fusion.modalities: found {name!r}, expected some of {sorted(self.extractors)}")
        return self

    @model_validator(mode="after")
    def _voices_exist(self) -> Self:
        known = ["ranking", *self.rankings.providers]
        for name in self.self_training.voices:
            if name not in known:
                raise ValueError(f"self_training.voices: found {name!r}, expected some of {known}: ranking is the "
                                 f"voice that `rankings` describes, others are keys of rankings.providers")
        return self

    def known_modalities(self) -> Iterable[str]:
        return self.extractors


def load(path: str | Path = "params.yaml") -> Params:
    """Read and check the parameters. Raises PipelineError naming the key, what was found and what is expected."""
    return _validated(Params, path, read_yaml(path))


def load_fusion(path: str | Path = "params.yaml") -> FusionParams:
    """The same for the stages from split_folds on, which also run on the short params.yaml of imported features."""
    return check_fusion(read_yaml(path), path)


def check_fusion(values: Any, path: str | Path) -> FusionParams:
    """The same of a file's content."""
    corpus = values.get("corpus") if isinstance(values, dict) else None
    imported = isinstance(corpus, dict) and corpus.get("adapter") == "features"
    return _validated(ImportedParams if imported else Params, path, values)


def _validated(schema: type[P], path: str | Path, values: Any) -> P:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise PipelineError(f"{path}: {describe(error)}") from None
