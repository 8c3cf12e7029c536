"""Spoken Mandarin by espeak-ng's library (the espeakng-loader wheel carries it with its voices), through ctypes.

Pitch, range, rate and loudness follow the emotion; then vocal effort (spectral tilt, roughness, tremor) and noise.
"""

import _ctypes
import ctypes
from dataclasses import dataclass, replace

import numpy as np

RATE = 22050  # Hz, espeak-ng's own
# from espeak-ng's speak_lib.h
AUDIO_OUTPUT_SYNCHRONOUS, DONT_EXIT, CHARS_UTF8 = 2, 0x8000, 1
SPEED, VOLUME, PITCH, RANGE = 1, 2, 3, 4
VOICES = ("cmn+f2", "cmn+m3", "cmn+f4", "cmn+m7")
NOISE_DB = (-38.0, -26.0)  # of the speech's level


@dataclass(frozen=True)
class Manner:
    """How an emotion sounds [choice, after what studies of vocal emotion agree on]."""

    speed: int  # words per minute
    pitch: int  # 0..99
    range: int  # 0..99
    volume: int  # 0..200
    tilt: float  # > 0 brighter (vocal effort), < 0 muffled
    rough: float  # overdrive
    tremor: float  # depth of a 7 Hz tremor


MANNERS = {
    "neutral": Manner(185, 42, 35, 100, 0.0, 0.0, 0.0),
    "anger": Manner(235, 35, 85, 160, 0.9, 6.0, 0.0),
    "happiness": Manner(215, 72, 95, 120, 0.4, 0.0, 0.0),
    "sadness": Manner(140, 22, 10, 60, -0.9, 0.0, 0.1),
    "worry": Manner(260, 55, 15, 80, -0.4, 0.0, 0.75),
    "surprise": Manner(175, 97, 99, 130, 0.5, 1.5, 0.0),
}


def say(text: str, voice: str, manner: Manner) -> np.ndarray:
    """int16 samples at RATE. Raises RuntimeError if the library refuses.

    The library is loaded anew for each utterance: it never resets the phases of its oscillators, and adds noise
    and jitter from random numbers seeded by the clock. So the same text gives the same samples.
    """
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    chunks: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int) -> int:
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    try:
        data = espeakng_loader.get_data_path().encode()
        if library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data, DONT_EXIT) < 0:
            raise RuntimeError(f"espeak-ng can't initialise from {data.decode()}")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        ctypes.CDLL(None).srand(1)
        library.espeak_SetSynthCallback(collect)
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice}")
        settings = {SPEED: manner.speed, VOLUME: manner.volume, PITCH: manner.pitch, RANGE: manner.range}
        for parameter, value in settings.items():
            library.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode() + b"\0"
        if library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded)), 0, 0, 0, CHARS_UTF8, None, None) != 0:
            raise RuntimeError(f"espeak-ng can't speak {text!r}")
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    return np.concatenate(chunks)


def speak(text: str, emotion: str, rng: np.random.Generator) -> np.ndarray:
    """The sentence in the emotion's manner: float32 in -1..1 at RATE, with a margin of room noise around it."""
    manner = MANNERS[emotion]
    varied = replace(
        manner,
        speed=int(manner.speed * rng.uniform(0.93, 1.07)),
        pitch=int(np.clip(manner.pitch + rng.integers(-5, 6), 0, 99)),
        range=int(np.clip(manner.range + rng.integers(-5, 6), 0, 99)),
    )
    voice = VOICES[int(rng.integers(len(VOICES)))]
    waveform = say(text, voice, varied).astype(np.float32) / 32768
    waveform = colour(waveform, varied)
    margin = [int(RATE * rng.uniform(0.05, 0.2)) for _ in range(2)]
    waveform = np.pad(waveform, margin)
    level = float(np.sqrt(np.mean(waveform**2))) * 10 ** (rng.uniform(*NOISE_DB) / 20)
    return np.clip(waveform + level * rng.standard_normal(len(waveform)), -1, 1).astype(np.float32)


def colour(waveform: np.ndarray, manner: Manner) -> np.ndarray:
    """Vocal effort: a first-order tilt of the spectrum, overdrive and a tremor of the amplitude."""
    if manner.tilt > 0:
        waveform = waveform - manner.tilt * np.concatenate([[0], waveform[:-1]])
    elif manner.tilt < 0:
        kernel = abs(manner.tilt) ** np.arange(32)
        waveform = np.convolve(waveform, kernel / kernel.sum())[: len(waveform)]
    peak = max(float(np.abs(waveform).max()), 1e-6)
    waveform = waveform / peak
    if manner.rough:
        waveform = np.tanh(manner.rough * waveform) / np.tanh(manner.rough)
    if manner.tremor:
        time = np.arange(len(waveform)) / RATE
        waveform = waveform * (1 - manner.tremor * (0.5 + 0.5 * np.sin(2 * np.pi * 7 * time)))
    return (waveform * manner.volume / 250).astype(np.float32)
