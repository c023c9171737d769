"""Short runs of `fusedrnn bench`: what its tests share."""

from __future__ import annotations

import argparse
import json

import numpy as np

from fusedrnn import bench
from fusedrnn.bench import shapes

SHAPE = (3, 4, 5, 6)  # B, T, I, H


def parse(*argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fusedrnn bench")
    bench.add_arguments(parser)
    return parser.parse_args([str(word) for word in argv])


def run_quick(path, *argv: object) -> dict:
    assert bench.run(parse("--quick", "--json", path, "--shape", ",".join(map(str, SHAPE)), *argv)) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def sequence(cell: str, work: str, shape: tuple[int, ...] = SHAPE, dtype: str = "f4") -> shapes.Case:
    return shapes.Case(shapes.CELLS[cell], work, *shape, np.dtype(dtype))
