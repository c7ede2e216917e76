"""`pytest benchmarks --benchmark-only`: the rows of `aeup bench` under pytest-benchmark."""

import pytest
import torch
from aeup.bench.cli import OPERATORS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", choices=["quick", "main", "models"], default="quick", help="which shapes to measure")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    device, rows = "cuda" if torch.cuda.is_available() else "cpu", metafunc.config.getoption("--rows")
    found = []
    for operator in OPERATORS:
        filters = {"shapes": operator.quick} if rows == "quick" else {"sets": (rows,)}
        if rows != "quick" and rows not in operator.axes["set"]:
            continue
        for case in operator.cases(device, **filters):
            for direction in case.directions:
                label = f"{operator.name}/{case.id}/{direction}"
                found.append(pytest.param(operator, case, direction, device, id=label))
    metafunc.parametrize("operator, case, direction, device", found)
