"""The reference against its equations, finite differences and the promises about lengths and directions."""

import math
import subprocess
import sys

import numpy as np
import pytest

from fusedrnn import reference
from fusedrnn.reference import CELLS

EPS = np.finfo(np.float64).eps
T, B, I, H = 5, 4, 3, 4
LENGTHS = [3, 0, 5, 1]

# cell: forward, backward, one step, the options that choose it
FUNCTIONS = {
    "lstm": (reference.lstm_forward, reference.lstm_backward, reference.lstm_cell, {}),
    "gru": (reference.gru_forward, reference.gru_backward, reference.gru_cell, {"reset_after": True}),
    "gru_reset_before": (
        reference.gru_forward,
        reference.gru_backward,
        reference.gru_cell,
        {"reset_after": False},
    ),
    "rnn_tanh": (reference.rnn_forward, reference.rnn_backward, reference.rnn_cell, {"nonlinearity": "tanh"}),
    "rnn_relu": (reference.rnn_forward, reference.rnn_backward, reference.rnn_cell, {"nonlinearity": "relu"}),
}
every_cell = pytest.mark.parametrize("cell", CELLS)
every_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reverse"])
every_lengths = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])


def test_functions_cover_the_registry():
    assert set(FUNCTIONS) == set(CELLS)


def draw_params(rng, cell, layers=1, directions=1, bias=True, inputs=I, hidden=H):
    """Weights and biases U(±1/√H), as layers start with."""
    rows = CELLS[cell].gates * hidden
    params = []
    for layer in range(layers):
        columns = inputs if layer == 0 else directions * hidden
        shapes = [(rows, columns), (rows, hidden), *([(rows,), (rows,)] if bias else [])]
        for _ in range(directions):
            params += [rng.uniform(-1, 1, shape) / math.sqrt(hidden) for shape in shapes]
    return tuple(params)


def draw_state(rng, cell, *shape):
    return tuple(rng.standard_normal(shape) for _ in range(CELLS[cell].states))


def draw_masks(rng, layers, directions):
    return [(rng.random((T, B, directions * H)) < 0.7) / 0.7 for _ in range(layers - 1)]


def padding(lengths):
    """(T, B), True beyond each sequence's end."""
    return np.arange(T)[:, None] >= np.asarray(lengths)


def flatten(nested):
    return [a for part in nested for a in (part if isinstance(part, tuple) else (part,)) if a is not None]


