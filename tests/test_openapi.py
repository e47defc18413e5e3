"""`/openapi.json` is true: what may be asked is answered as it says, and every answer that it names has its shape."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import (
    JSON,
    MODELS,
    PROVIDERS,
    Answer,
    Listen,
    Serve,
    Served,
    body_of,
    canned,
    http_answer,
    post_bytes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import server
from sandbox import Sandbox

JSON_TYPE = {"Content-Type": "application/json"}
SIX = "[say one two three four five six]"


# == Reading the document ==============================================================================================


class Document:
    """An OpenAPI document, as one who checks answers by it reads it."""

    def __init__(self, document: JSON) -> None:
        self.raw = document
        self.schemas: JSON = document["components"]["schemas"]
        self._validators: dict[str, Draft202012Validator] = {}

    def check(self, method: str, path: str, answer: Answer) -> None:
        """The answer's status is one that is listed; its type, its body and its headers are what is written there."""
        response = self.raw["paths"][path][method.lower()]["responses"][str(answer.status)]
        kind = answer.headers["Content-Type"].partition(";")[0]
        content = response["content"][kind]
        if kind == "application/json":
            self.valid(content["schema"], answer.body)
        elif kind == "text/event-stream":
            assert answer.events[-1]["type"] in ("message_stop", "error")
            for event in answer.events:
                self.valid(content["x-event-schema"], event)
        known = {name.lower() for name in self.raw["components"]["headers"]}
        assert {name.lower() for name in answer.headers} & known <= {name.lower() for name in response["headers"]}
        assert "X-Request-ID" in answer.headers

    def valid(self, schema: JSON, value: Any) -> None:
        key = json.dumps(schema)
        if key not in self._validators:
            self._validators[key] = Draft202012Validator(schema | {"components": self.raw["components"]})
        faults = list(self._validators[key].iter_errors(value))
        assert not faults, (faults[0].json_path, faults[0].message)


def refs(value: Any) -> Iterator[str]:
    """All `$ref`s in a document."""
    for name, item in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if name == "$ref":
            yield item
        else:
            yield from refs(item)


async def document_of(gateway: Served) -> Document:
    answer = await gateway.get("/openapi.json", key=None)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    return Document(answer.body)


async def test_the_document_holds_together(gateway: Served) -> None:
    """It has all routes and no other, every reference leads somewhere, every schema is one, and it needs no key."""
    document = (await document_of(gateway)).raw
    routes = {(route.method, route.resource.canonical) for route in server.make_app(*parts(gateway)).router.routes()}
    listed = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert {(method, path) for method, path in routes if method != "HEAD"} == listed
    for ref in set(refs(document)):
        target: Any = document
        for step in ref.removeprefix("#/").split("/"):
            target = target[step]
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert document["openapi"] == "3.1.0"


def parts(gateway: Served) -> tuple[Any, Any]:
    return gateway.gateway.config, gateway.gateway.engine


async def test_the_document_knows_the_configuration(serve: Serve) -> None:
    """Limits and who may call are those of this gateway."""
    strict = await document_of(await serve(limits={"max_messages": 7, "max_tools": 3}, metrics={"require_key": True}))
    asked = strict.schemas["MessageRequest"]["properties"]
    assert (asked["messages"]["maxItems"], asked["tools"]["anyOf"][0]["maxItems"]) == (7, 3)
    assert strict.raw["paths"]["/metrics"]["get"]["security"]
    open_to_all = await document_of(await serve(auth={"mode": "none"}))
    operations = [each for methods in open_to_all.raw["paths"].values() for each in methods.values()]
    assert not [each for each in operations if "security" in each]


# == Every status it names =============================================================================================


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_good_answers(gateway: Served, provider: str, stream: bool) -> None:
    """Text, thinking, tool calls, native tools with their sources: the bodies and events of every provider fit."""
    document = await document_of(gateway)
    model = {"openai": "gpt-5.1", "oai-resp": "gpt-5.1", "groq": "openai/gpt-oss-20b"}.get(provider, MODELS[provider])
    weather = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 4000}
    native = provider in ("anthropic", "oai-resp", "groq", "gemini")
    tried: list[tuple[str, JSON]] = [
        (SIX, {"temperature": 0.5} if provider != "anthropic" else {}),
        ('[think Let me see.] [tool get_weather {"city":"Oslo"}]', {"tools": [weather], **thinking}),
        ("[refuse]", {}),
        ("[stop max_tokens]", {}),
        ("[say a STOP b]", {"stop_sequences": ["STOP"]}),
        *([("[search rain in Oslo] [cite]", {"tools": [{"type": "web_search"}]})] if native else []),
        (f"{SIX} [error_in_stream]", {}),
    ]
    for text, fields in tried:
        body = body_of(provider, text, stream=stream, **fields) | {"model": f"{provider}/{model}"}
        document.valid(document.schemas["MessageRequest"], body)
        document.check("POST", "/v1/messages", await gateway.post(body))


