"""`@tool`: what a model is told of a function, and what the function gets of a call."""

import dataclasses
import datetime
import enum
import functools
import inspect
import json
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Literal, NotRequired, Optional, TypedDict

import pytest
import test_vai
from pydantic import BaseModel, Field
from test_vai import JSON, MODELS, World, both_modes

import vai
from sandbox import Sandbox

running, world = test_vai.running, test_vai.world


class Unit(enum.Enum):
    CELSIUS = "c"
    FAHRENHEIT = "f"


class Place(BaseModel):
    city: str
    country: str = "NO"


@dataclasses.dataclass
class Day:
    name: str


@vai.tool
def forecast(
    place: Place,
    days: list[Day],
    unit: Unit = Unit.CELSIUS,
    hour: Annotated[int | None, "of the day"] = None,
    *,
    mood: Literal["dry", "wry"] = "dry",
) -> str:
    """What the weather will be."""
    return f"{place.city}/{place.country} {[day.name for day in days]} {unit.name} {hour} {mood}"


def test_the_schema_says_what_the_annotations_say() -> None:
    """Name, description, types, defaults, enums and what is required; no titles."""
    wire = forecast.to_wire()
    schema = wire["input_schema"]
    assert (wire["name"], wire["description"]) == ("forecast", "What the weather will be.")
    assert schema["required"] == ["place", "days"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["mood"] == {"default": "dry", "enum": ["dry", "wry"], "type": "string"}
    assert schema["properties"]["hour"]["description"] == "of the day"
    assert schema["$defs"]["Unit"] == {"enum": ["c", "f"], "type": "string"}
    assert schema["$defs"]["Place"]["required"] == ["city"]
    assert '"title"' not in json.dumps(wire)


def test_a_call_gets_what_the_annotations_say() -> None:
    """Objects become models, dataclasses and enum members; what is left out keeps its default."""
    given = {"place": {"city": "Oslo"}, "days": [{"name": "Monday"}], "unit": "f"}
    assert forecast.run(given) == "Oslo/NO ['Monday'] FAHRENHEIT None dry"
    assert forecast(Place(city="Rome"), [], mood="wry") == "Rome/NO [] CELSIUS None wry"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, ["- place: Field required", "- days: Field required"]),
        ({"place": {"city": 7}, "days": []}, ["- place.city: Input should be a valid string"]),
        ({"place": {"city": "x"}, "days": [], "unit": "k"}, ["- unit: Input should be 'c' or 'f'"]),
        ({"place": {"city": "x"}, "days": [], "hours": 1}, ["- hours: Extra inputs are not permitted"]),
        ({"place": {"city": "x"}, "invalid_json": True}, ["not a whole JSON object"]),
    ],
)
def test_input_that_does_not_fit_is_explained(given: dict[str, Any], says: list[str]) -> None:
    """A ValueError lists what is wrong and where, in words that a model can act on."""
    with pytest.raises(ValueError, match=re.escape(says[0])) as caught:
        forecast.run(given)
    assert all(line in str(caught.value) for line in says)


GOOGLE = """Look up.

    More of it.

    Args:
        city (str): Where,
            in words.
        unit: c or f

    Returns:
        str: text: it is
    """
NUMPY = """Look up.

    More of it.

    Parameters
    ----------
    city : str
        Where,
        in words.
    unit
        c or f

    Returns
    -------
    str
        text
    """
SPHINX = """Look up.

    More of it.

    :param str city: Where,
        in words.
    :param unit: c or f
    :returns: text
    """


@pytest.mark.parametrize("doc", [GOOGLE, NUMPY, SPHINX], ids=["google", "numpy", "sphinx"])
def test_docstrings_describe_parameters(doc: str) -> None:
    """Three styles of docstring say the same."""

    def look(city: str, unit: str = "c") -> str:
        return city + unit

    look.__doc__ = doc
    made = vai.tool(look)
    about = {name: field.get("description") for name, field in made.input_schema["properties"].items()}
    assert made.description == "Look up.\n\nMore of it."
    assert about == {"city": "Where, in words.", "unit": "c or f"}


