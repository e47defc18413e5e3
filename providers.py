"""Every model provider behind one message API: the vocabulary, the wire formats, the one transport.

The canonical format is Anthropic's Messages API with a few additions. A provider is a row in `PROVIDERS`; its adapter
is pure translation: `encode(request, key)` gives an `HTTPRequest`, `decode(body, request)` a `Message`, and
`decoder(request)` a `StreamDecoder` that is fed server-sent events and returns canonical events. Only `Transport`,
at the end, touches a socket. Needs pydantic; aiohttp is imported when a `Transport` first sends something.

Contents (`grep -n '^# == '` lists the sections):
    JSON · errors · the request · the response · events · server-sent events · the grammar of a stream · signatures ·
    models and their traits · adapters · Anthropic · OpenAI Chat (also Groq, Cerebras) · OpenAI Responses · Gemini ·
    registry · transport

Facts about the wire formats carry their source: the provider's own SDK types or documentation as of November 2026.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import codecs
import collections
import contextlib
import dataclasses
import email.utils
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar, cast
from urllib.parse import quote, urlencode

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, ValidationError

if TYPE_CHECKING:
    import aiohttp
    import yarl
    from aiohttp.client_proto import ResponseHandler

__all__ = [
    "ERRORS",
    "JSON",
    "PROVIDERS",
    "APIError",
    "Accumulator",
    "Adapter",
    "Aliases",
    "Attempt",
    "AudioDelta",
    "AudioError",
    "AuthenticationError",
    "CitationsDelta",
    "ContentBlock",
    "ContentBlockDelta",
    "ContentBlockStart",
    "ContentBlockStop",
    "Credential",
    "Delta",
    "Error",
    "EventBuilder",
    "GoogleLogin",
    "HTTPRequest",
    "InputJSONDelta",
    "InvalidRequestError",
    "Media",
    "Message",
    "MessageDelta",
    "MessageRequest",
    "MessageStart",
    "MessageStop",
    "NotFoundError",
    "OtherBlock",
    "OtherDelta",
    "OverloadedError",
    "PermissionDeniedError",
    "Ping",
    "ProviderError",
    "ProviderTimeoutError",
    "RateLimitError",
    "RequestTooLargeError",
    "SSEDecoder",
    "Secret",
    "SignatureDelta",
    "StreamDecoder",
    "StreamEvent",
    "StreamTruncated",
    "Text",
    "TextDelta",
    "ThinkingDelta",
    "ThinkingText",
    "Timeouts",
    "ToolUse",
    "TranscriptDelta",
    "Transport",
    "Upstream",
    "Usage",
    "accumulate",
    "parse_request",
    "sse_frame",
]
__version__ = "0.1.0"

logger = logging.getLogger("vai.providers")

JSON: TypeAlias = dict[str, Any]


# == JSON ==============================================================================================================


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise ValueError(f"{literal[:20]} is out of range")
    return value


def _refuse(literal: str) -> Any:
    raise ValueError(f"{literal} is not JSON")


_strict = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)
_lenient = json.JSONDecoder(parse_int=float)
_scan: Callable[[str, int], tuple[Any, int]] = cast(Any, _strict).scan_once
_encoder = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))
_scan_string: Callable[[str, int, bool], tuple[str, int]] = cast(Any, json.decoder).scanstring
_quoted: Callable[[str], str] = json.encoder.encode_basestring_ascii


def loads(data: bytes | str) -> Any:
    """JSON as RFC 8259 has it: no NaN, no number beyond a float's range. Any fault is a `ValueError`."""
    text = data.decode().removeprefix("\ufeff") if isinstance(data, (bytes, bytearray)) else data
    text = text.strip(" \t\n\r")
    try:
        value, end = _scan(text, 0)  # what `decode` does, without its two searches for white space
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except StopIteration as fault:
        raise json.JSONDecodeError("Expecting value", text, fault.value) from None
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def dumps(value: Any) -> bytes:
    """Compact ASCII JSON. NaN and infinity are a `ValueError`; a lone surrogate passes as its escape."""
    return _encoder.encode(value).encode("ascii")


def dump_body(value: Any, *, finite: bool = False) -> bytes:
    """What `dumps` says, for a body: where orjson is installed much faster, and in UTF-8.

    orjson takes NaN for null, so what holds a null is written by `dumps`, unless all numbers are known to be `finite`,
    as in what `loads` has read. So is what orjson refuses and JSON has: lone surrogates, integers over 64 bits, deep
    nesting. What neither takes is the error of `dumps`.
    """
    if fast := _orjson_dumps():
        try:
            raw = fast(value)
        except TypeError:
            return dumps(value)
        if finite or b"null" not in raw:
            return raw
    return dumps(value)


@functools.cache
def _orjson_dumps() -> Callable[[Any], bytes] | None:
    try:
        import orjson
    except ImportError:
        return None
    return functools.partial(orjson.dumps, option=orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME)


def too_deep(value: Any, limit: int) -> bool:
    """Whether arrays and objects are nested more than `limit` levels."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return any(isinstance(item, (dict, list)) for item in level)


def _nonfinite(value: Any, path: tuple[str | int, ...] = ()) -> tuple[str | int, ...] | None:
    if isinstance(value, float) and not math.isfinite(value):
        return path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for key, item in items if (found := _nonfinite(item, (*path, key)))), None)


def read_request(raw: bytes, max_depth: int = 64) -> JSON:
    """The body of a request, as an object.

    Raises `InvalidRequestError` with code `invalid_json` or `json_too_deep`, or with the `param` of a number that
    JSON cannot hold. Of a key given twice the last value counts, for every reader.
    """
    try:
        body = loads(raw)
    except ValueError as fault:
        raise _json_error(raw, fault) from None
    if raw.count(b"[") + raw.count(b"{") > max_depth and too_deep(body, max_depth):
        raise InvalidRequestError(f"the body is nested more than {max_depth} levels deep", code="json_too_deep")
    if not isinstance(body, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return body


def _json_error(raw: bytes, fault: ValueError) -> Error:
    if "nested too deeply" in str(fault):
        return InvalidRequestError("the body is nested too deeply", code="json_too_deep")
    try:
        place = _nonfinite(_lenient.decode(raw.decode("utf-8-sig")))
    except (ValueError, RecursionError):
        place = None
    if place:
        return InvalidRequestError("must be a finite number", param=_join(place))
    reason = fault.msg if isinstance(fault, json.JSONDecodeError) else "it is not UTF-8 or holds an impossible number"
    return InvalidRequestError(f"the body is not valid JSON: {reason}", code="invalid_json")


def _join(path: Iterable[str | int]) -> str:
    out = ""
    for step in path:
        out += f"[{step}]" if isinstance(step, int) else f".{step}" if out else str(step)[:100]
    return out


def _as_dict(value: Any) -> JSON:
    return value if isinstance(value, dict) else {}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


class Secret(str):
    """A string that does not show itself: not in a repr, and so not in a traceback's locals."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def bearer(key: str) -> Secret:
    return Secret(f"Bearer {key}")


# == Errors ============================================================================================================


class Error(Exception):
    """Base of all errors; the subclass says what went wrong, the fields say where.

    Error ─┬─ InvalidRequestError 400    ├─ RateLimitError 429
           ├─ AuthenticationError 401    ├─ APIError 500
           ├─ PermissionDeniedError 403  ├─ ProviderError 502 ── StreamTruncated
           ├─ NotFoundError 404          ├─ OverloadedError 503
           └─ RequestTooLargeError 413   └─ ProviderTimeoutError 504
    """

    type: ClassVar[str] = "api_error"
    status: int = 500

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        provider: str | None = None,
        provider_error: Any = None,
        retry_after: int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.provider = provider
        self.provider_error = provider_error
        self.retry_after = retry_after
        self.request_id = request_id
        self.block: Any = None  # the block of the request that is at fault, until its place is known
        self.begun = False  # the answer had begun: asking again would be paid for twice
        self.result: Any = None  # of a run: the `RunResult` so far; of `extract`: the last `Message`

    @property
    def about_key(self) -> bool:
        """Whether a provider refused the key, whoever's it was."""
        return isinstance(self, AuthenticationError) or self.code == "provider_authentication"

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later. Spent quota does not come back by asking again."""
        if self.begun or self.code in TERMINAL_CODES or isinstance(self, StreamTruncated) or self.about_key:
            return False
        return self.status in (408, 409, 429) or self.status >= 500 or self.code == "conflict"

    @property
    def passes_on(self) -> bool:
        """Whether the next model of an alias may answer where this one could not.

        It may where nothing of an answer had come: after a 429, a 5xx, a timeout, a broken connection; and where the
        request could not be sent, for want of a key or because this provider has no form for it.
        """
        if self.begun or isinstance(self, StreamTruncated):
            return False
        return self.status == 429 or self.status >= 500 or self.code in UNSENT_CODES

    def to_wire(self, request_id: str | None = None) -> JSON:
        """The error envelope: a JSON body, an SSE `error` event, a WebSocket message."""
        request_id = request_id or self.request_id
        error: JSON = {"type": self.type, "message": self.message}
        for name in ("param", "code", "retry_after", "provider", "provider_error"):
            if (value := getattr(self, name)) is not None:
                error[name] = value
        error["request_id"] = request_id
        return {"type": "error", "error": error, "request_id": request_id}

    def __str__(self) -> str:
        return f"{self.message} ({self.param})" if self.param and self.param not in self.message else self.message


class InvalidRequestError(Error):
    """The request is wrong; `param` names the place."""

    type = "invalid_request_error"
    status = 400


class AuthenticationError(Error):
    """A key is missing or refused."""

    type = "authentication_error"
    status = 401


class PermissionDeniedError(Error):
    """The key is good but may not do this."""

    type = "permission_error"
    status = 403


class NotFoundError(Error):
    """No such route, or no such model."""

    type = "not_found_error"
    status = 404


class RequestTooLargeError(Error):
    """The body is over a limit."""

    type = "request_too_large"
    status = 413


class RateLimitError(Error):
    """Too many requests, or spent quota; `retry_after` in seconds where known."""

    type = "rate_limit_error"
    status = 429


class APIError(Error):
    """Our own fault."""

    type = "api_error"
    status = 500


class ProviderError(Error):
    """The provider failed, or answered something unreadable."""

    type = "provider_error"
    status = 502


class StreamTruncated(ProviderError):
    """The provider broke a stream off without its terminal event."""

    def __init__(self, message: str = "the provider broke off the stream before its end", **fields: Any) -> None:
        super().__init__(message, **({"code": "stream_truncated"} | fields))


class OverloadedError(Error):
    """The provider, or this gateway, has no capacity now."""

    type = "overloaded_error"
    status = 503


class ProviderTimeoutError(Error):
    """The provider took longer than allowed."""

    type = "timeout_error"
    status = 504


ERRORS: dict[str, type[Error]] = {
    cls.type: cls
    for cls in (
        InvalidRequestError,
        AuthenticationError,
        PermissionDeniedError,
        NotFoundError,
        RequestTooLargeError,
        RateLimitError,
        APIError,
        ProviderError,
        OverloadedError,
        ProviderTimeoutError,
    )
}
TERMINAL_CODES = {"insufficient_quota", "billing", "QUOTA_EXHAUSTED", "MODEL_CAPACITY_EXHAUSTED", "unsupported_feature"}
UNSENT_CODES = {"no_provider_key", "unsupported_feature"}  # of requests that never went out

# An upstream status, as the caller sees it. What is not here goes by its hundreds: 4xx are 400, 5xx are 502.
STATUS_ERRORS: dict[int, type[Error]] = {
    401: AuthenticationError,
    402: PermissionDeniedError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: ProviderTimeoutError,
    413: RequestTooLargeError,
    429: RateLimitError,
    498: OverloadedError,  # Groq: flex capacity exceeded
    503: OverloadedError,
    504: ProviderTimeoutError,
    524: ProviderTimeoutError,  # Cloudflare in front of OpenAI
    529: OverloadedError,
}
# Words for the same things, in `type`, `code` or `status` of an error inside a stream, where there is no HTTP status.
WORD_STATUS: dict[str, int] = {
    "model_not_found": 404,
    "server_is_overloaded": 503,
    "server_overloaded": 503,
    "slow_down": 503,
    "content_policy_violation": 400,
    "bio_policy": 400,
    "misalignment_policy_violation": 400,
    "invalid_image": 400,
    "invalid_image_format": 400,
    "invalid_image_url": 400,
    "invalid_base64_image": 400,
    "image_too_large": 400,
    "image_too_small": 400,
    "image_parse_error": 400,
    "image_content_policy_violation": 400,
    "image_file_not_found": 400,
    "image_file_too_large": 400,
    "empty_image_file": 400,
    "unsupported_image_media_type": 400,
    "failed_to_download_image": 400,
    "invalid_api_key": 401,
    "wrong_api_key": 401,
    "queue_exceeded": 429,
    "request_quota_exceeded": 429,
    "token_quota_exceeded": 429,
    "tool_use_failed": 400,
    "json_validate_failed": 400,
    "overloaded_error": 529,
    "UNAVAILABLE": 503,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "RESOURCE_EXHAUSTED": 429,
    "timeout_error": 504,
    "DEADLINE_EXCEEDED": 504,
    "invalid_request_error": 400,
    "invalid_prompt": 400,
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "context_length_exceeded": 400,
    "not_found_error": 404,
    "NOT_FOUND": 404,
    "request_too_large": 413,
    "authentication_error": 401,
    "UNAUTHENTICATED": 401,
    "permission_error": 403,
    "PERMISSION_DENIED": 403,
    "billing_error": 402,
}
MAX_PROVIDER_ERROR = 8 << 10
_KEY_SHAPES = re.compile(
    r"\b(?:sk|gsk|csk|pk|vai_sk|sk_car)[-_][A-Za-z0-9_-]{12,}|AIza[A-Za-z0-9_-]{20,}|ya29\.[A-Za-z0-9_.-]{10,}"
    r"|(?i:bearer) [A-Za-z0-9_.~+/-]{12,}"
)


def redact(text: str, keys: Iterable[str] = ()) -> str:
    """`text` without the given keys, plain, quoted or in base64, or anything else that looks like a key."""
    for key in keys:
        if len(key) >= 6:
            encoded = base64.b64encode(key.encode("utf-8", "replace")).decode().rstrip("=")
            for form in (key, quote(key, safe=""), quote(key), encoded):
                text = text.replace(form, "[redacted]")
    return _KEY_SHAPES.sub("[redacted]", text)


def redact_json(value: Any, keys: Iterable[str] = ()) -> Any:
    """The same in every string of a JSON value."""
    if isinstance(value, str):
        return redact(value, keys)
    if isinstance(value, dict):
        return {redact(str(name), keys): redact_json(item, keys) for name, item in value.items()}
    return [redact_json(item, keys) for item in value] if isinstance(value, list) else value


def for_caller(fault: Error, credential: Credential) -> Error:
    """An error out of an answer, without the key that paid for it; a refusal of our own key is not the caller's."""
    if fault.provider is None:
        return fault
    if not credential.own:
        fault = _not_the_callers(fault)
    fault.message = redact(fault.message, [credential.key])
    fault.code = redact(fault.code, [credential.key]) if fault.code else None
    fault.provider_error = redact_json(fault.provider_error, [credential.key])
    fault.args = (fault.message,)
    return fault.with_traceback(None)


def _not_the_callers(fault: Error) -> Error:
    """A refusal of the gateway's own key is no fault of the caller's."""
    if not isinstance(fault, (AuthenticationError, PermissionDeniedError)) or fault.code == "billing":
        return fault
    return ProviderError(
        f"{fault.provider} refused the gateway's key: {fault.message}",
        code="provider_authentication",
        provider=fault.provider,
        provider_error=fault.provider_error,
        retry_after=fault.retry_after,
    )


def _printable(text: str, limit: int = MAX_PROVIDER_ERROR) -> str:
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+", " ", text[:limit]).strip()


def provider_error(
    provider: str,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    keys: Iterable[str] = (),
    own_key: bool = True,
    now: float | None = None,
) -> Error:
    """An upstream error answer as an `Error`, whatever shape its body has.

    `own_key` says that the caller brought the key, so that a refusal of it is the caller's to mend.
    """
    keys = list(keys)
    text = body[: 8 * MAX_PROVIDER_ERROR].decode("utf-8", "replace")
    try:
        parsed = redact_json(loads(text), keys)
    except ValueError:
        parsed = None
    text = redact(text, keys)
    fault = _error_object(parsed)
    inside = _error_inside(fault.get("message"))
    message = _message_of(inside or fault, parsed)
    if not message:
        plain = "" if "<" in text[:200] else _printable(text, 500)
        message = f"{provider} answered with status {status}" + (f": {plain}" if plain else "")
    retry_after = _retry_after(headers, now)
    if retry_after is None:
        retry_after = _retry_info(inside or fault)
    found = _classified(provider, status, message, fault, retry_after)
    return found if own_key else _not_the_callers(found)


def stream_error(provider: str, fault: Any) -> Error:
    """An error object that came with a 200: in a stream, or as the whole body."""
    detail = fault if isinstance(fault, dict) else {"message": str(fault)} if fault else {}
    words = [str(detail.get(name)) for name in ("status_code", "code", "type", "status")]
    numbers = (int(word) for word in words if re.fullmatch(r"[45]\d\d", word))
    known = (WORD_STATUS[word] for word in words if word in WORD_STATUS)
    status = next(numbers, None) or next(known, 502)
    message = redact(_message_of(detail, None) or f"{provider} reported an error")
    return _classified(provider, status, message, redact_json(detail), _retry_info(detail))


def _error_object(parsed: Any) -> JSON:
    """The error inside `{"error": {…}}`, `[{"error": …}]`, `{"error": "…"}` or a bare `{"message": …}`."""
    if isinstance(parsed, list):
        parsed = parsed[0] if parsed else None
    if not isinstance(parsed, dict):
        return {}
    inner = parsed.get("error")
    if isinstance(inner, dict):
        return inner
    return {**parsed, "message": inner} if isinstance(inner, str) else parsed


def _error_inside(message: Any) -> JSON:
    """Code Assist puts Google's error object into the message, as a string with stray commas and spaces."""
    if not isinstance(message, str) or "{" not in message[:20]:
        return {}
    try:
        return _as_dict(_as_dict(loads(re.sub(r",\s*,", ",", message.replace("\xa0", " ")))).get("error"))
    except ValueError:
        return {}


def _message_of(fault: JSON, parsed: Any) -> str:
    found = [fault.get(name) for name in ("error_description", "message", "detail")]
    if isinstance(parsed, dict):
        found += [parsed.get("message"), parsed.get("detail")]
    if isinstance(parsed, str):
        found.append(parsed)
    return next((_printable(text) for text in found if isinstance(text, str) and text.strip()), "")


def _classified(provider: str, status: int, message: str, fault: JSON, retry_after: int | None) -> Error:
    cls = STATUS_ERRORS.get(status) or (InvalidRequestError if 400 <= status < 500 else ProviderError)
    code = next((fault[n] for n in ("code", "type", "status") if isinstance(fault.get(n), str)), None)
    if isinstance(details := fault.get("details"), list):  # Google's ErrorInfo says more than its status
        reasons = (d.get("reason") for d in details if isinstance(d, dict))
        code = next((r for r in reasons if isinstance(r, str)), code)
        if cls is RateLimitError and "PerDay" in str(details):
            code = "insufficient_quota"
    if code == "API_KEY_INVALID" or (status == 400 and message.startswith("API key not valid")):
        cls = AuthenticationError  # Google says 400
    if status == 402:
        code = "billing"
    elif status == 409:
        code = "conflict"
    return cls(
        message,
        code=_printable(code, 100) if code and code != cls.type else None,
        provider=provider,
        provider_error=bounded(fault) or None,
        retry_after=retry_after,
    )


def bounded(fault: Any, limit: int = MAX_PROVIDER_ERROR) -> Any:
    """A provider's own error object, cut to `limit` bytes of JSON; None where it is no JSON."""
    try:
        raw = dumps(fault)
    except (ValueError, RecursionError):
        return None
    return fault if len(raw) <= limit else {"truncated": raw[: limit // 2].decode("ascii")}


def _retry_after(headers: Mapping[str, str], now: float | None = None) -> int | None:
    """Whole seconds from `retry-after-ms` or `retry-after` (seconds or an HTTP date); None if absent or absurd."""
    value = (headers.get("retry-after") or "").strip()
    millis = (headers.get("retry-after-ms") or "").strip()
    seconds: float | None = None
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        seconds = float(value)
    elif re.fullmatch(r"\d{1,12}(\.\d{1,9})?", millis):
        seconds = float(millis) / 1000
    elif value:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now)
    if seconds is None or not 0 <= seconds <= 86_400:
        return None
    return math.ceil(seconds)


def _retry_info(fault: JSON) -> int | None:
    """Google puts the wait into the body: `{"@type": "…RetryInfo", "retryDelay": "34.4s"}`."""
    for detail in fault.get("details") or () if isinstance(fault.get("details"), list) else ():
        delay = detail.get("retryDelay") if isinstance(detail, dict) else None
        if isinstance(delay, str) and (found := re.fullmatch(r"(\d{1,5})(\.\d+)?s", delay)):
            return math.ceil(float(found[0][:-1]))
    return None


def unsupported(
    feature: str,
    provider: str,
    have: Iterable[str] = (),
    *,
    param: str | None = None,
    hint: str = "",
    block: Any = None,
) -> Error:
    """The 400 for what a provider has no form for, naming those that have. `block` is where it stands."""
    others = ", ".join(have)
    message = f"{provider} does not support {feature}"
    message += f"; providers that do: {others}" if others else ""
    message += f"; {hint}" if hint else ""
    fault = InvalidRequestError(message, code="unsupported_feature", param=param, provider=provider)
    fault.block = block
    return fault


# == The request =======================================================================================================

NATIVE_TOOLS = ("web_search", "code_execution", "file_search", "computer_use", "text_editor", "image_generation")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+-]*")
TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
TOOL_ID = re.compile(r"[A-Za-z0-9_-]{1,40}")
SERVER_BLOCK = re.compile(
    r"server_tool_use|mcp_tool_use|[a-z0-9_]+_tool_result|container_upload|tool_reference|browser_state|compaction|fallback"
)
SERVER_TOOL = re.compile(r"[a-z][a-z0-9_]*_\d{8}|mcp_toolset")


class _Request(BaseModel):
    """What the caller sends, strictly typed. Keys inside a block that vai does not know are for Anthropic to read."""

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True, defer_build=True
    )


# A union's tag begins with #, so that it is told from a key where pydantic says in what place an error is.


def _text_or_blocks(value: Any) -> str:
    return "#blocks" if isinstance(value, list) else "#string"


class Base64Source(_Request):
    """`data` is standard base64, padded, without line breaks."""

    type: Literal["base64"]
    media_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9.+-]+/[A-Za-z0-9.+-]+(;.*)?$", max_length=200)]
    data: Annotated[str, Field(min_length=1)]

    @property
    def data_url(self) -> str:
        return f"data:{self.media_type};base64,{self.data}"


class URLSource(_Request):
    """Fetched by the provider, never by vai."""

    type: Literal["url"]
    url: Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=8192)]


class FileSource(_Request):
    """A file that was uploaded to the provider before."""

    type: Literal["file"]
    file_id: Annotated[str, Field(min_length=1, max_length=512)]


class TextSource(_Request):
    type: Literal["text"]
    data: str
    media_type: str = "text/plain"


class ContentSource(_Request):
    type: Literal["content"]
    content: Any

    @property
    def text(self) -> str:
        if not isinstance(self.content, list):
            return str(self.content)
        return "\n".join(str(b["text"]) for b in self.content if isinstance(b, dict) and "text" in b)


def _type_of(value: Any) -> Any:
    """The `type` of what may be an object or a model."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _source_kind(value: Any) -> str | None:
    kind = _type_of(value)
    return f"#{kind}" if isinstance(kind, str) else None


_Base64: TypeAlias = Annotated[Base64Source, Tag("#base64")]
_URL: TypeAlias = Annotated[URLSource, Tag("#url")]
_File: TypeAlias = Annotated[FileSource, Tag("#file")]


class TextBlock(_Request):
    type: Literal["text"] = "text"
    text: str
    cache_control: JSON | None = None


class ImageBlock(_Request):
    type: Literal["image"]
    source: Annotated[_Base64 | _URL | _File, Discriminator(_source_kind)]
    cache_control: JSON | None = None


class DocumentBlock(_Request):
    type: Literal["document"]
    source: Annotated[
        _Base64 | _URL | _File | Annotated[TextSource, Tag("#text")] | Annotated[ContentSource, Tag("#content")],
        Discriminator(_source_kind),
    ]
    title: str | None = None
    context: str | None = None
    citations: JSON | None = None
    cache_control: JSON | None = None

    @property
    def text(self) -> str | None:
        """The document as text, with its title; None for a PDF or one behind a URL or file id."""
        match self.source:
            case TextSource(data=text) | ContentSource(text=text):
                return f"{self.title}\n\n{text}" if self.title else text
        return None

    @property
    def filename(self) -> str:
        name = re.sub(r"[^A-Za-z0-9._ -]+", "_", self.title or "").strip() or "document"
        return name if name.lower().endswith(".pdf") else f"{name[:120]}.pdf"


class SearchResultBlock(_Request):
    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]
    cache_control: JSON | None = None

    @property
    def text(self) -> str:
        return "\n".join([self.title, self.source, *(block.text for block in self.content)])


class AudioBlock(_Request):
    """A recording. What an assistant said is its `transcript`, or the text beside it: it needs no `source`."""

    type: Literal["audio"]
    source: Base64Source | None = None
    transcript: str | None = None


class VideoBlock(_Request):
    type: Literal["video"]
    source: Annotated[_Base64 | _URL, Discriminator(_source_kind)]


class ToolUseBlock(_Request):
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1, max_length=512)]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: JSON
    cache_control: JSON | None = None


class ToolResultBlock(_Request):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[
        Annotated[str, Tag("#string")] | Annotated[list[Block], Tag("#blocks")], Discriminator(_text_or_blocks)
    ] = ""
    is_error: bool | None = None
    cache_control: JSON | None = None

    @property
    def blocks(self) -> list[Block]:
        return [TextBlock(text=self.content)] if isinstance(self.content, str) else self.content


class ThinkingBlock(_Request):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(_Request):
    type: Literal["redacted_thinking"]
    data: str


class ServerBlock(_Request):
    """A provider's own block coming back in history: `server_tool_use`, `web_search_tool_result` and their kin."""

    type: Annotated[str, Field(pattern=SERVER_BLOCK.pattern)]