async def test_images(gateway: Served) -> None:
    """Generated images are blocks of the schema, too."""
    document = await document_of(gateway)
    body = {"model": "gemini/gemini-2.5-flash-image", "messages": [{"role": "user", "content": "[image]"}]}
    body["output"] = {"modalities": ["text", "image"]}
    for stream in (False, True):
        answer = await gateway.post({**body, "stream": stream})
        assert '"image"' in answer.raw
        document.check("POST", "/v1/messages", answer)


async def test_every_status_of_messages(gateway: Served, serve: Serve, listen: Listen) -> None:
    """Each status that is listed for `POST /v1/messages` is one that happens, with a body that fits."""
    document = await document_of(gateway)
    none = await serve(auth={"mode": "none"})
    slow = await serve(timeouts={"first_byte": 0.1, "body": 0.1})
    broken = await serve(providers={"openai": {"base_url": await listen(canned(http_answer(b"<html>"), []))}})
    dead = await serve()
    await dead.gateway.engine.close()  # what it does now, nobody foresaw
    answers = [
        await gateway.ask("openai"),
        await gateway.ask("openai", temperature=9),
        await gateway.ask("openai", voice={}),
        await gateway.post({"model": "gpt-4o", "messages": []}),
        await gateway.post(body_of("openai"), key="wrong-key"),
        await (await serve(environ={"HOME": "/nonexistent"})).ask("openai"),
        await none.ask("openai", headers={"Host": "evil.test"}),
        await gateway.ask("openai", "[error 402]"),
        await gateway.ask("openai", "[error 404]"),
        await cut_short(slow, post_bytes(body_of("openai"))[:-5]),
        await gateway.send("POST", "/v1/messages", data=io.BytesIO(b"[" * (11 << 20)), headers=JSON_TYPE),
        await gateway.ask("openai", headers={"Expect": "miracles"}),
        await gateway.ask("openai", "[error 429 retry_after=7]"),
        await dead.ask("openai"),
        await broken.ask("openai"),
        await gateway.ask("openai", "[error 500 retry_after=7]"),
        await gateway.ask("openai", "[error 529]"),
        await slow.ask("openai", "[hang]"),
    ]
    for answer in answers:
        document.check("POST", "/v1/messages", answer)
    listed = document.raw["paths"]["/v1/messages"]["post"]["responses"].keys() - {"default"}
    assert {str(answer.status) for answer in answers} == listed


async def cut_short(gateway: Served, sent: bytes) -> Answer:
    """The answer to a request that is not sent to its end."""
    async with gateway.raw(sent) as (reader, writer), asyncio.timeout(5):
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        writer.write_eof()
        headers = dict(line.split(": ", 1) for line in lines)
        return Answer(int(status.split()[1]), headers, (await reader.read()).decode())


async def test_every_status_of_the_rest(gateway: Served, serve: Serve, sandbox: Sandbox) -> None:
    """The other endpoints answer as it says, while they run and while they shut down."""
    document = await document_of(await serve(metrics={"require_key": True}))
    none, off = await serve(auth={"mode": "none"}), await serve(metrics={"enabled": False})
    strict = await serve(metrics={"require_key": True})
    evil = {"Host": "evil.test"}
    seen: set[tuple[str, int]] = set()

    async def look(served: Served, path: str, **options: Any) -> None:
        answer = await served.get(path, **options)
        document.check("GET", path.partition("?")[0], answer)
        seen.add((path.partition("?")[0], answer.status))

    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    full = await serve(live={"max_sessions": 0})
    await look(gateway, "/v1/messages/live")
    await look(gateway, "/v1/messages/live", headers=upgrade)
    await look(gateway, "/v1/messages/live", key=None)
    await look(gateway, "/v1/messages/live", headers={"Origin": "https://evil.test"})
    await look(full, "/v1/messages/live", headers={**upgrade, "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="})
    for path in ("/v1/models", "/v1/models?provider=groq", "/v1/models?capability=video", "/health", "/openapi.json"):
        await look(gateway, path)
    await look(gateway, "/v1/models", key=None)
    await look(none, "/v1/models", headers=evil)
    await look(strict, "/metrics")
    await look(strict, "/metrics", key=None)
    await look(none, "/metrics", headers=evil)
    await look(off, "/metrics")
    hurried = await serve(metrics={"require_key": True}, rate_limit={"caller_rpm": 1})
    for path in ("/v1/models", "/v1/models", "/v1/messages/live", "/metrics"):
        await look(hurried, path)
    draining = await serve(timeouts={"drain": 5})
    stream = asyncio.create_task(draining.ask("openai", f"{SIX} [hang]", stream=True))
    await sandbox.wait_for(1)
    drain = asyncio.create_task(draining.gateway.drain(5))
    await asyncio.sleep(0)
    await look(draining, "/health")
    await look(draining, "/v1/models")
    for task in (drain, stream):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    listed = {
        (path, int(status))
        for path, methods in document.raw["paths"].items()
        for status in methods.get("get", {"responses": {}})["responses"]
        if status not in ("default", "101")
    }
    assert seen == listed