def test_a_plain_docstring_is_the_description() -> None:
    """Whatever has no known section is description, colons and all."""

    @vai.tool(name="find", strict=True)
    def look() -> None:
        """Find it: here, or there.

        Note: ask first.
        """

    wire = look.to_wire()
    assert (wire["name"], wire["strict"]) == ("find", True)
    assert wire["description"] == "Find it: here, or there.\n\nNote: ask first."
    assert vai.tool(lambda: None, name="bare").to_wire() == {
        "name": "bare", "input_schema": {"additionalProperties": False, "properties": {}, "type": "object"}
    }  # fmt: skip


def splat(*args: int) -> None: ...
def keywords(**options: int) -> None: ...
def positional(city: str, /) -> None: ...


@pytest.mark.parametrize("function", [splat, keywords, positional])
def test_parameters_without_a_name_are_refused(function: Callable[..., None]) -> None:
    """A tool takes named parameters; anything else is a TypeError where it is made."""
    with pytest.raises(TypeError, match="named parameters"):
        vai.tool(function)


@pytest.mark.parametrize("mode", ["create", "stream"])
async def test_tools_go_where_dicts_go(mode: str) -> None:
    """`create` and `stream` take `@tool` functions and plain dicts side by side."""
    plain = {"name": "sky", "input_schema": {"type": "object", "properties": {}}}
    call = '[tool forecast {"place":{"city":"Oslo"},"days":[]}]'
    request: dict[str, Any] = {"model": "openai/gpt-4o", "messages": call, "tools": [forecast, plain]}
    async with Sandbox() as sandbox:
        keys = {"openai": "sk-test"}
        async with vai.AsyncClient(base_urls=sandbox.base_urls, provider_keys=keys) as client:
            if mode == "create":
                answer = await client.messages.create(**request)
            else:
                async with client.messages.stream(**request) as stream:
                    answer = await stream.final()
        sent = sandbox.requests[0].body
    assert sent is not None
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["forecast", "sky"]
    assert [forecast.run(call.input) for call in answer.tool_calls] == ["Oslo/NO [] CELSIUS None dry"]


# == Types =============================================================================================================


class Movie(TypedDict):
    title: str
    year: NotRequired[int]


class Family(TypedDict):
    children: "list[Family]"


REF_DAY = {"$ref": "#/$defs/Day"}


def null_or(schema: JSON) -> JSON:
    return {"anyOf": [schema, {"type": "null"}]}


