"""Times as `kvhook bench` takes them: between events, cold, medians of at least 50 calls."""

import time

import torch

RUNS = 50
WARM_UP = 3
# Read before each call, all to one place, so that nothing of the call's own is left in the second-level cache.
PATTERN_BYTES = 128 << 20
PART_BYTES = 4 << 20


class Clock:
    def __init__(self, device):
        self.device = torch.device(device)
        self.on_cuda = self.device.type == "cuda"
        if self.on_cuda:
            self.pattern = torch.randint(0, 255, (PATTERN_BYTES,), dtype=torch.uint8, device=device)
            self.sink = torch.empty(PART_BYTES, dtype=torch.uint8, device=device)

    def cool(self):
        if self.on_cuda:
            for part in self.pattern.split(PART_BYTES):
                self.sink.copy_(part)
            torch.cuda.synchronize()

    def eager(self, call):
        """Microseconds of a call that Python launches."""
        for _ in range(WARM_UP):
            call()
        samples = []
        for _ in range(RUNS):
            self.cool()
            samples.append(self.once(call))
        return spread(samples)

    def once(self, call):
        if not self.on_cuda:
            start = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def graph(self, call):
        """Microseconds of the same as a CUDA graph, or None and why it cannot be captured."""
        if not self.on_cuda:
            return None, "no graphs on this device"
        graph = torch.cuda.CUDAGraph()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                call()
        except RuntimeError as error:
            torch.cuda.synchronize()
            return None, f"cannot be captured: {str(error).splitlines()[0][:120]}"
        return self.eager(graph.replay), ""


def spread(samples):
    """Median, 10th and 90th percentile: the samples at these shares of their number, rounded down."""
    samples = sorted(samples)
    at = lambda share: samples[min(int(len(samples) * share), len(samples) - 1)]  # noqa: E731
    return {"median": at(0.5), "p10": at(0.1), "p90": at(0.9), "n": len(samples)}
