"""Rankings by a causal language model on this machine: each label scored as the first entry of the answer.

score(label) = mean log-probability of the label's tokens, where the prompt's answer says `{"ranking": ["<label>"`.
The mean, not the sum: labels have different numbers of tokens, and a sum would punish the longer ones [choice].
Nothing is generated, so that even a small base model always gives a valid ranking, and the same one every time.

The prompt is prompt.messages through the tokenizer's chat template, or as plain text for a model without one. It runs
once; its key-value cache is then shared by all labels. Only prompts of equal length are batched: without padding a
batch gives what its members give alone, whatever position scheme the model has.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from stages.encoders.checkpoints import DTYPES, load_model, load_part, resolve
from stages.engine.errors import PipelineError, one_line
from stages.engine.params import Rankings
from stages.rankings import prompt
from stages.rankings.cache import Answer

BATCH = 4  # prompts of some 400 tokens; their key-value cache is held once per label
OPENING = '{"ranking": ["'

Encoded = tuple[list[int], list[list[int]]]  # the prompt's token ids, and each label's after it


class Transformers:
    """The provider `transformers`. `rankings.model` is a folder or hub name. Raises PipelineError as the loaders do."""

    def __init__(self, rankings: Rankings, labels: Sequence[str], device: str):
        checkpoint = rankings.model
        folder = resolve(checkpoint, rankings.revision)
        self.labels, self.prompt_version = labels, rankings.prompt_version
        self._checkpoint, self._device = checkpoint, device
        self._tokenizer = load_part("AutoTokenizer", folder, checkpoint)
        self._model = load_model("AutoModelForCausalLM", folder, checkpoint, DTYPES[rankings.dtype]).to(device)

    def rank(self, transcripts: Sequence[str], record: Callable[[Sequence[Answer]], None]) -> None:
        """Hand every transcript's answer to `record`, a batch at a time."""
        from tqdm import tqdm

        prompts = {transcript: self.encode(transcript) for transcript in transcripts}
        with tqdm(total=len(transcripts), desc="rank_emotions", unit="transcript", mininterval=1) as bar:
            for batch in _batches(prompts):
                rows = self.scores([prompts[transcript] for transcript in batch]).tolist()
                rankings = [by_score(self.labels, row) for row in rows]
                record([Answer(t, found, len(prompts[t][0])) for t, found in zip(batch, rankings, strict=True)])
                bar.update(len(batch))

    def encode(self, transcript: str) -> Encoded:
        """The prompt up to where the labels differ, and each label's continuation.

        Prompt and label are tokenized as one text and cut where the labels' tokens begin to differ: so it does not
        matter where the tokenizer starts a word. The closing quote keeps a label from being the beginning of another.
        """
        text, special = self._text(prompt.messages(transcript, self.labels, self.prompt_version))
        return encode_labels(self._tokenizer, text, self.labels, special)

    def _text(self, messages: list[dict[str, str]]) -> tuple[str, bool]:
        """The conversation as the model knows it, and whether the tokenizer has to add its special tokens."""
        merged = "\n".join(message["content"] for message in messages)
        if not self._tokenizer.chat_template:
            return f"{merged}\nAnswer: ", True
        reasons = []
        for form in (messages, [{"role": "user", "content": merged}]):  # some templates know no system role
            try:
                return self._tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=True), False
            except Exception as error:  # jinja's own, or whatever the template raises
                reasons.append(one_line(error))
        raise PipelineError(f"checkpoint {self._checkpoint}: its chat template fails: {reasons[0]}")

    @torch.inference_mode()
    def scores(self, batch: Sequence[Encoded]) -> torch.Tensor:
        """Prompts of one length -> (len(batch), labels) float32: mean log-probability of each label's tokens.

        Raises PipelineError for values that are not finite (half precision that overflowed).
        """
        prompts = torch.tensor([ids for ids, _ in batch], device=self._device)
        continuations = [tokens for _, labels in batch for tokens in labels]  # prompt-major
        longest = max(map(len, continuations))
        # Zeros behind a shorter label are never read, and a causal model does not see them before it ends.
        labels = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in continuations], device=self._device)
        lengths = torch.tensor([len(tokens) for tokens in continuations], device=self._device)

        first = self._model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        steps = first.logits[:, -1:].repeat_interleave(len(self.labels), dim=0)
        if longest > 1:
            past = first.past_key_values
            past.batch_repeat_interleave(len(self.labels))
            rest = self._model(input_ids=labels[:, :-1], past_key_values=past, use_cache=True)
            steps = torch.cat([steps, rest.logits], dim=1)
        return mean_log_probability(steps, labels, lengths, self._checkpoint).reshape(len(batch), -1).cpu()


def encode_labels(tokenizer: Any, text: str, labels: Sequence[str], special: bool) -> Encoded:
    """The tokens of a prompt up to where the labels differ, and each label's after it, as Transformers.encode."""
    ids = [tokenizer(f'{text}{OPENING}{label}"', add_special_tokens=special)["input_ids"] for label in labels]
    common = next(i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
    return ids[0][:common], [tokens[common:] for tokens in ids]


def by_score(labels: Sequence[str], scores: Sequence[float]) -> list[str]:
    """The labels, the highest score first; equal ones in their order."""
    return [labels[i] for i in sorted(range(len(labels)), key=lambda i: -scores[i])]


def mean_log_probability(
    steps: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor, checkpoint: str
) -> torch.Tensor:
    """Logits (n, length, vocabulary) before the tokens (n, length), of which lengths (n,) count -> (n,) float32.

    Raises PipelineError for values that are not finite (half precision that overflowed).
    """
    chosen = steps.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    means = chosen.masked_fill(~inside, 0).sum(-1) / lengths
    if not means.isfinite().all():
        raise PipelineError(f"checkpoint {checkpoint}: non-finite scores; try rankings.dtype: float32")
    return means


def _batches(prompts: dict[str, Encoded]) -> Iterator[list[str]]:
    """Transcripts whose prompts have one length, at most BATCH at a time, the longest first."""
    by_length: dict[int, list[str]] = defaultdict(list)
    for transcript, (ids, _) in prompts.items():
        by_length[len(ids)].append(transcript)
    for length in sorted(by_length, reverse=True):
        group = by_length[length]
        for start in range(0, len(group), BATCH):
            yield group[start : start + BATCH]
