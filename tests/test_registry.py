"""The lists of cells in C++ and in Python agree, and every cell is there whole."""

import numpy as np
import pytest
from bound import OFFERED, Case, draw, run

import fusedrnn as fr
from fusedrnn import _core, reference
from fusedrnn.bench import shapes

NAMES = [row["name"] for row in _core.CELLS]


def test_cpp_and_reference_list_the_same_cells():
    in_cpp = {row["name"]: (row["gates"], row["states"]) for row in _core.CELLS}
    assert len(in_cpp) == len(NAMES)
    assert in_cpp == {name: (cell.gates, cell.states) for name, cell in reference.CELLS.items()}


def test_every_cell_is_offered_by_one_class():
    offered = [name for kind in (fr.LSTM, fr.GRU, fr.RNN) for name in kind.cells]
    assert sorted(offered) == sorted(NAMES)
    assert set(OFFERED) == set(NAMES), "the tests must reach every cell"
    assert {cell.registered for cell in shapes.CELLS.values()} == set(NAMES), "and the benchmark"


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_has_its_class_and_functional_forms(name):
    kind, options, family = OFFERED[name]
    assert kind(2, 3, **options).cell == name and name in kind.cells
    for suffix in ("", "_forward", "_backward", "_cell"):
        assert callable(getattr(fr, family + suffix)) and callable(getattr(reference, family + suffix))


@pytest.mark.parametrize("row", _core.CELLS, ids=NAMES)
def test_gates_and_states_are_what_is_registered(row):
    call = draw(Case(row["name"], H=5, I=3))
    assert call.layer.params["weight_ih_l0"].shape == (row["gates"] * 5, 3)
    assert call.layer.params["bias_hh_l0"].shape == (row["gates"] * 5,)
    got = run(call)
    assert [name for name in ("h_n", "c_n") if name in got] == ["h_n", "c_n"][: row["states"]]


def test_no_two_cells_are_the_same_function():
    def y(name):
        kind, options, _ = OFFERED[name]
        layer = kind(4, 8, dtype=np.float64, seed=0, **options)
        layer.flat_params[:] = np.random.default_rng(1).standard_normal(layer.flat_params.size)
        return layer(np.random.default_rng(2).standard_normal((3, 2, 4)))[0]

    results = [y(name) for name in NAMES]
    for k, a in enumerate(results):
        for b in results[:k]:
            assert np.abs(a - b).max() > 1e-3


def test_an_unknown_cell_is_an_error():
    with pytest.raises(ValueError, match="unknown cell 'elman'"):
        _core.Spec("elman", np.dtype(np.float32), 1, 1, 1, 1, True, False)
