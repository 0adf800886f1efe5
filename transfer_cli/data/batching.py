"""Minibatches. The k-th batch of a stream is a pure function of (seed, stream, k): a run resumes anywhere, with any number
of workers, and sees the batches it would have seen. Each pass over the data is reshuffled on its own.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from transfer_cli.data.augment import Augment
from transfer_cli.data.inputs import ArrayInputs, Extracted, Inputs, Padded
from transfer_cli.errors import TransferError


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed from any values, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def to_model(
    x: Tensor | Padded | Extracted, device: torch.device, channels_last: bool = False
) -> Tensor | Padded | Extracted:
    """What a reader keeps to what a network reads: on the device, images as floats in [0, 1]."""
    if isinstance(x, Padded | Extracted):
        return x.to(device)
    x = x.to(device, non_blocking=True)
    if x.dtype == torch.uint8:
        x = x.float().div_(255)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
    return x


def check_batch_size(batch_size: int, name: str, samples: int) -> None:
    """Raises:
    TransferError: there are too few samples to fill one batch."""
    if batch_size > samples:
        raise TransferError(
            f"trainer.batch_size={batch_size} is larger than the {samples} {name} samples: set it to {samples} or less."
        )


class Stream:
    """Endless shuffled minibatches of one part of a task."""

    def __init__(
        self,
        inputs: Inputs,
        labels: Tensor | None,
        *,
        name: str,
        batch_size: int,
        seed: int,
        device: torch.device,
        views: Sequence[Augment | None] = (None,),
        workers: int = 0,
        channels_last: bool = False,
    ) -> None:
        check_batch_size(batch_size, name, len(inputs))
        self.name, self.batch_size, self.seed, self.device, self.workers = name, batch_size, seed, device, workers
        self.channels_last = channels_last
        # Small sets move to the device once, as they are kept (uint8).
        self.inputs = ArrayInputs(inputs.values.to(device)) if isinstance(inputs, ArrayInputs) else inputs
        self.labels = None if labels is None else labels.to(device)
        self.views = [augment if augment and augment.takes(inputs.spec.kind) else None for augment in views]
        self.batches_per_epoch = len(inputs) // batch_size
        self._index_device = device if isinstance(inputs, ArrayInputs) else torch.device("cpu")
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Sample indices `(B,)` of batch `step`."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            draw = torch.Generator().manual_seed(derive_seed(self.seed, self.name, "order", epoch))
            self._epoch = epoch
            self._order = torch.randperm(len(self.inputs), generator=draw).to(self._index_device)
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]

    def iterate(self, start: int) -> Generator[tuple[list[Any], Tensor | None], None, None]:
        """The views of each batch, ready for the network, and its labels (or None), from batch `start` on."""
        raw: Iterator[tuple[Tensor, Any]]
        if self.inputs.in_memory:
            raw = ((indices, self.inputs.batch(indices)) for indices in self._all_indices(start))
        else:
            raw = self._through_workers(start)
        for step, (indices, kept) in enumerate(raw, start):
            x: Any = to_model(kept, self.device, self.channels_last)
            views = [x if augment is None else augment(x, self._draw(i, step)) for i, augment in enumerate(self.views)]
            yield views, None if self.labels is None else self.labels[indices.to(self.device, non_blocking=True)]

    def _draw(self, view: int, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(
            derive_seed(self.seed, self.name, "augment", step, *([view] if view else []))
        )

    def _all_indices(self, start: int) -> Iterator[Tensor]:
        step = start
        while True:
            yield self.indices(step)
            step += 1

    def _through_workers(self, start: int) -> Iterator[tuple[Tensor, Any]]:
        pin = self.device.type == "cuda"
        return _loader(self.inputs, self._all_indices(start), self.workers, pin)


class _Decoded(Dataset[Any]):
    """A whole batch at a time, so that a worker sends one tensor."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def __getitem__(self, indices: list[int]) -> Any:
        return self.inputs.batch(torch.tensor(indices))


STOPS = {signal.SIGINT, signal.SIGTERM}


def _own_signals(worker: int) -> None:
    """A signal to the whole process group (Ctrl-C, a scheduler's SIGTERM) is the run's to handle: it saves and then stops its
    workers, which must not die first."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # what came since the fork is ignored too


def _started(loader: DataLoader[Any]) -> Any:
    """The loader's iterator, its workers at work. Signals wait meanwhile: they would kill a worker that cannot ignore them yet."""
    there, before = set(multiprocessing.active_children()), signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        return iter(loader)
    except BaseException:
        _end(set(multiprocessing.active_children()) - there)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(workers: Iterable[Any]) -> None:
    """They ignore the signal with which Python would end them when the process does, and it would wait for them for ever."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


def _loader(
    inputs: Inputs, batches: Iterable[Tensor], workers: int, pin: bool
) -> Generator[tuple[Tensor, Any], None, None]:
    """Indices and samples of each batch, decoded by workers.

    To the workers go plain numbers: a tensor would travel as a file descriptor, which a signal at the wrong moment loses.
    """
    sent: deque[Tensor] = deque()

    def numbers() -> Iterator[list[int]]:
        for indices in batches:
            sent.append(indices)
            yield indices.tolist()

    loader = DataLoader(
        _Decoded(inputs),
        sampler=numbers(),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # the loader draws a number on start; not from the run's own stream
        worker_init_fn=_own_signals,
    )
    samples = _started(loader)
    try:
        for x in samples:  # in the order in which they were sent
            yield sent.popleft(), x
    except TransferError as error:
        # A worker's error arrives wrapped in its traceback; its last line is ours.
        raise TransferError(
            str(error).strip().splitlines()[-1].removeprefix("transfer_cli.errors.TransferError: ")
        ) from None
    finally:
        # An exception's traceback would keep the workers until the process ends, and then complain of them.
        if workers:
            samples._shutdown_workers()
            _end(samples._workers)


def in_order(
    inputs: Inputs, batch_size: int, device: torch.device, workers: int = 0, channels_last: bool = False
) -> Generator[Any, None, None]:
    """All samples once, in order, ready for the network. Closing it ends its workers."""
    batches = torch.arange(len(inputs)).split(batch_size)
    if inputs.in_memory:
        for indices in batches:
            yield to_model(inputs.batch(indices), device, channels_last)
        return
    with closing(_loader(inputs, batches, workers, device.type == "cuda")) as raw:
        for _, x in raw:
            yield to_model(x, device, channels_last)
