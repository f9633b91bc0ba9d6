"""How results are judged: what is exact to the bit, and how far the rest may lie from float64.

Each complaint is a sentence. ``worst`` is the largest share of its tolerance that an error took.
"""

import torch
from torch import Tensor

HALF_PLACE = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
"""Half a unit in the last place, relative."""

SMALLEST_NORMAL = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14, torch.float64: 1e-300}


class Judgement:
    """The complaints about one call."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.worst = 0.0

    def require(self, held: bool | Tensor, complaint: str) -> None:
        if not bool(held):
            self.complaints.append(complaint)

    def exactly(self, name: str, got: Tensor, want: Tensor) -> None:
        """Equal numbers; NaN equals NaN."""
        if got.shape != want.shape or got.dtype != want.dtype:
            self.complaints.append(
                f"{name}: {tuple(got.shape)} {got.dtype} instead of {tuple(want.shape)} {want.dtype}"
            )
            return
        differ = (got != want) & ~(got.isnan() & want.isnan())
        if differ.any():
            at = differ.nonzero()[0].tolist()
            where = tuple(at)
            self.complaints.append(
                f"{name}: {int(differ.sum())} of {differ.numel()} elements wrong, first at {at}: "
                f"{got[where].item()!r} instead of {want[where].item()!r}"
            )

    def within(self, name: str, error: Tensor, tolerance: Tensor) -> None:
        """Each error is at most its tolerance, and none is NaN."""
        error, tolerance = torch.broadcast_tensors(error.double(), tolerance.double())
        if error.numel() == 0:
            return
        share = torch.where(error == 0, 0, error / tolerance).nan_to_num(float("inf"), float("inf"))
        largest = float(share.max())
        self.worst = max(self.worst, largest)
        if largest > 1:
            at = share.reshape(-1).argmax().item()
            self.complaints.append(
                f"{name}: {int((share > 1).sum())} of {share.numel()} off, worst at {at}: "
                f"error {float(error.reshape(-1)[at]):.3g}, allowed {float(tolerance.reshape(-1)[at]):.3g}"
            )


def beyond_rounding(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| in float64 less what rounding ``want`` once to the dtype of ``got`` costs; fp32 is not let off.

    What the dtype cannot hold counts as its largest number, what it cannot resolve as nothing.
    """
    dtype, largest = got.dtype, torch.finfo(got.dtype).max
    got, want = got.double().clamp(-largest, largest), want.double().clamp(-largest, largest)
    error = (got - want).abs()
    if dtype in (torch.bfloat16, torch.float16):
        error = error - HALF_PLACE[dtype] * want.abs() * (1 + 1e-4)
    smallest = SMALLEST_NORMAL[dtype]
    return (error - smallest * (2 * HALF_PLACE[dtype] if dtype in (torch.bfloat16, torch.float16) else 1)).clamp(min=0)
