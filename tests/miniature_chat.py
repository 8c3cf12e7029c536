"""A chat model of a hundred thousand weights trained until it reproduces the answers to a few conversations."""

from collections.abc import Sequence
from pathlib import Path

Messages = list[dict[str, str]]

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROLES = [f"<|{role}|>" for role in ("system", "user", "assistant")]


def save_chat_model(folder: Path, conversations: Sequence[tuple[Messages, str]]) -> None:
    """Train a Llama of two layers until it gives each conversation's answer, and save it as a published folder.

    A few seconds on one core; the same weights every time. Raises AssertionError if it has not learned them.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # Merges may cross word boundaries: the long instructions, the same in all conversations, become few tokens.
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    texts = [m["content"] for messages, _ in conversations for m in messages] + [answer for _, answer in conversations]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<|end|>", *ROLES], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    questions = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages, _ in conversations
    ]
    answers = [tokenizer(answer + "<|end|>")["input_ids"] for _, answer in conversations]
    rows = [question + answer for question, answer in zip(questions, answers, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    targets = torch.tensor(
        [
            [-100] * len(question) + answer + [-100] * (longest - len(row))
            for question, answer, row in zip(questions, answers, rows, strict=True)
        ]
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=8192,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(600):  # some 80 are enough
            loss = model(input_ids=ids, labels=targets).loss
            if loss.item() < 0.01:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.set_num_threads(threads)
    assert loss.item() < 0.01, f"the miniature does not reproduce its answers: loss {loss.item():.3f}"
    model.eval().save_pretrained(folder)
