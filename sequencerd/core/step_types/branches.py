"""Steps that choose the next step: GoTo, Conditional, Switch, Goal, Split."""

from __future__ import annotations

from math import log1p
from operator import itemgetter
from typing import Annotated

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, model_validator

from sequencerd.core.config import Config, Faults
from sequencerd.core.enrollment import NEVER
from sequencerd.core.faults import DefinitionError, Fault, KeyPath
from sequencerd.core.model import ALT_NEXT, NEXT, Action, Exit, InstantStep, Stay, StepAnswer
from sequencerd.core.step_types.condition_config import (
    ConditionConfig,
    compile_condition,
    describe_wait,
)
from sequencerd.core.step_types.record import ANY, StepType
from sequencerd.core.view import Context


class GoToConfig(Config):
    """Goes to another step, also of another sequence; to altNext if that sequence refuses."""

    step: str | None = None
    """The step to go to. Default: the next step."""
    sequence: str | None = None
    """The sequence of the step, if it is another one."""


def _go_to(config: GoToConfig) -> InstantStep:
    if config.sequence is not None and config.step is None:
        raise DefinitionError([Fault(("sequence",), "needs step as well: where to go in it")])
    if config.step is None:
        return InstantStep(lambda _: Action.NEXT)
    target = Exit("next", ("config", "step"), config.step, config.sequence)
    refused = ALT_NEXT._replace(is_optional=True)  # without altNext the enrollment fails
    exits = (target,) if config.sequence is None else (target, refused)
    return InstantStep(lambda _: target, exits)


class ConditionalConfig(ConditionConfig):
    """Goes to next if the condition is true, otherwise to altNext."""


def _conditional(config: ConditionalConfig) -> InstantStep:
    holds = compile_condition(config)
    return InstantStep(
        lambda context: Action.NEXT if holds(context) else Action.ALT_NEXT,
        (NEXT._replace(condition=config), ALT_NEXT),
    )


class SwitchCase(Config):
    """A branch of a Switch."""

    when: ConditionConfig
    """The condition."""
    step: str | None
    """The step to go to if it is true; null ends the enrollment."""


class SwitchConfig(Config):
    """Goes to the step of the first case whose condition is true, otherwise to next."""

    cases: list[SwitchCase] = Field(min_length=1)
    """The cases, in the order in which they are evaluated."""


def _switch(config: SwitchConfig) -> InstantStep:
    faults = Faults()
    cases = []
    for number, case in enumerate(config.cases):
        path: KeyPath = ("config", "cases", number)
        with faults.at("cases", number, "when"):
            exit_ = Exit(
                f"case {number + 1}",
                (*path, "step"),
                case.step,
                condition=case.when,
                condition_path=(*path, "when"),
            )
            cases.append((compile_condition(case.when), exit_))
    faults.check()

    def answer(context: Context) -> StepAnswer:
        return next((exit_ for holds, exit_ in cases if holds(context)), Action.NEXT)

    return InstantStep(answer, (*(exit_ for _, exit_ in cases), NEXT))


class GoalConfig(ConditionConfig):
    """Moves an enrollment from any step to the goal's next step once the condition is true."""

    repeat: StrictBool = False
    """Whether the goal can be met again after the condition was false. Default: once."""


def _goal(config: GoalConfig) -> InstantStep:
    is_met = compile_condition(config, waits=True)
    return InstantStep(
        lambda context: Action.NEXT if is_met(context) else Stay(NEVER),
        (NEXT._replace(condition=config, at_once="sometimes", reason="if its condition is true"),),
        met=is_met,
        repeats=config.repeat,
    )


Weight = Annotated[StrictInt | StrictFloat, Field(ge=0, le=1e9)]


class SplitWay(Config):
    """A branch of a Split."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    """The name in the history; with the seed it determines which subjects take this branch."""
    weight: Weight
    """The share of subjects, relative to the weights of all branches."""
    step: str | None
    """The step to go to; null ends the enrollment."""


class SplitConfig(Config):
    """Sends a share of the subjects to each branch; a subject always takes the same branch."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [{"required": ["next", "altNext"]}, {"required": ["ways"]}],
        }
    )

    next: Weight | None = None
    """The weight of next."""
    alt_next: Weight | None = None
    """The weight of altNext."""
    ways: list[SplitWay] | None = Field(default=None, min_length=1)
    """Named branches, instead of the weights of next and altNext."""

    @model_validator(mode="after")
    def _check(self) -> SplitConfig:
        has_both = self.next is not None and self.alt_next is not None
        has_any = self.next is not None or self.alt_next is not None
        if has_any if self.ways is not None else not has_both:
            raise ValueError("write the weights of next and altNext, or ways")
        return self


def _split(config: SplitConfig) -> InstantStep:
    if config.ways is not None:
        return _split_ways(config.ways)
    assert config.next is not None
    assert config.alt_next is not None
    if not config.next + config.alt_next:
        raise DefinitionError("next and altNext are weights, of which one must be above 0")
    share = config.next / (config.next + config.alt_next)

    def answer(context: Context) -> StepAnswer:
        return Action.NEXT if _point(context) < share else Action.ALT_NEXT

    return InstantStep(answer, (_weighted(NEXT, config.next), _weighted(ALT_NEXT, config.alt_next)))


def _split_ways(ways: list[SplitWay]) -> InstantStep:
    names = [way.name for way in ways]
    if twice := [n for n, name in enumerate(names) if names.index(name) != n]:
        raise DefinitionError(
            [Fault(("ways", n, "name"), f"way {names[n]!r} is named twice") for n in twice]
        )
    if not any(way.weight for way in ways):
        raise DefinitionError([Fault(("ways",), "one of the weights must be above 0")])
    exits = [
        _weighted(Exit(way.name, ("config", "ways", number, "step"), way.step), way.weight)
        for number, way in enumerate(ways)
    ]
    open_ = [(way, exit_) for way, exit_ in zip(ways, exits, strict=True) if way.weight]

    def answer(context: Context) -> StepAnswer:
        # Each way draws a number for the subject, which its weight scales. A changed weight moves
        # subjects to or from this way alone.
        drawn = [(-log1p(-_point(context, way.name)) / way.weight, exit_) for way, exit_ in open_]
        return min(drawn, key=itemgetter(0))[1]

    return InstantStep(answer, tuple(exits))


def _weighted(exit_: Exit, weight: float) -> Exit:
    return exit_ if weight else exit_._replace(at_once="never")


def _point(context: Context, way: str | None = None) -> float:
    """Return a number from 0 to 1: the same for a subject at each visit, and independent of that
    of other Splits and ways.
    """
    here = context.enrollment
    seed = context.seed or f"{here.sequence}/{here.step}"
    return context.share(seed if way is None else f"{seed}\0{way}")


TYPES = (
    StepType(name="GoTo", config=GoToConfig, compile=_go_to, steps=(("step",),)),
    StepType(name="Conditional", config=ConditionalConfig, compile=_conditional, conditions=((),)),
    StepType(
        name="Switch",
        config=SwitchConfig,
        compile=_switch,
        conditions=(("cases", ANY, "when"),),
        steps=(("cases", ANY, "step"),),
    ),
    StepType(
        name="Goal",
        config=GoalConfig,
        compile=_goal,
        describe=describe_wait,
        conditions=((),),
        is_goal=True,
    ),
    StepType(
        name="Split",
        config=SplitConfig,
        compile=_split,
        steps=(("ways", ANY, "step"),),
        is_seeded=True,
    ),
)
