"""Kernels against PyTorch: values and all gradients, the weights moved there and back through state dicts."""

import numpy as np
import pytest
from bound import OFFERED, Case, as_tuple, assert_within_bound, draw, named, run, run_function

import fusedrnn as fr

torch = pytest.importorskip("torch")

T, B, I, H = 7, 5, 6, 19
MODULES = {
    "lstm": (torch.nn.LSTM, {}),
    "gru": (torch.nn.GRU, {}),
    "rnn_tanh": (torch.nn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
}
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
every_lengths = pytest.mark.parametrize("ragged", [False, True], ids=["padded", "packed"])


@pytest.fixture(autouse=True, scope="module")
def one_thread_of_torch():
    """Its own cost more than they save at these sizes, above all beside ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def module_of(case, dtype):
    kind, options = MODULES[case.cell]
    return kind(
        case.I, case.H, case.L, bias=case.bias, batch_first=case.batch_first, bidirectional=case.D == 2,
        dtype=dtype, **options,
    )  # fmt: skip


def leaf(array):
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def numbers(tensors):
    return tuple(t.detach().numpy() for t in tensors)


def gradients(outputs, given, wrt):
    total = sum((a * torch.tensor(g)).sum() for a, g in zip(outputs, given, strict=True))
    return numbers(torch.autograd.grad(total, wrt))


def run_torch(module, case, call):
    """The call through a float64 module, packed where there are lengths; torch packs none of length 0."""
    x, state = leaf(call.x), tuple(map(leaf, as_tuple(call.state)))
    given = x
    if call.lengths is not None:
        given = torch.nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor(call.lengths), case.batch_first, enforce_sorted=False
        )
    y, final = module(given, state if len(state) == 2 else state[0])
    if call.lengths is not None:
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, case.batch_first, total_length=case.T)
    final = as_tuple(final)
    dx, *rest = gradients(
        (y, *final), (call.dy, *as_tuple(call.dstate)), (x, *state, *module.parameters())
    )
    names = [name for name, _ in module.named_parameters()]
    dparams = dict(zip(names, rest[len(state) :], strict=True))
    return named(*numbers([y]), numbers(final), dx, tuple(rest[: len(state)]), dparams)


@pytest.mark.parametrize("cell", MODULES)
@every_dtype
@every_lengths
@pytest.mark.parametrize("L, D", [(1, 1), (1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients(cell, dtype, ragged, L, D, bias):
    case = Case(cell, dtype, T, B, I, H, L, D, bias, batch_first=L == 3)
    call = draw(case)._replace(lengths=[4, 7, 1, 6, 4] if ragged else None)
    theirs = module_of(case, getattr(torch, dtype))
    call.layer.load_state_dict({name: p.numpy() for name, p in theirs.state_dict().items()})
    exact = module_of(case, torch.float64)
    exact.load_state_dict({name: torch.tensor(p) for name, p in call.layer.state_dict().items()})
    for (name, p), q in zip(theirs.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(p.double(), q), name

    got, want = run(call), run_torch(exact, case, call)
    assert list(call.layer.params) == [name for name, _ in theirs.named_parameters()]
    assert_within_bound(got, want, case)


@pytest.mark.parametrize("cell", MODULES)
def test_state_dicts_are_interchangeable(cell):
    case = Case(cell, "float32", T, B, I, H, 2, 2)
    layer, module = draw(case).layer, module_of(case, torch.float32)
    module.load_state_dict({name: torch.from_numpy(a) for name, a in layer.state_dict().items()})
    for name, p in module.state_dict().items():
        np.testing.assert_array_equal(p.numpy(), layer.params[name])
    other = draw(case._replace(seed=1)).layer
    other.load_state_dict({name: p.numpy() for name, p in module.state_dict().items()})
    np.testing.assert_array_equal(other.flat_params, layer.flat_params)


def gru_reset_before(x, w_ih, w_hh, b_ih, b_hh, h, reverse):
    """The equations for one sequence, x (T, I) and h (H,): y, h_n."""
    (w_r, w_z, w_n), (b_r, b_z, b_n) = w_hh.chunk(3), b_hh.chunk(3)
    ys = []
    for u in reversed(x) if reverse else x:
        u_r, u_z, u_n = (w_ih @ u + b_ih).chunk(3)
        r = torch.sigmoid(u_r + w_r @ h + b_r)
        z = torch.sigmoid(u_z + w_z @ h + b_z)
        n = torch.tanh(u_n + w_n @ (r * h) + b_n)
        h = z * h + (1 - z) * n
        ys.append(h)
    return torch.stack(ys[::-1] if reverse else ys), h


@every_dtype
@pytest.mark.parametrize("lengths", [None, [4, 7, 1, 6, 4]], ids=["padded", "lengths"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gru_reset_before(dtype, lengths, reverse):
    """PyTorch has no such layer: its automatic differentiation of the equations, sequence by sequence."""
    case = Case("gru_reset_before", dtype, T, B, I, H)
    call = draw(case)._replace(lengths=lengths)
    got = run_function(fr, case, call, reverse)

    x, h0, *weights = leaf(call.x), leaf(call.state[0]), *map(leaf, call.layer.params.values())
    ends = lengths or [T] * B
    runs = [gru_reset_before(x[:n, b], *weights, h0[b], reverse) for b, n in enumerate(ends)]
    y = torch.nn.utils.rnn.pad_sequence([y for y, _ in runs])
    h_n = torch.stack([h for _, h in runs])
    dx, dh0, *dweights = gradients((y, h_n), (call.dy, call.dstate[0]), (x, h0, *weights))
    dparams = dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), dweights, strict=True))
    assert_within_bound(got, named(*numbers([y]), numbers([h_n]), dx, (dh0,), dparams), case)


def test_every_cell_has_an_oracle():
    assert {*MODULES, "gru_reset_before"} == set(OFFERED)
