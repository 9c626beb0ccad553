"""Notebook 07: what the server may report, what ε must cover after a crash, the ε of a whole client."""

from dpteach.accounting import epsilon
from dpteach.exercises.core import Wrong, coding, value

# 7.1: what the server may report


def report(replies):
    """What the server reports: each client's ε, by its name."""
    return {reply["name"]: reply["epsilon"] for reply in replies}


def _weighted_mean(replies):
    total = sum(reply["records"] for reply in replies)
    return sum(reply["records"] / total * reply["epsilon"] for reply in replies)


def _plain_mean(replies):
    return sum(reply["epsilon"] for reply in replies) / len(replies)


def _total(replies):
    return sum(reply["epsilon"] for reply in replies)


def _largest(replies):
    return max(reply["epsilon"] for reply in replies)


def _without_names(replies):
    return [reply["epsilon"] for reply in replies]


def _mean_under_each_name(replies):
    return {reply["name"]: _plain_mean(replies) for reply in replies}


def _with_the_loss(replies):
    return {reply["name"]: (reply["epsilon"], reply["loss"]) for reply in replies}


def _replies(*rows):
    return lambda: ([dict(zip(("name", "records", "epsilon", "loss"), row)) for row in rows],)


# 7.2: what ε must cover after a crash

STEPS = 16  # a round of the notebook's nodes: 2,000 records, batches of 128

# 7.3: the ε of a whole client


def client_level_epsilon(noise_multiplier, clients, sampled, rounds, target_delta):
    """ε of one client: the server samples clients, clips each update, and adds noise to the sum, in each round."""
    return epsilon(noise_multiplier=noise_multiplier, sample_rate=sampled / clients, steps=rounds, target_delta=target_delta,
                   accountant="rdp")


def _nobody_is_left_out(noise_multiplier, clients, sampled, rounds, target_delta):
    return client_level_epsilon(noise_multiplier, clients, clients, rounds, target_delta)


def _one_round(noise_multiplier, clients, sampled, rounds, target_delta):
    return client_level_epsilon(noise_multiplier, clients, sampled, 1, target_delta)


def _rounds_times_one(noise_multiplier, clients, sampled, rounds, target_delta):
    return rounds * _one_round(noise_multiplier, clients, sampled, rounds, target_delta)


def _a_step_for_each_client(noise_multiplier, clients, sampled, rounds, target_delta):
    return client_level_epsilon(noise_multiplier, clients, sampled, rounds * sampled, target_delta)


def _noise_of_the_mean(noise_multiplier, clients, sampled, rounds, target_delta):
    return client_level_epsilon(noise_multiplier / sampled, clients, sampled, rounds, target_delta)


def _one_client_a_round(noise_multiplier, clients, sampled, rounds, target_delta):
    return client_level_epsilon(noise_multiplier, clients, 1, rounds, target_delta)


EXERCISES = [
    coding(
        "7.1",
        hint="Whom does alice's ε protect, and whom bob's? Then: what does a reader of the server's log need to see?",
        reference=report,
        inputs=[_replies(("alice", 2000, 1.17, 0.9), ("bob", 2000, 2.24, 1.1)),
                _replies(("clinic", 300, 3.45, 2.0), ("hospital", 50_000, 0.6, 0.4), ("lab", 7000, 1.5, 0.7))],
        wrong=[
            Wrong(_weighted_mean, "this is the weighted mean, and it is what Flower does to every metric if you don't say otherwise. It "
                                  "tells bob's patients a smaller ε than theirs. Keep one for each client."),
            Wrong(_plain_mean, "a mean of two promises is a promise to nobody: one of the two is always larger. Keep one for each client."),
            Wrong(_total, "the clients have no record in common, so nobody's record has paid the sum. Keep one for each client."),
            Wrong(_largest, "the largest is true for every person, and the best *single* number. But it hides what the others have left to "
                            "spend. Keep one for each client."),
            Wrong(_without_names, "numbers without names: the answers arrive in another order in each round. Return a dict by name."),
            Wrong(_mean_under_each_name, "the names are there, but each has the same mean. Give every client its own ε."),
            Wrong(_with_the_loss, "the loss is computed from private records, without noise, and ε does not cover it. Report ε alone."),
        ],
        praise="one number a client, by name. Whoever wants one number for anybody can take the largest of them.",
    ),
    value(
        "7.2",
        hint="A record pays when it is read, not when the result arrives. In how many rounds were alice's records read?",
        answer=5 * STEPS,
        wrong=[
            Wrong(4 * STEPS, "you left out the round that was killed. Its steps have read the records, and nobody can prove that nothing of "
                             "it was sent. The ledger was charged before it began: it counts."),
            Wrong(2 * STEPS, "this is what `Context.state` says after the restart: it has forgotten everything before. The records have not."),
            Wrong(3 * STEPS, "this is up to the crash. The two rounds after it read the same records again."),
            Wrong(STEPS, "this is one round. ε must cover all that read these records."),
            Wrong(5, "these are rounds. ε counts *steps*: each round has 16."),
            Wrong(4, "these are rounds, and one is missing. ε counts *steps*: each round has 16."),
        ],
        praise="5 rounds of 16 steps: two before, the killed one, and two after. The ledger has counted all of them.",
        solution="**80**: 5 · 16. The killed round was charged before it began. It may have been used only in part, so this can be too much by "
                 "a few steps. It can't be too little.",
    ),
    coding(
        "7.3",
        hint="It is notebook 04's formula in other words. What is the \"record\" now, and what is one \"step\"? Use `dpteach.epsilon(…, "
             "accountant=\"rdp\")`.",
        reference=client_level_epsilon,
        inputs=[lambda: (1.0, 1000, 20, 10, 1e-5), lambda: (0.8, 200, 50, 30, 1e-4)],
        wrong=[
            Wrong(_nobody_is_left_out, "with q = 1 every client would be in every round. The server draws some of them: q = sampled / clients."),
            Wrong(_one_round, "this is the ε of one round. All rounds see the client again."),
            Wrong(_rounds_times_one, "ε does not grow in proportion to the rounds. Give the number of rounds as `steps`, and let the accountant "
                                     "compose them."),
            Wrong(_a_step_for_each_client, "noise is added once a round, to the sum of all updates. One round is one step."),
            Wrong(_noise_of_the_mean, "you divided σ by the number of clients. σ is already the noise on the *sum*, in units of the clipping "
                                      "norm. Dividing sum and noise together afterwards changes nothing."),
            Wrong(_one_client_a_round, "q is the probability that *one certain* client takes part: sampled / clients, not 1 / clients."),
        ],
        praise="the same accountant: a client in the place of a record, a round in the place of a step. That is why many clients, and few of "
               "them in each round, make client-level privacy cheap.",
    ),
]