async def test_null_is_as_good_as_nothing(gateway: Served) -> None:
    """As the schema says, any field but the required ones may be null."""
    document = await document_of(gateway)
    fields = document.schemas["MessageRequest"]["properties"].keys() - {"model", "messages"}
    body = body_of("openai", **dict.fromkeys(fields))
    document.valid(document.schemas["MessageRequest"], body)
    assert (await gateway.post(body)).status == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/messages"), ("POST", "/health"), ("GET", "/v1/nope")])
async def test_errors_elsewhere(gateway: Served, method: str, path: str) -> None:
    """Also where there is no such route, an error is the document's."""
    document = await document_of(gateway)
    document.valid(document.schemas["Error"], (await gateway.send(method, path)).body)


# == Whatever may be asked =============================================================================================


def values(schema: JSON, schemas: JSON, depth: int = 0) -> st.SearchStrategy[Any]:
    """What fits a schema, as far as the document's schemas go."""
    if "$ref" in schema:
        return st.deferred(lambda: values(schemas[schema["$ref"].rpartition("/")[2]], schemas, depth + 1))
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        shallow = [each for each in schema["anyOf"] if depth < 8 or each.get("type") not in ("array", None)]
        return st.one_of([values(each, schemas, depth + 1) for each in shallow or schema["anyOf"][:1]])
    match schema.get("type"):
        case "object":
            return objects(schema, schemas, depth)
        case "array":
            most = min(schema.get("maxItems", 3), 3 if depth < 6 else 1)
            return st.lists(
                values(schema["items"], schemas, depth + 1), min_size=schema.get("minItems", 0), max_size=most
            )
        case "string" if "pattern" in schema:
            fits = st.from_regex(schema["pattern"], fullmatch=True)
            return fits.filter(lambda text: len(text) <= schema.get("maxLength", 10_000))
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=min(schema.get("maxLength", 20), 20))
        case "integer":
            return st.integers(schema.get("minimum", -(1 << 70)), schema.get("maximum", 1 << 70))
        case "number":
            return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    return ANYTHING


def objects(schema: JSON, schemas: JSON, depth: int) -> st.SearchStrategy[JSON]:
    fields = {name: values(each, schemas, depth + 1) for name, each in schema.get("properties", {}).items()}
    needed = {name: fields.pop(name) for name in schema.get("required", ())}
    fixed = st.fixed_dictionaries(needed, optional=fields)
    more = schema.get("additionalProperties", False)
    if not more:
        return fixed
    extra = ANYTHING if more is True else values(more, schemas, depth + 1)
    return st.builds(lambda some, known: some | known, st.dictionaries(st.text(max_size=8), extra, max_size=2), fixed)


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
MODEL = st.sampled_from([f"{provider}/{model}" for provider, model in MODELS.items()])


async def test_whatever_may_be_asked_is_answered_as_it_says(gateway: Served) -> None:
    """Requests made from the schema alone get a status that is listed, never a 500, and a body that fits it."""
    document = await document_of(gateway)
    document.check("GET", "/openapi.json", await gateway.get("/openapi.json"))
    schemas = document.schemas
    asked = schemas["MessageRequest"]
    loop = asyncio.get_running_loop()
    seen: dict[int, int] = {}

    async def ask(body: JSON) -> None:
        answer = await gateway.post(body)
        seen[answer.status] = seen.get(answer.status, 0) + 1
        assert answer.status != 500
        document.check("POST", "/v1/messages", answer)

    any_field = values(asked, schemas)
    plain = st.fixed_dictionaries({"role": st.just("user"), "content": st.text(min_size=1, max_size=9)})
    one = {
        name: values(each, schemas) for name, each in asked["properties"].items() if name not in ("model", "messages")
    }
    one_field = st.sampled_from(sorted(one)).flatmap(lambda name: st.fixed_dictionaries({name: one[name]}))
    bodies = st.builds(
        lambda body, model: body | {"model": model}, any_field, MODEL | st.text(max_size=30)
    ) | st.builds(lambda fields, model, turn: {**fields, "model": model, "messages": [turn]}, one_field, MODEL, plain)

    @settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(bodies)
    def run(body: JSON) -> None:
        asyncio.run_coroutine_threadsafe(ask(body), loop).result(20)

    await asyncio.to_thread(run)
    assert seen[200] > 20
    assert seen[400] > 20
