"""Stage extract_audio: every clip's sound as mono PCM at audio.sample_rate (24 kHz [paper]) in data/audio/."""

from pathlib import Path

from stages.engine.errors import run_stage
from stages.engine.params import load
from stages.engine.per_clip import write_media_store
from stages.media.audio import audio_decoder


def main() -> None:
    p = load()
    write_media_store("extract_audio", Path("data/audio"), "audio", audio_decoder, p,
                      {"sample_rate": p.audio.sample_rate})


if __name__ == "__main__":
    run_stage(main)
