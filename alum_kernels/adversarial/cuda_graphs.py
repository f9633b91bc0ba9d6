"""CUDA graphs of work that draws random numbers, some of them again in a later pass."""

from collections.abc import Callable

import torch


class CaptureError(RuntimeError):
    """Work that cannot be recorded. The device's allocator may go on as in a capture: start the process anew."""


class RepeatedGenerators:
    """States of a device's default generator, one for each pass that draws again what the first pass drew.

    Each is registered with the graph, begins every replay where the default one does, and is taken up in turn.
    """

    def __init__(self, device: torch.device, passes: int) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._generator = torch.cuda.default_generators[index]
        self._own = self._generator.graphsafe_get_state()
        self._before = self._generator.clone_state()
        self._states = [self._generator.clone_state() for _ in range(passes)]
        self._next = 0

    def register(self, graph: torch.cuda.CUDAGraph) -> None:
        """With the graph, before its capture."""
        for state in self._states:
            graph.register_generator_state(state)

    def restore(self) -> None:
        """The next pass draws from its own state."""
        self._generator.graphsafe_set_state(self._states[self._next])
        self._next += 1

    def abandon(self) -> None:
        """After a failed capture: the default generator gets another state as it was before it.

        Its own may stay bound to the graph.
        """
        self._generator.graphsafe_set_state(self._before)

    def finish(self) -> None:
        """The default generator is its own again."""
        self._generator.graphsafe_set_state(self._own)

    def align(self) -> None:
        """Before a replay: every pass begins where the default generator is."""
        now = self._own.get_state()
        for state in self._states:
            state.set_state(now)


class CudaGraphs:
    """Records work on a CUDA device, and launches it again. All graphs share one pool of memory: run one at a time.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: tuple[int, int] | None = None

    def obstacle(self, device: torch.device) -> str | None:
        """Why nothing can be recorded on this device."""
        return None if device.type == "cuda" else f"the model is on {device.type}, and CUDA graphs need a GPU"

    def warm(self, body: Callable[[], None]) -> None:
        """Run work on the stream that it will be recorded on."""
        stream, current = self._side(), torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            body()
        current.wait_stream(stream)

    def record(self, body: Callable[[RepeatedGenerators], None], passes: int) -> Callable[[], None]:
        """Record ``body``, without running it.

        Args:
            body: the work; given the generators that ``passes`` of its passes take up in turn.
            passes: how many do.

        Returns:
            What launches the work on the current stream.

        Raises:
            CaptureError: an operation that no capture allows.
        """
        graph = torch.cuda.CUDAGraph()
        generators = RepeatedGenerators(self._device, passes)
        generators.register(graph)
        current = torch.cuda.current_stream(self._device)
        try:
            # threads that load data may go on calling CUDA meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side(), capture_error_mode="thread_local"):
                body(generators)
                generators.finish()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # the end of a failed capture raises before it leaves its stream
            generators.abandon()
            raise CaptureError(f"a step cannot be captured: {error}") from error
        self._pool = graph.pool()

        def replay() -> None:
            generators.align()
            graph.replay()

        return replay

    def _side(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream
