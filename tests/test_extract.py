"""`messages.extract`: the types it takes, the ways it asks, and what becomes of an answer that does not fit."""

import asyncio
import contextlib
import dataclasses
import datetime
import enum
import json
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, NotRequired, Optional, TypedDict

import pytest
import test_vai
from pydantic import BaseModel, Field, PydanticUserError, RootModel
from test_vai import JSON, MODELS, World, both_modes

import vai

running, world = test_vai.running, test_vai.world


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Address(BaseModel):
    street: str
    zip: str | None


class Person(BaseModel):
    """Somebody."""

    name: str = Field(description="As it is spoken.")
    age: int
    home: Address
    tags: list[str]


class Parcel(BaseModel):
    to: Address = Field(description="Where it goes.")


class Node(BaseModel):
    name: str
    children: list["Node"]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


class Options(BaseModel):
    depth: Optional[int] = None  # noqa: UP045
    mode: str = "plain"


class Narrow(BaseModel):
    n: int = Field(ge=3, le=9)
    s: str = Field(min_length=20, max_length=30)
    xs: list[int] = Field(min_length=2)


class Paint(BaseModel):
    color: Color
    at: datetime.datetime
    name: str = Field(alias="paintName")


class Words(RootModel[list[str]]):
    pass


class Counts(BaseModel):
    of: dict[str, int]


@dataclasses.dataclass
class Point:
    x: float
    y: float


@dataclasses.dataclass
class Line:
    ends: list[Point]
    color: Color = Color.RED


class Movie(TypedDict):
    title: str
    year: NotRequired[int]


class Show(Movie, total=False):
    rating: Annotated[float, "of ten"]


class Branch(TypedDict):
    name: str
    twigs: "list[Branch]"


STRICT: list[tuple[Any, Any]] = [  # types that OpenAI's strict mode can hold a model to, and a value of each
    (Person, {"name": "Ada", "age": 36, "home": {"street": "St James's Sq", "zip": None}, "tags": ["x"]}),
    (Parcel, {"to": {"street": "x", "zip": "1"}}),
    (Node, {"name": "a", "children": [{"name": "b", "children": []}]}),
    (Owner, {"pet": {"kind": "dog", "good": True}}),
    (Narrow, {"n": 4, "s": "s" * 20, "xs": [1, 2]}),
    (Paint, {"color": "blue", "at": "2026-11-23T00:00:00Z", "paintName": "sky"}),
    (Words, ["a", "b"]),
    (Point, {"x": 1.5, "y": 2.0}),
    (list[Person], []),
    (list[Point], [{"x": 0.0, "y": 0.0}]),
    (list[int], [1, 2]),
    (Literal["a", "b"], "a"),
    (Literal[1, 2], 2),
    (int | str, "one"),
    (Cat | Dog, {"kind": "cat", "lives": 9}),
    (Annotated[Cat | Dog, Field(discriminator="kind")], {"kind": "dog", "good": False}),
    (Person | None, None),
    (Color, "red"),
    (str, "text with \u00fc, \u2028 and \U0001f44b"),
    (int, 10**20),
    (float, 0.5),
    (bool, False),
    (datetime.date, "2026-11-23"),
]
LOOSE: list[tuple[Any, Any]] = [  # and types with what it has no word for: properties that may lack, free keys
    (Options, {"mode": "deep"}),
    (Line, {"ends": []}),
    (Movie, {"title": "Heat"}),
    (Show, {"title": "Heat", "year": 1995, "rating": 8.3}),
    (list[Movie], [{"title": "Heat"}]),
    (Movie | Point, {"x": 1.0, "y": 1.0}),
    (Counts, {"of": {"a": 1}}),
    (dict[str, int], {"a": 1}),
    (dict[str, Any], {"value": {"deep": [None]}}),
]
NAMES = [getattr(kind, "__name__", str(kind)) for kind, _ in STRICT + LOOSE]


