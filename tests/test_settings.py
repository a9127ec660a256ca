"""Settings: where they come from, and what is said of wrong ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import get_args, get_origin

import pytest

from sequencerd import settings as settings_module
from sequencerd import settings_file
from sequencerd.core.model import Limits
from sequencerd.daemon import check_settings
from sequencerd.errors import SettingsError
from sequencerd.runners.registry import make_runners
from sequencerd.settings import Section, Settings
from sequencerd.settings_file import load


def test_nothing_has_to_be_set() -> None:
    settings = load({})
    assert settings.database.url is None
    assert settings.runners == {}


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text(
        '[database]\nurl = "postgresql://file/x"\nconnections = 7\n'
        '[runners.Score]\nurl = "http://localhost:9/score"\nsecret = "whsec_c2VjcmV0"\n'
    )
    settings = load(
        {"SEQUENCERD_CONFIG": str(file), "SEQUENCERD_DATABASE": "postgresql://variable/x"}
    )
    assert settings.database.url is not None
    assert settings.database.url.get_secret_value() == "postgresql://variable/x"
    assert settings.database.connections == 7
    assert settings.runners["Score"].url == "http://localhost:9/score"
    assert load({"SEQUENCERD_ENGINE_BATCH": "50"}).engine.batch == 50
    assert load({"SEQUENCERD_CONFIG": "nowhere"}, file).database.connections == 7
    assert load({"ENGINE_BATCH": "50", "PATH": "/bin"}).engine.batch == 1000


def test_the_url_of_a_database_that_is_empty_is_not_set() -> None:
    """As a variable that refers to another one, in compose.yaml."""
    settings = load({"SEQUENCERD_DATABASE": "", "SEQUENCERD_DATABASE_LISTEN_URL": ""})
    assert (settings.database.url, settings.database.listen_url) == (None, None)
    assert not settings.database.pooled


def test_variables_that_kubernetes_sets_for_services_are_no_settings() -> None:
    """In each pod of a namespace with Services named sequencerd and sequencerd-database."""
    address = "tcp://10.0.0.7:9187"
    for service in ("SEQUENCERD", "SEQUENCERD_DATABASE"):
        load(
            {
                f"{service}_SERVICE_HOST": "10.0.0.7",
                f"{service}_SERVICE_PORT": "9187",
                f"{service}_SERVICE_PORT_HTTP": "9187",
                f"{service}_PORT": address,
                f"{service}_PORT_9187_TCP": address,
                f"{service}_PORT_9187_TCP_PROTO": "tcp",
                f"{service}_PORT_9187_TCP_PORT": "9187",
                f"{service}_PORT_9187_TCP_ADDR": "10.0.0.7",
            }
        )
        with pytest.raises(SettingsError, match="PORT is not a setting"):
            load({f"{service}_PORT": "5432"})


def test_a_check_finds_what_a_start_rejects() -> None:
    for section in ("runners", "lookups"):
        endpoint = {"url": "http://h", "headers": {"Host": "h"}}
        settings = Settings.model_validate({section: {"Score": endpoint}})
        with pytest.raises(SettingsError, match=f"^wrong setting: {section}.Score: "):
            check_settings(settings)
    with pytest.raises(SettingsError, match=r"http\.listen: write a host and a port"):
        load({"SEQUENCERD_HTTP_LISTEN": "http://127.0.0.1:9187"})


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("email", {"url": "mail.example.com"}, "the SMTP URL cannot be read"),
        ("email", {"hello_name": "mail"}, "hello_name is 'mail'"),
        ("email", {"attachments_from": [""]}, "attachments_from: '' is not a host"),
        ("runners.Score", {"url": "https://h", "secret": "*"}, "the secret is not whsec_"),
    ],
)
def test_a_check_names_the_section_and_the_key(
    section: str, values: dict[str, object], words: str
) -> None:
    first, _, name = section.partition(".")
    settings = Settings.model_validate({first: {name: values} if name else values})
    with pytest.raises(SettingsError, match=f"^wrong setting: {section}: {words}"):
        check_settings(settings)


@pytest.mark.parametrize(
    ("section", "key", "others"),
    [
        ("runners.Score", "url", ""),
        ("lookups.plans", "url", ""),
        ("email.oauth", "token_url", "client_id = 'x'"),
        ("sms", "url", ""),
        ("sms", "base_url", ""),
        ("sms", "hook_url", ""),
        ("unsubscribe", "url", f"keys = ['{'a' * 32}']"),
        ("console.oidc", "url", "client_id = 'x'\nissuer = 'https://id.example.com'"),
        ("console.oidc", "issuer", "client_id = 'x'\nurl = 'https://c.example.com'"),
    ],
)
@pytest.mark.parametrize(
    "url",
    [
        "https://s3cret:s3cret@mail example.com",
        "https://mail.example.com:65536",
        "https://mail.example.com:0",
        "https://mail.example.com:s3cret",
        "https://mail..example.com",
        f"https://{'a' * 64}.example.com",
        "https://mail.example.com%20/",
        "https://192.0.2.300",
        "https://[::1",
        "https://[::g]",
        "https://",
        "https:///path",
        "ftp://mail.example.com",
        "mail.example.com",
        "https://mail.example.com/\\u0000",
    ],
)
def test_every_url_is_checked(
    tmp_path: Path, section: str, key: str, others: str, url: str
) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text(f'[{section}]\n{key} = "{url}"\n{others}')
    with pytest.raises(SettingsError, match=rf"{section}.{key}: .*URL") as wrong:
        load({}, file)
    assert "s3cret" not in str(wrong.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://[2001:db8::1]:8080/",
        "HTTPS://münchen.example:1",
        "http://my_host.",
        "http://10.0.0.1",
    ],
)
def test_urls_of_any_host_are_accepted(tmp_path: Path, url: str) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text(f'[runners.Score]\nurl = "{url}"\n')
    assert load({}, file).runners["Score"].url == url


def test_an_error_says_whether_it_is_in_the_file_or_in_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text("[engine]\nlease = 0\nbatch = 0\n[log]\nlevl = 'info'\n")
    with pytest.raises(SettingsError) as wrong:
        load({"SEQUENCERD_ENGINE_BATCH": "many", "SEQUENCERD_DATABASE_CONNECTIONS": "1"}, file)
    assert str(wrong.value) == (
        "wrong setting in SEQUENCERD_DATABASE_CONNECTIONS: "
        "database.connections: must be 2 or more; "
        "wrong setting in SEQUENCERD_ENGINE_BATCH: engine.batch: must be a whole number; "
        f"wrong setting in {file}: engine.lease: must be 1 or more; "
        "log.levl: log has no key 'levl'; did you mean 'level'?"
    )


def test_a_secret_can_be_in_a_file_and_is_never_shown(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("top-secret\n")
    settings = load({"SEQUENCERD_SMS_AUTH_TOKEN_FILE": str(secret)})
    assert settings.sms.auth_token is not None
    assert settings.sms.auth_token.get_secret_value() == "top-secret"
    assert "top-secret" not in repr(settings)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("SEQUENCERD_SMPT_URL", "x", "did you mean SEQUENCERD_SMTP_URL"),
        ("SEQUENCERD_RUNNERS_CRM_URL", "x", r"write \[runners\] in the settings file$"),
        ("SEQUENCERD_EMAIL_OAUTH_SCOPE", "x", r"write \[email\.oauth\] in the settings file$"),
        (
            "SEQUENCERD_ENGINE_BATCH",
            "many",
            "BATCH: engine.batch: must be a whole number$",
        ),
        (
            "SEQUENCERD_ENGINE_LEASE",
            "0",
            "LEASE: engine.lease: must be 1 or more$",
        ),
        ("SEQUENCERD_LOG_LEVEL", "loud", "log.level: .*'debug'"),
        ("SEQUENCERD_SMS_AUTH_TOKEN_FILE", "/nowhere/token", "No such file"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as wrong:
        load({variable: value})
    assert "\n" not in str(wrong.value)
    assert wrong.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[database]\nurll = 'x'", "database.urll: .*did you mean 'url'"),
        ("[databse]\nurl = 'x'", "databse: .*did you mean 'database'"),
        ("[runners.A]\nurl = 'ftp://x'", "runners.A.url"),
        ("[runners.A]\ntimeout = 3", "runners.A: write url, or lambda"),
        ("[runners.A]\nurl = 'http://x'\nsecrett = 's'", "did you mean 'secret'"),
        ("nonsense", "settings file"),
        ("database = 'postgresql://x'", "database"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=words):
        load({}, file)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text("[engine]\nbatch = 7\n", encoding="utf-8-sig")
    assert load({}, file).engine.batch == 7


def test_a_default_file_in_a_closed_folder_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "folder/sequencerd.toml"
    monkeypatch.setattr(settings_file, "DEFAULT_FILE", file)
    load({})
    file.parent.mkdir()
    load({})
    file.parent.chmod(0)
    with unprivileged(), pytest.raises(SettingsError, match="Permission denied; use sudo, or"):
        load({})


@contextmanager
def unprivileged() -> Iterator[None]:
    """For root, to whom nothing is closed."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def _numbers(section: type[Section], *path: str) -> Iterator[tuple[str, ...]]:
    """Yield the paths of all numbers in the settings; NAME stands for a key that users name."""
    for name, field in section.model_fields.items():
        here = (*path, field.alias or name)
        types = {field.annotation, *get_args(field.annotation)}
        if types & {int, float}:
            yield here
        for type_ in types:
            if isinstance(type_, type) and issubclass(type_, Section):
                is_named = get_origin(field.annotation) is dict
                yield from _numbers(type_, *here, *(["NAME"] if is_named else []))