def assert_same(got, want, exact=True, roundings=0):
    """Every array of `got` as in `want`; unless exact, each may be off by `roundings` eps of its norm."""
    got, want = flatten(got), flatten(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        if exact:
            np.testing.assert_array_equal(a, b)
        else:
            assert np.linalg.norm(a - b) <= roundings * EPS * max(np.linalg.norm(b), math.sqrt(b.size))


# --- Values against the equations, scalar by scalar ---------------------------------------------------------


def scalar_step(cell, x, h, c, w_ih, w_hh, b_ih, b_hh):
    """One sequence, one step, with Python floats: (h', c')."""
    units = range(len(h))

    def sigmoid(a):
        return 1 / (1 + math.exp(-a))

    def from_x(gate, k):
        row = gate * len(h) + k
        return sum(w_ih[row][j] * x[j] for j in range(len(x))) + b_ih[row]

    def from_h(gate, k, h):
        row = gate * len(h) + k
        return sum(w_hh[row][j] * h[j] for j in units) + b_hh[row]

    def both(gate, k):
        return from_x(gate, k) + from_h(gate, k, h)

    if cell == "rnn_tanh":
        return [math.tanh(both(0, k)) for k in units], None
    if cell == "rnn_relu":
        return [max(both(0, k), 0.0) for k in units], None
    if cell == "lstm":
        i, f, o = ([sigmoid(both(gate, k)) for k in units] for gate in (0, 1, 3))
        g = [math.tanh(both(2, k)) for k in units]
        c_new = [f[k] * c[k] + i[k] * g[k] for k in units]
        return [o[k] * math.tanh(c_new[k]) for k in units], c_new
    r, z = ([sigmoid(both(gate, k)) for k in units] for gate in (0, 1))
    if cell == "gru":
        n = [math.tanh(from_x(2, k) + r[k] * from_h(2, k, h)) for k in units]
    else:
        n = [math.tanh(from_x(2, k) + from_h(2, k, [r[j] * h[j] for j in units])) for k in units]
    return [z[k] * h[k] + (1 - z[k]) * n[k] for k in units], None


@every_cell
def test_cell_is_its_equations(cell):
    rng = np.random.default_rng(1)
    x, state, params = rng.standard_normal((B, I)), draw_state(rng, cell, B, H), draw_params(rng, cell)
    *_, step, options = FUNCTIONS[cell]
    got = step(x, *state, *params, **options)
    got = got if isinstance(got, tuple) else (got,)
    for b in range(B):
        h, c = (*(s[b].tolist() for s in state), None)[:2]
        want = scalar_step(cell, x[b].tolist(), h, c, *(p.tolist() for p in params))
        assert_same([s[b] for s in got], [np.array(s) for s in want if s is not None], False, I + H + 10)


@every_cell
def test_layer_of_one_step_is_the_cell(cell):
    rng = np.random.default_rng(2)
    x, state, params = rng.standard_normal((1, B, I)), draw_state(rng, cell, B, H), draw_params(rng, cell)
    forward, _, step, options = FUNCTIONS[cell]
    y, *end, _ = forward(x, *params, *state, **options)
    after = step(x[0], *state, *params, **options)
    assert_same(end, [after])
    assert_same([y[0]], end[:1])


def test_the_two_grus_differ_unless_reset_commutes_with_the_candidate_product():
    rng = np.random.default_rng(3)
    x, h = rng.standard_normal((B, I)), rng.standard_normal((B, H))
    w_ih, w_hh, b_ih, b_hh = draw_params(rng, "gru")
    after, before = (reference.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh, reset_after=r) for r in (True, False))
    assert np.abs(after - before).max() > 1e-3
    # W_hn (r∘h) + b_hn = r∘(W_hn h + b_hn) for a diagonal W_hn and b_hn = 0
    w_hh[2 * H :], b_hh[2 * H :] = np.diag(w_hh[2 * H :, 0]), 0
    after, before = (reference.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh, reset_after=r) for r in (True, False))
    assert_same([after], [before], False, I + H + 10)


def test_sigmoid_saturates_without_overflow_and_keeps_relative_accuracy():
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        c = np.array([-1e4, -40.0, 40.0, 1e4])[:, None]
        # with w_ih = (0, 1, 0, 0): c' = σ(x)·1 + 1/2·tanh(0)
        w_ih = np.array([[0.0], [1.0], [0.0], [0.0]])
        _, got = reference.lstm_cell(c, np.zeros((4, 1)), np.ones((4, 1)), w_ih, np.zeros((4, 1)))
    want = [0.0, math.exp(-40) / (1 + math.exp(-40)), 1 / (1 + math.exp(-40)), 1.0]
    np.testing.assert_allclose(got[:, 0], want, rtol=4 * EPS, atol=0)


# --- Backward against finite differences --------------------------------------------------------------------


def assert_gradients(terms, arrays, grads, roundings):
    """Check each gradient along one random direction v by the fourth-order central difference

        D(e) = (8 (f(e) - f(-e)) - (f(2e) - f(-2e))) / 12e,    f(s): the sum of terms, the array moved by s v.

    Its truncation error is e⁴/30 times a fifth derivative, a fifteenth of D(2e) - D(e). If f is off by d,
    D is off by at most 18 d / 12e; d is eps Σ|terms| times `roundings`, those on the longest path through f.
    """
    e = 1e-4
    rng = np.random.default_rng(17)
    arrays = list(arrays)
    rounding = 1.5 / e * roundings * EPS * np.abs(terms(*arrays)).sum()
    assert len(arrays) == len(grads)
    for k, (array, grad) in enumerate(zip(arrays, grads, strict=True)):
        assert grad.shape == array.shape
        v = rng.standard_normal(array.shape)
        v /= np.linalg.norm(v)

        def f(s, k=k, moved=array, v=v):
            return math.fsum(terms(*arrays[:k], moved + s * v, *arrays[k + 1 :]))

        def difference(e, f=f):
            return (8 * (f(e) - f(-e)) - (f(2 * e) - f(-2 * e))) / (12 * e)

        numeric, coarse = difference(e), difference(2 * e)
        tolerance = abs(coarse - numeric) + rounding
        # The check must be able to see an error. With a kink of relu within ±4e it is not: take another seed.
        assert tolerance <= 1e-6 * np.linalg.norm(grad), f"argument {k}: differences resolve {tolerance} only"
        assert abs(np.vdot(grad, v) - numeric) <= tolerance, f"argument {k}: {np.vdot(grad, v)} != {numeric}"


