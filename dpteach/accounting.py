"""What a run costs: ε from the noise multiplier, the sampling rate and the number of steps.

Nothing else enters: not the model, not the clipping norm, not the learning rate, not the data. The numbers are those
of Opacus' accountants and of Google's ``dp-accounting``; this room gives them one name and one set of checks.

The neighbouring relation is add/remove of one record, under Poisson sampling (see ``mechanism.poisson_batches``).
"""

import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from filelock import FileLock

from dpteach._checks import choice, number, whole

ACCOUNTANTS = ("prv", "rdp", "gdp", "pld", "rdp-classic")

# The orders that Opacus searches today, and the ones of the 2020 blog post.
_ALPHAS = {"rdp": (*(1 + x / 10 for x in range(1, 100)), *range(12, 64)), "rdp-classic": tuple(range(2, 32))}

# PRV's mesh, 0.01 wide in ε as in Opacus while it has up to so many points; beyond, it is wider, so that an answer takes
# seconds (with the fine one it took 15 s at ε = 216, and 108 s to find no answer at ε = 2359).
_MESH_POINTS = 1 << 20


def epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    target_delta: float = 1e-5,
    accountant: str = "prv",
    alphas: Sequence[float] | None = None,
) -> float:
    """ε of ``steps`` steps of DP-SGD, at ``target_delta``.

    Args:
        noise_multiplier: σ >= 0; the noise on the clipped sum has standard deviation σ·C.
        sample_rate: q in (0, 1], the probability that a record takes part in a step.
        steps: number of steps, >= 0.
        target_delta: δ in (0, 1); keep it well below one over the number of records.
        accountant: ``"prv"`` (numerical, an upper bound within 0.01, or within 0.2 % for a large ε or up to 100,000
            steps; it cannot resolve ε > 700 or δ < 1e-10, and RDP's bound is the answer there), ``"rdp"`` (quick, a
            looser upper bound), ``"pld"`` (numerical, from dp-accounting; below δ = 1e-10 its rounding errors show),
            ``"gdp"`` (a central limit approximation: **not a bound**, it can report far too little), ``"rdp-classic"``
            (RDP with the conversion of 2017, as tools printed it until about 2020).
        alphas: the RDP orders to search, each > 1; for the two RDP accountants only.

    Returns:
        ε >= 0. ``inf`` without noise; 0.0 without a step.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Gopi et al. 2021 (PRV), Mironov 2017 and Balle et al. 2020 (RDP), Dong et al. 2019 (GDP), Koskela et al. 2020
    (PLD).

    >>> round(epsilon(noise_multiplier=1.0, sample_rate=1 / 79, steps=790), 2)
    2.12
    """
    sigma, q, steps, delta, accountant, alphas = _checked(
        noise_multiplier, sample_rate, steps, target_delta, accountant, alphas
    )
    return _of_history(((sigma, q, steps),), delta, accountant, alphas)


def epsilon_path(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    target_delta: float = 1e-5,
    accountant: str = "rdp",
    alphas: Sequence[float] | None = None,
) -> np.ndarray:
    """ε after each of ``steps`` steps: what a live plot draws.

    The RDP accountants answer in milliseconds. The others are asked once a step: about 0.2 s each for ``"prv"``.

    Args and errors as for :func:`epsilon`.

    Returns:
        ``(steps,)`` float64: ε after step 1, 2, …
    """
    sigma, q, steps, delta, accountant, alphas = _checked(
        noise_multiplier, sample_rate, steps, target_delta, accountant, alphas
    )
    if sigma == 0:
        return np.full(steps, math.inf)
    if accountant.startswith("rdp"):
        return _rdp(((sigma, q, 1),), np.arange(1, steps + 1), delta, accountant, alphas)
    return np.array([
        epsilon(noise_multiplier=sigma, sample_rate=q, steps=t, target_delta=delta, accountant=accountant)
        for t in range(1, steps + 1)
    ])


def noise_multiplier_for(
    *,
    target_epsilon: float,
    sample_rate: float,
    steps: int,
    target_delta: float = 1e-5,
    accountant: str = "prv",
) -> float:
    """The smallest noise multiplier σ that keeps the whole run within ``target_epsilon``.

    Args:
        target_epsilon: ε > 0 that the run may cost.
        sample_rate, steps, target_delta, accountant: as for :func:`epsilon`.

    Returns:
        σ, rounded up: ``epsilon(noise_multiplier=σ, ...) <= target_epsilon``, and a σ that is smaller by 0.1 % is not
        enough.

    Raises:
        ValueError: if an argument is out of its range, or no σ up to 10,000 is enough.
    """
    target_epsilon = number("target_epsilon", target_epsilon, low=0, above=True)
    steps = whole("steps", steps, low=1)

    def enough(sigma: float) -> bool:
        return target_epsilon >= epsilon(
            noise_multiplier=sigma, sample_rate=sample_rate, steps=steps, target_delta=target_delta, accountant=accountant
        )

    # From the side of much noise, where every accountant is quick, down to the first σ that is not enough.
    high = 1.0
    while not enough(high):
        high *= 2
        if high > 10_000:
            raise ValueError(
                f"target_epsilon must be reachable with a noise_multiplier up to 10000, got {target_epsilon!r} "
                f"(accountant {accountant!r}, sample_rate {sample_rate!r}, {steps} steps): raise target_epsilon"
            )
    low = high / 1.25
    while enough(low):
        high, low = low, low / 1.25
    while high / low > 1.0005:
        middle = math.sqrt(high * low)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Charge:
    """One entry of a :class:`Ledger`: so many steps with this noise multiplier σ and this sample rate q."""

    noise_multiplier: float
    sample_rate: float
    steps: int


