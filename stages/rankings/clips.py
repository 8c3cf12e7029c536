"""A clip as a question: its frames as images and its sound, beside the words.

In the forms of OpenAI's chat completions, which vLLM takes too: image_url with a data URL and input_audio with base64
WAV (platform.openai.com/docs/guides/images-vision and .../audio; docs.vllm.ai "Multimodal Inputs").
"""

import base64
import io
import json
import math
import wave
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.engine.errors import Skip
from stages.engine.manifest import Source
from stages.engine.params import Rankings
from stages.rankings import prompt
from stages.rankings.chat import OVERHEAD_TOKENS, Chat, Messages, Refused, allowance_of

SAMPLE_RATE = 16_000  # Hz; what speech encoders take
QUALITY = 85  # JPEG
# No vision encoder in use makes more tokens than one per 14 x 14 pixels, no audio encoder more than one per 20 ms; the
# estimate takes a quarter and half of that (Qwen2.5-Omni: 28 x 28 pixels and 40 ms)
PATCH, TOKENS_PER_SECOND = 14, 50


def form(rankings: Rankings) -> str:
    """How a clip is sent, as far as it changes the answer."""
    return f"{rankings.frames} frames of {rankings.frame_side} pixels, sound at {SAMPLE_RATE} Hz"


def item_of(digest: str, transcript: str) -> str:
    """How the cache knows a clip: the file's digest and its words."""
    return json.dumps({"clip": digest, "transcript": transcript}, ensure_ascii=False)


def transcript_of(item: str) -> str:
    return json.loads(item)["transcript"]


def load(path: Source, frames: int, side: int) -> tuple[list[bytes], np.ndarray | None]:
    """JPEG frames, their short side `side` pixels at most, and int16 samples at SAMPLE_RATE.

    A clip may lack either; raises Skip where it has none.
    """
    from stages.media.audio import load_audio
    from stages.media.frames import sample_frames

    images: list[bytes] = []
    sound, reasons = None, []
    try:
        images = sample_frames(path, frames, side, QUALITY)[0]
    except Skip as skip:
        reasons.append(str(skip))
    try:
        sound = load_audio(path, SAMPLE_RATE)[0]
    except Skip as skip:
        reasons.append(str(skip))
    if not images and sound is None:
        raise Skip("; ".join(reasons))
    return images, sound


def pixels(image: bytes) -> np.ndarray:
    """RGB uint8 (height, width, 3) of a JPEG frame."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def wav(samples: np.ndarray) -> bytes:
    """Mono 16-bit WAV."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


class ClipChat(Chat):
    """A chat about clips. `paths`: where the clip of each item lies."""

    def __init__(self, *arguments: Any, paths: Mapping[str, Source], rankings: Rankings, **options: Any):
        super().__init__(*arguments, **options)
        self._paths, self._rankings = paths, rankings

    def question(self, item: str) -> Messages:
        """Raises Refused for a clip that can't be decoded or is too large to be sent."""
        if item not in self._paths:
            raise Refused("the clip is not one of this corpus")
        try:
            images, sound = load(self._paths[item], self._rankings.frames, self._rankings.frame_side)
        except Skip as skip:
            raise Refused(f"the clip can't be used ({skip})") from None
        system, user = prompt.messages(transcript_of(item), self.labels, self.prompt_version, "clip")
        content: list[dict[str, Any]] = [{"type": "text", "text": user["content"]}]
        for image in images:
            url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        if sound is not None:
            data = base64.b64encode(wav(sound)).decode()
            content.append({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})
        size = sum(len(json.dumps(part)) for part in content) / 1e6
        if size > self._rankings.max_clip_mb:
            raise Refused(f"the clip's images and sound are {size:.1f} MB, more than rankings.max_clip_mb allows")
        return [system, user | {"content": content}]

    def worst_tokens(self, body: dict[str, Any]) -> tuple[int, int]:
        words, media = _apart(body["messages"])
        text = len(json.dumps(body | {"messages": words}, ensure_ascii=False).encode())
        return text + OVERHEAD_TOKENS + sum(map(_most_tokens, media)), allowance_of(body)

    def guess_tokens(self, messages: Messages) -> int:
        words, media = _apart(messages)
        return super().guess_tokens(words) + sum(_most_tokens(part) // 3 for part in media)

    def estimate(self, items: Sequence[str]) -> tuple[int, int]:
        """As many input tokens each as the first that can be used: decoding all would take as long as asking."""
        for item in items:
            try:
                one = self.guess_tokens(self.question(item))
            except Refused:
                continue
            return len(items) * one, self.estimate_output(items)
        return 0, 0


def _apart(messages: Messages) -> tuple[Messages, list[dict[str, Any]]]:
    """The messages with text alone, and their images and sounds."""
    words, media = [], []
    for message in messages:
        parts = message["content"]
        if isinstance(parts, list):
            media += [part for part in parts if part["type"] != "text"]
            message = message | {"content": "".join(part.get("text", "") for part in parts)}
        words.append(message)
    return words, media


def _most_tokens(part: dict[str, Any]) -> int:
    """What an image or a sound can take at most."""
    if part["type"] == "input_audio":
        seconds = len(part["input_audio"]["data"]) * 3 / 4 / 2 / SAMPLE_RATE
        return math.ceil(seconds * TOKENS_PER_SECOND)
    from PIL import Image

    content = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    width, height = Image.open(io.BytesIO(content)).size  # reads the header only
    return math.ceil(width / PATCH) * math.ceil(height / PATCH) + OVERHEAD_TOKENS
