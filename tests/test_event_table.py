"""The profiler's events as columns: what it says of a launch whose operator it lost is mended."""

from dataclasses import dataclass

import torch

from tunescope import latency_files as files
from tunescope.measure.trace import event_table

MAIN, WORKER = 4001, 4002  # the system's numbers of two threads; torch calls them 1 and 2


@dataclass
class Event:
    """As torch's, as far as it is read."""

    label: str
    start: int
    system_thread: int
    thread: int
    device: str = "CPU"

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return 5

    def device_type(self) -> torch.autograd.DeviceType:
        return getattr(torch.autograd.DeviceType, self.device)

    def device_index(self) -> int:
        return 0

    def device_resource_id(self) -> int:
        return self.system_thread

    def start_thread_id(self) -> int:
        return self.thread

    def is_user_annotation(self) -> bool:
        return False

    def correlation_id(self) -> int:
        return 7

    def sequence_nr(self) -> int:
        return -1

    def fwd_thread_id(self) -> int:
        return 0

    def nbytes(self) -> int:
        return 0


def test_a_launch_is_on_the_thread_of_its_neighbours() -> None:
    lost = Event("cudaLaunchKernel", 20, WORKER, thread=1)
    events = [
        Event("aten::mm", 0, MAIN, thread=1),
        Event("cudaLaunchKernel", 2, MAIN, thread=1),
        lost,
        Event("aten::mm", 30, WORKER, thread=2),
        Event("a kernel", 40, 13, thread=1, device="CUDA"),
        Event("cuLaunchKernel", 50, 4003, thread=1),  # a thread of which torch knows nothing
    ]
    table = event_table(events, {}).to_pylist()
    assert [row["kind"] for row in table] == [
        files.OP, files.LAUNCH, files.LAUNCH, files.OP, files.KERNEL, files.LAUNCH,
    ]  # fmt: skip
    assert [row["thread"] for row in table] == [1, 1, 2, 2, 13, -4003]