def products(outputs, gradients):
    return np.concatenate([(a * d).ravel() for a, d in zip(outputs, gradients, strict=True)])


@every_cell
@every_direction
@every_lengths
@pytest.mark.parametrize("biases", ["both", "b_ih", "b_hh", "none"])
def test_layer_backward(cell, reverse, lengths, biases):
    rng = np.random.default_rng(4)
    forward, backward, _, options = FUNCTIONS[cell]
    x, state = rng.standard_normal((T, B, I)), draw_state(rng, cell, B, H)
    w_ih, w_hh, *both = draw_params(rng, cell)
    given = {name: b for name, b in zip(("b_ih", "b_hh"), both, strict=True) if biases in ("both", name)}
    douts = rng.standard_normal((T, B, H)), *draw_state(rng, cell, B, H)

    def run(x, w_ih, w_hh, *rest):
        b, s = dict(zip(given, rest, strict=False)), rest[len(given) :]
        initial = dict(zip(("h0", "c0"), s, strict=False))
        return forward(x, w_ih, w_hh, **b, **initial, lengths=lengths, reverse=reverse, **options)

    arrays = [x, w_ih, w_hh, *given.values(), *state]
    *_, tape = run(*arrays)
    g = backward(tape, *douts)
    assert [g.b_ih is not None, g.b_hh is not None] == ["b_ih" in given, "b_hh" in given]
    grads = [g.x, g.w_ih, g.w_hh, *(getattr(g, name) for name in given), g.h0, g.c0][: len(arrays)]
    assert_gradients(lambda *a: products(run(*a)[:-1], douts), arrays, grads, T * (I + H + 20))


@every_cell
@every_lengths
@pytest.mark.parametrize("layers, directions, reverse", [(1, 2, 0), (2, 1, 1), (2, 2, 0), (3, 1, 0)])
@pytest.mark.parametrize("bias, dropout", [(True, True), (False, False)])
def test_stack_backward(cell, lengths, layers, directions, reverse, bias, dropout):
    rng = np.random.default_rng(22)
    x, params = rng.standard_normal((T, B, I)), draw_params(rng, cell, layers, directions, bias)
    state = draw_state(rng, cell, layers * directions, B, H)
    masks = draw_masks(rng, layers, directions) if dropout else None
    dy, dstate = rng.standard_normal((T, B, directions * H)), draw_state(rng, cell, layers * directions, B, H)

    def run(x, *rest):
        p, s = rest[: len(params)], rest[len(params) :]
        return reference.stack_forward(cell, x, p, s, lengths, layers, directions, bias, masks, reverse)

    def terms(*arrays):
        y, end, _ = run(*arrays)
        return products((y, *end), (dy, *dstate))

    arrays = x, *params, *state
    g = reference.stack_backward(run(*arrays)[2], dy, dstate)
    assert_gradients(terms, arrays, (g.x, *g.params, *g.state), layers * T * (I + directions * H + H + 20))


def test_relu_has_derivative_zero_at_zero():
    x, w = np.zeros((1, 1, I)), np.ones((H, I))
    _, _, tape = reference.rnn_forward(x, w, np.ones((H, H)), nonlinearity="relu")
    g = reference.rnn_backward(tape, np.ones((1, 1, H)))
    assert not g.x.any() and not g.h0.any()


