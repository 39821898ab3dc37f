"""Collects the operations of one segment on one rank; the vocabulary in which the bodies are written."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import evolve

from picotron.planner.body import WAIT, Category, Dims, Operation, Tensor
from picotron.planner.model import ModelSpec


class Operations:
    """Collects the operations of one segment; keeps what is alive so that a free knows its bytes."""

    def __init__(self, d: Dims, index: int) -> None:
        self.d, self.index = d, index
        self.operations: list[Operation] = []

    def x(self, offset: int = 0) -> Tensor:
        """The tensor that enters (or, with offset 1, leaves) this segment."""
        return Tensor(f"{self.index + offset}.x", self.d.local_bytes, "activations")

    def g(self, offset: int = 0) -> Tensor:
        """Its gradient."""
        return Tensor(f"{self.index + offset}.g", self.d.local_bytes, "workspace")

    def tensor(self, name: str, elements: int, category: Category = "workspace", itemsize: int = 0) -> Tensor:
        """A buffer of this segment."""
        return Tensor(f"{self.index}.{name}", elements * (itemsize or self.d.itemsize), category)

    def saved(self, name: str, elements: int, itemsize: int = 0) -> Tensor:
        """A buffer that forward leaves for backward."""
        return self.tensor(name, elements, "activations", itemsize)

    def matmul(
        self,
        name: str,
        m: int,
        k: int,
        n: int,
        *,
        batch: int = 1,
        creates: Iterable[Tensor] = (),
        frees: Iterable[Tensor] = (),
        reads: Iterable[Tensor] = (),
        adds: bool = False,
    ) -> None:
        """[m, k] @ [k, n], ``batch`` times; ``adds``: to a weight's gradient, as one that ``reads`` does."""
        if (reads or adds) and self.d.adds_products:
            product = self.tensor(f"{name} product", m * n)
            creates, frees, after = [*creates, product], (), [product, *frees]
        else:
            product, after = None, []
        self.operations.append(
            Operation(
                name=name,
                kind="matmul",
                flops=2 * m * k * n * batch,
                moved_bytes=(m * k + k * n + m * n) * batch * self.d.itemsize,
                creates=tuple(creates),
                frees=tuple(frees),
                reads=tuple(reads),
                shape=(m, n, k, batch),
            )
        )
        if product is not None:
            self.kernel(f"{name} added", m * n, passes=5, frees=after, reads=[product] if reads else [])

    def kernel(
        self,
        name: str,
        elements: int,
        *,
        passes: int = 2,
        kernels: int = 1,
        creates: Iterable[Tensor] = (),
        frees: Iterable[Tensor] = (),
        reads: Iterable[Tensor] = (),
    ) -> None:
        """A memory-bound step that reads or writes ``elements`` ``passes`` times in all."""
        self.operations.append(
            Operation(
                name=name,
                kind="kernel",
                moved_bytes=elements * passes * self.d.itemsize,
                kernels=kernels,
                creates=tuple(creates),
                frees=tuple(frees),
                reads=tuple(reads),
            )
        )

    def collective(
        self,
        kind: str,
        name: str,
        payload_bytes: int,
        *,
        group: str = "tp",
        creates: Iterable[Tensor] = (),
        frees: Iterable[Tensor] = (),
        reads: Iterable[Tensor] = (),
    ) -> None:
        """Communication over ``group`` that the segment blocks on."""
        self.operations.append(
            Operation(
                name=name,
                kind=kind,
                kernels=0,
                group=group,
                payload_bytes=payload_bytes,
                creates=tuple(creates),
                frees=tuple(frees),
                reads=tuple(reads),
            )
        )

    def exchange(
        self, name: str, payload_bytes: int, *, creates: Iterable[Tensor], frees: Iterable[Tensor] = ()
    ) -> None:
        """A message to the next context-parallel rank and one from the rank before, under way until ``wait``.

        With ``frees``, which die with it, it is waited for at once.
        """
        died = tuple(frees)
        self.collective("exchange", name, payload_bytes, group="cp", creates=creates, frees=died)
        self.operations[-1] = evolve(self.operations[-1], asynchronous=not died)

    def wait(self, name: str, *, group: str = "cp", frees: Iterable[Tensor] = ()) -> None:
        """The end of what is under way over ``group``."""
        self.operations.append(
            Operation(name=f"wait for {name}", kind=WAIT, kernels=0, group=group, frees=tuple(frees))
        )

    def gathered(self, name: str, local: Tensor, *, keep: bool = False, for_weights: bool = False) -> Tensor:
        """All tokens of ``local``: gathered under sequence parallelism, else ``local`` itself."""
        if not self.d.sequence_parallel:
            return local
        full = self.tensor(name, self.d.tokens * self.d.hidden)
        frees, reads = [] if keep else [local], [local] if for_weights else []
        self.collective("all_gather", name, full.bytes, creates=[full], frees=frees, reads=reads)
        return full

    def gathered_chunk(self, name: str, *, asynchronous: bool) -> Tensor:
        """A chunk of the tokens of all ranks; ``asynchronous``: under way until ``wait``."""
        chunk = self.tensor(name, self.d.tokens // self.d.gather_chunks * self.d.hidden)
        self.collective("all_gather", name, chunk.bytes, creates=[chunk])
        self.operations[-1] = evolve(self.operations[-1], asynchronous=asynchronous)
        return chunk

    def reduced(self, name: str, full: Tensor, local: Tensor) -> None:
        """Sum ``full`` over tp into ``local`` (the same tensor without sequence parallelism)."""
        if self.d.sequence_parallel:
            self.collective("reduce_scatter", name, full.bytes, creates=[local], frees=[full])
        elif self.d.tp > 1:
            self.collective("all_reduce", name, full.bytes)

    def start_reduced(self, name: str, full: Tensor, local: Tensor) -> None:
        """As ``reduced`` over more than one rank, under way until ``wait``, which frees ``full``."""
        if self.d.sequence_parallel:
            self.collective("reduce_scatter", name, full.bytes, creates=[local])
        else:
            self.collective("all_reduce", name, full.bytes)
        self.operations[-1] = evolve(self.operations[-1], asynchronous=True)

    def partial_sum(self, local: Tensor) -> Tensor:
        """Where a row-parallel product lands before it is reduced into ``local``."""
        return self.tensor("partial", self.d.tokens * self.d.hidden) if self.d.sequence_parallel else local

    def norm(self, model: ModelSpec) -> Tensor:
        """The segment's norm over hidden; keeps its statistics."""
        normed = self.tensor("normed", self.d.local_tokens * self.d.hidden)
        size, wide = self.d.local_tokens * self.d.hidden, self._wide_affine(model, "forward")
        made = [normed, *self.statistics(model), *wide]
        if model.norm == "rms":
            self.rms_norm("norm", size, made)
        else:
            self.kernel("norm", size, passes=3, creates=made, frees=wide)
        return normed

    def rms_norm(self, name: str, elements: int, creates: Iterable[Tensor]) -> None:
        """An RMS norm and its statistics."""
        passes, kernels = (2, 1) if self.d.compiled else (5, 7)
        self.kernel(name, elements, passes=passes, kernels=kernels, creates=creates)

    def statistics(self, model: ModelSpec) -> list[Tensor]:
        """What the norm keeps of each row."""
        names = ("inverse",) if model.norm == "rms" else ("mean", "inverse")
        return [self.saved(name, self.d.local_tokens, self.d.statistics_itemsize) for name in names]

    def _wide_affine(self, model: ModelSpec, when: str) -> list[Tensor]:
        """Scale and shift of a layer norm in the precision of its statistics, where that is another."""
        if model.norm == "rms" or self.d.statistics_itemsize == self.d.itemsize:
            return []
        return [self._statistic(name, self.d.hidden) for name in (f"scale {when}", f"shift {when}")]

    def _statistic(self, name: str, elements: int) -> Tensor:
        return self.tensor(name, elements, itemsize=self.d.statistics_itemsize)

    def norm_again(self, model: ModelSpec) -> Tensor:
        """The normed input, computed again for the weight gradients rather than kept."""
        normed = self.tensor("normed", self.d.local_tokens * self.d.hidden)
        scratch = (
            []
            if model.norm == "rms"
            else [self._statistic(f"again{i}", self.d.local_tokens) for i in range(2)]
        )
        scratch += self._wide_affine(model, "again")
        self.kernel(
            "norm again",
            self.d.local_tokens * self.d.hidden,
            passes=2 if self.d.compiled and model.norm == "rms" else 4,
            creates=[normed, *scratch],
            frees=scratch,
            reads=[self.x(), *self.statistics(model)],
        )
        return normed

    def norm_backward(self, model: ModelSpec, full: Tensor) -> None:
        """From the gradient of the normed input (``full``), before it is summed, to ``i.g``."""
        part = self.dnormed_local(full)
        self.reduced("reduce gradient", full, part)
        self.local_norm_backward(model, part)

    def dnormed_local(self, full: Tensor) -> Tensor:
        """Where the gradient of the normed input, ``full``, is once it is summed."""
        d = self.d
        return self.tensor("dnormed_local", d.local_tokens * d.hidden) if d.sequence_parallel else full

    def local_norm_backward(self, model: ModelSpec, part: Tensor) -> None:
        """From ``part``, this rank's gradient of the normed input, to ``i.g``."""
        d, x, incoming = self.d, self.x(), self.g(1)
        size = d.local_tokens * d.hidden
        if model.norm == "rms":
            self.rms_backward("norm backward", d.local_tokens, d.hidden, creates=self.g(), frees=part)
        else:
            small = [self._statistic("dscale", d.hidden), self._statistic("dshift", d.hidden)]
            small += self._wide_affine(model, "backward")
            self.kernel("norm backward", size, passes=5, creates=[self.g(), *small], frees=[part, *small])
        after = [x, *self.statistics(model), *([] if self.is_last else [incoming])]
        self.kernel("residual gradient", size, passes=0 if self.is_last else 3, frees=after)

    is_last = False  # the head: nothing comes back into it and it adds no residual

    def dnormed(self) -> Tensor:
        """Where the gradient of the normed input lands before it is reduced."""
        return self.tensor("dnormed", self.d.tokens * self.d.hidden)

    def rms_backward(self, name: str, rows: int, width: int, *, creates: Tensor, frees: Tensor) -> None:
        """Backward of an RMS norm over ``width``: layer norm's with a mean of 0, and what that takes off.

        Compiled it is one kernel.
        """
        if self.d.compiled:
            self.kernel(name, rows * width, passes=3, creates=[creates], frees=[frees])
            return
        zero, scale = self._statistic(f"{name} zero", rows), self._statistic(f"{name} scale", width)
        spent = [zero, scale]
        if self.d.statistics_itemsize != self.d.itemsize:
            spent.append(self._statistic(f"{name} weight", width))
        self.kernel(name, rows * width, passes=5, kernels=3, creates=[creates, *spent], frees=spent)
        mean = self.tensor(f"{name} mean", rows)
        self.kernel(name, rows * width, passes=4, kernels=3, creates=[mean], frees=[mean, frees])