@pytest.mark.parametrize(
    ("hint", "schema", "given", "got"),
    [
        (str, {"type": "string"}, "x", "x"),
        (int, {"type": "integer"}, 10**20, 10**20),
        (float, {"type": "number"}, 1, 1.0),
        (bool, {"type": "boolean"}, True, True),
        (Any, {}, {"a": [None]}, {"a": [None]}),
        (Literal["a", 1], {"enum": ["a", 1]}, 1, 1),
        (Optional[int], null_or({"type": "integer"}), None, None),  # noqa: UP045
        (str | None, null_or({"type": "string"}), "x", "x"),
        (int | str, {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "x", "x"),
        (Unit, {"$ref": "#/$defs/Unit"}, "c", Unit.CELSIUS),
        (list[int], {"items": {"type": "integer"}, "type": "array"}, [1], [1]),
        (list[Day], {"items": REF_DAY, "type": "array"}, [{"name": "x"}], [Day("x")]),
        (Day | None, null_or(REF_DAY), {"name": "x"}, Day("x")),
        (dict[str, Day], {"additionalProperties": REF_DAY, "type": "object"}, {"a": {"name": "x"}}, {"a": Day("x")}),
        (Place, {"$ref": "#/$defs/Place"}, {"city": "Oslo"}, Place(city="Oslo")),
        (Movie, {"$ref": "#/$defs/Movie"}, {"title": "Heat"}, {"title": "Heat"}),
        (list[Movie], {"items": {"$ref": "#/$defs/Movie"}, "type": "array"}, [{"title": "Heat"}], [{"title": "Heat"}]),
        (Family, {"$ref": "#/$defs/Family"}, {"children": []}, {"children": []}),
        (set[int], {"items": {"type": "integer"}, "type": "array", "uniqueItems": True}, [1, 1], {1}),
        (datetime.date, {"format": "date", "type": "string"}, "2026-11-23", datetime.date(2026, 11, 23)),
        (datetime.datetime, {"format": "date-time", "type": "string"}, "2026-11-23T01:02:03",
         datetime.datetime(2026, 11, 23, 1, 2, 3)),
        (uuid.UUID, {"format": "uuid", "type": "string"}, str(uuid.UUID(int=1)), uuid.UUID(int=1)),
        (Annotated[int, "how many"], {"description": "how many", "type": "integer"}, 3, 3),
        (Annotated[int, Field(ge=1)], {"minimum": 1, "type": "integer"}, 1, 1),
        (Annotated[int, Field(description="how many")], {"description": "how many", "type": "integer"}, 3, 3),
    ],
)  # fmt: skip
def test_types_of_parameters(hint: Any, schema: JSON, given: Any, got: Any) -> None:
    """What each annotation is in the schema, and what a value of it becomes."""

    def use(value: Any) -> Any:
        return value

    use.__annotations__ = {"value": hint}
    made = vai.tool(use)
    found = made.input_schema["properties"]["value"]
    if hint is Family:  # one that refers to itself may be spelled in more than one way
        assert "Family" in json.dumps(made.input_schema)
    else:
        assert found == schema
    assert made.run({"value": given}) == got
    assert made.input_schema["required"] == ["value"]


@pytest.mark.parametrize(
    ("hint", "default", "shown"),
    [
        (int, 3, 3),
        (Unit, Unit.CELSIUS, "c"),
        (list[int], [], []),
        (str | None, None, None),
        (Day, Day("x"), {"name": "x"}),
        (dict[str, str], {"title": "x"}, {"title": "x"}),
        (Place, Place(city="Oslo"), {"city": "Oslo", "country": "NO"}),
    ],
)
def test_defaults(hint: Any, default: Any, shown: Any) -> None:
    """They are in the schema as JSON, and what is left out of a call is the function's own default."""

    def use(value: Any = default) -> Any:
        return value

    use.__annotations__ = {"value": hint}
    made = vai.tool(use)
    found = made.input_schema["properties"]["value"]["default"]
    assert {"country": "NO", **found} == shown if hint is Place else found == shown
    assert "required" not in made.input_schema
    assert made.run({}) is default


NAMES = ["schema", "json", "copy", "model_dump", "model_config", "_private", "self_", "input", "function"]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_may_have_any_name(name: str) -> None:
    """Also one that pydantic's models use themselves; without a warning."""
    space: dict[str, Any] = {}
    exec(f"def use({name}: int, other: int = 1) -> int: return {name} + other", space)  # noqa: S102
    made: vai.Tool[..., int] = vai.tool(space["use"])
    assert list(made.input_schema["properties"]) == [name, "other"]
    assert made.run({name: 2}) == 3
    with pytest.raises(ValueError, match=f"- {name}: "):
        made.run({name: "x"})


def test_annotations_may_be_strings() -> None:
    """As `from __future__ import annotations` makes them."""

    def use(day: "Day", unit: "Annotated[Unit | None, 'of heat']" = None) -> "str":
        return f"{day} {unit}"

    made = vai.tool(use)
    assert made.input_schema["properties"]["day"] == REF_DAY
    assert made.input_schema["properties"]["unit"]["description"] == "of heat"
    assert made.run({"day": {"name": "x"}, "unit": "c"}) == f"{Day('x')} {Unit.CELSIUS}"


# == Functions of all kinds ============================================================================================


class Station:
    """Where weather is measured."""

    def __init__(self, name: str) -> None:
        self.name = name

    @vai.tool(timeout=3, strict=True)
    def measure(self, hour: int) -> str:
        """Measure."""
        return f"{self.name} {hour}"

    @vai.tool
    @staticmethod
    def units(hour: int) -> str:
        """Measure."""
        return f"units {hour}"

    @classmethod
    def made(cls, hour: int) -> str:
        """Measure."""
        return f"{cls.__name__} {hour}"

    def plain(self, hour: int) -> str:
        """Measure."""
        return f"{self.name} {hour}"

    def __call__(self, hour: int) -> str:
        """Measure."""
        return f"called {hour}"


def measured(place: str, hour: int) -> str:
    """Measure."""
    return f"{place} {hour}"


async def waited(hour: int) -> str:
    """Measure."""
    return f"waited {hour}"


@functools.lru_cache
def cached(hour: int) -> str:
    """Measure."""
    return f"cached {hour}"


def wrapping(function: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> str:
        return function(*args, **kwargs)

    return wrapper


OSLO = Station("Oslo")
FUNCTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "method as tool": (lambda: OSLO.measure, "Oslo 7"),
    "static method": (lambda: OSLO.units, "units 7"),
    "class method": (lambda: vai.tool(Station.made), "Station 7"),
    "bound method": (lambda: vai.tool(OSLO.plain), "Oslo 7"),
    "callable object": (lambda: vai.tool(OSLO, name="station"), "called 7"),
    "partial by name": (lambda: vai.tool(functools.partial(measured, "Rome")), "Rome 7"),
    "partial": (lambda: vai.tool(functools.partial(measured, place="Rome"), description="Measure."), "Rome 7"),
    "async": (lambda: vai.tool(waited), "waited 7"),
    "cached": (lambda: vai.tool(cached), "cached 7"),
    "decorated": (lambda: vai.tool(wrapping(functools.partial(OSLO.plain).func)), "Oslo 7"),
    "lambda": (lambda: vai.tool(lambda hour: f"lambda {hour}", name="of_mine", description="Measure."), "lambda 7"),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
async def test_functions_of_all_kinds(kind: str) -> None:
    """Each is described by name and docstring, takes `hour` alone, and runs in a loop."""
    make, says = FUNCTIONS[kind]
    made = make()
    wire = made.to_wire()
    assert wire["description"] == "Measure."
    assert [name for name in wire["input_schema"]["properties"] if name != "place"] == ["hour"]
    assert wire["input_schema"]["required"] == ["hour"]
    assert re.fullmatch(r"\w+", wire["name"])
    model = vai.FakeModel([vai.tool_use(made.name, hour=7)], "done")
    async with vai.AsyncClient(engine=model) as client:
        result = await client.messages.run(model="openai/gpt-4o", messages="Go", tools=[made])
    assert result.steps[0].tool_calls[0].output == says
    if kind == "method as tool":
        assert (made.timeout, wire["strict"]) == (3, True)
    called = made(hour=7)
    assert (await called if kind == "async" else called) == says


async def test_a_name_that_no_provider_takes() -> None:
    """A lambda has none: it is refused with its place, where it is made or when it is sent."""
    async with vai.AsyncClient(engine=vai.FakeModel("x")) as client:
        with pytest.raises((ValueError, vai.InvalidRequestError), match="name"):
            await client.messages.create(model="openai/gpt-4o", messages="Hi", tools=[vai.tool(lambda hour: hour)])


def test_a_return_annotation_may_be_wrong() -> None:
    """It is not part of what a model is told; a name that nobody knows is."""

    def use(day: "Day") -> "Nothing":  # type: ignore[name-defined]  # noqa: F821
        return day

    assert vai.tool(use).run({"day": {"name": "x"}}) == Day("x")
    use.__annotations__ = {"day": "Nothing"}
    with pytest.raises(NameError, match="Nothing"):
        vai.tool(use)


def test_what_a_partial_holds_is_not_the_models_to_say() -> None:
    """An argument that was given by name or by place is no input."""
    for held in (functools.partial(measured, "Rome"), functools.partial(measured, place="Rome")):
        made = vai.tool(held)
        assert (made.name, list(made.input_schema["properties"])) == ("measured", ["hour"])
        with pytest.raises(ValueError, match="place: Extra inputs"):
            made.run({"hour": 1, "place": "Oslo"})


async def streamed(hour: int) -> AsyncIterator[str]:
    yield f"{hour}"


def yielded(hour: int) -> Iterator[str]:
    yield f"{hour}"


@pytest.mark.parametrize(
    ("function", "options", "says"),
    [
        (OSLO, {}, "Station has no name of its own"),
        ("measure", {}, "str is no function"),
        (streamed, {}, "streamed.. is a generator"),
        (yielded, {}, "yielded.. is a generator"),
        (measured, {"timeout": "5"}, "number of seconds; not '5'"),
    ],
)
def test_what_is_no_tool(function: Any, options: dict[str, Any], says: str) -> None:
    """A TypeError says what is lacking."""
    with pytest.raises(TypeError, match=says):
        vai.tool(function, **options)


def test_docstrings_with_more_in_them() -> None:
    """Types, defaults, blank lines and sections around the parameters are not part of what is said of them."""

    def google(city: str, unit: str, days: int = 1) -> None:
        """Look up.

        Args:
            city: Where: in words.
            unit (Literal["c", "f"], optional): c or f.
                Defaults to c.

            days (int): How many.

        Raises:
            ValueError: never
        """

    def numpy(city: str, unit: str, days: int = 1) -> None:
        """
        Look up.

        Parameters
        ----------
        city : str
            Where: in words.
        unit : {"c", "f"}, optional
            c or f.
            Defaults to c.
        days : int, default 1
            How many.

        Raises
        ------
        ValueError
            never
        """

    for function in (google, numpy):
        made = vai.tool(function)
        about = {name: field.get("description") for name, field in made.input_schema["properties"].items()}
        assert made.description == "Look up."
        assert about == {"city": "Where: in words.", "unit": "c or f. Defaults to c.", "days": "How many."}


# == Native tools ======================================================================================================

NATIVE: dict[str, vai.Native] = {
    "web_search": vai.web_search(max_uses=2, allowed_domains=["example.com"]),
    "code_execution": vai.code_execution(),
    "file_search": vai.file_search(["vs_1"]),
    "computer_use": vai.computer_use(display_width_px=800, display_height_px=600),
    "text_editor": vai.text_editor(),
    "image_generation": vai.image_generation(size="1024x1024"),
}


@both_modes
@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("provider", MODELS)
async def test_native_tools(world: World, mode: str, provider: str, kind: str) -> None:
    """A provider that has the tool takes it; another is a refusal that names those that do, and asks nobody."""
    model = "anthropic/claude-sonnet-4-5" if provider == "anthropic" else MODELS[provider]
    async with vai.AsyncClient(**world.options(mode), max_retries=0) as client:
        having = [row.id for row in (await client.models.list()).providers if kind in row.native_tools]
        assert having
        request: JSON = {"model": model, "messages": "[say fine]", "tools": [NATIVE[kind]]}
        if provider in having:
            assert (await client.messages.create(**request)).text == "fine"
            assert len(world.bodies[0].get("request", world.bodies[0]).get("tools", [1])) == 1
            return
        with pytest.raises(vai.InvalidRequestError) as caught:
            await client.messages.create(**request)
    fault = caught.value
    assert (fault.code, fault.param) == ("unsupported_feature", "tools")
    assert all(word in fault.message for word in (kind, provider, *having))
    assert not world.requests


def test_native_tools_show_what_they_are() -> None:
    """`repr` and the wire hold what was given, and not what was not."""
    assert NATIVE["web_search"].to_wire() == {
        "type": "web_search", "config": {"max_uses": 2, "allowed_domains": ["example.com"]}
    }  # fmt: skip
    assert repr(NATIVE["web_search"]) == "web_search(max_uses=2, allowed_domains=['example.com'])"
    assert (vai.code_execution().to_wire(), repr(vai.text_editor(print))) == (
        {"type": "code_execution"},
        "text_editor()",
    )


@both_modes
@pytest.mark.parametrize(
    ("model", "kind", "name"),
    [
        ("anthropic/claude-sonnet-4-5", "computer_use", "computer"),
        ("anthropic/claude-sonnet-4-5", "text_editor", "str_replace_based_edit_tool"),
        ("anthropic/claude-sonnet-5-5", "text_editor", "str_replace_based_edit_tool"),
        (MODELS["oai-resp"], "computer_use", "computer"),
        (MODELS["gemini"], "computer_use", "click_at"),
    ],
)
@pytest.mark.parametrize("as_coroutine", [False, True], ids=["sync", "async"])
async def test_tools_that_act_here(
    world: World, mode: str, model: str, kind: str, name: str, as_coroutine: bool
) -> None:
    """The function does what the model asks for, and what it returns goes back; a function tool stands beside it."""
    done: list[Any] = []

    def act(name: str, input: JSON) -> Any:
        done.append((name, input))
        return vai.image(test_vai.PNG) if kind == "computer_use" else "text of a file"

    async def act_later(name: str, input: JSON) -> Any:
        return act(name, input)

    config = {"display_width_px": 800, "display_height_px": 600} if "claude" in model and kind == "computer_use" else {}
    native = getattr(vai, kind)(act_later if as_coroutine else act, **config)
    asks = f'[tool {name} {{"a":1}}][then][say done]'
    async with vai.AsyncClient(**world.options(mode), max_retries=0) as client:
        result = await client.messages.run(model=model, messages=asks, tools=[native])
    assert (result.text, result.tool_call_count) == ("done", 1)
    assert done == [(name, {"a": 1})]
    content = result.messages[2]["content"][0]["content"]
    assert content == ("text of a file" if kind == "text_editor" else [vai.image(test_vai.PNG)])


async def test_what_an_acting_tool_raises_is_told() -> None:
    """Its error is for the model to read; a native tool without a function has nobody to run it."""

    def act(name: str, input: JSON) -> None:
        raise ValueError("no such file: /a")

    for native, says in ((vai.text_editor(act), "no such file: /a"), (vai.text_editor(), "no tool")):
        model = vai.FakeModel([vai.tool_use("str_replace_based_edit_tool", command="view", path="/a")], "I see.")
        async with vai.AsyncClient(engine=model) as client:
            result = await client.messages.run(model="anthropic/claude-sonnet-4-5", messages="Go", tools=[native])
        block = result.messages[2]["content"][0]
        assert block["is_error"] is True
        assert says in block["content"]


@pytest.mark.parametrize("name", ["rm", "left_click", "click", "Computer"])
async def test_a_name_that_is_none_of_the_screens(name: str) -> None:
    """A tool that the model made up is not the screen's to do; a member of Anthropic's set is."""
    done: list[str] = []

    def act(name: str, input: JSON) -> str:
        done.append(name)
        return "done"

    block: JSON = vai.tool_use(name)
    for call, acts in ((block, []), ({**block, "toolset_name": "computer"}, [name])):
        answer = vai.Message.model_validate({"id": "m", "model": "x", "content": [call], "usage": {}})
        run_ = vai.FakeModel(answer, "done")
        async with vai.AsyncClient(engine=run_) as client:
            result = await client.messages.run(
                model="anthropic/claude-sonnet-5-5", messages="Go", tools=[vai.computer_use(act)]
            )
        assert (result.steps[0].tool_calls[0].error is None) == bool(acts)
        assert done == acts


# == What cannot be meant ==============================================================================================


@pytest.mark.parametrize("way", ["create", "stream", "run", "run_stream", "extract", "conversation"])
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": [measured]}, "measured is no tool; decorate it with @tool"),
        ({"tools": [forecast, 5]}, "int is no tool"),
        ({"tools": forecast}, "tools is a list of tools; not of the type Tool"),
        ({"tools": measured}, "tools is a list of tools; not of the type function"),
        ({"tools": vai.web_search()}, "tools is a list of tools"),
        ({"tools": {"name": "x", "input_schema": {}}}, "tools is a list of tools"),
        ({"messages": None}, "messages is a text or a list of turns; not of the type NoneType"),
        (
            {"messages": {"role": "user", "content": "Hi"}},
            "messages is a text or a list of turns; not of the type dict",
        ),
    ],
)
async def test_arguments_of_a_wrong_kind(way: str, fields: JSON, says: str) -> None:
    """A TypeError that says what is wanted, before anything is asked; the same for both clients."""
    model = vai.FakeModel("fine")
    request = {"model": "openai/gpt-4o", "messages": "Hi", **fields}
    async with vai.AsyncClient(engine=model) as client:
        with pytest.raises(TypeError, match=says):
            await asked(client, way, request)
    with vai.Client(engine=model) as blocking:
        with pytest.raises(TypeError, match=says):
            await asked(blocking, way, request)
    assert not model.calls


