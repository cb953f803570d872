"""Settings are strict: unknown ones are named with the nearest known one, wrong types with the setting."""

from pathlib import Path

import pytest

from medclr.config import (
    FinetuneConfig,
    MonitorConfig,
    OptimConfig,
    PretrainConfig,
    ViewsConfig,
    dataclass_options,
    differences,
    option_parser,
    parse,
    read_yaml,
    to_plain,
    to_yaml,
)
from medclr.errors import MedclrError
from medclr.pretrain import pretrain


def settings(*words: str):
    def add(parser):
        dataclass_options(parser, PretrainConfig)

    return parse(option_parser("test", "", add, config=True), words)


def test_later_settings_win_and_groups_become_dataclasses(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 7\nviews:\n  size_px: 64\n  crop_area: [0.1, 0.9]\n")
    read = settings("--config", str(file), "--views.size-px", "32", "--optim.lr=0.5")  # a dash or an underscore
    assert (read.epochs, read.views.size_px, read.views.crop_area, read.optim.lr) == (7, 32, (0.1, 0.9), 0.5)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--optim.lrr", "3"], ["--optim.lrr", "'--optim.lr'"]),
        (["--epochs", "many"], ["epochs", "int", "many"]),
        (["--encoder.name", "resnet19"], ["encoder.name", "resnet19"]),
        (["--views.crop_area", "0.5"], ["crop_area"]),
        (["--views.crop_area", "[0.9,0.1]"], ["views.crop_area", "smallest"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--optim.name", "adm"], ["optim.name", "one of 'lars', 'adamw', 'sgd'", "adm"]),
        (["--views.rotation_deg", "far"], ["views.rotation_deg", "Expected a float or null", "far"]),
    ],
)
def test_a_wrong_option_is_one_sentence_that_names_it(words, named):
    with pytest.raises(MedclrError) as error:
        settings(*words)
    assert "\n" not in str(error.value)
    for word in named:
        assert word in str(error.value)


def test_an_option_of_that_name_may_be_something_else(tmp_path):
    """``medclr compare --config`` names a file of another shape, which the verb reads itself."""
    file = tmp_path / "a.yaml"
    file.write_text("inits: {}\n")
    parser = option_parser("test", "", lambda parser: parser.add_argument("--config", type=Path))
    assert parse(parser, ["--config", str(file)]).config == file


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optim:\n  lrr: 3\n", ["optim.lrr", "'optim.lr'"]),
        ("epoch: 3\n", ["'epoch'", "'epochs'"]),
        ("- 1\n", ["name: value"]),
        ("a: [\n", ["YAML"]),
        ("epochs: x\n", ["epochs", "x"]),
        ("views: 5\n", ["'views' is a group", "views.blur"]),
        ("views:\n", ["'views' is a group"]),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_it(tmp_path, text, named):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(MedclrError) as error:
        settings("--config", str(file))
    assert "\n" not in str(error.value)
    for word in named:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "schedule",
    [
        "[]",
        "[[0.1,48],[0.5,64]]",
        "[[0,48],[0.5,60]]",
        "[[0,4],[0.5,64]]",
        "[[0,48],[0.5,96],[0.7,64]]",
        "[[0,48],[0.6,50],[0.5,64]]",
        "[[0,48],[0.5,50],[0.5,64]]",
        "[[0,48],[1,64]]",
        "48",
        "[[0,48.5],[0.5,64]]",
    ],
)
def test_a_schedule_of_sizes_that_cannot_be_is_refused(schedule):
    with pytest.raises(MedclrError, match=r"views\.size_px_schedule") as error:
        settings("--views.size_px", "64", "--views.size_px_schedule", schedule)
    assert "\n" not in str(error.value)


def test_the_size_of_views_follows_its_schedule():
    views = settings("--views.size_px", "64", "--views.size_px_schedule", "[[0,32],[0.3,48],[0.5,64]]").views
    sizes = [views.at(epoch / 10).size_px for epoch in range(10)]
    assert sizes == [32] * 3 + [48] * 2 + [64] * 5
    assert views.at(0) == ViewsConfig(size_px=32)
    assert ViewsConfig(size_px=20).at(0.9) == ViewsConfig(size_px=20)
    with pytest.raises(MedclrError, match=r"views\.size_px_schedule must be null: it is for pretraining"):
        FinetuneConfig(views=views)


def test_all_problems_of_a_group_are_named_at_once():
    with pytest.raises(MedclrError, match=r"seed.*epochs.*batch.*optim.momentum.*monitor.sample"):
        PretrainConfig(seed=-1, epochs=0, batch=1, optim=OptimConfig(momentum=1), monitor=MonitorConfig(sample=1))


@pytest.mark.parametrize(("name", "peak"), [("lars", 1.2), ("adamw", 1e-3), ("sgd", 0.05)])
def test_each_optimizer_has_a_learning_rate_of_its_own(name, peak):
    optim = settings("--optim.name", name).optim
    assert optim.base_lr * 256**0.5 == pytest.approx(peak)
    assert settings("--optim.name", name, "--optim.lr", "0.2").optim.base_lr == 0.2
    with pytest.raises(MedclrError, match=r"optim\.lr_scaling must be sqrt where optim\.lr is null"):
        PretrainConfig(optim=OptimConfig(name, lr_scaling="linear"))
    assert PretrainConfig(optim=OptimConfig(name, lr=0.3, lr_scaling="linear")).optim.base_lr == 0.3


def test_resolved_settings_survive_the_round_trip(tmp_path):
    plain = to_plain(PretrainConfig(epochs=3))
    (tmp_path / "c.yaml").write_text(to_yaml(plain))
    assert read_yaml(tmp_path / "c.yaml") == plain
    again = settings("--config", str(tmp_path / "c.yaml"))
    assert again.epochs == 3
    changed = to_plain(PretrainConfig(epochs=4))
    assert list(differences(plain, changed)) == ["epochs"]


CONFIGS = Path(__file__).parents[1] / "configs" / "pretrain"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_is_complete_and_valid(path):
    from medclr.pretrain import read_settings

    resolved = read_settings(["--config", str(path), "--store", "s", "--out", "o"]).resolved
    assert not differences(read_yaml(path), resolved)  # complete: it leaves nothing to a default


def test_a_mistyped_setting_of_the_method_of_a_file_is_not_taken_for_another_method(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method: simclr\nsimclr:\n  temprature: 0.2\n")
    with pytest.raises(MedclrError, match=r"a\.yaml: unknown setting 'simclr\.temprature'.*'simclr\.temperature'"):
        pretrain(tmp_path / "store", tmp_path / "run", config=tmp_path / "a.yaml")


def test_a_file_for_one_method_with_another_asked_for_says_so(tmp_path: Path) -> None:
    file = Path(__file__).parent.parent / "configs" / "pretrain" / "mr.yaml"
    with pytest.raises(MedclrError, match=r"mr\.yaml: its settings are those of method simclr; take the file of the o"):
        pretrain(tmp_path / "store", tmp_path / "run", config=file, settings={"method": "dense"})
    assert not (tmp_path / "run").exists()