def _block_kind(value: Any) -> str | None:
    kind = _type_of(value)
    if not isinstance(kind, str):
        return None
    return f"#{kind}" if kind in _BLOCK_KINDS else "#server" if SERVER_BLOCK.fullmatch(kind) else None


Block: TypeAlias = Annotated[
    Annotated[TextBlock, Tag("#text")]
    | Annotated[ImageBlock, Tag("#image")]
    | Annotated[DocumentBlock, Tag("#document")]
    | Annotated[SearchResultBlock, Tag("#search_result")]
    | Annotated[AudioBlock, Tag("#audio")]
    | Annotated[VideoBlock, Tag("#video")]
    | Annotated[ToolUseBlock, Tag("#tool_use")]
    | Annotated[ToolResultBlock, Tag("#tool_result")]
    | Annotated[ThinkingBlock, Tag("#thinking")]
    | Annotated[RedactedThinkingBlock, Tag("#redacted_thinking")]
    | Annotated[ServerBlock, Tag("#server")],
    Discriminator(_block_kind),
]
_BLOCK_KINDS = (
    "text", "image", "document", "search_result", "audio", "video", "tool_use", "tool_result", "thinking",
    "redacted_thinking",
)  # fmt: skip
_USER_ONLY = (DocumentBlock, SearchResultBlock, VideoBlock, ToolResultBlock)
_ASSISTANT_ONLY = (ToolUseBlock, ThinkingBlock, RedactedThinkingBlock)


class MessageParam(_Request):
    """One turn of the conversation; `content` is text or a list of blocks."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag("#string")] | Annotated[list[Block], Tag("#blocks")], Discriminator(_text_or_blocks)
    ]

    @property
    def blocks(self) -> list[Block]:
        return self._spoken if isinstance(self.content, str) else self.content

    @functools.cached_property
    def _spoken(self) -> list[Block]:
        return [TextBlock(text=str(self.content))]


def spoken_text(message: MessageParam) -> str:
    """What the recordings of a message say, as far as that is written down."""
    return "".join(block.transcript or "" for block in message.blocks if isinstance(block, AudioBlock))


class FunctionTool(_Request):
    """A tool that the caller runs."""

    type: Literal["custom", "function"] | None = None
    name: Annotated[str, Field(pattern=f"^{TOOL_NAME.pattern}$")]
    description: str | None = None
    input_schema: JSON
    strict: bool | None = None
    cache_control: JSON | None = None


class NativeTool(_Request):
    """A tool that the provider runs, by vai's neutral name; `config` is translated where the provider has the like."""

    type: Literal["web_search", "code_execution", "file_search", "computer_use", "text_editor", "image_generation"]
    config: JSON = {}
    cache_control: JSON | None = None


class ServerTool(_Request):
    """One of Anthropic's own versioned tools: `web_search_20250305`."""

    type: Annotated[str, Field(pattern=SERVER_TOOL.pattern)]
    cache_control: JSON | None = None


def _tool_kind(value: Any) -> str | None:
    kind = _type_of(value)
    if kind is None or kind in ("custom", "function"):
        return "#function"
    if not isinstance(kind, str):
        return None
    return "#native" if kind in NATIVE_TOOLS else "#server" if SERVER_TOOL.fullmatch(kind) else None


Tool: TypeAlias = Annotated[
    Annotated[FunctionTool, Tag("#function")]
    | Annotated[NativeTool, Tag("#native")]
    | Annotated[ServerTool, Tag("#server")],
    Discriminator(_tool_kind),
]


class ToolChoice(_Request):
    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(_Request):
    """`enabled` wants `budget_tokens`; `adaptive` leaves it to the model (and `output_config.effort`)."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None


class OutputConfig(_Request):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JSON | None = None


class OutputFormat(_Request):
    """`{"type": "json_schema", "json_schema": {…}}`, or with the schema under `schema` as Anthropic's beta had it."""

    type: Literal["json_schema"]
    json_schema: JSON | None = None
    schema_: Annotated[JSON | None, Field(alias="schema")] = None


class ImageOutput(_Request):
    size: Annotated[str, Field(pattern=r"^(auto|[1-9]\d{1,4}x[1-9]\d{1,4})$")] | None = None
    quality: str | None = None


class AudioOutput(_Request):
    voice: str | None = None
    format: str | None = None


class Output(_Request):
    modalities: Annotated[list[Literal["text", "image", "audio"]], Field(min_length=1)] = ["text"]
    image: ImageOutput | None = None
    audio: AudioOutput | None = None


class Metadata(_Request):
    user_id: str | None = None


_Words: TypeAlias = Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(max_length=64)]


class MessageRequest(_Request):
    """A request, validated. `body` is what the caller sent: what goes to Anthropic is cut from it, not rebuilt.

    Make one with `parse_request`, whose errors name the place.
    """

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True, defer_build=True
    )

    model: str
    messages: Annotated[list[MessageParam], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0, le=100_000_000)] | None = None
    system: Annotated[
        Annotated[str, Tag("#string")] | Annotated[list[TextBlock], Tag("#blocks")], Discriminator(_text_or_blocks)
    ] = ""
    stop_sequences: _Words = Field(default_factory=list)
    metadata: Metadata | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    output_format: OutputFormat | None = None
    output: Output | None = None
    voice: JSON | None = None
    extensions: dict[str, JSON] = Field(default_factory=dict)
    provider_keys: dict[str, str] = Field(default_factory=dict, repr=False)

    # What `parse_request` finds out stands in the instance's own dict, where reading it costs nothing.

    @functools.cached_property
    def body(self) -> JSON:
        """What the caller sent, but for `provider_keys`."""
        return {}

    @functools.cached_property
    def provider(self) -> str:
        """The provider id: what stands before the first `/` of the model."""
        return split_model(self.model)[0]

    @functools.cached_property
    def model_name(self) -> str:
        """The provider's own name for the model."""
        return split_model(self.model)[1]

    @functools.cached_property
    def headers(self) -> dict[str, str]:
        """The caller's `anthropic-version` and `anthropic-beta`, by lower-case name."""
        return {}

    @functools.cached_property
    def dropped(self) -> list[str]:
        """Advisory fields that the provider does not take, filled by `encode`."""
        return []

    @functools.cached_property
    def fallbacks(self) -> list[MessageRequest]:
        """The same request for the models that come after this one in its alias."""
        return []

    @functools.cached_property
    def attempts(self) -> list[Attempt]:
        """Which models were asked, in order, filled by the engine. A request and its fallbacks share the list."""
        return []

    @functools.cached_property
    def speech(self) -> AudioSeconds:
        """What speech services heard (`in`) and spoke (`out`) for this request, filled by the engine."""
        return collections.defaultdict(float)

    def for_model(self, model: str) -> MessageRequest:
        """The same request for another model, to be made before anything was dropped from this one."""
        provider, name = split_model(model)
        body = self.body | {"messages": [dict(message) for message in self.body["messages"]]}
        twin = self.model_copy(update={"messages": [message.model_copy() for message in self.messages]})
        twin.__dict__.update(body=body, provider=provider, model_name=name, dropped=[], attempts=self.attempts)
        return twin

    def drop(self, *fields: str) -> None:
        """Leave a field out, and say so. `signature` stands for all reasoning carried over from earlier turns."""
        self.dropped += [name for name in fields if name not in self.dropped]
        if "signature" in fields:
            for message, given in zip(self.messages, self.body["messages"], strict=True):
                if isinstance(message.content, list):
                    kept = [not isinstance(block, (ThinkingBlock, RedactedThinkingBlock)) for block in message.content]
                    message.content = list(itertools.compress(message.content, kept))
                    given["content"] = list(itertools.compress(given["content"], kept))

    @property
    def system_text(self) -> str:
        return self.system if isinstance(self.system, str) else "\n\n".join(block.text for block in self.system)

    @property
    def functions(self) -> list[FunctionTool]:
        return [tool for tool in self.tools if isinstance(tool, FunctionTool)]

    @property
    def modalities(self) -> set[str]:
        return set(self.output.modalities) if self.output else {"text"}

    @property
    def json_schema(self) -> JSON | None:
        """The schema of structured output, whichever of the three spellings the caller used."""
        if self.output_format:
            schema = self.output_format.json_schema or self.output_format.schema_ or {}
            inner = schema.get("schema")  # OpenAI's spelling: {"name": …, "schema": {…}}
            return inner if isinstance(inner, dict) and "type" not in schema else schema
        given = self.output_config.format if self.output_config else None
        own = given.get("schema") if given and given.get("type") == "json_schema" else None
        return own if isinstance(own, dict) else None

    @property
    def thinking_level(self) -> str | None:
        """What was asked, on the one scale of `LEVELS`; None if nothing was."""
        if self.thinking and self.thinking.type in ("disabled", "between_tools"):
            return "none"
        if self.output_config and self.output_config.effort:
            return self.output_config.effort
        if not self.thinking:
            return None
        budget = self.thinking.budget_tokens
        return "medium" if budget is None else next(level for most, level in BUDGET_LEVELS if budget < most)

    @property
    def forced_tool(self) -> bool:
        return self.tool_choice is not None and self.tool_choice.type in ("any", "tool")

    @property
    def chosen_function(self) -> bool:
        """Whether one function tool must be called; a native one has no name to be chosen by."""
        choice = self.tool_choice
        return choice is not None and choice.type == "tool" and any(choice.name == t.name for t in self.functions)

    @property
    def serial_tools(self) -> bool:
        return self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use

    @property
    def blocks(self) -> list[Block]:
        """The blocks of all turns; a turn that is a plain string has none."""
        return [block for turn in self.messages if not isinstance(turn.content, str) for block in turn.content]

    @property
    def thinks_back(self) -> bool:
        """Whether the history carries reasoning."""
        return any(isinstance(block, (ThinkingBlock, RedactedThinkingBlock)) for block in self.blocks)

    @property
    def tool_names(self) -> dict[str, str]:
        """Tool-call id → name of the tool, over the whole history."""
        return {block.id: block.name for block in self.blocks if isinstance(block, ToolUseBlock)}


AudioSeconds: TypeAlias = collections.defaultdict[tuple[str, str], float]  # by service and direction


@dataclass(slots=True)
class Attempt:
    """One model that was asked: why it could not answer, and what was asked there once more.

    `repeats` holds `connection` (there was none), `field` (an advisory one was refused), `token` (it had run out).
    """

    provider: str
    model: str
    fault: Error | None = None
    repeats: list[str] = field(default_factory=list)


def place_of(request: MessageRequest, wanted: Any) -> str | None:
    """Where a block stands in the request: `messages[2].content[0]`."""
    for i, message in enumerate(request.messages if wanted is not None else ()):
        for j, block in enumerate(message.content):
            if block is wanted:
                return f"messages[{i}].content[{j}]"
            inner = block.content if isinstance(block, ToolResultBlock) else ()
            for k, part in enumerate(inner):
                if part is wanted:
                    return f"messages[{i}].content[{j}].content[{k}]"
    return None


LEVELS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
BUDGET_LEVELS = ((4_096, "low"), (12_288, "medium"), (math.inf, "high"))
LEVEL_BUDGETS = {"minimal": 1_024, "low": 2_048, "medium": 8_192, "high": 16_384, "xhigh": 24_576, "max": 32_768}


Aliases: TypeAlias = Mapping[str, str | Sequence[str]]
MAX_FALLBACKS = 16


def alias_models(name: str, models: object) -> list[str]:
    """The models of an alias, in the order in which they are tried. Raises `InvalidRequestError` for what is none."""
    listed = [models] if isinstance(models, str) else models
    param = f"aliases.{name}"
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(model, str) for model in listed):
        raise InvalidRequestError("must be a model, or a list of models", param=param)
    if len(listed) > MAX_FALLBACKS or len(set(listed)) < len(listed):
        raise InvalidRequestError(f"must be at most {MAX_FALLBACKS} models, each of them once", param=param)
    for model in listed:
        try:
            split_model(model)
        except InvalidRequestError as fault:
            raise InvalidRequestError(fault.message, param=param) from None
    return list(listed)


def parse_request(
    body: JSON, *, headers: Mapping[str, str] | None = None, aliases: Aliases | None = None
) -> MessageRequest:
    """Check a request body and say what it means. An alias of several models makes a request with `fallbacks`.

    Raises `InvalidRequestError` whose `param` is the place in the caller's own body: `messages[2].content[0].text`.
    """
    given = {key: value for key, value in body.items() if value is not None}
    try:
        request = MessageRequest.model_validate(given)
    except ValidationError as fault:
        raise _validation_error(fault, given) from None
    except RecursionError:
        raise InvalidRequestError("the request is nested too deeply", code="json_too_deep") from None
    models = (aliases or {}).get(request.model, request.model)
    first, others = (models, ()) if isinstance(models, str) else (models[0], models[1:])
    provider, name = split_model(first, aliases or {})
    kept = given.copy()
    kept.pop("provider_keys", None)
    kept["messages"] = [dict(message) for message in given["messages"]]
    request.__dict__.update(
        body=kept,
        provider=provider,
        model_name=name,
        headers=dict(headers or ()),
        dropped=[],
        fallbacks=[],
        attempts=[],
    )
    _check_messages(request)
    _check_tools(request)
    _check_options(request)
    if others:
        request.__dict__["fallbacks"] = [request.for_model(model) for model in others]
    return request


def split_model(model: str, aliases: Iterable[str] = ()) -> tuple[str, str]:
    """`provider/model`, cut at the first slash. Raises `InvalidRequestError` for anything else."""
    provider, slash, name = model.partition("/")
    if not slash or not provider or not name:
        also = f", or one of the aliases {', '.join(sorted(aliases))}" if aliases else ""
        shown = _printable(model, 100)
        raise InvalidRequestError(f"model must be 'provider/model'{also}; got {shown!r}", param="model")
    if provider not in PROVIDERS:
        raise InvalidRequestError(f"unknown provider {provider[:40]!r}; known: {', '.join(PROVIDERS)}", param="model")
    if len(model) > 256 or not MODEL_NAME.fullmatch(name) or ".." in name or "//" in name:
        shown = _printable(model, 100)
        raise InvalidRequestError(f"{shown!r} is not a model name in the form provider/model", param="model")
    return provider, name


FAULTS = {  # pydantic's types of error, in words that need no Python
    "missing": "is required",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "too_short": "must not be empty",
    "string_pattern_mismatch": "does not have the right form",
    "extra_forbidden": "no such setting",
}


def _validation_error(fault: ValidationError, body: JSON) -> Error:
    """The first complaint, at its place in the caller's body: union tags, which pydantic adds to the path, fall out."""
    first = fault.errors(include_url=False, include_input=False, include_context=False)[0]
    path: list[str | int] = []
    value: Any = body
    for number, step in enumerate(first["loc"]):
        if isinstance(step, str) and step.startswith("#"):
            continue
        inside = isinstance(value, dict) and step in value
        if inside or (isinstance(value, list) and isinstance(step, int) and 0 <= step < len(value)):
            path.append(step)
            value = value[step]
        elif first["type"] == "missing" and number == len(first["loc"]) - 1:
            path.append(step)
    param = _join(path)
    if param == "model":
        return InvalidRequestError("model: must be a string in the form 'provider/model'", param=param)
    said = FAULTS.get(first["type"], first["msg"][:300])
    if first["type"] == "string_type" and "#string" in first["loc"]:
        said = "must be a string or a list of blocks"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(value, dict):
            return InvalidRequestError(f"{param}: must be an object", param=param)
        message = "is required" if kind is None else f"unknown type {str(kind)[:50]!r}"
        return InvalidRequestError(f"{param}.type: {_printable(message)}", param=f"{param}.type")
    return InvalidRequestError(f"{param}: {said}" if param else "the body must be an object", param=param)


def _nothing_said() -> Error:
    return InvalidRequestError("messages: nothing but empty text", param="messages")


def _check_messages(request: MessageRequest) -> None:
    called: set[str] = set()
    answered: set[str] = set()
    for i, message in enumerate(request.messages):
        for j, block in enumerate(() if isinstance(message.content, str) else message.content):
            place = f"messages[{i}].content[{j}]"
            _check_role(message.role, block, place)
            _check_block(block, place)
            if isinstance(block, ToolUseBlock):
                if block.id in called:
                    raise InvalidRequestError(f"{place}.id: this id was used before", param=f"{place}.id")
                called.add(block.id)
            elif isinstance(block, ToolResultBlock):
                where = f"{place}.tool_use_id"
                if block.tool_use_id not in called:
                    raise InvalidRequestError(f"{where}: no earlier tool_use has this id", param=where)
                if block.tool_use_id in answered:
                    raise InvalidRequestError(f"{where}: this tool_use already has a result", param=where)
                answered.add(block.tool_use_id)


def _check_role(role: str, block: Block, place: str) -> None:
    wrong = _USER_ONLY if role == "assistant" else _ASSISTANT_ONLY
    if isinstance(block, wrong) or (role == "system" and not isinstance(block, TextBlock)):
        raise InvalidRequestError(
            f"{place}.type: {block.type} does not belong in a {role} message", param=f"{place}.type"
        )
    if role != "assistant" and isinstance(block, AudioBlock) and block.source is None:
        raise InvalidRequestError(f"{place}.source: is required", param=f"{place}.source")


def _check_block(block: Block, place: str) -> None:
    source = getattr(block, "source", None)
    if isinstance(source, Base64Source) and not is_base64(source.data):
        raise InvalidRequestError(f"{place}.source.data: not valid base64", param=f"{place}.source.data")
    if isinstance(block, ToolResultBlock) and not isinstance(block.content, str):
        for k, inner in enumerate(block.content):
            inner_place = f"{place}.content[{k}]"
            if isinstance(inner, (ToolUseBlock, ToolResultBlock, ThinkingBlock, RedactedThinkingBlock)):
                raise InvalidRequestError(f"{inner_place}.type: not in a tool result", param=f"{inner_place}.type")
            _check_role("user", inner, inner_place)
            _check_block(inner, inner_place)


def is_base64(data: str) -> bool:
    """Whether it is standard base64: padded, without line breaks, and not a character more."""
    try:
        binascii.a2b_base64(data, strict_mode=True)
    except ValueError:
        return False
    return len(data) % 4 == 0 and not data.endswith("===")


def _check_tools(request: MessageRequest) -> None:
    if not request.tools and request.tool_choice is None:
        return
    seen: set[str] = set()
    for i, tool in enumerate(request.tools):
        if isinstance(tool, FunctionTool):
            if tool.name in seen:
                raise InvalidRequestError(f"tools[{i}].name: an earlier tool has this name", param=f"tools[{i}].name")
            seen.add(tool.name)
    choice = request.tool_choice
    native = {tool.type for tool in request.tools if isinstance(tool, NativeTool)}
    named = choice is not None and choice.type == "tool"
    opaque = any(isinstance(tool, ServerTool) for tool in request.tools)
    if choice and named and choice.name not in seen | native and not opaque:
        raise InvalidRequestError("tool_choice.name: no tool has this name", param="tool_choice.name")
    if request.forced_tool and not request.tools:
        raise InvalidRequestError("tool_choice: there are no tools to choose from", param="tool_choice")


def _check_options(request: MessageRequest) -> None:
    thinking = request.thinking
    if thinking and thinking.type == "enabled" and thinking.budget_tokens is None:
        raise InvalidRequestError("thinking.budget_tokens: is required", param="thinking.budget_tokens")
    if request.output_format and request.json_schema in (None, {}):
        raise InvalidRequestError("output_format.json_schema: is required", param="output_format.json_schema")
    for provider, extra in request.extensions.items():
        if fixed := FIXED_FIELDS & extra.keys():
            param = f"extensions.{provider}.{min(fixed)}"
            raise InvalidRequestError(f"{param}: extensions cannot set this", param=param)


FIXED_FIELDS = {"model", "messages", "input", "contents", "stream", "project", "request", "base_url", "api_base"}


# == The response ======================================================================================================


class _Response(BaseModel):
    """What a provider answered, read leniently: unknown fields are kept."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True, defer_build=True)

    def to_wire(self) -> JSON:
        """What came from the provider, and no default of ours but `type`."""
        kind = getattr(self, "type", None)
        fields = self.model_dump(exclude_unset=True)
        return fields if kind is None or "type" in fields else {"type": kind, **fields}


class Text(_Response):
    type: Literal["text"] = "text"
    text: str
    citations: list[JSON] | None = None


class ToolUse(_Response):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: JSON


class ThinkingText(_Response):
    """`thinking` may be empty: the signature is what carries the reasoning to the next turn."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


class Media(_Response):
    """A generated image, or speech with its `transcript`. In a stream `audio_delta` events hold the sound of speech."""

    type: Literal["image", "audio"]
    source: JSON = {}
    transcript: str | None = None


class OtherBlock(_Response):
    """`redacted_thinking`, server-tool blocks, and whatever comes next."""

    type: str


def _content_kind(value: Any) -> str:
    kind = _type_of(value)
    return kind if kind in ("text", "tool_use", "thinking") else "media" if kind in ("image", "audio") else "other"


ContentBlock: TypeAlias = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[ToolUse, Tag("tool_use")]
    | Annotated[ThinkingText, Tag("thinking")]
    | Annotated[Media, Tag("media")]
    | Annotated[OtherBlock, Tag("other")],
    Discriminator(_content_kind),
]


STOP_REASONS = (
    *("end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal"),
    "model_context_window_exceeded",
)


class Usage(_Response):
    """Tokens, in Anthropic's arithmetic: the four parts do not overlap, `total_tokens` is their sum."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    total_tokens: int = 0


class Message(_Response):
    """The answer. `dropped` names the advisory fields of the request that the provider does not take.

    With `voice`, `metadata` holds `user_transcript`, and `audio_error` where the answer could not be spoken.
    """

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ContentBlock]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: Usage
    metadata: JSON | None = None

    _dropped: list[str] = PrivateAttr(default_factory=list)
    _request_id: str | None = PrivateAttr(default=None)

    @property
    def dropped(self) -> list[str]:
        return self._dropped

    @property
    def request_id(self) -> str | None:
        return self._request_id

    @property
    def text(self) -> str:
        """All text blocks, joined."""
        return "".join(block.text for block in self.content if isinstance(block, Text))

    @property
    def thinking(self) -> str:
        """All visible reasoning, joined."""
        return "".join(block.thinking for block in self.content if isinstance(block, ThinkingText))

    @property
    def tool_calls(self) -> list[ToolUse]:
        return [block for block in self.content if isinstance(block, ToolUse)]


def count(value: Any) -> int:
    """A token count from a provider: anything but a plausible number is 0."""
    return int(value) if isinstance(value, (int, float)) and 0 <= value < 1e15 else 0


def make_usage(prompt: Any = 0, output: Any = 0, *, cached: Any = 0, written: Any = 0, thinking: Any = None) -> JSON:
    """Usage from a provider that counts cached and written tokens inside the prompt."""
    read, created = count(cached), count(written)
    usage: JSON = {
        "input_tokens": max(0, count(prompt) - read - created),
        "output_tokens": count(output),
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": created,
    }
    usage["total_tokens"] = sum(usage.values())
    if thinking is not None:
        usage["output_tokens_details"] = {"thinking_tokens": count(thinking)}
    return usage


# == Events ============================================================================================================


@dataclass(slots=True)
class TextDelta:
    text: str
    type: ClassVar[Literal["text_delta"]] = "text_delta"


@dataclass(slots=True)
class InputJSONDelta:
    partial_json: str
    type: ClassVar[Literal["input_json_delta"]] = "input_json_delta"


@dataclass(slots=True)
class ThinkingDelta:
    thinking: str
    type: ClassVar[Literal["thinking_delta"]] = "thinking_delta"


@dataclass(slots=True)
class SignatureDelta:
    signature: str
    type: ClassVar[Literal["signature_delta"]] = "signature_delta"


@dataclass(slots=True)
class CitationsDelta:
    citation: JSON
    type: ClassVar[Literal["citations_delta"]] = "citations_delta"


@dataclass(slots=True)
class OtherDelta:
    """A delta that vai does not know, as it came."""

    raw: JSON
    type: ClassVar[Literal["other"]] = "other"


Delta: TypeAlias = TextDelta | InputJSONDelta | ThinkingDelta | SignatureDelta | CitationsDelta | OtherDelta


@dataclass(slots=True)
class MessageStart:
    message: Message
    type: ClassVar[Literal["message_start"]] = "message_start"

    def to_wire(self) -> JSON:
        return {"type": self.type, "message": self.message.to_wire()}


@dataclass(slots=True)
class ContentBlockStart:
    index: int
    content_block: ContentBlock
    type: ClassVar[Literal["content_block_start"]] = "content_block_start"

    def to_wire(self) -> JSON:
        return {"type": self.type, "index": self.index, "content_block": self.content_block.to_wire()}


@dataclass(slots=True)
class ContentBlockDelta:
    index: int
    delta: Delta
    type: ClassVar[Literal["content_block_delta"]] = "content_block_delta"

    def to_wire(self) -> JSON:
        delta = self.delta
        if isinstance(delta, OtherDelta):
            return {"type": self.type, "index": self.index, "delta": delta.raw}
        name = delta.__slots__[0]
        return {"type": self.type, "index": self.index, "delta": {"type": delta.type, name: getattr(delta, name)}}


@dataclass(slots=True)
class ContentBlockStop:
    index: int
    type: ClassVar[Literal["content_block_stop"]] = "content_block_stop"

    def to_wire(self) -> JSON:
        return {"type": self.type, "index": self.index}


@dataclass(slots=True)
class MessageDelta:
    """`delta` holds `stop_reason` and `stop_sequence`; `usage` is cumulative and final."""

    delta: JSON
    usage: Usage
    type: ClassVar[Literal["message_delta"]] = "message_delta"

    @property
    def stop_reason(self) -> str | None:
        return self.delta.get("stop_reason")

    def to_wire(self) -> JSON:
        return {"type": self.type, "delta": self.delta, "usage": self.usage.to_wire()}


@dataclass(slots=True)
class MessageStop:
    type: ClassVar[Literal["message_stop"]] = "message_stop"

    def to_wire(self) -> JSON:
        return {"type": self.type}


@dataclass(slots=True)
class Ping:
    type: ClassVar[Literal["ping"]] = "ping"

    def to_wire(self) -> JSON:
        return {"type": self.type}


@dataclass(slots=True)
class TranscriptDelta:
    """What the user was heard to say; it comes before `message_start`."""

    text: str
    type: ClassVar[Literal["transcript_delta"]] = "transcript_delta"

    def to_wire(self) -> JSON:
        return {"type": self.type, "role": "user", "delta": {"text": self.text}}


@dataclass(slots=True)
class AudioDelta:
    """The next bytes of the answer as speech. Joined they are a file; a WAV file's header leaves the length open."""

    data: bytes = field(repr=False)
    format: str
    sample_rate: int
    type: ClassVar[Literal["audio_delta"]] = "audio_delta"

    def to_wire(self) -> JSON:
        data = base64.b64encode(self.data).decode("ascii")
        return {"type": self.type, "delta": {"data": data, "format": self.format, "sample_rate": self.sample_rate}}


