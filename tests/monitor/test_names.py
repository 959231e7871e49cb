"""How numbers are called."""

from secorder.monitor.names import flat, shown


def test_names() -> None:
    assert flat({"fisher_trace": {"": 1.0, "fc": 2.0}}) == {"fisher_trace/model": 1.0, "fisher_trace/fc": 2.0}
    assert shown("fc") == "fc"
