"""Networks of one's own: built by a function, they are pruned, counted, run, kept and exported like those of the suite."""

import pytest
import torch

from common.core import networks
from common.core.compute import Compute
from common.core.experiment import CellSettings
from common.core.models import build
from common.core.models.plain import plain
from common.core.pruning import channels
from common.core.pruning.counting import cost
from common.core.pruning.masks import KeepMasked, Masks
from common.core.recipe import Recipe
from common.core.run import Cell, Context, Job, Outcome
from common.settings import DatasetSettings, ExecutionSettings, SettingsError
from common.stage.store import Store, code_files
from common.stage.worker import Networks, perform

SEPARABLE, DESCRIBED = "tutorials/networks.py:separable", "tutorials/networks.py:described"
DIGITS = (1, 8, 8)


def values(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def own(name=SEPARABLE, **options):
    return build(name, classes=10, image_shape=DIGITS, **options)


def test_the_seed_decides_what_the_function_draws_and_nothing_else_is_touched():
    before = torch.get_rng_state()
    assert torch.equal(values(own(seed=3)), values(own(seed=3)))
    assert not torch.equal(values(own(seed=3)), values(own(seed=4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_initialisation_that_is_asked_for_takes_the_place_of_the_functions():
    model = own(seed=3, conv_init="fan_in", norm_scale=0.5)
    assert torch.equal(model.network[6].weight, own(seed=3).network[6].weight)
    assert not torch.equal(model.network[0][0].weight, own(seed=3).network[0][0].weight)
    assert (model.network[0][1].weight == 0.5).all()


def test_it_is_counted_masked_and_exported():
    model, images = own(width=8), torch.randn(4, *DIGITS)
    masks = Masks.dense(model)
    masks.prune(model, 0.5)
    masks.apply(model)
    found = cost(model, DIGITS)
    assert found["macs"] == 9 * 8 * 64 * 2 + 8 * 16 * 16 + 2 * 16 * 4 + 160
    assert found["nonzero_weights"] == found["weights"] / 2
    torch.testing.assert_close(plain(model)(images), model.eval()(images), rtol=1e-6, atol=1e-6)


def test_channels_leave_where_the_module_describes_them():
    model = own(DESCRIBED)
    assert model.widths == [12, 8]
    channels.remove(model, {"network.first": [1, 2, 3]})
    assert model.widths == [3, 8] and model(torch.randn(2, *DIGITS)).shape == (2, 10)
    with pytest.raises(ValueError, match="Sequential describes no removable channels: it needs a method"):
        channels.groups_of(own())


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("tutorials/nowhere.py:net", {}, "there is no file tutorials/nowhere.py in the project"),
        ("tutorials/networks.py:nothing", {}, "tutorials/networks.py has no function nothing"),
        ("../networks.py:net", {}, "is FILE.py:FUNCTION"),
        (SEPARABLE, {"widht": 8}, "option 'widht'.*did you mean 'width"),
        (SEPARABLE, {"width": "8"}, "option 'width' of .* = '8': should be a valid integer"),
        (SEPARABLE, {"width": -1}, "networks.py:separable': .*Error: "),
        (SEPARABLE, {"widths": [4]}, "has no other widths than its own"),
    ],
)
def test_what_cannot_be_built_is_named(name, options, message):
    with pytest.raises(SettingsError, match=message):
        own(name, **options)


def test_settings_name_it_and_its_options():
    CellSettings(architecture=SEPARABLE, options={"width": 8})
    with pytest.raises(ValueError, match="has no function other"):
        CellSettings(architecture="tutorials/networks.py:other")
    with pytest.raises(ValueError, match="option 'width'"):
        CellSettings(architecture=SEPARABLE, options={"width": 8.5})


class Pruned(Job):
    """Masks half of the weights in training and, for a network that describes them, removes channels."""

    training: Recipe

    def execute(self, context: Context) -> Outcome:
        model = context.network()
        masks = Masks.dense(model)
        masks.prune(model, 0.5)
        masks.apply(model)
        trainer = self.training.trainer(context, model, KeepMasked(masks))
        trainer.fit(self.training.rates(len(trainer.batches)))
        if model.widths:
            keep = {group.name: [0, 5, 7] for group in model.channel_groups()}
            channels.remove(model, keep, trainer.optimizer)
        return context.measured(trainer)


@pytest.mark.parametrize("name", [SEPARABLE, DESCRIBED, "digits_cnn"])
def test_a_run_leaves_the_network_that_it_reports_and_what_that_takes(tmp_path, name):
    data = DatasetSettings(train=64, validation=33, test=100)
    recipe = Recipe(epochs=1, batch_size=32, learning_rate=0.05, schedule="constant")
    job = Pruned(
        variant="pruned", seed=1, cell=Cell(architecture=name, data=data), target=0.5, training=recipe
    )
    store = Store(tmp_path, ExecutionSettings(device="cpu", precision="float32"))
    wanted = frozenset([job.run.settings_hash])
    execution = ExecutionSettings(device="cpu", precision="float32")
    plainly = perform(job.run, store, execution, False)
    entry = perform(job.run, store, execution, False, wanted=Networks(wanted, wanted))
    assert entry.record == plainly.record and plainly.measured is None
    model, about = networks.unpacked(store.network_file(job.run).read_bytes())
    assert about["variant"] == "pruned" and about["image_shape"] == list(DIGITS)
    context = Context(job.run, Compute.choose("cpu", "float32"), ())
    trainer = recipe.trainer(context, model)
    assert context.scores(trainer, context.data)["test_loss"] == entry.record.metrics["test_loss"]
    assert entry.measured["milliseconds"] > 0 and entry.measured["bytes"] <= entry.measured["dense_bytes"]
    assert entry.measured["compressed_bytes"] < entry.measured["dense_compressed_bytes"]


def test_its_file_is_part_of_the_code_of_its_runs():
    cell = Cell(architecture=SEPARABLE, data=DatasetSettings())
    job = Pruned(
        variant="pruned", seed=1, cell=cell, training=Recipe(epochs=1, batch_size=32, learning_rate=0.1)
    )
    files = code_files(job.paper, job.run.code)
    assert "tutorials/networks.py" in map(str, files)
