"""Every reward's gradient from two backward passes, whatever the number of rewards.

The losses are affine in the advantage, so `g_k = grad mean(const) + 1/N sum_n A[n, k] grad slope_n`. Samples do not
mix inside the network: one backward pass of `sum_n slope_n` carries every sample's own part through all layers, and
only the last step, from a layer's tokens to its weight, is repeated for the K rewards (`tap.py`). The second pass
is that of `const`. Layers that this does not fit take the slow way, K backward passes for their parameters alone.

Leaves out: reduction over processes and balancing; `engine.compute` may be followed by any of both.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from marble.distributed import active, total
from marble.gradients.reference import check_advantages, check_trainable
from marble.gradients.rows import Rows
from marble.gradients.sites import find_sites, refuse
from marble.gradients.tap import TappedLinear, contract_bias, contract_weight
from marble.objectives import AffineLoss


class PerRewardGradients:
    """Gradients of every reward with respect to a module's trained parameters.

        with PerRewardGradients(denoiser) as engine:
            loss = nft_loss(x0, denoiser(x_t, t), x0_old, beta=0.1, amax=5.0)
            gradients = engine.compute(loss, advantages)  # [N, K] -> [K, P]

    Linear layers are fast: LoRA's two factors, plain weights and biases, with inputs of any rank, samples first. All
    other trained parameters get the same numbers by a slower way. Gradient checkpointing (not the reentrant kind),
    autocast, several calls of a layer in one forward pass and any number of forward passes between `compute`s are
    fine. Inside the block no other backward pass is affected.

    How samples lie in a layer's rows is checked in the first `compute`, and again when a layer has another number of
    rows a sample. A loss whose samples come to be in another order than the module's is not noticed after that.

    Attributes:
        parameters: the module's trained parameters, in the module's order.
        sizes: numbers in each of them.
        count: P, in all: the columns, one parameter after the other.
        names: of the parameters in the module.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        parameters: Sequence[nn.Parameter] | None = None,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        check: bool = True,
        in_step: bool = False,
    ) -> None:
        """Find out which layers are fast. The module is left as it is until the block is entered.

        Args:
            module: the network itself, whole in this process (not sharded) and not compiled.
            parameters: some of its trainable parameters; all of them if not given.
            dtype: of the gradients.
            scale: losses are multiplied by it on the way back and gradients divided: against underflow in float16.
            check: make sure, in the first `compute` of two samples or more, that the samples do not mix and that no
                trained weight acts outside its layer; costs three more backward passes, once.
            in_step: all processes call the module together, with as many samples (`marble.shard`): check when any does.

        Raises:
            ValueError: nothing to train, a frozen parameter, batch normalisation in training mode, a compiled
                module, or `scale` is not positive.
        """
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        refuse(module)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if parameters is not None:
            check_trainable(parameters)
            chosen = {id(p) for p in parameters}
            named = [(name, p) for name, p in named if id(p) in chosen]
            if len(named) != len(chosen):
                raise ValueError(f"parameters must all be the module's own, {len(chosen) - len(named)} are not")
        if not named:
            raise ValueError("module has no trainable parameter (requires_grad is False for all)")
        self.module, self.dtype, self.scale = module, dtype, scale
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.sizes = [p.numel() for p in self.parameters]
        self.count = sum(self.sizes)
        self._sites = find_sites(module, {id(p): i for i, p in enumerate(self.parameters)})
        self._probe = torch.zeros((), requires_grad=True)
        self._in_step = in_step
        self._wants_check, self._low_precision = check, any(p.dtype.itemsize < 4 for p in module.parameters())
        self._samples = 0  # N of the compute under way
        self._weights: Tensor | None = None  # [N, J] while contracting for more than one row
        self._rows: Rows | None = None  # while contracting,
        self._part = 0  # and which part of them
        # in a check: layers where other samples hear the first one's loss, and whether as finite numbers
        self._elsewhere: dict[str, bool] | None = None
        self._heard, self._half, self._stale = 0, False, False
        self._going_back, self._probing = False, False

    # ---- the block ------------------------------------------------------------------------------------

    def __enter__(self) -> PerRewardGradients:
        check_trainable(self.parameters)
        refuse(self.module)
        self._probe = torch.zeros((), device=self.parameters[0].device, requires_grad=True)
        if wrapped := [site.name for site in self._sites if "forward" in vars(site.layer)]:
            raise ValueError(f"forward of {wrapped[0]} was replaced, by another engine's open block or by another tool")
        for number, site in enumerate(self._sites):
            site.layer.forward = functools.partial(self._forward, number)  # type: ignore[method-assign]
            site.seen.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for site in self._sites:
            site.layer.__dict__.pop("forward", None)

    def _forward(self, number: int, input: Tensor) -> Tensor:
        site, x = self._sites[number], input
        weight: Tensor = site.layer.weight
        bias: Tensor | None = site.layer.bias
        if not torch.is_grad_enabled():
            return nn.functional.linear(x, weight, bias)
        if self._stale and not self._going_back:  # the first forward pass after a compute
            for other in self._sites:
                other.seen.clear()
            self._stale = False
        site.seen.add(x.shape[0] if x.ndim > 1 else 0)
        if x.ndim < 2:
            return nn.functional.linear(x, weight, bias)
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        result = TappedLinear.apply(x.flatten(0, -2), weight, bias, self._probe, self, number)
        return result.view(*x.shape[:-1], len(weight))

    def hear(self, site: int, x: Tensor | None, delta: Tensor) -> bool:
        """What a tapped layer reports on its way back (see `tap.Listener`)."""
        self._heard += 1
        self._half = self._half or delta.dtype.itemsize < 4
        here = self._sites[site]
        if self._elsewhere is not None:
            rest = delta[len(delta) // self._samples if len(delta) % self._samples == 0 else len(delta) :]
            if rest.any():
                self._elsewhere[here.name] = bool(rest.isfinite().all())
        elif self._rows is not None and not here.slow:
            if here.weight is not None and x is not None:
                contract_weight(x, delta, self._weights, self._rows.block(self._part, here.weight))
            if here.bias is not None:
                contract_bias(delta, self._weights, self._rows.block(self._part, here.bias))
        return not self._probing

    # ---- what is asked of it --------------------------------------------------------------------------

    @property
    def fast_share(self) -> float:
        """Share of the P parameters that are in fast layers, 0 to 1."""
        return 1 - sum(self.sizes[i] for i in self._slow()) / self.count

    def rows(self, slopes: int, consts: int) -> Rows:
        """`[J + I, P]` zeros for `accumulate`, where the parameters are."""
        device = self.parameters[0].device
        return Rows((slopes, consts), self.sizes, dtype=self.dtype, device=device, whole=active())

    def compute(
        self, loss: AffineLoss, advantages: Tensor, applies: Tensor | None = None, *, retain_graph: bool = True
    ) -> Tensor:
        """`g_k = grad mean_n loss.at(A[:, k])` for every column k: what `reference_gradients` gives.

        Args:
            loss: N per-sample losses of forward passes made inside the block.
            advantages: `[N, K]`, finite.
            applies: `[N, K]` bool; if given, column k is averaged over the samples where it is true.
            retain_graph: keep the graph behind `loss` for another backward pass.

        Returns:
            `[K, P]` of `dtype`. A reward whose gradient overflows has a row that is not finite.

        Raises:
            ValueError: wrong shapes or numbers, a loss that does not come from the module inside the block, or
                samples that mix.
        """
        check_advantages(loss, advantages)
        effective = self._weights_of(loss.effective(advantages.to(loss.const)))
        matrix = torch.zeros(advantages.shape[1], self.count, dtype=self.dtype, device=self.parameters[0].device)
        if applies is None:
            mean = torch.full_like(effective[:, :1], 1 / len(effective))
        else:
            if applies.shape != advantages.shape:
                raise ValueError(f"applies must be {tuple(advantages.shape)}, got {tuple(applies.shape)}")
            judged = applies.to(effective)
            mean = judged / judged.sum(dim=0).clamp_min(1)
        consts = matrix[: mean.shape[1]]  # without `applies`, one row for all: it is copied before slopes are added
        rows = Rows.of(matrix, consts, self.sizes)
        common = matrix if applies is None else None
        self._gather(loss, effective * mean, mean, rows, retain_graph, common)
        return matrix

    def accumulate(
        self, rows: Rows, loss: AffineLoss, for_slope: Tensor, for_const: Tensor, *, retain_graph: bool = False
    ) -> None:
        """Add one micro-batch's share of any weighted sums: nothing but `rows` is kept between micro-batches.

        Args:
            rows: of `self.rows(J, I)`, changed in place: row j receives `sum_n for_slope[n, j] grad slope_n`, row J + i
                receives `sum_n for_const[n, i] grad const_n`.
            loss: as in `compute`.
            for_slope: `[N, J]`, finite; for rewards, the effective advantages over the number of samples.
            for_const: `[N, I]`, finite.
            retain_graph: as in `compute`.

        Raises:
            ValueError: as in `compute`.
        """
        check_advantages(loss, for_slope, "for_slope")
        check_advantages(loss, for_const, "for_const")
        expected = (for_slope.shape[1], for_const.shape[1])
        if rows.counts != expected or rows.sizes != self.sizes or rows.dtype != self.dtype:
            raise ValueError(f"rows must be those of engine.rows{expected}, got {rows.counts} {rows.dtype}")
        self._gather(loss, self._weights_of(for_slope), self._weights_of(for_const), rows, retain_graph)

    # ---- how ------------------------------------------------------------------------------------------

    def _weights_of(self, effective: Tensor) -> Tensor:
        return effective.detach().to(
            device=self.parameters[0].device, dtype=torch.promote_types(self.dtype, effective.dtype)
        )

    def _gather(
        self,
        loss: AffineLoss,
        for_slope: Tensor,
        for_const: Tensor,
        rows: Rows,
        keep: bool,
        common: Tensor | None = None,
    ) -> None:
        """Add `for_slope [N, J]`-weighted gradients of `slope` to the first rows, and of `const` to the others.

        `common [J, P]`, if given, are the first rows; the others are its first row, and what goes there is for all.
        """
        self._samples = len(loss.const)
        if not (loss.const.requires_grad or loss.slope.requires_grad):
            raise ValueError("loss is detached: neither const nor slope depends on a parameter")
        for site in self._sites:
            site.slow = site.tied or any(size == 0 or size % self._samples for size in site.seen)
        self._heard = 0
        if self._anywhere(self._wants_check and self._samples > 1 and self._unlike_before()):
            self._check(loss)
        slow = self._slow()
        if loss.const.requires_grad:
            self._sweep(loss.const, for_const, rows, 1, keep=keep or bool(slow) or loss.slope.requires_grad)
            if common is not None:
                common[1:] = common[:1]
        if loss.slope.requires_grad:
            self._sweep(loss.slope, for_slope, rows, 0, keep=keep or bool(slow))
        self._stale = True
        self._insist_on_hearing(slow)
        if slow:
            self._by_columns(loss, slow, for_slope, for_const, rows, common is not None, keep)

    def _anywhere(self, flag: bool) -> bool:
        """Whether it is so in a process that has to make the same passes as this one."""
        return total(float(flag)) > 0 if self._in_step else flag

    def _unlike_before(self) -> bool:
        """Whether a fast layer has a number of rows a sample that no check has seen."""
        return any(size // self._samples not in s.checked for s in self._sites if not s.slow for size in s.seen)

    def _insist_on_hearing(self, slow: Sequence[int]) -> None:
        if not self._heard and len(slow) < len(self.parameters):
            raise ValueError(
                "loss does not come from the module's forward pass inside the block (or its layers are under "
                "reentrant gradient checkpointing: use use_reentrant=False)"
            )

    def _sweep(self, losses: Tensor, weights: Tensor, rows: Rows, part: int, *, keep: bool) -> None:
        """One backward pass of `losses [N]`, each sample weighted by `weights [N, J]` in row j of a part of `rows`."""
        self._rows, self._part = rows, part
        if weights.shape[1] == 1 and self.scale == 1:
            losses = losses * weights[:, 0].to(losses)  # the weights travel with the loss, and layers just add up
        else:
            self._weights = weights / self.scale
        try:
            self._backward(losses.sum() * self.scale, [self._probe], keep)
        finally:
            self._weights = self._rows = None

    def _backward(self, loss: Tensor, inputs: Sequence[Tensor], keep: bool) -> Sequence[Tensor | None]:
        self._going_back, self._probing = True, inputs[0] is self._probe
        try:
            return torch.autograd.grad(loss, inputs, retain_graph=keep, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise ValueError(
                    "reentrant gradient checkpointing cannot be differentiated by parts: use use_reentrant=False"
                ) from error
            if "donated buffer" in str(error):
                raise ValueError(
                    "a compiled function calls the module: give the engine an eager forward pass"
                ) from error
            raise
        finally:
            self._going_back = self._probing = False

    def _slow(self) -> list[int]:
        """Parameters that no fast layer holds, by number."""
        fast = {i for s in self._sites if not s.slow for i in (s.weight, s.bias)}
        slow = {i for s in self._sites if s.slow for i in (s.weight, s.bias)}
        return [i for i in range(len(self.parameters)) if i in slow or i not in fast]

    def _by_columns(
        self,
        loss: AffineLoss,
        slow: Sequence[int],
        for_slope: Tensor,
        for_const: Tensor,
        rows: Rows,
        common: bool,
        keep: bool,
    ) -> None:
        """The slow way, for `slow` parameters alone: a backward pass for every column."""
        slopes = [loss.slope * column for column in for_slope.unbind(dim=1)]
        consts = [loss.const * column for column in for_const.unbind(dim=1)]
        if common:
            passes = [(slope + consts[0], 0, j) for j, slope in enumerate(slopes)]
        else:
            passes = [(each, 0, j) for j, each in enumerate(slopes)] + [(each, 1, i) for i, each in enumerate(consts)]
        passes = [each for each in passes if each[0].requires_grad]
        inputs = [self.parameters[i] for i in slow]
        for number, (losses, part, row) in enumerate(passes):
            found = self._backward(losses.sum() * self.scale, inputs, keep or number + 1 < len(passes))
            for i, gradient in zip(slow, found, strict=True):
                if gradient is not None:
                    block = rows.block(part, i)
                    block[row] += (gradient / self.scale).flatten().to(block)

    def _check(self, loss: AffineLoss) -> None:
        """Refuse samples that mix; send layers whose rows or weights are not what they seem the slow way."""
        losses = loss.const + 0.7 * loss.slope
        if self._anywhere(not losses.isfinite().all()):  # says nothing of the module: another batch will
            return
        self._elsewhere = {}
        try:
            self._backward(losses[0] * self.scale, [self._probe], True)
            elsewhere = self._elsewhere
        finally:
            self._elsewhere = None
        self._insist_on_hearing(self._slow())
        if self._anywhere(not all(elsewhere.values())):  # an overflow, not a mixture
            return
        if elsewhere:
            raise ValueError(
                "samples mix inside the module, or are not the first dimension there (as with normalisation over "
                f"the batch): seen at {', '.join(list(elsewhere)[:3])}"
            )
        slow = set(self._slow())
        fast = [i for i in range(len(self.parameters)) if i not in slow]
        if not fast:
            return
        unlike = 1 + 0.5 * torch.arange(1, self._samples + 1, device=losses.device).to(losses.dtype).sin()
        rows = self.rows(2, 0)
        self._sweep(losses, torch.stack([unlike, -unlike], dim=1), rows, 0, keep=True)
        if self._anywhere(not rows.gram().isfinite().all()):  # an overflow here says nothing of the module either
            return
        low = self._half or self._low_precision or torch.backends.cuda.matmul.allow_tf32
        wrong, tolerance = set(), 0.05 if low else 1e-3
        least = 1e-3 * tolerance * rows.gram()[0, 0].sqrt().item()
        inputs = [self.parameters[i] for i in fast]
        for i, true in zip(fast, self._backward((unlike * losses).sum() * self.scale, inputs, True), strict=True):
            ours = rows.block(0, i)[0]
            true = torch.zeros_like(ours) if true is None else true.flatten().to(ours) / self.scale
            if not torch.linalg.vector_norm(ours - true) <= tolerance * true.norm() + least:
                wrong.add(i)
        if wrong:
            names = ", ".join(self.names[i] for i in sorted(wrong)[:3])
            warnings.warn(
                f"{len(wrong)} parameters of linear layers act outside their layer, or its rows are not sample after "
                f"sample; they take the slow way, a backward pass for every reward: {names} …",
                stacklevel=5,
            )
        for site in self._sites:
            site.tied = site.tied or site.weight in wrong or site.bias in wrong
            site.slow = site.slow or site.tied
            if not site.slow:
                site.checked |= {size // self._samples for size in site.seen}