@every_cell
def test_missing_output_gradients_count_as_zeros(cell):
    rng = np.random.default_rng(6)
    forward, backward, _, options = FUNCTIONS[cell]
    *_, tape = forward(rng.standard_normal((T, B, I)), *draw_params(rng, cell), **options)
    dy, dend, zeros = rng.standard_normal((T, B, H)), draw_state(rng, cell, B, H), np.zeros((B, H))
    assert_same(backward(tape, dy), backward(tape, dy, *(zeros for _ in dend)))
    assert_same(backward(tape, None, *dend), backward(tape, np.zeros((T, B, H)), *dend))
    assert not any(a.any() for a in flatten(backward(tape)))


# --- Lengths and directions ---------------------------------------------------------------------------------


def run_layer(cell, x, params, state, dy, dend, lengths=None, reverse=False):
    """(y, final states), gradients"""
    forward, backward, _, options = FUNCTIONS[cell]
    *out, tape = forward(x, *params, *state, lengths=lengths, reverse=reverse, **options)
    return out, backward(tape, dy, *dend)


def draw_layer(rng, cell):
    return (
        rng.standard_normal((T, B, I)),
        draw_params(rng, cell),
        draw_state(rng, cell, B, H),
        rng.standard_normal((T, B, H)),
        draw_state(rng, cell, B, H),
    )


@every_cell
@every_direction
def test_lengths_are_each_sequence_alone(cell, reverse):
    x, params, state, dy, dend = draw_layer(np.random.default_rng(7), cell)
    (y, *end), g = run_layer(cell, x, params, state, dy, dend, LENGTHS, reverse)
    assert not y[padding(LENGTHS)].any() and not g.x[padding(LENGTHS)].any()
    dparams = [np.zeros(p.shape) for p in params]
    roundings = T * (I + H + 20) + B
    for b, n in enumerate(LENGTHS):
        one = slice(b, b + 1)
        cut = [[s[one] for s in group] for group in (state, dend)]
        (y_b, *end_b), g_b = run_layer(cell, x[:n, one], params, cut[0], dy[:n, one], cut[1], reverse=reverse)
        assert_same([y[:n, one], *(s[one] for s in end)], [y_b, *end_b], False, roundings)
        assert_same([g.x[:n, one], g.h0[one]], [g_b.x, g_b.h0], False, roundings)
        for total, term in zip(dparams, g_b[3:], strict=True):
            total += term
    assert_same(g[3:], dparams, False, roundings)
    empty = LENGTHS.index(0)
    for s, s_end in zip((*state, g.h0), (*end, dend[0]), strict=True):
        np.testing.assert_array_equal(s[empty], s_end[empty])


@every_cell
def test_padding_is_never_read(cell):
    rng = np.random.default_rng(8)
    x, dy = rng.standard_normal((T, B, I)), rng.standard_normal((T, B, 2 * H))
    params, state = draw_params(rng, cell, 2, 2), draw_state(rng, cell, 4, B, H)
    results = []
    for filler in (0.0, np.nan):
        x[padding(LENGTHS)], dy[padding(LENGTHS)] = filler, filler
        y, end, tape = reference.stack_forward(cell, x, params, state, LENGTHS, 2, 2, True)
        results.append([y, end, *reference.stack_backward(tape, dy, end)])
    assert all(np.isfinite(a).all() for a in flatten(results[0]))
    assert_same(*results)


@every_cell
def test_full_lengths_change_nothing(cell):
    args = draw_layer(np.random.default_rng(9), cell)
    for lengths in ([T] * B, np.full(B, T, np.uint8)):
        for got, want in zip(run_layer(cell, *args, lengths), run_layer(cell, *args), strict=True):
            assert_same(got, want)