NUMBERS = [".".join(path) for path in _numbers(Settings)]


def test_the_numbers_of_all_sections_are_found() -> None:
    assert {"engine.batch", "email.give_up_after", "runners.NAME.batch_bytes"} <= {*NUMBERS}


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("value", ["true", "false", "inf", "nan"])
def test_a_number_is_neither_a_boolean_nor_infinite(tmp_path: Path, path: str, value: str) -> None:
    file = tmp_path / "sequencerd.toml"
    table, _, key = path.rpartition(".")
    file.write_text(f"[{table}]\n{key} = {value}\n")
    with pytest.raises(SettingsError, match=rf"{path}: must be a (whole )?number(;|$)"):
        load({}, file)


@pytest.mark.parametrize(
    "address", ["bounces@x.org", "{token}", "a b+{token}@x.org", "seventeen-letters{token}@x.org"]
)
def test_a_bounce_address_has_one_token(address: str) -> None:
    good = "bounces+{token}@x.org"
    assert load({"SEQUENCERD_EMAIL_BOUNCE_ADDRESS": good}).email.bounce_address == good
    with pytest.raises(SettingsError, match=r"email\.bounce_address: write an address such as"):
        load({"SEQUENCERD_EMAIL_BOUNCE_ADDRESS": address})


def test_the_keys_of_links_may_be_in_files(tmp_path: Path) -> None:
    first, second = "a" * 32, "b" * 32
    (tmp_path / "keys").write_text(f"{first}\n{second}\n")
    (tmp_path / "one").write_text(second)
    url = 'url = "https://mail.example.com"'
    for keys in (
        f'["{first}", "{second}"]',
        f'{{file = "{tmp_path}/keys"}}',
        f'["{first}", {{file = "{tmp_path}/one"}}]',
    ):
        file = tmp_path / "sequencerd.toml"
        file.write_text(f"[unsubscribe]\n{url}\nkeys = {keys}\n")
        section = load({}, file).unsubscribe
        assert section is not None
        assert [key.get_secret_value() for key in section.keys] == [first, second]
        assert {first, second} <= set(load({}, file).secrets())
        # a command that only reads definitions does not open them
        assert load({}, Path(file), secrets=()).unsubscribe is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('url = "https://x.org"', "unsubscribe.keys"),
        ('url = "https://x.org/?a"\nkeys = ["' + "a" * 32 + '"]', "unsubscribe.url"),
        ('url = "https://x.org"\nkeys = []', "unsubscribe.keys"),
        ('url = "https://x.org"\nkeys = ["short"]', "openssl rand -hex 32"),
    ],
)
def test_links_need_a_url_and_keys(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text(f"[unsubscribe]\n{text}\n")
    with pytest.raises(SettingsError, match=re.escape(message)) as error:
        load({}, file)
    assert "short" not in str(error.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"missing\.toml"):
        load({}, tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("email", Limits(3, 7.0, 1, 5.0)),
        ("sms", Limits(3, 7.0, 1, 5.0)),
        ("runners.Score", Limits(3, 7.0, 20, 5.0)),
    ],
)
def test_the_limits_of_a_server_reach_its_runner(
    tmp_path: Path, section: str, expected: Limits
) -> None:
    """They are those of a request there; a call of the runner also waits for its turn."""
    file = tmp_path / "sequencerd.toml"
    file.write_text(
        f"[{section}]\nconcurrency = 3\ntimeout = 7\nper_second = 5\n"
        + {"email": "", "sms": 'account_sid = "AC1"\nauth_token = "t"\n'}.get(
            section, 'url = "http://localhost:9/"\nbatch_size = 20\n'
        )
    )
    settings = load({"SEQUENCERD_CONFIG": str(file)})
    given = {"email": settings.email, "sms": settings.sms, **settings.runners}
    type_ = {"email": "Email", "sms": "SMS"}.get(section, "Score")
    assert given[section.removeprefix("runners.")].limits == expected
    made = make_runners(settings)[type_].limits
    assert replace(made, timeout=7.0) == expected
    assert made.timeout > 7 + 3 / 5


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_limits_with_which_nothing_could_be_done(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}: write a number above 0"):
        Limits(**{name: value})  # type: ignore[arg-type]


