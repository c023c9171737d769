"""The reference against PyTorch in float64: values and all gradients."""

import math

import numpy as np
import pytest

from fusedrnn import reference
from fusedrnn.reference import CELLS

torch = pytest.importorskip("torch")

EPS = np.finfo(np.float64).eps
T, B, I, H = 7, 5, 3, 6
LENGTHS = [4, 7, 1, 6, 4]
MODULES = {
    "lstm": (torch.nn.LSTM, {}),
    "gru": (torch.nn.GRU, {}),
    "rnn_tanh": (torch.nn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
}
every_lengths = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["padded", "packed"])


def draw_stack(seed, cell, layers, directions, bias=True):
    """x, parameters U(±1/√H), states, and the gradients of y and of the final states."""
    rng = np.random.default_rng(seed)
    rows = CELLS[cell].gates * H
    params = []
    for layer in range(layers):
        for _ in range(directions):
            columns = I if layer == 0 else directions * H
            shapes = [(rows, columns), (rows, H), *([(rows,)] * 2 if bias else [])]
            params += [rng.uniform(-1, 1, shape) / math.sqrt(H) for shape in shapes]
    state, dstate = (
        tuple(rng.standard_normal((layers * directions, B, H)) for _ in range(CELLS[cell].states))
        for _ in range(2)
    )
    return rng.standard_normal((T, B, I)), params, state, rng.standard_normal((T, B, directions * H)), dstate


def leaves(arrays):
    return [torch.tensor(a, requires_grad=True) for a in arrays]


def gradients(outputs, grads, wrt):
    total = sum((a * torch.as_tensor(g)).sum() for a, g in zip(outputs, grads, strict=True))
    return torch.autograd.grad(total, wrt)


def fill(module, params):
    with torch.no_grad():
        for p, array in zip(module.parameters(), params, strict=True):
            p.copy_(torch.as_tensor(array))


def make_module(cell, params, inputs, layers=1, directions=1, bias=True):
    kind, options = MODULES[cell]
    module = kind(inputs, H, layers, bias=bias, bidirectional=directions == 2, dtype=torch.float64, **options)
    fill(module, params)
    return module


def call_module(module, x, state, lengths):
    """y and the final states, padded sequences packed on the way."""
    if lengths is not None:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    y, end = module(x, tuple(state) if len(state) == 2 else state[0])
    if lengths is not None:
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, total_length=T)
    return y, *(end if len(state) == 2 else (end,))


def assert_close(got, want, directions, factor):
    """‖got-want‖ ≤ 4·factor·max(4, ⌈log2(K·T)⌉)·eps·max(‖want‖, √n), factor 1 forward and 2 backward.

    K is the longest sum: over T·B for weights, a gate's inputs, the gates for dh; n the number of elements,
    whose natural scale is 1, as x, the states and the output gradients are N(0, 1).
    """
    k = max(T * B, (directions + 1) * H, 4 * H)
    bound = 4 * factor * max(4, math.ceil(math.log2(k * T))) * EPS
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        b = b.detach().numpy()
        assert a.shape == b.shape
        error, scale = np.linalg.norm(a - b), max(np.linalg.norm(b), math.sqrt(b.size))
        assert error <= bound * scale, f"array {i}: error {error}, norm {np.linalg.norm(b)}"


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("layers, directions", [(1, 1), (1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@every_lengths
def test_stack(cell, layers, directions, bias, lengths):
    x, params, state, dy, dstate = draw_stack(1, cell, layers, directions, bias)
    y, end, tape = reference.stack_forward(cell, x, params, state, lengths, layers, directions, bias)
    g = reference.stack_backward(tape, dy, dstate)

    module = make_module(cell, params, I, layers, directions, bias)
    x_t, *state_t = leaves((x, *state))
    out_t = call_module(module, x_t, state_t, lengths)
    g_t = gradients(out_t, (dy, *dstate), (x_t, *state_t, *module.parameters()))
    assert_close((y, *end), out_t, directions, 1)
    assert_close((g.x, *g.state, *g.params), g_t, directions, 2)


@pytest.mark.parametrize("cell", MODULES)
@every_lengths
def test_stack_with_dropout_masks(cell, lengths):
    """Two one-layer modules with the mask between them."""
    x, params, state, dy, dstate = draw_stack(2, cell, 2, 2)
    mask = (np.random.default_rng(3).random((T, B, 2 * H)) < 0.6) / 0.6
    y, end, tape = reference.stack_forward(cell, x, params, state, lengths, 2, 2, True, [mask])
    g = reference.stack_backward(tape, dy, dstate)

    modules = make_module(cell, params[:8], I, 1, 2), make_module(cell, params[8:], 2 * H, 1, 2)
    x_t, *state_t = leaves((x, *state))
    y_t, *low = call_module(modules[0], x_t, [s[:2] for s in state_t], lengths)
    y_t, *high = call_module(modules[1], y_t * torch.as_tensor(mask), [s[2:] for s in state_t], lengths)
    out_t = y_t, *(torch.cat(pair) for pair in zip(low, high, strict=True))
    wrt = x_t, *state_t, *modules[0].parameters(), *modules[1].parameters()
    assert_close((y, *end), out_t, 2, 1)
    assert_close((g.x, *g.state, *g.params), gradients(out_t, (dy, *dstate), wrt), 2, 2)


def test_gru_reset_before():
    """PyTorch has no such layer: its automatic differentiation of the equations."""
    x, params, state, dy, dstate = draw_stack(4, "gru_reset_before", 1, 1)
    y, h_n, tape = reference.gru_forward(x, *params, state[0][0], reset_after=False)
    g = reference.gru_backward(tape, dy, dstate[0][0])

    x_t, w_ih, w_hh, b_ih, b_hh, h0 = leaves((x, *params, state[0][0]))
    (w_r, w_z, w_n), (b_r, b_z, b_n) = w_hh.chunk(3), b_hh.chunk(3)
    h, ys = h0, []
    for u in x_t @ w_ih.T + b_ih:
        u_r, u_z, u_n = u.chunk(3, dim=1)
        r = torch.sigmoid(u_r + h @ w_r.T + b_r)
        z = torch.sigmoid(u_z + h @ w_z.T + b_z)
        n = torch.tanh(u_n + (r * h) @ w_n.T + b_n)
        h = z * h + (1 - z) * n
        ys.append(h)
    out_t = torch.stack(ys), h
    g_t = gradients(out_t, (dy, dstate[0][0]), (x_t, h0, w_ih, w_hh, b_ih, b_hh))
    assert_close((y, h_n), out_t, 1, 1)
    assert_close((g.x, g.h0, *g[3:]), g_t, 1, 2)


@pytest.mark.parametrize(
    "cell, kind, step",
    [
        ("lstm", torch.nn.LSTMCell, reference.lstm_cell),
        ("gru", torch.nn.GRUCell, reference.gru_cell),
        ("rnn_tanh", torch.nn.RNNCell, reference.rnn_cell),
    ],
)
def test_cell(cell, kind, step):
    x, params, state, _, _ = draw_stack(5, cell, 1, 1)
    x, state = x[0], [s[0] for s in state]
    module = kind(I, H, dtype=torch.float64)
    fill(module, params)
    got = step(x, *state, *params)
    given = tuple(map(torch.as_tensor, state))
    want = module(torch.as_tensor(x), given if len(state) == 2 else given[0])
    assert_close(got if len(state) == 2 else (got,), want if len(state) == 2 else (want,), 1, 1)
