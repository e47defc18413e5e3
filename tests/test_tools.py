"""`@tool`: what a model is told of a function, and what the function gets of a call."""

import dataclasses
import enum
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel

import vai
from sandbox import Sandbox


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
