"""The daemon's settings: their sections, their values, and what must go together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from sequencerd import passwords
from sequencerd.core.model import (
    CALL_LIMITS,
    DEFAULT_RETRY,
    LOOKUP_LIMITS,
    MESSAGE_LIMITS,
    MESSAGE_RETRY,
    Limits,
    RetryPolicy,
)
from sequencerd.core.routing import ShardNumber
from sequencerd.errors import SettingsError
from sequencerd.urls import check_base_url, check_origin, check_url

SCHEMA = "sequencer"
"""The schema of the tables, by default."""

CREDSTORE = Path("/etc/credstore")
CREDENTIALS = Path("/run/credentials")

CONSOLE_LISTEN = "127.0.0.1:9187"
"""The default address of the console."""


def _read_secret(value: object, info: ValidationInfo) -> object:
    """Return a secret, which may be given as `{file = "NAME"}`."""
    if not isinstance(value, dict):
        return value
    if set(value) != {"file"} or not isinstance(value["file"], str):
        raise ValueError('write the secret, or {file = "NAME"}')
    return read_secret_file(value["file"], (info.context or {}).get("folder"))


def read_secret_file(name: str, folder: str | None) -> str:
    """Return the text of a file without the line end. A relative name is that of a systemd
    credential; for a command outside of the service, the file from which the units load it.
    """
    if folder is not None or Path(name).is_absolute():
        files = [Path(folder or "/", name)]
    else:
        files = [CREDSTORE / f"sequencerd.{name}", *CREDENTIALS.glob(f"sequencerd*.service/{name}")]
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig").strip()  # some editors write one
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not text in UTF-8") from None
        except OSError as error:
            if file == files[-1]:
                if isinstance(error, PermissionError):
                    raise ValueError(f"{error}; use sudo") from error
                if folder is None and file != Path(name):
                    raise ValueError(
                        f"there is no credential {name!r}: neither {files[0]} nor one of a running "
                        "service, and $CREDENTIALS_DIRECTORY is not set"
                    ) from error
                raise ValueError(str(error)) from error
        else:
            if not text:
                raise ValueError(f"{file} is empty")
            return text
    raise AssertionError(files)


Secret = Annotated[SecretStr, BeforeValidator(_read_secret)]


def secret_values(secrets: Mapping[str, SecretStr]) -> dict[str, str]:
    """Return secrets as texts, by the same keys."""
    return {key: value.get_secret_value() for key, value in secrets.items()}


OptionalUrl = Annotated[Secret | None, AfterValidator(lambda value: value or None)]
"""None for an empty text, as a variable without a value is not set."""

HttpUrl = Annotated[str, AfterValidator(check_url)]
BaseUrl = Annotated[str, AfterValidator(check_base_url)]
Origin = Annotated[str, AfterValidator(check_origin)]


def _read_duration(value: object) -> timedelta:
    try:
        duration = TypeAdapter(timedelta).validate_python(value)
    except ValidationError:
        duration = timedelta(0)
    if not timedelta(days=1) <= duration <= timedelta(days=36500):
        raise ValueError('write a duration of a day or more, such as "90 days" or "P1Y"')
    return duration


TimeSpan = Annotated[timedelta, BeforeValidator(_read_duration)]


def _read_words(value: object) -> object:
    """Return a list; a variable separates its items by blanks or commas."""
    return re.split(r"[\s,]+", value.strip()) if isinstance(value, str) else value


WordList = Annotated[tuple[str, ...], BeforeValidator(_read_words)]


def _read_groups(value: object) -> object:
    """Return a list; a variable separates its items by commas, because a group's name may contain
    blanks.
    """
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


GroupList = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_read_groups)
]


def _check_patterns(patterns: tuple[str, ...]) -> tuple[str, ...]:
    patterns = tuple(filter(None, patterns))
    for pattern in patterns:
        if not re.search(r"[@*+:]", pattern):
            raise ValueError(
                f"{pattern!r} matches no recipient: write addresses, numbers, or patterns such as "
                '"*@example.com" or "+49*"'
            )
    return patterns


PatternList = Annotated[WordList, AfterValidator(_check_patterns)]
"""Patterns of recipients; an empty list means none."""


class Section(BaseModel):
    """A section of the settings. Unknown keys are errors: a misspelt setting must not be ignored
    silently.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_number(cls, value: object, info: ValidationInfo) -> object:
        """Reject true and false for a number: for pydantic, they are 1 and 0."""
        type_ = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and (numbers := {int, float} & {type_, *get_args(type_)}):
            raise PydanticKnownError("int_type" if int in numbers else "float_type")
        return value


