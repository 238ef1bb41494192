"""Pictures from anywhere, seen as the dataset's are, and what a network makes of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from lenet_sweep.datasets.catalog import DATASETS
from lenet_sweep.errors import ConfigError, DataError
from lenet_sweep.inspection import activations, images, plots, predict
from lenet_sweep.runs.run import run
from lenet_sweep.runs.spec import RunSpec
from lenet_sweep.tracking.folder_store import FolderStore
from lenet_sweep.training import model
from lenet_sweep.training.data import load_data
from lenet_sweep.training.randomness import generator

UNTRACKED = FolderStore()


@pytest.fixture(scope="module")
def examples(make_config):
    return load_data(make_config("data=fashion_mnist_mini").data, 0, torch.device("cpu")).test


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory, put_database):
    """A folder in which a short run was trained and tracked."""
    here = tmp_path_factory.mktemp("finished")
    put_database(here)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        config = make_config(
            "data=fashion_mnist_mini", "epochs=4", "model=lenet_relu_max", "lr=0.3", "batch_size=32"
        )
        run(RunSpec(config, here / "run"))
    return here


@pytest.fixture
def trained(finished, tmp_path, monkeypatch):
    """A copy of it; the run's folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def image_of(tensor_CHW):
    return Image.fromarray(tensor_CHW[0].numpy())


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif"])
def test_a_picture_of_the_dataset_is_seen_as_it_is(examples, tmp_path, suffix):
    for i in range(5):
        image_of(examples.images_NCHW[i]).save(tmp_path / f"x.{suffix}")
        assert torch.equal(images.read(tmp_path / f"x.{suffix}", "fashion_mnist"), examples.images_NCHW[i])


def test_dark_on_light_is_inverted(examples, tmp_path):
    ImageOps.invert(image_of(examples.images_NCHW[3])).save(tmp_path / "x.png")
    assert torch.equal(images.read(tmp_path / "x.png", "fashion_mnist"), examples.images_NCHW[3])


@pytest.mark.parametrize("mode", ["RGB", "P", "I;16"])
def test_enlarged_shifted_and_inverted_picture_is_nearly_the_original(examples, tmp_path, mode):
    for i in range(5):
        original = image_of(examples.images_NCHW[i])
        large = Image.new("L", (900, 700))
        large.paste(original.resize((448, 448), Image.Resampling.BICUBIC), (333, 120))
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(large).astype(np.uint16) << 8)
        else:
            picture = ImageOps.invert(large).convert(mode)
        picture.save(tmp_path / "x.png")
        seen = images.read(tmp_path / "x.png", "fashion_mnist")[0].numpy().astype(float)
        expected = np.asarray(original).astype(float)
        assert np.corrcoef(seen.ravel(), expected.ravel())[0, 1] > 0.85


def test_light_and_dark_objects_on_nothing_are_both_light_on_dark(tmp_path):
    for name, colour in (("light", 230), ("dark", 30)):
        picture = Image.new("RGBA", (200, 200), (128, 128, 128, 0))
        picture.paste((colour, colour, colour, 255), (50, 20, 110, 180))
        picture.save(tmp_path / f"{name}.png")
    light, dark = (images.read(tmp_path / f"{name}.png", "fashion_mnist") for name in ("light", "dark"))
    assert torch.equal(light, dark)
    assert light[0, 14, 14] == 255
    assert light[0, 14, 0] == 0


def test_digits_are_centred_by_mass_in_a_box_of_twenty(tmp_path):
    digit = Image.new("L", (300, 300), 255)
    digit.paste(0, (40, 30, 60, 230))  # the stem of an L, far from the middle
    digit.paste(0, (60, 200, 140, 230))
    digit.save(tmp_path / "x.png")
    seen = images.read(tmp_path / "x.png", "mnist")[0].numpy().astype(float)
    rows, columns = np.flatnonzero(seen.max(1) > 25), np.flatnonzero(seen.max(0) > 25)
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    centre = [np.average(np.arange(28), weights=seen.sum(axis)) for axis in (1, 0)]
    assert centre == pytest.approx([13.5, 13.5], abs=0.6)


