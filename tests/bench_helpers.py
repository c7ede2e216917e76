"""What the tests of the benchmark share."""

import os

import torch.nn.functional as F
from aeup.bench import harness, interpolate, peers, report, timing
from rich.console import Console

TINY = interpolate.Geometry(2, 5, 6, 7, 12, 14)
ODD = interpolate.Geometry(1, 4, 9, 25, 31, 56)
FAST = timing.Settings(min_time=1e-3, min_rounds=2, max_rounds=2)
ENVIRONMENT = {"device_type": "cpu", "device": "a CPU", "torch": "0", "threads": 1}


def case(mode="bilinear", dtype="fp32", layout="NCHW", geometry=TINY, by="scale", align_corners=None, shape="tiny"):
    return interpolate.Case(shape, geometry, mode, dtype, layout, by, align_corners, "main", "this test")


def subject(change=lambda y: y, name="ours", **kw):
    """A peer that gives torch's result after `change`."""
    return peers.Peer(name, lambda c: lambda x: change(F.interpolate(x, **c.kwargs())), subject=True, **kw)


def measured(peer, c=None, direction="forward"):
    return harness.measure(c or case(), direction, [peers.torch_eager(), peer], FAST)


def made_report(rows, operator=interpolate.OPERATOR, settings=FAST, environment=ENVIRONMENT, **kw):
    return report.Report(operator, rows, environment, {"absent": "not installed"}, settings, {}, **kw)


def rendered(rows, **kw):
    console = Console(width=240, record=True, file=open(os.devnull, "w"))
    made_report(rows, **kw).render(console)
    return console.export_text()


def timed(shape, ours, torchs):
    row = harness.Row(case(shape=shape), "forward", "ours")
    for name, t in (("torch", torchs), ("ours", ours)):
        row.results[name] = harness.Result("ok", timing=timing.Timing(t, t, t, 5))
    row.ceilings["copy"] = timing.Timing(1.0, 1.0, 1.0, 5)
    return row


class FakeDevice:
    """Stands in for torch.cuda: `work` is instant and events read a made-up clock, in seconds. Each record takes
    `tick`."""

    def __init__(self, monkeypatch, torch, tick=0.0):
        self.clock, self.spins = 0.0, []
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                device.clock += tick
                self.at = device.clock

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.spins.append)

    def work(self, seconds):
        self.clock += seconds
