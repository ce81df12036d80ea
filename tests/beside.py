"""Programs of several processes run beside the tests: the tests themselves use one core.

A test says which program it needs, and waits for its end:

    @pytest.mark.beside(program=start)  # start(folder) runs it, and raises where it fails
    def test_what_came_out(beside):     # the folder, once the program has ended

The programs start with the session, one after the other, and the tests that wait come last.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest


def starter(item):
    """The function that the test's program starts with; None for other tests."""
    marker = item.get_closest_marker("beside")
    return marker and marker.kwargs["program"]


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "beside(program): needs a program that runs beside the tests"
    )


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: starter(item) is not None)


def pytest_collection_finish(session):
    starters = dict.fromkeys(start for start in map(starter, session.items) if start)
    if session.config.option.collectonly or not starters:
        return
    session.programs = {}
    pool = ThreadPoolExecutor(1)
    for start in starters:
        folder = session.config._tmp_path_factory.mktemp(start.__name__)
        session.programs[start] = folder, pool.submit(start, folder)
    pool.shutdown(wait=False)


def pytest_sessionfinish(session):
    for _, program in getattr(session, "programs", {}).values():
        program.cancel()  # those that have not begun, as where the first failure ends the session


@pytest.fixture
def beside(request):
    """The folder of the test's program, which has ended."""
    folder, program = request.session.programs[starter(request.node)]
    program.result()
    return folder