@pytest.mark.parametrize("kind", ["text", "cut", "blank", "tiny", "folder", "missing", "huge", "eps"])
def test_what_is_no_picture_is_refused_in_one_line(command, trained, examples, tmp_path, kind):
    path = tmp_path / "x.png"
    match kind:
        case "text":
            path.write_text("<svg/>")
        case "cut":
            image_of(examples.images_NCHW[0]).resize((300, 300)).save(path)
            path.write_bytes(path.read_bytes()[:300])
        case "blank":
            Image.new("L", (100, 100), 255).save(path)
        case "tiny":
            Image.new("L", (1, 1)).save(path)
        case "folder":
            path.mkdir()
        case "huge":
            Image.new("1", (20_000, 20_000)).save(path)
        case "eps":  # Pillow would hand it to Ghostscript
            path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    done = command("predict", str(trained), str(path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: ")
    assert len(done.stderr.splitlines()) == 1


def test_predict_tells_the_networks_probabilities(command, trained, examples, tmp_path):
    image_of(examples.images_NCHW[7]).save("boot.png")
    done = command("predict", str(trained), "boot.png", "--json", "p.json", "--activations", "acts.png")
    assert done.returncode == 0, done.stderr
    network = predict.load(str(trained), UNTRACKED).network
    logits = network(examples.images_NCHW[7:8].float() / 255)[0]
    (told,) = json.loads((tmp_path / "p.json").read_text())
    names = DATASETS["fashion_mnist"].classes
    expected = dict(zip(names, (logits.exp() / logits.exp().sum()).tolist(), strict=True))
    assert told["probabilities"] == pytest.approx(expected, abs=1e-5)
    best = max(expected, key=expected.get)
    assert f"{best} " in done.stdout
    assert f"{expected[best]:.3f}" in done.stdout
    with Image.open("acts.png") as picture:
        assert picture.width > 22 * 56  # the input, six maps and sixteen


def test_run_is_found_by_its_id_in_the_store_too(command, trained, examples):
    image_of(examples.images_NCHW[7]).save("boot.png")
    run_id = json.loads((trained / "tracking.json").read_text())["run_id"]
    by_folder = command("predict", str(trained), "boot.png").stdout
    assert command("predict", run_id[:10], "boot.png").stdout == by_folder


def test_weights_of_another_network_or_none_are_refused(trained, tmp_path):
    weights = trained / "model" / "weights.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, weights)
    with pytest.raises(DataError, match="another network"):
        predict.load(str(trained), UNTRACKED)
    weights.write_bytes(b"\x80\x04pickle")
    with pytest.raises(DataError, match="damaged"):
        predict.load(str(trained), UNTRACKED)
    weights.unlink()
    with pytest.raises(ConfigError, match="no weights"):
        predict.load(str(trained), UNTRACKED)


def test_activations_are_what_every_layer_puts_out(make_config, examples):
    network = model.build(make_config("model.channels=[4,8]").model, generator(0, "init"))
    seen = {}
    for name, layer in network.named_children():
        layer.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out.detach()))
    images = examples.images_NCHW[:5]
    network(images.float().div(255))
    found = activations.activations(network, images)
    assert list(found) == list(seen)
    assert all(torch.equal(found[name], seen[name]) for name in seen)


def test_surest_mistakes_are_those_of_the_highest_wrong_probability(make_config, examples):
    network = model.build(make_config().model, generator(1, "init"))
    with torch.no_grad():
        all_NK = network(examples.images_NCHW.float().div(255)).softmax(1)
    predicted = all_NK.argmax(1)
    wrong = sorted(
        (float(p.max()) for p, k, y in zip(all_NK, predicted, examples.labels_N, strict=True) if k != y)
    )
    found = activations.confident_errors(network, examples, predicted, 6)
    assert [m.probability for m in found] == pytest.approx(wrong[::-1][:6], abs=1e-6)
    assert all(m.label != m.predicted for m in found)
    assert activations.confident_errors(network, examples, examples.labels_N, 6) == []


