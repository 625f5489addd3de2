"""Time and memory against V and against T, for the plots; the torch peers."""

from bench.gpu.peers_torch import measure, no_torch
from bench.gpu.torch_peers import PEERS
from bench.gpu.worker import Context


def run(context: Context) -> None:
    """A task for each shape."""
    shapes = {f"sweep {shape}": shape for shape in context.plan.sweep}
    peers = [peer for peer in PEERS if peer.sweep]
    for name in context.tasks(shapes):
        if not no_torch(context, peers, shapes[name]):
            measure(context, peers, shapes[name])
