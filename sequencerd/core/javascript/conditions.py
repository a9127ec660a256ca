"""Conditions with lodash's functions: Boolean(_[command](value, compareTo))."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sequencerd.core.config import Faults
from sequencerd.core.faults import DefinitionError, EvaluationError, Fault
from sequencerd.core.javascript import sandbox

_NAMES = """
    add assign assignIn assignInWith assignWith at attempt bindAll bindKey camelCase capitalize
    castArray ceil chain chunk clamp clone cloneDeep cloneDeepWith cloneWith compact concat cond
    conforms conformsTo constant countBy create deburr defaultTo defaults defaultsDeep difference
    differenceBy differenceWith divide drop dropRight dropRightWhile dropWhile each eachRight
    endsWith entries entriesIn eq escape escapeRegExp every extend extendWith fill filter find
    findIndex findKey findLast findLastIndex findLastKey first flatMap flatMapDeep flatMapDepth
    flatten flattenDeep flattenDepth floor flow flowRight forEach forEachRight forIn forInRight
    forOwn forOwnRight fromPairs functions functionsIn get groupBy gt gte has hasIn head identity
    inRange includes indexOf initial intersection intersectionBy intersectionWith invert invertBy
    invoke invokeMap isArguments isArray isArrayBuffer isArrayLike isArrayLikeObject isBoolean
    isBuffer isDate isElement isEmpty isEqual isEqualWith isError isFinite isFunction isInteger
    isLength isMap isMatch isMatchWith isNaN isNative isNil isNull isNumber isObject isObjectLike
    isPlainObject isRegExp isSafeInteger isSet isString isSymbol isTypedArray isUndefined isWeakMap
    isWeakSet iteratee join kebabCase keyBy keys keysIn last lastIndexOf lowerCase lowerFirst lt
    lte map mapKeys mapValues matches matchesProperty max maxBy mean meanBy merge mergeWith method
    methodOf min minBy multiply noop nth nthArg omit omitBy orderBy over overArgs overEvery
    overSome pad padEnd padStart parseInt partition pick pickBy property propertyOf pull pullAll
    pullAllBy pullAllWith pullAt range rangeRight reduce reduceRight reject remove repeat replace
    result reverse round set setWith size slice snakeCase some sortBy sortedIndex sortedIndexBy
    sortedIndexOf sortedLastIndex sortedLastIndexBy sortedLastIndexOf sortedUniq sortedUniqBy split
    startCase startsWith stubArray stubFalse stubObject stubString stubTrue subtract sum sumBy tail
    take takeRight takeRightWhile takeWhile times toArray toFinite toInteger toLength toLower
    toNumber toPairs toPairsIn toPath toPlainObject toSafeInteger toString toUpper transform trim
    trimEnd trimStart truncate unescape union unionBy unionWith uniq uniqBy uniqWith unset unzip
    unzipWith update updateWith upperCase upperFirst values valuesIn without words wrap xor xorBy
    xorWith zip zipObject zipObjectDeep zipWith
"""

COMMANDS = frozenset(_NAMES.split()) | {"sampleSize", "shuffle", "uniqueId"}
"""The commands that a definition may name. The last three give random values, but always true."""

_NEEDS_FUNCTIONS = """
    after ary before bind curry curryRight debounce defer delay flip memoize negate once partial
    partialRight rearg rest spread tap throttle thru unary
"""

LEFT_OUT = {
    **dict.fromkeys(
        _NEEDS_FUNCTIONS.split(), "it needs a function, which a definition cannot contain"
    ),
    **dict.fromkeys(("random", "sample"), "its result is random"),
    **dict.fromkeys(("mixin", "noConflict", "runInContext"), "it changes lodash itself"),
    "now": "it reads the clock",
    "template": "it runs a text as code",
}
"""The commands of lodash that a definition may not name, with the reason."""

_ALWAYS_TRUE = """
    assign assignIn assignInWith assignWith at attempt bindKey castArray chain chunk compact concat
    cond conforms constant countBy create defaults defaultsDeep difference differenceBy
    differenceWith drop dropRight dropRightWhile dropWhile entries entriesIn extend extendWith fill
    filter flatMap flatMapDeep flatMapDepth flatten flattenDeep flattenDepth flow flowRight
    fromPairs functions functionsIn groupBy initial intersection intersectionBy intersectionWith
    invert invertBy invokeMap iteratee keyBy keys keysIn map mapKeys mapValues matches
    matchesProperty merge mergeWith method methodOf nthArg omit omitBy orderBy over overArgs
    overEvery overSome partition pick pickBy property propertyOf pullAt range rangeRight reject
    remove sampleSize shuffle slice sortBy sortedUniq sortedUniqBy split stubArray stubObject
    stubTrue tail take takeRight takeRightWhile takeWhile times toArray toPairs toPairsIn toPath
    toPlainObject transform union unionBy unionWith uniq uniqBy uniqWith uniqueId unzip unzipWith
    values valuesIn without words wrap xor xorBy xorWith zip zipObject zipObjectDeep zipWith
"""

ALWAYS_TRUE = frozenset(_ALWAYS_TRUE.split())
"""Commands that return a list, an object or a function, which is true even if it is empty."""

_ALWAYS_FALSE = """
    isArguments isArrayBuffer isBuffer isDate isElement isError isMap isNaN isRegExp isSet isSymbol
    isTypedArray isWeakMap isWeakSet noop stubFalse stubString
"""

ALWAYS_FALSE = frozenset(_ALWAYS_FALSE.split())
"""Commands that test for what JSON cannot contain, such as a date, or return nothing."""

_OTHER_NAMES = {
    "eq": "= == === equal equals equalto false is isfalse istrue same sameas true",
    "gt": "> above after bigger biggerthan exceeds greater greaterthan larger largerthan later "
    "laterthan more morethan",
    "gte": ">= atleast ge geq greaterequal greaterorequal greaterorequalto greaterthanequal "
    "greaterthanequals greaterthanequalto greaterthanorequal greaterthanorequals "
    "greaterthanorequalto gteq minimum notlessthan onorafter since",
    "lt": "< before below earlier earlierthan fewer fewerthan less lessthan lower lowerthan "
    "smaller smallerthan under",
    "lte": "<= atmost le leq lessequal lessorequal lessorequalto lessthanequal lessthanequals "
    "lessthanequalto lessthanorequal lessthanorequals lessthanorequalto lteq maximum "
    "notgreaterthan onorbefore until upto",
    "includes": "contain containing contains haselement hasitem hasvalue in include including "
    "inlist isin member memberof oneof",
    "isEqual": "deepequal deepequals equaldeep identical isequalto isidentical matchesexactly",
    "startsWith": "beginswith beginwith hasprefix prefix startwith",
    "endsWith": "endwith hassuffix suffix",
    "inRange": "between isbetween within",
    "isEmpty": "blank empty isblank",
    "isNil": "isabsent ismissing isnone isnotset isunset missing none null nil notset undefined",
    "isMatch": "match matchobject objectmatches",
    "has": "exist exists hasfield haskey haspath hasproperty present ispresent",
    "size": "count len length",
    "isNaN": "nan notanumber",
}
"""Names of the commands in other languages: in lower case, without separators."""

_OPPOSITES = {
    "eq": "!= !== <> differs differsfrom different doesnotequal doesntequal isnot "
    "isnotequal isnotequalto ne neq not noteq notequal notequals notequalto unequal",
    "includes": "doesnotcontain doesnotinclude doesntcontain excludes nin notcontains notin "
    "notinlist notincludes",
    "isEmpty": "isnotblank isnotempty nonempty notblank notempty",
    "isNil": "isdefined isnotmissing isnotnil isnotnull isnotundefined notmissing notnil notnull "
    "notundefined",
    "isEqual": "deepnotequal notdeepequal",
    "startsWith": "notstartswith doesnotstartwith",
    "endsWith": "notendswith doesnotendwith",
}
"""Names of conditions for which lodash has only the opposite."""

_OF_TIMES = ("isAfter", "isBefore", "isBetween", "isSame", "isSameOrAfter", "isSameOrBefore")
"""Commands of moment, which compares times."""

PLAIN_PATH = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)
"""A path of names separated by dots, the usual form."""


class Operand(BaseModel):
    """An operand: `{"type": "get", "value": path}` reads the enrollment,
    `{"type": "raw", "value": x}` is the value x, and `{"type": "now"}` is the current time.

    A path is a text such as "data.items[0].name", a list of keys, or anything else that lodash
    accepts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    type: Literal["get", "raw", "now"]
    """get: the value at a path of the enrollment; raw: the value itself; now: the current time."""
    value: object = None
    """The path, such as data.items[0].name, or the value."""