async def extract(kind: Any, *answers: Any, **fields: Any) -> tuple[vai.Extracted[Any], list[JSON]]:
    """What is made of a script's answers, and the requests it took."""
    model = vai.FakeModel(*answers)
    request = {"model": "openai/gpt-4o", "messages": "Who?", **fields}
    async with vai.AsyncClient(engine=model, max_retries=0) as client:
        return await client.messages.extract(kind, **request), model.calls


async def failure(kind: Any, *answers: Any, **fields: Any) -> tuple[vai.Error, list[JSON]]:
    model = vai.FakeModel(*answers)
    request = {"model": "openai/gpt-4o", "messages": "Who?", **fields}
    async with vai.AsyncClient(engine=model, max_retries=0) as client:
        with pytest.raises(vai.Error) as caught:
            await client.messages.extract(kind, **request)
    return caught.value, model.calls


# == Types =============================================================================================================


@pytest.mark.parametrize("provider", MODELS)
@pytest.mark.parametrize("kind", [kind for kind, _ in STRICT + LOOSE], ids=NAMES)
def test_every_type_on_every_provider(world: World, provider: str, kind: Any) -> None:
    """Each type is asked of each provider in a schema that it takes, and comes back as what it is."""
    with vai.Client() as client:
        found = client.messages.extract(kind, model=MODELS[provider], messages="Make one up.")
    vai._Form(kind)._adapter.validate_python(found.parsed)
    if isinstance(kind, type) and kind not in (Movie, Show):
        assert type(found.parsed) is kind
    assert found.usage.total_tokens >= found.response.usage.total_tokens > 0
    native = (kind, provider) not in [(other, "anthropic") for other in (Counts, dict[str, int], dict[str, Any])]
    assert not native or len(world.requests) == 1


@pytest.mark.parametrize(("kind", "value"), STRICT + LOOSE, ids=NAMES)
async def test_values_come_back(kind: Any, value: Any) -> None:
    """An answer that fits is the value itself, in the type's own terms, in one request, by text or by tool."""
    wrapped = vai._Form(kind)._wrapped
    answer = {"value": value} if wrapped else value
    found, calls = await extract(kind, json.dumps(answer))
    assert found.parsed == vai._Form(kind)._adapter.validate_json(json.dumps(value))
    assert len(calls) == 1
    called, _ = await extract(kind, [{**vai.tool_use("answer"), "input": answer}])
    assert called.parsed == found.parsed


@pytest.mark.parametrize("provider", ["openai", "oai-resp"])
@pytest.mark.parametrize("kind", [kind for kind, _ in STRICT], ids=NAMES[: len(STRICT)])
def test_strict_mode_holds_where_it_can(world: World, provider: str, kind: Any) -> None:
    """A type without gaps goes out as a strict schema: closed, all required, of the words that strict mode knows."""
    with vai.Client() as client:
        client.messages.extract(kind, model=MODELS[provider], messages="Make one up.")
    body = world.bodies[0]
    form = body["response_format"]["json_schema"] if provider == "openai" else body["text"]["format"]
    assert form["strict"] is True
    assert form["schema"]["type"] == "object"
    assert "anyOf" not in form["schema"]
    check_strict(form["schema"], form["schema"].get("$defs", {}))


