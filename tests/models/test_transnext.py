"""TransNeXt with a number of cells that is given, at another size than that of its positions."""

import timm
import torch
from golden import Record, relative_error

import visionzoo


@torch.no_grad()
def test_a_given_number_of_cells_is_the_authors():
    record = Record("transnext/transnext_micro_pooled")
    kwargs = record.meta["factory_kwargs"]
    model = timm.create_model(
        "zoo_transnext_micro",
        img_size=kwargs["img_size"],
        pretrain_size=kwargs["pretrain_size"],
        pool_size=kwargs["fixed_pool_size"],
    )
    visionzoo.load_weights(model.double().eval(), record.state_dict())
    assert relative_error(model(record.image()), record.arrays["logits"]) <= record.tolerance()
