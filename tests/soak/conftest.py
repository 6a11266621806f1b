"""The long tests use the fixtures of the integration tests."""

from tests.integration.conftest import frontier, toy_run

__all__ = ["frontier", "toy_run"]
