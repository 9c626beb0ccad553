# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# ## 6 · From an attack to a bound
#
# An attack that fails proves nothing: tomorrow's may be better. But an attack that *succeeds* proves something. If a model is (ε, δ)-private, then for whatever an attacker says,
#
# $$P(\text{says "in"} \mid \text{in}) \le e^{\varepsilon} \cdot P(\text{says "in"} \mid \text{out}) + \delta$$
#
# Turn it round, and hits and false positives give a **lower bound** on ε. This is an **audit**: an experiment from outside, to hold beside the accountant's upper bound. If the lower bound is above the claim, the claim is false.
#
# **Predict.** An attacker says "in" about 70 of 100 members and 10 of 100 strangers. How large is ε at least? And how large if it is 7 of 10 and 1 of 10?

# %%
for n in (10, 100, 1000):
    found, wrong = (binomtest(k * n // 10, n).proportion_ci(0.95) for k in (7, 1))
    at_least = max(0.0, math.log(found.low / wrong.high))
    print(f"{n} of each: counted, ε = {math.log(7):.2f}; with 95% confidence, ε ≥ {at_least:.2f}")

# %% [markdown]
# The counted shares are an estimate. With 10 of each it may be luck, and nothing can be said. A bound without its confidence is no bound. The interval here is that of Clopper and Pearson: it is exact, also for few people.

# %% [markdown]
# > **Exercise 8.4 · write code · 8 minutes · medium**
# >
# > Write `epsilon_at_least`: hits and false positives into a lower bound on ε that is wrong with a probability of at most 1 − `confidence`. Use `binomtest(k, n).proportion_ci(confidence)`, and don't forget δ. Where nothing can be said, return 0.


# %%
def epsilon_at_least(hits, members, false_positives, strangers, target_delta, confidence):
    """A lower bound on ε from an attack.

    hits: how many of the members the attacker said "in" about; false_positives: how many of the strangers.
    target_delta: δ. confidence: 0.95, say.
    Returns a number, 0 or more.
    """
    ...


# %%
check("8.4", epsilon_at_least)

# %% [markdown] fold="8.4"
# (folded)

# %% [markdown]
# ## 7 · Canaries: audit a training in a second
#
# A hundred trainings with you and a hundred without you would take long. The trick is to ask many questions about *one* training (Steinke et al. 2023): hide hundreds of made-up records, **canaries**, in the data, each by the flip of a coin, and guess the coins afterwards.
#
# Where do canaries live, so that nothing disturbs them? Some pixels of MNIST are black in all images. No digit ever moves their weights.

# %%
from dpteach import audit, train

mnist = dpteach.load_mnist()
pixels, digits = audit.dead_pixels(mnist), mnist.take(1000)
print(f"{len(pixels)} of 784 pixels are black in all {len(mnist):,} images: room for {10 * len(pixels)} canaries")

# %% [markdown]
# A canary is a black image with one of these pixels lit, and one of the ten labels. If it was in, the weight from its pixel to its label has grown. `audit_training` flips the coins, trains a softmax regression once with `dpteach.train`, and reads these weights: one score for each canary, from the final weights alone.
#
# **Predict.** 30 steps, every record in every step (q = 1), σ = 3.29. The accountant says ε = 8. How well can the two groups be told apart?

# %%
run = audit.audit_training(train, digits, pixels, noise_multiplier=3.29, epochs=30)
inside, outside = run.scores[run.included], run.scores[~run.included]
apart = ((inside.mean() - outside.mean()) / outside.std()).item()
assert 1.3 < apart < 2.1
print(f"{len(inside)} canaries were in, {len(outside)} were out")
print(f"their scores stand {apart:.1f} standard deviations apart; perfect sight would be {30**0.5 / 3.29:.1f}")

# %% [markdown]
# The attacker sees almost all that can be seen: the two bells of [notebook 03](03_noise.ipynb), measured on a real training. Now five ways to read the same scores.
#
# | estimator | what it assumes | what it can reach |
# |---|---|---|
# | the best ratio, as counted | nothing, and promises nothing | infinity, by luck |
# | hits and misses (Clopper–Pearson) | scores are independent | little: the tails have few canaries |
# | one run (Steinke et al. 2023) | fair coins, nothing else | little |
# | one run, Gaussian curve (Mahloujifar et al. 2024) | fair coins, and noise with a Gaussian trade-off curve | about half |
# | two bells | the same curve, and independent Gaussian scores | most |
#
# **Predict.** Which bound will be the largest? Will one be above 8?

# %%
estimators = {
    "hits and misses": audit.clopper_pearson,
    "one run": audit.one_run,
    "one run, Gaussian curve": audit.one_run_fdp,
    "two bells": audit.gaussian_fit,
}
false_positives, found = dpteach.attacks.roc_curve(inside, outside)
bounds = {name: bound(run.scores, run.included) for name, bound in estimators.items()}
print(f"the best ratio, as counted: {(found / false_positives).log().nan_to_num(0, math.inf).max():.1f}")
for name, bound in bounds.items():
    print(f"{name}: ε ≥ {bound:.1f} with 95% confidence")
print(f"accountant: ε ≤ {dpteach.epsilon(noise_multiplier=3.29, sample_rate=1.0, steps=30):.1f}")

# %%
assert 0.3 * 8 < bounds["one run, Gaussian curve"] < 8 and 0.65 * 8 < bounds["two bells"] < 8
assert 0 < bounds["one run"] < bounds["one run, Gaussian curve"] and 0 < bounds["hits and misses"]

# %% [markdown]
# The more an estimator assumes, the closer it comes. The counted ratio is worthless: beyond the highest stranger it divides by zero. (`dpteach.audit` guesses the highest eighth of the scores as "in" and the lowest as "out". To try many thresholds and keep the best one is another way to be lucky.)
#
# The next cells make a live picture. The green line is what the accountant allows for each σ. Below it are the experiments: each dot is a real training, read at the moment you drag. The second slider is the bug: it makes a *liar* that adds only a part of the noise it claims.


# %%
def experiment(noise_multiplier, noise_added):
    def trainer(model, data, s):
        yield from train(model, data, dataclasses.replace(s, noise_multiplier=noise_added * s.noise_multiplier))

    run = audit.audit_training(trainer, digits, pixels, noise_multiplier=noise_multiplier)
    return run, [estimators[name](run.scores, run.included) for name in list(estimators)[1:]]


# %%
sigmas = torch.logspace(math.log10(2), math.log10(20), 7).tolist()
path = torch.tensor([experiment(sigma, 1.0)[1] for sigma in sigmas])  # (7, 3)

# %%
from dpteach.plots import Bars


def allowed(sigma):  # 30 steps with q = 1: one Gaussian mechanism with μ = √30/σ
    return audit.gaussian_epsilon(30**0.5 / sigma)


curve = [allowed(sigma) for sigma in sigmas]
assert abs(allowed(3.29) - dpteach.epsilon(noise_multiplier=3.29, sample_rate=1.0, steps=30)) < 0.02
assert (path.max(1).values < torch.tensor(curve) * 1.1).all()  # one in twenty may be a little above
print(f"two bells reach {(path[:, 2] / torch.tensor(curve)).median():.0%} of ε in the middle of seven trainings")


# %%
def bells(run):
    edges = torch.linspace(-4, 8, 37)
    scores = (run.scores - run.scores[~run.included].mean()) / run.scores[~run.included].std()
    parts = [("data", "out", scores[~run.included]), ("private", "in", scores[run.included])]
    bars = [Bars(edges, torch.histogram(s.clamp(-4, 8).float(), edges).hist, role, label) for role, label, s in parts]
    alt = f"Scores of the canaries that were in stand {parts[1][2].mean():.1f} standard deviations above the others'."
    words = "What the weights say about each canary", "score, in standard deviations of those out", "canaries"
    return Panel(*words, bars, alt)


# %%
def bound_panel(sigma, found):
    looks = [("one run", "data", False), ("Gaussian curve", "attacker", True), ("two bells", "attacker", False)]
    lines = [
        Line(sigmas, path[:, k], role, label, dashed=dashed, ghost=True)
        for k, (label, role, dashed) in enumerate(looks)
    ]
    dots = [Points([sigma], [min(found[k], 99)], role, cross=cross) for k, (_, role, cross) in enumerate(looks)]
    top = Line(sigmas, curve, "budget", "accountant: at most")
    verdict = "above: caught" if max(found) > allowed(sigma) else "below"
    alt = f"At σ = {sigma:.3g} the accountant allows ε = {allowed(sigma):.1f}; the best bound is {verdict}."
    words = "What is claimed, and what is found", "σ that is claimed", "ε"
    return Panel(*words, [top, *lines, *dots], alt, (2, 20), (0.1, 100), x_log=True, y_log=True)


# %% [markdown]
# **Predict, then drag.** What happens to the bells from σ = 3.29 to 20? Then drag *noise added* down: at which share of the noise does the first dot cross the green line? Is it the same dot for a large σ?


# %%
def draw(noise_multiplier, noise_added):
    run, found = experiment(noise_multiplier, noise_added)
    return [bells(run), bound_panel(noise_multiplier, found)]


limits = {"noise_multiplier": Range(2, 20, log=True), "noise_added": Range(0.05, 1)}
audited = Viewer(draw, ranges=limits, noise_multiplier=3.29, noise_added=1.0)
audited

# %%
audited.wait()
print(audited.summary())
audited.still()

# %%
guilty = {}
for share in (0.9, 0.7, 0.4, 0.25):
    _, found = experiment(8.0, share)
    guilty[share] = [name for name, bound in zip(list(estimators)[1:], found) if bound > allowed(8.0)]
    print(f"σ = 8, ε = {allowed(8.0):.1f}, {share:.0%} of the noise: caught by {', '.join(guilty[share]) or 'none'}")
assert [len(names) for names in guilty.values()] == [0, 1, 2, 3]

# %% [markdown]
# An audit finds gross lies: with 90 % of the noise nobody is caught, with a quarter of it by all. (At σ = 3.29 the lower two can't catch anybody: with 166 guesses, *all* right, "one run" says ε ≥ 4.0 and the Gaussian curve 7.2, and the claim is 8. Audit where the claim is small.)
#
# **Where the bells mislead.** "Two bells" and the Gaussian curve assume Gaussian noise, and every record in every step. Another mechanism may be more private than its bulk looks. An old one: each canary *answers for itself* whether it is in, and tells the truth with probability $e / (1 + e)$, which is 73 %. That is exactly ε = 1 with δ = 0, by the definition.
#
# **Predict.** Which of the four will find this honest mechanism guilty?

# %%
generator = torch.Generator().manual_seed(0)
coins = torch.rand(2000, generator=generator) < 0.5
truthful = torch.rand(2000, generator=generator) < math.e / (1 + math.e)
answers = torch.where(truthful, coins, ~coins).double()
for name, estimator in estimators.items():
    bound = estimator(answers, coins)
    print(f"{name}: ε ≥ {bound:.1f}", "- wrong: ε is 1" if bound > 1 else "")
    assert (bound > 1) == ("bells" in name or "curve" in name)

# %% [markdown]
# The two that assume a Gaussian curve convict the honest. With q < 1 the curve of DP-SGD is not Gaussian either ([notebook 04](04_privacy_budget.ipynb)), so there only the first two hold. From here on we use `one_run`, which assumes nothing but fair coins.

# %% [markdown]
# ## 8 · Catch the liar
#
# Five trainers, each with a bug that real code has had. Each trains well, reports an ε and raises no error. This is one of them. What is wrong with it?

# %%
from dpteach.exercises.audit import BROKEN, divided_twice

source(divided_twice)

# %% [markdown]
# The noise is made for the mean, and then divided once more. Three checks for each trainer:
#
# - `one_run` on the **final weights**, which everybody gets;
# - `lower_bound()`: `one_run` on **every step**, twice, on how far the steps lean towards a canary and on how much they *vary*;
# - `sensitivity`, the **same-seed test**: two steps with the same random numbers, with and without one record. The noise cancels, and what is left is exact: how far one record moves the sum, in units of $C$.
#
# **Predict.** Which bug can't be seen in the final weights? Which one shows in the same-seed test?


# %%
def examine(name, trainer):
    run = audit.audit_training(trainer, digits, pixels, noise_multiplier=8.0, epochs=50, steps_per_epoch=2)
    final, every = audit.one_run(run.scores, run.included), run.lower_bound()
    moved = audit.sensitivity(trainer)
    print(f"{name}: claims {run.epsilon:.1f}; final weights {final:.1f}, every step {every:.1f}; moves {moved:.1f}·C")
    return run.epsilon, final, every, moved


reports = {name: examine(name, trainer) for name, trainer in {"honest": train, **BROKEN}.items()}

# %%
honest = reports.pop("honest")
assert honest[2] < honest[0] and abs(honest[3] - 1) < 1e-4
assert all(every > claim for claim, _, every, _ in reports.values())
unseen = [name for name, (claim, final, _, _) in reports.items() if final <= claim]
moved = [name for name, report in reports.items() if report[3] > 1.01]
print(f"not in the final weights: {', '.join(unseen)}; in the same-seed test: {', '.join(moved)}")

# %% [markdown]
# All five are caught, and no check catches all. The same noise at every step *adds up*, so the final weights look very private, and whoever sees two steps subtracts it. The audit's model has one layer: a bug in another layer than the canaries' would go unseen.

# %% [markdown]
# > **Exercise 8.5 · reason · 8 minutes · medium**
# >
# > Three sealed trainers, a, b and c. Two are honest, one lies. Audit them as above (`SEALED["a"]` and so on, with σ = 8, 50 epochs, 2 steps an epoch), and give the liar's letter.

# %%
from dpteach.exercises.audit import SEALED

answer_8_5 = ...

# %%
check("8.5", answer_8_5)

# %% [markdown] fold="8.5"
# (folded)

# %% [markdown]
# Now the other way round: hand in a step of your own, and have it audited.
#
# > **Exercise 8.6 · write code · 8 minutes · medium**
# >
# > Write `dp_step`: the gradient of one private step. The check trains with it, with canaries, and runs the three tests of this section. Use the moves of `dpteach` (`per_sample_gradients`, `clip`, `add_noise`), or your own.


# %%
def dp_step(model, X, y, noise_multiplier, max_grad_norm, expected_batch_size, generator):
    """The gradient of one private step, over all of the model's parameters.

    X, y: the records of this batch; there may be none.
    generator: where the noise comes from.
    Returns a tensor (P,): the noisy mean gradient. The loss is torch.nn.functional.cross_entropy.
    """
    ...


# %%
check("8.6", dp_step)

# %% [markdown] fold="8.6"
# (folded)

# %% [markdown]
# ## 9 · A small museum of real bugs
#
# Four bugs that libraries and tutorials have had. None of them needs an attack to be found: a test of one line will do. All four tests fail. **Mend each function** here, and run the four cells again.


# %%
def divisor(n, batch_size):  # Opacus divides by int(n * sample_rate) (its issues 571 and 819)
    return int(n / math.ceil(n / batch_size))


def sigma_of_gradients(sigma, sigma_of_count):  # adaptive clipping also publishes a noisy count of unclipped records
    return sigma  # and ε is computed for sigma alone


def cost(rounds, steps):  # a new PrivacyEngine in each round of federated training
    return dpteach.epsilon(noise_multiplier=1.2, sample_rate=1 / 235, steps=steps)


# %%
def delta_for(n, batches):  # from a tutorial: "δ = 1 / len(train_loader)"
    return 1 / batches


# %%
def museum():
    whole_run = dpteach.epsilon(noise_multiplier=1.2, sample_rate=1 / 235, steps=5 * 235)
    spent = sigma_of_gradients(1.0, 4.0) ** -2 + (2 * 4.0) ** -2  # what both noisy numbers give away, in 1/σ²
    return {
        "one record more does not change the divisor": divisor(3, 2) == divisor(4, 2) == divisor(5, 2),
        "gradients and count together cost what σ = 1 costs": abs(spent - 1) < 1e-6,
        "five rounds cost what all their steps cost": abs(cost(5, 235) - whole_run) < 1e-6,
        "δ is below one over the number of records": delta_for(60_000, 469) < 1 / 60_000,
    }


# %%
for claim, holds in museum().items():
    print("holds: " if holds else "FAILS: ", claim)

# %% [markdown]
# <details><summary>What was wrong</summary>
#
# - **The floored divisor.** With a batch size of 2, three records give int(1.5) = 1 and four give 2: one more record halves the update *and its noise*, and the size of the noise can be measured over many weights. Take a number that was fixed before. (Here, `train` divides by $n \cdot q$ and takes $n$ as public.)
# - **Adaptive clipping.** The count is a second release about the same records. Its noise is $\sigma_u$, and one record moves it by ½ (it is centred), so the gradients need more noise than σ (Andrew et al. 2021, Theorem 1).
# - **An engine per round.** Each knows its own steps only. ε is that of all steps ([notebook 06](06_federated_averaging.ipynb)).
# - **δ = 1/#batches.** A mechanism that publishes one of 60,000 records outright meets δ = 1/469. Stay well below 1/n.
#
# ```python
# def divisor(n, batch_size):
#     return batch_size
#
#
# def sigma_of_gradients(sigma, sigma_of_count):
#     return (sigma**-2 - (2 * sigma_of_count) ** -2) ** -0.5
#
#
# def cost(rounds, steps):
#     return dpteach.epsilon(noise_multiplier=1.2, sample_rate=1 / 235, steps=rounds * steps)
#
#
# def delta_for(n, batches):
#     return 0.1 / n
# ```
#
# </details>

# %% [markdown]
# ## 10 · What an audit does not say
#
# **Predict.** The same training, σ = 3.29, but with canaries that are less bright: their gradients are shorter than $C$ = 1, as those of many natural records are. The accountant still says 8. What does the audit say?

# %%
for brightness in (10.0, 0.5, 0.1):
    run = audit.audit_training(train, digits, pixels, noise_multiplier=3.29, brightness=brightness)
    print(f"canaries of brightness {brightness}: ε ≥ {audit.gaussian_fit(run.scores, run.included):.1f}")
assert audit.gaussian_fit(run.scores, run.included) < 0.5

# %% [markdown]
# The canaries changed, and the model's promise did not. A bound is one of *these* canaries and *this* attack: only what lies above a claim says something about the claim. So you need both. The accountant holds for attacks that nobody has thought of, if the code does what it says. The audit looks at what the code does.
#
# And 95 % means one in twenty: audit twenty honest trainers with "two bells", and one of them looks guilty. Before you convict, take more confidence, or another seed.
