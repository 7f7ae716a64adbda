"""Forward passes that stop at layers, so that layers can change between two stops."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import nn

from hap.batches import Batch, forward

Side = Literal["input", "output"]
State = Callable[[], AbstractContextManager[None]]
Layers = Mapping[str, nn.Module]

THREADS = 256  # of the CPU, of all passes together: each keeps its own for as long as it lives


class _Ended(BaseException):
    """Unwinds a forward pass that is not needed any more; no model catches it by mistake."""


class Pass(threading.Thread):
    """A forward pass over one batch that stops on its way.

    It has a thread for the sake of its stack, and runs only while its owner is in `advance`: of all passes and their
    owner one runs at a time, so that nothing depends on how threads are scheduled.

    Args:
        model: is run on the batch.
        batch: on the model's device.
        side: whether it stops before a layer, at its input, or after it, at its output.
        state: what the thread works in; see `thread_state`.

    Attributes:
        batch: what it reads.
        place: the layer where it stands; None before the first and after the last.
        value: the layer's input or output.
    """

    def __init__(self, model: nn.Module, batch: Batch, side: Side, state: State) -> None:
        super().__init__(daemon=True)
        self.side = side
        self.place: str | None = None
        self.value: torch.Tensor | None = None
        self._model, self.batch, self._state = model, batch, state
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._over = False
        self._error: BaseException | None = None

    def advance(self) -> bool:
        """Runs up to the next stop; False if the pass is over. Raises what the model raises."""
        if self._over:
            return False
        self.place = self.value = None
        if self.ident is None:
            self.start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return not self._over

    def end(self) -> None:
        """Leaves the pass where it stands; its thread is gone afterwards."""
        self._over = True
        self.place = self.value = None
        if self.ident is not None:
            self._go.release()
            self.join()

    def stop(self, place: str, value: torch.Tensor) -> None:
        """For the hooks that run in the pass: waits for the next `advance`."""
        self.place, self.value = place, value
        self._stopped.release()
        self._go.acquire()
        if self._over:
            raise _Ended

    def run(self) -> None:
        """What the thread does."""
        try:
            with self._state():
                forward(self._model, self.batch)
        except _Ended:
            pass
        except BaseException as error:  # whatever it is, `advance` raises it
            self._error = error
        self._over = True
        self._stopped.release()


def thread_state(device: torch.device, passes: int = 1) -> State:
    """What every thread has its own of, as in the caller's: CPU threads, inference mode, autocast, CUDA stream.

    There are no gradients in it. OpenMP keeps a pool of CPU threads for each pass that is not over, though one pass
    runs at a time: so many `passes` get as many of the caller's each as `THREADS` allows, one at least.
    """
    kind, inference, threads = device.type, torch.is_inference_mode_enabled(), torch.get_num_threads()
    bounded = max(1, min(threads, THREADS // max(1, passes)))
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    @contextmanager
    def enter() -> Iterator[None]:
        torch.set_num_threads(bounded)  # without it OpenMP takes all cores in a new thread
        cast = torch.autocast(kind, dtype, enabled, cache_enabled=False)  # the weights change in between
        try:
            with torch.inference_mode(inference), torch.no_grad(), cast, torch.cuda.stream(stream):
                yield
        finally:
            torch.set_num_threads(threads)  # it is also what threads that start later begin with

    return enter


def in_lockstep(
    first: nn.Module,
    second: nn.Module,
    inputs: Layers,
    outputs: Layers,
    data: Sequence[Batch],
    state: State,
) -> Generator[tuple[str, Iterator[tuple[torch.Tensor, torch.Tensor, Batch]]]]:
    """One pass of two models over the data that stops at each layer: with what `first` reads there and `second` gives.

    At a stop no batch has gone through the layer of `first` yet. It may be changed, and all go on with it as it then
    is. Where batches call the layers in different orders, a stop is where most of them stand, and only for these.

    Args:
        first, second: models of the same layers, in evaluation mode.
        inputs: layers of `first`, by name.
        outputs: the layers of `second` of the same names.
        data: the batches; two passes, that is two threads, for each.
        state: what they work in; see `thread_state`.

    Yields:
        A layer's name, once, and an iterator over its input and output, and the batch, for each batch; to be read
        before the next stop. A batch is left out where `second` does not come to the layer in its turn. Close the
        generator if you leave it.
    """
    left = set(inputs)
    passes = [(Pass(first, batch, "input", state), Pass(second, batch, "output", state)) for batch in data]
    with _stopping(inputs, "input", left), _stopping(outputs, "output", left):
        try:
            waiting = [pair for pair in passes if pair[0].advance()]
            while waiting:
                place = Counter(str(reader.place) for reader, _ in waiting).most_common(1)[0][0]
                here = [pair for pair in waiting if pair[0].place == place]
                yield place, _values(place, here, last=len(left) == 1)
                left.remove(place)
                if not left:
                    return  # what comes after the last layer is of no interest
                over = [pair for pair in here if not pair[0].advance()]
                waiting = [pair for pair in waiting if pair not in over]
        finally:
            for reader, writer in passes:
                reader.end()
                writer.end()


def _values(
    place: str, pairs: Sequence[tuple[Pass, Pass]], *, last: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Batch]]:
    for reader, writer in pairs:
        while writer.advance() and writer.place != place:
            pass
        if reader.value is not None and writer.value is not None:
            yield reader.value, writer.value, reader.batch
        if last:
            writer.end()  # the scores of a large vocabulary are not kept for all batches


@contextmanager
def _stopping(layers: Layers, side: Side, left: Collection[str]) -> Iterator[None]:
    """Lets the passes of one side stop at those layers that are `left`."""

    def stop(name: str, value: torch.Tensor) -> None:
        current = threading.current_thread()
        if name in left and isinstance(current, Pass) and current.side == side:
            current.stop(name, value)

    def before(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: stop(name, args[0] if args else kwargs["input"])

    def after(name: str) -> Callable[..., None]:
        return lambda _, __, output: stop(name, output)

    if side == "input":
        handles = [m.register_forward_pre_hook(before(name), with_kwargs=True) for name, m in layers.items()]
    else:
        handles = [m.register_forward_hook(after(name)) for name, m in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
