"""Replies of every odd shape that servers of OpenAI's protocol send, for the tests."""

import json
from collections.abc import Callable
from typing import Any

from chat_server import LABELS, TOKENS_IN, Handler, Plan, completion, ranking_of, transcript_of


def shaped(change: Callable[[dict[str, Any]], Any]) -> Plan:
    """The right answer with its body changed."""

    def plan(handler: Handler, request: dict[str, Any]) -> None:
        body = json.loads(completion(json.dumps({"ranking": ranking_of(transcript_of(request))})))
        body = change(body) or body
        handler.send(200, json.dumps(body).encode())

    return plan


def choice(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["choices"][0].update(changes)


def message(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["choices"][0]["message"].update(changes)


def parts(body: dict[str, Any]) -> None:
    content = body["choices"][0]["message"]["content"]
    body["choices"][0]["message"]["content"] = [
        {"type": "reasoning", "text": None}, {"type": "text", "text": content[:9]}, content[9:], 5]


CALL = {"id": "c", "type": "function", "function": {"name": "rank", "arguments": "{}"}}
ANSWERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no usage": lambda body: body.pop("usage") and None,
    "empty usage": lambda body: body.update(usage={}),
    "null usage": lambda body: body.update(usage=None),
    "half a usage": lambda body: body.update(usage={"prompt_tokens": TOKENS_IN, "completion_tokens": None}),
    "usage of strings": lambda body: body.update(usage={"prompt_tokens": "300", "completion_tokens": -5}),
    "usage is a list": lambda body: body.update(usage=[1, 2]),
    "parts": parts,
    "finish_reason of its own": choice(finish_reason="STOP"),
    "finish_reason is a number": choice(finish_reason=1),
    "no finish_reason": lambda body: body["choices"][0].pop("finish_reason") and None,
    "only what is needed": lambda body: {
        "choices": [{"message": {"content": body["choices"][0]["message"]["content"]}}]},
    "tool calls beside the answer": message(tool_calls=[CALL]),
}
REASONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "message null": (choice(message=None), "no answer (a message that is null)"),
    "message missing": (lambda body: body["choices"][0].pop("message") and None, "no answer (a message that is null)"),
    "message is a string": (choice(message="hello"), "no answer (a message that is null)"),
    "filtered": (
        choice(message=None, finish_reason="content_filter: PROHIBITED_CONTENT"),
        "no answer (a message that is null, finish_reason content_filter: PROHIBITED_CONTENT)",
    ),
    "tool calls": (
        message(content=None, tool_calls=[CALL]), "no answer (a call of a tool)"
    ),
    "no choices": (lambda body: body.update(choices=[]), "no answer (an empty list of choices)"),
    "choices null": (lambda body: body.update(choices=None), "no answer (a reply without a choice)"),
    "choices of null": (lambda body: body.update(choices=[None]), "no answer (a reply without a choice)"),
    "choices is an object": (lambda body: body.update(choices={"0": {}}), "no answer (a reply without a choice)"),
    "an empty object": (lambda body: {"object": "x"}, "no answer (a reply without a choice)"),
    "content is an object": (message(content={"ranking": LABELS}), "no answer (a message without text)"),
    "refusal in parts": (message(content=None, refusal=[{"text": "No."}]), "a refusal (No.)"),
    "an error with HTTP 200": (
        lambda body: {"error": {"message": "Blocked", "code": 403}}, "a refusal (Blocked)"
    ),
}