def _check_schema(name: str) -> str:
    if not name.isprintable() or re.search(r"['%$\\]", name):
        raise ValueError(f"{name!r}: a schema cannot have ', %, $, \\ or a control character")
    if not 1 <= len(name.encode()) <= 63:  # PostgreSQL would truncate a longer one
        raise ValueError(f"{name!r}: the name of a schema has 1 to 63 bytes")
    if re.match(r"pg_|information_schema$|public$", name):
        raise ValueError(f"the schema {name} is not for sequencerd alone; choose another name")
    return name


SchemaName = Annotated[str, AfterValidator(_check_schema)]


class DatabaseSettings(Section):
    """The database of the tables. Default: an embedded PostgreSQL in the user's data folder.

    `listen_url` is the server's own address if `url` is a pooler's.
    """

    url: OptionalUrl = None
    listen_url: OptionalUrl = None
    schema_name: SchemaName = Field(default=SCHEMA, alias="schema")
    listen: bool = True
    connections: int = Field(default=5, ge=2, le=100)
    lookup_connections: int = Field(default=3, ge=1, le=100)
    lookup_timeout: float = Field(default=30.0, ge=0.1, le=600)

    @property
    def pooled(self) -> bool:
        """Return whether `url` is that of a pooler in transaction mode."""
        return self.listen_url is not None or not self.listen


ShardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")]


class ShardSettings(Section):
    """The database of one shard: [shards.NAME], instead of the same keys of [database]."""

    url: Secret
    listen_url: Secret | None = None
    schema_name: SchemaName = Field(default=SCHEMA, alias="schema")


class EngineSettings(Section):
    """The parameters of the engine. Times are in seconds."""

    batch: int = Field(default=1000, ge=1, le=10_000)
    lease: float = Field(default=30.0, ge=1, le=3600)
    sweep: float = Field(default=60.0, ge=0.05, le=3600)
    stop_timeout: float = Field(default=20.0, ge=0, le=3600)


class RetrySettings(Section):
    """The default retries of a runner's steps; times are in seconds."""

    attempts: int | None = Field(default=DEFAULT_RETRY.attempts, ge=1, le=1000)
    first_delay: float = Field(default=DEFAULT_RETRY.first_delay, ge=0, le=86400)
    longest_delay: float = Field(default=DEFAULT_RETRY.longest_delay, ge=0, le=30 * 86400)
    give_up_after: float | None = Field(default=DEFAULT_RETRY.give_up_after, ge=1, le=365 * 86400)

    @property
    def retry(self) -> RetryPolicy:
        """Return the policy in the form of steps: one of the two limits that is set replaces the
        default of the other.
        """
        ends = {"attempts", "give_up_after"}
        ends = ends & self.model_fields_set or ends
        return RetryPolicy(
            self.attempts if "attempts" in ends else None,
            self.first_delay,
            self.longest_delay,
            self.give_up_after if "give_up_after" in ends else None,
        )


class ServerSettings(RetrySettings):
    """A server that executes side effects, and its limits."""

    concurrency: int = Field(default=MESSAGE_LIMITS.concurrency, ge=1, le=1000)
    timeout: float = Field(default=MESSAGE_LIMITS.timeout, gt=0, le=600)
    per_second: float | None = Field(default=MESSAGE_LIMITS.per_second, gt=0)

    @property
    def limits(self) -> Limits:
        """Return the limits in the form of runners."""
        return Limits(self.concurrency, self.timeout, per_second=self.per_second)


class MessagingSettings(ServerSettings):
    """A server for messages, which are retried for a period by default. `suppress_bounces`:
    suppress addresses that do not exist according to the server.
    """

    attempts: int | None = Field(default=MESSAGE_RETRY.attempts, ge=1, le=1000)
    first_delay: float = Field(default=MESSAGE_RETRY.first_delay, ge=0, le=86400)
    give_up_after: float | None = Field(default=MESSAGE_RETRY.give_up_after, ge=1, le=365 * 86400)
    suppress_bounces: bool = True


class OAuthSettings(Section):
    """A source of access tokens (RFC 6749): for the client, or with `refresh_token` for a user."""

    token_url: HttpUrl
    client_id: str
    client_secret: Secret | None = None
    scope: str | None = None
    refresh_token: Secret | None = None


