"""A row each of torch and aeup; pytest-benchmark's JSON compares two commits (`--benchmark-save`,
`--benchmark-compare`). A row whose result is wrong fails, and gives no time. On a GPU a sample is `CALLS` calls and one
synchronisation after them: the larger one of the device's and the host's time, as a program sees it.
"""

import pytest
import torch
from aeup.bench.gate import Gate
from aeup.bench.harness import bind
from aeup.bench.peers import aeup_peer, torch_eager

CALLS = 20
PEERS = {"torch": torch_eager, "aeup": aeup_peer}


@pytest.mark.parametrize("name", PEERS)
def test_row(benchmark, operator, case, direction, device, name):
    peer = PEERS[name]()
    with case.context(), peer.context():
        problem = case.problem(device, 0)
        inputs = problem.inputs
        given = problem.grad if direction == "backward" else inputs[0]
        expected = case.outcome(bind(case.torch(), direction, inputs), given)
        gate = Gate(case, direction, problem.parts(direction), expected)
        call = bind(peer.make(case), direction, inputs)
        checks = gate.check(case.outcome(call, given), keep_layout=peer.subject)
        wrong = {part: check.reason for part, check in checks.items() if check.reason}
        assert not (peer.subject and wrong), wrong
        backend, kernel = peer.explain(case, direction, inputs)
        benchmark.group = f"{operator.name}/{case.id}/{direction}"
        benchmark.extra_info |= {"device": device, "torch": torch.__version__, "backend": backend, "kernel": kernel}
        if device == "cpu":
            benchmark(call, given)
            return

        def several() -> None:
            for _ in range(CALLS):
                call(given)
            torch.cuda.synchronize()

        benchmark.extra_info["calls"] = CALLS
        benchmark(several)
