"""The committed OpenAPI document against the application, and the server against the document."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from maskgit import images
from maskgit.apps.serving.openapi import document
from maskgit.apps.serving.service import Limits
from servers import in_thread

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"
PHOTO = Image.fromarray((np.random.default_rng(0).random((18, 20, 3)) * 255).astype("uint8"))


def with_pictures() -> dict:
    """Return the document with base64 fields narrowed down to a few, so that some requests reach the model."""
    made = json.loads(COMMITTED.read_text("utf-8"))
    good = base64.b64encode(images.encode(PHOTO)).decode()
    for request in ("Edit", "Inpaint", "Outpaint", "Reconstruct", "Tokenize"):
        content = made["paths"][f"/v1/{request.lower()}"]["post"]["requestBody"]["content"]
        fields = content["application/json"]["schema"]["properties"]
        for name in {"image", "mask"} & set(fields):
            fields[name]["enum"] = [good, good[:80], "alpha"]
    return made


schema = schemathesis.openapi.from_dict(with_pictures())


@pytest.fixture(scope="module")
def url(tiny):
    limits = Limits(max_batch=4, max_images=2, max_steps=4, max_pixels=10_000, timeout=5.0)
    with in_thread(limits, model=tiny) as (client, _):
        yield str(client.base_url)


def test_the_committed_document_is_the_applications():
    """`python -m maskgit.apps.serving.openapi docs/openapi.json` writes it."""
    assert COMMITTED.read_text("utf-8") == document()


@schema.parametrize()
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_no_request_makes_the_server_fail(case, url):
    checks = [status_code_conformance, content_type_conformance, response_schema_conformance]
    # 503 and 504 are answers, too; a timeout may be as short as the client likes.
    answer = case.call_and_validate(base_url=url, checks=checks)
    assert answer.status_code < 500 or answer.status_code in (503, 504)
    if answer.status_code not in (503, 504):
        case.validate_response(answer, checks=[not_a_server_error])
