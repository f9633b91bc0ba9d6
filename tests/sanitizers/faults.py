"""Faults planted on purpose: each must end its process, or the sanitizers are not looking.

    python -m tests.sanitizers.faults KIND

``outside`` reads behind the end of an allocation, ``misaligned`` reads an int64 from an odd address.
"""

import sys

import torch

from alum_kernels import noise_init

REPORTS = {
    "outside": "AddressSanitizer: heap-buffer-overflow",
    "misaligned": "runtime error: load of misaligned address",
}


def outside() -> None:
    embeds = torch.zeros(4, 8, 256)
    embeds.untyped_storage().resize_(1024)  # of 32,768 bytes, which the tensor still counts on
    noise_init(embeds, seed=1, backend="native")


def misaligned() -> None:
    seed = torch.frombuffer(bytearray(9), dtype=torch.int64, offset=1)
    noise_init(torch.zeros(1, 1, 8), seed=seed, backend="native")


if __name__ == "__main__":
    {"outside": outside, "misaligned": misaligned}[sys.argv[1]]()
    print("nothing was found")
