"""The demo and the command line: what they write, print and refuse."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fusedrnn import demo
from fusedrnn._cli import main

# Real words without a download: the docstrings of what every test run has imported.
TEXT = "\n".join(module.__doc__ or "" for module in (argparse_ for argparse_ in (np, pytest, os, signal, subprocess)))