@dataclass(slots=True)
class AudioError:
    """Why the answer is spoken no further; `error` is that of an error envelope. The text goes on."""

    error: JSON
    type: ClassVar[Literal["audio_error"]] = "audio_error"

    def to_wire(self) -> JSON:
        return {"type": self.type, "error": self.error}


SpeechEvent: TypeAlias = TranscriptDelta | AudioDelta | AudioError
StreamEvent: TypeAlias = (
    MessageStart
    | ContentBlockStart
    | ContentBlockDelta
    | ContentBlockStop
    | MessageDelta
    | MessageStop
    | Ping
    | SpeechEvent
)


def sse_frame(event: StreamEvent) -> bytes:
    """An event as the bytes of a server-sent event."""
    if type(event) is ContentBlockDelta and type(event.delta) is TextDelta:  # nine in ten: written without a dict
        return (
            'event: content_block_delta\ndata: {"type":"content_block_delta","index":'
            f'{event.index},"delta":{{"type":"text_delta","text":{_quoted(event.delta.text)}}}}}\n\n'
        ).encode("ascii")
    return b"event: %b\ndata: %b\n\n" % (event.type.encode("ascii"), dumps(event.to_wire()))


def event_from_wire(data: JSON) -> StreamEvent | None:
    """The event that a canonical wire object speaks of; None for a type that vai does not know."""
    match data["type"]:
        case "content_block_delta":
            return ContentBlockDelta(data["index"], _delta_from_wire(data["delta"]))
        case "content_block_start":
            return ContentBlockStart(data["index"], parse_block(data["content_block"]))
        case "content_block_stop":
            return ContentBlockStop(data["index"])
        case "message_start":
            return MessageStart(Message.model_validate(data["message"]))
        case "message_delta":
            return MessageDelta(data["delta"], Usage.model_validate(data["usage"]))
        case "message_stop":
            return MessageStop()
        case "ping":
            return Ping()
        case "transcript_delta":
            return TranscriptDelta(data["delta"]["text"] + "")
        case "audio_delta":
            delta = data["delta"]
            return AudioDelta(base64.b64decode(delta["data"]), delta["format"] + "", delta["sample_rate"] + 0)
        case "audio_error":
            return AudioError(dict(data["error"]))
    return None


_DELTAS: dict[str, type[TextDelta | InputJSONDelta | ThinkingDelta | SignatureDelta | CitationsDelta]] = {
    delta.type: delta for delta in (TextDelta, InputJSONDelta, ThinkingDelta, SignatureDelta, CitationsDelta)
}


def _delta_from_wire(delta: JSON) -> Delta:
    known: Any = _DELTAS.get(delta["type"])
    if known is None:
        return OtherDelta(delta)
    value = delta[known.__slots__[0]]
    if type(value) is not (dict if known is CitationsDelta else str):
        raise ValueError("a delta of the wrong type")
    return cast(Delta, known(value))


def accumulate(events: Iterable[StreamEvent]) -> Message | None:
    """Add up a stream: the message that a request without `stream` would have got. None without `message_start`."""
    total = Accumulator()
    for event in events:
        total.add(event)
    return total.message


class Accumulator:
    """The mirror of `EventBuilder`. `message` is complete up to the last event that was added."""

    def __init__(self, message: Message | None = None) -> None:
        self.message = message
        self._pieces: list[str] = []
        self._heard = ""
        self._audio: list[AudioDelta] = []

    def add(self, event: StreamEvent) -> None:
        if isinstance(event, MessageStart):
            self.message = event.message.model_copy(update={"content": []})
            if self._heard:
                self._note("user_transcript", self._heard)
            return
        if self.message is None:
            self._heard += event.text if isinstance(event, TranscriptDelta) else ""
            return
        match event:
            case ContentBlockDelta(delta=TextDelta(piece) | ThinkingDelta(piece) | InputJSONDelta(piece)):
                self._pieces.append(piece)
            case ContentBlockStart(content_block=block):
                self.message.content.append(block.model_copy())
                self._pieces = []
                if isinstance(block, Media) and not block.source and self._audio:
                    self.message.content[-1] = Media(**block.to_wire() | {"source": _joined_audio(self._audio)})
            case ContentBlockDelta(delta=delta):
                self._add_rare(self.message.content[-1], delta)
            case ContentBlockStop():
                self.settle()
            case MessageDelta(delta=delta, usage=usage):
                for name, value in delta.items():
                    setattr(self.message, name, value)
                self.message.usage = usage
            case AudioDelta():
                self._audio.append(event)
            case AudioError(error=error):
                self._note("audio_error", error)

    def _note(self, name: str, value: Any) -> None:
        if self.message:
            self.message.metadata = {**(self.message.metadata or {}), name: value}

    def settle(self) -> None:
        """Join what has come of the open block."""
        pieces, self._pieces = "".join(self._pieces), []
        block = self.message.content[-1] if self.message and self.message.content else None
        match block:
            case Text():
                block.text += pieces
            case ThinkingText():
                block.thinking += pieces
            case ToolUse() if pieces:
                block.input = tool_input(pieces)
            case OtherBlock() if pieces:
                setattr(block, "input", tool_input(pieces))  # noqa: B010  (an extra field: the class has none)

    @staticmethod
    def _add_rare(block: ContentBlock, delta: Delta) -> None:
        match block, delta:
            case ThinkingText(), SignatureDelta(signature):
                block.signature += signature
            case Text(), CitationsDelta(citation):
                block.citations = [*(block.citations or ()), citation]
            case _, OtherDelta(raw):
                for name, value in raw.items():
                    if name != "type":
                        setattr(block, name, value)


def _joined_audio(deltas: Sequence[AudioDelta]) -> JSON:
    """The source of an audio block."""
    format = deltas[0].format
    audio = whole_file(b"".join(delta.data for delta in deltas), format)
    return {
        "type": "base64",
        "media_type": AUDIO_TYPES.get(format, f"audio/{format}").format(deltas[0].sample_rate),
        "data": base64.b64encode(audio).decode("ascii"),
    }


def whole_file(audio: bytes, format: str) -> bytes:
    """Speech that was streamed, as a file. A WAV file's length is known now: it goes into the header of 44 bytes."""
    if format != "wav":
        return audio
    size = len(audio) - 44
    return b"".join((audio[:4], (size + 36).to_bytes(4, "little"), audio[8:40], size.to_bytes(4, "little"), audio[44:]))


AUDIO_TYPES = {"wav": "audio/wav", "mp3": "audio/mpeg", "pcm": "audio/pcm;rate={}"}


def tool_input(arguments: str) -> JSON:
    """A tool call's arguments as an object. One that is none says `invalid_json`, and nothing of it is lost."""
    for text in (arguments, arguments + completion(arguments)):
        with contextlib.suppress(ValueError):
            parsed = (loads(text) if text.strip() else None) or {}
            return parsed if isinstance(parsed, dict) else {"invalid_json": arguments}
    return {"invalid_json": arguments}


# What may be missing where JSON breaks off: nothing, a value, the end of a string or key, the rest of a literal.
_TAILS = (
    *("", "null", ":null", '"":null', "0"),
    *(escape + end for escape in ("", "\\", "0000", "000", "00", "0") for end in ('"', '":null')),
    *("rue", "ue", "e", "alse", "lse", "se", "ull", "ll", "l"),
)


def is_object(arguments: str) -> bool:
    """Whether a tool call's arguments are a whole JSON object."""
    try:
        return isinstance(loads(arguments), dict)
    except ValueError:
        return False


def completion(arguments: str) -> str:
    """What makes arguments that broke off (`max_tokens`) an object that says `invalid_json`; empty where nothing does.

    Clients read a tool call's fragments as they are: half an object would be an error there, or an empty one.
    """
    closers: list[str] = []
    for mark in re.findall(r'"(?:[^"\\]|\\.)*"?|[{}\[\]]', arguments, re.DOTALL):
        if mark in ("{", "["):
            closers.append("}" if mark == "{" else "]")
        elif mark in ("}", "]") and closers:
            closers.pop()
    if not closers or closers[0] != "}":
        return ""
    inner = "".join(reversed(closers[1:]))
    for tail in _TAILS:
        for comma in (",", ""):
            suffix = f'{tail}{inner}{comma}"invalid_json":true}}'
            with contextlib.suppress(ValueError):
                if loads(arguments + suffix).get("invalid_json") is True:
                    return suffix
    return ""


# == Server-sent events ================================================================================================


@dataclass(slots=True)
class SSE:
    event: str
    data: str


class SSEDecoder:
    """Bytes in, events out, as the HTML standard has it: CR, LF or CRLF, comments, several `data` lines, a BOM.

    Raises `ProviderError` with code `event_too_large` for an event over `limit` bytes.
    """

    def __init__(self, limit: int = 32 << 20, provider: str | None = None) -> None:
        self._limit = limit
        self._provider = provider
        self._parts: list[bytes] = []  # of the unfinished line
        self._size = 0
        self._data: list[bytes] = []
        self._event = ""
        self._after_cr = False
        self._first = True

    def feed(self, chunk: bytes) -> list[SSE]:
        if self._after_cr and chunk:
            self._after_cr = False
            if chunk[0] == 0x0A:
                chunk = chunk[1:]
        if b"\r" in chunk:
            self._after_cr = chunk[-1] == 0x0D
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n" not in chunk:
            self._parts.append(chunk)
            self._size += len(chunk)
            self._check_size()
            return []
        lines = (b"".join(self._parts) + chunk if self._parts else chunk).split(b"\n")
        self._parts = [last] if (last := lines.pop()) else []
        events = self._lines(lines)
        self._size = len(last) + sum(map(len, self._data))
        self._check_size()
        return events

    def _check_size(self) -> None:
        if self._size > self._limit:
            sender = self._provider or "the provider"
            message = f"{sender} sent an event of over {self._limit} bytes"
            raise ProviderError(message, code="event_too_large", provider=self._provider)

    def close(self) -> list[SSE]:
        """The end of the body. Some servers leave out the last blank line; an event that is whole still counts."""
        lines = [b"".join(self._parts), b""] if self._parts else [b""]
        self._parts = []
        return self._lines(lines)

    def _lines(self, lines: Iterable[bytes]) -> list[SSE]:
        events: list[SSE] = []
        for line in lines:
            if not line:
                if any(self._data):
                    data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
                    self._size = len(data)
                    self._check_size()
                    events.append(SSE(self._event, data.decode("utf-8", "replace")))
                self._data, self._event = [], ""
                continue
            if self._first:
                self._first = False
                line = line.removeprefix(codecs.BOM_UTF8)
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value[1:] if value[:1] == b" " else value)
            elif name == b"event":
                self._event = value.removeprefix(b" ").decode("utf-8", "replace")
        return events


# == The grammar of a stream ===========================================================================================


@dataclass(slots=True)
class _OpenBlock:
    key: Any
    block: ContentBlock
    deltas: list[Delta] = field(default_factory=list)  # held back while another block is being written
    closed: bool = False


INVENTED_ID = "toolu_vai_"  # begins the ids of calls to which a provider gave none


class EventBuilder:
    """Writes the grammar of events, once for all adapters: blocks from 0, one open at a time, none reopened.

    A block has a `key` of the adapter's choosing. While one block is open, later ones wait; text and thinking end when
    something else begins, a tool call when its arguments are whole.
    """

    def __init__(self, provider: str, taken_ids: Iterable[str] = ()) -> None:
        self.provider = provider
        self.started = self.ended = False
        self.called_tools = False
        self.usage: Usage | None = None
        self.index = -1
        self._open: _OpenBlock | None = None
        self._waiting: list[_OpenBlock] = []
        self._arguments: list[str] = []  # of the open tool call
        self._ids = set(taken_ids)

    # -- message ----------------------------------------------------------------------------------------------------

    def start(self, id: Any, model: Any, usage: JSON | None = None, **more: Any) -> list[StreamEvent]:
        """`message_start`, once; `model` as the provider reports it."""
        if self.started:
            return []
        self.started = True
        message = Message(
            id=id if isinstance(id, str) and id else f"msg_{secrets.token_hex(12)}",
            type="message",
            role="assistant",
            model=f"{self.provider}/{model}",
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=Usage(**(usage or make_usage())),
            **more,
        )
        return [MessageStart(message)]

    def finish(
        self, stop_reason: str, usage: JSON, *, stop_sequence: str | None = None, **more: Any
    ) -> list[StreamEvent]:
        """Everything that is still open, then `message_delta` and `message_stop`."""
        events: list[StreamEvent] = []
        for block in self._waiting:
            block.closed = True
        if self._open:
            events += self._end()
        if stop_reason == "end_turn" and self.called_tools:
            stop_reason = "tool_use"
        self.ended, self.usage = True, Usage(**usage)
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence, **more}
        return [*events, MessageDelta(delta, self.usage), MessageStop()]

    # -- blocks -----------------------------------------------------------------------------------------------------

    def text(self, text: str, key: Any = "text") -> list[StreamEvent]:
        if not _is_text(text):
            return []
        if self._open and self._open.key == key:
            return [ContentBlockDelta(self.index, TextDelta(text))]
        return [*self._ensure(key, Text(type="text", text="")), *self.delta(key, TextDelta(text))]

    def thinking(self, text: str, key: Any = "thinking") -> list[StreamEvent]:
        if not _is_text(text):
            return []
        block = ThinkingText(type="thinking", thinking="", signature="")
        return [*self._ensure(key, block), *self.delta(key, ThinkingDelta(text))]

    def state(self, state: JSON, key: Any = "thinking") -> list[StreamEvent]:
        """What the provider wants back in a later turn, in the signature of a thinking block, open or new."""
        events = self._ensure(key, ThinkingText(type="thinking", thinking="", signature=""))
        return [*events, *self.delta(key, SignatureDelta(sign(self.provider, state))), *self.close(key)]

    def tool_use(self, key: Any, id: Any, name: str, arguments: str | None = None, **more: Any) -> list[StreamEvent]:
        """A tool call; `arguments` if they came whole, else by `arguments(key, fragment)`."""
        self.called_tools = True
        events = self.open(key, ToolUse(type="tool_use", id=self._tool_id(id), name=name, input={}, **more))
        if arguments is not None:
            text = arguments if is_object(arguments) else dumps(tool_input(arguments)).decode("ascii")
            events += [*self.delta(key, InputJSONDelta(text)), *self.close(key)]
        return events

    def arguments(self, key: Any, fragment: str) -> list[StreamEvent]:
        return self.delta(key, InputJSONDelta(fragment)) if _is_text(fragment) else []

    def whole(self, block: JSON) -> list[StreamEvent]:
        """A block that needs no deltas: an image, a server tool's result."""
        key = object()
        return [*self.open(key, parse_block(block)), *self.close(key)]

    def citation(self, citation: JSON, key: Any = "text") -> list[StreamEvent]:
        return self.delta(key, CitationsDelta(citation))

    # -- the one place that knows what is open ----------------------------------------------------------------------

    def is_open(self, key: Any) -> bool:
        if self._open is not None and self._open.key == key:
            return True
        return any(block.key == key and not block.closed for block in self._waiting)

    def open(self, key: Any, block: ContentBlock) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        if self._open and not self._waiting and self._complete(self._open):
            events += self._end()
        entry = _OpenBlock(key, block)
        if self._open:
            self._waiting.append(entry)
            return events
        return events + self._begin(entry)

    def delta(self, key: Any, delta: Delta) -> list[StreamEvent]:
        if self._open and self._open.key == key:
            if isinstance(delta, InputJSONDelta):
                self._arguments.append(delta.partial_json)
            return [ContentBlockDelta(self.index, delta)]
        for entry in reversed(self._waiting):
            if entry.key == key and not entry.closed:
                entry.deltas.append(delta)
        return []

    def close(self, key: Any) -> list[StreamEvent]:
        if self._open and self._open.key == key:
            return self._end()
        for entry in self._waiting:
            if entry.key == key:
                entry.closed = True
        return []

    def _ensure(self, key: Any, block: ContentBlock) -> list[StreamEvent]:
        return [] if self.is_open(key) else self.open(key, block)

    def _complete(self, entry: _OpenBlock) -> bool:
        if not isinstance(entry.block, ToolUse):
            return isinstance(entry.block, (Text, ThinkingText)) and not isinstance(entry.key, tuple)
        return self._whole_arguments()

    def _begin(self, entry: _OpenBlock) -> list[StreamEvent]:
        self.index += 1
        self._open, self._arguments = entry, []
        events: list[StreamEvent] = [ContentBlockStart(self.index, entry.block)]
        for delta in entry.deltas:
            events += self.delta(entry.key, delta)
        return events

    def _end(self) -> list[StreamEvent]:
        events = self._stop()
        while self._waiting:
            entry = self._waiting.pop(0)
            events += self._begin(entry)
            if not entry.closed and not (self._waiting and self._complete(entry)):
                break
            events += self._stop()
        return events

    def _stop(self) -> list[StreamEvent]:
        """The end of the open block. Arguments that broke off are closed; Anthropic's own stay as they came."""
        events: list[StreamEvent] = [ContentBlockStop(self.index)]
        tool = self._open is not None and isinstance(self._open.block, ToolUse)
        if tool and self._arguments and self.provider != "anthropic" and not self._whole_arguments():
            suffix = completion("".join(self._arguments))
            events[:0] = [ContentBlockDelta(self.index, InputJSONDelta(suffix))] if suffix else []
        self._open = None
        return events

    def _whole_arguments(self) -> bool:
        return is_object("".join(self._arguments))

    def _tool_id(self, id: Any) -> str:
        """The provider's id if every provider takes it and it is new, else one of ours."""
        good = isinstance(id, str) and TOOL_ID.fullmatch(id) and id not in self._ids
        taken = str(id) if good else INVENTED_ID + secrets.token_hex(10)
        self._ids.add(taken)
        return taken


def _is_text(piece: Any) -> bool:
    """Whether there is something to write. Raises `TypeError` for what is no text at all."""
    if type(piece) is not str:
        raise TypeError("a piece of text that is none")
    return piece != ""


def parse_block(block: JSON) -> ContentBlock:
    """A block from a provider, as leniently as a `Message` reads it. Raises `ValueError` for what is none."""
    return _BLOCK_CLASSES[_content_kind(block)].model_validate(block)


_BLOCK_CLASSES: dict[str, type[Text | ToolUse | ThinkingText | Media | OtherBlock]] = {
    "text": Text,
    "tool_use": ToolUse,
    "thinking": ThinkingText,
    "media": Media,
    "other": OtherBlock,
}


# == Signatures ========================================================================================================
# A thinking block's signature carries what a provider wants back, in an envelope: `vai1.PROVIDER.BASE64URL(JSON)`.
# Whatever is not in that envelope is Anthropic's, and goes to Anthropic byte for byte.
#
#     {"item": {…}}            a Responses item to replay as it was (reasoning: the summary is the block's text)
#     {"part": {…}}            a Gemini part, likewise
#     {"next": {…}}            keys to add to the item or part of the block that follows
#     {"prev": {…}}            … or of the block before
#     {"text": 1}              plain reasoning text (Groq, Cerebras)

_ENVELOPE = re.compile(r"vai1\.([a-z-]{1,20})\.([A-Za-z0-9_-]*)")


def sign(provider: str, state: JSON) -> str:
    packed = base64.urlsafe_b64encode(dumps(state)).decode("ascii").rstrip("=")
    return f"vai1.{provider}.{packed}"


def signed_by(signature: str | None) -> str | None:
    """Which provider's a signature is; None where there is none or it is damaged."""
    if not signature:
        return None
    found = _ENVELOPE.fullmatch(signature)
    return found[1] if found else None if signature.startswith("vai1.") else "anthropic"


def carried(signature: str | None, provider: str) -> JSON:
    """The state inside a signature of this provider; empty for any other's."""
    if not signature or signed_by(signature) != provider or not (found := _ENVELOPE.fullmatch(signature)):
        return {}
    try:
        state = loads(base64.urlsafe_b64decode(found[2] + "=" * (-len(found[2]) % 4)))
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def portable_id(id: str, pattern: re.Pattern[str] = TOOL_ID) -> str:
    """A tool-call id that the target takes: itself, else always the same stand-in."""
    return id if pattern.fullmatch(id) else "toolu_" + hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()[:32]


# == Models and their traits ===========================================================================================
# What depends on the model stands here and nowhere else. A newer name of a known family gets the newest traits; any
# other name (a local model, a fine-tune) is sent what was asked.


@dataclass(frozen=True, slots=True)
class Traits:
    """What one model takes. `efforts` empty: no reasoning switch at all; None: unknown, send what was asked."""

    efforts: tuple[str, ...] | None = None
    sampling: Literal["yes", "one", "unreasoned", "no"] = (
        "yes"  # one: temperature or top_p; unreasoned: with effort none
    )
    tools: Literal["yes", "unreasoned", "no"] = "yes"
    forced_tools: bool = True
    prefill: bool = True
    thinking: tuple[str, ...] = ()  # Anthropic's `thinking.type`s; Gemini: "level" or "budget"
    system_role: str = "system"
    max_tokens: str = "max_completion_tokens"
    stops: int | None = None  # None: as the provider's table says
    generation: tuple[int, int] = (0, 0)


_CLAUDE = re.compile(
    r"claude-(?:(?P<family>[a-z]+)-(?P<major>\d+)(?:-(?P<minor>\d{1,2})(?!\d))?"
    r"|(?P<old_major>\d+)(?:-(?P<old_minor>\d{1,2})(?!\d))?-(?P<old_family>[a-z]+))"
)
_EFFORTS_4_6 = ("low", "medium", "high", "max")
_EFFORTS_4_7 = ("low", "medium", "high", "xhigh", "max")


@functools.lru_cache(512)
def claude_traits(model: str) -> Traits:
    """platform.claude.com/docs: thinking, effort, migration-2026-10-21 and the model pages."""
    found = _CLAUDE.match(model)
    if not found:
        return Traits(thinking=("enabled", "adaptive", "disabled", "between_tools"))
    family = found["family"] or found["old_family"]
    version = (int(found["major"] or found["old_major"]), int(found["minor"] or found["old_minor"] or 0))
    always_on = family in ("fable", "mythos")
    if version < (4, 6) and not always_on:
        efforts: tuple[str, ...] = _EFFORTS_4_6[:3] if (family, version) == ("opus", (4, 5)) else ()
        thinks = version >= (4, 0) or version == (3, 7)
        one = version >= (4, 1) and not (family == "sonnet" and version < (4, 5))
        return Traits(
            efforts,
            "one" if one else "yes",
            thinking=("enabled", "disabled") if thinks else ("disabled",),
            generation=version,
        )
    if version == (4, 6) and not always_on:
        return Traits(
            _EFFORTS_4_6, "one", prefill=False, thinking=("adaptive", "enabled", "disabled"), generation=version
        )
    modes: tuple[str, ...] = ("adaptive", "disabled")
    if always_on or (family == "opus" and version >= (5, 5)):
        modes = ("adaptive",)
    elif family == "sonnet" and version >= (5, 5):
        modes = ("adaptive", "between_tools")
    unforced = version >= (5, 1) if always_on else version >= (5, 5) and family in ("opus", "sonnet")
    newest = version > (5, 5) and not always_on  # unknown to this table: as strict as the strictest known
    return Traits(
        _EFFORTS_4_7, "no", forced_tools=not (unforced or newest), prefill=False, thinking=modes, generation=version
    )


_GPT = re.compile(r"gpt-(\d+)(?:\.(\d+))?(?P<rest>.*)")


@functools.lru_cache(512)
def openai_traits(model: str) -> Traits:
    """developers.openai.com: the model pages, reasoning guide and the 400s they document."""
    if re.match(r"o\d", model):
        no_stop = 0 if re.match(r"(o3|o4-mini)(?!-mini)", model) else None
        return Traits(("low", "medium", "high"), "no", system_role="developer", stops=no_stop)
    found = _GPT.match(model)
    if model.startswith(("codex", "gpt-daybreak", "gpt-rosalind")):
        return Traits(("low", "medium", "high"), "no", system_role="developer")
    if not found or "oss" in model:
        known = model.startswith(("gpt-", "chatgpt-"))
        return Traits(
            () if known and "oss" not in model else None, max_tokens="max_completion_tokens" if known else "max_tokens"
        )
    version, rest = (int(found[1]), int(found[2] or 0)), found["rest"]
    if version < (5, 0) or "chat" in rest or re.match(r"-?\d+o", rest):
        return Traits(())
    reasons = Traits((), "unreasoned", system_role="developer", generation=version)
    efforts: tuple[str, ...]
    if version == (5, 0):
        efforts = ("high",) if "pro" in rest else ("minimal", "low", "medium", "high")
        return dataclasses.replace(reasons, efforts=efforts, sampling="no")
    if "codex" in rest or "pro" in rest:
        efforts = ("low", "medium", "high", "xhigh") if version >= (5, 2) else ("low", "medium", "high")
        return dataclasses.replace(reasons, efforts=efforts, sampling="no")
    if version < (5, 6):
        efforts = ("none", "low", "medium", "high", *(("xhigh",) if version >= (5, 2) else ()))
        return dataclasses.replace(reasons, efforts=efforts, tools="unreasoned" if version >= (5, 4) else "yes")
    if "astra" in rest or (version >= (6, 1) and "sol" in rest):
        efforts = ("low", "medium", "high", "xhigh", "max")
        return dataclasses.replace(reasons, efforts=efforts, sampling="no", tools="no")
    efforts = ("none", "low", "medium", "high", "xhigh", "max")
    return dataclasses.replace(reasons, efforts=efforts, tools="unreasoned")


@functools.lru_cache(512)
def groq_traits(model: str) -> Traits:
    """console.groq.com/docs/reasoning."""
    if "gpt-oss" in model:
        return Traits(("low", "medium", "high"))
    if found := re.search(r"qwen-?(\d+)(?:\.(\d+))?", model):
        newer = (int(found[1]), int(found[2] or 0)) >= (3, 8)
        return Traits(("none", "low", "medium", "high") if newer else ("none", "default"))
    return Traits(() if re.match(r"(meta-)?llama|mixtral|gemma|moonshotai|groq/compound|compound", model) else None)