def test_the_retention_settings() -> None:
    kept = load({"SEQUENCERD_RETENTION_EVENTS": "90 days", "SEQUENCERD_RETENTION_ENDED": "P1Y"})
    assert (kept.retention.events, kept.retention.ended) == (timedelta(90), timedelta(365))
    for wrong in ("1 year", "1 hour", "PT1H", "P999Y", "90"):
        with pytest.raises(SettingsError, match=r"retention\.events: .* such as"):
            load({"SEQUENCERD_RETENTION_EVENTS": wrong})


def test_tokens_for_mail(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    text = (
        '[email]\nurl = "smtp://ada@mail.example.com"\nhello_name = "news.example.com"\n'
        '[email.oauth]\ntoken_url = "https://login.example.com/token"\nclient_id = "me"\n'
        'client_secret = "the-secret"\nrefresh_token = "the-refresh"\nscope = "mail"\n'
    )
    file.write_text(text, encoding="utf-8")
    settings = load({}, file)
    assert {"the-secret", "the-refresh"} <= set(settings.secrets())
    assert make_runners(settings)["Email"]
    file.write_text(text.replace("[email.oauth]", 'token_command = "x"\n[email.oauth]'))
    with pytest.raises(SettingsError, match="not both"):
        load({}, file)
    file.write_text(text.replace("ada@", "ada:password@"), encoding="utf-8")
    with pytest.raises(SettingsError, match="no password"):
        make_runners(load({}, file))
    file.write_text(text.replace("news.example.com", "mailer"), encoding="utf-8")
    with pytest.raises(SettingsError, match="hello_name"):
        make_runners(load({}, file))


def test_recipients_of_a_staging_system() -> None:
    settings = load({"SEQUENCERD_EMAIL_ONLY_TO": "*@example.com, ada@example.org"})
    assert settings.email.only_to == ("*@example.com", "ada@example.org")
    assert settings.sms.only_to is None
    assert load({"SEQUENCERD_EMAIL_ONLY_TO": ""}).email.only_to == ()
    with pytest.raises(SettingsError, match=r"'example\.com' matches no recipient"):
        load({"SEQUENCERD_EMAIL_ONLY_TO": "example.com"})


def test_where_attachments_may_come_from() -> None:
    variable = "SEQUENCERD_EMAIL_ATTACHMENTS_FROM"
    settings = load({variable: "files.example.com http://localhost:8000"})
    assert settings.email.attachments_from == ("files.example.com", "http://localhost:8000")
    assert make_runners(settings)["Email"]
    with pytest.raises(SettingsError, match="'ftp://x' is not a host"):
        make_runners(load({variable: "ftp://x"}))


def test_only_the_secrets_that_are_needed_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a command on the host, where the service's credentials are root's."""
    monkeypatch.setattr(settings_module, "CREDSTORE", tmp_path)
    monkeypatch.setattr(settings_module, "CREDENTIALS", tmp_path / "run")
    file = tmp_path / "sequencerd.toml"
    file.write_text(
        "[database]\nurl = {file = 'database'}\n[email]\nurl = {file = 'smtp'}\n"
        "[email.oauth]\ntoken_url = 'https://x'\nclient_id = 'x'\nclient_secret = {file = 'o'}\n"
        "[runners.Crm]\nurl = 'http://x'\nsecret = {file = '/no/x'}\nheaders = {A = {file = 'h'}}\n"
        "[console]\npassword_hash = {file = 'hash'}\n"
    )
    variables = {"SEQUENCERD_SMS_AUTH_TOKEN_FILE": "sms", "SEQUENCERD_SMS_ACCOUNT_SID": "AC1"}
    definitions_only = load(variables, file, secrets=())
    assert set(make_runners(definitions_only)) >= {"Email", "SMS", "Crm"}
    with pytest.raises(SettingsError, match=r"no credential 'database': neither .*database nor"):
        load(variables, file, secrets=("database",))
    service = tmp_path / "run/sequencerd@1.service"
    service.mkdir(parents=True)
    (service / "database").write_text("postgresql://of-the-service/x\n")
    url = load(variables, file, secrets=("database",)).database.url
    assert url is not None
    assert url.get_secret_value() == "postgresql://of-the-service/x"
    (tmp_path / "sequencerd.database").write_text("postgresql://of-the-store/x\n")
    url = load(variables, file, secrets=("database",)).database.url
    assert url is not None
    assert url.get_secret_value() == "postgresql://of-the-store/x"
    with pytest.raises(SettingsError, match="no credential 'sms'"):
        load(variables, file)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfpostgresql://h/d\r\n", "postgresql://h/d"),
        (b" \n", "secret is empty"),
        (b"\xff\xfep\x00", "secret is not text in UTF-8"),
    ],
)
def test_the_contents_of_secret_files(tmp_path: Path, content: bytes, expected: str) -> None:
    """A byte order mark of an editor; nothing, which would mean a local server, is an error."""
    (tmp_path / "secret").write_bytes(content)
    variables = {"SEQUENCERD_DATABASE_URL_FILE": str(tmp_path / "secret")}
    if expected.startswith("secret"):
        with pytest.raises(SettingsError, match=expected):
            load(variables)
        return
    url = load(variables).database.url
    assert url is not None
    assert url.get_secret_value() == expected


def test_the_schema_can_be_set_by_the_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text('[database]\nschema = "sales-eu"')
    assert load({}, file).database.schema_name == "sales-eu"
    assert load({"SEQUENCERD_DATABASE_SCHEMA": "A_1"}, file).database.schema_name == "A_1"
    assert load({}).differences(load({}, file), "database") == ["database.schema"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, "cannot have") for name in ("a'b", "a%b", "a$b", "a\\b", "a\nb", "\udcff")),
        *((name, "1 to 63 bytes") for name in ("", "a" * 64, "é" * 32)),
        *((name, "not for sequencerd alone") for name in ("pg_x", "public", "information_schema")),
    ],
    ids=repr,
)
def test_a_schema_that_cannot_be_used_is_refused(name: str, said: str) -> None:
    with pytest.raises(SettingsError, match=rf"database\.schema.*{said}"):
        load({"SEQUENCERD_DATABASE_SCHEMA": name})


@pytest.mark.parametrize("name", ['My "Shard"', "é" * 31, "a.b"])
def test_a_schema_that_must_be_quoted_can_be_used(name: str) -> None:
    assert load({"SEQUENCERD_DATABASE_SCHEMA": name}).database.schema_name == name