async def asked(client: Any, way: str, request: JSON) -> None:
    method = client.conversation if way == "conversation" else getattr(client.messages, way)
    value = method(str, **request) if way == "extract" else method(**request)
    if inspect.isawaitable(value):
        await value


async def test_no_tools_at_all() -> None:
    """None is not given; tools may be any series."""
    model = vai.FakeModel("one", "two", [vai.tool_use("measured", place="Oslo", hour=1)], "three")
    async with vai.AsyncClient(engine=model) as client:
        for fields in ({"tools": None}, {"tools": ()}, {"tools": (vai.tool(measured),)}):
            result = await client.messages.run(model="openai/gpt-4o", messages="Hi", **fields)  # type: ignore[arg-type]
    assert result.steps[0].tool_calls[0].output == "Oslo 1"
    assert [len(body.get("tools") or ()) for body in model.calls] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("field", "says"),
    [("timeout", "the Client's"), ("max_turns", r"run\(\)"), ("stop_when", r"run\(\)"), ("seed", "extra_body")],
)
async def test_options_of_elsewhere(field: str, says: str) -> None:
    """An argument that `create` has not is a TypeError that says whose it is."""
    async with vai.AsyncClient(engine=vai.FakeModel()) as client:
        with pytest.raises(TypeError, match=f"unknown argument '{field}'; .*{says}"):
            await client.messages.create(model="openai/gpt-4o", messages="Hi", **{field: 5})  # type: ignore[arg-type]


