"""Kernels against the reference, under the bound of bound.py, and against their own finite differences."""

import numpy as np
import pytest
from bound import (
    OFFERED,
    Case,
    as_tuple,
    assert_same_bits,
    assert_within_bound,
    draw,
    named,
    run,
    run_function,
    run_reference,
)  # fmt: skip
from devices import EMULATED, every_device, every_place, exact, host, needs_gpu, on_device, path, sized
from hypothesis import given, settings, strategies as st
from test_reference import assert_gradients, products

import fusedrnn as fr

every_cell = pytest.mark.parametrize("cell", OFFERED)
every_lengths = pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])
every_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])

# Around the vectors' 2 to 16 lanes and two blocks of them; around the tiles' 1 to 8 rows
WIDTHS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 48, 63, 65, 70])
ROWS = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 17, 25])
STEPS = st.sampled_from([0, 1, 2, 3, 5, 8])
SMALL_STEPS, SMALL_ROWS = st.sampled_from([0, 1, 2, 4]), st.sampled_from([0, 1, 2, 3, 9])
SMALL_WIDTHS = st.sampled_from([1, 3, 8, 16, 17, 33])


def cases(cell, device, dtype, layers=(1, 2, 3), directions=(1, 2)):
    steps, rows, widths = sized(device, (STEPS, ROWS, WIDTHS), (SMALL_STEPS, SMALL_ROWS, SMALL_WIDTHS))
    return st.builds(
        Case, st.just(cell), st.just(dtype), steps, rows, widths, widths, st.sampled_from(layers),
        st.sampled_from(directions), st.booleans(), st.booleans(),
        st.sampled_from(["given", "zeros", "h", "c"]), st.sampled_from(["both", "y", "state"]), st.just(0.0),
        st.booleans(), st.integers(0, 2**32 - 1), st.just(device),
    )  # fmt: skip


def drawn(n):
    return settings(max_examples=n, derandomize=True, deadline=None, database=None)


# --- Against the reference ----------------------------------------------------------------------------------


@every_cell
@every_place
def test_stacks(cell, device, dtype):
    @drawn(sized(device, 40, 12))
    @given(cases(cell, device, dtype), st.integers(1, 4), st.sampled_from([-1, 0, 1]))
    def check(case, threads, way):
        call = draw(case)
        with fr.num_threads(threads), path(way):
            got = run(call)
        assert_within_bound(got, run_reference(call), case)

    check()


@every_cell
@every_place
def test_functional_forms_in_both_directions(cell, device, dtype):
    @drawn(sized(device, 20, 8))
    @given(cases(cell, device, dtype, (1,), (1,)), st.booleans())
    def check(case, reverse):
        case = case._replace(batch_first=False)
        call = draw(case)
        got, want = (run_function(module, case, call, reverse) for module in (fr, fr.reference))
        assert_within_bound(got, want, case)

    check()


@every_cell
@every_place
@pytest.mark.parametrize(
    "sizes",
    [
        (4, 6, 37, 257, 1, 1), (3, 70, 300, 200, 1, 2), (2, 3, 1, 301, 2, 1), (30, 1, 96, 224, 1, 1),
        (3, 9, 64, 272, 1, 2),  # of its products for dx, the last of several pieces goes to dx itself
    ],  # fmt: skip
)
def test_larger_layers(cell, device, dtype, sizes):
    sizes = sized(device, sizes, tuple(map(min, sizes, (2, 9, 40, 70, 1, 2))))
    case = Case(cell, dtype, *sizes, ragged=sizes[1] > 6, seed=2, device=device)
    call = draw(case)
    with fr.num_threads(2):
        assert_within_bound(run(call), run_reference(call), case)


@needs_gpu
@pytest.mark.skipif(EMULATED, reason="too much for the emulated GPU")
@every_cell
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("B", "H"), [(16, 512), (1, 1024), (16, 768), (64, 512)])  # clusters of 16; grids
def test_layers_of_many_blocks_and_their_bits(cell, dtype, B, H):
    case = Case(cell, dtype, 5, B, 40, H, seed=3, device="cuda")
    call = draw(case)
    want = run_reference(call)
    for way in (-1, 0):
        with path(way):
            got = run(call)
            assert_same_bits(got, run(call))
        assert_within_bound(got, want, case)


