"""The configuration of a run: where its values come from, and what is said about bad ones."""

import json
import sys
from dataclasses import dataclass

import pytest

from aeup.models import DCGAN, MODELS, VAE
from aeup.train import ConfigError, TrainConfig, make_config
from aeup.train.config import convert, field_types, parse_set


def write(path, text):
    path.write_text(text)
    return path


def test_each_source_wins_over_the_one_before(tmp_path):
    assert make_config("dcgan").lr == DCGAN.defaults["lr"] != TrainConfig().lr
    file = write(tmp_path / "run.toml", "[train]\nlr = 0.5\nseed = 3\n[model]\nwidth = 8\nlatent_dim = 9\n")
    config = make_config("dcgan", file, seed=4, options={"width": 16})
    assert (config.model, config.lr, config.seed) == ("dcgan", 0.5, 4)
    assert config.betas == (0.5, 0.999) and config.options == {"width": 16, "latent_dim": 9}
    assert make_config("vae") == TrainConfig(model="vae")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_has_a_usable_default(name):
    config = make_config(name)
    assert config.model == name and not config.options


def test_steps_of_a_file_yield_to_epochs_of_the_command_line(tmp_path):
    file = write(tmp_path / "run.toml", "[train]\nsteps = 50\n")
    assert make_config("vae", file).steps == 50
    config = make_config("vae", file, epochs=3)
    assert (config.epochs, config.steps) == (3, None)


@pytest.mark.parametrize(
    "text, says",
    [
        ("[train]\nepoch = 3\n", r"unknown key 'epoch' in \[train\]; allowed are data, image_size, epochs"),
        ("[model]\nlatent = 3\n", r"unknown key 'latent' in \[model\]; allowed are image_size"),
        ("[train]\noptions = {}\n", "unknown key 'options'"),
        ("[trian]\nlr = 3\n", r"allowed are the tables \[train\] and \[model\], found \['trian'\]"),
        ("lr = 3\n", r"allowed are the tables .* found \['lr'\]"),
        ("[train]\nmodel = 'ae'\n", "is for the model 'ae', not 'vae'"),
        ("[train\n", "not a readable TOML file"),
        ("[train]\nepochs = 2.5\n", "run.toml: epochs must be a whole number, got 2.5"),
        ("[train]\nepochs = true\n", "epochs must be a whole number, got True"),
        ("[train]\nbf16 = 1\n", "bf16 must be true or false or none, got 1"),
        ("[train]\nbetas = [0.1]\n", r"betas must be 2 numbers \(such as 1,2\), got \[0.1\]"),
        ("[model]\nchannels = 'wide'\n", r"channels must be whole numbers \(such as 1,2\), got 'wide'"),
        ("[model]\nupsample = 3\n", "upsample must be a text, got 3"),
        ("[train]\nepochs = 3\nsteps = 9\n", "run.toml: give epochs or steps, not both: got epochs=3 and steps=9"),
        ("[train]\nlr = -1\n", "lr must be finite and above 0, got -1"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        make_config("vae", write(tmp_path / "run.toml", text))


def test_a_stored_json_is_read_and_a_bad_one_refused(tmp_path):
    stored = {"train": {"model": "vae", "lr": 0.1, "steps": None}, "model": {"norm": None}, "environment": {"x": 1}}
    config = make_config("vae", write(tmp_path / "config.json", json.dumps(stored)))
    assert config.lr == 0.1 and config.options == {"norm": None}
    for text in ("[1]", "{", '"train"'):
        with pytest.raises(ConfigError, match="config.json: "):
            make_config("vae", write(tmp_path / "config.json", text))
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="run.toml: not a readable TOML file"):
        make_config("vae", tmp_path / "run.toml")


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="Python has tomllib")
def test_toml_on_python_310(tmp_path):
    assert make_config("vae", write(tmp_path / "run.toml", "[train]\nseed = 3\n")).seed == 3


@dataclass
class Every:
    flag: bool = False
    count: int = 1
    rate: float = 0.5
    word: str = "a"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, int] = (1, 2)
    maybe: float | None = None
    either: int | tuple[int, int] = 3


@pytest.mark.parametrize(
    "key, value, want",
    [
        ("flag", "true", True),
        ("flag", "No", False),
        ("flag", True, True),
        ("count", "7", 7),
        ("rate", "1e-3", 1e-3),
        ("rate", 2, 2.0),
        ("word", "none", "none"),
        ("sizes", "4,5,6", (4, 5, 6)),
        ("sizes", [4], (4,)),
        ("sizes", "", ()),
        ("pair", "(3, 4)", (3, 4)),
        ("maybe", "none", None),
        ("maybe", "3", 3.0),
        ("maybe", None, None),
        ("either", "3", 3),
        ("either", "3,4", (3, 4)),
        ("either", [3, 4], (3, 4)),
    ],
)
def test_values_take_the_type_of_their_field(key, value, want):
    got = convert(Every, key, value)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize(
    "key, value",
    [("flag", "maybe"), ("flag", 1), ("count", "1.5"), ("count", True), ("rate", "fast"), ("rate", None), ("word", 3)]
    + [("sizes", "a"), ("sizes", 3), ("pair", "1,2,3"), ("maybe", "x"), ("either", "1,2,3")],
)
def test_values_of_a_wrong_type_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key} must be .*, got "):
        convert(Every, key, value)


def test_set_names_fields_of_the_run_and_of_the_model():
    given = parse_set("vae", ["latent_dim=3", "seed=5", "upsample=bilinear", "image_size=9,8"])
    assert given == {"options": {"latent_dim": 3, "upsample": "bilinear"}, "seed": 5, "image_size": (9, 8)}
    for model in MODELS.values():  # one name only means two things: the images' size, and what follows from it
        assert field_types(model.Config).keys() & field_types(TrainConfig).keys() == {"image_size"}
    for pair in ("model=ae", "options=x", "nothing=1"):
        with pytest.raises(ConfigError, match="vae has no option"):
            parse_set("vae", [pair])
    assert "latent_dim" in vars(VAE.Config())


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(model="gan"), "model must be one of .*'gan'"),
        (dict(epochs=0), "epochs must be at least 1, got 0"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(workers=-1), "workers must be at least 0"),
        (dict(lr=float("nan")), "lr must be finite"),
        (dict(clip=0.0), "clip must be finite and above 0"),
        (dict(ema=1.0), "ema must be between 0 and 1"),
        (dict(betas=(0.9, 1.0)), "betas must be two numbers"),
        (dict(schedule="step"), "schedule must be one of"),
        (dict(memory=float("nan")), "memory must be at least 0"),
        (dict(seed=-1), r"seed must be at least 0 and below 2\*\*63, got -1"),
        (dict(seed=2**63), "seed must be at least 0"),
        (dict(image_size=(3,)), "image_size must be two sizes"),
    ],
)
def test_config_refuses(change, says):
    with pytest.raises(ValueError, match=says):
        TrainConfig(**change)


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(lr=1.0, warmup=10)
    rates = [config.lr_at(i, 100) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] and 0 < rates[99] < 0.001
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    constant = TrainConfig(lr=1.0, warmup=4, schedule="constant")
    assert [constant.lr_at(i, 9) for i in range(9)] == [0.25, 0.5, 0.75] + [1.0] * 6
    assert TrainConfig(lr=1.0, warmup=0, schedule="constant").lr_at(0, 9) == 1.0