class EmailSettings(MessagingSettings):
    """The mail server: smtp://user:password@host:587, or smtps://... for TLS from the start.

    `timeout` applies to each reply of the server, except for the reply to the message itself, which
    may take the time that RFC 5321 allows. `oauth` or `token_command` replace the password.
    `only_to` restricts messages to matching recipients, for staging; `attachments_from` lists
    patterns of allowed URLs of attachments. `bounce_address` is the envelope sender.
    """

    url: Secret | None = None
    timeout: float = Field(default=300.0, gt=0, le=600)
    hello_name: str | None = None
    oauth: OAuthSettings | None = None
    token_command: str | None = None
    list_unsubscribe: str | None = None
    bounce_address: str | None = None
    only_to: PatternList | None = None
    attachments_from: WordList = ()

    @field_validator("bounce_address")
    @classmethod
    def _check_bounce_address(cls, value: str | None) -> str | None:
        local = r"[A-Za-z0-9!#$%&'*+/=?^_`|~.-]{0,16}"  # of the 64 that there may be
        if value is not None and not re.fullmatch(rf"{local}\{{token\}}@[A-Za-z0-9.-]+", value):
            raise ValueError('write an address such as "bounces+{token}@example.com"')
        return value

    @model_validator(mode="after")
    def _check_tokens(self) -> EmailSettings:
        if self.oauth is not None and self.token_command is not None:
            raise ValueError("write oauth or token_command, not both")
        return self

    @property
    def server(self) -> str:
        """Return the URL; by default that of a mail server on this machine."""
        return self.url.get_secret_value() if self.url else "smtp://localhost:25"


class SmsSettings(MessagingSettings):
    """A Twilio account, or another gateway: its URL, and a template of the JSON body."""

    provider: Literal["twilio", "http"] = "twilio"
    account_sid: str | None = None
    auth_token: Secret | None = None
    base_url: BaseUrl = "https://api.twilio.com"
    hook_url: HttpUrl | None = None
    url: HttpUrl | None = None
    body: str | None = None
    headers: dict[str, Secret] = {}
    allow_private: bool = False
    only_to: PatternList | None = None


class EndpointSettings(Section):
    """The destination of calls: a URL, or an AWS Lambda function."""

    url: HttpUrl | None = None
    arn: str | None = Field(default=None, alias="lambda")
    allow_private: bool = False
    headers: dict[str, Secret] = {}

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if (self.url is None) == (self.arn is None):
            raise ValueError("write url, or lambda with the ARN of a function")
        for key in ("secret", "headers", "http2"):
            if self.arn is not None and key in self.model_fields_set:
                raise ValueError(
                    f"{key} is for a url: Lambda's calls are signed by AWS credentials"
                )
        return self


class HttpRunnerSettings(EndpointSettings, ServerSettings):
    """A custom runner in any language: [runners.NAME]."""

    concurrency: int = Field(default=CALL_LIMITS.concurrency, ge=1, le=1000)
    timeout: float = Field(default=CALL_LIMITS.timeout, gt=0, le=3600)
    batch_size: int = Field(default=CALL_LIMITS.batch_size, ge=1, le=1000)
    batch_bytes: int | None = Field(default=None, ge=1000, le=100_000_000)
    secret: Secret | None = None
    http2: bool = True

    @property
    def limits(self) -> Limits:
        """Return the limits in the form of runners."""
        return replace(super().limits, batch_size=self.batch_size)


class LookupSettings(EndpointSettings):
    """A source of external data: [lookups.NAME]. `form` is the format of the request: a list of
    subjects, or the original's `{"runners": [...]}`, the default for Lambda functions.
    """

    form: Literal["list", "original"] | None = None
    timeout: float = Field(default=LOOKUP_LIMITS.timeout, gt=0, le=600)
    batch_size: int = Field(default=LOOKUP_LIMITS.batch_size, ge=1, le=10_000)
    concurrency: int = Field(default=LOOKUP_LIMITS.concurrency, ge=1, le=100)

    @property
    def limits(self) -> Limits:
        """Return the limits in the form of lookups."""
        return Limits(self.concurrency, self.timeout, self.batch_size)


def _check_address(text: str) -> str:
    split_address(text)
    return text


def is_loopback(listen: str) -> bool:
    """Return whether an address can be reached only from this machine."""
    host, _ = split_address(listen)
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def split_address(text: str) -> tuple[str, int]:
    """Return the host and port in "127.0.0.1:9187", "[::1]:9187" or "9187" (loopback)."""
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and int(port) < 65536
    if not is_port or text.startswith(":") or "/" in host:
        raise ValueError('write a host and a port, such as "127.0.0.1:9187"')
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


class HttpSettings(Section):
    """The listener for health checks, metrics and the console; none without an address.

    `public_listen` is the address of the pages for recipients and of Twilio's hook, which otherwise
    share `listen`.
    """

    listen: Annotated[str, AfterValidator(_check_address)] | None = None
    public_listen: Annotated[str, AfterValidator(_check_address)] | None = None