@every_cell
@every_place
@pytest.mark.parametrize("T, B", [(17, 241), (32, 128), (96, 129)])  # a block and a row; a block; over three
@every_lengths
def test_reductions_over_many_rows_and_their_accumulation(cell, device, dtype, T, B, ragged):
    if sized(device, False, T > 17 or dtype == "float16"):
        pytest.skip("too much for the emulated GPU")
    case = Case(cell, dtype, T, B, 3, 9, ragged=ragged, state="zeros", given="y", device=device)
    call = draw(case)
    layer, want = call.layer, run_reference(call)
    assert_within_bound(run(call), want, case)

    # The gradients of dy and of 2 dy, added up, are three times those of dy.
    y, final, tape = layer.forward(call.x, lengths=call.lengths)
    grads = layer.backward(tape, call.dy, retain=True)
    kept = grads.x, grads.flat
    assert layer.backward(tape, 2 * call.dy, accumulate_into=grads) is grads
    assert (grads.x is kept[0], grads.flat is kept[1]) == (True, True)
    got = named(y, final, grads.x, grads.state, dict(grads.params))
    tripled = {k: a if k in ("y", "h_n", "c_n") else 3 * a for k, a in want.items()}
    assert_within_bound(got, tripled, case, backwards=5)  # 1 + 2 * 2 in squares


@every_cell
@every_device
@every_lengths
def test_accumulation_adds_to_every_gradient_of_a_stack(cell, device, ragged):
    case = Case(cell, "float32", 5, 6, 7, 19, 2, 2, ragged=ragged, device=device)
    first, second = draw(case), draw(case._replace(seed=1))
    layer, want = first.layer, run_reference(first)
    _, _, tape = layer.forward(first.x, first.state, first.lengths)
    grads = layer.backward(tape, first.dy, first.dstate)
    second = second._replace(layer=layer)
    y, final, tape = layer.forward(second.x, second.state, second.lengths)
    layer.backward(tape, second.dy, second.dstate, accumulate_into=grads)
    got = named(y, final, grads.x, grads.state, dict(grads.params))
    added = {k: a if k in ("y", "h_n", "c_n") else a + want[k] for k, a in run_reference(second).items()}
    assert_within_bound(got, added, case, backwards=2)


@every_cell
@every_device
@every_lengths
@pytest.mark.parametrize("L, D", [(1, 1), (2, 2)])
def test_gradients_left_out_change_no_other(cell, device, ragged, L, D):
    call = draw(Case(cell, "float32", 6, 7, 5, 19, L, D, ragged=ragged, device=device))
    layer = call.layer
    _, _, tape = layer.forward(call.x, call.state, call.lengths)
    full = layer.backward(tape, call.dy, call.dstate, retain=True)
    want = {"x": full.x, "state": full.state, "params": full.flat}
    for wrt in (("x",), ("state",), ("params",), ("x", "state"), ("state", "params")):
        some = layer.backward(tape, call.dy, call.dstate, wrt=wrt, retain=True)
        held = {"x": some.x, "state": some.state, "params": some.flat}
        assert [name for name, a in held.items() if a is not None] == list(wrt)
        for name in wrt:
            got, expected = (dict(enumerate(as_tuple(of[name]))) for of in (held, want))
            assert_same_bits(got, expected)


# --- Gradients by finite differences through the kernels ----------------------------------------------------