@functools.lru_cache(512)
def cerebras_traits(model: str) -> Traits:
    """inference-docs.cerebras.ai/capabilities/reasoning."""
    if "gpt-oss" in model:
        return Traits(("low", "medium", "high"))
    return Traits(() if model.startswith(("llama", "gemma")) else ("none", "low", "medium", "high"))


@functools.lru_cache(512)
def gemini_traits(model: str) -> Traits:
    """ai.google.dev/gemini-api/docs/thinking and the model pages."""
    found = re.match(r"gemini-(\d+)(?:\.(\d+))?(?P<rest>.*)", model)
    if not found:
        return Traits(None, thinking=("level",) if model.startswith("gemini") else ("budget",))
    version, rest = (int(found[1]), int(found[2] or 0)), found["rest"]
    levels: tuple[str, ...]
    if version >= (3, 0):
        without_minimal = "pro" in rest or version >= (3, 8)
        levels = ("low", "medium", "high") if without_minimal else ("minimal", "low", "medium", "high")
        return Traits(levels, thinking=("level",), generation=version)
    if version < (2, 5) or "image" in rest or "tts" in rest:
        return Traits((), generation=version)
    levels = ("minimal", "low", "medium", "high", "max") if "pro" in rest else LEVELS
    return Traits(levels, thinking=("budget",), generation=version)


def clamp_level(level: str, allowed: Sequence[str]) -> str:
    """The allowed level nearest to the one asked for, from below where there is one."""
    if level in allowed:
        return level
    if "default" in allowed:  # a switch, not a scale
        return "none" if level == "none" else "default"
    below = [word for word in allowed if word in LEVELS and LEVELS.index(word) < LEVELS.index(level)]
    return below[-1] if below else allowed[0]


# == Adapters ==========================================================================================================


