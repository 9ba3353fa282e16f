"""The metrics page says what the code exports."""

from deploy.metrics_page import PAGE, declarations, render


def test_page_is_made_from_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(declarations()), "run python -m deploy.metrics_page"