class Ledger:
    """What training on one data set has cost so far, over all its runs: write the charge first, then train.

    A charge that is written *before* the training it pays for also counts a training that was killed half-way. With a
    ``path`` the ledger lives in a file: it outlasts the process, and two processes can charge it at the same time.
    A ledger belongs to one set of records. Two sets without a common record have two ledgers, and their ε are never
    added (parallel composition).

    Args:
        path: the file, made at the first charge, in a folder that exists. None keeps the ledger in memory.

    Attributes:
        charges: tuple of :class:`Charge`, in the order in which they were made.
        steps: how many steps they are.

    Raises:
        ValueError: if the file is damaged, of another version, or not a ledger. It is left as it is: an account that
            can't be read must not start again at zero.

    >>> ledger = Ledger()
    >>> for _ in range(5):  # the two-worker blog post of 2020: five rounds of 235 steps
    ...     _ = ledger.charge(noise_multiplier=1.2, sample_rate=128 / 30_000, steps=235)
    >>> round(ledger.epsilon(target_delta=1e-5, accountant="rdp-classic"), 2)
    1.01
    """

    FORMAT, VERSION = "dpteach-ledger", 1
    id = ""

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = None if path is None else Path(path)
        self._kept: tuple[Charge, ...] = ()
        _ = self.charges  # a damaged file is an error now, not after the first training

    @property
    def charges(self) -> tuple[Charge, ...]:
        if self.path is None or not self.path.exists():
            return self._kept
        return self._read()

    @property
    def steps(self) -> int:
        return sum(charge.steps for charge in self.charges)

    def charge(self, *, noise_multiplier: float, sample_rate: float, steps: int) -> int:
        """Write down ``steps`` steps that are about to run. When this returns, a file is on the disk.

        Args:
            noise_multiplier: σ >= 0; 0 makes ε infinite from here on.
            sample_rate: q in (0, 1].
            steps: number of steps, >= 0.

        Returns:
            How many charges were made before this one.

        Raises:
            ValueError: if an argument is out of its range, or the file is damaged. Then nothing is written: don't train.
            OSError: if the file can't be written. Don't train.
        """
        sigma, q, steps, *_ = _checked(noise_multiplier, sample_rate, steps, 1e-5, "rdp", None)
        new = Charge(sigma, q, steps)
        if self.path is None:
            self._kept += (new,)
            return len(self._kept) - 1
        with FileLock(f"{self.path}.lock", timeout=30):  # read, add and write as one
            before = self.charges
            self._write((*before, new))
            return len(before)

    def epsilon(self, *, target_delta: float = 1e-5, accountant: str = "prv") -> float:
        """ε of everything that was charged, at ``target_delta``.

        Args and errors as for :func:`epsilon`. Charges with different σ or q are composed as they are, none is rounded.
        """
        *_, delta, accountant, _ = _checked(1.0, 1.0, 0, target_delta, accountant, None)
        stretches: dict[tuple[float, float], int] = {}
        for charge in self.charges:
            key = (charge.noise_multiplier, charge.sample_rate)
            stretches[key] = stretches.get(key, 0) + charge.steps
        return _of_history(tuple((*key, steps) for key, steps in stretches.items()), delta, accountant, None)

    def __repr__(self) -> str:
        return f"Ledger({'in memory' if self.path is None else str(self.path)!r}, {len(self.charges)} charges, {self.steps} steps)"

    def _read(self) -> tuple[Charge, ...]:
        def damaged(why: str) -> ValueError:
            return ValueError(
                f"{self.path} is not a readable ledger ({why}). It says what has been spent, so nothing may train without "
                "it: restore it from a backup, or move it away only if no model trained on this data is ever released."
            )

        try:
            content = json.loads(self.path.read_text(encoding="utf8"))
            if content["format"] != self.FORMAT:
                raise damaged(f"its format is {content['format']!r}")
            if content["version"] != self.VERSION:
                raise damaged(f"its version is {content['version']!r}, this program reads {self.VERSION}")
            if content["sha256"] != _digest(content["charges"]):
                raise damaged("its checksum does not fit its charges")
            charges = tuple(Charge(**entry) for entry in content["charges"])
            for c in charges:
                _checked(c.noise_multiplier, c.sample_rate, c.steps, 1e-5, "rdp", None)
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise damaged(f"{type(error).__name__}: {error}") from error
        return charges

    def _write(self, charges: tuple[Charge, ...]) -> None:
        entries = [asdict(charge) for charge in charges]
        content = {"format": self.FORMAT, "version": self.VERSION, "charges": entries, "sha256": _digest(entries)}
        part = self.path.with_name(f"{self.path.name}.part")
        with part.open("w", encoding="utf8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)  # whole or not at all
        if os.name == "posix":  # the new name must be on the disk too
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _digest(entries: list) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _checked(noise_multiplier, sample_rate, steps, target_delta, accountant, alphas):
    choice("accountant", accountant, ACCOUNTANTS)
    if alphas is not None:
        if accountant not in _ALPHAS:
            raise ValueError(f"alphas must be left out with accountant {accountant!r}: only the RDP accountants use them")
        alphas = tuple(number("alphas", alpha, low=1, above=True) for alpha in alphas)
        if not alphas:
            raise ValueError("alphas must hold at least one order > 1, got none")
    return (
        number("noise_multiplier", noise_multiplier, low=0),
        number("sample_rate", sample_rate, low=0, above=True, high=1, below=False),
        whole("steps", steps, low=0),
        number("target_delta", target_delta, low=0, above=True, high=1),
        accountant,
        alphas,
    )


# What has run, as Opacus' accountants keep it: (noise multiplier, sample rate, steps), one entry a stretch of equal steps.
_History = tuple[tuple[float, float, int], ...]


def _of_history(history: _History, delta: float, accountant: str, alphas) -> float:
    history = tuple(entry for entry in history if entry[2] > 0)
    if not history:
        return 0.0
    if any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    if accountant == "gdp":
        return _gdp(history, delta)
    if accountant == "pld":
        return _pld(history, delta)
    if accountant == "prv":
        return _prv(history, delta)
    return float(_rdp(history, np.ones(1), delta, accountant, alphas)[0])


@functools.cache
def _opacus_rdp() -> ModuleType:
    """Opacus' formulas for RDP: the one file, without the rest of Opacus, which takes seconds to import."""
    name = "opacus.accountants.analysis.rdp"
    file = Path(importlib.util.find_spec("opacus").origin).parent / "accountants" / "analysis" / "rdp.py"
    if not file.is_file():  # another version may keep it elsewhere
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.lru_cache(maxsize=256)
def _rdp_of_one_step(sigma: float, q: float, alphas: tuple[float, ...]) -> np.ndarray:
    return np.asarray(_opacus_rdp().compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=list(alphas)))


