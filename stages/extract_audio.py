"""Stage extract_audio: every clip's sound as mono PCM at audio.sample_rate (24 kHz [paper]) in data/audio/."""

from functools import partial
from pathlib import Path

from stages.engine.errors import run_stage
from stages.engine.params import load
from stages.engine.per_clip import write_media_store
from stages.engine.store import Row
from stages.media.audio import load_audio


def audio_row(clip_id: str, path: str, sample_rate: int) -> Row:
    """int16 samples of one clip. Raises Skip where there is no usable audio stream."""
    samples, note = load_audio(path, sample_rate)
    return Row(clip_id, values=samples, reason=note)


def main() -> None:
    p = load()
    rate = p.audio.sample_rate
    write_media_store("extract_audio", Path("data/audio"), "audio", partial(audio_row, sample_rate=rate), p,
                  {"sample_rate": rate})


if __name__ == "__main__":
    run_stage(main)
