"""Time series forecast on real data: next year's sunspot number from all years before it.

Yearly mean sunspot numbers, 1700-2008 (examples/data/sunspots.csv names the source). Autoregression of order
2, Yule's of 1927, made for this series, is linear and looks two years back; five small GRUs learn what it
leaves over from the whole past, and their mean corrects it. All is fitted to 1700-1920 and compared on
1921-2008, with the forecast that next year is like this one and with order 9 as the other baselines. The
settings were chosen on 1820-1920. The correction beats Yule's forecast, but the linear one of order 9 stays
ahead: 221 values are few to learn from. GRUs alone, without the linear part, do worse than Yule: cycles
higher than any they learnt on lie outside what their bounded state can say.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import fusedrnn as fr
from fusedrnn.demo import Adam

FIRST_HELD_OUT = 1921
HIDDEN, BATCH, UPDATES, NOISE, LEARNING_RATE = 16, 16, 150, 0.2, 1e-2
FORGOTTEN = 10  # the first years' forecasts, made from next to nothing, are not trained on


def autoregression(series: np.ndarray, known: int, order: int) -> np.ndarray:
    """Forecasts of series[order:], each from the `order` values before it, fitted to series[:known]."""
    rows = np.array([[1, *series[t - order : t]] for t in range(order, len(series))])
    weights = np.linalg.lstsq(rows[: known - order], series[order:known])[0]
    return rows @ weights


def correction(series: np.ndarray, left_over: np.ndarray, known: int, seed: int) -> np.ndarray:
    """Forecasts of left_over[known:], each from all of series before it; by a GRU trained on [:known]."""
    rng = np.random.default_rng(seed)
    mean, std = series[:known].mean(), series[:known].std()
    x = ((series - mean) / std).astype(np.float32)[:, None, None]  # (T, 1, 1)
    target = (left_over / std).astype(np.float32)[:, None]  # (T, 1)
    gru = fr.GRU(1, HIDDEN, seed=seed)
    weight = rng.uniform(-1, 1, HIDDEN).astype(np.float32) / np.float32(HIDDEN**0.5)
    bias = np.zeros(1, np.float32)
    adam = Adam([gru.flat_params, weight, bias])
    for update in range(UPDATES):
        # So few years are learnt by heart in no time: noise on the inputs, drawn anew each time, prevents it.
        noise = rng.standard_normal((known - 1, BATCH, 1), np.float32)
        y, _, tape = gru.forward(x[: known - 1] + np.float32(NOISE) * noise)
        error = y @ weight + bias - target[1:known]  # (T, B)
        error[:FORGOTTEN] = 0
        derror = error * np.float32(2 / error.size)
        grads = gru.backward(tape, derror[..., None] * weight, wrt=("params",))
        all_grads = [grads.flat, np.tensordot(derror, y), np.array([derror.sum()])]
        fr.clip_grad_norm(all_grads, 1.0)
        adam.lr = LEARNING_RATE * (1 - update / UPDATES)
        adam.step(all_grads)
    y, _ = gru(x[:-1])
    return (y[known - 1 :, 0] @ weight + bias) * std


def squared(root: np.ndarray) -> np.ndarray:
    return root.clip(min=0) ** 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--quick", action="store_true", help="two GRUs instead of five, for a test")
    args = parser.parse_args()

    years, sunspots = np.loadtxt(Path(__file__).parent / "data" / "sunspots.csv", delimiter=",", skiprows=3).T
    known = int(np.searchsorted(years, FIRST_HELD_OUT))
    truth = sunspots[known:]
    root = np.sqrt(sunspots)  # evens out the spread, for all methods alike

    forecasts = {"same as this year": sunspots[known - 1 : -1]}
    linear = {order: autoregression(root, known, order) for order in (2, 9)}
    for order, forecast in linear.items():
        forecasts[f"autoregression of order {order}"] = squared(forecast[known - order :])
    left_over = np.concatenate([np.zeros(2), root[2:] - linear[2]])
    corrections = [correction(root, left_over, known, seed) for seed in range(2 if args.quick else 5)]
    name = f"order 2 and {len(corrections)} GRUs"
    forecasts[name] = squared(linear[2][known - 2 :] + np.mean(corrections, axis=0))

    print(f"forecasting {years[known]:.0f}-{years[-1]:.0f} one year ahead, root mean square error:")
    for label, forecast in forecasts.items():
        print(f"{label:28}{np.sqrt(np.mean((forecast - truth) ** 2)):6.1f}")
    print("\nyear  truth  forecast")
    for year, true, forecast in zip(years[-8:], truth[-8:], forecasts[name][-8:], strict=True):
        print(f"{year:.0f}{true:7.1f}{forecast:10.1f}")


if __name__ == "__main__":
    main()