@pytest.mark.parametrize("returned", ["text", [1], 5])
async def test_a_hook_that_returns_no_request(returned: Any) -> None:
    """`before_call` gives a request or None; anything else is a TypeError that names the hook."""
    model = vai.FakeModel("fine")
    async with vai.AsyncClient(engine=model) as client:
        with pytest.raises(TypeError, match="before_call"):
            await client.messages.run(model="openai/gpt-4o", messages="Hi", before_call=lambda body: returned)
    assert not model.calls


# == Results ===========================================================================================================

URL = {"type": "url", "url": "https://example.com/a.png"}
SEARCHED = {"type": "search_result", "source": "s", "title": "t", "content": [vai.text("x")]}
LOOK_ALIKES: list[Any] = [
    {"type": "text"},
    {"type": "text", "text": 7},
    {"type": "text", "text": "x", "lang": "en"},
    {"type": "text", "value": "x"},
    {"type": "image"},
    {"type": "image", "source": "camera"},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "no base64"}},
    {"type": "image", "source": {"type": "url", "url": "a.png"}},
    {"type": "image", "source": URL, "alt": "a cat"},
    {"type": "document", "id": 3},
    {"type": "document", "source": {"path": "/a"}},
    {"type": "search_result", "hits": 3},
    {"type": "tool_use", "id": "t", "name": "n", "input": {}},
    {"type": ["text"], "text": "x"},
    [vai.text("x"), {"type": "text"}],
]


