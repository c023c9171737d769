"""Forward passes against ONNX Runtime: directions, lengths, initial states, biases, stacks, both GRUs.

It has these operators in float32 only, and no gradients.
"""

import numpy as np
import pytest
from bound import OFFERED, Case, as_tuple, assert_close, draw

from fusedrnn.bench.peers import ONNX_ORDER

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

T, B, I, H = 7, 5, 6, 19
ATTRIBUTES = {
    "lstm": {},
    "gru": {"linear_before_reset": 1},
    "gru_reset_before": {"linear_before_reset": 0},
    "rnn_tanh": {"activations": ["Tanh"]},
    "rnn_relu": {"activations": ["Relu"]},
}


def reordered(array, order):
    """Rows in ONNX's order of gates."""
    return np.concatenate([np.split(array, len(order))[i] for i in order])


def session_of(case, layer, direction):
    """A node a layer.

    Inputs X (T, B, I), lengths (B,), and a layer's h0, c0, h1, .. (D, B, H) where they are given; outputs
    y (T, B, D*H) and h_n0, h_n1, .., c_n0, .. (D, B, H).
    """
    kind = type(layer).__name__
    states = ("h", "c") if case.cell == "lstm" else ("h",)
    attributes = {k: v * case.D if isinstance(v, list) else v for k, v in ATTRIBUTES[case.cell].items()}
    nodes, weights, given = [], [], "X"
    for level in range(case.L):
        suffixes = [f"_l{level}", f"_l{level}_reverse"][: case.D]

        def both(name, suffixes=suffixes):
            return np.stack([reordered(layer.params[name + s], ONNX_ORDER[kind]) for s in suffixes])

        own = {"W": both("weight_ih"), "R": both("weight_hh")}
        if case.bias:
            own["B"] = np.concatenate([both("bias_ih"), both("bias_hh")], axis=1)
        weights += [numpy_helper.from_array(a, f"{name}{level}") for name, a in own.items()]
        inputs = [given, f"W{level}", f"R{level}", f"B{level}" if case.bias else ""]
        inputs += ["lengths" if case.ragged else ""]
        inputs += [f"{s}{level}" if case.state in ("given", s) else "" for s in states]
        nodes += [
            helper.make_node(
                kind, inputs, [f"Y{level}", *(f"{s}_n{level}" for s in states)],
                hidden_size=case.H, direction=direction, **attributes,
            ),
            helper.make_node("Transpose", [f"Y{level}"], [f"beside{level}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"beside{level}", "wide"], [f"given{level + 1}"]),
        ]  # fmt: skip
        given = f"given{level + 1}"
    tensor = helper.make_tensor_value_info
    levels = range(case.L)
    inputs = [tensor("X", TensorProto.FLOAT, (case.T, case.B, case.I))]
    if case.ragged:
        inputs.append(tensor("lengths", TensorProto.INT32, (case.B,)))
    for s in states:
        if case.state in ("given", s):
            inputs += [tensor(f"{s}{n}", TensorProto.FLOAT, (case.D, case.B, case.H)) for n in levels]
    outputs = [tensor(given, TensorProto.FLOAT, (case.T, case.B, case.D * case.H))]
    outputs += [
        tensor(f"{s}_n{n}", TensorProto.FLOAT, (case.D, case.B, case.H)) for s in states for n in levels
    ]
    weights.append(numpy_helper.from_array(np.array([0, 0, -1]), "wide"))
    graph = helper.make_graph(nodes, "stack", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_onnx(case, call, direction):
    """y and the final states."""
    feeds = {"X": call.x}
    if case.ragged:
        feeds["lengths"] = np.array(call.lengths, np.int32)
    for s, values in zip("hc", as_tuple(call.state) if call.state is not None else (), strict=False):
        if values is not None:
            feeds |= {f"{s}{n}": values[n * case.D : (n + 1) * case.D] for n in range(case.L)}
    y, *last = session_of(case, call.layer, direction).run(None, feeds)
    return y, *(np.concatenate(last[n : n + case.L]) for n in range(0, len(last), case.L))


def assert_equal(got, want, case):
    for name, a, b in zip(("y", "h_n", "c_n"), got, want, strict=False):
        assert_close(name, a, b.astype(np.float64), (case.I + case.H) * case.T, 1.0, False)


@pytest.mark.parametrize("cell", OFFERED)
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "lengths"])
@pytest.mark.parametrize("L, D", [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("state", ["given", "zeros"])
def test_layers(cell, ragged, L, D, bias, state):
    case = Case(cell, "float32", T, B, I, H, L, D, bias, ragged, state)
    call = draw(case)._replace(lengths=[4, 7, 1, 6, 4] if ragged else None)
    y, final = call.layer(call.x, call.state, call.lengths)
    direction = "bidirectional" if D == 2 else "forward"
    assert_equal((y, *as_tuple(final)), run_onnx(case, call, direction), case)


@pytest.mark.parametrize("state", ["h", "c"])
def test_one_state_alone(state):
    case = Case("lstm", "float32", T, B, I, H, state=state)
    call = draw(case)
    y, final = call.layer(call.x, call.state)
    assert_equal((y, *final), run_onnx(case, call, "forward"), case)


@pytest.mark.parametrize("cell", OFFERED)
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "lengths"])
def test_reverse(cell, ragged, functions):
    import fusedrnn as fr

    case = Case(cell, "float32", T, B, I, H, ragged=ragged)
    call = draw(case)._replace(lengths=[4, 7, 1, 6, 4] if ragged else None)
    states = (s[0] for s in as_tuple(call.state))
    got = functions(cell, fr)[""](
        call.x, *call.layer.params.values(), *states, lengths=call.lengths, reverse=True
    )
    y, *final = run_onnx(case, call, "reverse")
    assert_equal(got, (y, *(s[0] for s in final)), case)


def test_every_cell_has_an_oracle():
    assert set(ATTRIBUTES) == set(OFFERED)