@every_cell
@every_device
@every_lengths
@every_bias
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reverse"])
def test_gradients_of_functional_forms(cell, device, ragged, bias, reverse):
    case = Case(cell, bias=bias, ragged=ragged, seed=5, device=device)
    call = draw(case)
    _, options, name = OFFERED[cell]
    forward, backward = getattr(fr, f"{name}_forward"), getattr(fr, f"{name}_backward")
    weights = tuple(map(host, call.layer.params.values()))
    here = on_device if device == "cuda" else lambda a: a
    states, dstates = (tuple(s[0] for s in as_tuple(given)) for given in (call.state, call.dstate))

    def compute(x, *rest):
        p, s = (*map(here, rest[: len(weights)]), None, None)[:4], map(here, rest[len(weights) :])
        state = dict(zip(("h0", "c0"), s, strict=False))
        return forward(here(x), *p, **state, lengths=call.lengths, reverse=reverse, **options)

    arrays = [call.x, *weights, *states]
    grads = backward(compute(*arrays)[-1], *map(here, (call.dy, *dstates)))
    of_weights = [getattr(grads, k) for k in ("w_ih", "w_hh", "b_ih", "b_hh")[: len(weights)]]
    of_all = [grads.x, *of_weights, *(grads.h0, grads.c0)[: len(states)]]
    assert_gradients(
        lambda *a: products(map(host, compute(*a)[:-1]), (call.dy, *dstates)),
        arrays, [host(g) for g in of_all], case.T * (case.I + case.H + 20),
    )  # fmt: skip


@every_cell
@every_device
@every_lengths
@every_bias
@pytest.mark.parametrize("L, D, dropout", [(1, 2, 0.0), (3, 1, 0.0), (2, 2, 0.0), (3, 1, 0.4), (2, 2, 0.4)])
def test_gradients_of_stacks(cell, device, ragged, bias, L, D, dropout):
    case = Case(cell, L=L, D=D, bias=bias, ragged=ragged, dropout=dropout, seed=7, device=device)
    call = draw(case)
    layer, flat = call.layer, host(call.layer.flat_params).copy()

    def compute(x, flat, *states):
        layer.flat_params[:] = flat
        return layer.forward(x, states if len(states) > 1 else states[0], call.lengths, seed=3)

    def terms(*arrays):
        y, final, _ = compute(*arrays)
        return products((y, *as_tuple(final)), (call.dy, *as_tuple(call.dstate)))

    arrays = [call.x, flat, *as_tuple(call.state)]
    grads = layer.backward(compute(*arrays)[-1], call.dy, call.dstate)
    roundings = L * case.T * (case.I + (D + 1) * case.H + 20)
    assert_gradients(terms, arrays, [grads.x, grads.flat, *as_tuple(grads.state)], roundings)


# --- Padding, NaN and Inf -----------------------------------------------------------------------------------


def padding(call):
    """(T, B), True beyond each sequence's end."""
    return np.arange(call.x.shape[0])[:, None] >= np.asarray(call.lengths)


@every_cell
@every_place
@pytest.mark.parametrize("L, D", [(1, 1), (2, 2)])
def test_padding_is_never_read(cell, device, dtype, L, D):
    call = draw(Case(cell, dtype, 7, 9, 5, 21, L, D, ragged=True, device=device))
    past = padding(call)
    results = []
    for filler in (0.0, np.nan, np.inf):
        call.x[past] = call.dy[past] = filler
        results.append(run(call))
    assert all(np.isfinite(a).all() for a in results[0].values())
    assert past.any() and not results[0]["y"][past].any() and not results[0]["dx"][past].any()
    for other in results[1:]:
        assert_same_bits(other, results[0])


@every_cell
@every_device
@every_lengths
def test_accumulation_leaves_the_padding_of_dx(cell, device, ragged):
    call = draw(Case(cell, "float32", 6, 5, 4, 17, ragged=ragged, device=device))
    _, _, tape = call.layer.forward(call.x, call.state, call.lengths)
    grads = call.layer.backward(tape, call.dy, retain=True)
    once = grads.x.copy()
    past = padding(call) if ragged else np.zeros(call.x.shape[:2], bool)
    grads.x[past] = 5
    call.layer.backward(tape, call.dy, accumulate_into=grads)
    assert (grads.x[past] == 5).all()
    rounding = 0 if device == "cpu" else 1e-6  # a sum that starts at what is there, or is added to it
    np.testing.assert_allclose(grads.x[~past], 2 * once[~past], rtol=rounding, atol=rounding)


