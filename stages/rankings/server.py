"""The connection to an OpenAI-compatible server, and what it says of a model before anything is paid for."""

import os
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from stages.engine.errors import PipelineError
from stages.rankings.replies import complaint, decode

if TYPE_CHECKING:
    import openai

    from stages.rankings.chat import Chat

PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
LOOK_UP_SECONDS = 20.0
# Dates of the end, as servers name them: OpenAI's shutdown_date (developers.openai.com/api/docs/deprecations),
# Mistral's deprecation, OpenRouter's expiration_date
ENDS = ("shutdown_date", "deprecation_date", "deprecation", "deprecated_at", "expiration_date", "sunset")

Client = TypeVar("Client", "openai.OpenAI", "openai.AsyncOpenAI")


def connect(kind: type[Client], chat: "Chat", timeout: float) -> Client:
    """A client for the chat's server. Raises PipelineError for a proxy variable that the HTTP library can't take.

    The SDK's own retries are off: they would go past the budget, and past a Retry-After of over two minutes.
    """
    try:
        return kind(api_key=chat.api_key, base_url=chat.base_url, timeout=timeout, max_retries=0)
    except Exception as error:  # ValueError, ImportError, the HTTP library's InvalidURL
        # A proxy's URL may hold a password: only its scheme is shown.
        values = [(name, os.environ.get(name) or os.environ.get(name.lower(), "")) for name in PROXIES]
        odd = [f"{name} ({value.split('://')[0]}://)" for name, value in values if "://" in value
               and value.split("://")[0].lower() not in ("http", "https")]
        if odd:
            raise PipelineError(
                f"{', '.join(odd)}: this kind of proxy can't be used; unset the variable, set it to an http:// proxy, "
                f"or set NO_PROXY='*' to go without"
            ) from None
        given = [name for name, value in values if value]
        what = f"rankings.base_url, or {', '.join(given)}" if given else "rankings.base_url"
        raise PipelineError(f"{what}: no connection can be set up ({chat.clean(error)})") from None


def look_up(chat: "Chat") -> None:
    """Show the date at which the server says that the model will end. Raises PipelineError for an unknown model.

    Many compatible servers can't be asked about one model, or not with every key: no other answer stops the run.
    """
    import openai

    with connect(openai.OpenAI, chat, LOOK_UP_SECONDS) as client:
        try:
            raw = client.models.with_raw_response.retrieve(chat.model)
        except openai.NotFoundError as error:
            said = chat.clean(complaint(error))
            named = chat.model in said and "/models/" not in said  # and not the address of a page that is missing
            if error.code == "model_not_found" or error.param == "model" or named:
                raise PipelineError(
                    f"{chat.base_url}: rankings.model: {chat.model} was not found there: {said}; nothing was asked"
                ) from None
            return
        except openai.OpenAIError:
            return
    model: dict[str, Any] = decode(raw.content) or {}
    ends = [f"{name}: {chat.clean(model[name])}" for name in ENDS if isinstance(model.get(name), str | int)
            and not isinstance(model.get(name), bool)]
    if header := raw.headers.get("sunset"):  # RFC 8594
        ends.append(f"Sunset: {chat.clean(header)}")
    if model.get("deprecated") is True and not ends:
        ends.append("deprecated")
    if ends:
        print(
            f"rank_emotions: {chat.base_url} says of {chat.model}: {', '.join(ends)}; after that no new answers can be "
            f"had from it, and those that are kept can't be reproduced",
            file=sys.stderr,
        )
