"""stub."""


def check_session() -> None:
    """stub."""
