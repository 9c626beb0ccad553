import pytest
import torch
from loops import in_one_test
from torch import nn

from dpteach import models

MAKERS = {
    "mlp": (lambda **kwargs: models.mlp(2, 7, 3, **kwargs), (2,), 3),
    "mlp for images": (lambda **kwargs: models.mlp(784, 9, 10, **kwargs), (1, 28, 28), 10),
    "cnn": (models.cnn, (1, 28, 28), 10),
}
every_maker = pytest.mark.parametrize("make, shape, classes", MAKERS.values(), ids=MAKERS)


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@every_maker
def test_a_model_scores_every_class_of_every_record(make, shape, classes):
    assert make()(torch.randn(5, *shape)).shape == (5, classes)


@every_maker
def test_a_record_s_scores_do_not_depend_on_its_batch(make, shape, classes):
    model, X = make(), torch.randn(5, *shape)
    assert torch.allclose(model(X)[2:3], model(X[2:3]), atol=1e-5)


@every_maker
def test_a_start_repeats_with_its_seed_only_and_draws_nothing_from_the_global_generator(make, shape, classes):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = weights(make(seed=5))
    torch.manual_seed(2)
    assert torch.equal(one, weights(make(seed=5)))
    assert not torch.equal(one, weights(make(seed=6)))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@every_maker
def test_a_start_spreads_as_pytorch_s_own_does(make, shape, classes):
    for layer in make().modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            bound = layer.weight[0].numel() ** -0.5
            assert 0.8 * bound < float(layer.weight.detach().abs().max()) <= bound
            assert 0 < float(layer.bias.detach().abs().max()) <= bound


@every_maker
def test_the_activation_is_the_one_asked_for(make, shape, classes):
    def kinds(activation):
        return {type(layer) for layer in make(activation=activation)} & {nn.ReLU, nn.Tanh}

    assert kinds("relu") == {nn.ReLU} and kinds("tanh") == {nn.Tanh}


def test_the_cnn_has_the_26010_parameters_of_opacus_example():
    assert sum(p.numel() for p in models.cnn().parameters()) == 26_010


@in_one_test(
    "call, name, value",
    [
        (lambda: models.mlp(inputs=0), "inputs", 0),
        (lambda: models.mlp(hidden=2.5), "hidden", 2.5),
        (lambda: models.mlp(outputs=True), "outputs", True),
        (lambda: models.mlp(activation="gelu"), "activation", "gelu"),
        (lambda: models.cnn(activation=None), "activation", None),
        (lambda: models.cnn(seed=-1), "seed", -1),
    ],
)
def test_bad_arguments_are_refused(refuses, call, name, value):
    with refuses(name, value):
        call()
