import pytest

# Their assertions explain themselves like those in test modules.
pytest.register_assert_rewrite("tests.storage.harness", "tests.storage.conformance", "tests.storage.crash")