def _read_keys(value: object, info: ValidationInfo) -> object:
    """Return a list of secrets; a file or a variable has one on each line, or separates them by
    blanks.
    """
    value = _read_secret(value, info)
    keys = value.split() if isinstance(value, str) else value
    return [_read_secret(key, info) for key in keys] if isinstance(keys, list) else keys


class UnsubscribeSettings(Section):
    """The page with which recipients unsubscribe: its URL, and the keys of its links, of which the
    first one signs and all verify.
    """

    url: BaseUrl
    keys: Annotated[tuple[SecretStr, ...], BeforeValidator(_read_keys)] = Field(min_length=1)

    @field_validator("keys")
    @classmethod
    def _check_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(key.get_secret_value()) < 32 for key in value):
            raise ValueError("a key has fewer than 32 characters; openssl rand -hex 32 prints one")
        return value


Role = Literal["viewer", "operator", "editor"]
"""What a user of the console may do: read; also change enrollments; also change definitions."""


def _check_password_hash(value: SecretStr) -> SecretStr:
    if not passwords.is_hash(value.get_secret_value()):
        raise ValueError("this is not what `sequencerd console-password` prints")
    return value


PasswordHash = Annotated[Secret, AfterValidator(_check_password_hash)]


class ConsoleUserSettings(Section):
    """A user of the console: [console.users.NAME]."""

    password_hash: PasswordHash
    role: Role = "viewer"


class OidcSettings(Section):
    """A provider of OpenID Connect, with which users log in to the console. `url` is the address at
    which browsers reach the listener; the provider redirects them to /console/oidc there.
    """

    issuer: BaseUrl
    client_id: str = Field(min_length=1)
    client_secret: Secret | None = None
    url: Origin
    scope: str = "openid profile email"
    user_claim: str = Field(default="email", min_length=1)
    groups_claim: str = Field(default="groups", min_length=1)

    @field_validator("scope")
    @classmethod
    def _check_scope(cls, value: str) -> str:
        if "openid" not in value.split():
            raise ValueError('it must contain "openid"')
        return value


