"""What JavaScript's values inherit: `get` reaches "toString" of any object, as lodash's does.

The names are data in a table, with the number of parameters that each function declares; nothing
is looked up on a Python object. Rule: ECMAScript 2024, chapters 20 to 23 and annex B.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """A function of JavaScript's own: it can be told apart, and a few can be called."""

    name: str
    length: int
    properties: dict[str, object] = field(default_factory=dict, repr=False)


class Prototype(dict[str, object]):
    """An object of JavaScript's own. Its properties are not enumerable: as data it is empty."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.properties: dict[str, object] = {}


# name, or name:parameters
_METHODS = {
    "Object.prototype": """
        __defineGetter__:2 __defineSetter__:2 hasOwnProperty:1 __lookupGetter__:1
        __lookupSetter__:1 isPrototypeOf:1 propertyIsEnumerable:1 toString valueOf
        toLocaleString
    """,
    "Function.prototype": """
        apply:2 bind:1 call:1 toString
    """,
    "Array.prototype": """
        at:1 concat:1 copyWithin:2 fill:1 find:1 findIndex:1 findLast:1 findLastIndex:1
        lastIndexOf:1 pop push:1 reverse shift unshift:1 slice:2 sort:1 splice:2 includes:1
        indexOf:1 join:1 keys entries values forEach:1 filter:1 flat flatMap:1 map:1 every:1
        some:1 reduce:1 reduceRight:1 toLocaleString toString toReversed toSorted:1
        toSpliced:2 with:2
    """,
    "String.prototype": """
        anchor:1 at:1 big blink bold charAt:1 charCodeAt:1 codePointAt:1 concat:1 endsWith:1
        fontcolor:1 fontsize:1 fixed includes:1 indexOf:1 isWellFormed italics lastIndexOf:1
        link:1 localeCompare:1 match:1 matchAll:1 normalize padEnd:1 padStart:1 repeat:1
        replace:2 replaceAll:2 search:1 slice:2 small split:2 strike sub substr:2
        substring:2 sup startsWith:1 toString toWellFormed trim trimStart trimLeft trimEnd
        trimRight toLocaleLowerCase toLocaleUpperCase toLowerCase toUpperCase valueOf
    """,
    "Number.prototype": """
        toExponential:1 toFixed:1 toPrecision:1 toString:1 valueOf toLocaleString
    """,
    "Boolean.prototype": """
        toString valueOf
    """,
    "Object": """
        assign:2 getOwnPropertyDescriptor:2 getOwnPropertyDescriptors:1
        getOwnPropertyNames:1 getOwnPropertySymbols:1 hasOwn:2 is:2 preventExtensions:1
        seal:1 create:2 defineProperties:2 defineProperty:3 freeze:1 getPrototypeOf:1
        setPrototypeOf:2 isExtensible:1 isFrozen:1 isSealed:1 keys:1 entries:1 fromEntries:1
        values:1
    """,
    "Array": """
        isArray:1 from:1 of
    """,
    "String": """
        fromCharCode:1 fromCodePoint:1 raw:1
    """,
    "Number": """
        isFinite:1 isInteger:1 isNaN:1 isSafeInteger:1 parseFloat:1 parseInt:2
    """,
}

_ALIASES = {"trimLeft": "trimStart", "trimRight": "trimEnd"}  # whose `name` is the other one's

_NUMBERS: dict[str, object] = {
    "MAX_VALUE": 1.7976931348623157e308,
    "MIN_VALUE": 5e-324,
    "NaN": float("nan"),
    "NEGATIVE_INFINITY": float("-inf"),
    "POSITIVE_INFINITY": float("inf"),
    "MAX_SAFE_INTEGER": 2**53 - 1,
    "MIN_SAFE_INTEGER": -(2**53 - 1),
    "EPSILON": 2.0**-52,
}


def _methods(owner: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for word in _METHODS.get(owner, "").split():
        name, _, length = word.partition(":")
        found[name] = Function(_ALIASES.get(name, name), int(length or 0))
    return found


def _prototypes() -> dict[str, Prototype]:
    built = {}
    for owner in ("Object", "Function", "Array", "String", "Number", "Boolean"):
        prototype = built[owner] = Prototype(owner)
        constructor = Function(owner, 1)
        prototype.properties.update(_methods(f"{owner}.prototype"), constructor=constructor)
        constructor.properties.update(_methods(owner), prototype=prototype)
        if owner == "Number":
            constructor.properties.update(_NUMBERS)
        if owner in ("Function", "Array", "String"):
            prototype.properties["length"] = 0
    built["Function"].properties["name"] = ""
    return built


PROTOTYPES = _prototypes()
"""Object, Function, Array, String, Number and Boolean: what `constructor.prototype` reaches."""
