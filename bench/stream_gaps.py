"""Does a second thread pay in a stream? Steps with a pause between them, alone and beside a busy process.

    python -m fusedrnn.bench.stream_gaps

Prints the median microseconds of one step on one thread and on two, for several hidden sizes and pauses.
"""

import multiprocessing
import statistics
import time

import numpy as np

import fusedrnn as fr

SIZES = (64, 128, 256, 512, 1024)
GAPS_US = (0, 1, 10, 50, 500)


def burn(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def step_us(hidden: int, threads: int, gap_us: float, seconds: float = 0.3) -> float:
    """Median time of a step that starts `gap_us` after the last one ended."""
    stream = fr.LSTM(hidden, hidden, seed=0).freeze().stream()
    x = np.random.default_rng(0).standard_normal((hidden,)).astype(np.float32)
    out = np.empty((hidden,), np.float32)
    times = []
    with fr.num_threads(threads):
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            stream.step(x, out=out)
            done = time.perf_counter()
            times.append(done - start)
            while time.perf_counter() - done < gap_us * 1e-6:
                pass
    return statistics.median(times[len(times) // 10 :]) * 1e6


def table(title: str) -> None:
    print(f"{title}\n  H     " + "".join(f"gap {gap:>4} us       " for gap in GAPS_US))
    for hidden in SIZES:
        cells = [f"{step_us(hidden, 1, gap):7.2f} {step_us(hidden, 2, gap):7.2f}   " for gap in GAPS_US]
        print(f"  {hidden:<6}" + "".join(cells), flush=True)


def main() -> None:
    table("alone: us on one thread, on two")
    rival = multiprocessing.Process(target=burn, args=(60.0,), daemon=True)
    rival.start()
    table("beside one busy process")
    rival.terminate()


if __name__ == "__main__":
    main()
