"""How one object is restored; :mod:`tests.oneshot.test_state` has every kind of object."""

import sys
import types

import torch

from secorder.oneshot.restoring import SavedTensor, of_attributes, of_cell, of_elements, of_length, used_up


def test_what_was_not_changed_is_told_apart() -> None:
    kept, long = [1, 2], [0] * 5
    for x, restore in ((kept, of_elements(kept)), (long, of_length(long))):
        before = list(x)
        assert not restore()
        x.append(3)
        assert restore()
        assert x == before


def test_a_cell_that_was_emptied_is_filled_again() -> None:
    cell = types.CellType(1)
    restore = of_cell(cell, 1)
    del cell.cell_contents
    assert restore()
    assert cell.cell_contents == 1
    assert not restore()


def test_a_tensor_is_restored_whichever_way_it_was_changed() -> None:
    x = torch.tensor([1.0, torch.nan])
    saved = SavedTensor(x)
    assert not saved.changed()
    x.data[0] = 2.0  # which no version counter sees
    assert saved.restore()
    x.requires_grad_().data.add_(1)
    assert saved.restore()
    assert (x[0].item(), x.requires_grad) == (1.0, False)
    assert not saved.restore()


def test_iterators_that_cannot_be_put_back() -> None:
    class Own:
        def __iter__(self) -> "Own":
            return self

        def __next__(self) -> int:
            return 0

    loader = torch.utils.data.DataLoader([1, 2])  # type: ignore[arg-type]
    assert all(map(used_up, [iter([1]), (x for x in [1]), iter(loader)]))
    assert not any(map(used_up, [[1], Own(), sys.stdout, loader]))


def test_a_compiled_module_is_given_no_mode_of_its_own() -> None:
    module = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    before, restore = dict(vars(module)), of_attributes(module)
    module.eval()
    vars(module)["count"] = 1
    assert restore()
    assert vars(module) == before
    assert not module.training
