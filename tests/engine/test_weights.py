from collections.abc import Callable
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cps_ray.engine.deeplab import build_deeplab
from cps_ray.engine.weights import load_encoder
from cps_ray.errors import CheckpointError

TINY = "tu-test_efficientnet"
State = dict[str, Tensor]

# How timm's feature extractors call `stages.0`: the same, `stages_0`, `model.stages.0`, `body.stages.0`. The last has a
# loader of its own in smp.
UNIVERSAL = [TINY, "tu-test_convnext", "tu-cspnext_tiny", "tu-legacy_xception", "tu-regnetx_002"]


def universal(name: str) -> nn.Module:
    torch.manual_seed(0)
    encoder: nn.Module = smp.encoders.get_encoder(name, weights=None)
    return encoder


def deeplab(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_deeplab(name, None, 2).encoder  # type: ignore[return-value]


def donor(name: str, classes: int = 1000) -> State:
    """A whole timm model's state, unlike any encoder's here, as timm's files have it."""
    torch.manual_seed(1)
    model = timm.create_model(name.removeprefix("tu-"), num_classes=classes)
    return {key: torch.rand_like(v) if v.is_floating_point() else v + 7 for key, v in model.state_dict().items()}


def saved(folder: Path, content: object, name: str = "weights.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def assert_all_came(encoder: nn.Module, before: State, state: State) -> None:
    """Every tensor of the encoder changed, to one of the file."""
    for key, value in encoder.state_dict().items():
        assert not torch.equal(value, before[key]), key
        tail = key.split(".")[-1]
        assert any(k.endswith(tail) and torch.equal(value, v) for k, v in state.items() if v.shape == value.shape), key


def copied(module: nn.Module) -> State:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", UNIVERSAL)
def test_timms_own_files(tmp_path: Path, name: str) -> None:
    encoder, state = universal(name), donor(name)
    before = copied(encoder)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    load_encoder(encoder, name, path)
    assert_all_came(encoder, before, state)


@pytest.mark.parametrize("name", ["tu-resnet50s", "tu-resnet18", "tu-test_resnet"])
def test_timms_own_files_for_the_papers_network(tmp_path: Path, name: str) -> None:
    encoder, state = deeplab(name), donor(name)
    before = copied(encoder)
    load_encoder(encoder, name, saved(tmp_path, state))
    assert_all_came(encoder, before, state)
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


def test_each_tensor_lands_where_timm_puts_it(tmp_path: Path) -> None:
    encoder, state = universal("tu-test_convnext"), donor("tu-test_convnext")
    load_encoder(encoder, "tu-test_convnext", saved(tmp_path, state))
    own = encoder.state_dict()
    assert torch.equal(own["model.stem_0.weight"], state["stem.0.weight"])
    assert torch.equal(own["model.stages_2.blocks.0.norm.weight"], state["stages.2.blocks.0.norm.weight"])


@pytest.mark.parametrize("make", [universal, deeplab])
def test_the_encoders_own_state(tmp_path: Path, make: Callable[[str], nn.Module]) -> None:
    encoder = make("tu-test_resnet")
    state = {key: value + 1 for key, value in encoder.state_dict().items()}
    load_encoder(encoder, "tu-test_resnet", saved(tmp_path, state))
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


def test_smps_own_encoders_leave_out_the_classifier_too(tmp_path: Path) -> None:
    encoder = universal("mit_b0")  # no model of timm's
    state = {key: value + 1 for key, value in encoder.state_dict().items()}
    load_encoder(
        encoder, "mit_b0", saved(tmp_path, {**state, "head.weight": torch.ones(1), "head.bias": torch.ones(1)})
    )
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("wrap", ["state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", [TINY, "resnet18"])
def test_wrapped_files(tmp_path: Path, wrap: str, prefix: str, name: str) -> None:
    encoder, state = universal(name), donor(name)
    before = copied(encoder)
    wrapped = {"epoch": 3, wrap: {prefix + key: value for key, value in state.items()}}
    load_encoder(encoder, name, saved(tmp_path, wrapped))
    assert_all_came(encoder, before, state)


def test_a_classifier_for_other_classes_is_left_out(tmp_path: Path) -> None:
    load_encoder(universal(TINY), TINY, saved(tmp_path, donor(TINY, classes=7)))


@pytest.mark.parametrize("name", [TINY, "resnet18"])
def test_old_files_without_counters(tmp_path: Path, name: str) -> None:
    encoder = universal(name)
    counters = {
        key: value.fill_(5) for key, value in encoder.state_dict().items() if key.endswith("num_batches_tracked")
    }
    assert counters
    state = {key: value for key, value in donor(name).items() if not key.endswith("num_batches_tracked")}
    load_encoder(encoder, name, saved(tmp_path, state))
    assert all(encoder.state_dict()[key] == 5 for key in counters)


def changed(state: State, **changes: Tensor | None) -> State:
    merged = {**state, **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in merged.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"conv_stem__weight": None}, "the file lacks model.conv_stem.weight. "),
        ({"conv_stem__weight": None, "bn1__weight": None}, "the file lacks model.conv_stem.weight and 1 more. "),
        ({"bn1__running_mean": None}, "the file lacks model.bn1.running_mean. "),
        ({"extra__weight": torch.ones(1)}, "the file has the unknown extra.weight. "),
        ({"module__bn1__weight": torch.ones(1)}, "the file has the unknown module.bn1.weight. "),
        ({"conv_stem__weight": torch.ones(2, 3)}, "model.conv_stem.weight of shape (2, 3) instead of (24, 3, 3, 3). "),
        ({"conv_head__weight": torch.ones(2, 3)}, "the file has conv_head.weight of shape (2, 3) instead of ("),
        ({"model__bn1__weight": torch.ones(24)}, "both fit model.bn1.weight. "),
        ({"bn1__weight": 3}, "bn1.weight is a int. "),
    ],
)
def test_whatever_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Tensor | None], detail: str) -> None:
    path = saved(tmp_path, changed(donor(TINY), **changes))
    encoder = universal(TINY)
    before = copied(encoder)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(encoder, TINY, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: every key must fit the encoder {TINY}, but ")
    assert detail in message
    assert message.endswith("Choose the encoder this file was made for.")
    assert "\n" not in message
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("name", "other", "make"),
    [
        (TINY, "test_resnet", universal),
        ("tu-resnet18", "resnet34", universal),
        ("tu-test_resnet", "test_efficientnet", deeplab),
        ("tu-resnet50s", "resnet50", deeplab),  # the plain stem
        ("tu-resnet50s", "resnet50c", deeplab),  # the same keys, a 32-32-64 stem
        ("resnet18", "resnet34", universal),
        ("resnet18", "test_resnet", universal),
    ],
)
def test_files_of_other_models_are_refused(
    tmp_path: Path, name: str, other: str, make: Callable[[str], nn.Module]
) -> None:
    with pytest.raises(CheckpointError, match=r"weights\.pt: every key must fit"):
        load_encoder(make(name), name, saved(tmp_path, donor(other)))


@pytest.mark.parametrize("name", [TINY, "resnet18"])
@pytest.mark.parametrize("content", [torch.ones(3), {}, [torch.ones(3)], {"state_dict": {}}, {"epoch": 3}])
def test_files_without_weights_are_refused(tmp_path: Path, name: str, content: object) -> None:
    with pytest.raises(CheckpointError, match=r"weights\.pt: every key must fit"):
        load_encoder(universal(name), name, saved(tmp_path, content))


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    for file in ("weights.pt", "weights.safetensors"):
        path = tmp_path / file
        with pytest.raises(CheckpointError, match="does not exist"):
            load_encoder(universal(TINY), TINY, path)
        path.write_bytes(b"no weights")
        with pytest.raises(CheckpointError, match="cannot be read as weights"):
            load_encoder(universal(TINY), TINY, path)
