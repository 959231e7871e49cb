"""Tables for notebooks."""

from xml.etree import ElementTree

from secorder.monitor.html import html_list, html_table


def test_it_is_well_formed_whatever_is_in_it() -> None:
    table = html_table([("a & b", False), ("<c>", True)], [("", ["x<y", "1"]), ("total", ["z", "2"])], 'a "title"')
    rows = list(ElementTree.fromstring(table).iter("tr"))
    assert [[cell.text for cell in row] for row in rows] == [["a & b", "<c>"], ["x<y", "1"], ["z", "2"]]
    assert "bold" in rows[2].attrib["style"]
    assert [item.text for item in ElementTree.fromstring(html_list(["a < b", "c"]))] == ["a < b", "c"]
