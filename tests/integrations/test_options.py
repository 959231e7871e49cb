"""Keywords of callbacks."""

import pytest
from torch import nn

from secorder import InvalidArgumentError
from secorder.integrations.options import divided, submodule


def test_keywords_find_their_owner() -> None:
    of_probe, of_recorder = divided({"every": 2, "log_every": 10, "strict": True, "method": "exact", "decay": 0.5})
    assert of_probe == {"every": 2, "strict": True, "decay": 0.5}
    assert of_recorder == {"log_every": 10, "strict": True, "method": "exact"}


def test_a_misspelt_module_is_told_which_there_are() -> None:
    model = nn.Module()
    model.encoder, model.head = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    assert submodule(model, "encoder.0") is model.encoder[0]
    assert submodule(model, "") is model
    with pytest.raises(InvalidArgumentError, match=r"Module has no module 'encodr': it has encoder, encoder\.0, head"):
        submodule(model, "encodr")
