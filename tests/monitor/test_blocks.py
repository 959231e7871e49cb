"""Layers in blocks that fit one chart."""

from hypothesis import given
from hypothesis import strategies as st

from secorder.monitor.blocks import blocks, common_prefix, shortened

DECODER = [f"model.layers.{i}.{part}" for i in range(12) for part in ("q", "k", "v", "out", "fc1", "fc2")]


def test_a_decoder_is_cut_between_its_layers() -> None:
    found = blocks(["model.embed", *DECODER, "model.norm", "head"])
    assert list(found)[:2] == ["model.embed", "model.layers.0 … model.layers.1"]
    assert list(found)[-1] == "model.norm … head"
    assert all(len(block) == 12 for title, block in found.items() if "layers" in title)


def test_what_is_flat_is_cut_where_it_must_be() -> None:
    assert list(blocks([str(i) for i in range(30)])) == ["0 … 11", "12 … 23", "24 … 29"]
    assert list(blocks(["a", "b"])) == ["all layers"]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), unique=True, min_size=1))
def test_every_layer_is_in_one_block(names: list[str]) -> None:
    found = blocks(names, at_most=3)
    assert [name for block in found.values() for name in block] == names
    assert max(map(len, found.values())) <= 3


def test_names_without_what_they_share() -> None:
    assert common_prefix(["a.b.c", "a.b.d"]) == "a.b."
    assert common_prefix(["a.b", "a.b.c"]) == "a."
    assert common_prefix(["a"]) == common_prefix(["a", "b"]) == ""
    assert shortened(["net.0", "net.1"]) == ("names without net.", ["0", "1"])
    told, names = shortened(["embed", *DECODER])
    assert (told, names[0], names[1]) == ("… is model.layers.", "embed", "…0.q")
    told, names = shortened(["model.embed", *DECODER])
    assert (told, names[0], names[1]) == ("names without model., … is layers.", "embed", "…0.q")
    assert shortened(["a", "b"]) == ("", ["a", "b"])