@every_cell
@every_place
@every_lengths
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "state"])
def test_nan_and_inf_flow_as_in_the_equations_and_into_no_other_sequence(
    cell, device, dtype, ragged, bad, where
):
    case = Case(cell, dtype, 6, 5, 7, 19, L=2, ragged=ragged, device=device)
    call = draw(case)
    b = int(np.argmax(call.lengths)) if ragged else 2
    clean = run(call)
    if where == "x":
        call.x[2, b, 3] = bad
    else:
        as_tuple(call.state)[0][0, b, 4] = bad
    got = run(call)
    with np.errstate(all="ignore"):
        want = run_reference(call)
    for name in ("y", "h_n", *(["c_n"] if cell == "lstm" else [])):
        for test in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(test(exact(got[name])), test(want[name]), err_msg=name)
    others = np.arange(5) != b
    for name in ("y", "h_n", "dx", "dh0", *(["c_n", "dc0"] if cell == "lstm" else [])):
        assert_same_bits({name: got[name][:, others]}, {name: clean[name][:, others]})
    if np.isnan(bad):
        name, unit = ("weight_ih_l0", 3) if where == "x" else ("weight_hh_l0", 4)
        assert np.isnan(got[name][:, unit]).any() and not np.isnan(clean[name]).any()


# --- Layouts of the caller's arrays -------------------------------------------------------------------------


def gaps(a):
    wide = np.full((*a.shape[:-1], 3 * a.shape[-1]), np.nan, a.dtype)
    wide[..., 1::3] = a
    return wide[..., 1::3]


def read_only(a):
    copy = a.copy()
    copy.flags.writeable = False
    return copy


def reversed_strides(a):
    return a[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1]


def batch_major(a):
    return a.swapaxes(0, 1).copy().swapaxes(0, 1)


def row_padded(a):
    wide = np.full((a.shape[0], a.shape[1] + 2, a.shape[2] + 5), np.nan, a.dtype)
    wide[:, 1:-1, 2:-3] = a
    return wide[:, 1:-1, 2:-3]


@every_cell
@every_place
@every_lengths
@pytest.mark.parametrize(
    "lay_out", [gaps, read_only, reversed_strides, np.asfortranarray, batch_major, row_padded]
)
def test_layouts_change_no_bit(cell, device, dtype, ragged, lay_out):
    call = draw(Case(cell, dtype, 5, 6, 7, 18, L=2, D=2, ragged=ragged, device=device))
    laid_out = call._replace(x=lay_out(call.x), dy=lay_out(call.dy), state=as_given(lay_out, call.state),
                             dstate=as_given(lay_out, call.dstate))  # fmt: skip
    assert_same_bits(run(laid_out), run(call))


def as_given(lay_out, state):
    return tuple(map(lay_out, state)) if isinstance(state, tuple) else lay_out(state)


@every_cell
@every_device
@every_lengths
def test_one_step_or_sequence_repeated_by_zero_strides(cell, device, ragged):
    call = draw(Case(cell, "float32", 5, 6, 7, 18, ragged=ragged, device=device))
    for x in (call.x[:1], call.x[:, :1]):
        repeated = np.broadcast_to(x, call.x.shape)
        dy = np.broadcast_to(call.dy[:1, :1], call.dy.shape)
        got = run(call._replace(x=repeated, dy=dy))
        assert_same_bits(got, run(call._replace(x=repeated.copy(), dy=dy.copy())))


@every_cell
@every_place
@every_lengths
def test_batch_first_is_time_major_transposed(cell, device, dtype, ragged):
    case = Case(cell, dtype, 6, 5, 7, 18, L=2, D=2, ragged=ragged, device=device)
    major, first = run(draw(case)), run(draw(case._replace(batch_first=True)))
    swapped = {k: a.swapaxes(0, 1) if k in ("y", "dx") else a for k, a in first.items()}
    assert_same_bits(swapped, major)