class ConsoleSettings(Section):
    """The console in the browser, on the listener of [http]; this section enables it.

    `role` applies to users without a role of their own: local users, users with the common
    password, and users of a proxy if no groups are set. Groups come from the proxy's header or from
    the provider.
    """

    enabled: bool = True
    write: bool = False
    password_hash: PasswordHash | None = None
    users: dict[str, ConsoleUserSettings] = {}
    role: Role = "editor"
    trusted_proxy: WordList = ()
    user_header: str = Field(default="X-Forwarded-User", pattern=r"^[A-Za-z0-9-]+$")
    groups_header: str = Field(default="X-Forwarded-Groups", pattern=r"^[A-Za-z0-9-]+$")
    viewer_groups: GroupList = ()
    operator_groups: GroupList = ()
    editor_groups: GroupList = ()
    oidc: OidcSettings | None = None
    mask: WordList = ()
    mask_for: Annotated[tuple[Role, ...], BeforeValidator(_read_words)] = get_args(Role)

    @property
    def groups(self) -> Mapping[Role, tuple[str, ...]]:
        """Return the groups of each role, the most powerful role first."""
        return {
            "editor": self.editor_groups,
            "operator": self.operator_groups,
            "viewer": self.viewer_groups,
        }

    @property
    def is_protected(self) -> bool:
        """Whether users must be authenticated."""
        return bool(self.password_hash or self.users or self.trusted_proxy or self.oidc)

    @model_validator(mode="after")
    def _check_access(self) -> ConsoleSettings:
        has_groups = any(self.groups.values())
        if self.users and self.password_hash is not None:
            raise ValueError(
                "write users or password_hash, not both: with users, each has a password"
            )
        if self.oidc is not None and not has_groups:
            raise ValueError(
                'oidc needs groups: set viewer_groups, operator_groups or editor_groups; "*" means '
                "every user of the provider"
            )
        if has_groups and self.oidc is None and not self.trusted_proxy:
            raise ValueError("groups come from oidc or from a proxy: set oidc or trusted_proxy")
        return self

    @field_validator("users")
    @classmethod
    def _check_users(cls, value: dict[str, ConsoleUserSettings]) -> dict[str, ConsoleUserSettings]:
        for name in value:
            if name != " ".join(name.split()) or not name.isprintable() or not 0 < len(name) <= 100:
                raise ValueError(f"{name!r} is not the name of a user: write 1 to 100 characters")
        return value

    @field_validator("trusted_proxy")
    @classmethod
    def _check_proxies(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            ip_network(text)
        return value

    @field_validator("mask")
    @classmethod
    def _check_mask(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            if path != "subject" and not re.fullmatch(r"data(\.[^.]+)+", path):
                raise ValueError(f'{path!r}: write "subject", or a path such as "data.email"')
            if re.search(r"[\[\]*]", path):
                raise ValueError(
                    f"{path!r} would match nothing: a path leads through all items of a list by "
                    'itself, as "data.contacts.email", or to one, as "data.contacts.0.email"'
                )
        return value


class RetentionSettings(Section):
    """How long ended enrollments and events are kept. Default: unlimited."""

    events: TimeSpan | None = None
    ended: TimeSpan | None = None


class LogSettings(Section):
    """The log on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


class Settings(Section):
    """All settings."""

    database: DatabaseSettings = DatabaseSettings()
    shards: dict[ShardName, ShardSettings] = {}
    engine: EngineSettings = EngineSettings()
    email: EmailSettings = EmailSettings()
    sms: SmsSettings = SmsSettings()
    runners: dict[str, HttpRunnerSettings] = {}
    lookups: dict[str, LookupSettings] = {}
    http: HttpSettings = HttpSettings()
    console: ConsoleSettings | None = None
    unsubscribe: UnsubscribeSettings | None = None
    retention: RetentionSettings = RetentionSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _check_shards(self) -> Settings:
        if self.shards and (self.database.url or self.database.schema_name != SCHEMA):
            raise ValueError(
                "write [shards], or url and schema of [database], not both; "
                "SEQUENCERD_DATABASE sets the url as well"
            )
        places: dict[tuple[str, str], str] = {}
        for name, shard in self.shards.items():
            place = shard.url.get_secret_value(), shard.schema_name
            if place in places:
                raise ValueError(f"the shards {places[place]} and {name} are the same schema")
            places[place] = name
        return self

    def of_shard(self, name: str | None) -> Settings:
        """Return the settings with the database of one of [shards]; without these, the same
        settings.
        """
        if name is None:
            return self
        shard = self.shards[name]
        own = {key: getattr(shard, key) for key in ShardSettings.model_fields}
        return self.model_copy(update={"database": self.database.model_copy(update=own)})

    def shard_number(self, name: str) -> ShardNumber:
        """Return the number of a shard, given by their order."""
        return ShardNumber(list(self.shards).index(name), len(self.shards))

    def check_console(self) -> None:
        """Reject a console without protection. Raises SettingsError. Commands that only read
        settings, such as the one that makes a password hash, do not call this.
        """
        console = self.console
        if (
            console is not None
            and console.enabled
            and self.listen is not None
            and not is_loopback(self.listen)
            and not console.is_protected
        ):
            raise SettingsError(
                f"wrong setting: the console would be open to everyone at {self.listen}: set "
                "console.password_hash (sequencerd console-password makes one), console.users, "
                "console.oidc or console.trusted_proxy, or http.listen to an address of this "
                "machine alone"
            )
        if console is not None and console.enabled and console.oidc and not find_spec("authlib"):
            raise SettingsError(
                "wrong setting: console.oidc needs a package that is not installed: "
                "pip install 'sequencerd[oidc]'"
            )

    @property
    def listen(self) -> str | None:
        """Return the address of the HTTP listener; a console always has one."""
        if self.http.listen is None and self.console is not None and self.console.enabled:
            return CONSOLE_LISTEN
        return self.http.listen

    def secrets(self) -> list[str]:
        """Return the values of all secrets, for redaction."""
        return list(_secrets(self))

    def differences(self, other: Settings, *sections: str) -> list[str]:
        """Return which settings of some sections differ, such as "engine.batch"."""
        return [
            f"{name}.{field.alias or key}"
            for name in sections
            for key, field in SECTIONS[name].model_fields.items()
            if getattr(getattr(self, name), key, None) != getattr(getattr(other, name), key, None)
        ]


SECTIONS: Mapping[str, type[Section]] = {
    name: section
    for name, field in Settings.model_fields.items()
    for section in (field.annotation, *get_args(field.annotation))
    if isinstance(section, type)
    and issubclass(section, Section)
    and not field.is_required()
    and get_origin(field.annotation) is not dict
}
"""The sections with known keys."""


def _secrets(value: object) -> Iterator[str]:
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, BaseModel):
        for _, part in value:
            yield from _secrets(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _secrets(part)
    elif isinstance(value, tuple):
        for part in value:
            yield from _secrets(part)
