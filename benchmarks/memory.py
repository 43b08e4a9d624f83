"""Memory of a simulation, and of the server alone, as participants are added.

A process of its own for each number of participants runs one round of the paper's MLP on MNIST with
100 images each; the images are held once, whatever the number. The peak is the whole process's; the
server's part is what it allocates for N participants that have each joined and uploaded a tenth.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
from support import paper_job, parser, print_table

from lightning_ppdl import wire
from lightning_ppdl.layout import ParameterLayout
from lightning_ppdl.partition import IID
from lightning_ppdl.records import DownloadRequest, Manifest, SparseUpdate
from lightning_ppdl.server.core import ParameterServer
from lightning_ppdl.simulation import simulate


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def server_bytes(manifest: Manifest, participants: int) -> int:
    """What a server holds after everyone joined, downloaded and uploaded once."""
    initial = np.zeros(manifest.size, np.float32)
    indices = np.arange(manifest.size // 10)
    values = np.full(len(indices), 0.1, np.float32)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    server = ParameterServer(initial=initial)
    for number in range(participants):
        name = f"participant-{number}"
        session = server.join(name, manifest).session
        message = server.download(session, DownloadRequest(1.0))
        base = wire.decode_download(message, manifest.size).version
        update = SparseUpdate(name, 1, base, indices, values)
        server.upload(session, wire.encode_update(update, manifest.size))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return after - before


def measure(data_root: str | None, participants: int) -> dict[str, Any]:
    """In this process: the peak before and after the simulation."""
    job = paper_job(data_root, participants=max(1, participants), partition=IID(100), rounds=1)
    splits = job.data.load()
    layout = ParameterLayout(job.make_module(splits))
    facts = {"data": splits.train.storage.nbytes + splits.test.storage.nbytes}
    del splits
    if participants:
        simulate(job)
    facts["peak"] = peak_bytes()
    facts["server"] = server_bytes(Manifest(layout.specs), participants)
    facts["parameters"] = layout.size
    return facts


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--participants", type=int, nargs="+", default=[10, 50, 150])
    options.add_argument("--measure", type=int, help="measure in this process and print JSON")
    arguments = options.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.data_root, arguments.measure)))
        return
    root = [] if arguments.data_root is None else ["--data-root", arguments.data_root]
    found = {}
    for participants in [0, *arguments.participants]:
        command = [sys.executable, __file__, "--measure", str(participants), *root]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[participants] = json.loads(ran.stdout.splitlines()[-1])
    rows = []
    fewer, less = 0, found[0]["peak"]
    for participants, facts in found.items():
        each = (facts["peak"] - less) / max(1, participants - fewer)
        server = facts["server"]
        rows.append([str(participants), *(f"{value / 1e6:.2f}" for value in (facts["peak"], each, server))])
        fewer, less = participants, facts["peak"]
    print(f"{found[0]['parameters']:,} parameters; images held once: {found[0]['data'] / 1e6:.0f} MB")
    print_table(["participants", "peak MB", "MB for each one more", "server MB"], rows)


if __name__ == "__main__":
    main()
