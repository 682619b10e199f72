"""Requests generated from the OpenAPI schema: no failures, and responses as the schema describes them."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serving import make_local

POST = ("/v1/chat/completions", "/v1/completions")
GET = ("/v1/models", "/v1/models/{name}", "/health")


@pytest.fixture(scope="module")
def schema(byte_tokenizer):
    return schemathesis.openapi.from_asgi("/openapi.json", make_local(byte_tokenizer).app)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *[("POST", path, mode) for path in POST for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)],
        *[("GET", path, GenerationMode.POSITIVE) for path in GET],
    ],
)
def test_generated_requests(schema, method, path, mode):
    """A schema cannot say that a prompt fits the model, so valid requests may be refused; invalid ones must be."""

    @settings(max_examples=30)
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()
