#!/usr/bin/env bash
# torch 2.13.0, torch.distributed over gloo, two processes on a CPU.
# A collective gets the first two columns of a 4 x 4 tensor of zeros. One expects either these columns to be written or the
# error that all_to_all_single raises for such an input. Instead 8 numbers from the first one's address on are taken for
# the view: the upper half of the whole tensor is written, the last two columns among it, and the lower half of the view is left.
# In all_reduce it is this rank's own number that stays there, half of a sum that looks like one.
# Output (rank 1): torch 2.13.0: all_reduce of 2s with 1s: column 0 is [3.0, 3.0, 2.0, 2.0]
#         all_to_all_single: rows are [[4.0, 5.0, 6.0, 7.0], [14.0, 15.0, 16.0, 17.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
#         broadcast of 0 to 7 over 10 to 17: column 0 is [0.0, 2.0, 14.0, 16.0]; a view as all_to_all_single's input: ValueError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
"$python" -m venv --without-pip "$folder/venv"
"$python" -m pip --python "$folder/venv/bin/python" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$folder/finding.py" <<'E'
import os
import sys

import torch
import torch.distributed as dist


def refusal(collective):
    try:
        collective()
    except ValueError as error:
        return type(error).__name__
    return "taken"


def rank_main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    numbers = torch.arange(8.0).view(4, 2) + 10 * rank

    reduced = torch.zeros(4, 4)
    reduced[:, :2] = rank + 1
    dist.all_reduce(reduced[:, :2])

    sent = torch.zeros(4, 4)
    sent[:, :2] = numbers
    dist.broadcast(sent[:, :2], 0)

    exchanged = torch.zeros(4, 4)
    dist.all_to_all_single(exchanged[:, :2], numbers)

    input_view = torch.zeros(4, 4)[:, :2]
    refused = refusal(lambda: dist.all_to_all_single(torch.zeros(4, 2), input_view))
    if rank == 1:
        report(reduced[:, 0].tolist(), exchanged.tolist(), sent[:, 0].tolist(), refused)
    dist.barrier()
    dist.destroy_process_group()


def report(reduced, exchanged, sent, refused):
    print(f"torch {torch.__version__.split('+')[0]}: all_reduce of 2s with 1s: column 0 is {reduced}")
    print(f"all_to_all_single: rows are {exchanged}")
    print(
        f"broadcast of 0 to 7 over 10 to 17: column 0 is {sent}; a view as all_to_all_single's input: {refused}"
    )
    assert reduced == [3, 3, 2, 2], reduced
    assert exchanged == [[4, 5, 6, 7], [14, 15, 16, 17], [0] * 4, [0] * 4], exchanged
    assert sent == [0, 2, 14, 16] and refused == "ValueError", (sent, refused)


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(rank_main, (sys.argv[1],), nprocs=2)
E
"$folder/venv/bin/python" -W ignore "$folder/finding.py" "$folder/store" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
