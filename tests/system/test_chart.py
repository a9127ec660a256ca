"""The Helm chart, rendered by Helm itself, and the manifest, against the schemas of Kubernetes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.system.debian import REPOSITORY

pytestmark = pytest.mark.system

CHART = REPOSITORY / "packaging/helm"
VERSIONS = ["1.30", "1.34", "1.37"]


def render(values: dict[str, Any], name: str = "sequencerd") -> list[dict[str, Any]]:
    helm = pytest.importorskip("helm_python")
    with helm.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name=name, namespace="default")
    return [yaml.safe_load(text) for _, text in sorted(files.items())]


def test_the_defaults_of_the_chart_are_the_manifest() -> None:
    text = (REPOSITORY / "packaging/kubernetes.yaml").read_text()
    assert render({}) == list(yaml.safe_load_all(text))


@pytest.mark.parametrize("version", VERSIONS)
def test_rendered_manifests_match_the_schema(version: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    smtp = {"name": "SEQUENCERD_SMTP_URL_FILE", "value": "/run/secrets/sequencerd/smtp"}
    values = {"replicas": 3, "secret": "other", "env": [smtp], "image": {"tag": "2"}}
    for document in [*render({}), *render(values, name="123")]:
        schemas.validate(document, version, strict=True)


def test_a_field_that_does_not_exist_is_found() -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    deployment, _ = render({})
    deployment["spec"]["replica"] = 3
    with pytest.raises(schemas.ValidationError):
        schemas.validate(deployment, VERSIONS[0], strict=True)


def test_the_values_of_the_chart_are_used() -> None:
    smtp = {"name": "SEQUENCERD_SMTP_URL", "value": "smtp://mail"}
    values = {"replicas": 1, "secret": "other", "env": [smtp], "image": {"tag": "2"}}
    deployment, budget = render(values, name="trial")
    pod = deployment["spec"]["template"]["spec"]
    assert deployment["metadata"]["name"] == budget["metadata"]["name"] == "trial"
    assert pod["containers"][0]["image"] == "sequencerd:2"
    assert smtp in pod["containers"][0]["env"]
    assert pod["volumes"][0]["secret"]["secretName"] == "other"


def test_helm_finds_no_fault() -> None:
    helm = pytest.importorskip("helm_python")
    assert helm.lint(str(CHART))["errors"] == []