KNOWN = {
    *("type", "properties", "required", "additionalProperties", "items", "anyOf", "enum", "const", "$ref", "$defs"),
    *("description", "default", "format", "pattern", "minLength", "maxLength", "minItems", "maxItems"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}


def check_strict(schema: JSON, defs: JSON) -> None:
    assert schema.keys() <= KNOWN
    assert schema.keys() & {"type", "anyOf", "$ref"}  # "schema must have a 'type' key"
    if "$ref" in schema:
        assert schema["$ref"].removeprefix("#/$defs/") in defs
        assert len(schema) == 1  # "$ref cannot have keywords {'description'}"
    if schema.get("type") == "object":
        assert schema["additionalProperties"] is False
        assert sorted(schema["required"]) == sorted(schema["properties"])
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", ()), *schema.get("$defs", {}).values()]
    for item in [*inner, *([schema["items"]] if "items" in schema else [])]:
        check_strict(item, defs)


@pytest.mark.parametrize("kind", [tuple[int, str], set[int], Any, list[Any]], ids=str)
def test_what_strict_mode_has_no_word_for_is_not_called_strict(world: World, kind: Any) -> None:
    """`prefixItems`, `uniqueItems` and a schema that says nothing are refused in strict mode: they go without it."""
    with vai.Client() as client, contextlib.suppress(vai.ProviderError):  # the sandbox fills no tuples
        client.messages.extract(kind, model="openai/gpt-4o", messages="Make one up.")
    form = world.bodies[0]["response_format"]["json_schema"]
    assert form["strict"] is False


DAY = {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("field", "strict"),
    [
        ({"type": "string"}, True),
        ({"type": "array", "items": {"$ref": "#/$defs/Day"}}, True),
        ({"anyOf": [{"$ref": "#/$defs/Day"}, {"type": "null"}], "description": "d"}, True),
        ({"$ref": "#/$defs/Day", "description": "d"}, False),
        ({"type": "array"}, False),
        ({"type": ["array", "null"]}, False),
        ({"enum": ["a", 1]}, False),
        ({"type": "string", "not": {"type": "string", "pattern": "a"}}, False),
        ({"type": "object", "properties": {}, "additionalProperties": {"type": "string"}}, False),
        ({}, False),
    ],
)
def test_schemas_of_the_caller(world: World, field: JSON, strict: bool) -> None:
    """They are called strict where strict mode takes them, and go as they are in either case."""
    schema: JSON = {"type": "object", "properties": {"x": field}, "required": ["x"], "additionalProperties": False}
    schema["$defs"] = {"Day": DAY}
    wanted = {"type": "json_schema", "json_schema": schema}
    with vai.Client() as client:
        client.messages.create(model="openai/gpt-4o", messages="Make one up.", output_format=wanted)
    form = world.bodies[0]["response_format"]["json_schema"]
    assert (form["strict"], form["schema"]["properties"]["x"]) == (strict, field)


def test_a_typed_dict_may_hold_itself(world: World) -> None:
    """`typing.TypedDict` nests and refers to itself, as a pydantic model may."""
    with vai.Client() as client:
        found = client.messages.extract(Branch, model=MODELS["openai"], messages="Make one up.")
    assert found.parsed == {"name": "example name", "twigs": []}


async def test_what_is_no_type() -> None:
    """What has no schema is refused by name before anything is asked."""
    model = vai.FakeModel("{}")
    async with vai.AsyncClient(engine=model) as client:
        with pytest.raises(PydanticUserError, match="Bare"):
            await client.messages.extract(type("Bare", (), {}), model="openai/gpt-4o", messages="Who?")
    assert not model.calls


def test_descriptions_are_in_the_schema(world: World) -> None:
    """What a type says of itself and of its fields is there for the model to read; made-up titles are not."""
    with vai.Client() as client:
        client.messages.extract(Person, model=MODELS["openai"], messages="Make one up.")
    schema = world.bodies[0]["response_format"]["json_schema"]["schema"]
    assert schema["description"] == "Somebody."
    assert schema["properties"]["name"]["description"] == "As it is spoken."
    assert '"title"' not in json.dumps(schema)


# == Ways of asking ====================================================================================================

NATIVE: dict[str, Callable[[JSON], Any]] = {
    "anthropic": lambda body: body["output_config"]["format"]["schema"],
    "openai": lambda body: body["response_format"]["json_schema"]["schema"],
    "oai-resp": lambda body: body["text"]["format"]["schema"],
    "groq": lambda body: body["response_format"]["json_schema"]["schema"],
    "gemini": lambda body: body["generationConfig"]["responseJsonSchema"],
    "gemini-oauth": lambda body: body["request"]["generationConfig"]["responseJsonSchema"],
    "cerebras": lambda body: body["response_format"]["json_schema"]["schema"],
}
ADA = {"name": "Ada", "age": 36, "home": {"street": "x", "zip": None}, "tags": []}


@both_modes
@pytest.mark.parametrize("provider", MODELS)
async def test_all_clients_get_the_same(world: World, mode: str, provider: str) -> None:
    """Native structured output, thinking beside it; both clients, both modes; fields of the request go along."""
    fields: JSON = {"model": MODELS[provider], "messages": "[think Hm.] Who?", "system": "Be exact."}
    fields |= {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 5000}
    async with vai.AsyncClient(**world.options(mode)) as client:
        found = await client.messages.extract(Person, **fields)
    with vai.Client(**world.options(mode)) as blocking:
        other = blocking.messages.extract(Person, **fields)
    assert isinstance(found.parsed, Person)
    assert (other.parsed, other.usage, other.response.to_wire()) == (
        found.parsed,
        found.usage,
        found.response.to_wire(),
    )
    bodies = world.bodies
    assert bodies[0] == bodies[1]
    assert set(NATIVE[provider](bodies[0])["required"]) == {"name", "age", "home", "tags"}
    assert "Be exact." in json.dumps(bodies[0])
    assert not any("tools" in body for body in bodies)


def refusing(*params: str) -> Callable[[JSON], Any]:
    """A model that refuses requests with these fields, and else answers as it is asked to."""

    def answer(body: JSON) -> Any:
        for param in params:
            if param in body:
                word = {"output_format": "response_format"}.get(param, param)
                return vai.InvalidRequestError(f"'{word}' is not supported with this model", provider="openai")
        return [vai.tool_use("answer", **ADA)] if "tools" in body else json.dumps(ADA)

    return answer


@pytest.mark.parametrize(
    ("refused", "way"), [((), "native"), (("output_format",), "forced"), (("output_format", "tool_choice"), "offered")]
)
async def test_ways_of_asking(refused: tuple[str, ...], way: str) -> None:
    """A model without structured output gets a tool that it must call; one that cannot be forced is offered it."""
    found, calls = await extract(Person, *[refusing(*refused)] * 3, system="Be exact.", temperature=0.5)
    assert found.parsed == Person.model_validate(ADA)
    last = calls[-1]
    assert len(calls) == {"native": 1, "forced": 2, "offered": 3}[way]
    assert ("output_format" in last) == (way == "native")
    assert ("tool_choice" in last) == (way == "forced")
    assert (last["system"], last["temperature"]) == ("Be exact.", 0.5)
    assert [body["messages"] for body in calls] == [[{"role": "user", "content": "Who?"}]] * len(calls)
    if way != "native":
        assert last["tools"][0]["input_schema"]["required"] == ["name", "age", "home", "tags"]
    if way == "forced":
        assert last["tool_choice"] == {"type": "tool", "name": "answer", "disable_parallel_tool_use": True}


async def test_a_model_that_refuses_all_ways() -> None:
    """The last refusal is raised as it is."""
    fault, calls = await failure(Person, *[refusing("output_format", "tools")] * 3)
    assert isinstance(fault, vai.InvalidRequestError)
    assert "tools" in fault.message
    assert len(calls) <= 3


@pytest.mark.parametrize(
    "fault",
    [
        vai.InvalidRequestError("messages: too many", param="messages", provider="openai"),
        vai.RateLimitError("busy"),
        vai.AuthenticationError("no"),
    ],
)
async def test_other_errors_are_raised_at_once(fault: vai.Error) -> None:
    """An error that has nothing to do with structured output is the caller's, unchanged, after one request."""
    raised, calls = await failure(Person, fault)
    assert raised is fault
    assert len(calls) == 1


@both_modes
@pytest.mark.parametrize(
    ("model", "ways"),
    [
        ("anthropic/claude-sonnet-4-5", ["native", "forced"]),
        ("anthropic/claude-sonnet-5-5", ["native", "offered"]),
        ("anthropic/claude-3-5-haiku-latest", ["native", "forced"]),
    ],
)
async def test_schemas_that_a_provider_refuses(world: World, mode: str, model: str, ways: list[str]) -> None:
    """Claude's structured output takes no free keys: a tool does, forced where the model lets itself be forced."""
    thinking = {"type": "enabled", "budget_tokens": 2000}
    async with vai.AsyncClient(**world.options(mode)) as client:
        found = await client.messages.extract(
            dict[str, int], model=model, messages='[tool answer {"a":1}]', thinking=thinking
        )
    assert found.parsed == {"a": 1}
    sent = [
        "native" if "output_config" in body and "format" in body["output_config"]
        else "forced" if "tool_choice" in body else "offered" for body in world.bodies
    ]  # fmt: skip
    assert sent == ways


# == Answers that do not fit ===========================================================================================

GOOD = '{"x": 1, "y": 2}'
BAD: dict[str, tuple[Any, str]] = {
    "prose": ("The point is at 1, 2.", "not JSON"),
    "half JSON": ('{"x": 1, "y":', "not JSON"),
    "NaN": ('{"x": NaN, "y": 1}', "not JSON"),
    "lacks a field": ('{"x": 1}', "- y: Field required"),
    "wrong type": ('{"x": "one", "y": 2}', "- x: Input should be a valid number"),
    "a list": ("[1, 2]", "all of it"),
    "two objects": (GOOD + GOOD, "not JSON"),
    "thoughts alone": ([{"type": "thinking", "thinking": "Hm.", "signature": ""}], "not JSON"),
    "a call that does not fit": ([vai.tool_use("answer", x=1)], "- y: Field required"),
    "a call of nothing known": ([vai.tool_use("other", x=1)], "not JSON"),
}


@pytest.mark.parametrize("case", BAD)
async def test_one_chance_to_mend(case: str) -> None:
    """What is wrong goes back once, in words or as the call's error result; usage counts both answers."""
    bad, says = BAD[case]
    found, calls = await extract(Point, bad, GOOD)
    assert found.parsed == Point(1, 2)
    first, second, third = calls[1]["messages"]
    assert (first["content"], second["role"], third["role"]) == ("Who?", "assistant", "user")
    content = third["content"]
    if "call" in case:
        assert [block["type"] for block in content] == ["tool_result"]
        assert content[0]["is_error"] is True
        content = content[0]["content"]
    assert says in content
    assert found.usage.total_tokens > found.response.usage.total_tokens
    fault, calls = await failure(Point, bad, bad)
    assert len(calls) == 2
    assert (type(fault), fault.code, fault.provider) == (vai.ProviderError, "invalid_output", "openai")
    assert says in fault.message
    assert isinstance(fault.result, vai.Message)
    assert not fault.retryable


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n```\n",
        f"  \n```json\n{GOOD}```",
        f"\n{GOOD}\n",
        [vai.text('{"x": 1, '), vai.text('"y": 2}')],
        [{"type": "thinking", "thinking": "Hm.", "signature": ""}, vai.text(GOOD)],
        [vai.text("Let me see."), vai.tool_use("answer", x=1, y=2)],
        [vai.tool_use("answer", x=1, y=2), vai.tool_use("answer", x=3, y=4)],
    ],
)
async def test_answers_that_are_read(answer: Any) -> None:
    """JSON in a fence, in pieces, beside thoughts or as a call needs no mending."""
    found, calls = await extract(Point, answer)
    assert found.parsed == Point(1, 2)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [Options, dict[str, Any]], ids=str)
async def test_broken_arguments_are_no_answer(kind: Any) -> None:
    """Arguments that are not whole JSON go back as an error, even where what is left of them would fit."""
    broken = [vai.tool_use("answer", mode="de", invalid_json=True)]
    found, calls = await extract(kind, broken, '{"mode": "deep"}')
    assert len(calls) == 2
    assert "JSON" in calls[1]["messages"][-1]["content"][0]["content"]
    assert found.parsed in (Options(mode="deep"), {"mode": "deep"})


def whole(stop_reason: str, *content: JSON) -> vai.Message:
    return vai.Message.model_validate(
        {"id": "msg_1", "type": "message", "role": "assistant", "model": "openai/gpt-4o", "content": content,
         "stop_reason": stop_reason, "usage": {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12}}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stop", "says"),
    [("refusal", "declined"), ("max_tokens", "max_tokens"), ("model_context_window_exceeded", "context window")],
)
async def test_answers_that_cannot_be_mended(stop: str, says: str) -> None:
    """A refusal or an answer that was cut off is not asked for again; the code says which it is."""
    answer = whole(stop, vai.text('{"x": 1, "y"'))
    fault, calls = await failure(Point, answer)
    assert (type(fault), fault.code, len(calls)) == (vai.ProviderError, stop, 1)
    assert says in fault.message
    assert isinstance(fault.result, vai.Message)
    assert (fault.result.stop_reason, fault.result.usage.output_tokens) == (stop, 7)


async def test_a_whole_answer_counts_whatever_its_end() -> None:
    """JSON that fits was not cut off, though the limit was reached with its last token."""
    found, _ = await extract(Point, whole("max_tokens", vai.text(GOOD)))
    assert (found.parsed, found.usage.total_tokens) == (Point(1, 2), 12)


async def test_nothing_at_all() -> None:
    """An answer without content has nothing to mend."""
    fault, calls = await failure(Point, "")
    assert (fault.code, len(calls)) == ("invalid_output", 1)


async def test_a_pause_goes_on_by_itself() -> None:
    """A provider that pauses among its own tools is let go on; that is no answer to be mended."""
    pause = whole("pause_turn", vai.text("Looking."))
    found, calls = await extract(
        Point, pause, pause, GOOD, model="anthropic/claude-sonnet-4-5", tools=[vai.web_search()]
    )
    assert found.parsed == Point(1, 2)
    assert [turn["role"] for turn in calls[2]["messages"]] == ["user", "assistant", "assistant"]
    assert found.usage.total_tokens == 2 * pause.usage.total_tokens + found.response.usage.total_tokens
    found, calls = await extract(Point, pause, "no", pause, GOOD, model="anthropic/claude-sonnet-4-5")
    assert (found.parsed, len(calls)) == (Point(1, 2), 4)  # a pause is no chance spent


@both_modes
@pytest.mark.parametrize("provider", MODELS)
async def test_mending_on_every_provider(world: World, mode: str, provider: str) -> None:
    """Each provider takes the history that asks for a better answer; thoughts go back with it."""
    fields: JSON = {"model": MODELS[provider], "thinking": {"type": "enabled", "budget_tokens": 2000}}
    async with vai.AsyncClient(**world.options(mode)) as client:
        found = await client.messages.extract(Point, messages="[think Hm.][say nothing of use]", **fields)
        assert isinstance(found.parsed, Point)
        assert len(world.requests) == 2
        if provider == "groq":  # has no word for a refusal
            return
        with pytest.raises(vai.ProviderError, match="declined") as caught:
            await client.messages.extract(Point, messages="[refuse]", **fields)
    assert caught.value.code == "refusal"


@both_modes
@pytest.mark.parametrize(
    ("prompt", "cls"), [("[error 500]", vai.ProviderError), ("[error 429]", vai.RateLimitError),
                        ("[error 400]", vai.InvalidRequestError), ("[break_off]", vai.ProviderError)]
)  # fmt: skip
def test_errors_of_the_provider(world: World, mode: str, prompt: str, cls: type[vai.Error]) -> None:
    """They are what `create` raises, after as many requests."""
    with vai.Client(**world.options(mode), max_retries=0) as client:
        with pytest.raises(vai.Error) as caught:
            client.messages.extract(Point, model="openai/gpt-4o", messages=prompt)
        with pytest.raises(vai.Error) as created:
            client.messages.create(model="openai/gpt-4o", messages=prompt)
    assert type(caught.value) is type(created.value) is cls
    assert test_vai.told(caught.value) == test_vai.told(created.value)
    assert len(world.requests) == 2


# == What the caller gives =============================================================================================


@pytest.mark.parametrize(
    "given",
    [
        {"output_format": {"type": "json_schema", "json_schema": {"type": "object"}}},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {"tool_choice": {"type": "auto"}},
    ],
    ids=["output_format", "output_config", "tool_choice"],
)
async def test_what_extract_sets_itself(given: JSON) -> None:
    """Giving it as well is a TypeError that names it, before anything is asked."""
    model = vai.FakeModel(GOOD)
    async with vai.AsyncClient(engine=model) as client:
        with pytest.raises(TypeError, match=next(iter(given))):
            await client.messages.extract(Point, model="openai/gpt-4o", messages="Where?", **given)
    assert not model.calls


@pytest.mark.parametrize("fields", [{"output_format": None, "tool_choice": None}, {"output_config": {"effort": "low"}}])
async def test_what_may_be_given(fields: JSON) -> None:
    """None is not given; effort goes along."""
    found, calls = await extract(Point, GOOD, **fields)
    assert found.parsed == Point(1, 2)
    assert calls[0].get("output_config") == fields.get("output_config")


async def test_tools_of_the_caller() -> None:
    """They stay; the answer's tool comes beside them."""

    @vai.tool
    def look(city: str) -> str:
        """Look."""
        return city

    found, calls = await extract(Person, *[refusing("output_format")] * 2, tools=[look, vai.web_search()],
                                 model="anthropic/claude-sonnet-4-5")  # fmt: skip
    assert isinstance(found.parsed, Person)
    assert [tool.get("name") or tool["type"] for tool in calls[1]["tools"]] == ["look", "web_search", "answer"]


async def test_a_tool_of_the_same_name() -> None:
    """A tool of the caller's that is called as the answer's is not taken for it; the answer's has another name then."""
    tools = [{"name": name, "input_schema": {"type": "object"}} for name in ("answer", "answer_2")]
    found, _ = await extract(Point, [vai.tool_use("answer", x=1, y=1)], GOOD, tools=tools)
    assert found.parsed == Point(1, 2)
    forced = [refusing("output_format"), [vai.tool_use("answer_3", x=1, y=2)]]
    found, calls = await extract(Point, *forced, tools=tools)
    assert found.parsed == Point(1, 2)
    assert [tool["name"] for tool in calls[1]["tools"]] == ["answer", "answer_2", "answer_3"]
    assert calls[1]["tool_choice"]["name"] == "answer_3"


async def test_the_messages_given_stay_as_they_are() -> None:
    """Mending works on a history of its own."""
    messages = [{"role": "user", "content": "Where?"}]
    await extract(Point, "no", GOOD, messages=messages)
    assert messages == [{"role": "user", "content": "Where?"}]


def test_without_await() -> None:
    """The synchronous client mends, falls back and fails alike."""
    model = vai.FakeModel(refusing("output_format"), "no", [vai.tool_use("answer", **ADA)], "no", "no")
    with vai.Client(engine=model) as client:
        found = client.messages.extract(Person, model="openai/gpt-4o", messages="Who?")
        assert found.parsed.name == "Ada"
        with pytest.raises(vai.ProviderError, match="not JSON") as caught:
            client.messages.extract(Person, model="openai/gpt-4o", messages="Who?")
    assert caught.value.code == "invalid_output"
    assert isinstance(caught.value.result, vai.Message)


async def test_cancelling_lets_go_of_the_provider(world: World) -> None:
    """An extraction that is cancelled hangs up."""
    async with vai.AsyncClient() as client:
        work: Awaitable[Any] = client.messages.extract(Point, model="openai/gpt-4o", messages="[hang]")
        task = asyncio.ensure_future(work)
        await asyncio.to_thread(world.request)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(world.hung_up)