def test_out_of_distribution_images_are_compared_layer_by_layer(command, trained, examples, data_root):
    done = command("predict", str(trained), "--ood", "ood.png", f"data.root={data_root}")
    assert done.returncode == 0, done.stderr
    network = predict.load(str(trained), UNTRACKED).network
    for kind, shown in (("test images", examples.images_NCHW), ("inverted", 255 - examples.images_NCHW)):
        (row,) = [line for line in done.stdout.splitlines() if f"│ {kind} " in line]
        outputs = activations.activations(network, shown)
        means = [float(outputs[f"act{i}"].mean()) for i in range(1, 5)]
        surest = float(outputs["linear3"].softmax(1).amax(1).mean())
        assert [float(cell) for cell in row.split("│")[2:-1]] == pytest.approx([*means, surest], abs=6e-4)
    with Image.open("ood.png") as picture:
        assert picture.width > picture.height


def test_command_without_pictures_or_with_strange_ones_is_refused(command, trained):
    assert command("predict", str(trained)).returncode == 2
    done = command("predict", str(trained), "--ood", "o.png", "--json", "x")
    assert "name at least one image file" in done.stderr
    assert command("predict", "no-such-run", "x.png").returncode == 2


def test_run_leaves_its_pictures_and_the_accuracy_of_every_class(trained, examples):
    network = predict.load(str(trained), UNTRACKED).network
    predicted = network(examples.images_NCHW.float().div(255)).argmax(1)
    told = json.loads((trained / "per_class.json").read_text())
    for k, accuracy in enumerate(told.values()):
        of_class = examples.labels_N == k
        assert accuracy == pytest.approx(float((predicted[of_class] == k).float().mean()), abs=0.021)
    names = {path.name for path in (trained / "plots").iterdir()}
    assert names == {"curves.png", "confusion_matrix.png", "filters.png", "activations.png", "mistakes.png"}


def test_filters_are_drawn_blue_below_and_orange_above_nought(tmp_path):
    weight = torch.tensor([[[[1.0, -1.0], [0.0, 0.5]]]])
    plots.filters([("conv1", weight)], tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        colours = {colour for _, colour in picture.getcolors(1000)}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (255, 255, 255)} <= colours


def test_help_names_what_can_be_given(command):
    done = command("predict", "--help")
    assert done.returncode == 0
    assert "--activations" in done.stdout


def test_images_of_the_other_dataset_are_looked_at_if_they_are_there(trained, examples, monkeypatch):
    network = predict.load(str(trained), UNTRACKED)
    asked = []

    def test_images(name, root):
        asked.append(name)
        return examples.images_NCHW[:5]

    monkeypatch.setattr(predict, "_test_images", test_images)
    monkeypatch.setattr(predict.download, "is_downloaded", lambda name, root: name == "mnist")
    kinds = [stats.kind for stats in predict.activation_stats(network, trained, limit=3)]
    assert kinds[-1] == "digits"
    assert asked == ["fashion_mnist_mini", "mnist"]
    monkeypatch.setattr(predict.download, "is_downloaded", lambda name, root: False)
    assert [stats.kind for stats in predict.activation_stats(network, trained)] == kinds[:-1]


@pytest.mark.parametrize(("channels", "shown"), [([4], ["act1"]), ([4, 5, 6], ["act1", "act2"])])
def test_feature_maps_are_those_of_the_first_two_convolutions(make_config, examples, channels, shown):
    config = make_config(f"model.channels={channels}", "model.kernel_size=3", "model.hidden=[]")
    network = model.build(config.model, generator(0, "init"))
    trained = predict.TrainedModel("a run", config, network)
    predictions = [predict.Prediction(None, examples.images_NCHW[i], ()) for i in range(3)]
    pictures, layers = predict.feature_maps(trained, predictions)
    assert torch.equal(pictures, examples.images_NCHW[:3, 0])
    assert [name for name, _ in layers] == shown
    assert [tuple(maps.shape[:2]) for _, maps in layers] == [(3, n) for n in channels[:2]]
