"""Runs that record every step, each in a process of its own to be killed; forked for speed.

Reads lines "folder ack start run full", starts such a run and answers with its process's number. Of
each step that is written, the number is appended to the file `ack`.
"""

import os
import random
import sys
import time

import numpy as np

import nettrace as nt
from nettrace.store import writer

SIDES = {"a/scalar": (), "a/spectrum": (256,), "b/medium": (700,), "b/large": (100, 100)}


def value(name, run, step):
    """What is recorded: any change shows."""
    if name == "b/ragged":
        return np.arange(step % 5 + 1.0) + run
    size = int(np.prod(SIDES[name]))
    return (np.arange(size) * 0.5 + run + step / 1024).reshape(SIDES[name])


def names(step):
    """What is recorded at a step."""
    return [n for n in (*SIDES, "b/ragged") if n != "b/large" or step % 3 == 0]


def records(run, step):
    found = [(name, value(name, run, step)) for name in names(step)]
    return [
        nt.Record(n, step, v, dims=tuple(f"{n[2:]}{d}" for d in range(v.ndim))) for n, v in found
    ]


def write(folder, ack, start, run, full):
    writer.FULL = full
    pause = random.Random(run)
    told = os.open(ack, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    its = nt.store.TraceWriter(folder, f"attempt {run}", run=run)
    for step in range(start, start + 10_000):
        its.write(records(run, step), {"epoch": step // 10})
        os.write(told, b"%d\n" % step)
        time.sleep(pause.choice([0, 0.0005, 0.002]))


def main():
    writer.of_process = dict  # git is slow
    for line in sys.stdin:
        folder, ack, start, run, full = line.split()
        pid = os.fork()
        if pid == 0:
            try:
                write(folder, ack, int(start), int(run), int(full))
            finally:
                os._exit(1)
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
