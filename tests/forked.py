"""N processes of a script, as torchrun starts them, but the libraries are imported once.

python tests/forked.py N SCRIPT ARGUMENTS    ends with the first exit code that is not 0
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time

import conftest  # noqa: F401  it puts the repository's root on the path

import train  # noqa: F401  with torch and transformers; no process may have used them before a fork

FORK = multiprocessing.get_context("fork")


def run(rank: int, processes: int, port: int, words: list[str]) -> None:
    """One of the processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def main(processes: int, words: list[str]) -> int:
    """Start all, and wait for them; where one fails, the others would wait for it and are ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        FORK.Process(target=run, args=(rank, processes, port, words)) for rank in range(processes)
    ]
    for child in children:
        child.start()
    failed = 0
    while not failed and any(child.is_alive() for child in children):
        time.sleep(0.05)
        codes = [child.exitcode for child in children]
        failed = next((code for code in codes if code), 0)
    for child in children:
        child.join(5 if failed else None)
        child.kill()
    codes = [child.exitcode for child in children]
    return abs(failed or next((code for code in codes if code), 0))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
