"""The keys that every step with a side effect takes, and the built-in messages: Email, SMS."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, model_validator
from pydantic.alias_generators import to_camel

from sequencerd.core.config import Config, Faults
from sequencerd.core.languages import LanguageText
from sequencerd.core.model import ALT_NEXT, NEXT, Exit, Limit, RetryPolicy, Skip
from sequencerd.core.step_types.durations import (
    Duration,
    DurationConfig,
    compile_duration,
    elapsed,
    in_words,
)
from sequencerd.core.step_types.record import StepType
from sequencerd.core.step_types.template_config import compile_date, compile_text
from sequencerd.core.view import Context
from sequencerd.core.window_config import WindowConfig


class RetryConfig(Config):
    """How failed side effects are retried. Defaults: those of the runner."""

    attempts: StrictInt | None = Field(default=None, ge=1, le=1000)
    """The number of attempts, including the first one."""
    first_delay: StrictInt | StrictFloat | None = Field(default=None, ge=0, le=86400)
    """Seconds before the second attempt; the delay doubles after each attempt."""
    longest_delay: StrictInt | StrictFloat | None = Field(default=None, ge=0, le=30 * 86400)
    """The longest delay, in seconds."""
    give_up_after: StrictInt | StrictFloat | None = Field(default=None, ge=1, le=365 * 86400)
    """Ends the retries after this many seconds of delays, instead of a number of attempts."""

    def applied(self, policy: RetryPolicy) -> RetryPolicy:
        """Return a runner's policy with these keys; either limit replaces the runner's own."""
        written = self.model_dump(exclude_none=True)
        if written.keys() & {"attempts", "give_up_after"}:
            policy = replace(policy, attempts=None, give_up_after=None)
        return replace(policy, **written)


Topic = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}$")]
"""The name of a topic, as in sequencer.topics."""


SUBJECT = "{{subject}}"
"""The usual key of a limit, which needs no JavaScript."""


class TopicLimitConfig(Config):
    """How many side effects of a topic may begin in any period."""

    key: str = SUBJECT
    """A template; side effects with the same key are counted together."""
    at_most: StrictInt = Field(ge=1, le=1000, alias="at_most")
    """How many."""
    per: Duration
    """The period, such as {days: 7}: weeks to seconds, of elapsed time."""
    then: Literal["wait", "skip", "altNext"] = "wait"
    """What happens at the limit: wait, or continue without the side effect at next or altNext."""

    def compile(self, topic: str | None = None) -> Limit:
        """Compile it. Raises DefinitionError."""
        faults = Faults()
        with faults.at("limit", "per"):
            per = elapsed(self.per)
        with faults.at("limit", "key"):
            key = _subject if self.key == SUBJECT else compile_text(("limit", "key"), self.key)
        faults.check()
        words = f"{self.at_most} in {in_words(self.per.amount, self.per.unit)}"
        return Limit(key, topic, self.at_most, per, self.then, words)


def _subject(context: Context) -> str:
    return context.enrollment.subject


class LimitConfig(TopicLimitConfig):
    """How many side effects may begin in any period, counted over all sequences."""

    topic: Topic | None = None
    """The topic that is counted. Default: the topic of the step, or else only the step itself."""


class EffectConfig(Config):
    """Keys that every step with a side effect accepts, in addition to those of its runner."""

    retry: RetryConfig = Field(default_factory=RetryConfig)
    """How failures are retried."""
    on_error: Literal["fail", "altNext"] = "fail"
    """What happens after the last failure: the enrollment fails, or continues at altNext."""
    delivery: Literal["at_least_once", "at_most_once"] = "at_least_once"
    """at_most_once: not repeated if the outcome is unknown; the enrollment fails instead."""
    expires: str | DurationConfig | None = None
    """When it is too late: a date, a template that renders one, or a duration since arrival."""
    on_expired: Skip = "next"
    """The exit if it is too late."""
    on_suppressed: Skip = "next"
    """The exit if nothing is sent because all recipients are suppressed."""
    topic: Topic | None = None
    """The topic, such as marketing. Default: that of the sequence; null: none."""
    limit: LimitConfig | None = None
    """How many may begin in a period, for each subject or for another key."""
    window: WindowConfig | None = None
    """When it may begin. Default: the window of the sequence; null: at any time."""


EFFECT_KEYS = frozenset(to_camel(name) for name in EffectConfig.model_fields)


def compile_expiry(expires: str | DurationConfig) -> Callable[[Context], datetime]:
    """Compile the time when a side effect is too late. Raises DefinitionError."""
    if isinstance(expires, str):
        return compile_date("expires", expires)
    return compile_duration(expires, ("expires",))


def effect_exits(config: EffectConfig, *, is_message: bool) -> tuple[Exit, ...]:
    """Return the exits of a step with a side effect. Messages only answer next; a custom runner may
    also answer altNext, and noop, which is a wait.
    """
    skips = {config.on_suppressed, config.on_expired if config.expires is not None else "next"}
    if config.limit is not None and config.limit.then == "altNext":
        skips.add("altNext")
    exits = [NEXT]
    if not is_message:
        exits = [NEXT._replace(at_once="sometimes"), ALT_NEXT._replace(at_once="sometimes")]
        exits[1] = exits[1]._replace(is_optional="altNext" not in {config.on_error, *skips})
    elif "altNext" in {config.on_error, *skips}:
        exits.append(ALT_NEXT)
    if "end" in skips:
        exits.append(Exit("end", ("config",)))
    return tuple(exits)


# --- messages

HEADERS = ("In-Reply-To", "References", "Precedence", "Auto-Submitted", "Feedback-ID")
"""The headers that a config may set, next to X-... and List-..."""

_HEADER_NAME = re.compile(rf"(?:X-|List-)[A-Za-z0-9-]+|{'|'.join(HEADERS)}", re.IGNORECASE)


class AttachmentConfig(Config):
    """A file, from the data or from a URL. All texts are templates."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["url"]}, {"required": ["base64"]}]}
    )

    url: str | None = None
    """The URL of the file, at a host that the settings allow. If empty, nothing is attached."""
    base64: str | None = None
    """The content, such as {{data.pdf}}, instead of a URL. If empty, nothing is attached."""
    filename: str | None = None
    """The name of the file. Default: the last part of the URL."""
    content_type: str | None = None
    """The type, such as application/pdf. Default: derived from the name."""
    content_id: str | None = None
    """The id by which html refers to an image, as cid:..."""
    inline: StrictBool = False
    """Whether html refers to it, by its name if there is no contentId."""

    @model_validator(mode="after")
    def _check(self) -> AttachmentConfig:
        if (self.url is None) == (self.base64 is None):
            raise ValueError("write either url or base64")
        return self