@both_modes
@pytest.mark.parametrize("provider", MODELS)
async def test_data_that_looks_like_a_block(world: World, mode: str, provider: str) -> None:
    """It goes back as JSON: as a block it would make a history that no provider takes."""

    @vai.tool
    def look(number: int) -> Any:
        """Look."""
        return LOOK_ALIKES[number]

    calls = "".join(f'[tool look {{"number":{number}}}]' for number in range(len(LOOK_ALIKES)))
    async with vai.AsyncClient(**world.options(mode), max_retries=0) as client:
        result = await client.messages.run(model=MODELS[provider], messages=f"{calls}[then][say fine]", tools=[look])
    assert result.text == "fine"
    contents = [block["content"] for block in result.messages[2]["content"]]
    assert [json.loads(content) for content in contents] == LOOK_ALIKES


@pytest.mark.parametrize(
    ("value", "content"),
    [
        (vai.text("x"), [vai.text("x")]),
        (vai.Text(text="x", citations=[]), [vai.text("x")]),
        ([vai.text("x"), ""], [vai.text("x")]),
        (vai.text(""), ""),
        ({**vai.text("x"), "cache_control": {"type": "ephemeral"}},) * 2,
        ({"type": "image", "source": URL}, [{"type": "image", "source": URL}]),
        (test_vai.PNG, [vai.image(test_vai.PNG)]),
        ([b"%PDF-1.7"], '["JVBERi0xLjc="]'),
        (("see", vai.document(b"some", "text/plain")), [vai.text("see"), vai.document(b"some", "text/plain")]),
        (SEARCHED, [SEARCHED]),
        ([], "[]"),
        (["a", "b"], '["a", "b"]'),
        (None, "null"),
    ],
)
def test_values_as_results(value: Any, content: Any) -> None:
    """Blocks go as blocks, images as images, anything else as JSON; empty text, which is refused, is left out."""
    found = vai.tool_result("t", value)["content"]
    assert found == ([content] if isinstance(content, dict) else content)


@both_modes
async def test_a_call_after_words(world: World, mode: str) -> None:
    """The phase that OpenAI gives the words of an answer is not put on the call beside them."""
    tools = [vai.tool(measured)]
    asks = '[say Well.][tool measured {"place":"Oslo","hour":1}][then][say So.]'
    async with vai.AsyncClient(**world.options(mode), max_retries=0) as client:
        result = await client.messages.run(model="oai-resp/gpt-6-astra", messages=asks, tools=tools)
    assert result.text == "So."
    words, call = [item for item in world.bodies[1]["input"] if item.get("role") == "assistant" or "arguments" in item]
    assert (words["phase"], "phase" in call) == ("commentary", False)
