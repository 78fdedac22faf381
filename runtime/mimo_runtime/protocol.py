"""The part of OpenAI's HTTP interface that is served: requests checked into plain values, and the shapes of answers.

Unknown fields are ignored, as such servers do. Known fields that ask for what this one cannot do are refused: an answer
that silently lacks its tools or log-probabilities is worse than none.
"""

import json
import secrets
import time
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["chat.completion", "text_completion"]

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
ROLES = ("system", "user", "assistant")
# Fields that are served only with these values, which ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "chat_template_kwargs": ({},),
}


class ApiError(Exception):
    """An error in OpenAI's format. Its message is shown to the client."""

    def __init__(self, status: int, message: str, code: str, *, param: str | None = None, retry_after: int = 0):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After in seconds where a later try may succeed, and the scheme where a key is missing."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def bad(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """Status 400: the request cannot be served as it is."""
    return ApiError(400, message, code, param=param)


@dataclass(frozen=True)
class Request:
    """A checked request. `prompt` is a conversation (chat), a text, or token ids; `max_tokens` None leaves
    the number to the server."""

    kind: Kind
    prompt: list[dict[str, str]] | str | list[int]
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse(body: bytes, kind: Kind, model: str) -> Request:
    """Checks the body of a request. ApiError (400, or 404 for another model) names the field and the remedy."""
    fields = _object(body)
    wanted = fields.get("model")
    if wanted is not None and wanted != model:
        raise ApiError(404, f"this server has the model {model!r} only; ask for it", "model_not_found", param="model")
    for name, allowed in NEUTRAL.items():
        value = fields.get(name)
        if value is not None and not any(
            value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed
        ):
            raise bad(name, f"{name} is not supported with this value; leave it out", "unsupported_value")
    chat = kind == "chat.completion"
    limits = [name for name in ("max_completion_tokens", "max_tokens") if fields.get(name) is not None]
    temperature = _number(fields, "temperature", 0.0, 2.0, 1.0)
    stream = _boolean(fields, "stream")
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict) or (options and not stream):
        raise bad("stream_options", "stream_options is an object and needs stream true; correct one of them")
    return Request(
        kind=kind,
        prompt=_messages(fields.get("messages")) if chat else _prompt(fields.get("prompt")),
        max_tokens=_integer(fields, limits[0], 1, 2**31) if limits else None,
        temperature=temperature if temperature > 1e-5 else 0.0,  # below, scaled logits overflow
        top_p=_top_p(fields),
        top_k=_integer(fields, "top_k", 0, 2**31, 0),
        seed=_integer(fields, "seed", -(2**63), 2**63 - 1, secrets.randbits(63)),
        stops=_stops(fields.get("stop")),
        stream=stream,
        include_usage=_boolean(options, "include_usage"),
    )


def _object(body: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        fields = json.loads(body, parse_constant=refuse)
        # A lone surrogate ("\ud800") is JSON but no text: no tokenizer and no answer can hold it.
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise bad(None, f"the body is not valid JSON ({reason[:200]}); correct it", "invalid_json") from None
    if not isinstance(fields, dict):
        raise bad(None, "the body must be a JSON object; send the fields of a completion request", "invalid_json")
    return fields


def _boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad(name, f"{name} must be true or false")
    return bool(value)


def _integer(fields: dict[str, Any], name: str, low: int, high: int, default: int = 0) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad(name, f"{name} must be a whole number from {low} to {high}")
    return value


def _number(fields: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise bad(name, f"{name} must be a number from {low:g} to {high:g}")
    return float(value)


def _top_p(fields: dict[str, Any]) -> float:
    top_p = _number(fields, "top_p", 0.0, 1.0, 1.0)
    if top_p == 0:
        raise bad("top_p", "top_p must be above 0 and at most 1; use temperature 0 for the most likely token")
    return top_p


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops):
        raise bad("stop", f"stop must be a string or strings of 1 to {MAX_STOP_LENGTH} characters")
    if len(stops) > MAX_STOPS:
        raise bad("stop", f"stop has {len(stops)} strings; give at most {MAX_STOPS}")
    return tuple(stops)


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise bad("messages", "messages must be a list with at least one message", "missing_field")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise bad(f"messages[{i}]", f"messages[{i}] must be an object with role and content")
        role = "system" if message.get("role") == "developer" else message.get("role")
        if role not in ROLES:
            raise bad(f"messages[{i}].role", f"messages[{i}].role must be one of {', '.join(ROLES)}")
        messages.append({"role": role, "content": _content(message.get("content"), f"messages[{i}].content")})
    if messages[-1]["role"] != "user":
        raise bad("messages", "the last message must be the user's; unfinished answers are not continued")
    return messages


def _content(value: Any, where: str) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, str):
        return value
    parts: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise bad(where, f"{where} must be a text or a list of parts of type text; this model reads nothing else")
    return "".join(p["text"] for p in parts)


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]  # a batch of one
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        return value
    raise bad("prompt", "prompt must be one text or one list of token ids, not empty; send several in several requests")


class Answer:
    """The documents of one answer: `whole` of a plain request, or `chunk` after `chunk` of a stream."""

    def __init__(self, request: Request, model: str):
        self.chat, self.include_usage = request.kind == "chat.completion", request.include_usage
        number = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.head = {"id": number, "object": request.kind, "created": int(time.time())}
        self.head["model"] = model

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        """The document of an answer that is not streamed."""
        body = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": finish}
        return {**self.head, "choices": [choice], "usage": usage}

    def chunk(self, text: str, finish: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """A piece of a stream; the first of a chat names the role, the last has a finish reason."""
        delta: dict[str, str] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        body = {"delta": delta} if self.chat else {"text": text}
        return self._piece([{"index": 0, **body, "logprobs": None, "finish_reason": finish}], None)

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The extra last piece of a stream that was asked for with stream_options.include_usage."""
        return self._piece([], usage)

    def _piece(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices} | ({"usage": usage} if self.include_usage else {})


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts as answers state them; tokens after a stop string do not count, the stop token does."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