@every_cell
@every_lengths
def test_reverse_is_flipping_each_sequence(cell, lengths):
    x, params, state, dy, dend = draw_layer(np.random.default_rng(10), cell)

    def flip(a):
        flipped = a.copy()
        for b, n in enumerate(lengths or [T] * B):
            flipped[:n, b] = a[:n, b][::-1]
        return flipped

    (y, *end), g = run_layer(cell, x, params, state, dy, dend, lengths, reverse=True)
    (y_f, *end_f), g_f = run_layer(cell, flip(x), params, state, flip(dy), dend, lengths)
    # Which sequences share a product differs between the two, and with it the order of its sums.
    assert_same([y, *end, *g], [flip(y_f), *end_f, flip(g_f.x), *g_f[1:]], False, T * (I + H + 20) + B)


# --- Stacks -------------------------------------------------------------------------------------------------


@every_cell
@every_lengths
def test_stack_is_its_layers(cell, lengths):
    rng = np.random.default_rng(11)
    forward, _, _, options = FUNCTIONS[cell]
    x, params = rng.standard_normal((T, B, I)), draw_params(rng, cell, 2, 2)
    state, masks = draw_state(rng, cell, 4, B, H), draw_masks(rng, 2, 2)
    y, end, _ = reference.stack_forward(cell, x, params, state, lengths, 2, 2, True, masks)

    want, want_end = x, []
    for layer, reverses in enumerate([(False, True)] * 2):
        ys = []
        for d, reverse in enumerate(reverses):
            k = 2 * layer + d
            own, initial = params[4 * k : 4 * k + 4], [s[k] for s in state]
            y_d, *end_d, _ = forward(want, *own, *initial, lengths=lengths, reverse=reverse, **options)
            ys.append(y_d)
            want_end.append(end_d)
        want = np.concatenate(ys, axis=2)
        if layer == 0:
            want = want * masks[0]
    assert_same([y, end], [want, tuple(map(np.stack, zip(*want_end, strict=True)))])


@every_cell
def test_missing_states_are_zeros(cell):
    rng = np.random.default_rng(12)
    x, params = rng.standard_normal((T, B, I)), draw_params(rng, cell, 2, 1)
    zeros = tuple(np.zeros((2, B, H)) for _ in range(CELLS[cell].states))
    want = reference.stack_forward(cell, x, params, zeros, None, 2, 1, True)[:2]
    for state in (None, (None,) * len(zeros), (zeros[0], None)[: len(zeros)]):
        assert_same(reference.stack_forward(cell, x, params, state, None, 2, 1, True)[:2], want)


# --- Empty inputs, dtypes, errors ---------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("steps, batch", [(0, B), (T, 0), (0, 0)])
@pytest.mark.parametrize("directions", [1, 2])
def test_no_steps_or_no_sequences(cell, steps, batch, directions):
    rng = np.random.default_rng(13)
    params, state = draw_params(rng, cell, 2, directions), draw_state(rng, cell, 2 * directions, batch, H)
    x, dy = np.zeros((steps, batch, I)), np.zeros((steps, batch, directions * H))
    for lengths in (None, [steps] * batch):
        y, end, tape = reference.stack_forward(cell, x, params, state, lengths, 2, directions, True)
        g = reference.stack_backward(tape, dy, state)
        assert y.shape == dy.shape and g.x.shape == x.shape
        assert_same([end, g.state], [state, state])
        assert_same([g.params], [tuple(np.zeros(p.shape) for p in params)])


@every_cell
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_any_float_dtype_is_computed_in_float64_and_left_alone(cell, dtype):
    rng = np.random.default_rng(14)
    forward, backward, _, options = FUNCTIONS[cell]
    narrow = [a.astype(dtype) for a in flatten(draw_layer(rng, cell)[:3])]
    kept = [a.copy() for a in narrow]
    results = []
    for arrays in (narrow, [a.astype(np.float64) for a in narrow]):
        *out, tape = forward(*arrays, **options)
        dy = np.ones(out[0].shape, arrays[0].dtype)
        results.append([*out, *backward(tape, dy, *out[1:])])
    assert all(a.dtype == np.float64 for a in flatten(results[0]))
    assert_same(*results)
    assert_same(narrow, kept)


def test_tape_is_independent_of_what_the_caller_does_later():
    x, params, state, dy, dend = draw_layer(np.random.default_rng(15), "lstm")
    *_, tape = reference.lstm_forward(x, *params, *state)
    want = reference.lstm_backward(tape, dy, *dend)
    for a in flatten((x, params, state)):
        a[...] = np.nan
    assert_same(reference.lstm_backward(tape, dy, *dend), want)


