"""Rankings of clips by a model that sees and hears, on this machine: each label scored as the answer's first entry.

score(label) = mean log-probability of the label's tokens after `{"ranking": ["`, as in transformers_provider, given the
clip's frames as images, its sound and its words. For checkpoints of the Qwen2.5-Omni and Qwen3-Omni kinds, whose
processor takes all three at once; of those only the thinker is loaded, not the talker, which speaks. A clip at a time:
its prompt runs once, and the labels share its key-value cache as a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stages.encoders.checkpoints import DTYPES, load_model, load_part, read_json, resolve
from stages.engine.errors import PipelineError, Skip, one_line
from stages.engine.manifest import Source
from stages.engine.params import Rankings
from stages.rankings import clips, prompt
from stages.rankings.cache import Answer
from stages.rankings.transformers_provider import OPENING, by_score, encode_labels, mean_log_probability

THINKERS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


class Omni:
    """The provider `transformers` with `input: clip`. Raises PipelineError as the loaders do."""

    def __init__(self, rankings: Rankings, labels: Sequence[str], device: str, paths: Mapping[str, Source]):
        import transformers

        checkpoint = rankings.model
        folder = resolve(checkpoint, rankings.revision)
        kind = str(read_json(folder / "config.json", checkpoint).get("model_type")).removesuffix("_thinker")
        if kind not in THINKERS:
            raise PipelineError(
                f"rankings.model: checkpoint {checkpoint} is a {kind}, expected one of {', '.join(THINKERS)} for "
                f"input: clip; other models through a server (rankings.provider: openai)"
            )
        self.labels, self._rankings = labels, rankings
        self._checkpoint, self._device, self._paths = checkpoint, device, paths
        self._processor = load_part("AutoProcessor", folder, checkpoint)
        thinker = getattr(transformers, THINKERS[kind])
        self._model = load_model(thinker, folder, checkpoint, DTYPES[rankings.dtype]).to(device)

    def rank(self, items: Sequence[str], record: Callable[[Sequence[Answer]], None]) -> None:
        """Hand every item's answer to `record`; a clip that can't be used has the reason in place of a ranking."""
        from tqdm import tqdm

        for item in tqdm(items, desc="rank_emotions", unit="clip", mininterval=1):
            try:
                inputs, labels = self.encode(item)
            except Skip as skip:
                record([Answer(item, None, reason=f"the clip can't be used ({skip})")])
                continue
            scores = self.scores(inputs, labels).tolist()
            record([Answer(item, by_score(self.labels, scores), inputs["input_ids"].shape[1])])

    def encode(self, item: str) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
        """The model's inputs up to where the labels differ, and each label's tokens after it. Raises Skip."""
        from PIL import Image

        r = self._rankings
        images, sound = clips.load(self._paths[item], r.frames, r.frame_side)
        frames = [Image.fromarray(clips.pixels(image)) for image in images]
        system, user = prompt.messages(clips.transcript_of(item), self.labels, r.prompt_version, "clip")
        media = [{"type": "image"}] * len(frames) + ([] if sound is None else [{"type": "audio"}])
        content: list[dict[str, Any]] = [{"type": "text", "text": user["content"]}, *media]
        conversation = [
            {"role": "system", "content": [{"type": "text", "text": system["content"]}]},
            {"role": "user", "content": content},
        ]
        try:
            text = self._processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            # The placeholders of images and sound stand before the answer: tokenized unexpanded, the labels part alike.
            _, labels = encode_labels(self._processor.tokenizer, text, self.labels, special=False)
            given: dict[str, Any] = {"images": frames} if frames else {}
            if sound is not None:
                given |= {"audio": [sound.astype("float32") / 32768], "sampling_rate": clips.SAMPLE_RATE}
            inputs = self._processor(text=f'{text}{OPENING}{self.labels[0]}"', return_tensors="pt", **given)
        except Exception as error:  # jinja's own, or whatever a processor raises
            raise PipelineError(f"checkpoint {self._checkpoint}: its processor fails: {one_line(error)}") from None
        for name in ("input_ids", "attention_mask"):
            inputs[name] = inputs[name][:, : -len(labels[0])]
        return {name: value.to(self._device) for name, value in inputs.items()}, labels

    @torch.inference_mode()
    def scores(self, inputs: dict[str, torch.Tensor], labels: Sequence[Sequence[int]]) -> torch.Tensor:
        """(labels,) float32: mean log-probability of each label's tokens. Raises PipelineError if not finite."""
        longest = max(map(len, labels))
        # Zeros behind a shorter label are never read, and a causal model does not see them before it ends.
        tokens = torch.tensor([[*label] + [0] * (longest - len(label)) for label in labels], device=self._device)
        lengths = torch.tensor([len(label) for label in labels], device=self._device)
        floats = {n: v.to(self._model.dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        first = self._model.model(**floats, use_cache=True)
        hidden = first.last_hidden_state[:, -1:].repeat_interleave(len(labels), dim=0)
        if longest > 1:
            past = first.past_key_values
            past.batch_repeat_interleave(len(labels))
            rest = self._model.model(input_ids=tokens[:, :-1], past_key_values=past, use_cache=True)
            hidden = torch.cat([hidden, rest.last_hidden_state], dim=1)
        return mean_log_probability(self._model.lm_head(hidden), tokens, lengths, self._checkpoint).cpu()