MAX_ATTACHMENTS = 10


class EmailConfig(Config):
    """Sends an e-mail. All texts are templates."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["text"]}, {"required": ["html"]}]}
    )

    from_: str = Field(alias="from")
    """The sender, such as Shop <hi@example.com>."""
    to: str | list[str]
    """Addresses, such as {{data.email}}."""
    cc: str | list[str] | None = None
    """Further recipients; empty ones are left out."""
    bcc: str | list[str] | None = None
    """Recipients that the others do not see."""
    reply_to: str | list[str] | None = None
    """The address for replies."""
    subject: LanguageText
    """The subject line, or one for each language, such as {en: Hello, de: Hallo}."""
    text: LanguageText | None = None
    """The message in plain text. Write text, html or both."""
    html: LanguageText | None = None
    """The message in HTML; {{x}} is escaped."""
    attachments: list[AttachmentConfig] = Field(default_factory=list, max_length=MAX_ATTACHMENTS)
    """Attached files, and images for html."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Additional headers: X-..., List-... and a few others."""
    list_unsubscribe: str | None = None
    """A URL for unsubscribing with one click."""
    strict: StrictBool = False
    """Whether a missing value is an error. Default: it is empty."""
    many: bool = False
    """Whether a value may contain several addresses, separated by commas."""

    @model_validator(mode="after")
    def _check(self) -> EmailConfig:
        if self.text is None and self.html is None:
            raise ValueError("text or html is missing: write one of them, or both")
        for name in self.headers:
            if not _HEADER_NAME.fullmatch(name):
                raise ValueError(
                    f"headers: {name!r} cannot be set here: write X-..., List-..., "
                    f"{', '.join(HEADERS)}"
                )
        return self


class SmsConfig(Config):
    """Sends an SMS. All texts are templates."""

    from_: str | None = Field(None, alias="from")
    """The sender's number."""
    to: str
    """The number, with its country code, such as {{data.phone}}."""
    message: LanguageText
    """The text, or one for each language, such as {en: Hello, de: Hallo}."""
    messaging_service_sid: str | None = None
    """The id of a messaging service at Twilio, instead of a sender."""
    strict: StrictBool = False
    """Whether a missing value is an error."""
    status_callback: str | None = None
    """A URL to which Twilio reports the status of the message."""


def _message(name: str, config: type[Config], *localised: str) -> StepType:
    own = (field.alias or key for key, field in config.model_fields.items())
    return StepType(
        name=name,
        config=config,
        never_alt=(
            'never taken: write "onError: altNext" (or onSuppressed, or onExpired with expires) '
            "into the config, or leave altNext out"
        ),
        templates=(*own, "expires"),
        localised=localised,
    )


EMAIL = _message("Email", EmailConfig, "subject", "text", "html")
SMS = _message("SMS", SmsConfig, "message")
TYPES = (EMAIL, SMS)