def lstm_arguments(**changes):
    params = {"w_ih": np.zeros((4 * H, I)), "w_hh": np.zeros((4 * H, H)), "b_ih": np.zeros(4 * H)}
    return {"x": np.zeros((T, B, I)), **params, "h0": np.zeros((B, H)), "c0": np.zeros((B, H)), **changes}


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"x": np.zeros((B, I))}, ValueError, r"lstm: x must have shape \(T, B, I\), got \(4, 3\)"),
        ({"w_ih": np.zeros((15, 3))}, ValueError, r"lstm: w_ih must have shape \(16, 3\), got \(15, 3\)"),
        ({"w_hh": np.zeros((12, 4))}, ValueError, r"lstm: w_hh must have shape \(16, 4\), got \(12, 4\)"),
        ({"b_ih": np.zeros((1, 16))}, ValueError, r"lstm: b_ih must have shape \(16,\), got \(1, 16\)"),
        ({"h0": np.zeros((1, 4))}, ValueError, r"lstm: h0 must have shape \(4, 4\), got \(1, 4\)"),
        ({"c0": np.zeros((4, 4), int)}, TypeError, r"lstm: c0 must have a float dtype, got int.*\.astype"),
        ({"lengths": [1, 2, 3]}, ValueError, r"lstm: lengths must have shape \(4,\), got \(3,\)"),
        ({"lengths": [1, 2, 3, 6]}, ValueError, r"lstm: lengths must lie in 0\.\.5, got 1\.\.6"),
        ({"lengths": [1, -2, 3, 4]}, ValueError, r"lstm: lengths must lie in 0\.\.5, got -2\.\.4"),
        ({"lengths": np.ones(4)}, TypeError, r"lstm: lengths must have integers, got float64.*\.astype"),
    ],
)
def test_wrong_arguments_are_named(changes, error, text):
    reference.lstm(**lstm_arguments())
    with pytest.raises(error, match=text):
        reference.lstm(**lstm_arguments(**changes))


def test_wrong_names_tapes_and_counts_are_named():
    rng = np.random.default_rng(16)
    x, params = rng.standard_normal((T, B, I)), draw_params(rng, "gru", 2)
    with pytest.raises(ValueError, match="rnn: nonlinearity must be one of 'tanh', 'relu', got 'gelu'"):
        reference.rnn(x, *draw_params(rng, "rnn_tanh"), nonlinearity="gelu")
    *_, tape = reference.gru_forward(x, *params[:4])
    with pytest.raises(ValueError, match="lstm_backward: tape must come from lstm_forward, got one of 'gru'"):
        reference.lstm_backward(tape)
    with pytest.raises(ValueError, match=r"gru_backward: dy must have shape \(5, 4, 4\), got \(5, 4\)"):
        reference.gru_backward(tape, np.zeros((5, 4)))

    stack = reference.stack_forward
    with pytest.raises(ValueError, match="stack_forward: cell must be one of 'lstm', .*, got 'gruu'"):
        stack("gruu", x, params, None, None, 2, 1, True)
    with pytest.raises(ValueError, match="stack_forward: directions must be one of 1, got 2"):
        stack("gru", x, params, None, None, 1, 2, True, reverse=True)
    with pytest.raises(ValueError, match="stack_forward: params must hold 4 arrays, got 8"):
        stack("gru", x, params, None, None, 1, 1, True)
    with pytest.raises(ValueError, match="stack_forward: state must hold 1 arrays, got 2"):
        stack("gru", x, params, (None, None), None, 2, 1, True)
    with pytest.raises(ValueError, match=r"stack_forward: dropout_masks\[0\] must have shape \(5, 4, 4\)"):
        stack("gru", x, params, None, None, 2, 1, True, [np.ones((1, B, H))])


def test_loads_alone():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, reference.__file__], capture_output=True, text=True, check=True
    )
    assert not [name for name in done.stdout.split() if name.startswith("fusedrnn")]