@dataclass(slots=True)
class HTTPRequest:
    """A request to an upstream. Its repr shows neither headers nor body."""

    url: str
    headers: dict[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    method: str = "POST"


@dataclass(frozen=True, slots=True)
class Credential:
    """A provider key, and whether the caller brought it. Its repr does not show it."""

    key: Secret
    own: bool = True
    project: str | None = None  # gemini-oauth: the Code Assist project
    renewable: bool = False  # a token that can be refreshed


_SIGNATURE_REFUSED = re.compile(
    r"(?i)invalid signature in thinking|(corrupt|invalid)\w* thought.?signature|encrypted content.*could not be"
)
_REFUSAL_WORDS = re.compile(
    r"(?i)unsupported|not supported|does not support|not permitted|not allowed|unknown|unrecognized|deprecated|rejected"
    r"|expected .thinking. or .redacted_thinking."  # of a tool loop that began without
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """One provider: where it is, what it can do, and the translation to and from its wire format."""

    id: str
    name: str
    base_url: str
    key_env: tuple[str, ...]
    url_env: tuple[str, ...]
    byok: tuple[str, ...]
    capabilities: tuple[str, ...]
    native_tools: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ("temperature", "top_p")
    max_stops: int = 4
    # The provider's name for an advisory field in a 400 → what vai calls it, so that it can be left out and reported.
    advisory: ClassVar[dict[str, str]] = {}

    def encode(self, request: MessageRequest, credential: Credential, base_url: str, max_tokens: int) -> HTTPRequest:
        """The provider's request. Fills `request.dropped`; raises `InvalidRequestError` (`unsupported_feature`)."""
        try:
            return self._encode(request, credential, base_url, max_tokens)
        except InvalidRequestError as fault:
            fault.param = place_of(request, fault.block) or fault.param
            fault.block = None
            raise
        except ValueError:  # of `dumps`: a number that JSON does not have, which only a script can pass
            param = _join(_nonfinite(request.body) or ())
            raise InvalidRequestError("must be a finite number", param=param) from None
        except RecursionError:
            raise InvalidRequestError("the request is nested too deeply", code="json_too_deep") from None

    def _encode(self, request: MessageRequest, credential: Credential, base_url: str, max_tokens: int) -> HTTPRequest:
        raise NotImplementedError

    def decoder(self, request: MessageRequest) -> StreamDecoder:
        """A fresh decoder for the stream that answers `request`."""
        raise NotImplementedError

    def decode(self, body: Any, request: MessageRequest) -> Message:
        """The whole answer of a request without `stream`. Raises `ProviderError` for what is none."""
        decoder, message = self.decoder(request), None
        with _readable(self.id), contextlib.suppress(StreamTruncated):
            message = accumulate([*decoder.feed_whole(body), *decoder.close()])
        if message is None:
            raise ProviderError(f"{self.id} answered with nothing", provider=self.id, code="unreadable_answer")
        return message

    def answer(self, body: Any, request: MessageRequest) -> JSON:
        """What `decode` says, as it goes over the wire."""
        return self.decode(body, request).to_wire()

    def traits(self, model: str) -> Traits:
        return Traits()

    def refused_field(self, fault: Error, request: MessageRequest, sent: HTTPRequest) -> str | None:
        """The advisory field that a 400 of the provider names and that was sent, to be left out of a second try."""
        detail = _as_dict(fault.provider_error)
        if not isinstance(fault, InvalidRequestError) or fault.provider is None:
            return None
        if _SIGNATURE_REFUSED.search(fault.message) and request.thinks_back and "signature" not in request.dropped:
            return "signature"
        named = [field for name, field in self.advisory.items() if detail.get("param") == name]
        if not named and _REFUSAL_WORDS.search(fault.message):
            found = re.findall(r"[A-Za-z_][A-Za-z_.]*", fault.message)
            named = [field for name, field in self.advisory.items() if name in found]
        told = {field for name, field in self.advisory.items() if b'"%b":' % name.split(".")[-1].encode() in sent.body}
        return next((field for field in named if field in told and field not in request.dropped), None)

    # -- what encoders share ----------------------------------------------------------------------------------------

    def refuse(self, feature: str, capability: str, param: str | None = None, block: Any = None) -> Error:
        have = [p.id for p in PROVIDERS.values() if capability in p.capabilities or capability in p.native_tools]
        hint = "or let it be transcribed, with voice.input" if capability == "audio_input" else ""
        if not have and param == "tools":
            have = ["anthropic"]  # a tool by Anthropic's own name
        others = [id for id in have if id != self.id]
        return unsupported(feature, self.id, others, param=param, hint=hint, block=block)

    def level(self, request: MessageRequest) -> str | None:
        """The reasoning effort to send; None to send none."""
        asked = request.thinking_level
        if asked is None or {"thinking", "output_config.effort"} & set(request.dropped):
            return None
        efforts = self.traits(request.model_name).efforts
        if efforts == ():
            if asked != "none":
                request.drop("thinking" if request.thinking else "output_config.effort")
            return None
        return clamp_level(asked, efforts) if efforts else asked

    def native_stops(self, request: MessageRequest) -> list[str]:
        """The stop sequences that the provider looks for; `cut_stops` has the rest."""
        most = self.traits(request.model_name).stops
        return request.stop_sequences[: self.max_stops if most is None else most]

    def cut_stops(self, request: MessageRequest) -> list[str]:
        return request.stop_sequences[len(self.native_stops(request)) :]

    def sampling_fields(self, request: MessageRequest, taken: bool = True) -> JSON:
        """`temperature`, `top_p`, `top_k` as far as this provider and model take them; the rest is reported."""
        out: JSON = {}
        for name in ("temperature", "top_p", "top_k"):
            value = getattr(request, name)
            if value is None or name in request.dropped:
                continue
            if taken and name in self.sampling:
                out[name] = value
            else:
                request.drop(name)
        return out

    def drop_foreign(self, request: MessageRequest) -> None:
        """Report what only Anthropic has a form for."""
        blocks = request.blocks
        if not blocks and not request.tools and isinstance(request.system, str):  # nothing that could hold any of it
            request.drop(*(request.model_extra or {}))
            return
        inner = [item for block in blocks if isinstance(block, ToolResultBlock) for item in block.blocks]
        system = request.system if not isinstance(request.system, str) else []
        if any(getattr(item, "cache_control", None) for item in (*blocks, *inner, *system, *request.tools)):
            request.drop("cache_control")
        documents = [item for item in (*blocks, *inner) if isinstance(item, DocumentBlock)]
        request.drop(*(name for name in ("context", "citations") if any(getattr(d, name) for d in documents)))
        for tool, given in zip(request.tools, request.body.get("tools") or (), strict=True):
            if isinstance(tool, FunctionTool):
                request.drop(*(f"tools.{key}" for key in given.keys() - FunctionTool.model_fields.keys()))
        request.drop(*(request.model_extra or {}))

    def posted(self, request: MessageRequest, url: str, headers: Mapping[str, str], body: JSON) -> HTTPRequest:
        """The finished request, with the caller's `extensions` for this provider merged in."""
        extra = request.extensions.get(self.id) or {}
        raw = dump_body(_merged(body, extra) if extra else body)
        return HTTPRequest(url, {"Content-Type": "application/json", **headers}, raw)


def _merged(base: JSON, extra: Mapping[str, Any]) -> JSON:
    out = dict(base)
    for key, value in extra.items():
        old = out.get(key)
        out[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


# What a provider's nonsense makes an adapter stumble over.
_NONSENSE = (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError, OverflowError)


def unreadable(provider: str) -> ProviderError:
    message = f"{provider} sent an answer that is not in its format"
    return ProviderError(message, provider=provider, code="unreadable_answer")


@contextlib.contextmanager
def _readable(provider: str) -> Iterator[None]:
    """Nonsense inside is one clean error."""
    try:
        yield
    except _NONSENSE:
        raise unreadable(provider) from None


def native_tools(request: MessageRequest) -> Iterator[tuple[str, JSON]]:
    """(neutral name, config) of each native tool, Anthropic's versioned ones read as the neutral ones they are."""
    for tool, given in zip(request.tools, request.body.get("tools") or (), strict=True):
        if isinstance(tool, NativeTool):
            yield tool.type, dict(tool.config)
        elif isinstance(tool, ServerTool):
            stem = re.sub(r"_\d{8}$", "", tool.type)
            config = {key: value for key, value in given.items() if key not in ("type", "name", "cache_control")}
            yield {"computer": "computer_use", "computer_toolset": "computer_use"}.get(stem, stem), config


class StreamDecoder:
    """A provider's stream in, canonical events out: `feed` an `SSE`, `close` at the end of input.

    Raises an `Error` for an error event, for what cannot be read, and (`StreamTruncated`) for a stream without its
    end. After `message_stop` it says nothing more.
    """

    def __init__(self, adapter: Adapter, request: MessageRequest) -> None:
        self.adapter = adapter
        self.provider = adapter.id
        self.request = request
        self.build = EventBuilder(adapter.id, request.tool_names)
        stops = adapter.cut_stops(request)
        self._cutter = StopCutter(stops) if stops else None

    @property
    def ended(self) -> bool:
        return self.build.ended

    @property
    def ending(self) -> bool:
        """Whether the answer is whole but for what may still be said about it: not worth a long wait."""
        return False

    def feed(self, sse: SSE) -> list[StreamEvent]:
        if self.build.ended:
            return []
        try:
            events = self.read(sse)
            return self._cutter.feed(events) if self._cutter else events
        except _NONSENSE:
            raise unreadable(self.provider) from None

    def feed_whole(self, body: Any) -> list[StreamEvent]:
        """A whole answer, as if it had come in one event."""
        if isinstance(body, dict) and body.get("error") and body.get("status") is None:
            raise stream_error(self.provider, body["error"])
        events = self.chunk(body)
        return self._cutter.feed(events) if self._cutter else events

    def close(self) -> list[StreamEvent]:
        if self.build.ended:
            return []
        with _readable(self.provider):
            events = self.end()
            return self._cutter.feed(events) if self._cutter else events

    def read(self, sse: SSE) -> list[StreamEvent]:
        return self.chunk(loads(sse.data))

    def chunk(self, chunk: Any) -> list[StreamEvent]:
        raise NotImplementedError

    def end(self) -> list[StreamEvent]:
        raise StreamTruncated(provider=self.provider)


class TextCut:
    """Cuts the text out of an event that says nothing else, which is nine in ten, instead of reading all of it.

    `before` matches what may stand before the text, up to and with its opening quote, `after` what may follow its
    closing one; they match nothing that would have another meaning as JSON. What matched is remembered: within a stream
    it hardly changes. Anything unusual is None and goes the plain way, which gives the same.
    """

    __slots__ = ("_after", "_before", "_head", "_tail", "head")

    def __init__(self, before: re.Pattern[str], after: re.Pattern[str]) -> None:
        self._before, self._after = before, after
        self._head = self._tail = "\0"  # which no event begins with
        self.head: re.Match[str] | None = None

    def text(self, data: str) -> str | None:
        """The text, unescaped. Raises `ValueError` where it is no JSON string, as reading all of it would."""
        if not data.startswith(self._head):
            self.head = self._before.match(data)
            if self.head is None:
                self._head = "\0"
                return None
            self._head = self.head[0]
        text, end = _scan_string(data, len(self._head), True)
        tail = data[end:]
        if tail != self._tail:
            if not self._after.fullmatch(tail):
                return None
            self._tail = tail
        return text


class StopCutter:
    """Stop sequences where the provider has none: text after the first is left out, the answer's bill is not.

    Text that may be the beginning of a stop sequence is held back until that is decided.
    """

    def __init__(self, sequences: Iterable[str]) -> None:
        self._sequences = tuple(sequences)
        self._held = ""
        self._found: str | None = None

    def feed(self, events: Iterable[StreamEvent]) -> list[StreamEvent]:
        out: list[StreamEvent] = []
        for event in events:
            if isinstance(event, MessageDelta) and self._found is not None:
                event.delta |= {"stop_reason": "stop_sequence", "stop_sequence": self._found}
                out.append(event)
            elif self._found is not None and not isinstance(event, MessageStop):
                continue
            elif isinstance(event, ContentBlockDelta) and isinstance(event.delta, TextDelta):
                out += self._text(event.index, event.delta.text)
            else:
                if isinstance(event, ContentBlockStop) and self._held:
                    out.append(ContentBlockDelta(event.index, TextDelta(self._held)))
                    self._held = ""
                out.append(event)
        return out

    def _text(self, index: int, text: str) -> list[StreamEvent]:
        text = self._held + text
        places = [(place + len(s), place, s) for s in self._sequences if (place := text.find(s)) >= 0]
        if places:  # the one that is complete first, as a model would have stopped
            _, cut, self._found = min(places)
            self._held = ""
            kept: list[StreamEvent] = [ContentBlockDelta(index, TextDelta(text[:cut]))] if cut else []
            return [*kept, ContentBlockStop(index)]
        hold = max((_overlap(text, s) for s in self._sequences), default=0)
        self._held = text[len(text) - hold :] if hold else ""
        free = text[: len(text) - hold] if hold else text
        return [ContentBlockDelta(index, TextDelta(free))] if free else []


def _overlap(text: str, sequence: str) -> int:
    """How many characters at the end of `text` may be the beginning of `sequence`."""
    for length in range(min(len(sequence) - 1, len(text)), 0, -1):
        if text[-length] == sequence[0] and text.endswith(sequence[:length]):
            return length
    return 0


_SCHEMA_MAPS = ("properties", "$defs", "definitions", "patternProperties")  # name → schema
_SCHEMA_DATA = ("enum", "const", "default", "examples", "required")  # no schema inside


def _subschemas(schema: JSON) -> Iterator[tuple[str, Any]]:
    """(key, value) of what holds schemas: a map's values stand for themselves."""
    for key, value in schema.items():
        if key in _SCHEMA_MAPS and isinstance(value, dict):
            yield from ((key, item) for item in value.values())
        elif key not in _SCHEMA_DATA and isinstance(value, (dict, list)):
            yield key, value


def _is_object_schema(schema: JSON) -> bool:
    return schema.get("type") == "object" or isinstance(schema.get("properties"), dict)


def _is_list(schema: JSON) -> bool:
    kind = schema.get("type")
    return kind == "array" or (isinstance(kind, list) and "array" in kind)


def closed_schema(schema: Any) -> Any:
    """A JSON schema whose objects say `additionalProperties: false`, as constrained decoding asks of every one."""
    if isinstance(schema, list):
        return [closed_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out: JSON = {}
    for key, value in schema.items():
        if key in _SCHEMA_MAPS and isinstance(value, dict):
            out[key] = {name: closed_schema(item) for name, item in value.items()}
        else:
            out[key] = value if key in _SCHEMA_DATA else closed_schema(value)
    return out | {"additionalProperties": out.get("additionalProperties", False)} if _is_object_schema(out) else out


_NOT_STRICT = {  # what OpenAI's strict mode refuses wherever it stands
    *("allOf", "oneOf", "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "patternProperties"),
    *("propertyNames", "minProperties", "maxProperties", "unevaluatedProperties", "unevaluatedItems"),
    *("prefixItems", "uniqueItems", "contains", "minContains", "maxContains"),
}


def is_strict(schema: Any) -> bool:
    """Whether OpenAI's strict mode takes the schema: every object closed, every property required, every schema says
    something, and none of it more than strict mode has a word for."""
    if isinstance(schema, list):
        return all(map(is_strict, schema))
    if not isinstance(schema, dict):
        return True
    if _NOT_STRICT & schema.keys() or not {"type", "anyOf", "$ref"} & schema.keys():
        return False
    if ("$ref" in schema and schema.keys() - {"$ref", "$defs"}) or ("items" not in schema and _is_list(schema)):
        return False
    if _is_object_schema(schema):
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if schema.get("additionalProperties") is not False or not isinstance(properties, dict):
            return False
        if not isinstance(required, list) or any(name not in required for name in properties):
            return False
    return all(is_strict(value) for _, value in _subschemas(schema))


# == Anthropic =========================================================================================================
# POST /v1/messages. The canonical format is a superset of this one, so what goes out is the caller's own body with the
# few things taken away or renamed that the model would refuse, each by a function of that block alone: a history
# keeps its bytes from turn to turn, to which Claude's thinking signatures are bound.

ANTHROPIC_VERSION = "2026-10-21"
ANTHROPIC_SAMPLING_VERSION = "2023-06-01"
ANTHROPIC_ID = re.compile(r"[A-Za-z0-9_-]{1,256}")
ANTHROPIC_NATIVE: dict[str, tuple[str, ...]] = {  # neutral name → its name; its type until Claude 4.5, 4.6, since 5
    "web_search": ("web_search", "web_search_20250305", "web_search_20260318", "web_search_20260318"),
    "code_execution": (
        "code_execution",
        "code_execution_20250825",
        "code_execution_20260521",
        "code_execution_20260521",
    ),
    "text_editor": ("str_replace_based_edit_tool", *("text_editor_20250728",) * 3),
    "computer_use": ("computer", "computer_20250124", "computer_20251124", "computer_toolset_20260801"),
}
ANTHROPIC_OWN = {"output_format", "output", "voice", "extensions", "provider_keys", "temperature", "top_p", "top_k"}


@dataclass(frozen=True, slots=True)
class Anthropic(Adapter):
    """POST /v1/messages."""

    advisory: ClassVar[dict[str, str]] = {
        "temperature": "temperature",
        "top_p": "top_p",
        "top_k": "top_k",
        "thinking": "thinking",
        "effort": "output_config.effort",
        "metadata": "metadata",
    }

    def traits(self, model: str) -> Traits:
        return claude_traits(model)

    def _encode(self, request: MessageRequest, credential: Credential, base_url: str, max_tokens: int) -> HTTPRequest:
        traits = self.traits(request.model_name)
        if missing := {"image", "audio"} & request.modalities:
            raise self.refuse(f"{min(missing)} output", f"{min(missing)}_output", "output.modalities")
        last = request.messages[-1]
        if last.role == "assistant" and not traits.prefill and not _paused(last.blocks):
            raise unsupported(
                f"a last message of the assistant (prefill) with {request.model_name}", self.id, param="messages"
            )
        body = {key: value for key, value in request.body.items() if key not in ANTHROPIC_OWN}
        for name in request.dropped:
            body.pop(name, None)
        if not request.system_text.strip():
            body.pop("system", None)
        body["model"] = request.model_name
        body.setdefault("max_tokens", max_tokens)
        body["messages"] = anthropic_messages(request)
        if not request.stream:
            body.pop("stream", None)
        if request.tools:
            body["tools"] = [
                self._tool(tool, given, traits)
                for tool, given in zip(request.tools, request.body["tools"], strict=True)
            ]
        if request.forced_tool and not traits.forced_tools:
            raise unsupported(
                f"a forced tool_choice with {request.model_name}",
                self.id,
                param="tool_choice",
                hint="use tool_choice auto",
            )
        if request.output_format and request.json_schema:
            schema = closed_schema(request.json_schema)
            body["output_config"] = {
                **body.get("output_config", {}),
                "format": {"type": "json_schema", "schema": schema},
            }
        self._think(request, traits, body)
        version = request.headers.get("anthropic-version")
        sampling = self._sampling(request, traits, body, version)
        headers = {
            "x-api-key": credential.key,
            "anthropic-version": version or (ANTHROPIC_SAMPLING_VERSION if sampling else ANTHROPIC_VERSION),
        }
        if beta := self._beta(request, body):
            headers["anthropic-beta"] = beta
        return self.posted(request, f"{base_url}/v1/messages", headers, body | sampling)

    def decoder(self, request: MessageRequest) -> StreamDecoder:
        return AnthropicDecoder(self, request)

    def decode(self, body: Any, request: MessageRequest) -> Message:
        """Already canonical but for the model's name and `total_tokens`; checked, not rebuilt."""
        with _readable(self.id):
            if body.get("type") == "error" or body.get("error"):
                raise stream_error(self.id, body.get("error"))
            blocks = [parse_block(block) for block in body["content"]]
            usage = Usage(**anthropic_usage(body.get("usage")))
            fields = {key: value for key, value in body.items() if key not in ("content", "usage")}
            message = Message.model_validate({**fields, "content": blocks, "usage": usage} | self._named(body))
            message.stop_reason = known_stop(message.stop_reason, bool(blocks))
        return message

    def _named(self, body: JSON) -> JSON:
        id = body.get("id")
        return {"id": id if isinstance(id, str) and id else f"msg_{secrets.token_hex(12)}", "type": "message",
                "role": "assistant", "model": f"{self.id}/{body.get('model')}"}  # fmt: skip

    def _tool(self, tool: Tool, given: JSON, traits: Traits) -> JSON:
        if isinstance(tool, NativeTool):
            if tool.type not in ANTHROPIC_NATIVE:
                raise self.refuse(f"the tool {tool.type}", tool.type, "tools")
            name, *kinds = ANTHROPIC_NATIVE[tool.type]
            age = traits.generation
            kind = kinds[2] if age == (0, 0) or age >= (5, 0) else kinds[1] if age >= (4, 6) else kinds[0]
            named = {} if kind.startswith("computer_toolset") else {"name": name}
            marked = {"cache_control": tool.cache_control} if tool.cache_control else {}
            return {
                "type": kind,
                **named,
                **{k: v for k, v in tool.config.items() if k not in ("type", "name")},
                **marked,
            }
        if isinstance(tool, FunctionTool) and given.get("type") == "function":
            return {**given, "type": "custom"}
        return given

    def _think(self, request: MessageRequest, traits: Traits, body: JSON) -> None:
        """`thinking` and effort in the words of this model, whichever generation of Claude it is."""
        config = dict(body.get("output_config") or {})
        if "output_config.effort" in request.dropped:
            config.pop("effort", None)
        level, thinking = request.thinking_level, request.thinking
        if "thinking" in request.dropped:
            thinking = None
            body.pop("thinking", None)
        if thinking and thinking.type not in traits.thinking:
            body.pop("thinking", None)
            if level == "none":
                if "between_tools" in traits.thinking:
                    body["thinking"] = {"type": "between_tools"}
                elif "disabled" in traits.thinking:
                    body["thinking"] = {"type": "disabled"}
                elif "adaptive" in traits.thinking:
                    config["effort"] = "low"
            elif "adaptive" in traits.thinking:
                body["thinking"] = {"type": "adaptive", "display": "summarized"}
                config["effort"] = level or "medium"
            elif "enabled" in traits.thinking:
                body["thinking"] = {"type": "enabled", "budget_tokens": LEVEL_BUDGETS[level or "medium"]}
            else:
                request.drop("thinking")
        if (kind := body.get("thinking", {}).get("type")) == "enabled":
            self._fit_budget(request, body)
        if effort := config.get("effort"):
            if traits.efforts == ():
                del config["effort"]
                if not thinking or thinking.type != "adaptive":
                    request.drop("output_config.effort")
            elif traits.efforts:
                strict = kind in ("disabled", "between_tools") and traits.generation >= (5, 0)
                config["effort"] = clamp_level(
                    effort, [e for e in traits.efforts if not strict or e not in ("xhigh", "max")]
                )
        if config:
            body["output_config"] = config
        else:
            body.pop("output_config", None)

    def _fit_budget(self, request: MessageRequest, body: JSON) -> None:
        """`1024 <= budget_tokens < max_tokens`, no forced tool, and no tool loop that began without thinking."""
        most = body["max_tokens"] - 1
        if most < 1024 or request.forced_tool or _unthought_tool_loop(body["messages"]):
            del body["thinking"]
            request.drop("thinking")
        else:
            body["thinking"] = {
                **body["thinking"],
                "budget_tokens": max(1024, min(body["thinking"]["budget_tokens"], most)),
            }

    def _sampling(self, request: MessageRequest, traits: Traits, body: JSON, version: str | None) -> JSON:
        thinks = body.get("thinking", {}).get("type") in ("enabled", "adaptive")
        taken = traits.sampling != "no" and (version is None or version < ANTHROPIC_VERSION) and not thinks
        fields = self.sampling_fields(request, taken)
        if traits.sampling == "one" and {"temperature", "top_p"} <= fields.keys():
            del fields["top_p"]
            request.drop("top_p")
        return fields

    def _beta(self, request: MessageRequest, body: JSON) -> str:
        given = request.headers.get("anthropic-beta", "")
        tools = str([tool.get("type") for tool in body.get("tools", ())])
        needed = [beta for kind, beta in ANTHROPIC_BETAS.items() if kind in tools and beta not in given]
        return ",".join([*([given] if given else []), *needed])


ANTHROPIC_CITATIONS = {"char_location", "page_location", "content_block_location", "search_result_location"}
ANTHROPIC_BETAS = {
    "computer_20250124": "computer-use-2025-01-24",
    "computer_20251124": "computer-use-2025-11-24",
    "advisor_20260301": "advisor-tool-2026-03-01",
}


def _paused(blocks: Sequence[Block]) -> bool:
    """Whether a turn of the assistant ended as `pause_turn`, and is to go on."""
    return bool(blocks) and isinstance(blocks[-1], ServerBlock)


def anthropic_messages(request: MessageRequest) -> list[JSON]:
    """The caller's messages without what Claude has no form for; whatever stays keeps its bytes."""
    out: list[JSON] = []
    for message, given in zip(request.messages, request.body["messages"], strict=True):
        content = given["content"]
        if isinstance(content, list):
            kept = [
                b
                for block, raw in zip(message.blocks, content, strict=True)
                if (b := _anthropic_block(message.role, block, raw))
            ]
            if message.role == "assistant" and not kept and (said := spoken_text(message)):
                kept = [{"type": "text", "text": said}]
            content = kept if kept != content else content
            results_first = sorted(content, key=lambda b: b.get("type") != "tool_result")
            content = results_first if message.role == "user" and results_first != content else content
        if content and (not isinstance(content, str) or content.strip()):
            out.append(given if content is given["content"] else {**given, "content": content})
    if not out:
        raise _nothing_said()
    return out


def _anthropic_block(role: str, block: Block, given: JSON) -> JSON | None:
    """The block as Claude takes it: nearly always itself; None where it has none."""
    match block:
        case TextBlock(text=text) if not text.strip():
            return None
        case TextBlock() if role == "assistant" and given.get("citations"):
            kept = [cited for cited in given["citations"] if _anthropic_citation(cited)]
            rest = {key: value for key, value in given.items() if key != "citations"}
            return given if kept == given["citations"] else rest | ({"citations": kept} if kept else {})
        case ThinkingBlock(signature=signature):
            return given if signed_by(signature) == "anthropic" else None
        case ServerBlock():
            id = given.get("id") or given.get("tool_use_id")
            return given if not isinstance(id, str) or id.startswith(("srvtoolu_", "mcptoolu_")) else None
        case ImageBlock() | AudioBlock() if role == "assistant":
            return None
        case AudioBlock() | VideoBlock():
            kind = "audio_input" if isinstance(block, AudioBlock) else "video"
            raise PROVIDERS["anthropic"].refuse(f"{block.type} input", kind, "messages", block)
        case ToolUseBlock(id=id) if not ANTHROPIC_ID.fullmatch(id):
            return {**given, "id": portable_id(id)}
        case ToolResultBlock(tool_use_id=id) if not ANTHROPIC_ID.fullmatch(id):
            return {**given, "tool_use_id": portable_id(id)}
    return given


def _anthropic_citation(cited: Any) -> bool:
    """Whether a citation is Claude's own: another provider's lacks what Claude would check."""
    kind = cited.get("type") if isinstance(cited, dict) else None
    if kind == "web_search_result_location":
        return bool(cited.get("encrypted_index"))
    return kind in ANTHROPIC_CITATIONS


def _unthought_tool_loop(messages: Sequence[JSON]) -> bool:
    """Whether the open tool loop has an assistant turn without thinking: with a budget, Claude refuses that."""
    for message in reversed(messages):
        content = message["content"]
        blocks = content if isinstance(content, list) else []
        if message["role"] == "assistant":
            if blocks and blocks[0].get("type") not in ("thinking", "redacted_thinking"):
                return any(block.get("type") == "tool_use" for block in blocks)
        elif message["role"] == "user" and not any(block.get("type") == "tool_result" for block in blocks):
            return False
    return False


def anthropic_usage(usage: Any, before: Mapping[str, Any] | None = None) -> JSON:
    """Usage with `total_tokens`; in a stream the last value of each field counts."""
    given = {key: value for key, value in _as_dict(usage).items() if value is not None}
    parts = make_usage() | dict(before or {}) | given
    four = {
        name: count(parts.get(name))
        for name in ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    }
    return parts | four | {"total_tokens": sum(four.values())}


def known_stop(reason: Any, content: bool) -> str:
    """A stop reason of the canonical list: what is none is `end_turn` with content, and no answer without."""
    if reason in STOP_REASONS:
        return str(reason)
    if not content:
        raise ValueError("neither content nor a stop reason")
    return "end_turn"


_ANTHROPIC_BEFORE = re.compile(
    r'\{"type":"content_block_delta","index":(0|[1-9][0-9]{0,8}),"delta":\{"type":"text_delta","text":"'
)
_ANTHROPIC_AFTER = re.compile(r"\} *\}")  # Anthropic pads its events with spaces


class AnthropicDecoder(StreamDecoder):
    """Anthropic's own events, their grammar written anew: what came out of order goes out in order, or is an error."""

    def __init__(self, adapter: Adapter, request: MessageRequest) -> None:
        super().__init__(adapter, request)
        self._usage: JSON = {}
        self._stop: JSON = {}
        self._texts = TextCut(_ANTHROPIC_BEFORE, _ANTHROPIC_AFTER)

    def read(self, sse: SSE) -> list[StreamEvent]:
        if (text := self._texts.text(sse.data)) is not None and self._texts.head:
            return self._delta(int(self._texts.head[1]), TextDelta(text))
        return self.chunk(loads(sse.data))

    def chunk(self, chunk: Any) -> list[StreamEvent]:
        match chunk["type"]:
            case "content_block_delta":
                return self._delta(chunk["index"], _delta_from_wire(chunk["delta"]))
            case "content_block_start":
                block = chunk["content_block"]
                if not self.build.started or self.build.is_open(chunk["index"]):
                    raise ValueError("out of order")
                return self.build.open(chunk["index"], parse_block(block))
            case "content_block_stop":
                return self.build.close(chunk["index"])
            case "message_start":
                return self._start(chunk["message"])
            case "message_delta":
                self._usage = anthropic_usage(chunk.get("usage"), self._usage)
                self._stop |= {key: value for key, value in chunk["delta"].items() if value is not None}
            case "message_stop":
                if not self.build.started:
                    raise ValueError("out of order")
                sequence = self._stop.get("stop_sequence")
                self._stop["stop_sequence"] = sequence if isinstance(sequence, str) else None
                stop = self._stop | {"stop_reason": known_stop(self._stop.get("stop_reason"), self.build.index >= 0)}
                return self.build.finish(usage=self._usage or make_usage(), **stop)
            case "error":
                raise stream_error(self.provider, chunk.get("error"))
            case "ping" if self.build.started:
                return [Ping()]
        return []

    def _start(self, message: JSON) -> list[StreamEvent]:
        self._usage = anthropic_usage(message.get("usage"))
        named = ("id", "type", "role", "model", "content", "usage", "stop_reason", "stop_sequence")
        more = {key: value for key, value in message.items() if key not in named}
        return self.build.start(message.get("id"), message.get("model"), self._usage, **more)

    def _delta(self, index: Any, delta: Delta) -> list[StreamEvent]:
        if not self.build.is_open(index):
            raise ValueError("a delta for a block that is not open")
        return self.build.delta(index, delta)


# == OpenAI Chat Completions (also Groq, Cerebras) =====================================================================
# POST /chat/completions. One content string and one list of tool calls a turn: text after a call moves before it.

CHAT_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
CHAT_TOOL_CHOICE = {"auto": "auto", "any": "required", "none": "none", "tool": "required"}  # tool: a native one
AUDIO_FORMATS = {"audio/wav": "wav", "audio/x-wav": "wav", "audio/wave": "wav", "audio/mpeg": "mp3", "audio/mp3": "mp3"}


# What a message may say beside its content.
_CHAT_MORE = ("reasoning_content", "reasoning", "executed_tools", "refusal", "annotations", "tool_calls", "audio")


@dataclass(frozen=True, slots=True)
class Chat(Adapter):
    """POST /chat/completions: OpenAI, and any local server that speaks it."""

    user_field: str = "safety_identifier"
    usage_option: bool = True  # usage in a stream has to be asked for
    image_urls: bool = True
    audio: bool = False
    pdf: bool = False
    reasoning_back: bool = False  # takes its own reasoning text back

    advisory: ClassVar[dict[str, str]] = {
        "temperature": "temperature",
        "top_p": "top_p",
        "reasoning_effort": "thinking",
        "reasoning_format": "thinking",
        "include_reasoning": "thinking",
        "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
        "safety_identifier": "metadata",
        "user": "metadata",
    }

    def traits(self, model: str) -> Traits:
        return openai_traits(model)

    def _encode(self, request: MessageRequest, credential: Credential, base_url: str, max_tokens: int) -> HTTPRequest:
        traits = self.traits(request.model_name)
        body: JSON = {"model": request.model_name, "messages": chat_messages(request, self, traits.system_role)}
        if request.max_tokens is not None:
            body[traits.max_tokens] = request.max_tokens
        if request.stream:
            body["stream"] = True
            if self.usage_option:
                body["stream_options"] = {"include_usage": True}
        if stops := self.native_stops(request):
            body["stop"] = stops
        if request.metadata and request.metadata.user_id and "metadata" not in request.dropped:
            body[self.user_field] = request.metadata.user_id
        self._tools(request, body)
        if request.json_schema:
            body["response_format"] = {"type": "json_schema", "json_schema": self._schema(request, request.json_schema)}
        self._modalities(request, body)
        self._reasoning(request, traits, body)
        body |= self.sampling_fields(request, self._samples(traits, body))
        self.drop_foreign(request)
        headers = {"Authorization": bearer(credential.key)}
        return self.posted(request, f"{base_url}/chat/completions", headers, body)

    def decoder(self, request: MessageRequest) -> StreamDecoder:
        return ChatDecoder(self, request)

    def decode(self, body: Any, request: MessageRequest) -> Message:
        text = self._only_text(body, request)
        return Message.model_validate(text) if text else Adapter.decode(self, body, request)

    def answer(self, body: Any, request: MessageRequest) -> JSON:
        return self._only_text(body, request) or Adapter.decode(self, body, request).to_wire()

    def _only_text(self, body: Any, request: MessageRequest) -> JSON | None:
        """An answer that is one text, as most are, read without the detour over events; None for any other."""
        if not isinstance(body, dict) or "error" in body or "x_groq" in body or self.cut_stops(request):
            return None
        choices, usage, id = body.get("choices"), body.get("usage"), body.get("id")
        choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
        message = choice.get("message") if isinstance(choice, dict) and not choice.get("index") else None
        if not isinstance(choice, dict) or not isinstance(message, dict) or not isinstance(usage, dict):
            return None
        text, reason = message.get("content"), choice.get("finish_reason")
        plain = type(text) is str and type(reason) is str and type(id) is str and "delta" not in choice
        if not plain or not text or not id or reason not in CHAT_STOP_REASONS or any(map(message.get, _CHAT_MORE)):
            return None
        return {
            "id": id,
            "type": "message",
            "role": "assistant",
            "model": f"{self.id}/{body.get('model') or request.model_name}",
            "content": [{"type": "text", "text": text}],
            "stop_reason": CHAT_STOP_REASONS[reason],
            "stop_sequence": None,
            "usage": chat_usage(usage),
        }

    def _tools(self, request: MessageRequest, body: JSON) -> None:
        if not request.tools:
            return
        tools = [chat_tool(tool) for tool in request.functions]
        for kind, config in native_tools(request):
            tools += self._native(request, kind, config, body)
        if not tools:
            return
        body["tools"] = tools
        if choice := request.tool_choice:
            named = {"type": "function", "function": {"name": choice.name}}
            body["tool_choice"] = named if request.chosen_function else CHAT_TOOL_CHOICE[choice.type]
            if choice.disable_parallel_tool_use and "tool_choice.disable_parallel_tool_use" not in request.dropped:
                body["parallel_tool_calls"] = False

    def _native(self, request: MessageRequest, kind: str, config: JSON, body: JSON) -> list[JSON]:
        if kind == "web_search" and "search" in request.model_name:
            known = ("search_context_size", "user_location")
            body["web_search_options"] = {name: config[name] for name in known if name in config}
            request.drop(*(f"tools.{kind}.{name}" for name in config if name not in known))
            return []
        raise self.refuse(f"the tool {kind}", kind, "tools")

    def _schema(self, request: MessageRequest, schema: JSON) -> JSON:
        closed = closed_schema(schema)
        return {"name": "response", "schema": closed, "strict": is_strict(closed)}

    def _modalities(self, request: MessageRequest, body: JSON) -> None:
        if "image" in request.modalities:
            raise self.refuse("image output", "image_output", "output.modalities")
        if "audio" in request.modalities:
            if not self.audio:
                raise self.refuse("audio output", "audio_output", "output.modalities")
            wanted = (request.output and request.output.audio) or AudioOutput()
            spoken = "pcm16" if request.stream else "wav"  # a stream of samples is the only one OpenAI has
            body["modalities"] = ["text", "audio"]
            body["audio"] = {"voice": wanted.voice or "alloy", "format": wanted.format or spoken}

    def _reasoning(self, request: MessageRequest, traits: Traits, body: JSON) -> None:
        level = self.level(request)
        if "tools" in body and traits.tools != "yes":
            if traits.tools == "no" or level not in (None, "none"):
                what = "tools" if traits.tools == "no" else "tools with thinking"
                hint = f"use oai-resp/{request.model_name}"
                raise unsupported(f"{what} on {request.model_name}", self.id, ["oai-resp"], param="tools", hint=hint)
            level = "none"
        if level:
            body["reasoning_effort"] = level

    def _samples(self, traits: Traits, body: JSON) -> bool:
        return traits.sampling == "yes" or (traits.sampling == "unreasoned" and body.get("reasoning_effort") == "none")


@dataclass(frozen=True, slots=True)
class Groq(Chat):
    """Groq's dialect: reasoning text in `reasoning`, tools of its own (console.groq.com/docs/reasoning, /compound)."""

    def traits(self, model: str) -> Traits:
        return groq_traits(model)

    def _reasoning(self, request: MessageRequest, traits: Traits, body: JSON) -> None:
        level, model = self.level(request), request.model_name
        if level:
            body["reasoning_effort"] = clamp_level(level, traits.efforts or ("none", "low", "medium", "high"))
        if "gpt-oss" in model and request.thinking_level == "none":
            body["include_reasoning"] = False
        elif "qwen" in model and "thinking" not in request.dropped:
            body["reasoning_format"] = "parsed"  # unset it is raw: <think> in the middle of the text

    def _native(self, request: MessageRequest, kind: str, config: JSON, body: JSON) -> list[JSON]:
        if kind not in self.native_tools:
            raise self.refuse(f"the tool {kind}", kind, "tools")
        if self.traits(request.model_name).efforts is not None and not re.search(
            "gpt-oss|compound", request.model_name
        ):
            raise unsupported(
                f"the tool {kind} on {request.model_name}", self.id, ["groq/openai/gpt-oss-120b"], param="tools"
            )
        request.drop(*(f"tools.{kind}.{name}" for name in config))
        if "compound" in request.model_name:
            enabled = body.setdefault("compound_custom", {"tools": {"enabled_tools": []}})["tools"]["enabled_tools"]
            enabled.append({"code_execution": "code_interpreter"}.get(kind, kind))
            return []
        return [{"type": {"web_search": "browser_search", "code_execution": "code_interpreter"}[kind]}]

    def _schema(self, request: MessageRequest, schema: JSON) -> JSON:
        out = Chat._schema(self, request, schema)
        return out | {"strict": out["strict"] and "gpt-oss" in request.model_name}


@dataclass(frozen=True, slots=True)
class Cerebras(Chat):
    """Cerebras' dialect (inference-docs.cerebras.ai/capabilities/reasoning)."""

    def traits(self, model: str) -> Traits:
        return cerebras_traits(model)

    def _reasoning(self, request: MessageRequest, traits: Traits, body: JSON) -> None:
        if level := self.level(request):
            body["reasoning_effort"] = clamp_level(level, traits.efforts or ("none", "low", "medium", "high"))
        if traits.efforts != () and "thinking" not in request.dropped:
            body["reasoning_format"] = "parsed"


def chat_tool(tool: FunctionTool) -> JSON:
    function: JSON = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def chat_messages(request: MessageRequest, adapter: Chat, system_role: str) -> list[JSON]:
    """The history as messages. Every call is answered before anything else is said, which this format insists on;
    media of tool results stand in the user message behind them, for a tool message is only text.
    """
    out: list[JSON] = [{"role": system_role, "content": request.system_text}] if request.system_text else []
    unanswered: set[str] = set()
    media: list[JSON] = []  # of tool results
    held: list[JSON] = []  # what was said before the last result
    for message in request.messages:
        if message.role == "assistant":
            turn = _chat_assistant(message, adapter)
            if turn is None:
                continue
            if not unanswered:
                out += _chat_held(media, held)
            unanswered |= {call["id"] for call in turn.get("tool_calls", ())}
            if out and out[-1]["role"] == "assistant":
                out[-1] = _chat_joined(out[-1], turn)
            else:
                out.append(turn)
            continue
        if isinstance(message.content, str):
            if message.content:
                held.append({"role": "user" if message.role == "user" else system_role, "content": message.content})
            if not unanswered:
                out += _chat_held(media, held)
            continue
        for block in message.content:
            if isinstance(block, ToolResultBlock):
                text, more = _chat_result(block, adapter)
                id = portable_id(block.tool_use_id)
                out.append({"role": "tool", "tool_call_id": id, "content": text})
                unanswered.discard(id)
                media += more
        rest = [block for block in message.content if not isinstance(block, ToolResultBlock)]
        if parts := [part for block in rest for part in chat_parts(block, adapter)]:
            if message.role == "user":
                held.append({"role": "user", "content": _chat_content(parts)})
            else:
                held.append({"role": system_role, "content": "\n\n".join(part["text"] for part in parts)})
        if not unanswered:
            out += _chat_held(media, held)
    out += _chat_held(media, held)
    if not any(message["role"] != system_role for message in out):
        raise _nothing_said()
    return out


def _chat_held(media: list[JSON], held: list[JSON]) -> list[JSON]:
    """What waited for the tool results, which it empties: their media first, in the user message that follows."""
    out = list(held)
    if media and out and out[0]["role"] == "user":
        content = out[0]["content"]
        rest = content if isinstance(content, list) else [{"type": "text", "text": content}]
        out[0] = {"role": "user", "content": [*media, *rest]}
    elif media:
        out.insert(0, {"role": "user", "content": list(media)})
    media.clear()
    held.clear()
    return out


def _chat_joined(first: JSON, second: JSON) -> JSON:
    """Two assistant messages as the one that this format has."""
    joined = first | second
    for key in ("content", "reasoning"):
        if key in first and key in second:
            joined[key] = first[key] + second[key]
    if "tool_calls" in first and "tool_calls" in second:
        joined["tool_calls"] = first["tool_calls"] + second["tool_calls"]
    return joined


def _chat_content(parts: list[JSON]) -> str | list[JSON]:
    """One text as a plain string, which every local server reads too."""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _chat_assistant(message: MessageParam, adapter: Chat) -> JSON | None:
    if isinstance(message.content, str):
        return {"role": "assistant", "content": message.content} if message.content else None
    blocks = message.content
    text = "".join(block.text for block in blocks if isinstance(block, TextBlock)) or spoken_text(message)
    calls = [
        {
            "id": portable_id(block.id),
            "type": "function",
            "function": {"name": block.name, "arguments": dumps(block.input).decode("ascii")},
        }
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    reasoning = [b.thinking for b in blocks if isinstance(b, ThinkingBlock) and signed_by(b.signature) == adapter.id]
    if not text and not calls:
        return None
    out: JSON = {"role": "assistant"}
    if text:
        out["content"] = text
    if reasoning and adapter.reasoning_back:
        out["reasoning"] = "".join(reasoning)
    if calls:
        out["tool_calls"] = calls
    return out


def _chat_result(result: ToolResultBlock, adapter: Chat) -> tuple[str, list[JSON]]:
    """A tool result's text, marked if it is an error, and its other parts."""
    parts = [part for block in result.blocks for part in chat_parts(block, adapter)]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    media = [part for part in parts if part["type"] != "text"]
    return marked_error(text, result.is_error), media


def marked_error(text: str, is_error: bool | None) -> str:
    """Where a wire format has no flag for a failed tool, the text says it."""
    return f"Error: {text}" if is_error and not text.lower().startswith("error") else text


def chat_parts(block: Block, adapter: Chat) -> list[JSON]:
    """A block as user content: nothing for what has no form in history, an error for what is meant to be read."""
    match block:
        case ServerBlock(type="container_upload"):
            raise unsupported("container_upload", adapter.id, ["anthropic"], param="messages", block=block)
        case TextBlock(text=text):
            return [{"type": "text", "text": text}] if text else []
        case ImageBlock(source=Base64Source(data_url=url)):
            return [{"type": "image_url", "image_url": {"url": url}}]
        case ImageBlock(source=URLSource(url=url)) if adapter.image_urls:
            return [{"type": "image_url", "image_url": {"url": url}}]
        case ImageBlock(source=FileSource()):
            raise unsupported(
                "an image by file id", adapter.id, ["anthropic", "oai-resp", "gemini"], param="messages", block=block
            )
        case ImageBlock():
            others = [id for id, other in PROVIDERS.items() if "vision" in other.capabilities and id != adapter.id]
            raise unsupported("an image by URL", adapter.id, others, param="messages", block=block)
        case DocumentBlock(text=str(text)) | SearchResultBlock(text=text):
            return [{"type": "text", "text": text}]
        case DocumentBlock(source=Base64Source(data_url=url)) if adapter.pdf:
            return [{"type": "file", "file": {"filename": block.filename, "file_data": url}}]
        case DocumentBlock(source=FileSource(file_id=id)) if adapter.pdf:
            return [{"type": "file", "file": {"file_id": id}}]
        case DocumentBlock(source=URLSource()) if adapter.pdf:
            others = ["anthropic", "oai-resp", "gemini", "gemini-oauth"]
            raise unsupported("a document by URL", adapter.id, others, param="messages", block=block)
        case DocumentBlock():
            raise adapter.refuse("a document", "documents", "messages", block)
        case AudioBlock(source=Base64Source() as source):
            spoken = AUDIO_FORMATS.get(source.media_type.partition(";")[0].strip().lower())
            if not adapter.audio or not spoken:
                raise adapter.refuse(f"{source.media_type} input", "audio_input", "messages", block)
            return [{"type": "input_audio", "input_audio": {"data": source.data, "format": spoken}}]
        case VideoBlock():
            raise adapter.refuse("video input", "video", "messages", block)
    return []


def chat_usage(usage: JSON) -> JSON:
    prompt, output = _as_dict(usage.get("prompt_tokens_details")), _as_dict(usage.get("completion_tokens_details"))
    return make_usage(
        usage.get("prompt_tokens"),
        usage.get("completion_tokens"),
        cached=prompt.get("cached_tokens"),
        written=prompt.get("cache_write_tokens"),
        thinking=output.get("reasoning_tokens"),
    )


def url_citation(url: Any, title: Any, text: str = "", **more: Any) -> JSON:
    """A citation of a web page, in the shape of Anthropic's `web_search_result_location`."""
    return {
        "type": "web_search_result_location",
        "url": url or "",
        "title": title or "",
        "cited_text": text,
        "encrypted_index": "",
    } | more


def joined_text(value: Any) -> str:
    """Text that is a string, or a list of text parts."""
    if isinstance(value, list):
        return "".join(str(part.get("text") or "") for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""


def web_result(url: Any, title: Any, text: Any = None) -> JSON:
    """A hit, in the shape of Anthropic's `web_search_result`."""
    found = {"type": "web_search_result", "url": url or "", "title": title or ""}
    return found | {"encrypted_content": "", "page_age": None} | ({"text": text} if text else {})


def execution_result(stdout: str, stderr: str = "") -> JSON:
    """What code printed, in the shape of Anthropic's `code_execution_result`."""
    code = 1 if stderr else 0
    return {"type": "code_execution_result", "stdout": stdout, "stderr": stderr, "return_code": code, "content": []}


# A chunk with a text and nothing else: its other members are plain values that say nothing in the middle of an answer.
_CHAT_MEMBER = (
    r'"(?:usage":null|(?!choices"|error"|usage"|x_groq")[a-z_]+":'
    r'(?:null|"[^"\\\x00-\x1f]*"|0|[1-9][0-9]{0,17}))'
)
_CHAT_BEFORE = re.compile(r"\{(?:" + _CHAT_MEMBER + r',)*"choices":\[\{(?:"index":0,)?"delta":\{"content":"')
_CHAT_AFTER = re.compile(r'\}(?:,"(?:index":0|logprobs":null|finish_reason":null))*\}\](?:,' + _CHAT_MEMBER + r")*\}")


class ChatDecoder(StreamDecoder):
    """`chat.completion.chunk`s, or one `chat.completion`: its message reads as a delta that says everything at once."""

    def __init__(self, adapter: Adapter, request: MessageRequest) -> None:
        super().__init__(adapter, request)
        self._stop_reason = ""
        self._usage: JSON | None = None
        self._refused = False
        self._calls: dict[int, tuple[Any, Any]] = {}  # index → (key in the builder, the provider's id)
        self._early: dict[int, tuple[Any, str]] = {}  # index → (id, arguments) of a call whose name is still to come
        self._audio: list[bytes] = []
        self._transcript = ""
        self._texts = TextCut(_CHAT_BEFORE, _CHAT_AFTER)

    @property
    def ending(self) -> bool:
        return bool(self._stop_reason)

    def read(self, sse: SSE) -> list[StreamEvent]:
        if self.build.started and (text := self._texts.text(sse.data)) is not None:
            return self._delta({"content": text})
        return self.end() if sse.data.strip() == "[DONE]" else self.chunk(loads(sse.data))

    def chunk(self, chunk: Any) -> list[StreamEvent]:
        if chunk.get("error"):
            fault = chunk["error"] if isinstance(chunk["error"], dict) else {"message": chunk["error"]}
            status = {"status_code": chunk["status_code"]} if chunk.get("status_code") else {}  # Cerebras
            raise stream_error(self.provider, status | fault)
        extra = chunk.get("x_groq") or {}
        if extra.get("error"):
            raise stream_error(self.provider, extra["error"])
        usage = chunk.get("usage") or extra.get("usage")
        if usage:
            self._usage = chat_usage(_as_dict(usage))
        events: list[StreamEvent] = []
        for choice in chunk.get("choices") or ():
            if choice.get("index"):
                continue  # n > 1, which only `extensions` can ask for: the first is the answer
            events += self.build.start(chunk.get("id"), chunk.get("model") or self.request.model_name)
            if choice.get("message", {}) is None:
                raise ValueError("no message in a whole answer")
            events += self._delta(choice.get("delta") or choice.get("message") or {})
            if reason := choice.get("finish_reason"):
                self._stop_reason = CHAT_STOP_REASONS.get(reason) or self._unknown_stop(reason)
            elif "message" in choice and self.build.index >= 0:  # a whole answer of a server that gives no reason
                self._stop_reason = "end_turn"
        if self._stop_reason and usage and chunk.get("object") == "chat.completion.chunk":
            events += self.end()
        return events

    def end(self) -> list[StreamEvent]:
        if not self._stop_reason or not self.build.started:
            raise StreamTruncated(provider=self.provider)
        events = self._close_thinking()
        if self._audio or self._transcript:
            events += self.build.whole(self._audio_block())
        reason = "refusal" if self._refused and self._stop_reason == "end_turn" else self._stop_reason
        return events + self.build.finish(reason, self._usage or make_usage())

    def _delta(self, delta: JSON) -> list[StreamEvent]:
        build, text = self.build, delta.get("content")
        if len(delta) == 1 and isinstance(text, str) and text:  # nine in ten
            return self._close_thinking() + build.text(text)
        events: list[StreamEvent] = []
        if reasoning := joined_text(delta.get("reasoning_content") or delta.get("reasoning")):
            events += build.thinking(reasoning)
        if executed := delta.get("executed_tools"):
            events += self._executed(executed)
        if text:
            events += self._close_thinking() + build.text(joined_text(text))
        if refusal := joined_text(delta.get("refusal")):
            self._refused = True
            events += self._close_thinking() + build.text(refusal)
        for note in delta.get("annotations") or ():
            if cited := note.get("url_citation"):
                span = {name: cited[name] for name in ("start_index", "end_index") if name in cited}
                events += build.citation(url_citation(cited.get("url"), cited.get("title"), **span))
        for position, call in enumerate(delta.get("tool_calls") or ()):
            events += self._close_thinking() + self._call(position, call)
        if audio := delta.get("audio"):
            self._audio.append(base64.b64decode(audio.get("data") or ""))
            self._transcript += audio.get("transcript") or ""
        return events

    def _unknown_stop(self, reason: Any) -> str:
        if self.build.index < 0:
            message = f"{self.provider} gave no answer: {_printable(str(reason), 60)}"
            raise ProviderError(message, provider=self.provider, code=_printable(str(reason), 60))
        return "end_turn"

    def _close_thinking(self) -> list[StreamEvent]:
        return self.build.state({"text": 1}) if self.build.is_open("thinking") else []

    def _call(self, position: int, call: JSON) -> list[StreamEvent]:
        """A fragment of a tool call: id and name once, arguments in pieces keyed by index, or all of it at once."""
        index, function = call.get("index", position), call.get("function") or {}
        name, arguments = function.get("name"), function.get("arguments") or ""
        if isinstance(arguments, dict):  # some local servers
            arguments = dumps(arguments).decode("ascii")
        key, id = self._calls.get(index, (None, None))
        if key is not None and not (name and call.get("id") and call["id"] != id):
            return self.build.arguments(key, arguments)
        early_id, early = self._early.pop(index, (None, ""))
        id, arguments = call.get("id") or early_id, early + arguments
        if not name:  # it may still come
            self._early[index] = (id, arguments)
            return []
        key = ("call", index, len(self._calls), id)
        self._calls[index] = (key, id)
        if is_object(arguments):
            return self.build.tool_use(key, id, name, arguments)
        return self.build.tool_use(key, id, name) + self.build.arguments(key, arguments)

    def _executed(self, tools: Iterable[JSON]) -> list[StreamEvent]:
        """Groq's own tools: what ran, and what came of it."""
        events: list[StreamEvent] = []
        for tool in tools:
            output, found = tool.get("output"), (tool.get("search_results") or {}).get("results")
            if output is None and found is None:
                continue
            id = f"srvgroq_{secrets.token_hex(10)}"
            searched = found is not None or "search" in str(tool.get("type"))
            name = "web_search" if searched else "code_execution"
            given = tool_input(tool.get("arguments") or "")
            events += self.build.whole({"type": "server_tool_use", "id": id, "name": name, "input": given})
            content: Any = execution_result(output or "")
            if searched:
                content = [web_result(hit.get("url"), hit.get("title"), hit.get("content")) for hit in found or ()]
            events += self.build.whole({"type": f"{name}_tool_result", "tool_use_id": id, "content": content})
        return events

    def _audio_block(self) -> JSON:
        spoken = self.request.output.audio.format if self.request.output and self.request.output.audio else None
        spoken = spoken or ("pcm16" if self.request.stream else "wav")
        data = base64.b64encode(b"".join(self._audio)).decode("ascii")
        return {
            "type": "audio",
            "source": {"type": "base64", "media_type": f"audio/{spoken}", "data": data},
            "transcript": self._transcript,
        }


# == OpenAI Responses ==================================================================================================
# POST /responses, stateless (`store: false`): reasoning and native calls are items, replayed from signatures.

REPLAYED_KEYS = {  # what an item keeps on its way back, where the input type has fewer keys than the output type
    "reasoning": ("id", "encrypted_content"),
    "web_search_call": ("id", "action", "status"),
    "file_search_call": ("id", "queries", "results", "status"),
    "code_interpreter_call": ("id", "code", "container_id", "outputs", "status"),
    "image_generation_call": ("id", "status"),
    "custom_tool_call": ("call_id", "name", "input"),
}
CALL_OUTPUTS = {
    "function_call": "function_call_output",
    "custom_tool_call": "custom_tool_call_output",
    "computer_call": "computer_call_output",
}
REPLAYED_ITEM = re.compile(r"reasoning|compaction|program|mcp_list_tools|[a-z_]+_(call|call_output|output)")
RESPONSES_NATIVE: dict[str, JSON] = {
    "web_search": {"type": "web_search"},
    "code_execution": {"type": "code_interpreter", "container": {"type": "auto"}},
    "file_search": {"type": "file_search"},
    "computer_use": {"type": "computer"},
    "image_generation": {"type": "image_generation"},
}
RESPONSES_CONTENT = tuple(f"response.{name}" for name in ("output_", "content_", "reasoning_", "function_", "refusal."))
RESPONSES_INCLUDE = {
    "web_search": "web_search_call.action.sources",
    "code_execution": "code_interpreter_call.outputs",
    "file_search": "file_search_call.results",
}
RESPONSES_NATIVE_CONFIG = {
    "web_search": ("allowed_domains", "filters", "user_location", "search_context_size", "external_web_access"),
    "code_execution": ("container", "file_ids", "memory_limit"),
    "file_search": ("vector_store_ids", "max_num_results", "filters", "ranking_options"),
    "computer_use": (),
    "image_generation": (
        *("model", "size", "quality", "background", "output_format", "output_compression", "partial_images", "action"),
        *("moderation", "input_fidelity", "input_image_mask"),
    ),
}
RESPONSES_NATIVE_NAMES = {
    "web_search_call": "web_search",
    "file_search_call": "file_search",
    "code_interpreter_call": "code_execution",
}


@dataclass(frozen=True, slots=True)
class Responses(Adapter):
    """POST /responses."""

    advisory: ClassVar[dict[str, str]] = {
        "temperature": "temperature",
        "top_p": "top_p",
        "reasoning": "thinking",
        "reasoning.effort": "thinking",
        "reasoning.summary": "thinking",
        "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
        "safety_identifier": "metadata",
    }

    def traits(self, model: str) -> Traits:
        return openai_traits(model)

    def _encode(self, request: MessageRequest, credential: Credential, base_url: str, max_tokens: int) -> HTTPRequest:
        traits = self.traits(request.model_name)
        body: JSON = {"model": request.model_name, "input": response_items(request, self), "store": False}
        if request.system_text:
            body["instructions"] = request.system_text
        if request.max_tokens is not None:
            body["max_output_tokens"] = request.max_tokens
        if request.stream:
            body["stream"] = True
        if request.metadata and request.metadata.user_id and "metadata" not in request.dropped:
            body["safety_identifier"] = request.metadata.user_id
        self._tools(request, body)
        if schema := request.json_schema:
            closed = closed_schema(schema)
            body["text"] = {
                "format": {"type": "json_schema", "name": "response", "schema": closed, "strict": is_strict(closed)}
            }
        level = self.level(request)
        if level:
            visible = request.thinking is not None and request.thinking_level != "none"
            body["reasoning"] = {"effort": level} | ({"summary": "auto"} if visible else {})
        samples = traits.sampling == "yes" or (traits.sampling == "unreasoned" and level == "none")
        body |= self.sampling_fields(request, samples)
        self.drop_foreign(request)
        return self.posted(request, f"{base_url}/responses", {"Authorization": bearer(credential.key)}, body)

    def decoder(self, request: MessageRequest) -> StreamDecoder:
        return ResponsesDecoder(self, request)

    def _tools(self, request: MessageRequest, body: JSON) -> None:
        tools: list[JSON] = []
        for tool in request.functions:
            described = {"description": tool.description} if tool.description is not None else {}
            strict = bool(tool.strict)  # null would let the API make the schema strict
            tools.append(
                {"type": "function", "name": tool.name, "parameters": tool.input_schema, "strict": strict} | described
            )
        native = dict(native_tools(request))
        if "audio" in request.modalities:
            raise self.refuse("audio output", "audio_output", "output.modalities")
        if "image" in request.modalities:
            wanted = (
                request.output.image.model_dump(exclude_none=True) if request.output and request.output.image else {}
            )
            native["image_generation"] = wanted | native.get("image_generation", {})
        for kind, config in native.items():
            if kind not in self.native_tools:
                raise self.refuse(f"the tool {kind}", kind, "tools")
            tools.append(response_native_tool(request, kind, config))
        if not tools:
            return
        body["tools"] = tools
        if include := [RESPONSES_INCLUDE[kind] for kind in native if kind in RESPONSES_INCLUDE]:
            body["include"] = include
        if choice := request.tool_choice:
            named = {"type": "function", "name": choice.name}
            body["tool_choice"] = named if request.chosen_function else CHAT_TOOL_CHOICE[choice.type]
            if choice.disable_parallel_tool_use and "tool_choice.disable_parallel_tool_use" not in request.dropped:
                body["parallel_tool_calls"] = False


def response_native_tool(request: MessageRequest, kind: str, config: JSON) -> JSON:
    """A neutral tool with its configuration in OpenAI's words; what has no place there is reported."""
    tool = dict(RESPONSES_NATIVE[kind])
    known = RESPONSES_NATIVE_CONFIG[kind]
    request.drop(*(f"tools.{kind}.{name}" for name in config if name not in known))
    given = {name: config[name] for name in known if name in config}
    if "allowed_domains" in given:
        tool["filters"] = {"allowed_domains": given.pop("allowed_domains")}
    if kind == "code_execution" and not isinstance(given.get("container"), str):
        loose = {name: given.pop(name) for name in ("file_ids", "memory_limit") if name in given}
        given["container"] = tool["container"] | _as_dict(given.get("container")) | loose
    if kind == "file_search" and not given.get("vector_store_ids"):
        raise InvalidRequestError("file_search needs config.vector_store_ids on oai-resp", param="tools")
    return tool | given


def response_items(request: MessageRequest, adapter: Adapter) -> list[JSON]:
    """The history as input items, in the order in which they were said."""
    out: list[JSON] = []
    kinds: dict[str, str] = {}  # call id → type of the item that called
    reasons = adapter.traits(request.model_name).efforts != ()
    for message in request.messages:
        if message.role == "assistant":
            out += [item for item in _response_turn(message, kinds) if reasons or item.get("type") != "reasoning"]
            continue
        role = "developer" if message.role == "system" else "user"
        for block in message.blocks:
            if isinstance(block, ToolResultBlock):
                out.append(_response_output(block, kinds, adapter))
        rest = (block for block in message.blocks if not isinstance(block, ToolResultBlock))
        if parts := [part for block in rest for part in response_parts(block, adapter)]:
            plain = len(parts) == 1 and parts[0]["type"] == "input_text"
            out.append({"role": role, "content": parts[0]["text"] if plain else parts})
    if not out:
        raise _nothing_said()
    return out


def _response_turn(message: MessageParam, kinds: dict[str, str]) -> list[JSON]:
    """An assistant message as items. Reasoning that lost the item it led to is left out: OpenAI would refuse it."""
    items: list[JSON] = []
    following: JSON = {}
    spoken = any(isinstance(block, TextBlock) and block.text for block in message.blocks)
    for block in message.blocks:
        match block:
            case ThinkingBlock(signature=signature, thinking=text):
                state = carried(signature, "oai-resp")
                following = _as_dict(state.get("next"))
                if items and isinstance(state.get("prev"), dict):
                    items[-1] |= state["prev"]
                if item := _replayed(state, text):
                    items.append(item)
                    if isinstance(call := item.get("call_id"), str):
                        kinds[call] = item["type"]
                continue
            case TextBlock(text=text) if text:
                items.append({"role": "assistant", "content": text} | following)
                continue  # a phase is that of the whole message
            case AudioBlock(transcript=str(text)) if text and not spoken:
                items.append({"role": "assistant", "content": text})
            case ToolUseBlock() if block.id not in kinds:
                kinds[block.id] = "function_call"
                arguments = dumps(block.input).decode("ascii")
                items.append(
                    {
                        "type": "function_call",
                        "call_id": portable_id(block.id),
                        "name": block.name,
                        "arguments": arguments,
                    }
                    | {name: value for name, value in following.items() if name != "phase"}
                )
            case ImageBlock(source=Base64Source(data=data)) if (
                items and items[-1].get("type") == "image_generation_call"
            ):
                items[-1].setdefault("result", data)
        following = {}
    items = [item for item in items if item.get("type") != "image_generation_call" or "result" in item]
    while items and items[-1].get("type") == "reasoning":
        items.pop()
    return items


def _replayed(state: JSON, text: str) -> JSON | None:
    item = dict(_as_dict(state.get("item")))
    if not isinstance(kind := item.get("type"), str) or not REPLAYED_ITEM.fullmatch(kind):
        return None
    if kind == "reasoning":
        lengths = state.get("parts")
        parts = _split(text, lengths) if isinstance(lengths, list) else [text] if text else []
        item["summary"] = [{"type": "summary_text", "text": part} for part in parts]
    return item


def _split(text: str, lengths: list[Any]) -> list[str]:
    """The parts of a summary, which were joined by blank lines for the eye; none for raw reasoning."""
    if not lengths:
        return []
    parts, at = [], 0
    for length in lengths:
        parts.append(text[at : at + count(length)])
        at += count(length) + 2
    return parts if "\n\n".join(parts) == text else [text]


def _response_output(block: ToolResultBlock, kinds: Mapping[str, str], adapter: Adapter) -> JSON:
    kind = CALL_OUTPUTS.get(kinds.get(block.tool_use_id, ""), "function_call_output")
    parts = [part for inner in block.blocks for part in response_parts(inner, adapter)]
    text = marked_error("\n".join(part["text"] for part in parts if part["type"] == "input_text"), block.is_error)
    output: Any = text
    if any(part["type"] != "input_text" for part in parts):
        output = [
            *([{"type": "input_text", "text": text}] if text else []),
            *(p for p in parts if p["type"] != "input_text"),
        ]
    if kind == "computer_call_output":
        shots = [part["image_url"] for part in parts if "image_url" in part]
        output = {"type": "computer_screenshot", "image_url": shots[-1] if shots else ""}
    id = block.tool_use_id
    return {"type": kind, "call_id": id if kind == "computer_call_output" else portable_id(id), "output": output}


def response_parts(block: Block, adapter: Adapter) -> list[JSON]:
    match block:
        case ServerBlock(type="container_upload"):
            raise unsupported("container_upload", adapter.id, ["anthropic"], param="messages", block=block)
        case TextBlock(text=text):
            return [{"type": "input_text", "text": text}] if text else []
        case ImageBlock(source=Base64Source(data_url=url) | URLSource(url=url)):
            return [{"type": "input_image", "image_url": url, "detail": "auto"}]
        case ImageBlock(source=FileSource(file_id=id)):
            return [{"type": "input_image", "file_id": id, "detail": "auto"}]
        case DocumentBlock(text=str(text)) | SearchResultBlock(text=text):
            return [{"type": "input_text", "text": text}]
        case DocumentBlock(source=Base64Source(data_url=url)):
            return [{"type": "input_file", "filename": block.filename, "file_data": url}]
        case DocumentBlock(source=URLSource(url=url)):
            return [{"type": "input_file", "file_url": url}]
        case DocumentBlock(source=FileSource(file_id=id)):
            return [{"type": "input_file", "file_id": id}]
        case AudioBlock() | VideoBlock():
            kind = "audio_input" if isinstance(block, AudioBlock) else "video"
            raise adapter.refuse(f"{block.type} input", kind, "messages", block)
    return []


def responses_usage(usage: Any) -> JSON:
    usage = _as_dict(usage)
    given, output = _as_dict(usage.get("input_tokens_details")), _as_dict(usage.get("output_tokens_details"))
    return make_usage(
        usage.get("input_tokens"),
        usage.get("output_tokens"),
        cached=given.get("cached_tokens"),
        written=given.get("cache_write_tokens"),
        thinking=output.get("reasoning_tokens"),
    )


class ResponsesDecoder(StreamDecoder):
    """Typed events by item. `output_item.done` is the authoritative copy: it fills in whatever had not come before."""

    def __init__(self, adapter: Adapter, request: MessageRequest) -> None:
        super().__init__(adapter, request)
        self._streamed: set[Any] = set()  # keys whose text or arguments came in pieces
        self._done: set[int] = set()  # output indices that are complete
        self._phased: set[int] = set()
        self._refused = False

    def feed_whole(self, body: Any) -> list[StreamEvent]:
        with _readable(self.provider):
            if isinstance(body.get("error"), dict) and "output" not in body:
                raise stream_error(self.provider, body["error"])
            return super().feed_whole({"type": f"response.{body['status']}", "response": body})

    def chunk(self, chunk: Any) -> list[StreamEvent]:
        if not self.build.started and chunk["type"].startswith(RESPONSES_CONTENT):
            return self._start({}) + self.chunk(chunk)
        index = chunk.get("output_index", 0)
        match chunk["type"]:
            case "response.output_text.delta":
                return self._text((index, chunk.get("content_index", 0)), chunk["delta"])
            case "response.function_call_arguments.delta":
                if self.build.is_open((index, "call")):
                    self._streamed.add((index, "call"))
                return self.build.arguments((index, "call"), chunk["delta"])
            case "response.reasoning_summary_text.delta" | "response.reasoning_text.delta":
                return self._thinking(index, chunk)
            case "response.refusal.delta":
                self._refused = True
                return self._text((index, chunk.get("content_index", 0)), chunk["delta"])
            case "response.output_text.annotation.added":
                return self._annotation((index, chunk.get("content_index", 0)), chunk["annotation"])
            case "response.output_item.added":
                return self._added(index, chunk["item"])
            case "response.output_item.done":
                return self._item(index, chunk["item"])
            case "response.created" | "response.in_progress" | "response.queued":
                return self._start(chunk["response"])
            case "response.completed" | "response.incomplete":
                return self._finish(chunk["response"])
            case "response.failed" | "response.cancelled":
                fault = chunk["response"].get("error") or {
                    "message": f"the response is {chunk['type'].partition('.')[2]}"
                }
                raise stream_error(self.provider, fault)
            case "error":
                raise stream_error(self.provider, chunk.get("error") or chunk)
        return []

    def _start(self, response: JSON) -> list[StreamEvent]:
        return self.build.start(response.get("id"), response.get("model") or self.request.model_name)

    def _finish(self, response: JSON) -> list[StreamEvent]:
        events = self._start(response)
        for index, item in enumerate(response.get("output") or ()):
            events += self._item(index, item)
        why = (response.get("incomplete_details") or {}).get("reason")
        reason = {"max_output_tokens": "max_tokens", "content_filter": "refusal"}.get(why or "", "end_turn")
        if self._refused:
            reason = "refusal"
        return events + self.build.finish(reason, responses_usage(response.get("usage")))

    def _text(self, key: Any, text: str) -> list[StreamEvent]:
        self._streamed.add(key)
        return self.build.text(text, key)

    def _thinking(self, index: int, chunk: JSON) -> list[StreamEvent]:
        """Summary parts, and the raw reasoning of open models, one below the other."""
        key, part = (index, "reasoning"), (index, chunk["type"], chunk.get("summary_index", chunk.get("content_index")))
        gap = "\n\n" if key in self._streamed and part not in self._streamed else ""
        self._streamed |= {key, part}
        return self.build.thinking(gap + chunk["delta"], key)

    def _annotation(self, key: Any, note: JSON) -> list[StreamEvent]:
        self._streamed.add((key, "notes"))
        return self.build.citation(response_citation(note), key) if self.build.is_open(key) else []

    def _added(self, index: int, item: JSON) -> list[StreamEvent]:
        if item["type"] == "message" and item.get("phase"):
            self._phased.add(index)
            return self.build.state({"next": {"phase": item["phase"]}}, (index, "phase"))
        if item["type"] == "function_call" and item.get("name"):
            return self._call(index, item)
        return []

    def _call(self, index: int, item: JSON) -> list[StreamEvent]:
        self._streamed.add((index, "opened"))
        carried_on = {name: item[name] for name in ("namespace",) if item.get(name)}
        events = self.build.state({"next": carried_on}, (index, "next")) if carried_on else []
        return events + self.build.tool_use((index, "call"), item.get("call_id"), item["name"])

    def _item(self, index: int, item: JSON) -> list[StreamEvent]:
        """A complete item: what had not come in pieces, then its end."""
        if index in self._done:
            return []
        self._done.add(index)
        match item.get("type"):
            case "message":
                return self._message(index, item)
            case "function_call":
                events = [] if (index, "opened") in self._streamed else self._call(index, item)
                if (index, "call") not in self._streamed:
                    events += self.build.arguments((index, "call"), item.get("arguments") or "")
                return events + self.build.close((index, "call"))
            case "reasoning":
                return self._reasoning(index, item)
            case "image_generation_call":
                return self._image(index, item)
            case "custom_tool_call" | "computer_call":
                name = item.get("name") or "computer"
                given = {
                    key: item[key] for key in ("input", "action", "actions", "pending_safety_checks") if item.get(key)
                }
                events = self._replayable(index, item)
                return events + self.build.tool_use(
                    (index, "call"), item.get("call_id"), name, dumps(given).decode("ascii")
                )
            case _:
                return self._native(index, item)

    def _replayable(self, index: int, item: JSON, **more: Any) -> list[StreamEvent]:
        kept = REPLAYED_KEYS.get(item["type"])
        fields = {key: item[key] for key in item if (key in kept if kept else key != "type")}
        whole = {"type": item["type"]} | {k: v for k, v in fields.items() if v is not None or k == "outputs"}
        if sources := _as_dict(whole.get("action")).get("sources"):
            urls = [source for source in sources if source.get("type") == "url"]
            whole["action"] = whole["action"] | {"sources": urls}
        return self.build.state({"item": whole} | more, (index, "reasoning"))

    def _message(self, index: int, item: JSON) -> list[StreamEvent]:
        phase = item.get("phase")
        events: list[StreamEvent] = []
        whole = not any((index, position) in self._streamed for position in range(len(item.get("content") or ())))
        if phase and index not in self._phased and whole:
            events += self.build.state({"next": {"phase": phase}}, (index, "phase"))
            phase = None
        for position, part in enumerate(item.get("content") or ()):
            key = (index, position)
            if part.get("type") == "refusal":
                self._refused = True
            if key not in self._streamed:
                events += self.build.text(part.get("text") or part.get("refusal") or "", key)
            if (key, "notes") not in self._streamed and self.build.is_open(key):
                for note in part.get("annotations") or ():
                    events += self.build.citation(response_citation(note), key)
            events += self.build.close(key)
        if phase and index not in self._phased:
            events += self.build.state({"prev": {"phase": phase}}, (index, "phase"))
        return events

    def _reasoning(self, index: int, item: JSON) -> list[StreamEvent]:
        key = (index, "reasoning")
        parts = [part.get("text") or "" for part in item.get("summary") or ()]
        raw = [part.get("text") or "" for part in item.get("content") or ()]
        events = [] if key in self._streamed else self.build.thinking("\n\n".join(parts or raw), key)
        if not item.get("encrypted_content"):  # cannot be replayed without being stored
            return events + self.build.close(key)
        lengths = [len(part) for part in parts]
        return events + self._replayable(index, item, **({} if len(lengths) == 1 else {"parts": lengths}))

    def _image(self, index: int, item: JSON) -> list[StreamEvent]:
        if not item.get("result"):
            return []
        source = {"type": "base64", "media_type": f"image/{item.get('output_format') or 'png'}", "data": item["result"]}
        return self._replayable(index, item) + self.build.whole({"type": "image", "source": source})

    def _native(self, index: int, item: JSON) -> list[StreamEvent]:
        """A tool that OpenAI ran: the item for the next turn, and what a reader of Anthropic's blocks expects."""
        kind = str(item.get("type"))
        id = str(item.get("id") or f"srvoai_{secrets.token_hex(10)}")
        name = RESPONSES_NATIVE_NAMES.get(kind) or kind.removesuffix("_call")
        hidden = ("type", "id", "status", "results", "outputs", "encrypted_content")
        given = {key: value for key, value in item.items() if key not in hidden and value is not None}
        if kind == "web_search_call":
            given = {key: value for key, value in _as_dict(item.get("action")).items() if key != "sources"}
        events = self._replayable(index, item) if REPLAYED_ITEM.fullmatch(kind) else []
        if kind in ("mcp_list_tools", "compaction"):
            return events
        events += self.build.whole({"type": "server_tool_use", "id": id, "name": name, "input": given})
        if (content := _native_result(kind, item)) is not None:
            events += self.build.whole({"type": f"{name}_tool_result", "tool_use_id": id, "content": content})
        return events


def _native_result(kind: str, item: JSON) -> Any:
    """What a native call found, in Anthropic's shape; None where the item does not say."""
    if kind == "web_search_call":
        sources = _as_dict(item.get("action")).get("sources")
        return None if sources is None else [web_result(s.get("url"), s.get("title")) for s in sources if s.get("url")]
    if kind == "code_interpreter_call" and item.get("outputs") is not None:
        logs = "".join(output.get("logs") or "" for output in item["outputs"])
        return execution_result(logs)
    return item.get("results") if kind == "file_search_call" else None


def response_citation(note: JSON) -> JSON:
    if note.get("type") == "url_citation":
        span = {name: note[name] for name in ("start_index", "end_index") if name in note}
        return url_citation(note.get("url"), note.get("title"), **span)
    return dict(note)


# == Gemini ============================================================================================================
# POST /models/{model}:generateContent; gemini-oauth wraps the same in Code Assist's envelope. A stream is a sequence
# of whole responses whose parts append, so that one answer and one event read alike.

GEMINI_STOP_REASONS = {"STOP": "end_turn", "MAX_TOKENS": "max_tokens", "CONTINUATION": "pause_turn"} | dict.fromkeys(
    [
        *("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "ESCALATION", "MODEL_ARMOR"),
        *("PUP_LIMITED_DISABLED", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"),
    ],
    "refusal",
)
GEMINI_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]{0,127}")
UNSIGNED_CALL = "skip_thought_signature_validator"  # Google's own word for a call that some other model made
GEMINI_NATIVE = {
    "web_search": "googleSearch",
    "code_execution": "codeExecution",
    "file_search": "fileSearch",
    "computer_use": "computerUse",
}
GEMINI_NATIVE_CONFIG = {  # what of a neutral tool's config has a place here
    "web_search": ("timeRangeFilter", "searchTypes"),
    "file_search": ("fileSearchStoreNames", "topK", "metadataFilter"),
    "computer_use": ("environment", "excludedPredefinedFunctions"),
}
ASPECT_RATIOS = ("1:1", "2:3", "3:2", "3:4", "4:3", "4:5", "5:4", "9:16", "16:9", "21:9")


@dataclass(frozen=True, slots=True)
class Gemini(Adapter):
    """POST /models/{model}:generateContent, :streamGenerateContent?alt=sse."""

    server_tools_beside_functions: bool = True

    advisory: ClassVar[dict[str, str]] = {
        "temperature": "temperature",
        "topP": "top_p",
        "topK": "top_k",
        "thinkingConfig": "thinking",
        "thinking_level": "thinking",
        "thinking_budget": "thinking",
    }

    def traits(self, model: str) -> Traits:
        return gemini_traits(model)

    def _encode(self, request: MessageRequest, credential: Credential, base_url: str, max_tokens: int) -> HTTPRequest:
        url = f"{base_url}/models/{quote(request.model_name, safe='')}:{self._method(request)}"
        return self.posted(request, url, {"x-goog-api-key": credential.key}, self._body(request))

    def decoder(self, request: MessageRequest) -> StreamDecoder:
        return GeminiDecoder(self, request)

    @staticmethod
    def _method(request: MessageRequest) -> str:
        return "streamGenerateContent?alt=sse" if request.stream else "generateContent"

    def _body(self, request: MessageRequest) -> JSON:
        traits = self.traits(request.model_name)
        body: JSON = {"contents": gemini_contents(request, self, traits)}
        if request.system_text:
            texts = [request.system] if isinstance(request.system, str) else [block.text for block in request.system]
            body["systemInstruction"] = {"parts": [{"text": text} for text in texts if text]}
        self._tools(request, traits, body)
        names = {"temperature": "temperature", "top_p": "topP", "top_k": "topK"}
        config: JSON = {names[key]: value for key, value in self.sampling_fields(request).items()}
        if request.max_tokens is not None:
            config["maxOutputTokens"] = request.max_tokens
        if stops := self.native_stops(request):
            config["stopSequences"] = stops
        if request.json_schema:
            config |= {"responseMimeType": "application/json", "responseJsonSchema": request.json_schema}
        config |= self._modalities(request)
        if thinking := self._thinking(request, traits):
            config["thinkingConfig"] = thinking
        if config:
            body["generationConfig"] = config
        if request.metadata and request.metadata.user_id:
            request.drop("metadata")
        self.drop_foreign(request)
        return body

    def _tools(self, request: MessageRequest, traits: Traits, body: JSON) -> None:
        declared = [gemini_tool(tool) for tool in request.functions]
        if any(tool.strict for tool in request.functions):
            request.drop("tools.strict")
        tools: list[JSON] = [{"functionDeclarations": declared}] if declared else []
        for kind, config in native_tools(request):
            if kind not in self.native_tools:
                raise self.refuse(f"the tool {kind}", kind, "tools")
            known = GEMINI_NATIVE_CONFIG.get(kind, ())
            request.drop(*(f"tools.{kind}.{name}" for name in config if name not in known))
            given = {name: config[name] for name in known if name in config}
            tools.append(
                {
                    GEMINI_NATIVE[kind]: ({"environment": "ENVIRONMENT_BROWSER"} | given)
                    if kind == "computer_use"
                    else given
                }
            )
        if not tools:
            return
        setup: JSON = {}
        if declared and len(tools) > 1:
            if not self.server_tools_beside_functions or (0, 0) < traits.generation < (3, 0):
                raise unsupported(f"native tools beside function tools on {request.model_name}", self.id, param="tools")
            setup["includeServerSideToolInvocations"] = True
        choice = request.tool_choice
        if choice and choice.type == "none":
            tools[:] = tools[:1] if declared else []
        if choice and not declared and choice.type in ("any", "tool"):
            request.drop("tool_choice")
        if choice and declared:
            mode: JSON = {"mode": {"auto": "AUTO", "none": "NONE"}.get(choice.type, "ANY")}
            if request.chosen_function:
                mode["allowedFunctionNames"] = [gemini_name(choice.name or "")]
            setup["functionCallingConfig"] = mode
        if request.serial_tools:
            request.drop("tool_choice.disable_parallel_tool_use")
        if tools:
            body["tools"] = tools
        if setup:
            body["toolConfig"] = setup

    def _modalities(self, request: MessageRequest) -> JSON:
        output, wanted = request.output, request.modalities
        if not output or wanted == {"text"}:
            return {}
        for kind in ("image", "audio"):
            if kind in wanted and f"{kind}_output" not in self.capabilities:
                raise self.refuse(f"{kind} output", f"{kind}_output", "output.modalities")
        config: JSON = {"responseModalities": [kind.upper() for kind in output.modalities]}
        if "audio" in wanted and output.audio and output.audio.voice:
            config["speechConfig"] = {"voiceConfig": {"prebuiltVoiceConfig": {"voiceName": output.audio.voice}}}
        if output.image and output.image.size and output.image.size != "auto":
            side = max(map(int, output.image.size.split("x")))
            large = {"imageSize": "4K" if side > 3000 else "2K"} if side > 1600 else {}
            config["imageConfig"] = {"aspectRatio": _aspect_ratio(output.image.size)} | large
        if output.image and output.image.quality:
            request.drop("output.image.quality")
        if output.audio and output.audio.format:
            request.drop("output.audio.format")
        return config

    def _thinking(self, request: MessageRequest, traits: Traits) -> JSON:
        level, asked = self.level(request), request.thinking
        if level is None:
            return {}
        shown = request.thinking_level != "none" and asked is not None
        free = (
            asked is not None
            and asked.type == "adaptive"
            and not (request.output_config and request.output_config.effort)
        )
        if traits.thinking == ("level",):
            if free:
                return {"includeThoughts": True}
            word = clamp_level(level, traits.efforts or ("minimal", "low", "medium", "high"))
            return {"includeThoughts": shown, "thinkingLevel": word.upper()}
        most = 32_768 if "pro" in request.model_name else 24_576
        least = 128 if "pro" in request.model_name else 0
        if free:
            budget = -1
        elif request.thinking_level == "none":
            budget = least
        elif asked and asked.budget_tokens:
            budget = max(least, min(asked.budget_tokens, most))
        else:
            budget = min(LEVEL_BUDGETS[level], most)
        return {"includeThoughts": shown, "thinkingBudget": budget}


@dataclass(frozen=True, slots=True)
class GeminiOAuth(Gemini):
    """POST {base}:generateContent in Code Assist's envelope (google-gemini/gemini-cli, code_assist/converter.ts)."""

    def _encode(self, request: MessageRequest, credential: Credential, base_url: str, max_tokens: int) -> HTTPRequest:
        inner = self._body(request)
        inner = _merged(inner, request.extensions.get(self.id) or {})
        body: JSON = {"model": request.model_name, "request": inner}
        if credential.project:
            body["project"] = credential.project
        headers = {"Authorization": bearer(credential.key), "Content-Type": "application/json"}
        bare = request.model_copy(update={"extensions": {}})
        return self.posted(bare, f"{base_url}:{self._method(request)}", headers, body)


def gemini_name(name: str) -> str:
    """A function name must not begin with a digit or a dash here."""
    return name if GEMINI_NAME.fullmatch(name) else f"_{name}"[:128]


def gemini_tool(tool: FunctionTool) -> JSON:
    described = {"description": tool.description} if tool.description is not None else {}
    return {"name": gemini_name(tool.name), **described, "parametersJsonSchema": tool.input_schema}


def _aspect_ratio(size: str) -> str:
    width, height = map(int, size.split("x"))
    return min(
        ASPECT_RATIOS,
        key=lambda ratio: abs(math.log(width / height * int(ratio.split(":")[1]) / int(ratio.split(":")[0]))),
    )


def gemini_contents(request: MessageRequest, adapter: Adapter, traits: Traits) -> list[JSON]:
    """The history as contents: neighbours of one role are one content, answers stand in the order of their calls."""
    modern = traits.generation == (0, 0) or traits.generation >= (3, 0)
    names = request.tool_names
    order = {id: position for position, id in enumerate(names)}
    contents: list[JSON] = []
    for message in request.messages:
        if message.role == "assistant":
            role, parts = "model", _gemini_turn(message, adapter, modern)
        elif message.role == "system":
            text = "\n\n".join(block.text for block in message.blocks if isinstance(block, TextBlock))
            role, parts = "user", [{"text": f"<system>\n{text}\n</system>"}] if text else []
        else:
            results = [block for block in message.blocks if isinstance(block, ToolResultBlock)]
            results.sort(key=lambda block: order[block.tool_use_id])
            role, parts = "user", [part for r in results for part in _gemini_result(r, names, adapter, modern)]
            rest = (block for block in message.blocks if not isinstance(block, ToolResultBlock))
            parts += [part for block in rest for part in gemini_parts(block, adapter)]
        if not parts:
            continue
        if contents and contents[-1]["role"] == role:
            contents[-1]["parts"] += parts
        else:
            contents.append({"role": role, "parts": parts})
    for content in contents:
        if content["role"] == "user":  # answers first, wherever a merge has put them
            content["parts"].sort(key=lambda part: "functionResponse" not in part)
        elif modern and (first := next((part for part in content["parts"] if "functionCall" in part), None)):
            first.setdefault("thoughtSignature", UNSIGNED_CALL)
    if not contents:
        raise _nothing_said()
    return contents


def _gemini_turn(message: MessageParam, adapter: Adapter, modern: bool) -> list[JSON]:
    parts: list[JSON] = []
    following: JSON = {}
    spoken = any(isinstance(block, TextBlock) and block.text for block in message.blocks)
    for block in message.blocks:
        match block:
            case ThinkingBlock(signature=signature, thinking=text):
                state = carried(signature, adapter.id)
                following = {k: v for k, v in _as_dict(state.get("next")).items() if k == "thoughtSignature"}
                own_tool = {"toolCall", "toolResponse"} & _as_dict(state.get("part")).keys()
                if isinstance(state.get("prev"), dict):
                    parts.append({"text": "", "thoughtSignature": state["prev"].get("thoughtSignature", "")})
                elif isinstance(state.get("thought"), dict):
                    shown = {"text": text, "thought": True} if adapter.id == "gemini" else {"text": ""}
                    parts.append(shown | {"thoughtSignature": state["thought"].get("thoughtSignature", "")})
                elif isinstance(state.get("part"), dict) and (adapter.id == "gemini" or not own_tool):
                    parts.append(state["part"])
                continue
            case TextBlock(text=text) if text:
                parts.append({"text": text} | following)
            case AudioBlock(transcript=str(text)) if text and not spoken:
                parts.append({"text": text})
            case ToolUseBlock():
                call: JSON = {"name": gemini_name(block.name), "args": block.input}
                if modern and not block.id.startswith(INVENTED_ID):
                    call["id"] = block.id
                parts.append({"functionCall": call} | following)
            case ImageBlock():
                parts += [part | following for part in gemini_parts(block, adapter)]
        following = {}
    return parts


def _gemini_result(block: ToolResultBlock, names: Mapping[str, str], adapter: Adapter, modern: bool) -> list[JSON]:
    inner = [part for b in block.blocks for part in gemini_parts(b, adapter)]
    text = "\n".join(part["text"] for part in inner if "text" in part)
    media = [part for part in inner if "text" not in part]
    answer: JSON = {
        "name": gemini_name(names[block.tool_use_id]),
        "response": {"error" if block.is_error else "output": text},
    }
    if modern and not block.tool_use_id.startswith(INVENTED_ID):
        answer["id"] = block.tool_use_id
    if modern and media and all("inlineData" in part for part in media):
        return [{"functionResponse": answer | {"parts": media}}]
    return [{"functionResponse": answer}, *media]


def gemini_parts(block: Block, adapter: Adapter) -> list[JSON]:
    match block:
        case ServerBlock(type="container_upload"):
            raise unsupported("container_upload", adapter.id, ["anthropic"], param="messages", block=block)
        case TextBlock(text=text):
            return [{"text": text}] if text else []
        case DocumentBlock(text=str(text)) | SearchResultBlock(text=text):
            return [{"text": text}]
        case (
            ImageBlock(source=source)
            | DocumentBlock(source=source)
            | AudioBlock(source=source)
            | VideoBlock(source=source)
        ):
            match source:
                case Base64Source(media_type=kind, data=data):
                    return [{"inlineData": {"mimeType": kind, "data": data}}]
                case URLSource(url=uri) | FileSource(file_id=uri):
                    return [
                        {"fileData": {"fileUri": uri, **_typed(_media_type(block.type, uri))}},
                    ]
    return []


def _typed(kind: str | None) -> JSON:
    return {"mimeType": kind} if kind else {}


def _media_type(block: str, url: str) -> str | None:
    """Google wants a type beside a URL, except for YouTube's."""
    suffix = url.partition("?")[0].rpartition(".")[2].lower()
    known = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif",
             "pdf": "application/pdf", "mp4": "video/mp4", "webm": "video/webm", "mov": "video/mov"}  # fmt: skip
    return known.get(suffix) or {"image": "image/jpeg", "document": "application/pdf"}.get(block)


def gemini_usage(usage: Any) -> JSON:
    output = count(usage.get("candidatesTokenCount")) + count(usage.get("thoughtsTokenCount"))
    prompt = count(usage.get("promptTokenCount")) + count(usage.get("toolUsePromptTokenCount"))
    return make_usage(
        prompt, output, cached=usage.get("cachedContentTokenCount"), thinking=usage.get("thoughtsTokenCount")
    )


class GeminiDecoder(StreamDecoder):
    """Whole responses, one after the other; the last finish reason and usage count."""

    def __init__(self, adapter: Adapter, request: MessageRequest) -> None:
        super().__init__(adapter, request)
        self._finish = self._data = ""
        self._blocked = False
        self._usable = False
        self._usage: JSON = make_usage()
        self._text = ""
        self._grounding: JSON = {}
        self._last_id = ""
        self._late: JSON | None = None  # a signature that came after its text: citations of the text come later still
        self._chunks = self._text_chunk = 0
        self._call: _PartialCall | None = None
        self._names = {gemini_name(tool.name): tool.name for tool in request.functions}

    @property
    def ending(self) -> bool:
        return bool(self._finish)

    def read(self, sse: SSE) -> list[StreamEvent]:
        """Each `data` line is a whole response, also where the blank lines between them are missing.

        There is no terminal event; after a finish reason, what is no further response does not spoil the answer.
        """
        if self._finish and sse.data == self._data:
            return []
        self._data = sse.data
        try:
            chunks = [loads(sse.data)]
        except ValueError:
            try:
                chunks = [loads(line) for line in sse.data.split("\n")]
            except ValueError:
                if self._finish:
                    return []
                raise
        return [event for chunk in chunks for event in self.chunk(chunk)]

    def chunk(self, chunk: Any) -> list[StreamEvent]:
        if isinstance(chunk, list):
            return [event for item in chunk for event in self.chunk(item)]
        trace = chunk.get("traceId")
        if "response" in chunk and not chunk.get("error"):  # Code Assist's envelope
            chunk = chunk["response"] or {}
        if chunk.get("error"):
            if self._finish:
                return []
            raise stream_error(self.provider, chunk["error"])
        self._chunks += 1
        feedback, candidates = chunk.get("promptFeedback") or {}, chunk.get("candidates") or ()
        self._blocked = self._blocked or bool(feedback.get("blockReason"))
        if usage := chunk.get("usageMetadata"):
            self._usage = gemini_usage(_as_dict(usage))
        events: list[StreamEvent] = []
        if candidates or self._blocked:
            events = self.build.start(
                chunk.get("responseId") or trace, chunk.get("modelVersion") or self.request.model_name
            )
        for candidate in candidates[:1]:
            for part in (candidate.get("content") or {}).get("parts") or ():
                events += self._part(part)
            self._finish = candidate.get("finishReason") or self._finish
            if found := candidate.get("groundingMetadata"):
                self._grounding |= found
            for cited in (candidate.get("citationMetadata") or {}).get("citationSources") or ():
                span = {"start_index": cited.get("startIndex", 0), "end_index": cited.get("endIndex")}
                events += self.build.citation(url_citation(cited.get("uri"), cited.get("title"), **span))
        return events

    def end(self) -> list[StreamEvent]:
        reason = "refusal" if self._blocked else GEMINI_STOP_REASONS.get(self._finish)
        if not self._finish and not self._blocked:
            raise StreamTruncated(provider=self.provider)
        events = self._end_call()
        if reason is None:
            if not self._usable:
                message = f"{self.provider} gave no answer: {_printable(self._finish, 60)}"
                raise ProviderError(message, provider=self.provider, code=_printable(self._finish, 60))
            reason = "end_turn"
        return [
            *events,
            *self._citations(),
            *self._end_text(),
            *self._searched(),
            *self.build.finish(reason, self._usage),
        ]

    def _part(self, part: JSON) -> list[StreamEvent]:
        signed = {"thoughtSignature": part["thoughtSignature"]} if part.get("thoughtSignature") else None
        before = self._end_text()
        if call := part.get("functionCall"):
            return before + self._function_call(call, signed)
        if part.get("thought"):
            events = before + self.build.thinking(part.get("text") or "")
            return events + self.build.state({"thought": signed}) if signed else events
        if "text" in part or part.keys() == {"thoughtSignature"}:
            return before + self._spoken(part.get("text") or "", signed)
        if media := part.get("inlineData") or part.get("fileData"):
            self._usable = True
            kind = "audio" if str(media.get("mimeType")).startswith("audio/") else "image"
            source = {"type": "base64", "media_type": media.get("mimeType"), "data": media.get("data")}
            if "fileUri" in media:
                source = {"type": "url", "url": media["fileUri"]}
            spoken = {"transcript": ""} if kind == "audio" else {}
            return before + self._before(signed) + self.build.whole({"type": kind, "source": source} | spoken)
        return before + self._native(part)

    def _before(self, signed: JSON | None) -> list[StreamEvent]:
        return self.build.state({"next": signed}) if signed else []

    def _end_text(self) -> list[StreamEvent]:
        """What came after the text and belongs to it."""
        late, self._late = self._late, None
        return self.build.state({"prev": late}) if late else []

    def _spoken(self, text: str, signed: JSON | None) -> list[StreamEvent]:
        """Text. A signature on a part of its own stands before it; one that ends a text that came in pieces, after."""
        events: list[StreamEvent] = []
        apart = bool(text and signed) and self._text_chunk == self._chunks  # beside an unsigned part, not the end of it
        if not self.build.is_open("text") or apart:
            self._text = ""
            if text:
                events, signed = self._before(signed), None
        self._late, self._text, self._text_chunk = signed, self._text + text, self._chunks
        self._usable = self._usable or bool(text)
        return events + self.build.text(text)

    def _function_call(self, call: JSON, signed: JSON | None) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        self._usable = True
        if call.get("name") is not None:
            name = str(self._names.get(call["name"], call["name"]))
            events = self._end_call() + self._before(signed)
            if not call.get("willContinue"):
                return events + self.build.tool_use(
                    object(), call.get("id"), name, dumps(call.get("args") or {}).decode("ascii")
                )
            self._call = _PartialCall(call.get("id"), name, dict(call.get("args") or {}))
        if self._call:
            for piece in call.get("partialArgs") or ():
                self._call.add(piece)
            if not call.get("willContinue"):
                events += self._end_call()
        return events

    def _end_call(self) -> list[StreamEvent]:
        call, self._call = self._call, None
        return self.build.tool_use(object(), call.id, call.name, dumps(call.args).decode("ascii")) if call else []

    def _native(self, part: JSON) -> list[StreamEvent]:
        """Code and tools that Google ran: the part itself for the next turn, and blocks to read."""
        if code := part.get("executableCode"):
            self._last_id = f"srvgem_{secrets.token_hex(10)}"
            given = {"code": code.get("code") or "", "language": str(code.get("language") or "").lower()}
            block: JSON = {"type": "server_tool_use", "id": self._last_id, "name": "code_execution", "input": given}
        elif (result := part.get("codeExecutionResult")) is not None:
            good = result.get("outcome") == "OUTCOME_OK"
            output = result.get("output") or ""
            content = execution_result(output if good else "", "" if good else output)
            block = {"type": "code_execution_tool_result", "tool_use_id": self._last_id, "content": content}
        elif call := part.get("toolCall"):
            self._last_id = f"srvgem_{secrets.token_hex(10)}"
            name = str(call.get("toolType") or "tool").lower()
            block = {"type": "server_tool_use", "id": self._last_id, "name": name, "input": call.get("args") or {}}
        elif (answer := part.get("toolResponse")) is not None:
            name = str(answer.get("toolType") or "tool").lower()
            block = {"type": f"{name}_tool_result", "tool_use_id": self._last_id, "content": answer.get("response")}
        else:
            return []
        return self.build.state({"part": part}) + self.build.whole(block)

    def _sources(self) -> list[JSON]:
        chunks = (_as_dict(chunk) for chunk in self._grounding.get("groundingChunks") or ())
        return [_as_dict(chunk.get("web") or chunk.get("retrievedContext") or chunk.get("maps")) for chunk in chunks]

    def _citations(self) -> list[StreamEvent]:
        """Google Search's sources, as citations on the text."""
        sources, events = self._sources(), list[StreamEvent]()
        raw = self._text.encode("utf-8", "replace")
        for support in self._grounding.get("groundingSupports") or () if self.build.is_open("text") else ():
            segment = _as_dict(_as_dict(support).get("segment"))
            ends = (count(segment.get(key)) for key in ("startIndex", "endIndex"))  # in bytes
            start, end = (len(raw[:end].decode("utf-8", "ignore")) for end in ends)
            for number in _as_dict(support).get("groundingChunkIndices") or ():
                if 0 <= number < len(sources):
                    web = sources[number]
                    cited = url_citation(web.get("uri"), web.get("title"), start_index=start, end_index=end)
                    events += self.build.citation(cited)
        return events

    def _searched(self) -> list[StreamEvent]:
        """The search itself, as blocks to read."""
        queries, sources = self._grounding.get("webSearchQueries") or [], self._sources()
        if not queries and not sources:
            return []
        id = f"srvgem_{secrets.token_hex(10)}"
        shown = _as_dict(self._grounding.get("searchEntryPoint")).get("renderedContent")
        entry = {"search_entry_point": shown} if shown else {}  # Google's terms want it displayed
        found = [web_result(source.get("uri"), source.get("title")) for source in sources]
        asked = {"type": "server_tool_use", "id": id, "name": "web_search", "input": {"queries": queries}}
        result = {"type": "web_search_tool_result", "tool_use_id": id, "content": found} | entry
        return self.build.whole(asked) + self.build.whole(result)


@dataclass(slots=True)
class _PartialCall:
    """A function call whose arguments come in pieces, each with a JSONPath: `$.city`, `$.days[0].name`."""

    id: Any
    name: str
    args: JSON

    def add(self, piece: JSON) -> None:
        steps = [int(n) if n else name for name, n in re.findall(r"\.([^.\[\]]+)|\[(\d{1,6})\]", piece["jsonPath"])]
        if not steps or any(isinstance(step, int) and step > 10_000 for step in steps):
            raise ValueError("a path to nowhere")
        value = next((piece[key] for key in ("stringValue", "numberValue", "boolValue") if key in piece), None)
        here: Any = self.args
        for step, after in itertools.pairwise(steps):
            here = _slot(here, step, [] if isinstance(after, int) else {})
        old = _slot(here, steps[-1], None)
        here[steps[-1]] = old + value if isinstance(old, str) and isinstance(value, str) else value


def _slot(container: Any, step: str | int, fresh: Any) -> Any:
    """What stands at a step, put there if nothing does."""
    if isinstance(step, int):
        container.extend([None] * (step + 1 - len(container)))
    elif step not in container:
        container[step] = None
    if container[step] is None:
        container[step] = fresh
    return container[step]


# == Registry ==========================================================================================================


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PROVIDERS: dict[str, Adapter] = {
    adapter.id: adapter
    for adapter in (
        Anthropic(
            id="anthropic",
            name="Anthropic",
            base_url="https://api.anthropic.com",
            key_env=("ANTHROPIC_API_KEY",),
            url_env=("VAI_ANTHROPIC_BASE_URL",),
            byok=("anthropic",),
            capabilities=_words(
                "vision documents tools tool_streaming thinking structured_output stop_sequences prompt_caching"
            ),
            native_tools=tuple(ANTHROPIC_NATIVE),
            sampling=("temperature", "top_p", "top_k"),
            max_stops=64,
        ),
        Chat(
            id="openai",
            name="OpenAI",
            base_url="https://api.openai.com/v1",
            key_env=("OPENAI_API_KEY",),
            url_env=("VAI_OPENAI_BASE_URL",),
            byok=("openai",),
            capabilities=_words(
                "vision audio_input audio_output documents tools tool_streaming thinking structured_output "
                "stop_sequences prompt_caching"
            ),
            audio=True,
            pdf=True,
        ),
        Responses(
            id="oai-resp",
            name="OpenAI Responses",
            base_url="https://api.openai.com/v1",
            key_env=("OPENAI_API_KEY",),
            url_env=("VAI_OAI_RESP_BASE_URL", "VAI_OPENAI_BASE_URL"),
            byok=("oai-resp", "openai"),
            capabilities=_words(
                "vision documents tools tool_streaming thinking structured_output image_output stop_sequences "
                "prompt_caching"
            ),
            native_tools=tuple(RESPONSES_NATIVE),
            max_stops=0,
        ),
        Groq(
            id="groq",
            name="Groq",
            base_url="https://api.groq.com/openai/v1",
            key_env=("GROQ_API_KEY",),
            url_env=("VAI_GROQ_BASE_URL",),
            byok=("groq",),
            capabilities=_words("vision tools thinking structured_output stop_sequences prompt_caching"),
            native_tools=("web_search", "code_execution"),
            user_field="user",
            usage_option=False,
            reasoning_back=True,
        ),
        Gemini(
            id="gemini",
            name="Gemini",
            base_url="https://generativelanguage.googleapis.com/v1beta",
            key_env=("GEMINI_API_KEY", "GOOGLE_API_KEY"),
            url_env=("VAI_GEMINI_BASE_URL",),
            byok=("gemini", "google"),
            capabilities=_words(
                "vision audio_input audio_output video documents tools thinking structured_output image_output "
                "stop_sequences prompt_caching"
            ),
            native_tools=("web_search", "code_execution", "file_search", "computer_use"),
            sampling=("temperature", "top_p", "top_k"),
            max_stops=5,
        ),
        GeminiOAuth(
            id="gemini-oauth",
            name="Gemini (Code Assist)",
            base_url="https://cloudcode-pa.googleapis.com/v1internal",
            key_env=(),
            url_env=("VAI_GEMINI_OAUTH_BASE_URL",),
            byok=("gemini-oauth",),
            capabilities=_words(
                "vision audio_input video documents tools thinking structured_output image_output stop_sequences "
                "prompt_caching"
            ),
            native_tools=("web_search", "code_execution"),
            sampling=("temperature", "top_p", "top_k"),
            max_stops=5,
            server_tools_beside_functions=False,
        ),
        Cerebras(
            id="cerebras",
            name="Cerebras",
            base_url="https://api.cerebras.ai/v1",
            key_env=("CEREBRAS_API_KEY",),
            url_env=("VAI_CEREBRAS_BASE_URL",),
            byok=("cerebras",),
            capabilities=_words("vision tools thinking structured_output stop_sequences prompt_caching"),
            user_field="user",
            image_urls=False,
            reasoning_back=True,
        ),
    )
}


# == Transport =========================================================================================================


CODINGS = ("identity", "gzip", "x-gzip", "deflate")  # of bodies; no other was asked for


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to connect, to the first byte of the answer, between its bytes, and for all of it."""

    connect: float = 10
    first_byte: float = 120
    idle: float = 120
    total: float = 600


class Transport:
    """The one place that opens a socket. Sends an `HTTPRequest`; what goes wrong is an `Error` of this module.

    Follows no redirect (aiohttp would carry `x-api-key` along), shares no cookie, and gives no pooled connection out
    on which something arrived while it was idle (its next answer would be somebody else's). Each event loop has its own
    connections; those of a loop that has ended go with it.
    """

    def __init__(self, timeouts: Timeouts | None = None) -> None:
        self.timeouts = timeouts or Timeouts()
        self._lines = PerLoop(functools.partial(Lines, self.timeouts.connect))

    def bind(self) -> None:
        """Until it is closed, only the running loop will use this: to look it up each time takes a system call."""
        self._lines.bind()

    async def send(
        self,
        request: HTTPRequest,
        provider: str,
        *,
        deadline: float | None = None,
        again: Callable[[], object] = lambda: None,
    ) -> Upstream:
        """The answer's head; its body is still to be read. A connection that never stood is tried once more.

        All has to be there by `deadline` (of `time.monotonic`). `again` is called before the second try.
        Raises `ProviderTimeoutError`, or `ProviderError` with code `connection_failed`, `connection_broken`, `tls` or
        `redirect`.
        """
        import aiohttp

        lines, now = self._lines.here(), time.monotonic()
        if deadline is None:
            deadline = now + self.timeouts.total
        for attempt in (1, 2):
            try:
                response = await lines.ask(request, min(now + self.timeouts.first_byte, deadline))
                break
            except (aiohttp.ClientError, OSError, ValueError) as raised:
                fault = connection_error(raised, provider)
                if fault.code != "connection_failed" or attempt == 2:
                    raise fault from None
                again()
        upstream = Upstream(response, provider, self.timeouts.idle, deadline)
        if 300 <= response.status < 400:
            upstream.abort()
            raise redirected(provider)
        coding = response.headers.get("Content-Encoding") or "identity"
        if response.status == 200 and coding.strip().lower() not in CODINGS:
            upstream.abort()
            raise unreadable(provider)
        return upstream

    async def close(self) -> None:
        """Hang up on whatever is in progress; nothing can be sent after."""
        await self._lines.close()


def connection_error(raised: Exception, provider: str) -> Error:
    """What an exception of aiohttp's says of a connection, and nothing of what it quotes."""
    import aiohttp

    match raised:
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientConnectorSSLError():
            return ProviderError(f"{provider}'s TLS certificate does not hold", provider=provider, code="tls")
        case TimeoutError():
            return ProviderTimeoutError(f"{provider} did not answer in time", provider=provider)
        case aiohttp.ClientConnectorError():
            return ProviderError(f"cannot connect to {provider}", provider=provider, code="connection_failed")
        case _:
            return ProviderError(f"{provider} broke the connection", provider=provider, code="connection_broken")


def redirected(provider: str) -> Error:
    message = f"{provider} answered with a redirect, which vai does not follow"
    return ProviderError(message, provider=provider, code="redirect")


class Closable(Protocol):
    async def close(self) -> None: ...


C = TypeVar("C", bound=Closable)


class PerLoop(Generic[C]):
    """What each event loop needs one of its own of, such as connections. Those of a loop that has ended go with it."""

    def __init__(self, open: Callable[[], C]) -> None:
        self._open = open
        self._closed = False
        self._known: dict[asyncio.AbstractEventLoop, C] = {}
        self._only: C | None = None  # if it is of one loop alone
        _PER_LOOP.add(self)

    def __len__(self) -> int:
        return len(self._known)

    def bind(self) -> None:
        """Until it is closed, only the running loop will use this."""
        here = self.here()
        self._only = here if len(self._known) == 1 else None

    def here(self) -> C:
        """The running loop's."""
        if self._only is not None:
            return self._only
        if self._closed:
            raise RuntimeError("the client is closed")
        loop = asyncio.get_running_loop()
        if (found := self._known.get(loop)) is None:
            for ended in [known for known in self._known if known.is_closed()]:
                _close_ended(self._known.pop(ended))
            found = self._known[loop] = self._open()
        return found

    async def close(self) -> None:
        """Close those of all loops; there will be no more."""
        self._closed, self._only = True, None
        here = asyncio.get_running_loop()
        while self._known:
            loop, one = self._known.popitem()
            if loop is here:
                await one.close()
            elif loop.is_closed():
                _close_ended(one)
            elif loop.is_running():  # on another thread
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_closing(one), loop))
            else:
                await asyncio.to_thread(loop.run_until_complete, _closing(one))


async def _closing(one: Closable) -> None:
    await one.close()


def _close_ended(one: Closable) -> None:
    """Close what was of a loop that has ended: there is nothing to wait for."""
    with contextlib.suppress(StopIteration):
        _closing(one).send(None)


_PER_LOOP: weakref.WeakSet[PerLoop[Any]] = weakref.WeakSet()


def keep_for_ever(thing: object) -> None:
    """Never let it go, not even at the interpreter's end."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _forked() -> None:
    """The child of a fork opens connections of its own. Its parent's are not closed here, not by the collector either:
    that would take them out of the epoll that both share, and the parent would hear nothing on them any more."""
    for each in list(_PER_LOOP):
        keep_for_ever(each._known)
        each._known, each._only = {}, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _url(text: str) -> yarl.URL:
    """The address as it was built: nothing in it is quoted or resolved once more."""
    import yarl

    return yarl.URL(text, encoded=True)


SMALL = 32 << 10  # bytes of a body that a socket takes in one write


class Lines:
    """One event loop's connections to providers: aiohttp's pool and parser, and for most requests no more of it."""

    def __init__(self, connect: float) -> None:
        import aiohttp

        handler = _handler()
        self._loop = asyncio.get_running_loop()
        self._limit = aiohttp.ClientTimeout(total=None, connect=connect)
        self._connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=15)
        factory: Any = functools.partial(handler, loop=self._loop)
        self._connector._factory = factory
        self._line_size = 32 << 10  # of a line of the head
        self.session = aiohttp.ClientSession(
            connector=self._connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._limit,
            headers={"User-Agent": f"vai/{__version__}", "Accept-Encoding": "gzip, deflate"},
            max_line_size=self._line_size,
            max_field_size=self._line_size,
        )
        self._posted = functools.lru_cache(256)(self._post)

    async def close(self) -> None:
        await self.session.close()

    async def ask(self, request: HTTPRequest, until: float) -> Answer | aiohttp.ClientResponse:
        """The head of the answer. Raises `TimeoutError` when it is not there by `until`, and what aiohttp raises."""
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if request.method == "POST" and len(request.body) <= SMALL:
            return await self._ask(request, until, left)
        async with asyncio.timeout(left):
            return await self.session.request(
                request.method,
                _url(request.url),
                data=io.BytesIO(request.body) if len(request.body) > 1 << 20 else request.body,
                headers=request.headers,
                allow_redirects=False,
            )

    async def _ask(self, request: HTTPRequest, until: float, left: float) -> Answer:
        """What `ClientSession.request` does for a small POST, without what it does for others: no task that writes,
        no timer for each request, nothing for cookies, redirects and proxies."""
        from aiohttp import ClientTimeout
        from aiohttp.http import HttpProcessingError, StreamWriter

        post = self._posted(request.url)
        headers = post.headers.copy()
        headers.update(request.headers)
        headers["Content-Length"] = str(len(request.body))
        limit = self._limit
        if left < (limit.connect or math.inf):
            limit = ClientTimeout(connect=left, ceil_threshold=math.inf)
        connection = await self._connector.connect(post, [], limit)
        protocol: Any = connection.protocol
        watchdog: Watchdog = protocol.watchdog
        try:
            protocol.set_response_params(
                read_until_eof=True, max_line_size=self._line_size, max_field_size=self._line_size
            )
            writer = StreamWriter(protocol, self._loop)
            await writer.write_headers(f"POST {post.url.raw_path_qs} HTTP/1.1", headers)
            await writer.write_eof(request.body)
            watchdog.start(until)
            message, content = await protocol.read()
            while message.code < 200 and message.code != 101:
                message, content = await protocol.read()
        except HttpProcessingError:
            connection.close()
            raise ValueError("no HTTP") from None
        except BaseException:
            connection.close()
            raise
        finally:
            watchdog.stop()
        return Answer(message.code, message.headers, content, connection)

    def _post(self, url: str) -> aiohttp.ClientRequest:
        """What all POST requests to an address have in common: where it is, and their headers."""
        from aiohttp import ClientRequest

        return ClientRequest("POST", _url(url), headers=self.session.headers, loop=self._loop, session=self.session)


class Answer:
    """A head and a body on its way in; the connection goes back into the pool when all of it is here."""

    __slots__ = ("_connection", "content", "headers", "status")

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        content: aiohttp.StreamReader,
        connection: aiohttp.connector.Connection,
    ) -> None:
        self.status = status
        self.headers = headers
        self.content = content
        self._connection = connection
        content.on_eof(connection.release)

    def close(self) -> None:
        if self._connection.protocol is not None and self.content.exception() is None:
            self.content.set_exception(ConnectionError("closed here"))
        self._connection.close()


@functools.cache
def _handler() -> type[ResponseHandler]:
    import aiohttp
    from aiohttp.client_proto import ResponseHandler

    class Handler(ResponseHandler):
        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            super().__init__(loop)
            self.watchdog: Watchdog | None = Watchdog(self._expired)  # while a head is waited for

        def is_connected(self) -> bool:
            return super().is_connected() and not self.should_close

        def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
            """A broken chunk in mid-body would otherwise leave its reader waiting for more."""
            super().set_exception(exc, *cause)
            if self._payload is not None and not self._payload.is_eof() and self._payload.exception() is None:
                self._payload.set_exception(aiohttp.ClientPayloadError("the body is malformed"))

        def connection_lost(self, exc: BaseException | None) -> None:
            if self.watchdog:
                self.watchdog.close()
                self.watchdog = None  # the two know each other
            super().connection_lost(exc)

        def _expired(self) -> None:
            self.set_exception(TimeoutError())

    return Handler


class Watchdog:
    """A time limit on many waits, one after another: `start(until)`, `stop()`. Calls `expired` if a wait is too long.

    Its timer is left alone while waits come and go, and set anew only when it rings: a wait costs no timer. The clock
    is not the loop's, which may take a system call to read.
    """

    __slots__ = ("_clock", "_expired", "_loop", "_rings", "_timer", "_until")

    def __init__(self, expired: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._expired = expired
        self._until = math.inf
        self._rings = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def start(self, until: float) -> None:
        """A wait begins, that is to end before the clock says `until`."""
        self._until = until
        if until < self._rings:
            self.close()
            self._rings, self._timer = until, self._loop.call_later(until - self._clock(), self._ring)

    def stop(self) -> None:
        self._until = math.inf

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings, self._timer = math.inf, None

    def _ring(self) -> None:
        until, self._rings, self._timer = self._until, math.inf, None
        if until <= self._clock():
            self._expired()
        else:
            self.start(until)


class Upstream:
    """An answer on its way in. Used as a context manager it lets go of its connection however it ends."""

    def __init__(self, response: Answer | aiohttp.ClientResponse, provider: str, idle: float, deadline: float) -> None:
        self._response = response
        self._provider = provider
        self._idle = idle
        self._deadline = deadline
        self._watchdog: Watchdog | None = None  # of an answer that has to be waited for
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def __aenter__(self) -> Upstream:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.abort()

    async def chunk(self, patience: float | None = None) -> bytes:
        """What has come since; empty at the end. `patience` shortens the wait.

        aiohttp's own read timeout does not see a broken chunk size in mid-body, so the clock runs around the read.
        """
        content = self._response.content
        try:
            if (data := content.read_nowait()) or content.at_eof():
                return data
            wait = self._idle if patience is None else patience
            watchdog = self._watchdog = self._watchdog or Watchdog(lambda: content.set_exception(TimeoutError()))
            watchdog.start(min(time.monotonic() + wait, self._deadline))
            try:
                return await content.readany()
            finally:
                watchdog.stop()
        except TimeoutError:
            raise ProviderTimeoutError(f"{self._provider} fell silent in mid-answer", provider=self._provider) from None
        except _broken():
            raise ProviderError(
                f"{self._provider} broke the connection in mid-answer",
                provider=self._provider,
                code="connection_broken",
            ) from None

    async def read(self, limit: int = 64 << 20) -> bytes:
        """The whole body. Raises `ProviderError` (`answer_too_large`) over `limit` bytes."""
        parts, size = [], 0
        while part := await self.chunk():
            parts.append(part)
            size += len(part)
            if size > limit:
                raise ProviderError(
                    f"{self._provider} sent over {limit} bytes", provider=self._provider, code="answer_too_large"
                )
        return b"".join(parts)

    async def read_some(self, limit: int = 64 << 10) -> bytes:
        """The beginning of an error's body; the rest is not worth waiting for."""
        body, clock = b"", time.monotonic
        until = clock() + min(5, self._idle)
        with contextlib.suppress(Error):
            while len(body) < limit and (part := await self.chunk(until - clock())):
                body += part
        return body[:limit]

    async def drain(self) -> None:
        """After the terminal event: the connection can be used again if the body ends now, else it is closed."""
        with contextlib.suppress(Error):
            for _ in range(8):
                if not await self.chunk(0.25):
                    return

    def abort(self) -> None:
        """Let go: closed at once, unless the whole body was read and the connection is back in the pool."""
        if self._watchdog is not None:
            self._watchdog.close()
        self._response.close()


@functools.cache
def _broken() -> tuple[type[Exception], ...]:
    """What aiohttp raises while a body is read."""
    import aiohttp

    return aiohttp.ClientError, OSError, ValueError, RuntimeError


# == Google's OAuth ====================================================================================================

GOOGLE_TOKEN_URL = "https://oauth2.googleapis.com/token"  # noqa: S105  (an address, no password)


GOOGLE_AUTHORIZE_URL = "https://accounts.google.com/o/oauth2/v2/auth"
GOOGLE_SCOPES = " ".join(
    f"https://www.googleapis.com/auth/{name}" for name in ("cloud-platform", "userinfo.email", "userinfo.profile")
)


def token_request(url: str, **form: str) -> HTTPRequest:
    """POST to the token endpoint, form-encoded."""
    body = urlencode(form).encode("ascii")
    return HTTPRequest(url, {"Content-Type": "application/x-www-form-urlencoded"}, body)


@dataclass(slots=True)
class GoogleLogin:
    """The credentials file of gemini-oauth: `access_token`, `refresh_token`, `expiry_date` (ms), `project_id`.

    Refreshed a minute before it expires, once for however many requests wait for it; written atomically, mode 0600.
    """

    path: Path
    client_id: Secret = field(default=Secret(), repr=False)
    client_secret: Secret = field(default=Secret(), repr=False)
    project: str | None = None
    token_url: str = GOOGLE_TOKEN_URL
    authorize_url: str = GOOGLE_AUTHORIZE_URL
    own: bool = True  # whether a refusal is for the caller to mend
    _saved: JSON | None = field(default=None, repr=False)
    _failure: tuple[float, Error] | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> GoogleLogin:
        home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".config")
        path = environ.get("GEMINI_OAUTH_CREDENTIALS_PATH") or os.path.join(home, "vai", "gemini-oauth.json")
        return cls(
            Path(path),
            Secret(environ.get("GEMINI_OAUTH_CLIENT_ID", "").strip()),
            Secret(environ.get("GEMINI_OAUTH_CLIENT_SECRET", "").strip()),
            environ.get("GEMINI_OAUTH_PROJECT_ID", "").strip() or None,
            environ.get("GEMINI_OAUTH_TOKEN_URL", "").strip() or GOOGLE_TOKEN_URL,
            environ.get("GEMINI_OAUTH_AUTHORIZE_URL", "").strip() or GOOGLE_AUTHORIZE_URL,
        )

    @property
    def configured(self) -> bool:
        return self.path.is_file()

    async def credential(self, transport: Transport, base_url: str, *, refused: str | None = None) -> Credential:
        """A token that is good for now; `refused` names one that the provider has just turned down."""
        async with self._lock:
            saved = self._saved = self._saved or self._load()
            if self._stale(saved, refused):
                saved = await self._renewed(transport, refused)
            token = saved.get("access_token")
            credential = Credential(Secret(token), own=self.own, renewable=True)
            project = self.project or saved.get("project_id")
            if not project:
                try:
                    project = await self._discover(transport, base_url, credential)
                except Error as fault:
                    if refused or not fault.about_key:
                        raise
                    saved = await self._renewed(transport, token)
                    credential = Credential(Secret(saved["access_token"]), own=self.own, renewable=True)
                    project = await self._discover(transport, base_url, credential)
                await self._save({**saved, "project_id": project})
            return dataclasses.replace(credential, project=project)

    @staticmethod
    def _stale(saved: JSON, refused: str | None) -> bool:
        expired = count(saved.get("expiry_date")) / 1000 < time.time() + 60
        return expired or not saved.get("access_token") or saved["access_token"] == refused

    async def _renewed(self, transport: Transport, refused: str | None) -> JSON:
        """A fresh token: of a login since, else refreshed. A failure holds for a moment, for all who wait behind it."""
        saved = self._saved = self._load()
        if not self._stale(saved, refused):
            return saved
        if self._failure and time.monotonic() - self._failure[0] < 5:
            raise self._failure[1]
        try:
            return await self._refresh(transport, saved)
        except Error as fault:
            self._failure = (time.monotonic(), fault)
            raise

    def _load(self) -> JSON:
        try:
            saved = loads(self.path.read_bytes())
        except FileNotFoundError:
            raise AuthenticationError(
                "no credentials for gemini-oauth: run `vai login gemini-oauth`", provider="gemini-oauth"
            ) from None
        except (OSError, ValueError):
            raise AuthenticationError(
                "the credentials file of gemini-oauth is unreadable", provider="gemini-oauth"
            ) from None
        saved = {name: Secret(value) if isinstance(value, str) else value for name, value in _as_dict(saved).items()}
        if not isinstance(saved.get("access_token") or saved.get("refresh_token"), str):
            raise AuthenticationError("the credentials file of gemini-oauth holds no token", provider="gemini-oauth")
        return saved

    async def _refresh(self, transport: Transport, saved: JSON) -> JSON:
        form = {
            "grant_type": "refresh_token",
            "refresh_token": Secret(saved.get("refresh_token") or ""),
            "client_id": Secret(self.client_id or saved.get("client_id") or ""),
            "client_secret": Secret(self.client_secret or saved.get("client_secret") or ""),
        }
        fresh = saved | await self._token(transport, form)
        await self._save(fresh)
        return fresh

    async def _token(self, transport: Transport, form: Mapping[str, str]) -> JSON:
        """What the token endpoint grants, in the words of the credentials file."""
        request = token_request(self.token_url, **form)
        async with await transport.send(request, "gemini-oauth") as upstream:
            answer = _granted(await upstream.read(1 << 20)) if upstream.status == 200 else None
            if answer is not None:
                return answer
            refused = upstream.status in (200, 400, 401, 403)
            fault = self._refusal(upstream, await upstream.read_some(), form.values(), 401 if refused else None)
        if refused:
            fault.message += "; log in again: `vai login gemini-oauth`"
            fault.args = (fault.message,)
        raise fault

    def _refusal(self, upstream: Upstream, body: bytes, keys: Iterable[str], status: int | None = None) -> Error:
        keys = [key for key in keys if key]
        status = status or upstream.status
        return provider_error("gemini-oauth", status, upstream.headers, body, keys=keys, own_key=self.own)

    # -- logging in: PKCE (RFC 7636) with a redirect to this machine -------------------------------------------------

    def consent_url(self, redirect_uri: str, state: str, verifier: str) -> str:
        """Where a person says yes."""
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode("ascii")).digest()).decode().rstrip("=")
        query = {
            "client_id": self.client_id,
            "redirect_uri": redirect_uri,
            "response_type": "code",
            "scope": GOOGLE_SCOPES,
            "state": state,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
            "access_type": "offline",
            "prompt": "consent",
        }
        return f"{self.authorize_url}?{urlencode(query)}"

    async def log_in(self, transport: Transport, base_url: str, code: str, redirect_uri: str, verifier: str) -> None:
        """Turn the code of the redirect into a credentials file, with the project if it can be found out."""
        form = {
            "grant_type": "authorization_code",
            "code": Secret(code),
            "redirect_uri": redirect_uri,
            "code_verifier": verifier,
            "client_id": self.client_id,
            "client_secret": self.client_secret,
        }
        saved = await self._token(transport, form)
        await asyncio.to_thread(write_private, self.path, json.dumps(saved, indent=2))
        self._saved = saved
        await self.credential(transport, base_url)

    async def _save(self, saved: JSON) -> None:
        self._saved = saved
        try:
            await asyncio.to_thread(write_private, self.path, json.dumps(saved, indent=2))
        except OSError as fault:
            logger.warning("cannot write the credentials of gemini-oauth: %s", fault.strerror)

    async def _discover(self, transport: Transport, base_url: str, credential: Credential) -> str:
        """Ask Code Assist for the project, as its own command line does (gemini-cli, code_assist/setup.ts)."""
        metadata = {"ideType": "IDE_UNSPECIFIED", "platform": "PLATFORM_UNSPECIFIED", "pluginType": "GEMINI"}
        answer = await self._ask(transport, credential, f"{base_url}:loadCodeAssist", {"metadata": metadata})
        project = answer.get("cloudaicompanionProject")
        if isinstance(project, str) and project and not project.isdigit():  # a number would be refused
            return project
        if not answer.get("currentTier"):
            tiers = [tier for tier in _as_list(answer.get("allowedTiers")) if isinstance(tier, dict)]
            tier = next((tier.get("id") for tier in tiers if tier.get("isDefault")), "legacy-tier")
            if tier != "free-tier":  # every other wants a project of the user's own
                raise self._without_project(answer)
            operation = await self._ask(
                transport, credential, f"{base_url}:onboardUser", {"tierId": tier, "metadata": metadata}
            )
            for _ in range(24):
                if operation.get("done"):
                    break
                await asyncio.sleep(5)
                operation = await self._ask(transport, credential, f"{base_url}/{operation.get('name')}", None)
            found = _as_dict(_as_dict(operation.get("response")).get("cloudaicompanionProject")).get("id")
            if isinstance(found, str) and found:
                return found
        raise self._without_project(answer)

    @staticmethod
    def _without_project(answer: JSON) -> Error:
        tiers = [tier for tier in _as_list(answer.get("ineligibleTiers")) if isinstance(tier, dict)]
        message = "Code Assist names no project: set GEMINI_OAUTH_PROJECT_ID"
        message += f" ({_printable(str(tiers[0].get('reasonMessage')), 300)})" if tiers else ""
        return PermissionDeniedError(message, provider="gemini-oauth")

    async def _ask(self, transport: Transport, credential: Credential, url: str, body: JSON | None) -> JSON:
        headers = {"Authorization": bearer(credential.key), "Content-Type": "application/json"}
        request = HTTPRequest(url, headers, dumps(body) if body is not None else b"", "GET" if body is None else "POST")
        async with await transport.send(request, "gemini-oauth") as upstream:
            if upstream.status != 200:
                raise self._refusal(upstream, await upstream.read_some(), [credential.key])
            answer = await upstream.read(1 << 20)
        with _readable("gemini-oauth"):
            return dict(loads(answer))


def _granted(body: bytes) -> JSON | None:
    """A token endpoint's answer in the words of the credentials file; None if it grants nothing."""
    try:
        answer = _as_dict(loads(body))
        expiry = int((time.time() + float(answer.get("expires_in", 3600))) * 1000)
    except (ValueError, TypeError, OverflowError):
        return None
    kept = ("access_token", "refresh_token", "scope", "token_type")
    found = {name: Secret(answer[name]) for name in kept if isinstance(answer.get(name), str) and answer[name]}
    return {**found, "expiry_date": expiry} if "access_token" in found else None


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