@dataclass(frozen=True, slots=True)
class Predicate:
    """A compiled condition; `roots` are the first keys of the paths that it reads."""

    command: str
    program: str
    roots: frozenset[str]

    def __call__(self, view: str) -> bool:
        """Evaluate the condition for an enrollment, given its view as JSON text.

        Raises EvaluationError if lodash throws or a limit is reached.
        """
        return bool(self._evaluated("condition", view))

    def operands(self, view: str) -> tuple[str | None, str | None]:
        """Return the compared values as JSON, for explanations; None for undefined."""
        value, compare_to = json.loads(self._evaluated("operands", view))
        return value, compare_to

    def _evaluated(self, maker: Literal["condition", "operands"], view: str) -> Any:
        try:
            return sandbox.evaluate(maker, self.program, view)
        except sandbox.ThrownError as error:
            raise EvaluationError("error", f"lodashCommand {self.command}: {error}") from error
        except sandbox.LimitError as error:
            message = f"lodashCommand {self.command}: {error}"
            raise EvaluationError("bad_data", message) from error


def compile_predicate(command: str, value: Operand, compare_to: Operand | None) -> Predicate:
    """Compile a condition. Raises DefinitionError for an unknown command or an invalid path."""
    known_command(command)
    operands = {"value": value, "compareTo": compare_to}
    faults = Faults()
    roots = set()
    for name, operand in operands.items():
        if operand is not None and operand.type == "get":
            with faults.at(name):
                roots.add(first_key(operand))
    faults.check()
    given = {
        name: operand.model_dump(include={"type", "value"}, exclude_unset=True)
        for name, operand in operands.items()
        if operand is not None
    }
    try:
        program = json.dumps({"command": command, **given}, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise DefinitionError(f"the operands are not JSON: {error}") from error
    return Predicate(command, program, frozenset(root for root in roots if root is not None))


def known_command(command: str) -> str:
    """Return the command. Raises DefinitionError for an unknown one."""
    if command in COMMANDS:
        return command
    if reason := LEFT_OUT.get(command):
        meant = f"; {_meant(command)}" if command in ("after", "before") else ""
        raise DefinitionError(f"{command!r} is not available, because {reason}{meant}")
    meant = _meant(command)
    for one in _OF_TIMES:
        if one.lower() == command.lower():
            meant += f" For times, write momentCommand: {one}"
    raise DefinitionError(f"{command!r} is not known; {meant}")


def _meant(command: str) -> str:
    """Return which command is probably meant, as the end of a sentence."""
    names: dict[str, str] = {}
    for known, others in _OTHER_NAMES.items():
        names |= dict.fromkeys(others.split(), f"did you mean {known!r}?")
    for known, others in _OPPOSITES.items():
        names |= dict.fromkeys(others.split(), f"write the opposite of {known!r}")
    names |= {known.lower(): f"did you mean {known!r}?" for known in sorted(COMMANDS)}
    key = re.sub(r"[\s_.-]", "", command).lower()
    for found in (key, key.removeprefix("is"), *get_close_matches(key, names, n=1)):
        if found in names:
            return names[found]
    return (
        "write a function of lodash such as eq, gt, gte, lt, lte, includes, isEqual or startsWith"
    )


def first_key(operand: Operand) -> str | None:
    """Return the first key of a path; None for an empty path. Raises DefinitionError."""
    if "value" not in operand.model_fields_set:
        return "undefined"
    keys = path_keys(operand.value)
    return keys[0] if keys else None


def path_keys(path: object) -> list[str]:
    """Return the keys of a path. Raises DefinitionError."""
    if isinstance(path, str) and PLAIN_PATH.fullmatch(path):
        return path.split(".")
    try:
        keys: list[str] = json.loads(sandbox.ask("keys", json.dumps(path, allow_nan=False)))
    except (sandbox.ThrownError, sandbox.LimitError, ValueError, RecursionError) as error:
        raise DefinitionError([Fault(("value",), f"is not a path: {error}")]) from error
    return keys
