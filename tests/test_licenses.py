"""The licenses of what sequencerd is made of: in docs/licenses.md, and compatible with its own."""

from __future__ import annotations

import os
import re
import tomllib
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

from tests.test_container import needed

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs/licenses.md"

# what a work under Apache-2.0 can be distributed with
COMPATIBLE = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BlueOak-1.0.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "PSF-2.0",
    "Unicode-3.0",
    "Unlicense",
}

CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "GNU General Public License v2 (GPLv2)": "GPL-2.0-only",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}

# read in the package itself, whose metadata names no license, or in other words
READ = {
    "colorama": "BSD-3-Clause",  # on Windows alone
    "grimp": "BSD-2-Clause",
    "httpx2-jsfetch": "BSD-3-Clause",  # in a browser alone
    "import-linter": "BSD-2-Clause",
    "protobuf": "BSD-3-Clause",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause",
    "quickjs-ng": "MIT",
    "uvloop": "Apache-2.0 OR MIT",
}


def locked() -> list[str]:
    text = (REPOSITORY / "requirements.txt").read_text()
    return re.findall(r"^([a-z0-9][\w.-]*)==", text, re.MULTILINE)


def license_of(name: str) -> str:
    if name in READ:
        return READ[name]
    try:
        fields = metadata(name)
    except PackageNotFoundError:
        raise AssertionError(f"{name} is not installed: read its license, add it to READ") from None
    found = of_fields(fields)
    assert found, f"{name} names no license: read it, and add it to READ"
    return found


def of_fields(fields: PackageMetadata) -> str | None:
    if "License-Expression" in fields:
        return fields["License-Expression"]
    classifiers = [line.rpartition(" :: ")[2] for line in fields.get_all("Classifier") or []]
    for classifier, name in CLASSIFIERS.items():
        if classifier in classifiers:
            return name
    stated = (fields["License"] or "").strip()
    return stated if stated in COMPATIBLE else None


def is_compatible(expression: str) -> bool:
    """Whether every AND has a license that is compatible; parentheses do not occur."""
    assert "(" not in expression, expression
    return all(
        any(name.strip() in COMPATIBLE for name in choice.split(" OR "))
        for choice in expression.split(" AND ")
    )


def users() -> dict[str, str]:
    """Return what each locked package is for."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    found = dict.fromkeys(needed(), "sequencerd")
    for extra in sorted(project["optional-dependencies"]):
        for name in sorted(needed(extra) - set(found)):
            found[name] = f"the extra `{extra}`"
    return {name: found.get(name, "development") for name in locked()}


def test_the_licenses_are_listed() -> None:
    rows = [
        f"| {name} | {license_of(name)} | {user} |\n"
        for user, name in sorted((user, name) for name, user in users().items())
    ]
    page = PAGE.read_text()
    head, border, _ = page.rpartition("| --- | --- | --- |\n")
    right = head + border + "".join(rows)
    if os.environ.get("RENEW"):
        PAGE.write_text(right)
    else:
        assert page == right, "renew it: RENEW=1 make test T=tests/test_licenses.py"


def test_the_licenses_of_dependencies_are_compatible() -> None:
    for name, user in users().items():
        if user != "development":
            assert is_compatible(license_of(name)), f"{name}: {license_of(name)}"


def test_other_licenses_are_found() -> None:
    assert not is_compatible("GPL-3.0-only")
    assert not is_compatible("MIT AND AGPL-3.0-or-later")
    assert is_compatible("MIT OR GPL-2.0-only")


def test_the_vendored_libraries_are_listed_with_their_licenses() -> None:
    text = PAGE.read_text()
    folders = [REPOSITORY / "sequencerd", REPOSITORY / "tests"]
    lists = [path for folder in folders for path in folder.rglob("vendor/VERSIONS")]
    assert len(lists) == 3
    for versions in lists:
        for line in versions.read_text().splitlines():
            *names, _, file = line.split()
            assert (versions.parent / file).with_suffix(".LICENSE").stat().st_size > 300
            assert names[0].rstrip(",").removeprefix("@dagrejs/") in text