def _rdp(history: _History, times: np.ndarray, delta, accountant: str, alphas) -> np.ndarray:
    """ε of the whole history ``times`` times over, one value for each of ``times``."""
    orders = alphas or _ALPHAS[accountant]
    alpha = np.asarray(orders, dtype=np.float64)
    if accountant == "rdp":  # Balle et al. 2020, Theorem 21
        convert = np.log1p(-1 / alpha) - (math.log(delta) + np.log(alpha)) / (alpha - 1)
    else:  # Mironov 2017, Proposition 3
        convert = -math.log(delta) / (alpha - 1)
    total = sum(steps * _rdp_of_one_step(sigma, q, tuple(orders)) for sigma, q, steps in history)
    best = np.full(len(times), np.inf)
    for rdp, extra in zip(total, convert):
        if math.isfinite(rdp):
            np.minimum(best, times * rdp + extra, out=best)
    return np.maximum(best, 0.0)


@functools.lru_cache(maxsize=256)
def _prv(history: _History, delta) -> float:
    bound = float(_rdp(history, np.ones(1), delta, "rdp", None)[0])
    # Below, PRV's rounding errors are as large as δ; above, it takes seconds only to overflow.
    if delta < 1e-10 or bound > 1000:
        return bound
    steps = sum(steps for _, _, steps in history)
    points = 2 * bound / 0.01 * math.sqrt(steps * math.log(12_000 / delta) / 2)  # Gopi et al. 2021: mesh ∝ error / √steps
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            value = float(accountant.get_epsilon(delta, eps_error=0.01 * max(1.0, points / _MESH_POINTS)))
        except (ValueError, RuntimeError, FloatingPointError, OverflowError):
            value = math.nan
    # Near 709 PRV's exponentials overflow, and it says about 711 for whatever is larger: RDP's bound holds there too.
    return max(value, 0.0) if value < 700 else bound


def _gdp(history: _History, delta) -> float:
    from opacus.accountants.analysis.gdp import compute_mu_poisson, delta_eps_mu, eps_from_mu

    with np.errstate(all="ignore"):
        mu = math.hypot(*(
            float(compute_mu_poisson(steps=steps, noise_multiplier=sigma, sample_rate=q)) for sigma, q, steps in history
        ))
        if delta_eps_mu(eps=0.0, mu=mu) <= delta:
            return 0.0
        # Opacus searches ε up to 500.
        return float(eps_from_mu(mu=mu, delta=delta)) if delta_eps_mu(eps=500.0, mu=mu) < delta else math.inf


def _pld(history: _History, delta) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    for sigma, q, steps in history:
        accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps))
    return float(accountant.get_epsilon(delta))
